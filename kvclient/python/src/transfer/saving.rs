//! A save under way: what the engine's memory is read for, what waits for the node, and what the node has taken.
//!
//! ```text
//! gather   probe ─► each batch: into shared memory at once │ into scratch │ into a device's slot
//! put_next                                                   └─ put ─┘      └─ when it is full, put
//! ```
//!
//! The first block that the node does not take ends it: those after it would be unreachable.

use std::{collections::VecDeque, ops::Range, sync::Arc, time::Duration};

use kvclient::{
    LookupOptions, Payload, PutBlock, PutOptions,
    clock::{Clock, Tick},
};
use kvgpu::Event;
use tokio::sync::Semaphore;

use super::{AWAY, Mover, blocks_per_call, chain, cut};
use crate::{
    device::{Gathering, OnDevice, Use},
    hashes::EngineHashes,
    jobs::Outcome,
    memory::ReadClaim,
    node::{NodeLink, Way},
    scratch::Buffer,
};

/// More than the slots of a device, so that every gather has a permit.
const READING: usize = 64;

/// Blocks of the engine that wait for the node.
enum Waiting<'a> {
    Here(Buffer<'a>),
    /// On their way from a device.
    Coming(Gathering),
}

/// How far a save has come.
pub(super) struct Saving<'a> {
    mover: &'a Mover,
    node: &'a NodeLink,
    hashes: &'a EngineHashes,
    first: usize,
    until: Tick,
    /// Which of the job's blocks the node has.
    kept: Vec<bool>,
    /// Gathered, not yet put.
    waiting: VecDeque<(Range<usize>, Waiting<'a>)>,
    /// Permits are with what a device still reads.
    reading: Arc<Semaphore>,
    reason: Option<String>,
}

impl<'a> Saving<'a> {
    /// Of `count` blocks, the first of which is block `first` of the chain.
    pub(super) fn new(
        mover: &'a Mover,
        node: &'a NodeLink,
        hashes: &'a EngineHashes,
        first: usize,
        count: usize,
    ) -> Self {
        Self {
            mover,
            node,
            hashes,
            first,
            until: node.clock.now().after(mover.timeout),
            kept: vec![false; count],
            waiting: VecDeque::new(),
            reading: Arc::new(Semaphore::new(READING)),
            reason: None,
        }
    }

    /// Ready when nobody reads the engine's memory any more: what a device has been told to read it reads, for
    /// milliseconds, and its time is bounded by its queue.
    pub(super) async fn read(&self) {
        let read = self.reading.acquire_many(READING as u32).await;
        drop(read);
    }

    /// Reads the engine's blocks, and puts some already where scratch does not hold them all.
    pub(super) async fn gather(&mut self, claim: &ReadClaim) {
        let count = claim.blocks().len();
        let block_bytes = claim.block_bytes();
        let Some(present) = self.present(count).await else {
            return;
        };
        self.kept[..present].fill(true);
        self.node.counters.present_blocks.add(present as u64);
        if let Some((device, turn)) = claim.device() {
            if let Err(reason) = self.gather_from(device, turn, claim, present).await {
                self.fail(&reason);
            }
            return;
        }
        for range in cut(present..count, blocks_per_call(block_bytes)) {
            if let Some(way) = self.node.moving().filter(Way::is_local) {
                let pieces = claim.pieces(range.clone()).into_iter();
                let blocks = pieces.map(Payload::Pieces).collect();
                if !self.put(&way, range, blocks).await {
                    return;
                }
                continue;
            }
            let bytes = range.len() * block_bytes;
            let mut buffer = loop {
                if let Some(buffer) = self.mover.scratch.try_take(bytes) {
                    break buffer;
                }
                if self.waiting.is_empty() {
                    break self.mover.scratch.take(bytes).await;
                }
                if !self.put_next(block_bytes).await {
                    return;
                }
            };
            for piece in claim.pieces(range.clone()).into_iter().flatten() {
                buffer.extend(piece);
            }
            self.waiting.push_back((range, Waiting::Here(buffer)));
        }
    }

