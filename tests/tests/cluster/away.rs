//! What was invalidated while a member was away does not come back with it.

use std::time::Duration;

use bytes::Bytes;
use kvproto::{
    Chain, Member, MemberState, OwnerId, Part, RequestId,
    convert::request::{self, Target},
    v1,
};
use kvserver::{
    config::{Capacity, MIB},
    engine::{Owner, TenantId},
};
use kvtests::{
    cluster::TestCluster,
    node::{RUN_BLOCKS, Stock, filled},
    patience::{eventually, until},
};

fn blocks(seed: u32) -> Vec<Bytes> {
    (0..RUN_BLOCKS)
        .map(|i| filled(seed * 100 + i, 4096))
        .collect()
}

/// So many runs that node `number` owns, stored there.
async fn stored(cluster: &TestCluster, number: usize, count: usize) -> Vec<Chain> {
    let mut client = Stock::open(&cluster.node(number).endpoint()).await;
    let roster = cluster.node(number).cluster().roster();
    let me = cluster.id(number);
    let is_own = |chain: &Chain| roster.owners(&chain.hashes[0].into(), 1)[0].id == me;
    let mut found = Vec::new();
    for seed in 0.. {
        let chain = client.chain(seed, RUN_BLOCKS);
        if !is_own(&chain) {
            continue;
        }
        client
            .put(&chain, &blocks(seed), v1::Ack::Stored)
            .await
            .unwrap();
        assert_eq!(client.present(&chain).await, RUN_BLOCKS);
        found.push(chain);
        if found.len() == count {
            break;
        }
    }
    found
}

/// A caller tells node `number`, under an id that it has for all.
async fn tell(cluster: &TestCluster, number: usize, request: u8, target: Target) {
    let client = Stock::open(&cluster.node(number).endpoint()).await;
    let blocks = cluster.node(number).blocks();
    let request = Some(RequestId([request; 16]));
    let told = blocks.invalidate_as(request, TenantId(0), client.namespace, target);
    told.await.unwrap();
}

