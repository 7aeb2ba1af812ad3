//! `kvctl cluster` against three nodes in this process: what a person sees while blocks move, and what a drain says.

use std::{
    process::{Command, Output, Stdio},
    time::Duration,
};

use kvproto::{Member, MemberId, MemberState};
use kvserver::{
    Node,
    config::{Capacity, Config, LogFormat, MIB},
};
use serde_json::Value;
use tempfile::TempDir;

/// Only ends a test that hangs.
const HANG: Duration = Duration::from_secs(60);

/// Files that are stored, so many bytes each: a run of 64 blocks and a block of another.
const FILES: u32 = 18;
const FILE_BYTES: u32 = 64 << 10;

/// Nodes `n0`, `n1` and on, each of which joined those before.
struct Town {
    nodes: Vec<Node>,
    dir: TempDir,
    bytes_per_second: u64,
}

impl Town {
    /// So many nodes of equal share that hand blocks over at this pace; 0: at any.
    async fn start(count: usize, bytes_per_second: u64) -> Self {
        let dir = TempDir::new().unwrap();
        // The same names and the same secret place the same files alike each time.
        std::fs::write(dir.path().join("secret"), [7; 32]).unwrap();
        let mut town = Self {
            nodes: Vec::new(),
            dir,
            bytes_per_second,
        };
        for _ in 0..count {
            town.add().await;
        }
        town
    }

    /// One more; every node knows it when this returns.
    async fn add(&mut self) {
        let id = format!("n{}", self.nodes.len());
        let config = Config {
            data_dir: self.dir.path().join(&id),
            secret_file: self.dir.path().join("secret"),
            node_id: id,
            listen: "127.0.0.1:0".parse().unwrap(),
            join: self.nodes.iter().map(|n| n.grpc_addr().into()).collect(),
            join_ramp: Duration::ZERO,
            weight: 1,
            peer_bytes_per_second: self.bytes_per_second,
            // A read has time to fetch, however busy the machine is.
            motion_wait: Duration::from_secs(20),
            http_listen: None,
            ram_bytes: Capacity::Bytes(64 * MIB),
            nvme_bytes: Capacity::Bytes(0),
            durable_bytes: Capacity::Bytes(0),
            worker_threads: 2,
            log_format: LogFormat::Off,
            ..Config::default()
        };
        self.nodes.push(Node::start(config).await.unwrap());
        self.owners(self.nodes.len()).await;
    }

    /// Waits until every node places runs with so many.
    async fn owners(&self, count: usize) {
        for node in &self.nodes {
            let mut changes = node.cluster().changes();
            let agreed = changes.wait_for(|roster| roster.placement.len() == count);
            let agreed = tokio::time::timeout(HANG, agreed).await;
            agreed.expect("they learn of each other").unwrap();
        }
    }

    fn command(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvctl"));
        command
            .args(words.split(' '))
            .env("TERRACE_ENDPOINT", self.nodes[0].endpoint())
            .stdin(Stdio::null());
        command
    }

    /// Runs kvctl; the nodes live on threads of their own meanwhile.
    fn run(&self, words: &str) -> Output {
        self.command(words).output().unwrap()
    }

