//! The client against the real node: bytes there and back, the node gone, back, frozen, and a wire that lies.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use kvclient::{
    BreakerState, Client, ErrorKind, GetOutcome, Heard, LocalPath, LookupOptions, Namespace,
    NamespaceHandle, PutBlock, PutOutcome, Target, WatchEvent, split_buffers,
};
use kvtests::{
    client::{assert_landed, assert_no_blocks_move, assert_unavailable, bytes, put_as, put_new},
    node::TestNode,
    patience::{HANG, eventually, nowhere, private_loopback, until, within_awake},
};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const MIB: usize = 1 << 20;

/// A client that goes over the wire although the node is on this machine; `local_client` tests the other way.
async fn over_grpc(endpoint: &str) -> Client {
    let builder = Client::builder(endpoint).local(LocalPath::Off);
    builder.connect().await.unwrap()
}

async fn open(client: &Client) -> NamespaceHandle {
    let spec = Namespace::opaque("client", 16, 4);
    client.open_namespace(&spec, false).await.unwrap()
}

/// Calls until one succeeds.
async fn until_it_answers(client: &Client) {
    until("the client finds the node", async || {
        client.stats().await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_of_every_size_come_back_over_tcp_and_unix() {
    let node = TestNode::start(|_| {}).await;
    let unix = format!("unix:{}", node.node.uds_path().unwrap().display());
    for endpoint in [node.node.endpoint(), unix] {
        let client = over_grpc(&endpoint).await;
        let ns = open(&client).await;
        client.invalidate(&ns, Target::All).await.unwrap();
        let data: Vec<Vec<u8>> = [1, 4095, 65_536, 65_537, MIB, 5 * MIB + 3]
            .iter()
            .enumerate()
            .map(|(i, len)| bytes(i as u8, *len))
            .collect();
        let chain = ns.chain(&(0..96).collect::<Vec<u32>>());
        let blocks: Vec<_> = data
            .iter()
            .enumerate()
            .map(|(i, d)| PutBlock::new(i, d))
            .collect();
        put_new(&client, &ns, &chain, &blocks).await;
        put_as(&client, &ns, &chain, &blocks, PutOutcome::Present).await;

        let found = client
            .lookup(&ns, &chain, &LookupOptions::default())
            .await
            .unwrap();
        assert_eq!((found.present_blocks, found.leased_blocks()), (6, 6));
        let mut memory = vec![0xee; 6 * 6 * MIB];
        let mut buffers = split_buffers(&mut memory, 6 * MIB).unwrap();
        let got = client
            .get_into(&ns, &chain, found.lease.as_ref(), &mut buffers)
            .await
            .unwrap();
        assert_landed(&got, &buffers, &data);
        assert_eq!(
            client
                .invalidate(&ns, Target::Prefix(chain.hashes[2]))
                .await
                .unwrap(),
            4
        );
        let fetched = client.get(&ns, &chain, None).await.unwrap();
        let hits = fetched.iter().filter(|f| f.bytes.is_some()).count();
        assert_eq!(hits, 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_callers_of_one_client_each_get_their_own_bytes() {
    let node = TestNode::start(|_| {}).await;
    let client = Client::connect(&node.node.endpoint()).await.unwrap();
    let ns = open(&client).await;
    let callers: Vec<_> = (0..40_u8)
        .map(|caller| {
            let (client, ns) = (client.clone(), ns.clone());
            tokio::spawn(async move {
                let chain = ns.engine_chain(&[[caller]]);
                let data = bytes(caller, 100_000 + usize::from(caller));
                let block = [PutBlock::new(0, &data)];
                put_new(&client, &ns, &chain, &block).await;
                for _ in 0..5 {
                    let fetched = client.get(&ns, &chain, None).await.unwrap();
                    assert!(
                        fetched[0].bytes.as_ref().unwrap() == &data,
                        "caller {caller}"
                    );
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
}

#[tokio::test]
async fn leases_end_with_their_client() {
    let node = TestNode::start(|_| {}).await;
    let watcher = Client::connect(&node.node.endpoint()).await.unwrap();
    let client = Client::connect(&node.node.endpoint()).await.unwrap();
    let ns = open(&client).await;
    let chain = ns.engine_chain(&[b"a"]);
    let block = [PutBlock::new(0, vec![1; 5000])];
    put_new(&client, &ns, &chain, &block).await;
    let found = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
    assert_eq!(watcher.stats().await.unwrap().leases, 1);
    // Both go at once: nobody is left to release it but the node, when the connections close.
    drop((found, client));
    until("the lease ends", async || {
        watcher.stats().await.unwrap().leases == 0
    })
    .await;
}

#[tokio::test]
async fn watchers_hear_of_puts_and_invalidations() {
    let node = TestNode::start(|_| {}).await;
    let client = Client::connect(&node.node.endpoint()).await.unwrap();
    let ns = open(&client).await;
    let mut watch = client
        .watch(Some(&ns), Duration::from_secs(60))
        .await
        .unwrap();
    let chain = ns.engine_chain(&[b"a"]);
    let block = [PutBlock::new(0, vec![1; 5000])];
    put_new(&client, &ns, &chain, &block).await;
    client.invalidate(&ns, Target::All).await.unwrap();
    let listening = watch.next().await.unwrap();
    assert!(matches!(
        listening.heard,
        Heard::Listening { missed: None, .. }
    ));
    let mut event = async || match watch.next().await.unwrap().heard {
        Heard::Event { sequence, event } => (sequence, event),
        heard => panic!("{heard:?}"),
    };
    let (stored, removed) = (event().await, event().await);
    assert!(matches!(stored.1, WatchEvent::Stored(b) if b.key.hash == chain.hashes[0]));
    assert!(matches!(removed.1, WatchEvent::Removed(b) if b.key.hash == chain.hashes[0]));
    assert_eq!(removed.0, stored.0 + 1);
}

/// A wire between client and node that flips bits while it is told to.
struct Tamperer {
    address: SocketAddr,
    lying: Arc<AtomicBool>,
    flipped: Arc<AtomicU64>,
}

impl Tamperer {
    /// Flips the lowest bit of every 64th KiB of what the node says; that is deep within payload.
    async fn start(node: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let lying = Arc::new(AtomicBool::new(false));
        let flipped = Arc::new(AtomicU64::new(0));
        let (lies, flips) = (lying.clone(), flipped.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let node = TcpStream::connect(node).await.unwrap();
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_node, mut to_node) = node.into_split();
                tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_node).await });
                let (lies, flips) = (lies.clone(), flips.clone());
                tokio::spawn(async move {
                    let mut chunk = vec![0; 256 << 10];
                    while let Ok(n) = from_node.read(&mut chunk).await {
                        if n == 0 {
                            break;
                        }
                        // Short chunks hold frame heads and trailers; those are another test's.
                        if lies.load(Ordering::Relaxed) && n > 8192 {
                            chunk[n / 2] ^= 1;
                            flips.fetch_add(1, Ordering::Relaxed);
                        }
                        if to_client.write_all(&chunk[..n]).await.is_err() {
                            break;
                        }
                    }
                });
            }
        });
        Self {
            address,
            lying,
            flipped,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wire_that_flips_bits_never_gets_a_wrong_byte_through() {
    let node = TestNode::start(|_| {}).await;
    let wire = Tamperer::start(node.node.grpc_addr()).await;
    let client = over_grpc(&wire.address.to_string()).await;
    let ns = open(&client).await;
    let chain = ns.engine_chain(&[b"a"]);
    let data = bytes(1, 4 * MIB);
    let block = [PutBlock::new(0, &data)];
    put_new(&client, &ns, &chain, &block).await;
    let mut buffer = vec![0; data.len()];

    wire.lying.store(true, Ordering::Relaxed);
    for _ in 0..10 {
        let flipped = wire.flipped.load(Ordering::Relaxed);
        // A flip that hits a frame's head breaks the connection; one in the payload breaks the block.
        match client.get_into(&ns, &chain, None, &mut [&mut buffer]).await {
            Ok(got) => assert_eq!(got[0].outcome, GetOutcome::Corrupt),
            Err(error) => assert_ne!(error.kind(), ErrorKind::FixRequest, "{error}"),
        }
        assert!(
            wire.flipped.load(Ordering::Relaxed) > flipped,
            "the wire has lied"
        );
    }
    wire.lying.store(false, Ordering::Relaxed);
    until_it_answers(&client).await;
    let got = client
        .get_into(&ns, &chain, None, &mut [&mut buffer])
        .await
        .unwrap();
    assert!(got[0].is_hit() && buffer == data);
}

/// A node as a child process; it ends with its handle.
struct ChildNode {
    child: Child,
    endpoint: String,
}

impl ChildNode {
    fn start(dir: &TempDir, listen: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_node_process"))
            .arg(dir.path())
            .arg(listen)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut endpoint = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut endpoint).unwrap();
        Self {
            child,
            endpoint: endpoint.trim().to_owned(),
        }
    }

    /// Stops its clock. The signal takes effect in its own time: waited for, or a last call slips through.
    fn freeze(&self) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::STOP).unwrap();
        waitpid(Some(pid), WaitOptions::UNTRACED).unwrap();
    }

    fn thaw(&self) {
        kill_process(Pid::from_child(&self.child), Signal::CONT).unwrap();
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for ChildNode {
    fn drop(&mut self) {
        // A frozen process dies of SIGKILL too; a dead one does not mind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const DEADLINE: Duration = Duration::from_millis(400);
/// For calls that must succeed, however slow the machine.
const PATIENT: Duration = HANG;

async fn patient(endpoint: &str) -> Client {
    let client = Client::builder(endpoint)
        .local(LocalPath::Off)
        .deadline(PATIENT)
        .connect();
    client.await.expect("a node is there")
}

/// One of every call; each must end within its deadline, and say that the node is unavailable.
async fn assert_all_unavailable(client: &Client, ns: &NamespaceHandle) {
    assert_no_blocks_move(DEADLINE, client, ns, &ns.engine_chain(&[b"a"])).await;
    assert_unavailable(DEADLINE, client.invalidate(ns, Target::All)).await;
    assert_unavailable(DEADLINE, client.watch(None, Duration::from_secs(1))).await;
    assert_unavailable(DEADLINE, client.stats()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_is_unavailable_and_the_first_call_after_its_return_succeeds() {
    let dir = TempDir::new().unwrap();
    let mut node = ChildNode::start(&dir, &private_loopback());
    let client = patient(&node.endpoint).await;
    let ns = open(&client).await;
    let boot = client.boot_id();
    for _ in 0..3 {
        let listen = node.endpoint.trim_start_matches("http://").to_owned();
        node.kill();
        assert_all_unavailable(&client.with_deadline(DEADLINE), &ns).await;
        node = ChildNode::start(&dir, &listen);
        // The very first, whatever the breaker thinks.
        let chain = ns.engine_chain(&[b"a"]);
        client
            .lookup(&ns, &chain, &LookupOptions::default())
            .await
            .unwrap();
    }
    assert_ne!(client.boot_id(), boot);
    assert_eq!(client.reboots(), 3);
    assert_eq!(client.breaker(), BreakerState::Closed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_node_costs_each_call_its_deadline_at_most_and_is_found_again() {
    let dir = TempDir::new().unwrap();
    let node = ChildNode::start(&dir, &private_loopback());
    let client = patient(&node.endpoint).await;
    let ns = open(&client).await;
    let boot = client.boot_id();
    node.freeze();
    assert_all_unavailable(&client.with_deadline(DEADLINE), &ns).await;
    // By now its silence is known: calls are refused at once instead of waiting.
    eventually("silence opens the breaker", || {
        client.breaker() == BreakerState::Open
    })
    .await;
    let refused = within_awake(DEADLINE / 2, client.stats())
        .await
        .expect("a refusal is quick");
    assert!(
        matches!(refused, Err(kvclient::Error::BreakerOpen { .. })),
        "{refused:?}"
    );
    node.thaw();
    until_it_answers(&client).await;
    assert_eq!(client.boot_id(), boot, "it is the same life");
}

#[tokio::test]
async fn a_client_may_start_before_its_node() {
    let dir = TempDir::new().unwrap();
    let free = nowhere();
    let client = Client::builder(&free.to_string())
        .deadline(DEADLINE)
        .connect_lazily()
        .unwrap();
    assert!(client.stats().await.unwrap_err().is_unavailable());
    assert!(
        Client::builder(&free.to_string())
            .deadline(DEADLINE)
            .connect()
            .await
            .is_err()
    );
    let _node = ChildNode::start(&dir, &free.to_string());
    client.with_deadline(PATIENT).stats().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_go_out_of_pieces_and_come_back_into_others() {
    let node = TestNode::start(|_| {}).await;
    let client = over_grpc(&node.node.endpoint()).await;
    let ns = open(&client).await;
    let chain = ns.chain(&(0..64).collect::<Vec<u32>>());
    let data: Vec<Vec<u8>> = [3, 65_536, 300_001, 2 * MIB + 5]
        .iter()
        .enumerate()
        .map(|(i, len)| bytes(i as u8, *len))
        .collect();
    let blocks: Vec<_> = data
        .iter()
        .enumerate()
        .map(|(i, d)| PutBlock::new(i, d.chunks(20_011).collect::<Vec<_>>()))
        .collect();
    put_new(&client, &ns, &chain, &blocks).await;
    let whole = client.get(&ns, &chain, None).await.unwrap();
    for (whole, data) in whole.iter().zip(&data) {
        assert!(whole.bytes.as_deref() == Some(&data[..]));
    }

    let mut memory: Vec<Vec<u8>> = data.iter().map(|d| vec![0xee; d.len()]).collect();
    let mut scattered: Vec<Vec<&mut [u8]>> = memory
        .iter_mut()
        .map(|m| m.chunks_mut(7_001).collect())
        .collect();
    let got = client
        .get_scattered(&ns, &chain, None, &mut scattered)
        .await
        .unwrap();
    assert!(got.iter().all(kvclient::Got::is_hit), "{got:?}");
    assert!(memory == data);
    let path = client.path();
    assert_eq!(path.grpc.got_blocks, 8);
    assert_eq!(path.grpc.put_blocks, 4);
}

#[tokio::test]
async fn namespaces_beyond_one_page_are_all_listed() {
    const COUNT: usize = 1030;
    let node = TestNode::start(|_| {}).await;
    let client = Client::builder(&node.node.endpoint())
        .deadline(HANG)
        .connect()
        .await
        .unwrap();
    let specs: Vec<Namespace> = (0..COUNT)
        .map(|i| Namespace::opaque(&format!("n{i}"), 16, 8))
        .collect();
    for some in specs.chunks(100) {
        let opened = some.iter().map(|spec| client.open_namespace(spec, false));
        for opened in futures_util::future::join_all(opened).await {
            opened.unwrap();
        }
    }
    let all = client.namespaces(None).await.unwrap();
    assert_eq!((all.known.len(), all.silent.len()), (COUNT, 0));
    assert!(all.known.is_sorted_by(|a, b| a.id < b.id));
    let one = client.namespaces(Some("n1029")).await.unwrap().known;
    assert_eq!(one.len(), 1);
    assert_eq!(one[0].namespace, specs[1029]);
    node.stop().await;
    let nobody = client.namespaces(None).await;
    assert!(nobody.unwrap_err().is_unavailable());
}
