//! Moves and drains: what is leased stays, and what is lost is said.

use std::time::Duration;

use kvproto::{Chain, v1};
use kvserver::{clock::Tick, config::MIB};
use kvtests::{
    node::{RUN_BLOCKS, are_hits, filled},
    patience::{HANG, eventually},
};

use super::{BLOCK_BYTES, blocks, clients, cluster, fill, lease, owner, read};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_is_honoured_while_its_run_moves() {
    let mut cluster = cluster(1, |_| {}).await;
    let mut clients = clients(&cluster).await;
    let chains = fill(&cluster, &mut clients, 12).await;
    let mut leases = Vec::new();
    for chain in &chains {
        leases.push(lease(&mut clients[0], chain).await.1);
    }
    let newcomer = cluster.add().await;
    cluster.agreed(2).await;
    let motion = cluster.node(0).blocks().motion().unwrap().clone();
    eventually("moves end", || {
        let now = motion.account();
        now.moved_runs > 0 && now.waiting_runs == 0
    })
    .await;
    // Room is needed where the old copies are: 64 MiB, twice over.
    let big = 2 * MIB as usize;
    for seed in 1000..1064 {
        let chain = clients[0].chain(seed, 1);
        let block = [filled(seed, big)];
        let put = clients[0].put(&chain, &block, v1::Ack::Cached).await;
        put.expect("a put is answered");
    }
    for ((seed, chain), id) in (0..).zip(&chains).zip(leases) {
        let got = clients[0].get(chain, id, 0).await.unwrap();
        assert!(are_hits(&got, &blocks(seed)), "run {seed}");
    }
    assert!(
        chains
            .iter()
            .any(|chain| owner(&cluster, chain) == newcomer)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_loses_nothing() {
    let cluster = cluster(3, |_| {}).await;
    let mut clients = clients(&cluster).await;
    let chains = fill(&cluster, &mut clients, 30).await;
    let leaving = cluster.node(2);
    leaving.cluster().drain();
    cluster.agreed(cluster.nodes.len()).await;
    let motion = leaving.blocks().motion().unwrap();
    let account = motion.drained(Tick(HANG)).await;
    assert!(account.is_draining);
    assert_eq!((account.left_blocks, account.at_stake_bytes()), (0, 0));
    for (seed, chain) in (0..).zip(&chains) {
        let owner = owner(&cluster, chain);
        assert_ne!(owner, 2);
        // Without asking anybody: it is there.
        assert_eq!(clients[owner].present(chain).await, RUN_BLOCKS);
        read(&mut clients[owner], chain, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_whose_time_is_up_says_what_would_be_lost() {
    // One run fits the first quarter of a second, and the next one has to wait for ten.
    let cluster = cluster(2, |config| {
        config.peer_bytes_per_second = u64::from(RUN_BLOCKS) * BLOCK_BYTES as u64 / 10;
    })
    .await;
    let mut clients = clients(&cluster).await;
    let chains = fill(&cluster, &mut clients, 20).await;
    let of_it: Vec<&Chain> = chains.iter().filter(|c| owner(&cluster, c) == 1).collect();
    let leaving = cluster.node(1);
    leaving.cluster().drain();
    cluster.agreed(cluster.nodes.len()).await;
    let motion = leaving.blocks().motion().unwrap();
    eventually("the first run has gone", || motion.account().moved_runs > 0).await;
    let account = motion.drained(Tick(Duration::ZERO)).await;
    let mut lost = 0;
    for chain in &of_it {
        lost += u64::from(RUN_BLOCKS - clients[0].present(chain).await);
    }
    assert!(lost > 0, "two seconds do not do for {} runs", of_it.len());
    assert_eq!(account.left_blocks, lost);
    assert_eq!(account.at_stake_bytes(), lost * BLOCK_BYTES as u64);
}
