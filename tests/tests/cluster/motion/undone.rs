//! What is invalidated stays so, whoever was not told.

use kvproto::{RequestId, convert::request::Target, v1};
use kvserver::engine::TenantId;
use kvtests::{
    node::{RUN_BLOCKS, Stock, figure},
    patience::{eventually, until},
};

use super::{
    BLOCK_BYTES, arrived, clients, cluster, departed, fill, lease, lone, owner, put, read,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_was_not_told_of_an_invalidation_cannot_undo_it_by_a_read() {
    let node = lone().await;
    let mut client = node.client().await;
    let (old, chain) = departed(&node, &mut client, 11, []).await;
    // The node never had these blocks; all it knows is that they must go.
    let target = v1::invalidate_request::Target::All(true);
    client.invalidate(target).await.unwrap();
    assert_eq!(lease(&mut client, &chain).await.0, 0);
    eventually("it has been asked", || old.count("Get") == 1).await;
    assert!(!arrived(&mut client, &chain).await);
    let refused = "terrace_motion_fetched_blocks_total{result=\"refused\"}";
    let refused = figure(&node.node, refused);
    assert_eq!(refused, f64::from(RUN_BLOCKS));
    // What somebody puts now is new.
    put(&mut client, &chain, 11).await;
    read(&mut client, &chain, 11).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_not_told_of_an_invalidation_cannot_undo_it_by_a_move() {
    // Two runs a second: when the first has moved, others have not.
    let rate = 2 * u64::from(RUN_BLOCKS) * BLOCK_BYTES as u64;
    let mut cluster = cluster(1, move |config| config.peer_bytes_per_second = rate).await;
    let mut clients = clients(&cluster).await;
    let chains = fill(&cluster, &mut clients, 24).await;
    let newcomer = cluster.add().await;
    let mut client = Stock::open(&cluster.node(newcomer).endpoint()).await;
    let request = Some(RequestId([5; 16]));
    let invalidate = async |number: usize| {
        let blocks = cluster.node(number).blocks();
        let forgotten = blocks.invalidate_as(request, TenantId(0), client.namespace, Target::All);
        forgotten.await.unwrap()
    };
    // The old owner asks who joins for what it was told, and then hands over. The newcomer is told when some has moved, the
    // old owner only later.
    cluster.agreed(2).await;
    eventually("a move has begun", || {
        let blocks = cluster.node(newcomer).blocks();
        blocks.engine().stats().blocks > 0
    })
    .await;
    invalidate(newcomer).await;
    let refused = || {
        let name = "terrace_motion_refused_blocks_total{reason=\"invalidated\"}";
        figure(cluster.node(0), name)
    };
    eventually("moves are refused", || refused() > 0.0).await;
    for chain in &chains {
        let present = client.clone().present(chain).await;
        assert_eq!(present, 0, "it was told, and has none");
    }
    assert!(invalidate(0).await > 0);
    // Now both know, and what is put at the old owner by a caller with an old view goes where it belongs.
    for (seed, chain) in (0..).zip(&chains) {
        put(&mut clients[0], chain, seed).await;
    }
    let moved: Vec<_> = (0..)
        .zip(&chains)
        .filter(|(_, chain)| owner(&cluster, chain) == newcomer)
        .collect();
    assert!(moved.len() > 3);
    for (seed, chain) in moved {
        until("it has moved", async || {
            client.present(chain).await == RUN_BLOCKS
        })
        .await;
        read(&mut client, chain, seed).await;
    }
}
