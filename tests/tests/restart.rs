//! The node as a process: killed, stopped, started twice.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use bytes::Bytes;
use kvproto::v1::{Ack, GetOutcome, PutOutcome, invalidate_request::Target};
use kvtests::{
    node::{Stock, filled},
    patience::private_loopback,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A node in a process of its own.
struct Process {
    child: Child,
    endpoint: String,
}

fn command(data_dir: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvtests-node"));
    command.arg("--data-dir").arg(data_dir).args([
        "--listen=127.0.0.1:0",
        "--http-listen=off",
        "--ram-bytes=32MiB",
        "--nvme-bytes=128MiB",
        "--durable-bytes=64MiB",
        "--nvme-wear-bytes-per-day=0",
        "--prefault=false",
        "--log=warn",
    ]);
    command
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

impl Process {
    fn start(data_dir: &Path) -> Self {
        let mut child = command(data_dir, &[]).spawn().expect("a process");
        let out = child.stdout.take().expect("a pipe");
        let mut endpoint = None;
        for line in BufReader::new(out).lines() {
            let line = line.expect("text");
            if let Some(at) = line.find("http://").filter(|_| line.contains("grpc")) {
                endpoint = Some(line[at..].trim().to_owned());
            }
            if line == "ready" {
                break;
            }
        }
        Self {
            child,
            endpoint: endpoint.expect("the node prints where it listens"),
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a process id");
        kill_process(pid, signal).expect("the process is ours");
    }

    fn kill(mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("it ends");
    }

    fn stop(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.child.wait().expect("it ends")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn all_hit(client: &mut Stock, chain: &kvproto::Chain, blocks: &[Bytes]) {
    let got = client.get(chain, 0, 0).await.unwrap();
    for (i, ((outcome, bytes), sent)) in got.iter().zip(blocks).enumerate() {
        assert_eq!(*outcome, GetOutcome::Hit, "block {i}");
        assert!(bytes == sent, "block {i}");
    }
}

#[tokio::test]
async fn a_killed_node_keeps_what_it_answered_stored_and_forgets_what_it_was_told_to() {
    let dir = TempDir::new().unwrap();
    let node = Process::start(dir.path());
    let mut client = Stock::open(&node.endpoint).await;
    let chain = client.chain(1, 8);
    let blocks: Vec<Bytes> = (0..8).map(|i| filled(i, 300_000)).collect();
    let results = client.put(&chain, &blocks, Ack::Stored).await.unwrap();
    assert!(results.iter().all(|r| r.outcome() == PutOutcome::Stored));
    let cached = client.chain(2, 2);
    client
        .put(&cached, &blocks[..2], Ack::Cached)
        .await
        .unwrap();
    let gone = Bytes::copy_from_slice(&chain.hashes[6].0);
    assert_eq!(
        client.invalidate(Target::PrefixHash(gone)).await.unwrap(),
        2
    );
    let (before, key) = (client.namespace, client.key);
    node.kill();

    let node = Process::start(dir.path());
    let mut client = Stock::open(&node.endpoint).await;
    assert_eq!(
        (client.namespace, client.key.as_bytes()),
        (before, key.as_bytes())
    );
    let found = client.lookup(&chain, None).await.unwrap();
    assert_eq!(found.present_blocks, 6, "all but what was invalidated");
    let kept = client.chain(1, 6);
    all_hit(&mut client, &kept, &blocks[..6]).await;
    // What was only cached is gone, and the lookup knows it.
    assert_eq!(
        client.lookup(&cached, None).await.unwrap().present_blocks,
        0
    );
    node.kill();

    // Once more: what came back once comes back again, and what was gone stays gone.
    let node = Process::start(dir.path());
    let mut client = Stock::open(&node.endpoint).await;
    assert_eq!(client.lookup(&chain, None).await.unwrap().present_blocks, 6);
    assert!(node.stop().success());
}

#[tokio::test]
async fn a_killed_node_keeps_what_it_answered_synced() {
    let dir = TempDir::new().unwrap();
    let node = Process::start(dir.path());
    let mut client = Stock::open(&node.endpoint).await;
    let chain = client.chain(1, 3);
    let blocks: Vec<Bytes> = (0..3).map(|i| filled(i, 100_000)).collect();
    let results = client.put(&chain, &blocks, Ack::Synced).await.unwrap();
    assert!(results.iter().all(|r| r.outcome() == PutOutcome::Synced));
    node.kill();
    let node = Process::start(dir.path());
    let mut client = Stock::open(&node.endpoint).await;
    let chain = client.chain(1, 3);
    all_hit(&mut client, &chain, &blocks).await;
    assert!(node.stop().success());
}

#[tokio::test]
async fn a_node_that_is_asked_to_stop_ends_well() {
    let dir = TempDir::new().unwrap();
    let node = Process::start(dir.path());
    let mut client = Stock::open(&node.endpoint).await;
    let chain = client.chain(1, 1);
    client
        .put(&chain, &[filled(1, 10_000)], Ack::Stored)
        .await
        .unwrap();
    assert_eq!(node.stop().code(), Some(0));
    let node = Process::start(dir.path());
    let mut client = Stock::open(&node.endpoint).await;
    assert_eq!(client.lookup(&chain, None).await.unwrap().present_blocks, 1);
}

fn refusal(mut command: Command) -> String {
    let output = command.output().expect("a process");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_second_node_on_the_same_folder_says_who_has_it() {
    let dir = TempDir::new().unwrap();
    let node = Process::start(dir.path());
    let message = refusal(command(dir.path(), &[]));
    assert!(message.contains("in use by another node"), "{message}");
    assert!(message.contains(&node.child.id().to_string()), "{message}");
    assert!(message.contains("--data-dir"), "{message}");
}

#[test]
fn a_port_in_use_says_what_to_do() {
    let dir = TempDir::new().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let message = refusal(command(dir.path(), &["--listen", &address]));
    assert!(
        message.contains(&address) && message.contains("--listen"),
        "{message}"
    );
    let message = refusal(command(dir.path(), &["--http-listen", &address]));
    assert!(
        message.contains(&address) && message.contains("--http-listen"),
        "{message}"
    );
}

#[test]
fn a_folder_that_cannot_be_made_says_which() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let below = file.path().join("data");
    let message = refusal(command(&below, &[]));
    assert!(message.contains(&below.display().to_string()), "{message}");
}

#[test]
fn a_wrong_setting_is_refused_before_anything_starts() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data");
    let message = refusal(command(&data, &["--lease-ttl=soon"]));
    assert!(
        message.contains("lease_ttl = \"soon\" (from flag --lease-ttl)"),
        "{message}"
    );
    let mut from_environment = command(&data, &[]);
    from_environment.env("TERRACE_SHARDS", "0");
    let message = refusal(from_environment);
    assert!(
        message.contains("shards = \"0\" (from environment, TERRACE_SHARDS)"),
        "{message}"
    );
    assert!(!data.exists());
}

#[test]
fn check_starts_and_stops_and_print_config_is_a_file() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data");
    let output = command(&data, &["--check"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let left = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 0, "a check leaves nothing behind");
    let mut child = command(dir.path(), &["--print-config", "--shards=3"])
        .spawn()
        .unwrap();
    let mut text = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(child.wait().unwrap().success());
    assert!(text.contains("shards = \"3\""), "{text}");
}

#[test]
fn check_refuses_what_a_start_would_lack_and_names_the_field() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data");
    let missing = dir.path().join("missing").display().to_string();
    let cases = [
        ("--ram-bytes=60TiB", "ram_bytes = \"61440GiB\""),
        ("--nvme-bytes=1000TiB", "nvme_bytes = \"1024000GiB\""),
        (&*format!("--tokens-file={missing}"), "tokens_file = "),
        (
            &*format!("--peer-token-file={missing}"),
            "peer_token_file = ",
        ),
        (&*format!("--secret-file={missing}"), "secret_file = "),
    ];
    for (flag, said) in cases {
        let message = refusal(command(&data, &["--check", flag]));
        assert!(message.contains(said), "{flag}: {message}");
        assert!(!message.contains(".check-"), "{flag}: {message}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

    // Nobody listens there; this node may be the first.
    let deserted = std::net::UdpSocket::bind(private_loopback()).unwrap();
    let join = format!("--join={}", deserted.local_addr().unwrap());
    let output = command(&data, &["--check", &join]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("  join     "), "{said}");

    fs::create_dir(&data).unwrap();
    fs::write(data.join("namespaces.json"), "no JSON").unwrap();
    let message = refusal(command(&data, &["--check"]));
    assert!(message.contains("namespaces.json"), "{message}");
}
