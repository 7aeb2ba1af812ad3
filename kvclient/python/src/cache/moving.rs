//! The moving half of a cache: where the engine's blocks lie, and the jobs that load and save them.

use std::{pin::Pin, sync::Arc};

use kvclient::clock::Clock;

use super::{Cache, Error, Shared};
use crate::{
    device::OnDevice,
    hashes::{self, EngineHashes},
    jobs::{JobKind, Outcome, Refused, Taken},
    layout::{Layer, Layout},
    memory::{ClaimError, EngineMemory},
    transfer::{Load, Save},
};

impl Cache {
    /// Says where the engine's blocks lie; an empty list forgets it. Waits for copies in the memory known before.
    ///
    /// # Errors
    /// When the layers make no layout; then nothing has changed.
    ///
    /// # Safety
    /// As [`EngineMemory::new`], until [`Cache::close`] or the next call of this has returned. A block belongs to the cache from
    /// `load` or `save` until its job is reported, or for a save until [`Cache::wait_gathered`] has returned.
    #[allow(unsafe_code)]
    pub unsafe fn layout(&self, layers: Vec<Layer>) -> Result<(), Error> {
        // SAFETY: the caller's promise is the same.
        self.relayout(layers, |layout| Ok(unsafe { EngineMemory::new(layout) }))
    }

    /// As [`Cache::layout`], with addresses of `device` (`cuda:N`, or `host`) and the number of the engine's stream there. Jobs
    /// wait on the device for what that stream was given before them.
    ///
    /// # Errors
    /// As [`Cache::layout`], and for a device that is not there; then nothing is known any more.
    ///
    /// # Safety
    /// As [`Cache::layout`], for memory of the device, and the stream exists as long.
    #[allow(unsafe_code)]
    pub unsafe fn layout_on(
        &self,
        layers: Vec<Layer>,
        device: &str,
        stream: u64,
    ) -> Result<(), Error> {
        self.relayout(layers, |layout| {
            // SAFETY: the caller's promise is the same.
            let device = unsafe { OnDevice::new(&layout, device, stream) }?;
            Ok(EngineMemory::on_device(layout, device))
        })
    }

    fn relayout(
        &self,
        layers: Vec<Layer>,
        memory_of: impl FnOnce(Layout) -> Result<Arc<EngineMemory>, Error>,
    ) -> Result<(), Error> {
        let layout = (!layers.is_empty())
            .then(|| Layout::new(layers))
            .transpose()?;
        if self.is_forked() {
            return Err(Error::Forked);
        }
        let mut memory = self.memory.lock();
        if let Some(old) = memory.take() {
            // Claims are what is waited for, not reports: a close that runs meanwhile makes those only after this.
            self.shared.jobs.hurry(self.shared.node.clock.now());
            old.retire();
        }
        *memory = layout.map(memory_of).transpose()?;
        Ok(())
    }

    /// Starts to load `blocks` under a lease (0: none). `false`: the queue is full.
    ///
    /// # Errors
    /// For blocks that are not there, or hashes that do not reach so far.
    pub fn load(&self, job: u64, lease: u64, blocks: Blocks<'_>) -> Result<bool, Error> {
        let (hashes, first) = (blocks.chain()?, blocks.first);
        let claim = self.memory()?.write(&blocks.ids);
        self.submit(job, JobKind::Load, blocks.ids, claim, |claim| {
            Work::Load(Load {
                lease,
                hashes,
                first,
                claim,
            })
        })
    }

    /// Starts to store `blocks`. `false`: the queue is full.
    ///
    /// # Errors
    /// As [`Cache::load`].
    pub fn save(&self, job: u64, blocks: Blocks<'_>) -> Result<bool, Error> {
        let (hashes, first) = (blocks.chain()?, blocks.first);
        let claim = self.memory()?.read(&blocks.ids);
        self.submit(job, JobKind::Save, blocks.ids, claim, |claim| {
            Work::Save(Save {
                hashes,
                first,
                claim,
            })
        })
    }

    pub(super) fn memory(&self) -> Result<Arc<EngineMemory>, Error> {
        if self.is_forked() {
            return Err(Error::Forked);
        }
        self.memory.lock().clone().ok_or(Error::NoLayout)
    }

