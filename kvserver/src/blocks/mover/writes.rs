//! Writes to the tiers below: one path for callers who wait and for demotion, and the guard that tells an
//! invalidation what is on its way.
//!
//! Errors: outcomes; what a tier refuses is counted by reason. Bounds: the tier's own queue.

use std::sync::Arc;

use kvproto::{BlockKey, Reason, TierKind};
use tokio::sync::oneshot;

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

    /// Writes blocks and tells the engine. What was invalidated meanwhile leaves the tier again.
    pub(super) async fn write_down(
        self: &Arc<Self>,
        tier: &Arc<dyn Tier>,
        blocks: Vec<BlockRef>,
    ) -> Vec<WriteOutcome> {
        let kind = tier.kind();
        let _writing = Writing::new(self, kind, &blocks);
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
        let gone = WriteOutcome::Rejected {
            reason: Reason::Invalidated,
            retry_after_ms: 0,
        };
        let mut outcomes: Vec<WriteOutcome> = present
            .into_iter()
            .map(|present| {
                if present {
                    answers.next().unwrap_or(gone)
                } else {
                    gone
                }
            })
            .collect();
        let mut outlawed = Vec::new();
        for (block, outcome) in blocks.iter().zip(&mut outcomes) {
            if outcome.is_held() && !self.engine.stored(block.key(), kind, began) {
                outlawed.push(*block.key());
                *outcome = gone;
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

/// Blocks on their way to a tier, until it is dropped.
struct Writing<'a> {
    mover: &'a Mover,
    entries: Vec<(TierKind, BlockKey)>,
}

impl<'a> Writing<'a> {
    fn new(mover: &'a Mover, tier: TierKind, blocks: &[BlockRef]) -> Self {
        let entries: Vec<_> = blocks.iter().map(|block| (tier, *block.key())).collect();
        let mut writing = mover.writing.lock();
        for entry in &entries {
            *writing.entry(*entry).or_insert(0) += 1;
        }
        drop(writing);
        Self { mover, entries }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let mut writing = self.mover.writing.lock();
        for entry in &self.entries {
            if let Some(count) = writing.get_mut(entry) {
                *count -= 1;
                if *count == 0 {
                    writing.remove(entry);
                }
            }
        }
    }
}