    fn text(&self, words: &str) -> String {
        let output = self.run(words);
        assert_eq!(output.status.code(), Some(0), "{words}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, words: &str) -> Value {
        serde_json::from_str(&self.text(&format!("{words} --json"))).unwrap()
    }

    /// What `kvctl cluster` says of a member, and of the view.
    fn member(&self, id: &str) -> (Value, Value) {
        let report = self.json("cluster");
        let members = report["members"].as_array().unwrap();
        let is_it = |member: &&Value| member["id"] == id;
        let member = members.iter().find(is_it).expect("it is shown").clone();
        (member, report)
    }

    /// Asks until what `kvctl cluster` says of a member is so.
    async fn shown(&self, id: &str, is_so: impl Fn(&Value) -> bool) -> (Value, Value) {
        let asking = async {
            loop {
                let (member, report) = self.member(id);
                if is_so(&member) {
                    return (member, report);
                }
                tokio::task::yield_now().await;
            }
        };
        let shown = tokio::time::timeout(HANG, asking).await;
        shown.unwrap_or_else(|_| panic!("{:?}", self.member(id)))
    }

    fn file(number: u32) -> Vec<u8> {
        let byte = |i: u32| (i >> 7) as u8 ^ (i as u8).wrapping_mul(31) ^ number as u8;
        (0..FILE_BYTES).map(byte).collect()
    }

    /// Stores all files.
    fn fill(&self) {
        let path = self.dir.path().join("file");
        for number in 0..FILES {
            std::fs::write(&path, Self::file(number)).unwrap();
            let words = format!("put file-{number} {} --block-size 1KiB", path.display());
            self.text(&words);
        }
    }

    /// Files that do not come back whole, and what is said of each. Each is asked for again where it is not: a member
    /// that says nothing for most of a second is passed over, and a busy machine makes that of any.
    fn lost(&self) -> Vec<String> {
        let read = |number: u32| {
            let got = self.run(&format!("get file-{number}"));
            match got.status.success() && got.stdout == Self::file(number) {
                true => None,
                false => Some(String::from_utf8_lossy(&got.stderr).into_owned()),
            }
        };
        let lost = |number: u32| {
            let said = read(number)
                .and_then(|_| read(number))
                .and_then(|_| read(number))?;
            Some(format!("file-{number}: {said}"))
        };
        (0..FILES).filter_map(lost).collect()
    }

    fn held_bytes(&self, number: usize) -> u64 {
        let tiers = self.nodes[number].blocks().stats().tiers;
        tiers.iter().map(|tier| tier.used_bytes).sum()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_is_shown_with_its_share_and_a_weight_is_set_by_name() {
    let town = Town::start(3, 0).await;
    let (_, report) = town.member("n0");
    let members = report["members"].as_array().unwrap();
    let ids: Vec<_> = members.iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(
        (ids, &report["asked"]),
        (vec!["n0", "n1", "n2"], &"n0".into())
    );
    for (member, node) in members.iter().zip(&town.nodes) {
        assert_eq!(
            (&member["state"], &member["standing"]),
            (&"active".into(), &"well".into())
        );
        assert_eq!(member["address"], node.endpoint());
        let owned = member["owned_share"].as_f64().unwrap();
        assert!((owned - 1.0 / 3.0).abs() < 0.01, "{member}");
    }

    // Another node than the one that is asked.
    let weighed = town.json("cluster weight n2 6");
    assert_eq!(
        (&weighed["node"], &weighed["weight"]),
        (&"n2".into(), &6.into())
    );
    assert_eq!(town.nodes[2].cluster().declared().weight, 6);
    let (member, _) = town.shown("n2", |member| member["weight"] == 6).await;
    for share in ["weight_share", "owned_share"] {
        let share = member[share].as_f64().unwrap();
        assert!((share - 0.75).abs() < 0.01, "{member}");
    }
    assert_eq!(town.text("cluster weight n1 0"), "n1 declares weight 0\n");
    town.shown("n1", |member| member["owned_share"] == 0.0)
        .await;
    let text = town.text("cluster");
    for words in ["n0 *", "n1 ", "n2 ", "active", "well", "0.00 %"] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_join_and_a_drain_still_have_to_move_is_shown_with_its_bytes() {
    // A byte a second: what is on its way stays so.
    let mut town = Town::start(2, 1).await;
    town.fill();
    town.add().await;
    let waits = |member: &Value| member["waiting_bytes"].as_u64() > Some(0);
    let (old, report) = town.shown("n0", waits).await;
    assert_eq!(
        (&old["state"], &report["young"]),
        (&"active".into(), &true.into())
    );
    let text = town.text("cluster");
    for words in ["blocks may still be moving", "to hand over", "KiB, "] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert_eq!(town.lost(), [""; 0], "where it was, or fetched");

    let drained = town.run("cluster drain n1 --within 100ms --json");
    assert_eq!(drained.status.code(), Some(1), "{drained:?}");
    let report: Value =
        serde_json::from_slice(drained.stdout.split(|b| *b == b'\n').next().unwrap()).unwrap();
    assert_eq!(report["phase"], "deadline");
    let at_stake = report["at_stake_bytes"].as_u64().unwrap();
    assert!(
        at_stake > 0 && report["left_blocks"].as_u64() > Some(0),
        "{report}"
    );
    let drains = |member: &Value| member["state"] == "draining" && waits(member);
    let (member, _) = town.shown("n1", drains).await;
    assert_eq!(member["owned_share"], 0.0, "it takes nothing new");
    let text = town.text("cluster members");
    let line = text.lines().find(|line| line.starts_with("n1 ")).unwrap();
    assert!(
        line.contains("draining") && line.contains("KiB, "),
        "{line}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_has_handed_over_everything_says_so_and_nothing_is_lost() {
    let town = Town::start(3, 0).await;
    town.fill();
    assert_eq!(town.lost(), [""; 0], "just put");
    let held = [town.held_bytes(1), town.held_bytes(2)];
    assert!(held[0] > 0 && held[1] > 0, "{held:?}");

    let report = town.json("cluster drain n2 --within 1min");
    assert_eq!(
        (&report["node"], &report["phase"]),
        (&"n2".into(), &"left".into())
    );
    for nothing in ["at_stake_bytes", "left_blocks"] {
        assert_eq!(report[nothing], 0, "{report}");
    }
    assert!(report["moved_runs"].as_u64() > Some(0), "{report}");
    assert!(report["moved_bytes"].as_u64() > Some(0), "{report}");
    town.shown("n2", |member| member["state"] == "gone").await;
    assert_eq!(town.lost(), [""; 0]);

    // In words, and with the last but one.
    let text = town.text("cluster drain n1");
    assert!(text.starts_with("n1 has left, nothing is lost; "), "{text}");
    assert!(
        text.contains("runs handed over") && text.contains("may be stopped now"),
        "{text}"
    );
    town.owners(1).await;
    let mut town = town;
    for gone in town.nodes.drain(1..) {
        gone.shutdown(HANG).await;
    }
    assert_eq!(town.lost(), [""; 0], "n0 has it all");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_key_is_put_although_a_member_that_does_not_own_it_is_silent() {
    let town = Town::start(2, 0).await;
    let silent = Member {
        id: MemberId("silent".to_owned()),
        generation: 1,
        version: 1,
        weight: 1,
        zone: String::new(),
        state: MemberState::Active,
        address: "http://127.0.0.1:1".to_owned(), // nobody listens there
    };
    let cluster = town.nodes[0].cluster();
    cluster.merge(vec![silent]);
    let path = town.dir.path().join("file");
    std::fs::write(&path, Town::file(1)).unwrap();
    let mut kept = 0;
    for number in 0..12 {
        let put = town.run(&format!("put new-{number} {}", path.display()));
        if put.status.success() {
            kept += 1;
            let got = town.run(&format!("get new-{number}"));
            assert!(got.stdout == Town::file(1), "{got:?}");
        } else {
            let said = String::from_utf8_lossy(&put.stderr).into_owned();
            assert!(said.contains("does not answer"), "{said}");
        }
    }
    // The silent member owns a third.
    assert!((4..12).contains(&kept), "{kept} of 12");

    // What nobody can say of some keys keeps nobody from saying the rest.
    let keys: Vec<String> = (0..12).map(|number| format!("new-{number}")).collect();
    let words = format!("lookup {} --json", keys.join(" "));
    let looked = town.run(&words);
    assert_eq!(looked.status.code(), Some(1), "{looked:?}");
    let report: Value = serde_json::from_slice(&looked.stdout).unwrap();
    let found = report["keys"].as_array().unwrap();
    let count = |is_so: fn(&Value) -> bool| found.iter().filter(|key| is_so(key)).count();
    assert_eq!(count(|key| key["present_blocks"] == 2), kept, "{report}");
    assert_eq!(
        count(|key| key["problem"].is_string()),
        12 - kept,
        "{report}"
    );
}
