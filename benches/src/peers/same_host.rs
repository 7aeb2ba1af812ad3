//! Terrace on one host: `kvclient` attached to a node of its own, blocks through shared memory.
//!
//! ```text
//!   get, batch   a node that holds the working set       one call: where they lie; then copy and verify
//!   put, batch   a node that is small and full           every put is a new block and evicts an old one
//!   lease        the first node                          where a block lies and that it stays; no byte is touched
//! ```
//!
//! One call at a time comes from a thread of its own through `kvclient::blocking`, as the echo beside it and Mooncake's
//! calls do: a thread that sleeps in the kernel until its answer is there. Several at once are tasks of one runtime.
//!
//! Every get and put is verified, as over gRPC. A cell that went another way than shared memory fails: its figure would
//! be gRPC's.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use kvclient::{
    Chain, Client, Got, Held, NamespaceHandle, Path, PathReport, PutBlock, PutOptions, PutOutcome,
    PutResult, blocking,
};

use super::node::{RUN_BLOCKS, name, put_kept};
use super::values_of;
use super::wire::payload;
use crate::load::{BlockingWorker, Sample, Window, Worker, drive, drive_blocking};
use crate::rounds::{Cell, Op, Peer, Pending};

/// Blocks of one chain of the working set, and of a batch.
pub const BATCH: u32 = 16;

/// A node and two clients that are attached to it.
#[derive(Clone)]
pub struct Side {
    /// For tasks.
    pub client: Client,
    /// For threads.
    pub blocking: blocking::Client,
    /// The namespace of both.
    pub namespace: NamespaceHandle,
}

impl Side {
    fn path(&self, concurrency: usize) -> PathReport {
        match concurrency {
            1 => self.blocking.path(),
            _ => self.client.path(),
        }
    }
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

/// What one operation needs, made before it is called.
enum Call {
    Get(Chain),
    Put(Chain),
    Lease(Chain),
}

impl Caller {
    fn call(&mut self) -> Result<Call> {
        Ok(match self.op {
            Op::Get => Call::Get(self.chain()?),
            Op::Put => {
                // Never a name that the fill used.
                let nth = self.fresh.fetch_add(1, Ordering::Relaxed) | 1 << 40;
                let chain = chain(&self.side.namespace, self.bytes, nth);
                Call::Put(chain.slice(0..self.keys as usize, RUN_BLOCKS))
            }
            Op::Lease => Call::Lease(self.chain()?),
            other => bail!("no {} on this path", other.as_str()),
        })
    }

    fn blocks(&self) -> Vec<PutBlock<'static>> {
        let block = |i| PutBlock::new(i, self.value.clone());
        (0..self.keys as usize).map(block).collect()
    }

    fn block_bytes(&self) -> usize {
        usize::try_from(self.bytes).expect("a size of this machine")
    }

    fn got(&self, got: &[Got]) -> Result<u64> {
        let bytes = self.block_bytes();
        let whole = got.iter().filter(|g| g.is_hit() && g.length_bytes == bytes);
        ensure!(whole.count() == self.keys as usize, "{got:?}");
        Ok(self.bytes * u64::from(self.keys))
    }

    fn kept(&self, results: &[PutResult]) -> Result<u64> {
        let kept = results.iter().filter(|r| r.outcome == PutOutcome::Cached);
        ensure!(kept.count() == self.keys as usize, "{results:?}");
        Ok(self.bytes * u64::from(self.keys))
    }

    fn held(&self, held: Option<Held>) -> Result<u64> {
        let (held, keys) = (held.context("not on the same-host path")?, self.keys);
        ensure!(
            held.len() == keys as usize,
            "{} of {keys} blocks held",
            held.len()
        );
        std::hint::black_box(&held);
        Ok(0) // no byte moves
    }
}

impl Worker for Caller {
    async fn step(&mut self) -> Result<u64> {
        let (call, bytes) = (self.call()?, self.block_bytes());
        let Side {
            client, namespace, ..
        } = &self.side;
        match call {
            Call::Get(chain) => {
                let mut buffers: Vec<_> = self.memory.chunks_exact_mut(bytes).collect();
                let got = client
                    .get_into(namespace, &chain, None, &mut buffers)
                    .await?;
                self.got(&got)
            }
            Call::Put(chain) => {
                let (blocks, options) = (self.blocks(), PutOptions::default());
                let results = client.put(namespace, &chain, &blocks, options).await?;
                self.kept(&results)
            }
            Call::Lease(chain) => self.held(client.hold(namespace, &chain, None).await?),
        }
    }
}

impl BlockingWorker for Caller {
    fn step(&mut self) -> Result<u64> {
        let (call, bytes) = (self.call()?, self.block_bytes());
        let Side {
            blocking: client,
            namespace,
            ..
        } = &self.side;
        match call {
            Call::Get(chain) => {
                let mut buffers: Vec<_> = self.memory.chunks_exact_mut(bytes).collect();
                let got = client.get_into(namespace, &chain, None, &mut buffers)?;
                self.got(&got)
            }
            Call::Put(chain) => {
                let (blocks, options) = (self.blocks(), PutOptions::default());
                let results = client.put(namespace, &chain, &blocks, options)?;
                self.kept(&results)
            }
            Call::Lease(chain) => self.held(client.hold(namespace, &chain, None)?),
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
            let before = side.path(cell.concurrency);
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
            let mut workers: Vec<_> = workers.collect();
            let sample = match cell.concurrency {
                1 => drive_blocking(&mut workers, window, &self.server_pids)?,
                _ => drive(workers, window, &self.server_pids).await?.1,
            };
            let after = side.path(cell.concurrency);
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
