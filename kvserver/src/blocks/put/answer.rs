//! What a block that was put becomes, and who has to say so before it is answered.
//!
//! ```text
//! complete   sealed, published ──► as safe as asked?  Done · Writing (a tier will say) · corrupt, invalidated
//! present    there already     ──► as safe as asked?  Done · Writing · Raising (from below RAM, then written)
//! finish     waits for all of them, and beyond `cached` for the next owners
//! ```
//!
//! Errors: none but those of a put that ends too early; a tier that refuses is an answer.

use kvproto::{
    Ack, BlockHeader, BlockKey, PutOutcome, Reason, TierKind, checksum::Landing,
    convert::answer::PutResult,
};
use tokio::sync::oneshot;

use super::PutSession;
use crate::{
    blocks::{BlocksError, motion::carried, mover::Urgency},
    engine::{Grant, Presence, Published, Whereabouts},
    tier::{BlockRef, WriteOutcome},
};

/// Bytes of a put that are passed on together to the next owner.
const PASSED_BYTES: u64 = 16 << 20;

/// What is known of a block so far.
pub(super) enum Answer {
    Done(PutResult),
    /// A write is under way that decides it; this is what it becomes if it is held.
    Writing(oneshot::Receiver<WriteOutcome>, PutOutcome),
    /// It is below RAM, and must come up before it can be written to a safer tier.
    Raising(BlockKey),
}

impl PutSession {
    /// The last block was whole: waits for what the answers still depend on.
    ///
    /// # Errors
    /// When the last block is not whole, or there was none.
    pub async fn finish(mut self) -> Result<Vec<PutResult>, BlocksError> {
        self.check_whole()?;
        self.pass_on();
        let mut results = Vec::with_capacity(self.answers.len());
        for answer in std::mem::take(&mut self.answers) {
            let result = match answer {
                Answer::Done(result) => result,
                Answer::Writing(outcome, held) => written(outcome.await, held),
                Answer::Raising(key) => self.raise(key).await,
            };
            results.push(result);
        }
        if self.ack != Ack::Cached {
            for passed in std::mem::take(&mut self.passed) {
                for (number, reason) in passed.await.unwrap_or_default() {
                    if let Some(result) = results.get_mut(number) {
                        result.reason.get_or_insert(reason);
                    }
                }
            }
        }
        for result in &results {
            self.blocks.metrics.put(result.outcome, result.reason);
        }
        Ok(results)
    }

    /// Sends on what has been gathered for next owners, if that is enough for a call.
    pub(super) fn pass_on_if_much(&mut self) {
        let passing = self.passing.as_ref();
        if passing.is_some_and(|passing| passing.bytes >= PASSED_BYTES) {
            self.pass_on();
        }
    }

    /// Sends on what has been gathered for next owners.
    fn pass_on(&mut self) {
        let Some(passing) = self.passing.as_mut().filter(|p| !p.blocks.is_empty()) else {
            return;
        };
        let passing = std::mem::take(passing);
        let space = self.blocks.spaces().get(&self.namespace);
        if let (Some(motion), Some(space)) = (self.blocks.motion(), space) {
            let passed = motion.pass_on(&space, self.ack, self.kind, passing);
            self.passed.extend(passed);
        }
    }

    /// All bytes are in the slot: seals, publishes, and sends it on if the ack wants it.
    pub(super) fn complete(
        &mut self,
        grant: Grant,
        header: BlockHeader,
        landing: Landing,
    ) -> Answer {
        let sums = landing.finish(grant.block.bytes());
        let sealed = match grant.block.seal_summed(header, &sums) {
            Ok(sealed) => sealed,
            Err(unsealed) => {
                tracing::debug!(why = %unsealed.why, "a block that was put is not what its header says");
                return Answer::Done(PutResult {
                    outcome: PutOutcome::Corrupt,
                    retry_after_ms: 0,
                    reason: Some(Reason::Corrupt),
                });
            }
        };
        match self.blocks.engine.publish(sealed, grant.ticket) {
            Published::New(block) => {
                self.blocks.mover.look_for_work();
                if let Some(passing) = &mut self.passing {
                    passing.push(self.answers.len(), carried(&block));
                }
                if let Some(motion) = self.blocks.motion().filter(|_| self.is_handed_over) {
                    let replicas = self.known.replicas as usize;
                    motion.hosts(block.key(), block.place().run, replicas);
                }
                self.acknowledge(block, PutOutcome::reached(self.ack))
            }
            Published::Twin(block) => self.acknowledge(block, PutOutcome::reached(self.ack)),
            Published::Invalidated => Answer::Done(PutResult::rejected(Reason::Invalidated, 0)),
        }
    }

    /// A block in RAM, until it is as safe as asked.
    fn acknowledge(&self, block: BlockRef, held: PutOutcome) -> Answer {
        match tier_of(self.ack) {
            None => Answer::Done(PutResult::kept(held)),
            Some(tier) => Answer::Writing(self.blocks.mover.write(tier, block), held),
        }
    }

    /// A block that was there already.
    pub(super) fn present(&self, key: &BlockKey, presence: Presence) -> Answer {
        let safe_enough = match self.ack {
            Ack::Cached => true,
            Ack::Stored => {
                presence.below.contains(TierKind::Nvme)
                    || presence.below.contains(TierKind::Durable)
            }
            Ack::Synced => presence.below.contains(TierKind::Durable),
        };
        if safe_enough {
            return Answer::Done(PutResult::kept(PutOutcome::Present));
        }
        match self.blocks.engine.locate(key, None) {
            Whereabouts::Ram(block) => self.acknowledge(block, PutOutcome::Present),
            Whereabouts::Below(_) => Answer::Raising(*key),
            // It left in this very moment; its bytes are on the wire, so the writer may send them again.
            Whereabouts::Gone(reason) => Answer::Done(PutResult::rejected(reason, 1)),
        }
    }

    /// Reads a block from below RAM and writes it to the tier that the ack wants.
    async fn raise(&self, key: BlockKey) -> PutResult {
        let Some(tier) = tier_of(self.ack) else {
            return PutResult::kept(PutOutcome::Present);
        };
        let block = match self.blocks.engine.locate(&key, None) {
            Whereabouts::Ram(block) => Ok(block),
            Whereabouts::Below(below) => self.blocks.mover.read(below, Urgency::Asked).await,
            Whereabouts::Gone(reason) => Err(reason),
        };
        match block {
            Ok(block) => written(
                self.blocks.mover.write(tier, block).await,
                PutOutcome::Present,
            ),
            Err(reason) => PutResult::rejected(reason, 1),
        }
    }
}

/// The tier whose word an ack waits for.
fn tier_of(ack: Ack) -> Option<TierKind> {
    match ack {
        Ack::Cached => None,
        Ack::Stored => Some(TierKind::Nvme),
        Ack::Synced => Some(TierKind::Durable),
    }
}

/// What the writer is told once a tier has answered; no answer means that the node is stopping.
fn written(
    outcome: Result<WriteOutcome, oneshot::error::RecvError>,
    held: PutOutcome,
) -> PutResult {
    match outcome {
        Ok(WriteOutcome::Stored | WriteOutcome::Synced) => PutResult::kept(held),
        Ok(WriteOutcome::Rejected {
            reason,
            retry_after_ms,
        }) => PutResult::rejected(reason, retry_after_ms),
        Err(_) => PutResult::rejected(Reason::Draining, 0),
    }
}
