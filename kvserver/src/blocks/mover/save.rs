//! The last thing before an orderly end: what is only in RAM goes to NVMe, most valuable first.
//!
//! ```text
//! loops stopped ─► RAM-only blocks by policy, best first ─► 16 MiB at a time ─► until there are none
//!                                                                            ├─ the time is up
//!                                                                            ├─ wear, a full or a failing tier
//!                                                                            └─ three quarters of the tier
//! ```
//!
//! Admission by reuse does not bind here: what is not written now is lost. The wear budget does, and the time.
//! Not more than three quarters of the tier, so that the least valuable do not push out the most valuable.
//! Units: blocks, bytes. Errors: none; what was left and why is the answer.

use std::{sync::Arc, time::Duration};

use kvproto::Reason;

use super::{DEMOTE_BATCH_BYTES, Mover};
use crate::{
    clock::Tick,
    tier::{BlockRef, WriteOutcome},
};

/// Longest pause when the tier's queue is full.
const FULL_PAUSE: Duration = Duration::from_millis(50);

/// What became of the blocks that were only in RAM when a node was asked to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Blocks that NVMe has now.
    pub kept_blocks: u64,
    /// Their bytes.
    pub kept_bytes: u64,
    /// Blocks that went with the node.
    pub left_blocks: u64,
    /// Their bytes.
    pub left_bytes: u64,
    /// Why not all were kept: `Deadline` when the time was up, otherwise the tier's reason.
    pub why: Option<Reason>,
}

impl Mover {
    /// Writes what is only in RAM to NVMe until `until`; to be called when nothing else runs any more.
    pub(crate) async fn save(self: &Arc<Self>, until: Tick) -> Saved {
        let mut waiting = self.engine.only_in_ram();
        let bytes = |blocks: &[BlockRef]| blocks.iter().map(BlockRef::len_bytes).sum::<u64>();
        let (all_blocks, all_bytes) = (waiting.len() as u64, bytes(&waiting));
        let mut saved = Saved::default();
        saved.why = self.save_most(&mut waiting, until, &mut saved).await;
        saved.left_blocks = all_blocks - saved.kept_blocks;
        saved.left_bytes = all_bytes - saved.kept_bytes;
        if saved.left_blocks == 0 {
            saved.why = None;
        }
        saved
    }

    /// Takes blocks from the front of `waiting`; why it ended.
    async fn save_most(
        self: &Arc<Self>,
        waiting: &mut Vec<BlockRef>,
        until: Tick,
        saved: &mut Saved,
    ) -> Option<Reason> {
        let Some(nvme) = self.tiers.nvme.clone() else {
            return Some(Reason::TierDown);
        };
        let most_bytes = nvme.status().capacity_bytes / 4 * 3;
        waiting.reverse(); // taken from the end
        let mut why = None;
        while !waiting.is_empty() {
            let left = until.since(self.clock.now());
            if left.is_zero() {
                return Some(Reason::Deadline);
            }
            let mut batch: Vec<BlockRef> = Vec::new();
            let mut bytes = 0;
            while let Some(next) = waiting.last()
                && (batch.is_empty() || bytes + next.len_bytes() <= DEMOTE_BATCH_BYTES)
            {
                bytes += next.len_bytes();
                batch.extend(waiting.pop());
            }
            if saved.kept_bytes + bytes > most_bytes {
                return Some(Reason::TierFull);
            }
            let outcomes = tokio::select! {
                outcomes = self.write_down(&nvme, batch.clone()) => outcomes,
                () = self.clock.sleep(left) => return Some(Reason::Deadline),
            };
            let mut full = Vec::new();
            let mut held = false;
            for (block, outcome) in batch.into_iter().zip(outcomes) {
                match outcome {
                    WriteOutcome::Stored | WriteOutcome::Synced => {
                        held = true;
                        saved.kept_blocks += 1;
                        saved.kept_bytes += block.len_bytes();
                    }
                    WriteOutcome::Rejected {
                        reason: Reason::QueueFull,
                        ..
                    } => full.push(block),
                    WriteOutcome::Rejected { reason, .. } => why = Some(reason),
                }
            }
            if matches!(why, Some(Reason::Wear | Reason::TierDown | Reason::Device)) {
                return why;
            }
            if !full.is_empty() && !held {
                self.clock.sleep(FULL_PAUSE.min(left)).await;
            }
            waiting.extend(full.into_iter().rev());
        }
        why
    }
}
