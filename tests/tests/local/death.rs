//! Ends: of a client, which gives everything back at once, and of a node, which waits for nobody who idles.

use std::time::Duration;

use bytes::Bytes;
use kvproto::{convert::request::Target, v1};
use kvserver::{
    engine::TenantId,
    tier::{Fault, Faults},
};
use kvtests::{
    local::{Raw, Space, pattern},
    node::TestNode,
    patience::{HANG, eventually, within_awake},
};
use tempfile::TempDir;

use super::{Client, MIB, metric, outcomes, put_one, with_a_disk};

#[tokio::test]
async fn a_client_that_dies_gives_back_leases_holds_and_memory() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (chain, _) = put_one(&mut client, &space, 1, MIB);
    let leased = client.raw.lookup(space.lookup(&chain, 60_000)).lease;
    assert!(leased.is_some());
    let (held, _) = put_one(&mut client, &space, 2, MIB);
    assert_ne!(client.raw.get(space.get(&held, 0)).hold, 0);
    node.node
        .blocks()
        .invalidate(TenantId(0), space.id, Target::All)
        .await
        .expect("forgotten");
    assert_eq!(node.arena_bytes(), MIB as u64, "the hold's");
    assert_eq!(node.node.blocks().stats().leases, 1);

    drop(client);
    eventually("everything is given back", || {
        node.arena_bytes() == 0
            && node.node.blocks().stats().leases == 0
            && metric(&node, "terrace_local_connections") == 0.0
            && metric(&node, "terrace_local_staging_bytes") == 0.0
            && metric(&node, "terrace_local_held_bytes") == 0.0
    })
    .await;
}

#[tokio::test]
async fn leases_live_as_long_as_their_owner_has_a_connection_of_either_kind() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let (first, mut second) = (Client::new(&node, "", 7), Client::new(&node, "", 7));
    let (chain, _) = put_one(&mut second, &space, 1, 4096);
    let mut stock = node.client().await;
    let over_grpc = v1::LookupRequest {
        context: Some(v1::RequestContext {
            owner_id: Bytes::from_static(&[7; 16]),
            ..v1::RequestContext::default()
        }),
        ..space.lookup(&chain, 60_000)
    };
    let found = stock
        .client
        .lookup(over_grpc)
        .await
        .expect("an answer")
        .into_inner();
    let lease = found.lease.expect("a lease");
    // It is the same owner's here.
    assert_eq!(second.raw.get(space.get(&chain, lease.id)).hold, 0);
    drop((first, second));
    eventually("both are gone", || {
        metric(&node, "terrace_local_connections") == 0.0
    })
    .await;
    assert_eq!(
        node.node.blocks().stats().leases,
        1,
        "the owner is still there over gRPC"
    );
    drop(stock);
    eventually("the owner is gone", || {
        node.node.blocks().stats().leases == 0
    })
    .await;
}

#[tokio::test]
async fn a_client_that_vanishes_in_the_middle_of_a_frame_leaves_nothing_behind() {
    let node = TestNode::start(|_| {}).await;
    let (mut raw, _) = Raw::attached(&node.node, "", 1, 1 << 20);
    raw.send(&[200, 0, 0, 0, 1, 2, 3]).expect("written");
    drop(raw);
    eventually("its thread has ended", || {
        metric(&node, "terrace_local_connections") == 0.0
    })
    .await;
    assert_eq!(metric(&node, "terrace_local_staging_bytes"), 0.0);
}

#[tokio::test]
async fn a_node_that_ends_leaves_its_successors_socket_file_alone() {
    let node = TestNode::start(|_| {}).await;
    let path = node.node.local_path().expect("on").to_owned();
    std::fs::remove_file(&path).expect("the node's");
    let _successor = std::os::unix::net::UnixListener::bind(&path).expect("free");
    node.node.shutdown(HANG).await;
    assert!(path.exists(), "removed under its listener");
}

#[tokio::test]
async fn a_node_ends_promptly_whoever_is_attached() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut clients: Vec<_> = (1..6).map(|owner| Client::new(&node, "", owner)).collect();
    let (chain, _) = put_one(&mut clients[0], &space, 1, MIB);
    assert_ne!(clients[0].raw.get(space.get(&chain, 0)).hold, 0);
    clients[1]
        .raw
        .send(&[200, 0, 0, 0, 1])
        .expect("half a frame");
    let path = node.node.local_path().expect("on").to_owned();
    let ended = within_awake(Duration::from_secs(5), node.node.shutdown(HANG)).await;
    assert!(ended.is_some(), "it waits for clients that idle");
    assert!(!path.exists());
    for client in &mut clients {
        assert!(
            matches!(client.raw.reply(), Ok(None) | Err(_)),
            "still open"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_that_waits_for_the_disk_when_its_node_stops_is_answered() {
    let (node, nvme) = with_a_disk(TempDir::new().expect("a folder")).await;
    nvme.set(Faults {
        writes: Fault::Lag(Duration::from_millis(300)),
        ..Faults::default()
    });
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let bytes = pattern(1, MIB);
    client.staging.write(0, &bytes).expect("inside");
    let header = space.header(&space.chain(1, 1), 0, &bytes);
    let mut stored = space.put(&[(header, 0)]);
    stored.start.as_mut().expect("its start").ack = v1::Ack::Stored as i32;
    let putting = tokio::task::spawn_blocking(move || (client.raw.put(stored), client));
    eventually("the put waits for the disk", || node.arena_bytes() > 0).await;
    assert!(!putting.is_finished());
    node.node.shutdown(HANG).await;
    let (put, mut client) = putting.await.expect("no panic");
    assert_eq!(
        outcomes(&put.expect("an answer")),
        [v1::PutOutcome::Stored],
        "the node stopped before its answer was out"
    );
    assert!(
        matches!(client.raw.reply(), Ok(None) | Err(_)),
        "still open"
    );
}
