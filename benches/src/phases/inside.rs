//! A reference without a copy: what a get costs a caller in the node's own process.
//!
//! ```text
//!   lookup with a lease ─► locate under it ─► slice (a reference that keeps the slot) ─► dropped ─► lease released
//! ```
//!
//! Nothing is copied and nothing verified, so that the cost must not depend on the size of the block. All sizes have the
//! same number of blocks, so that none has a smaller index.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use kvgpu::{Arena, ArenaConfig};
use kvproto::{BlockHeader, BlockKey, Chain, Kind, NamespaceId, OwnerId, Part, SequenceHash};
use kvserver::clock::SystemClock;
use kvserver::engine::{
    Engine, EngineConfig, LeaseAsk, LookupQuery, Owner, Published, Reserve, TenantId, Whereabouts,
    policy,
};

use super::{Found, Options};
use crate::load::{BlockingWorker, Sample, Window, drive_blocking};
use crate::peers::SIZES;
use crate::peers::wire::payload;
use crate::rounds::{Cell, Group, Op, Peer, Pending, Transport};

const VALUES: u32 = 32;
const NAMESPACE: NamespaceId = NamespaceId([7; 16]);
const RUN_BLOCKS: u32 = 64;

/// An engine over an arena of its own.
///
/// # Errors
/// No memory.
pub fn engine(capacity_bytes: u64) -> Result<Arc<Engine>> {
    let config = ArenaConfig {
        capacity_bytes,
        ..ArenaConfig::default()
    };
    let policy = policy::by_name("best").context("no default policy")?;
    let engine = EngineConfig::for_capacity(capacity_bytes);
    Ok(Engine::new(
        engine,
        Arena::new(config)?,
        policy,
        Arc::new(SystemClock::new()),
    )?)
}

/// A hash that only these two numbers have.
pub fn hash(bytes: u64, index: u64) -> SequenceHash {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&bytes.to_le_bytes());
    hash[8..16].copy_from_slice(&index.to_le_bytes());
    // Spread, as a real hash would be: placement and shards take what they need from anywhere.
    hash[16..24].copy_from_slice(
        &(index ^ bytes << 20)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .to_le_bytes(),
    );
    hash[24..].copy_from_slice(&index.wrapping_mul(0xd6e8_feb8_6659_fd93).to_le_bytes());
    SequenceHash(hash)
}

/// Puts the blocks of a chain, all with the same bytes.
///
/// # Errors
/// One is refused.
pub fn put(engine: &Engine, chain: &Chain, value: &[u8]) -> Result<Vec<BlockKey>> {
    let put_one = |(i, &hash): (usize, &SequenceHash)| {
        let key = BlockKey {
            namespace: NAMESPACE,
            hash,
            part: Part::default(),
        };
        let place = chain.place(i, RUN_BLOCKS);
        let Reserve::Granted(mut grant) = engine.reserve(key, place, value.len() as u64, Kind::Kv)
        else {
            bail!("no room for block {i}");
        };
        grant.block.bytes_mut().copy_from_slice(value);
        let header = BlockHeader::describe(key, place, value);
        let sealed = grant
            .block
            .seal(header)
            .map_err(|_| anyhow::anyhow!("block {i} does not match its own header"))?;
        match engine.publish(sealed, grant.ticket) {
            Published::New(_) => Ok(key),
            other => bail!("block {i}: {other:?}"),
        }
    };
    chain.hashes.iter().enumerate().map(put_one).collect()
}

/// A question about a chain of this bench's namespace.
pub fn query(chain: &Chain, lease: Option<LeaseAsk>) -> LookupQuery<'_> {
    LookupQuery {
        namespace: NAMESPACE,
        chain,
        parts: &[],
        lease,
    }
}

struct Inside {
    engine: Arc<Engine>,
    blocks: Vec<(u64, Vec<(Chain, BlockKey)>)>,
}

struct Borrower {
    engine: Arc<Engine>,
    blocks: Vec<(Chain, BlockKey)>,
    bytes: u64,
    next: usize,
}

/// The one caller.
const OWNER: Owner = Owner {
    tenant: TenantId(0),
    id: OwnerId([1; 16]),
};

impl BlockingWorker for Borrower {
    fn step(&mut self) -> Result<u64> {
        let (chain, key) = &self.blocks[self.next % self.blocks.len()];
        self.next += 1;
        let ask = LeaseAsk {
            owner: OWNER,
            ttl_ms: 0,
            idempotency: None,
            id: None,
        };
        let lease = self
            .engine
            .lookup(query(chain, Some(ask)))
            .lease
            .context("no lease")?;
        let Whereabouts::Ram(block) = self.engine.locate(key, Some((lease.id, OWNER))) else {
            bail!("a leased block is not in RAM");
        };
        let bytes = block.slice(0..self.bytes as usize);
        black_box((bytes.as_ptr(), bytes.len()));
        drop((bytes, block));
        anyhow::ensure!(self.engine.release(lease.id, OWNER), "the lease was gone");
        Ok(0) // no byte moves
    }
}

impl Peer for Inside {
    fn run<'a>(&'a mut self, cell: &'a Cell, window: Window) -> Pending<'a, Result<Sample>> {
        Box::pin(async move {
            let (_, blocks) = self
                .blocks
                .iter()
                .find(|(bytes, _)| *bytes == cell.bytes)
                .context("no such size")?;
            let worker = Borrower {
                engine: self.engine.clone(),
                blocks: blocks.clone(),
                bytes: cell.bytes,
                next: 0,
            };
            drive_blocking(&mut [worker], window, &[])
        })
    }
}

/// Runs the phase.
///
/// # Errors
/// No memory for the blocks.
pub async fn run(options: &Options) -> Result<Found> {
    let cell = |bytes| Cell {
        peer: "terrace",
        op: Op::Lease,
        transport: Transport::InProcess,
        bytes,
        concurrency: 1,
        keys: 1,
    };
    let cells: Vec<_> = SIZES
        .into_iter()
        .map(cell)
        .filter(|c| options.wants(&super::label(c)))
        .collect();
    if cells.is_empty() {
        return Ok(Found::default());
    }
    let held: u64 = SIZES.iter().map(|bytes| bytes * u64::from(VALUES)).sum();
    let engine = engine(held * 2)?;
    let mut blocks = Vec::new();
    for bytes in SIZES {
        let value = payload(bytes as usize, bytes);
        let put_one = |i| {
            let chain = Chain::from_root(vec![hash(bytes, i)]);
            let key = put(&engine, &chain, &value)?[0];
            Ok((chain, key))
        };
        blocks.push((
            bytes,
            (0..u64::from(VALUES))
                .map(put_one)
                .collect::<Result<Vec<_>>>()?,
        ));
    }
    let mut peers: Vec<Box<dyn Peer>> = vec![Box::new(Inside { engine, blocks })];
    let groups = [Group {
        cells: cells.into_iter().map(|c| (0, c)).collect(),
        base: 0,
    }];
    let measured = options.measure("lease", &mut peers, &groups).await;
    Ok(Found {
        measured,
        ..Found::default()
    })
}