    fn submit<C>(
        &self,
        job: u64,
        kind: JobKind,
        block_ids: Vec<u32>,
        claim: Result<C, ClaimError>,
        work: impl FnOnce(C) -> Work,
    ) -> Result<bool, Error> {
        let (jobs, now) = (&self.shared.jobs, self.shared.node.clock.now());
        let submitted = match claim {
            Ok(claim) => jobs.submit(job, kind, block_ids, now, || work(claim)),
            // The engine's other jobs are at these blocks, or its memory is just going: an outcome like any other.
            Err(busy @ (ClaimError::Busy { .. } | ClaimError::Retired | ClaimError::Stream(_))) => {
                jobs.submit_failed(job, kind, block_ids, &busy.to_string(), now)
            }
            Err(ClaimError::Layout(error)) => return Err(error.into()),
            Err(twice) => return Err(Error::Claim(twice)),
        };
        match submitted {
            Ok(()) => Ok(true),
            Err(Refused::Known) => Err(Error::JobKnown { job }),
            Err(Refused::Full | Refused::Closed) => {
                self.shared.node.counters.jobs_refused.add(1);
                Ok(false)
            }
        }
    }
}

/// Blocks `first`, `first + 1`, … of a chain, and where the engine has them.
#[derive(Clone, Debug)]
pub struct Blocks<'h> {
    /// The engine's hashes from the root on, joined; they reach to the last of the blocks at least.
    pub hashes: &'h [u8],
    /// Bytes of each.
    pub width: usize,
    /// The first block.
    pub first: usize,
    /// The engine's blocks.
    pub ids: Vec<u32>,
}

impl Blocks<'_> {
    /// The chain up to the last of them.
    fn chain(&self) -> Result<EngineHashes, Error> {
        let known = hashes::count(self.hashes, self.width)?;
        let (first, count) = (self.first, self.ids.len());
        match first.checked_add(count) {
            Some(end) if end <= known => Ok(EngineHashes::new(
                &self.hashes[..end * self.width],
                self.width,
            )?),
            _ => Err(kvproto::FieldError::new(
                "hashes",
                format!("has {known} blocks; {count} from {first} on are wanted"),
            )
            .into()),
        }
    }
}

/// One job for the threads.
#[derive(Debug)]
pub(super) enum Work {
    Load(Load),
    Save(Save),
}

impl Work {
    /// Ready once nobody has a claim on its blocks.
    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        match self {
            Self::Load(load) => Box::pin(load.claim.ended()),
            Self::Save(save) => Box::pin(save.claim.ended()),
        }
    }
}

/// Does one job of this kind after the other.
pub(super) async fn run(shared: Arc<Shared>, kind: JobKind) {
    loop {
        let taken = shared.jobs.take(kind).await;
        let job = taken.job;
        let ended = taken.work.ended();
        // A task of its own: should it panic, its claims are dropped, its job ends, and the next one is done.
        let done = tokio::spawn(work(Arc::clone(&shared), taken)).await;
        if let Err(error) = done {
            // A device that was told to copy has shares of them still.
            ended.await;
            shared
                .jobs
                .fail(job, &format!("a defect: {error}"), shared.node.clock.now());
        }
    }
}

async fn work(shared: Arc<Shared>, taken: Taken<Work>) {
    let (node, job) = (&shared.node, taken.job);
    match taken.work {
        Work::Load(load) => {
            let (hashes, first) = (load.hashes.clone(), load.first);
            let blocks: Box<[u32]> = load.claim.blocks().into();
            let (outcome, corrupt) = shared.mover.load(node, load).await;
            shared.missed(&hashes, first, &blocks, &outcome);
            shared.jobs.end(job, outcome, node.clock.now());
            shared.mover.forget(node, &hashes, &corrupt).await;
        }
        Work::Save(save) => {
            let hashes = save.hashes.clone();
            let hurry = shared.jobs.hurried_since(taken.hurries);
            let gathered = || shared.jobs.gathered(job);
            let (outcome, kept) = shared.mover.save(node, save, hurry, gathered).await;
            let mut misses = shared.misses.lock();
            for block in kept {
                misses.remove(hashes.get(block));
            }
            drop(misses);
            shared.jobs.end(job, outcome, node.clock.now());
        }
    }
}

impl Shared {
    /// What a load did not bring, lookups must not promise again at once.
    fn missed(&self, hashes: &EngineHashes, first: usize, blocks: &[u32], outcome: &Outcome) {
        if outcome.failed.is_empty() {
            return;
        }
        let now = self.node.clock.now();
        let mut misses = self.misses.lock();
        // Failed blocks are in the job's order, so one walk finds them.
        let mut failed = outcome.failed.iter().peekable();
        for (at, block) in blocks.iter().enumerate() {
            if failed.next_if_eq(&block).is_some() {
                misses.add(hashes.get(first + at), now);
            }
        }
    }
}
