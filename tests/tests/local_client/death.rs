//! Clients that are killed or stopped in the middle.

use std::time::Duration;

use kvclient::{GetOutcome, Target};
use kvtests::{
    node::TestNode,
    patience::{eventually, within_awake},
};

use crate::{MIB, chain, open, over_grpc, process::Process, put};

/// As `local_client_process` has them.
const BLOCKS: usize = 12;

/// How soon a dead client's things must be back.
const AT_ONCE: Duration = Duration::from_secs(1);

pub(crate) fn metric(node: &TestNode, name: &str) -> f64 {
    let stats = node.node.blocks().stats();
    let counter = stats.counters.iter().find(|counter| counter.name == name);
    counter.unwrap_or_else(|| panic!("no metric {name}")).value
}

/// Whether nothing is held for anybody any more.
fn is_clean(node: &TestNode) -> bool {
    node.node.blocks().stats().leases == 0
        && metric(node, "terrace_local_connections") == 0.0
        && metric(node, "terrace_local_staging_bytes") == 0.0
        && metric(node, "terrace_local_held_bytes") == 0.0
}

async fn assert_clean_at_once(node: &TestNode) {
    let clean = eventually("a dead client's things are back", || is_clean(node));
    assert!(within_awake(AT_ONCE, clean).await.is_some(), "too late");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_killed_with_leases_and_holds_gives_all_back_at_once() {
    let node = TestNode::start(|_| {}).await;
    let grpc = over_grpc(&node).await;
    let ns = open(&grpc).await;
    put(&grpc, &ns, &chain(&ns, 1, BLOCKS as u32), &[MIB; BLOCKS]).await;
    let mut client = Process::client("hold", &node.node.endpoint());
    assert_eq!(client.line(), "held");
    assert_eq!(node.node.blocks().stats().leases, 1);
    client.kill();
    assert_clean_at_once(&node).await;
    // What it pinned can go.
    grpc.invalidate(&ns, Target::All).await.unwrap();
    assert_eq!(node.arena_bytes(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_killed_between_writing_and_putting_leaves_no_memory_behind() {
    let node = TestNode::start(|_| {}).await;
    let path = node.node.local_path().unwrap().to_str().unwrap();
    let mut client = Process::client("staged", path);
    assert_eq!(client.line(), "staged");
    assert!(metric(&node, "terrace_local_staging_bytes") > 0.0);
    client.kill();
    assert_clean_at_once(&node).await;
    assert_eq!(node.arena_bytes(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_killed_at_any_moment_of_a_put_leaves_whole_blocks_or_none() {
    let node = TestNode::start(|_| {}).await;
    let grpc = over_grpc(&node).await;
    let ns = open(&grpc).await;
    for moment in 0..6 {
        let mut client = Process::client("put", &node.node.endpoint());
        assert_eq!(client.line(), "putting");
        let before = metric(&node, "terrace_local_put_bytes_total");
        eventually("some of it has come", || {
            metric(&node, "terrace_local_put_bytes_total") > before + f64::from(moment * 777_777)
        })
        .await;
        client.kill();
        assert_clean_at_once(&node).await;
    }
    for seed in 2..40 {
        let fetched = grpc.get(&ns, &chain(&ns, seed, 4), None).await.unwrap();
        for bytes in fetched.iter().filter_map(|block| block.bytes.as_ref()) {
            assert_eq!(*bytes, kvtests::node::filled(1, MIB));
        }
    }
    grpc.invalidate(&ns, Target::All).await.unwrap();
    assert_eq!(node.arena_bytes(), 0, "a slot was lost");
}

/// The first block's bytes are another's by the time it is read: the node has let go of a hold whose time was up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_sleeps_while_its_slots_get_new_tenants_finds_out() {
    let node = TestNode::start(|config| config.local_hold = Duration::from_millis(200)).await;
    let grpc = over_grpc(&node).await;
    let ns = open(&grpc).await;
    put(&grpc, &ns, &chain(&ns, 1, BLOCKS as u32), &[MIB; BLOCKS]).await;
    let mut reader = Process::client("holder", &node.node.endpoint());
    assert_eq!(reader.line(), "held");
    reader.freeze();
    eventually("its hold is over", || {
        metric(&node, "terrace_local_held_bytes") == 0.0
    })
    .await;
    grpc.invalidate(&ns, Target::All).await.unwrap();
    assert_eq!(node.arena_bytes(), 0, "its slots are free");
    // Every slot that was free has a new tenant.
    put(&grpc, &ns, &chain(&ns, 2, 40), &[MIB; 40]).await;
    reader.thaw();
    reader.go();
    assert_eq!(
        reader.line(),
        format!("{:?}", [GetOutcome::Expired; BLOCKS])
    );
}

/// Where the sleep falls is chance: into a copy, before it, behind it. Whatever it is, no hit is wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_is_stopped_at_any_moment_never_takes_a_wrong_byte() {
    let node = TestNode::start(|_| {}).await;
    let grpc = over_grpc(&node).await;
    let ns = open(&grpc).await;
    let (old, new) = (chain(&ns, 1, BLOCKS as u32), chain(&ns, 2, 40));
    let mut reader = Process::client("read", &node.node.endpoint());
    for round in 0_u64..12 {
        put(&grpc, &ns, &old, &[MIB; BLOCKS]).await;
        reader.go();
        kvtests::patience::pause(Duration::from_micros(20_000 + round * 1_700)).await;
        reader.freeze();
        eventually("its lease is over", || {
            node.node.blocks().stats().leases == 0
        })
        .await;
        grpc.invalidate(&ns, Target::All).await.unwrap();
        put(&grpc, &ns, &new, &[MIB; 40]).await;
        reader.thaw();
        let saw = reader.line();
        assert!(!saw.starts_with("wrong"), "{saw:?}");
        grpc.invalidate(&ns, Target::All).await.unwrap();
    }
}
