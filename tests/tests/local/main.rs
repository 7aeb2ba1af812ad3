//! The same-host path as a client meets it, honest or not, with a client that knows the wire and nothing else.

mod attach;
mod blocks;
mod death;
mod following;
mod holds;
mod hostile;
mod tenants;

use std::sync::Arc;

use kvgpu::StagingMap;
use kvproto::{BlockHeader, Chain, v1};
use kvserver::{
    config::{Capacity, Config},
    tier::FaultyTier,
};
use kvtests::{
    local::{Raw, Space, pattern},
    node::{TestNode, small, start_frail},
};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// A client with staging memory, and what it can read.
struct Client {
    raw: Raw,
    staging: StagingMap,
}

impl Client {
    fn new(node: &TestNode, token: &str, owner: u8) -> Self {
        let (mut raw, attached) = Raw::attached(&node.node, token, owner, 8 << 20);
        assert_eq!(attached.staging_bytes, 8 << 20);
        let staging = raw.staging();
        Self { raw, staging }
    }

    /// Puts one block of `length` bytes at each place of the chain; the bytes of each.
    fn put_chain(&mut self, space: &Space, chain: &Chain, length: usize) -> Vec<Vec<u8>> {
        let blocks: Vec<_> = (0..chain.len())
            .map(|i| pattern(i as u32, length))
            .collect();
        for (i, bytes) in blocks.iter().enumerate() {
            self.staging.write(0, bytes).expect("room");
            let header = space.header(chain, i, bytes);
            let results = self.raw.put(space.put(&[(header, 0)])).expect("an answer");
            assert_eq!(outcomes(&results), [v1::PutOutcome::Cached], "block {i}");
        }
        blocks
    }

    /// Copies a hit from where it lies, and checks sums and generation as a reader must.
    fn read(&mut self, space: &Space, block: &v1::LocalBlock) -> Result<Vec<u8>, &'static str> {
        assert_eq!(block.outcome(), v1::GetOutcome::Hit);
        let place = block.place.as_ref().expect("it lies in the arena");
        let (_, segment) = self.raw.map(&[place.segment]).pop().ok_or("not mapped")?;
        let wire = block.header.as_ref().expect("a hit has a header");
        let header = space.judge(wire);
        let mut bytes = vec![0; header.length_bytes as usize];
        segment
            .copy(place.offset, &mut bytes)
            .map_err(|_| "outside")?;
        if segment.generation(place.offset) != Some(place.generation) {
            return Err("its slot has another tenant");
        }
        header.verify(&bytes).map_err(|_| "its sums are wrong")?;
        Ok(bytes)
    }
}

fn outcomes(results: &[v1::PutResult]) -> Vec<v1::PutOutcome> {
    results.iter().map(v1::PutResult::outcome).collect()
}

fn got(blocks: &[v1::LocalBlock]) -> Vec<v1::GetOutcome> {
    blocks.iter().map(v1::LocalBlock::outcome).collect()
}

/// A block of its own chain, put by `client`.
fn put_one(client: &mut Client, space: &Space, seed: u32, length: usize) -> (Chain, BlockHeader) {
    let chain = space.chain(seed, 1);
    let bytes = client.put_chain(space, &chain, length).remove(0);
    let header = space.header(&chain, 0, &bytes);
    (chain, header)
}

/// The value of a metric of the node.
fn metric(node: &TestNode, name: &str) -> f64 {
    let stats = node.node.blocks().stats();
    let counter = stats.counters.iter().find(|counter| counter.name == name);
    counter.unwrap_or_else(|| panic!("no metric {name}")).value
}

/// A node over this folder with 128 MiB of a disk that fails on demand.
async fn with_a_disk(dir: TempDir) -> (TestNode, Arc<FaultyTier>) {
    let config = Config {
        nvme_bytes: Capacity::Bytes(128 << 20),
        ..small(dir.path())
    };
    let (node, nvme) = start_frail(config).await;
    (TestNode { node, dir }, nvme)
}