    /// Has a device gather the blocks from `present` on, as many batches ahead of the node as there are slots.
    async fn gather_from(
        &mut self,
        device: &OnDevice,
        turn: &Event,
        claim: &ReadClaim,
        present: usize,
    ) -> Result<(), String> {
        let (ids, block_bytes) = (claim.blocks(), claim.block_bytes());
        let step = blocks_per_call(block_bytes).min(device.blocks_per_batch());
        for range in cut(present..ids.len(), step) {
            let slot = loop {
                if let Some(slot) = device.try_slot(Use::Save, range.len()) {
                    break slot;
                }
                if self.waiting.is_empty() {
                    break device.slot(Use::Save, range.len()).await?;
                }
                if !self.put_next(block_bytes).await {
                    return Ok(());
                }
            };
            let reading = Arc::clone(&self.reading).acquire_owned().await;
            let kept = (claim.share(), reading);
            let gathering = device.gather(slot, &ids[range.clone()], turn, kept)?;
            self.waiting.push_back((range, Waiting::Coming(gathering)));
        }
        Ok(())
    }

    /// How many of the leading blocks the node has already.
    async fn present(&mut self, count: usize) -> Option<usize> {
        if count == 0 {
            return None;
        }
        let Some(way) = self.node.moving() else {
            self.fail(AWAY);
            return None;
        };
        let chain = chain(&way, self.hashes, self.first, 0..count);
        let options = LookupOptions {
            parts: vec![self.mover.part],
            ..LookupOptions::probe()
        };
        let client = way.client.with_deadline(self.left());
        match client.lookup(&way.namespace, &chain, &options).await {
            Ok(found) => Some((found.present_blocks as usize).min(count)),
            Err(error) => {
                let reason = self.node.failed(&error);
                self.fail(&reason);
                None
            }
        }
    }

    /// Puts what was gathered first. False: nothing is left to put, or there is no use in going on, because a block that
    /// the node did not take makes those after it unreachable.
    pub(super) async fn put_next(&mut self, block_bytes: usize) -> bool {
        let Some((range, waiting)) = self.waiting.pop_front() else {
            return false;
        };
        let Some(way) = self.node.moving() else {
            self.fail(AWAY);
            return false;
        };
        let here;
        let slot;
        let bytes = match waiting {
            Waiting::Here(buffer) => {
                here = buffer;
                here.bytes()
            }
            Waiting::Coming(gathering) => match gathering.done().await {
                Ok(full) => {
                    slot = full;
                    slot.bytes()
                }
                Err(reason) => {
                    self.fail(&reason);
                    return false;
                }
            },
        };
        let blocks = bytes.chunks_exact(block_bytes);
        self.put(&way, range, blocks.map(Payload::Borrowed).collect())
            .await
    }

    /// Puts blocks `range` of the job; whether the node took them all.
    async fn put(&mut self, way: &Way, range: Range<usize>, data: Vec<Payload<'_>>) -> bool {
        let chain = chain(way, self.hashes, self.first, range.clone());
        let part = self.mover.part;
        let block = |(index, data)| PutBlock { index, part, data };
        let blocks: Vec<PutBlock<'_>> = data.into_iter().enumerate().map(block).collect();
        let client = way.client.with_deadline(self.left());
        let put = client
            .put(&way.namespace, &chain, &blocks, PutOptions::default())
            .await;
        match put {
            Ok(results) => {
                let mut all = true;
                for (at, result) in range.zip(results) {
                    self.kept[at] = result.outcome.is_kept();
                    if !self.kept[at] {
                        all = false;
                        let why = result
                            .reason
                            .map_or_else(|| "no reason".to_owned(), |why| why.to_string());
                        self.fail(&format!("a block was {}: {why}", result.outcome));
                    }
                }
                all
            }
            Err(error) => {
                let reason = self.node.failed(&error);
                self.fail(&reason);
                false
            }
        }
    }

    fn left(&self) -> Duration {
        self.until.since(self.node.clock.now())
    }

    pub(super) fn fail(&mut self, reason: &str) {
        self.reason.get_or_insert_with(|| reason.to_owned());
    }

    pub(super) fn finish(self, ids: &[u32], block_bytes: usize) -> (Outcome, Vec<usize>) {
        let kept: Vec<usize> = (0..ids.len()).filter(|&at| self.kept[at]).collect();
        let failed = (0..ids.len())
            .filter(|&at| !self.kept[at])
            .map(|at| ids[at]);
        let outcome = Outcome {
            blocks: kept.len(),
            bytes: (kept.len() * block_bytes) as u64,
            failed: failed.collect(),
            reason: self.reason,
        };
        let counters = &self.node.counters;
        counters.saved_blocks.add(outcome.blocks as u64);
        counters.saved_bytes.add(outcome.bytes);
        counters.save_failed_blocks.add(outcome.failed.len() as u64);
        (
            outcome,
            kept.into_iter().map(|at| self.first + at).collect(),
        )
    }
}
