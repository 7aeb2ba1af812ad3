//! Who holds leases over which connections.
//!
//! ```text
//! owner A ── connection 1, connection 2        last one closed ──► A's leases are released at once
//! (none)  ── connection 3 is its own owner     closed          ──► its leases are released at once
//! ```
//!
//! A lease belongs to {tenant, owner id}; without an owner id, to the connection. The count changes
//! under one lock, and the release happens under it too: an owner that comes back in that very moment
//! waits for the release and loses nothing it looked up afterwards.

use std::{collections::HashMap, sync::Arc};

use kvproto::{OwnerId, Reason};
use parking_lot::Mutex;
use tonic::Status;

use super::status;
use crate::{
    blocks::Blocks,
    engine::{Owner, TenantId},
};

/// Owners that one connection may speak for.
const OWNERS_PER_CONNECTION: usize = 64;

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

    fn join(&self, owner: Owner) {
        *self.connections.lock().entry(owner).or_insert(0) += 1;
    }

    fn leave(&self, owner: Owner) {
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

/// One connection's share in [`Owners`].
pub(crate) struct Connection {
    /// The owner of leases that name nobody.
    itself: OwnerId,
    /// `None` once it is closed: nothing can be joined any more.
    joined: Mutex<Option<Vec<Owner>>>,
}

impl Connection {
    pub(crate) fn new(itself: OwnerId) -> Self {
        Self {
            itself,
            joined: Mutex::new(Some(Vec::new())),
        }
    }

    /// The owner that a call over this connection acts for.
    pub(crate) fn owner(
        &self,
        owners: &Owners,
        tenant: TenantId,
        named: Option<OwnerId>,
    ) -> Result<Owner, Status> {
        let owner = Owner {
            tenant,
            id: named.unwrap_or(self.itself),
        };
        let mut joined = self.joined.lock();
        let Some(joined) = joined.as_mut() else {
            return Err(status::broken("the connection closed"));
        };
        if !joined.contains(&owner) {
            if joined.len() == OWNERS_PER_CONNECTION {
                let problem = format!(
                    "context.owner_id: one connection speaks for at most {OWNERS_PER_CONNECTION} owners"
                );
                return Err(status::refuse(Reason::Overloaded, problem));
            }
            owners.join(owner);
            joined.push(owner);
        }
        Ok(owner)
    }

    /// The connection is gone: releases what nobody else holds on to.
    pub(crate) fn close(&self, owners: &Owners) {
        for owner in self.joined.lock().take().into_iter().flatten() {
            owners.leave(owner);
        }
    }
}
