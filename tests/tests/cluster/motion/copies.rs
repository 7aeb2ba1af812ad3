//! Runs that have several owners.

use std::time::Duration;

use kvproto::v1;
use kvserver::config::{Capacity, MIB};
use kvtests::{node::RUN_BLOCKS, patience::until};

use super::{blocks, clients, cluster, owner, owners, put, read};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_survive_the_death_of_an_owner_and_are_made_anew() {
    let mut cluster = cluster(3, |config| {
        config.replicas = 2;
        config.suspect_grace = Duration::from_millis(200);
    })
    .await;
    let mut clients = clients(&cluster).await;
    let mut chains = Vec::new();
    for seed in 0..12 {
        let chain = clients[0].chain(seed, RUN_BLOCKS);
        put(&mut clients[owner(&cluster, &chain)], &chain, seed).await;
        chains.push(chain);
    }
    for chain in &chains {
        for owner in owners(&cluster, chain, 2) {
            until("the copy arrives", async || {
                clients[owner].present(chain).await == RUN_BLOCKS
            })
            .await;
        }
    }
    // The last node dies without a word, and is declared lost.
    cluster.kill(2);
    cluster.agreed(2).await;
    clients.pop();
    for (seed, chain) in (0..).zip(&chains) {
        let both = owners(&cluster, chain, 2);
        assert_eq!(both.len(), 2);
        for owner in both {
            read(&mut clients[owner], chain, seed).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_safe_put_of_two_copies_is_answered_when_both_are_safe() {
    let cluster = cluster(2, |config| {
        config.replicas = 2;
        config.nvme_bytes = Capacity::Bytes(64 * MIB);
    })
    .await;
    let mut clients = clients(&cluster).await;
    let chain = clients[0].chain(1, RUN_BLOCKS);
    let both = owners(&cluster, &chain, 2);
    let put = clients[both[0]]
        .put(&chain, &blocks(1), v1::Ack::Stored)
        .await;
    let put = put.unwrap();
    assert!(
        put.iter()
            .all(|r| r.outcome() == v1::PutOutcome::Stored && r.reason == 0),
        "{put:?}"
    );
    // No waiting: it is there, and on its disk.
    assert_eq!(clients[both[1]].present(&chain).await, RUN_BLOCKS);
    let stats = cluster.node(both[1]).blocks().stats();
    let nvme = stats
        .tiers
        .iter()
        .find(|t| t.tier() == v1::Tier::Nvme)
        .unwrap();
    assert_eq!(nvme.blocks, u64::from(RUN_BLOCKS));
}
