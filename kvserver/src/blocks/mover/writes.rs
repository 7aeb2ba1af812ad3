//! Writes to the tiers below: one path for callers who wait and for demotion, and the book that tells an
//! invalidation, and the next writer of the same block, what is on its way.
//!
//! ```text
//!   write_down ─┬─ nobody writes this block ──► leads: tier.write, then the engine ──┬─► outcome
//!               └─ somebody does ─────────────► joins: waits for that outcome ───────┘
//!                                                └─ of other bytes, cut short, or invalidated: once more
//! ```
//!
//! Why joining: a put with ack `stored` often meets the demotion of its own block. A tier can only say that
//! it is busy with it, and the writer would be sent away although its bytes are just arriving.
//!
//! Errors: outcomes; what a tier refuses is counted by reason, once per write and not per waiter. Bounds: the
//! tier's own queue and deadlines; whoever joins waits no longer than the write that leads.

use std::{collections::hash_map::Entry, sync::Arc};

use kvproto::{BlockKey, Reason, TierKind};
use tokio::sync::{oneshot, watch};

use super::Mover;
use crate::tier::{BlockRef, Tier, WriteOutcome};

impl Mover {
    /// Writes a block to a tier because a caller waits for it; answered by what the tier says.
    pub fn write(
        self: &Arc<Self>,
        tier: TierKind,
        block: BlockRef,
    ) -> oneshot::Receiver<WriteOutcome> {
        let (sender, receiver) = oneshot::channel();
        let Some(tier) = self.tiers.get(tier).cloned() else {
            let _ = sender.send(WriteOutcome::Rejected {
                reason: Reason::TierDown,
                retry_after_ms: 0,
            });
            return receiver;
        };
        let me = Arc::clone(self);
        self.spawn(async move {
            let outcomes = me.write_down(&tier, vec![block]).await;
            let _ = sender.send(outcomes[0]);
        });
        receiver
    }

    /// Whether a block is on its way to a tier.
    #[must_use]
    pub fn is_writing(&self, tier: TierKind, key: &BlockKey) -> bool {
        self.writing.lock().contains_key(&(tier, *key))
    }

    /// Writes blocks and tells the engine. What was invalidated meanwhile leaves the tier again; a block
    /// that is being written already is not written twice.
    pub(super) async fn write_down(
        self: &Arc<Self>,
        tier: &Arc<dyn Tier>,
        blocks: Vec<BlockRef>,
    ) -> Vec<WriteOutcome> {
        let mut outcomes = vec![GONE; blocks.len()];
        let mut waiting: Vec<usize> = (0..blocks.len()).collect();
        while !waiting.is_empty() {
            let (led, joined) = Led::new(self, tier.kind(), &blocks, &waiting);
            let led_blocks: Vec<BlockRef> = led.blocks(&blocks);
            let answers = self.lead(tier, &led_blocks).await;
            // What is led has ended before others are waited for, so two batches cannot wait for each other.
            led.end(&answers, &mut outcomes);
            waiting.clear();
            for (at, running) in joined {
                match running.outcome(blocks[at].header().seal).await {
                    Some(outcome) => outcomes[at] = outcome,
                    None => waiting.push(at),
                }
            }
        }
        outcomes
    }

