//! What one node has to do, as far as this client knows: for the choice between two who have the same.
//!
//! ```text
//! answers ─ calls that the node serves ─► heard, fades ───────┐
//! calls of this client at it now ─────────────────────────────┴─► len
//! ```
//!
//! What was heard is worth less the older it is, and nothing after [`FRESH`]: with many clients, each would otherwise
//! leave a node for as long as it last looked busy, all of them together, and come back together.
//!
//! Units: calls. Errors: none.

use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::{clock::Tick, route::FRESH};

/// A node's queue.
#[derive(Debug, Default)]
pub struct Queue {
    /// Calls of this client that are under way there.
    mine: AtomicU32,
    /// What it last said, and when.
    heard: Mutex<Option<(Tick, u32)>>,
}

/// One call of this client, until dropped.
#[must_use = "the call has ended when this is dropped"]
#[derive(Debug)]
pub struct Queued<'a>(&'a Queue);

impl Queue {
    /// A call goes there.
    pub fn enter(&self) -> Queued<'_> {
        self.mine.fetch_add(1, Ordering::Relaxed);
        Queued(self)
    }

    /// The node says that it serves so many; 0: it does not say.
    pub fn heard(&self, calls: u32, now: Tick) {
        if calls > 0 {
            *self.heard.lock() = Some((now, calls));
        }
    }

    /// How many calls are there now, as far as is known.
    pub fn len(&self, now: Tick) -> u32 {
        let heard = self.heard.lock().map_or(0, |(at, calls)| {
            let left = FRESH.saturating_sub(now.since(at)).as_millis();
            let faded = u128::from(calls) * left / FRESH.as_millis();
            u32::try_from(faded).unwrap_or(calls)
        });
        heard.saturating_add(self.mine.load(Ordering::Relaxed))
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.mine.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_queue_is_what_was_heard_lately_and_what_is_under_way() {
        let at = |ms| Tick(Duration::from_millis(ms));
        let queue = Queue::default();
        let call = queue.enter();
        queue.heard(8, at(0));
        assert_eq!(queue.len(at(0)), 9);
        assert_eq!(queue.len(at(125)), 5, "half as old, half as much");
        queue.heard(0, at(249));
        assert_eq!(queue.len(at(250)), 1, "old news is none");
        drop(call);
        assert_eq!(queue.len(at(1000)), 0);
    }
}
