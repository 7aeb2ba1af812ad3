//! The same-host path as an engine meets it: chosen by itself, the same bytes, and gone without a trace when it fails.

mod answers;
mod blocking;
mod death;
mod liars;
mod limits;
mod nodes;
mod paths;
mod process;
mod strangers;

use kvclient::{
    Chain, Client, ClientBuilder, LocalPath, Namespace, NamespaceHandle, Path, PutBlock,
    PutOptions, PutOutcome,
};
use kvtests::node::{TestNode, filled};

const MIB: usize = 1 << 20;

/// Settings of a client of `node`.
fn builder(node: &TestNode) -> ClientBuilder {
    Client::builder(&node.node.endpoint())
}

/// A client that uses gRPC alone.
async fn over_grpc(node: &TestNode) -> Client {
    let builder = builder(node).local(LocalPath::Off);
    builder.connect().await.expect("a client")
}

async fn open(client: &Client) -> NamespaceHandle {
    let spec = Namespace::opaque("local", 16, 4);
    client
        .open_namespace(&spec, false)
        .await
        .expect("a namespace")
}

/// A chain of so many blocks; another seed, another chain.
fn chain(ns: &NamespaceHandle, seed: u32, blocks: u32) -> Chain {
    let tokens: Vec<u32> = (0..blocks * 16).map(|i| seed * 1_000_003 + i).collect();
    ns.chain(&tokens)
}

/// Puts a chain of blocks of these lengths; answers their bytes.
async fn put(
    client: &Client,
    ns: &NamespaceHandle,
    chain: &Chain,
    lengths: &[usize],
) -> Vec<Vec<u8>> {
    let data: Vec<Vec<u8>> = lengths
        .iter()
        .enumerate()
        .map(|(i, &length)| filled(i as u32, length).to_vec())
        .collect();
    let blocks: Vec<_> = data
        .iter()
        .enumerate()
        .map(|(i, bytes)| PutBlock::new(i, bytes))
        .collect();
    let results = client
        .put(ns, chain, &blocks, PutOptions::default())
        .await
        .expect("results");
    assert!(
        results
            .iter()
            .all(|result| result.outcome == PutOutcome::Cached),
        "{results:?}"
    );
    data
}

/// Gets a chain into buffers, all hits.
async fn get(
    client: &Client,
    ns: &NamespaceHandle,
    chain: &Chain,
    lengths: &[usize],
) -> Vec<Vec<u8>> {
    let mut memory: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![0xee; length]).collect();
    let mut buffers: Vec<&mut [u8]> = memory.iter_mut().map(|bytes| &mut bytes[..]).collect();
    let got = client
        .get_into(ns, chain, None, &mut buffers)
        .await
        .expect("an answer");
    assert!(got.iter().all(kvclient::Got::is_hit), "{got:?}");
    memory
}

#[track_caller]
fn assert_is_local(client: &Client) {
    let report = client.path();
    assert_eq!(report.path, Path::Local, "{report:?}");
}
