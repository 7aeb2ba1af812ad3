//! Terrace on one host: `kvclient` attached to a node of its own, blocks through shared memory.
//!
//! ```text
//!   get, batch   a node that holds the working set       one call: where they lie; then copy and verify
//!   put, batch   a node that is small and full           every put is a new block and evicts an old one
//!   lease        the first node                          where a block lies and that it stays; no byte is touched
//! ```
//!
//! Every get and put is verified, as over gRPC. A cell that went another way than shared memory fails: its figure would
//! be gRPC's.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use kvclient::{Chain, Client, NamespaceHandle, Path, PutBlock, PutOptions, PutOutcome};

use super::node::{RUN_BLOCKS, name, put_kept};
use super::values_of;
use super::wire::payload;
use crate::load::{Sample, Window, Worker, drive};
use crate::rounds::{Cell, Op, Peer, Pending};

/// Blocks of one chain of the working set, and of a batch.
pub const BATCH: u32 = 16;

/// A node and a client that is attached to it.
#[derive(Clone)]
pub struct Side {
    /// The client.
    pub client: Client,
    /// Its namespace.
    pub namespace: NamespaceHandle,
}

/// What every worker shares.
pub struct SameHost {
    read: Side,
    write: HashMap<u64, Side>,
    /// The working set, as chains of [`BATCH`] blocks, by size.
    chains: Arc<HashMap<u64, Vec<Chain>>>,
    fresh: Arc<AtomicU64>,
    server_pids: Vec<u32>,
}

/// Chain `nth` of a size.
fn chain(namespace: &NamespaceHandle, bytes: u64, nth: u64) -> Chain {
    let first = nth * u64::from(BATCH);
    let names = (first..first + u64::from(BATCH)).map(|i| name(namespace, bytes, i));
    Chain::from_root(names.collect())
}

/// Chains of a size in the working set.
fn chains_of(working_set_bytes: u64, bytes: u64) -> u64 {
    (values_of(working_set_bytes, bytes) / u64::from(BATCH)).max(1)
}

/// Stores `chains` of a size.
///
/// # Errors
/// A block is refused for good.
pub async fn fill(side: &Side, bytes: u64, chains: std::ops::Range<u64>) -> Result<()> {
    let value = Bytes::from(payload(usize::try_from(bytes)?, bytes));
    for nth in chains {
        let blocks: Vec<_> = (0..BATCH as usize)
            .map(|i| PutBlock::new(i, value.clone()))
            .collect();
        let chain = chain(&side.namespace, bytes, nth);
        put_kept(
            &side.client,
            &side.namespace,
            &chain,
            &blocks,
            kvclient::Ack::Cached,
        )
        .await?;
    }
    Ok(())
}

impl SameHost {
    /// Names the working set of every size, and stores it.
    ///
    /// # Errors
    /// A block is refused for good.
    pub async fn start(
        read: Side,
        write: HashMap<u64, Side>,
        sizes: &[u64],
        working_set_bytes: u64,
        server_pids: Vec<u32>,
    ) -> Result<Self> {
        let mut chains = HashMap::new();
        for &bytes in sizes {
            let count = chains_of(working_set_bytes, bytes);
            fill(&read, bytes, 0..count).await?;
            let named = (0..count).map(|nth| chain(&read.namespace, bytes, nth));
            chains.insert(bytes, named.collect());
        }
        Ok(Self {
            read,
            write,
            chains: Arc::new(chains),
            fresh: Arc::default(),
            server_pids,
        })
    }
}

/// One operation in flight.
struct Caller {
    op: Op,
    bytes: u64,
    keys: u32,
    side: Side,
    chains: Arc<HashMap<u64, Vec<Chain>>>,
    fresh: Arc<AtomicU64>,
    next: u64,
    memory: Vec<u8>,
    value: Bytes,
}

