//! Who holds leases over which connections, whichever way they came.
//!
//! ```text
//! owner A ── gRPC connection 1, same-host connection 2   last one closed ──► A's leases are released at once
//! (none)  ── connection 3 is its own owner               closed          ──► its leases are released at once
//! ```
//!
//! A lease belongs to {tenant, owner id}; without an owner id, to the connection. The count changes
//! under one lock, and the release happens under it too: an owner that comes back in that very moment
//! waits for the release and loses nothing it looked up afterwards.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use super::Blocks;
use crate::engine::Owner;

/// Connections per owner, over all connections of the node.
pub(crate) struct Owners {
    blocks: Arc<Blocks>,
    connections: Mutex<HashMap<Owner, usize>>,
}

impl Owners {
    pub(crate) fn new(blocks: Arc<Blocks>) -> Self {
        Self {
            blocks,
            connections: Mutex::new(HashMap::new()),
        }
    }

    /// One more connection speaks for this owner.
    pub(crate) fn join(&self, owner: Owner) {
        *self.connections.lock().entry(owner).or_insert(0) += 1;
    }

    /// One connection of this owner is gone.
    pub(crate) fn leave(&self, owner: Owner) {
        let mut connections = self.connections.lock();
        let Some(count) = connections.get_mut(&owner) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            connections.remove(&owner);
            self.blocks.release_owner(owner);
        }
    }
}
