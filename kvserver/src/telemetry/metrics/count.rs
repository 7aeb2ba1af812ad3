//! Counting on the hot path: one atomic add each, and the account that every get keeps.
//!
//! Of every block that a get was asked for exactly one `source` is counted, so that
//! `gpu + ram + nvme + peer + miss + rejected + failed = asked` holds by construction: only a
//! [`GetTally`] can count, it counts a block at most once, and what it was never told about when it
//! is dropped (the client went away) it counts as failed. An answer that is given as a whole or not at
//! all is counted likewise: [`GetTally::hold_back`], then [`GetTally::given`], or everything has failed.

use std::sync::Arc;

use kvproto::reason::{GetOutcome, PutOutcome, Reason, TierKind};

use super::{Method, Metrics, Source};

impl Metrics {
    /// Counts one call that is over.
    pub fn call(&self, method: Method, code: &'static str, seconds: f64) {
        if code == "ok" {
            self.call_ok[method as usize].inc();
        } else {
            self.calls.with_label_values(&[method.as_str(), code]).inc();
        }
        self.call_seconds[method as usize].observe(seconds);
    }

    /// Starts the account of a get of `blocks` blocks.
    pub fn get(self: &Arc<Self>, blocks: u64) -> GetTally {
        self.get_asked.inc_by(blocks);
        GetTally {
            metrics: Arc::clone(self),
            left: blocks,
            held_back: None,
        }
    }

    /// Counts what became of one block of a put.
    pub fn put(&self, outcome: PutOutcome, reason: Option<Reason>) {
        if let Some((_, counter)) = self.put_blocks.iter().find(|(o, _)| *o == outcome) {
            counter.inc();
        }
        if let Some(reason) = reason {
            self.put_refused.with_label_values(&[reason.as_str()]).inc();
        }
    }

    /// Counts a block that has left the node.
    pub fn removed(&self, reason: Reason) {
        self.removed_blocks
            .with_label_values(&[reason.as_str()])
            .inc();
    }

    /// Counts a block that a lower tier has taken (`None`) or has not.
    pub fn moved_down(&self, tier: TierKind, refused: Option<Reason>) {
        match refused {
            None => self.mover_writes.with_label_values(&[tier.as_str()]).inc(),
            Some(reason) => self
                .mover_drops
                .with_label_values(&[tier.as_str(), reason.as_str()])
                .inc(),
        }
    }

    /// Counts a block read from a lower tier: `None` whole, else why not.
    pub fn moved_up(&self, tier: TierKind, gone: Option<Reason>, seconds: f64) {
        let result = gone.map_or("hit", Reason::as_str);
        self.mover_reads
            .with_label_values(&[tier.as_str(), result])
            .inc();
        self.mover_read_seconds.observe(seconds);
    }
}

/// The account of one get: every block is counted once, whatever happens.
#[must_use = "blocks that are not counted are counted as failed"]
pub struct GetTally {
    metrics: Arc<Metrics>,
    /// Blocks of which nothing was said yet.
    left: u64,
    /// What is counted only once the answer is given.
    held_back: Option<HeldBack>,
}

#[derive(Default)]
struct HeldBack {
    blocks: [u64; Source::ALL.len()],
    bytes: u64,
}

impl GetTally {
    /// Counts nothing before [`GetTally::given`].
    pub fn hold_back(&mut self) {
        self.held_back = Some(HeldBack::default());
    }

    /// The answer that was held back is given.
    pub fn given(mut self) {
        let Some(said) = self.held_back.take() else {
            return;
        };
        for (counter, blocks) in self.metrics.get_blocks.iter().zip(said.blocks) {
            counter.inc_by(blocks);
        }
        self.metrics.get_bytes.inc_by(said.bytes);
    }

    /// A block that was handed out.
    pub fn hit(&mut self, tier: TierKind, bytes: u64) {
        self.count(Source::of_tier(tier), bytes);
    }

    /// A block that was answered without bytes.
    pub fn gone(&mut self, outcome: GetOutcome) {
        self.count(Source::of_outcome(outcome), 0);
    }

    fn count(&mut self, source: Source, bytes: u64) {
        if self.left == 0 {
            return;
        }
        self.left -= 1;
        match &mut self.held_back {
            Some(said) => {
                said.blocks[source as usize] += 1;
                said.bytes += bytes;
            }
            None => {
                self.metrics.get_blocks[source as usize].inc();
                self.metrics.get_bytes.inc_by(bytes);
            }
        }
    }
}

impl Drop for GetTally {
    fn drop(&mut self) {
        let taken_back = self.held_back.take().unwrap_or_default();
        let failed = self.left + taken_back.blocks.iter().sum::<u64>();
        if failed > 0 {
            self.metrics.get_blocks[Source::Failed as usize].inc_by(failed);
        }
    }
}