impl Caller {
    /// The next chain to read: a batch, or one block of it.
    fn chain(&mut self) -> Result<Chain> {
        let chains = self.chains.get(&self.bytes).context("no such size")?;
        let next = self.next;
        self.next += 1;
        if self.keys == BATCH {
            return Ok(chains[next as usize % chains.len()].clone());
        }
        let (nth, at) = (next / u64::from(BATCH), (next % u64::from(BATCH)) as usize);
        Ok(chains[nth as usize % chains.len()].slice(at..at + 1, RUN_BLOCKS))
    }
}

impl Worker for Caller {
    async fn step(&mut self) -> Result<u64> {
        let (bytes, keys) = (usize::try_from(self.bytes)?, self.keys as usize);
        let payload_bytes = self.bytes * u64::from(self.keys);
        match self.op {
            Op::Get => {
                let chain = self.chain()?;
                let Side { client, namespace } = &self.side;
                let mut buffers: Vec<_> = self.memory.chunks_exact_mut(bytes).collect();
                let got = client
                    .get_into(namespace, &chain, None, &mut buffers)
                    .await?;
                let whole = got.iter().filter(|g| g.is_hit() && g.length_bytes == bytes);
                ensure!(whole.count() == keys, "{got:?}");
                Ok(payload_bytes)
            }
            Op::Put => {
                let Side { client, namespace } = &self.side;
                // Never a name that the fill used.
                let nth = self.fresh.fetch_add(1, Ordering::Relaxed) | 1 << 40;
                let chain = chain(namespace, self.bytes, nth).slice(0..keys, RUN_BLOCKS);
                let blocks: Vec<_> = (0..keys)
                    .map(|i| PutBlock::new(i, self.value.clone()))
                    .collect();
                let results = client
                    .put(namespace, &chain, &blocks, PutOptions::default())
                    .await?;
                let kept = results.iter().filter(|r| r.outcome == PutOutcome::Cached);
                ensure!(kept.count() == keys, "{results:?}");
                Ok(payload_bytes)
            }
            Op::Lease => {
                let chain = self.chain()?;
                let Side { client, namespace } = &self.side;
                let held = client.hold(namespace, &chain, None).await?;
                let held = held.context("not on the same-host path")?;
                ensure!(held.len() == keys, "{} of {keys} blocks held", held.len());
                std::hint::black_box(&held);
                Ok(0) // no byte moves
            }
            other => bail!("no {} on this path", other.as_str()),
        }
    }
}

impl Peer for SameHost {
    fn run<'a>(&'a mut self, cell: &'a Cell, window: Window) -> Pending<'a, Result<Sample>> {
        Box::pin(async move {
            let side = match cell.op {
                Op::Put => self
                    .write
                    .get(&cell.bytes)
                    .context("no node for this size")?,
                _ => &self.read,
            };
            let before = side.client.path();
            ensure!(
                before.path == Path::Local,
                "not on the same-host path: {:?}",
                before.why_grpc
            );
            let bytes = usize::try_from(cell.bytes * u64::from(cell.keys))?;
            let value = match cell.op {
                Op::Put => payload(usize::try_from(cell.bytes)?, cell.bytes).into(),
                _ => Bytes::new(),
            };
            let values = chains_of(0, cell.bytes).max(self.chains[&cell.bytes].len() as u64);
            let workers = (0..cell.concurrency).map(|nth| Caller {
                op: cell.op,
                bytes: cell.bytes,
                keys: cell.keys,
                side: side.clone(),
                chains: self.chains.clone(),
                fresh: self.fresh.clone(),
                next: values * nth as u64 / cell.concurrency as u64,
                memory: match cell.op {
                    Op::Get => vec![0; bytes],
                    _ => Vec::new(),
                },
                value: value.clone(),
            });
            let (_, sample) = drive(workers.collect(), window, &self.server_pids).await?;
            let after = side.client.path();
            ensure!(
                after.grpc.calls == before.grpc.calls,
                "{} calls went over gRPC: {:?}",
                after.grpc.calls - before.grpc.calls,
                after.why_grpc
            );
            Ok(sample)
        })
    }
}
