//! Blocks on their way between real nodes: reads in motion, moves, drains and copies, held against stock clients.

mod copies;
mod moves;
mod reads;
mod undone;

use std::time::Duration;

use bytes::Bytes;
use kvproto::{Chain, Member, MemberId, MemberState, v1};
use kvserver::{Node, config::Config};
use kvtests::{
    cluster::TestCluster,
    node::{RUN_BLOCKS, Stock, TestNode, are_hits, filled},
    peer::{Fault, Peer},
};

const BLOCK_BYTES: usize = 100_000;

/// What a lookup may take when something is wrong: `motion_wait` is 100 ms, the rest is the machine's.
const BOUND: Duration = Duration::from_secs(1);

/// Nodes that each have an equal share.
async fn cluster(count: usize, change: impl Fn(&mut Config) + 'static) -> TestCluster {
    TestCluster::start_with(count, move |_, config| {
        config.weight = 1;
        change(config);
    })
    .await
}

async fn clients(cluster: &TestCluster) -> Vec<Stock> {
    let mut clients = Vec::new();
    for node in cluster.running() {
        clients.push(Stock::open(&node.endpoint()).await);
    }
    clients
}

/// The numbers of the owners of a chain's run, as the first node sees it.
fn owners(cluster: &TestCluster, chain: &Chain, replicas: usize) -> Vec<usize> {
    let roster = cluster.node(0).cluster().roster();
    let owners = roster.owners(&chain.hashes[0].into(), replicas);
    let number = |id: &MemberId| {
        let is_it = |node: &Option<Node>| node.as_ref().is_some_and(|n| n.cluster().me() == id);
        cluster
            .nodes
            .iter()
            .position(is_it)
            .expect("a node of ours")
    };
    owners.into_iter().map(|owner| number(&owner.id)).collect()
}

fn owner(cluster: &TestCluster, chain: &Chain) -> usize {
    owners(cluster, chain, 1)[0]
}

/// The blocks of one run.
fn blocks(seed: u32) -> Vec<Bytes> {
    (0..RUN_BLOCKS)
        .map(|i| filled(seed * 100 + i, BLOCK_BYTES))
        .collect()
}

async fn put(client: &mut Stock, chain: &Chain, seed: u32) {
    client
        .put_as(
            chain,
            &blocks(seed),
            v1::Ack::Cached,
            v1::PutOutcome::Cached,
        )
        .await;
}

/// A lookup with a lease; blocks present, and the lease's id.
async fn lease(client: &mut Stock, chain: &Chain) -> (u32, u64) {
    let found = client.lookup(chain, Some(60_000)).await;
    let found = found.expect("a lookup is answered, whatever moves");
    (
        found.present_blocks,
        found.lease.map_or(0, |lease| lease.id),
    )
}

/// Whether a lookup finds a whole run; keeps no lease, so that it can be asked often.
async fn arrived(client: &mut Stock, chain: &Chain) -> bool {
    let (present, id) = lease(client, chain).await;
    if id != 0 {
        client.release(id).await;
    }
    present == RUN_BLOCKS
}

/// Looks up and gets a run; the bytes must be right.
async fn read(client: &mut Stock, chain: &Chain, seed: u32) {
    let (present, id) = lease(client, chain).await;
    assert_eq!(present, RUN_BLOCKS, "run {seed}");
    let got = client.get(chain, id, 0).await.expect("a get is answered");
    assert!(are_hits(&got, &blocks(seed)), "run {seed}");
    assert!(client.release(id).await);
}

/// Puts this many runs, each at its owner.
async fn fill(cluster: &TestCluster, clients: &mut [Stock], runs: u32) -> Vec<Chain> {
    let mut chains = Vec::new();
    for seed in 0..runs {
        let chain = clients[0].chain(seed, RUN_BLOCKS);
        put(&mut clients[owner(cluster, &chain)], &chain, seed).await;
        chains.push(chain);
    }
    chains
}

/// A run that is the other one's, in a view of two.
fn of_old(node: &TestNode, client: &Stock, from: u32) -> Chain {
    let roster = node.node.cluster().roster();
    (from..from + 100)
        .map(|seed| client.chain(seed, RUN_BLOCKS))
        .find(|chain| roster.owners(&chain.hashes[0].into(), 1)[0].id.0 == "old")
        .expect("every second one is")
}

/// A node alone.
async fn lone() -> TestNode {
    TestNode::start(|config| config.node_id = "me".to_owned()).await
}

/// A node that has left lately, plays these faults, and had this run, which is the node's own now.
async fn departed(
    node: &TestNode,
    client: &mut Stock,
    seed: u32,
    faults: impl IntoIterator<Item = Fault>,
) -> (Peer, Chain) {
    let old = Peer::start().await;
    let address = format!("http://{}", old.endpoint());
    let channel = tonic::transport::Endpoint::from_shared(address).unwrap();
    let channel = channel.connect().await.unwrap();
    let mut at_old = Stock {
        client: v1::blocks_client::BlocksClient::new(channel),
        ..client.clone()
    };
    let cluster = node.node.blocks().cluster();
    let member = Member {
        id: MemberId::from("old"),
        generation: 1,
        version: 1,
        weight: 1,
        zone: String::new(),
        state: MemberState::Active,
        address: format!("http://{}", old.endpoint()),
    };
    cluster.merge([member.clone()]);
    let chain = of_old(node, client, seed * 100);
    let mut messages: Vec<v1::PutRequest> = (0..)
        .zip(blocks(seed))
        .flat_map(|(i, block)| at_old.pieces(&chain, i, &block, 1 << 20))
        .collect();
    messages[0].start = at_old.start(v1::Ack::Cached).start;
    at_old.send(messages).await.expect("it takes anything");
    cluster.merge([Member {
        version: 2,
        state: MemberState::Gone,
        ..member
    }]);
    old.script(faults);
    (old, chain)
}
