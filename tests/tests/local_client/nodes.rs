//! Nodes that die, freeze and come back while a client is attached.

use std::time::Duration;

use kvclient::{Client, LookupOptions, NamespaceHandle, Path};
use kvtests::{
    client::assert_no_blocks_move,
    patience::{HANG, private_loopback, until},
};
use tempfile::TempDir;

use crate::{MIB, assert_is_local, chain, get, open, process::Process, put};

const DEADLINE: Duration = Duration::from_millis(400);

async fn attached(endpoint: &str) -> (Client, NamespaceHandle) {
    let client = Client::builder(endpoint).deadline(HANG).connect();
    let client = client.await.unwrap();
    let ns = open(&client).await;
    put(&client, &ns, &chain(&ns, 1, 2), &[MIB; 2]).await;
    assert_is_local(&client);
    (client, ns)
}

async fn assert_all_unavailable(client: &Client, ns: &NamespaceHandle) {
    let client = client.with_deadline(DEADLINE);
    assert_no_blocks_move(DEADLINE, &client, ns, &chain(ns, 1, 1)).await;
}

/// Until blocks go over the same-host path again, both ways.
async fn assert_local_again(client: &Client, ns: &NamespaceHandle, seed: u32) {
    let before = client.path().local;
    until("the same-host path is taken again", async || {
        client.get(ns, &chain(ns, 1, 2), None).await.is_ok() && client.path().path == Path::Local
    })
    .await;
    let chain = chain(ns, seed, 2);
    let data = put(client, ns, &chain, &[MIB; 2]).await;
    assert!(get(client, ns, &chain, &[MIB; 2]).await == data);
    let after = client.path().local;
    assert!(after.put_blocks >= before.put_blocks + 2, "{after:?}");
    assert!(after.got_blocks >= before.got_blocks + 2, "{after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_is_unavailable_and_its_next_life_is_attached_to() {
    let dir = TempDir::new().unwrap();
    let (mut node, endpoint) = Process::node(dir.path(), &private_loopback());
    let (client, ns) = attached(&endpoint).await;
    for life in 2..4 {
        node.kill();
        assert_all_unavailable(&client, &ns).await;
        assert_eq!(client.path().path, Path::Grpc);
        assert!(client.path().why_grpc.is_some());
        node = Process::node(dir.path(), endpoint.trim_start_matches("http://")).0;
        assert_local_again(&client, &ns, life).await;
    }
    assert_eq!(client.reboots(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_restarted_between_two_calls_costs_neither() {
    let dir = TempDir::new().unwrap();
    let (mut node, endpoint) = Process::node(dir.path(), &private_loopback());
    let (client, ns) = attached(&endpoint).await;
    for life in 2..5 {
        node.kill();
        node = Process::node(dir.path(), endpoint.trim_start_matches("http://")).0;
        // The very first call: a restart loses blocks, never a call.
        let found = client
            .lookup(&ns, &chain(&ns, 1, 2), &LookupOptions::default())
            .await
            .unwrap();
        assert_eq!(found.present_blocks, 0);
        assert_local_again(&client, &ns, life).await;
    }
    drop(node);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_node_costs_each_call_its_deadline_at_most_and_is_local_again_when_it_goes_on() {
    let dir = TempDir::new().unwrap();
    let (node, endpoint) = Process::node(dir.path(), &private_loopback());
    let (client, ns) = attached(&endpoint).await;
    let boot = client.boot_id();
    node.freeze();
    assert_all_unavailable(&client, &ns).await;
    assert_eq!(client.path().failures, 1, "it was asked once");
    node.thaw();
    assert_local_again(&client, &ns, 2).await;
    assert_eq!(client.boot_id(), boot, "it is the same life");
}
