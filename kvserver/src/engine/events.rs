//! What happened to blocks, told to whoever listens.
//!
//! Shape: one bounded ring for all; each listener has its own place in it. Sequence numbers grow by one per event
//! since the engine was made, so a listener that fell behind knows by how much.
//! Errors: a slow listener gets `Lagged`, and holds nobody up.

use kvproto::{BlockKey, Place, Reason, TierKind};
use parking_lot::Mutex;
use tokio::sync::broadcast;

/// Whether a block came or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A tier has it now.
    Stored,
    /// A tier has it no longer.
    Removed(Reason),
}

/// One block came to a tier or left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockEvent {
    /// Number of the event since the engine was made, from 1.
    pub sequence: u64,
    /// What happened.
    pub change: Change,
    /// Which block.
    pub key: BlockKey,
    /// Where in its chain.
    pub place: Place,
    /// Its length, bytes.
    pub length_bytes: u64,
    /// Which tier.
    pub tier: TierKind,
    /// Whether any tier still has it after this.
    pub present: bool,
}

/// The ring. Locks: one, a leaf, taken under a shard's so that the events of one block keep their order.
#[derive(Debug)]
pub(super) struct Events {
    state: Mutex<(u64, broadcast::Sender<BlockEvent>)>,
}

impl Events {
    pub(super) fn new(ring: usize) -> Self {
        Self {
            state: Mutex::new((0, broadcast::Sender::new(ring))),
        }
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<BlockEvent> {
        self.state.lock().1.subscribe()
    }

    pub(super) fn send(&self, make: impl FnOnce(u64) -> BlockEvent) {
        let mut state = self.state.lock();
        state.0 += 1;
        if state.1.receiver_count() > 0 {
            let event = make(state.0);
            // Fails only when the last listener has just left.
            let _ = state.1.send(event);
        }
    }

    pub(super) fn sequence(&self) -> u64 {
        self.state.lock().0
    }
}