    /// Writes blocks that nobody else is writing; to be called while they are in the book.
    async fn lead(
        self: &Arc<Self>,
        tier: &Arc<dyn Tier>,
        blocks: &[BlockRef],
    ) -> Vec<WriteOutcome> {
        let kind = tier.kind();
        let began = self.engine.moment();
        // Asked only now that an invalidation would see it as being written: either it was forgotten
        // before, and is not written, or it is removed together with this write.
        let present: Vec<bool> = blocks
            .iter()
            .map(|block| self.engine.is_present(block.key()))
            .collect();
        let wanted: Vec<BlockRef> = blocks
            .iter()
            .zip(&present)
            .filter(|(_, present)| **present)
            .map(|(block, _)| block.clone())
            .collect();
        let mut answers = match wanted.is_empty() {
            true => Vec::new(),
            false => tier.write(wanted).await,
        }
        .into_iter();
        let mut outcomes: Vec<WriteOutcome> = present
            .into_iter()
            .map(|present| {
                if present {
                    answers.next().unwrap_or(GONE)
                } else {
                    GONE
                }
            })
            .collect();
        let mut outlawed = Vec::new();
        for (block, outcome) in blocks.iter().zip(&mut outcomes) {
            if outcome.is_held() && !self.engine.stored(block.key(), kind, began) {
                outlawed.push(*block.key());
                *outcome = GONE;
            }
            let refused = match outcome {
                WriteOutcome::Stored | WriteOutcome::Synced => None,
                WriteOutcome::Rejected { reason, .. } => Some(*reason),
            };
            self.metrics.moved_down(kind, refused);
        }
        if !outlawed.is_empty()
            && let Err(error) = self.remove(tier, outlawed).await
        {
            tracing::warn!(%error, tier = %kind, "cannot record that invalidated blocks are gone");
        }
        outcomes
    }
}

/// The answer for a block that was invalidated before it was written, or while it was.
const GONE: WriteOutcome = WriteOutcome::Rejected {
    reason: Reason::Invalidated,
    retry_after_ms: 0,
};

/// A block on its way to a tier, as the next who wants it there sees it.
#[derive(Clone)]
pub(super) struct Running {
    seal: u64,
    ended: watch::Receiver<Option<WriteOutcome>>,
}

impl Running {
    /// What became of it; `None` when that says nothing about a block with this seal: the write was of other
    /// bytes, was cut short, or was invalidated, which may have been before the block was put again.
    async fn outcome(mut self, seal: u64) -> Option<WriteOutcome> {
        let outcome = *self.ended.wait_for(Option::is_some).await.ok()?;
        outcome.filter(|outcome| self.seal == seal && *outcome != GONE)
    }
}

/// Blocks that one call leads to a tier: in the mover's book until it is dropped.
struct Led<'a> {
    mover: &'a Mover,
    tier: TierKind,
    /// Where each stands in the call, and who tells those that join.
    entries: Vec<(usize, BlockKey, watch::Sender<Option<WriteOutcome>>)>,
}

impl<'a> Led<'a> {
    /// Enters those of `blocks` that nobody writes; the others are for joining.
    fn new(
        mover: &'a Mover,
        tier: TierKind,
        blocks: &[BlockRef],
        wanted: &[usize],
    ) -> (Self, Vec<(usize, Running)>) {
        let (mut entries, mut joined) = (Vec::new(), Vec::new());
        let mut writing = mover.writing.lock();
        for &at in wanted {
            let header = blocks[at].header();
            match writing.entry((tier, header.key)) {
                Entry::Occupied(running) => joined.push((at, running.get().clone())),
                Entry::Vacant(free) => {
                    let (teller, ended) = watch::channel(None);
                    free.insert(Running {
                        seal: header.seal,
                        ended,
                    });
                    entries.push((at, header.key, teller));
                }
            }
        }
        drop(writing);
        let led = Self {
            mover,
            tier,
            entries,
        };
        (led, joined)
    }

    fn blocks(&self, all: &[BlockRef]) -> Vec<BlockRef> {
        let entries = self.entries.iter();
        entries.map(|(at, ..)| all[*at].clone()).collect()
    }

    /// Leaves the book and tells everybody, `outcomes` of the whole call included.
    fn end(mut self, answers: &[WriteOutcome], outcomes: &mut [WriteOutcome]) {
        self.leave();
        for ((at, _, teller), answer) in self.entries.drain(..).zip(answers) {
            outcomes[at] = *answer;
            teller.send_replace(Some(*answer));
        }
    }

    fn leave(&self) {
        let mut writing = self.mover.writing.lock();
        for (_, key, _) in &self.entries {
            writing.remove(&(self.tier, *key));
        }
    }
}

impl Drop for Led<'_> {
    /// A call that is dropped half-way: whoever joined finds its teller gone.
    fn drop(&mut self) {
        self.leave();
    }
}
