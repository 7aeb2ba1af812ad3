//! What readers without a lease keep in its place while they read it where it lies.
//!
//! ```text
//! get without a lease ─► blocks, and a Hold of their bytes ─► read ─► dropped: the budget has them back
//! ```
//!
//! The blocks themselves are kept by their [`BlockRef`](crate::tier::BlockRef)s; this is the account: it draws on the
//! owner's lease budget and on the node's, so that readers cannot pin more without leases than with them.
//! Units: bytes of slots. Errors: none; a budget that does not reach is `false`.

use std::sync::{Arc, atomic::Ordering};

use super::{Engine, Owner, budget::slot_bytes};

/// Bytes that an owner holds without a lease; dropping it gives them back.
pub struct Hold {
    engine: Arc<Engine>,
    owner: Owner,
    bytes: u64,
}

impl Engine {
    /// An account of nothing yet.
    #[must_use]
    pub fn hold(self: &Arc<Self>, owner: Owner) -> Hold {
        Hold {
            engine: Arc::clone(self),
            owner,
            bytes: 0,
        }
    }

    /// Bytes that readers hold without a lease.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes.load(Ordering::Relaxed)
    }
}

impl Hold {
    /// Takes one more block in; false when the owner's budget or the node's does not reach.
    pub fn take(&mut self, length_bytes: u64) -> bool {
        let engine = &self.engine;
        let bytes = slot_bytes(length_bytes);
        let pinned = engine.pinned_bytes.load(Ordering::Relaxed);
        let fits = |held: u64| {
            let all = held + bytes;
            (pinned + all <= engine.config.lease_bytes_total).then_some(all)
        };
        let (order, held) = (Ordering::Relaxed, &engine.held_bytes);
        if held.fetch_update(order, order, fits).is_err() {
            return false;
        }
        if !engine.leases.lock().hold(self.owner, bytes) {
            held.fetch_sub(bytes, order);
            return false;
        }
        self.bytes += bytes;
        true
    }

    /// Bytes of slots in it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.engine.leases.lock().let_go(&self.owner, self.bytes);
            self.engine
                .held_bytes
                .fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold")
            .field("owner", &self.owner)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}