async fn present(cluster: &TestCluster, number: usize, chain: &Chain) -> u32 {
    let mut client = Stock::open(&cluster.node(number).endpoint()).await;
    client.present(chain).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_down_forgets_what_the_others_were_told_before_it_serves() {
    let mut cluster = TestCluster::start_with(3, |_, config| {
        config.nvme_bytes = Capacity::Bytes(64 * MIB);
        config.suspect_grace = Duration::from_millis(200);
    })
    .await;
    let id = cluster.id(2);
    let chains = stored(&cluster, 2, 4).await;
    // Told while all are here: it is known to all, and what is put afterwards is new.
    let early = Target::Block(chains[3].hashes[0]);
    for number in 0..3 {
        tell(&cluster, number, 1, early).await;
    }
    let again = stored(&cluster, 2, 4).await;
    assert_eq!(again, chains);
    cluster.kill(2);
    let is_gone = |number: usize| {
        let roster = cluster.node(number).cluster().roster();
        roster.view.get(&id).unwrap().state == MemberState::Gone
    };
    eventually("it is given up", || is_gone(0) && is_gone(1)).await;
    let [block, prefix] = [&chains[0].hashes[2], &chains[1].hashes[0]];
    for number in 0..2 {
        tell(&cluster, number, 2, Target::Block(*block)).await;
        tell(&cluster, number, 3, Target::Prefix(*prefix)).await;
    }
    // Of those who were told one is enough, also after it was restarted itself, when nobody could tell it.
    cluster.kill(1);
    cluster.kill(0);
    cluster.restart(0).await;
    cluster.restart(2).await;
    let found = [
        present(&cluster, 2, &chains[0]).await,
        present(&cluster, 2, &chains[1]).await,
        present(&cluster, 2, &chains[2]).await,
        present(&cluster, 2, &chains[3]).await,
    ];
    assert_eq!(found, [2, 0, RUN_BLOCKS, RUN_BLOCKS]);
    // What is put after that stays.
    let again = stored(&cluster, 2, 4).await;
    for chain in &again {
        assert_eq!(present(&cluster, 2, chain).await, RUN_BLOCKS);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_cut_off_and_who_cut_it_off_learn_from_each_other() {
    let cluster = TestCluster::start_with(2, |_, config| {
        config.nvme_bytes = Capacity::Bytes(64 * MIB);
    })
    .await;
    let [first, second] = [stored(&cluster, 0, 2).await, stored(&cluster, 1, 2).await];
    // Each side had callers of its own.
    tell(&cluster, 0, 1, Target::Prefix(second[0].hashes[0])).await;
    tell(&cluster, 1, 2, Target::Prefix(first[0].hashes[0])).await;

    let there = cluster.node(1).cluster().declared();
    let tombstone = Member {
        version: there.version + 1,
        state: MemberState::Gone,
        ..there
    };
    cluster.node(0).cluster().merge([tombstone]);
    eventually("it is heard again", || cluster.agrees(2)).await;
    until("both have forgotten what either was told", async || {
        present(&cluster, 1, &second[0]).await == 0 && present(&cluster, 0, &first[0]).await == 0
    })
    .await;
    assert_eq!(present(&cluster, 0, &first[1]).await, RUN_BLOCKS);
    assert_eq!(present(&cluster, 1, &second[1]).await, RUN_BLOCKS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_cut_off_and_restarted_asks_those_it_thought_gone() {
    let mut cluster = TestCluster::start_with(2, |_, config| {
        config.nvme_bytes = Capacity::Bytes(64 * MIB);
    })
    .await;
    let chains = stored(&cluster, 1, 2).await;
    tell(&cluster, 0, 1, Target::Prefix(chains[0].hashes[0])).await;
    // Node 1 hears nothing of it, and declares node 0 gone.
    let there = cluster.node(0).cluster().declared();
    let tombstone = Member {
        version: there.version + 1,
        state: MemberState::Gone,
        ..there
    };
    let settings = cluster.config(1);
    cluster.kill(0);
    cluster.node(1).cluster().merge([tombstone]);
    let kept = settings.data_dir.join("cluster.json");
    // 3: gone.
    let has_buried = || {
        std::fs::read_to_string(&kept)
            .unwrap()
            .contains("\"state\": 4")
    };
    eventually("the view is kept", has_buried).await;
    cluster.kill(1);
    cluster.restart(0).await;
    // Nobody is named to be joined; all it has is what it kept.
    let alone = kvserver::config::Config {
        join: Vec::new(),
        ..settings
    };
    cluster.start_as(1, alone).await;
    cluster
        .node(1)
        .cluster()
        .merge([cluster.node(0).cluster().declared()]);
    until("it has asked", async || {
        present(&cluster, 1, &chains[0]).await == 0
    })
    .await;
    assert_eq!(present(&cluster, 1, &chains[1]).await, RUN_BLOCKS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_to_ask_first_tells_peers_of_nothing() {
    let cluster = TestCluster::start_with(1, |_, config| {
        config.nvme_bytes = Capacity::Bytes(64 * MIB);
    })
    .await;
    let chain = &stored(&cluster, 0, 1).await[0];
    let node = cluster.node(0);
    let client = Stock::open(&node.endpoint()).await;
    let peers = |no_forward| {
        let owner = Owner {
            tenant: TenantId(0),
            id: OwnerId([1; 16]),
        };
        let asked = request::Lookup {
            context: request::Context {
                no_forward,
                ..request::Context::default()
            },
            namespace: client.namespace,
            chain: chain.clone(),
            parts: vec![Part::default()],
            probe: true,
            lease_ttl_ms: None,
            idempotency_key: None,
            lease: None,
        };
        node.blocks().lookup(owner, &asked).unwrap().present_blocks
    };
    assert_eq!((peers(true), peers(false)), (RUN_BLOCKS, RUN_BLOCKS));
    node.cluster().fall_behind();
    assert_eq!((peers(true), peers(false)), (0, RUN_BLOCKS));
    node.cluster().has_caught_up();
    assert_eq!(peers(true), RUN_BLOCKS);
}
