//! Blocks that readers without a lease keep in their slots while they copy.
//!
//! ```text
//! get ─► hold (blocks, their bytes on the owner's budget, an end) ─► done | time | the connection closes
//! ```
//!
//! One table per connection. Every hold lasts equally long, so they end in the order they began.
//! Bounds: [`MAX_HOLDS`] at once; bytes by the budgets of [`Hold`].

use std::{collections::VecDeque, sync::Arc, time::Duration};

use crate::{clock::Tick, engine::Hold, telemetry::Metrics, tier::BlockRef};

/// Holds of one connection at once; a reader that never says it is done has its oldest taken away.
pub(super) const MAX_HOLDS: usize = 256;

pub(super) struct Holds {
    metrics: Arc<Metrics>,
    time: Duration,
    open: VecDeque<Open>,
    /// Never 0.
    next: u64,
}

struct Open {
    id: u64,
    end: Tick,
    _blocks: Vec<BlockRef>,
    hold: Hold,
}

impl Holds {
    pub(super) fn new(metrics: Arc<Metrics>, time: Duration) -> Self {
        Self {
            metrics,
            time,
            open: VecDeque::new(),
            next: 1,
        }
    }

    /// Keeps blocks from now on; 0 when there are none.
    pub(super) fn keep(&mut self, blocks: Vec<BlockRef>, hold: Hold, now: Tick) -> u64 {
        if blocks.is_empty() {
            return 0;
        }
        if self.open.len() >= MAX_HOLDS {
            self.metrics.local.holds_expired.inc();
            self.end_at(0);
        }
        let id = self.next;
        self.next += 1;
        self.metrics.local.holds.inc();
        self.metrics.local.held_bytes.add(signed(hold.bytes()));
        self.open.push_back(Open {
            id,
            end: now.after(self.time),
            _blocks: blocks,
            hold,
        });
        id
    }

    /// Their reader has what it wanted. Ids that are gone already are nothing to speak of.
    pub(super) fn done(&mut self, ids: &[u64]) {
        for id in ids {
            if let Ok(at) = self.open.binary_search_by_key(id, |open| open.id) {
                self.end_at(at);
            }
        }
    }

    /// Ends those whose time is up.
    pub(super) fn expire(&mut self, now: Tick) {
        while self.open.front().is_some_and(|open| open.end <= now) {
            self.metrics.local.holds_expired.inc();
            self.end_at(0);
        }
    }

    /// How long until the next one ends.
    pub(super) fn time_left(&self, now: Tick) -> Option<Duration> {
        self.open.front().map(|open| open.end.since(now))
    }

    fn end_at(&mut self, at: usize) {
        if let Some(open) = self.open.remove(at) {
            self.metrics.local.holds.dec();
            self.metrics.local.held_bytes.sub(signed(open.hold.bytes()));
        }
    }
}

impl Drop for Holds {
    fn drop(&mut self) {
        while !self.open.is_empty() {
            self.end_at(0);
        }
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
