//! A lease: what a lookup has promised, held for a while and given back.
//!
//! ```text
//! lookup ─► Lease ─┬─ release().await   given back now, and the node says so
//!                  ├─ renew(ttl).await  held longer
//!                  └─ drop              given back in the background, through a bounded queue
//! ```
//!
//! Units: milliseconds, bytes, blocks.
//! Errors: a lease that is gone is an answer (`false`), not an error.
//! Why dropping may lose one: the queue has a bound ([`MAX_RELEASES`]) and no wait; a lease that finds
//! it full ends by its own time.

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use kvproto::{BootId, LeaseId, convert::answer, v1};
use tokio::sync::mpsc;

use crate::{
    call::{Deadline, Inner},
    error::Error,
    local,
};

/// Releases waiting in the background.
pub const MAX_RELEASES: usize = 1024;

/// How long a release in the background may take; the lease ends by itself soon after.
const RELEASE_DEADLINE: Duration = Duration::from_secs(1);

/// A pin on the leading blocks of one chain, released when dropped.
#[must_use = "a dropped lease is released"]
pub struct Lease {
    inner: Arc<Inner>,
    deadline: Duration,
    id: LeaseId,
    boot: BootId,
    ttl: Duration,
    blocks: u32,
    bytes: u64,
    held: bool,
}

impl Lease {
    pub(crate) fn new(
        inner: &Arc<Inner>,
        deadline: Duration,
        boot: BootId,
        lease: answer::Lease,
    ) -> Self {
        Self {
            inner: inner.clone(),
            deadline,
            id: lease.id,
            boot,
            ttl: Duration::from_millis(lease.ttl_ms.into()),
            blocks: lease.blocks,
            bytes: lease.bytes,
            held: true,
        }
    }

    /// A lease that another client of the same owner looks after: good for gets, and not given back when dropped.
    /// Its blocks, bytes and time are with whoever took it.
    pub(crate) fn of_owner(inner: &Arc<Inner>, deadline: Duration, id: LeaseId) -> Self {
        Self {
            inner: inner.clone(),
            deadline,
            id,
            boot: BootId(inner.boot.load(Ordering::Relaxed)),
            ttl: Duration::ZERO,
            blocks: 0,
            bytes: 0,
            held: false,
        }
    }

    /// Its id at the node.
    #[must_use]
    pub fn id(&self) -> LeaseId {
        self.id
    }

    /// How long it was granted for, from its grant or last renewal on.
    #[must_use]
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Leading blocks it holds; fewer than are present when the owner's byte budget is short.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes it holds.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// False when the node has been restarted since: the lease is void, look up again.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.inner.boot.load(Ordering::Relaxed) == self.boot.0
    }

    /// Holds it for `ttl` from now on (zero: the node's default). False: it is gone, look up again.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn renew(&mut self, ttl: Duration) -> Result<bool, Error> {
        let (lease_id, ttl_ms) = (self.id.0, millis(ttl));
        let deadline = Deadline::after(&*self.inner.clock, self.deadline);
        let answer: v1::RenewResponse =
            local::unary(&self.inner, deadline, |context| v1::RenewRequest {
                context: Some(context),
                lease_id,
                ttl_ms,
            })
            .await?;
        self.inner.heard(answer.context.as_ref());
        if answer.renewed {
            self.ttl = Duration::from_millis(answer.ttl_ms.into());
        } else {
            self.held = false;
        }
        Ok(answer.renewed)
    }

    /// Gives it back. False: it was gone already.
    ///
    /// # Errors
    /// When the node does not answer; the lease then ends by its own time.
    pub async fn release(mut self) -> Result<bool, Error> {
        self.held = false;
        release(&self.inner, self.deadline, self.id).await
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease")
            .field("id", &self.id)
            .field("blocks", &self.blocks)
            .field("bytes", &self.bytes)
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.held && self.is_current() && self.inner.releases.try_send(self.id).is_err() {
            tracing::debug!(lease = ?self.id, "release queue is full; the lease ends by its time");
        }
    }
}

/// Whole milliseconds of a time to live, as the wire has them.
pub(crate) fn millis(ttl: Duration) -> u32 {
    u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX)
}

async fn release(inner: &Inner, budget: Duration, id: LeaseId) -> Result<bool, Error> {
    let deadline = Deadline::after(&*inner.clock, budget);
    let answer: v1::ReleaseResponse = local::unary(inner, deadline, |context| v1::ReleaseRequest {
        context: Some(context),
        lease_id: id.0,
    })
    .await?;
    inner.heard(answer.context.as_ref());
    Ok(answer.released)
}

/// Gives dropped leases back until the client is gone; then the node does, when the connection closes.
pub(crate) async fn release_dropped(inner: Weak<Inner>, mut dropped: mpsc::Receiver<LeaseId>) {
    while let Some(id) = dropped.recv().await {
        let Some(inner) = inner.upgrade() else {
            return;
        };
        if let Err(error) = release(&inner, RELEASE_DEADLINE, id).await {
            tracing::debug!(lease = ?id, %error, "release failed; the lease ends by its time");
        }
    }
}
