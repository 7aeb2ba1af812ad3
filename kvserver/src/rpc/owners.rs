//! One gRPC connection's share in the table of owners: whom it speaks for.

use kvproto::{OwnerId, Reason};
use parking_lot::Mutex;
use tonic::Status;

use super::status;
use crate::{
    blocks::owners::Owners,
    cluster::Told,
    engine::{Owner, TenantId},
};

/// Owners that one connection may speak for.
const OWNERS_PER_CONNECTION: usize = 64;

/// One connection's share in [`Owners`].
pub(crate) struct Connection {
    /// The owner of leases that name nobody.
    itself: OwnerId,
    /// `None` once it is closed: nothing can be joined any more.
    joined: Mutex<Option<Vec<Owner>>>,
    told: Told,
}

impl Connection {
    pub(crate) fn new(itself: OwnerId) -> Self {
        Self {
            itself,
            joined: Mutex::new(Some(Vec::new())),
            told: Told::default(),
        }
    }

    /// What was said about the cluster over this connection.
    pub(crate) fn told(&self) -> &Told {
        &self.told
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
