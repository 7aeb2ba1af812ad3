//! A client of a cluster: one prefix, one lease and one answer out of many nodes.

mod away;
mod leases;
mod views;
mod whole;

use kvclient::{
    Chain, Client, Lookup, LookupOptions, Namespace, NamespaceHandle, PutBlock, PutOptions,
    PutOutcome,
};
use kvproto::key::RunHash;
use kvtests::{circle::Circle, client::over_grpc, node::filled};

const BLOCK_TOKENS: u32 = 16;
const RUN_BLOCKS: u32 = 4;
const BLOCK_BYTES: usize = 3000;

async fn connect(endpoint: &str) -> (Client, NamespaceHandle) {
    let client = over_grpc(endpoint).await;
    let ns = open(&client).await;
    (client, ns)
}

async fn open(client: &Client) -> NamespaceHandle {
    let spec = Namespace::opaque("routing", BLOCK_TOKENS, RUN_BLOCKS);
    let opened = client.open_namespace(&spec, false).await;
    opened.expect("a namespace")
}

fn chain(ns: &NamespaceHandle, seed: u32, blocks: u32) -> Chain {
    let tokens = (0..blocks * BLOCK_TOKENS).map(|i| seed * 1_000_003 + i);
    ns.chain(&tokens.collect::<Vec<u32>>())
}

fn block(seed: u32, i: usize) -> Vec<u8> {
    filled(seed * 1000 + i as u32, BLOCK_BYTES).to_vec()
}

/// Puts these blocks of a chain; what became of each.
async fn put(
    client: &Client,
    ns: &NamespaceHandle,
    chain: &Chain,
    seed: u32,
    which: impl IntoIterator<Item = usize>,
) -> Vec<PutOutcome> {
    let which = which.into_iter();
    let blocks: Vec<_> = which.map(|i| PutBlock::new(i, block(seed, i))).collect();
    let results = client.put(ns, chain, &blocks, PutOptions::default()).await;
    let results = results.expect("results");
    results.iter().map(|result| result.outcome).collect()
}

async fn put_all(client: &Client, ns: &NamespaceHandle, chain: &Chain, seed: u32) {
    let outcomes = put(client, ns, chain, seed, 0..chain.len()).await;
    let all = outcomes
        .iter()
        .all(|outcome| *outcome == PutOutcome::Cached);
    assert!(all, "{outcomes:?}");
}

/// Looks up and leases.
async fn leased(client: &Client, ns: &NamespaceHandle, chain: &Chain) -> Lookup {
    let found = client.lookup(ns, chain, &LookupOptions::default()).await;
    found.expect("a lookup is answered")
}

/// Looks up and leases nothing.
async fn probed(client: &Client, ns: &NamespaceHandle, chain: &Chain) -> Lookup {
    let found = client.lookup(ns, chain, &LookupOptions::probe()).await;
    found.expect("a lookup is answered")
}

/// Blocks that node `number` holds.
fn held(cluster: &Circle, number: usize) -> u64 {
    let tiers = cluster.nodes[number].node.blocks().stats().tiers;
    tiers.iter().map(|tier| tier.blocks).sum()
}

/// The number of the first block that member `id` owns by the view of node `by`.
fn first_of(cluster: &Circle, by: usize, chain: &Chain, id: &str) -> Option<usize> {
    let roster = cluster.nodes[by].node.blocks().cluster().roster();
    let mut runs = chain.runs(RUN_BLOCKS);
    let is_its = |run: &RunHash| roster.placement.first(run).is_some_and(|m| m.0 == id);
    runs.find(|(run, _)| is_its(run))
        .map(|(_, range)| range.start)
}

/// A chain in which `id` owns runs, but not the first one.
fn chain_cut_by(
    cluster: &Circle,
    by: usize,
    ns: &NamespaceHandle,
    id: &str,
) -> (u32, Chain, usize) {
    (1..)
        .find_map(|seed| {
            let chain = chain(ns, seed, 48);
            let cut = first_of(cluster, by, &chain, id)?;
            (cut > 8).then_some((seed, chain, cut))
        })
        .expect("some chain does")
}
