//! Terrace: the real `kvserver` as a child process, and `kvclient` as anybody would use it.
//!
//! ```text
//!   gets, lookups   one node that holds every working set in RAM
//!   puts            one node per size, small and full: every put is a new block and evicts an old one
//!   NVMe            one node whose RAM is an eighth of what lies on its disk
//! ```
//!
//! A put to Redis or memcached writes over an old value of the same key; blocks are named by their content and immutable,
//! so Terrace is given a new name every time and has to make room, which is its work in real life. Every get and put is
//! verified: XXH3 of each page, computed by the writer, compared by the node before the block is seen and by the reader
//! after the last hop.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use kvclient::{
    Chain, Client, LookupOptions, NamespaceHandle, PutBlock, PutOptions, PutOutcome, TierKind,
};

use super::network::{Connection, Job};
use super::node::{RUN_BLOCKS, lookup_chain, name};
use super::wire::payload;
use super::{CHAIN_KEYS, CHAINS, values_of};
use crate::rounds::Op;

/// What a [`Caller`] needs: clients, the namespace, and every chain it will ask for, made once.
#[derive(Clone)]
pub struct Target {
    /// Client of the node that is read.
    pub read: Client,
    /// Clients of the nodes that are written, by size.
    pub write: Arc<HashMap<u64, (Client, NamespaceHandle)>>,
    namespace: NamespaceHandle,
    singles: Arc<HashMap<u64, Vec<Chain>>>,
    chains: Arc<HashMap<u32, Vec<Chain>>>,
    fresh: Arc<AtomicU64>,
    nvme: Arc<AtomicU64>,
    ram: Arc<AtomicU64>,
}

impl Target {
    /// Names everything in advance.
    pub fn new(
        read: Client,
        namespace: NamespaceHandle,
        write: HashMap<u64, (Client, NamespaceHandle)>,
        sizes: &[u64],
        working_set_bytes: u64,
    ) -> Self {
        let singles = sizes.iter().map(|&bytes| {
            let values = 0..values_of(working_set_bytes, bytes);
            (
                bytes,
                values
                    .map(|i| Chain::from_root(vec![name(&namespace, bytes, i)]))
                    .collect(),
            )
        });
        let whole: Vec<_> = (0..CHAINS)
            .map(|nth| lookup_chain(&namespace, nth))
            .collect();
        let cut = |keys: u32| {
            whole
                .iter()
                .map(|c| c.slice(0..keys as usize, RUN_BLOCKS))
                .collect::<Vec<_>>()
        };
        Self {
            singles: Arc::new(singles.collect()),
            chains: Arc::new([(128, cut(128)), (CHAIN_KEYS, whole.clone())].into()),
            read,
            write: Arc::new(write),
            namespace,
            fresh: Arc::new(AtomicU64::new(0)),
            nvme: Arc::default(),
            ram: Arc::default(),
        }
    }

    /// Gets answered from NVMe and from RAM so far.
    pub fn hits(&self) -> (u64, u64) {
        (
            self.nvme.load(Ordering::Relaxed),
            self.ram.load(Ordering::Relaxed),
        )
    }
}

/// One operation in flight; clients are shared, as in an engine.
pub struct Caller {
    target: Target,
    buffer: Vec<u8>,
    value: Bytes,
}

impl Connection for Caller {
    type Target = Target;

    async fn connect(target: &Target) -> Result<Self> {
        Ok(Self {
            target: target.clone(),
            buffer: Vec::new(),
            value: Bytes::new(),
        })
    }

    async fn act(&mut self, job: &Job, index: u64) -> Result<u64> {
        let target = &self.target;
        let bytes = usize::try_from(job.bytes)?;
        match job.op {
            Op::Get | Op::NvmeGet => {
                self.buffer.resize(bytes, 0);
                let chain =
                    &target.singles.get(&job.bytes).context("no such size")?[index as usize];
                let got = target
                    .read
                    .get_into(&target.namespace, chain, None, &mut [&mut self.buffer])
                    .await?;
                let got = got.first().context("an empty answer")?;
                ensure!(
                    got.is_hit() && got.length_bytes == bytes,
                    "{:?}",
                    got.outcome
                );
                let from_disk = got.tier == Some(TierKind::Nvme);
                let counter = if from_disk { &target.nvme } else { &target.ram };
                counter.fetch_add(1, Ordering::Relaxed);
                if job.op == Op::NvmeGet && !from_disk {
                    return Ok(0); // an answer from RAM says nothing of the disk
                }
            }
            Op::Put => {
                if self.value.len() != bytes {
                    self.value = payload(bytes, job.bytes).into();
                }
                let (client, namespace) = target
                    .write
                    .get(&job.bytes)
                    .context("no node for this size")?;
                let fresh = target.fresh.fetch_add(1, Ordering::Relaxed) | 1 << 40; // never a name that fill used
                let chain = Chain::from_root(vec![name(namespace, job.bytes, fresh)]);
                let results = client
                    .put(
                        namespace,
                        &chain,
                        &[PutBlock::new(0, self.value.clone())],
                        PutOptions::default(),
                    )
                    .await?;
                ensure!(
                    results.len() == 1 && results[0].outcome == PutOutcome::Cached,
                    "{results:?}"
                );
            }
            Op::Exists | Op::LookupLease => {
                let chain = &target.chains.get(&job.keys).context("no such chain")?
                    [index as usize / CHAIN_KEYS as usize];
                let probe = job.op == Op::Exists;
                let options = if probe {
                    LookupOptions::probe()
                } else {
                    LookupOptions::default()
                };
                let found = target
                    .read
                    .lookup(&target.namespace, chain, &options)
                    .await?;
                ensure!(
                    found.present_blocks == job.keys,
                    "{} of {} keys present",
                    found.present_blocks,
                    job.keys
                );
                if !probe {
                    ensure!(
                        found.leased_blocks() == job.keys,
                        "{} of {} keys leased",
                        found.leased_blocks(),
                        job.keys
                    );
                    found.lease.context("no lease")?.release().await?;
                }
            }
            other => bail!("no {} over a network", other.as_str()),
        }
        Ok(job.payload_bytes())
    }
}
