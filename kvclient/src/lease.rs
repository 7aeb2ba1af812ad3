//! A lease: what a lookup has promised, held for a while and given back.
//!
//! ```text
//! lookup ─► Lease ─┬─ release().await   given back now, and the node says so
//!                  ├─ renew(ttl).await  held longer
//!                  └─ drop              given back in the background, through a bounded queue
//! ```
//!
//! In a cluster each owner of the blocks holds its part, and all go by one id: renewing and giving back are asked of all
//! of them at once, and a lease that one of them has lost is gone.
//!
//! Units: milliseconds, bytes, blocks.
//! Errors: a lease that is gone is an answer (`false`), not an error.
//! Why dropping may lose one: the queue has a bound ([`MAX_RELEASES`]) and no wait; a lease that finds
//! it full ends by its own time.

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use kvproto::{BootId, LeaseId, convert::answer, key::RunHash, v1};
use tokio::sync::mpsc;

use crate::{
    call::{Deadline, Inner},
    error::Error,
    fleet::Roster,
    local,
};

/// Releases waiting in the background.
pub const MAX_RELEASES: usize = 1024;

/// How long a release in the background may take; the lease ends by itself soon after.
const RELEASE_DEADLINE: Duration = Duration::from_secs(1);

/// One node's part of a lease.
#[derive(Clone)]
pub(crate) struct Holder {
    pub(crate) inner: Arc<Inner>,
    /// Its id there.
    pub(crate) id: LeaseId,
    pub(crate) boot: BootId,
}

impl Holder {
    /// False when the node has been restarted since.
    fn is_current(&self) -> bool {
        self.inner.boot.load(Ordering::Relaxed) == self.boot.0
    }

    async fn renew(&self, ttl_ms: u32, deadline: Deadline) -> Result<Option<u32>, Error> {
        let lease_id = self.id.0;
        let answer: v1::RenewResponse =
            local::unary(&self.inner, deadline, |context| v1::RenewRequest {
                context: Some(context),
                lease_id,
                ttl_ms,
            })
            .await?;
        self.inner.heard(answer.context.as_ref());
        Ok(answer.renewed.then_some(answer.ttl_ms))
    }
}

/// A pin on the leading blocks of one chain, released when dropped. In a cluster it is held at all owners of those
/// blocks, under one id.
#[must_use = "a dropped lease is released"]
pub struct Lease {
    first: Holder,
    others: Vec<Holder>,
    /// Whose blocks lie where, by the view that it was taken by; `None`: all with the first.
    roster: Option<Arc<Roster>>,
    /// Runs that another member than their owner holds.
    stand_ins: Vec<(RunHash, usize)>,
    deadline: Duration,
    ttl: Duration,
    blocks: u32,
    bytes: u64,
    held: bool,
    /// Somebody else's: only its id is known.
    is_borrowed: bool,
}

impl Lease {
    /// One node's.
    pub(crate) fn new(
        inner: &Arc<Inner>,
        deadline: Duration,
        boot: BootId,
        lease: answer::Lease,
    ) -> Self {
        let first = Holder {
            inner: inner.clone(),
            id: lease.id,
            boot,
        };
        Self::held(first, Vec::new(), None, deadline, lease)
    }

    /// That of several owners, on terms that hold for all of them. `None` when nobody holds anything.
    pub(crate) fn shared(
        roster: &Arc<Roster>,
        deadline: Duration,
        holders: Vec<Holder>,
        stand_ins: Vec<(RunHash, usize)>,
        terms: answer::Lease,
    ) -> Option<Self> {
        let mut holders = holders.into_iter();
        let first = holders.next()?;
        let roster = Some(roster.clone());
        let mut lease = Self::held(first, holders.collect(), roster, deadline, terms);
        lease.stand_ins = stand_ins;
        Some(lease)
    }

    fn held(
        first: Holder,
        others: Vec<Holder>,
        roster: Option<Arc<Roster>>,
        deadline: Duration,
        terms: answer::Lease,
    ) -> Self {
        Self {
            first,
            others,
            roster,
            stand_ins: Vec::new(),
            deadline,
            ttl: Duration::from_millis(terms.ttl_ms.into()),
            blocks: terms.blocks,
            bytes: terms.bytes,
            held: true,
            is_borrowed: false,
        }
    }

    /// A lease that another client of the same owner looks after: good for gets, and not given back when dropped.
    /// Its blocks, bytes and time are with whoever took it. Any of `inners` may hold a part of it.
    pub(crate) fn of_owner(inners: Vec<Arc<Inner>>, deadline: Duration, id: LeaseId) -> Self {
        let mut holders = inners.into_iter().map(|inner| Holder {
            boot: BootId(inner.boot.load(Ordering::Relaxed)),
            inner,
            id,
        });
        Self {
            first: holders.next().expect("a client has a node"),
            others: holders.collect(),
            roster: None,
            stand_ins: Vec::new(),
            deadline,
            ttl: Duration::ZERO,
            blocks: 0,
            bytes: 0,
            held: false,
            is_borrowed: true,
        }
    }

    /// Its id, the same at all nodes that hold it.
    #[must_use]
    pub fn id(&self) -> LeaseId {
        self.first.id
    }

    /// Whose blocks lie where, if it was taken of several.
    pub(crate) fn roster(&self) -> Option<&Arc<Roster>> {
        self.roster.as_ref()
    }

    /// The member that holds a run in place of its owner.
    pub(crate) fn stand_in(&self, run: &RunHash) -> Option<usize> {
        let mut stand_ins = self.stand_ins.iter();
        let found = stand_ins.find(|(of, _)| of == run)?;
        Some(found.1)
    }

    /// Only its id is known; where its blocks are, the view says.
    pub(crate) fn is_borrowed(&self) -> bool {
        self.is_borrowed
    }

    /// Its id at a node; `None`: nothing is held there.
    pub(crate) fn id_at(&self, inner: &Arc<Inner>) -> Option<LeaseId> {
        if self.is_borrowed {
            return Some(self.first.id);
        }
        let mut holders = self.holders();
        let holder = holders.find(|holder| holder.inner.endpoint == inner.endpoint)?;
        Some(holder.id)
    }

    /// The member that alone holds it, for a lease that was taken when there was one node.
    pub(crate) fn only_holder(&self, roster: &Roster) -> Option<usize> {
        let is_of_one = self.roster.is_none() && !self.is_borrowed;
        is_of_one
            .then(|| roster.at(&self.first.inner.endpoint))
            .flatten()
    }

    fn holders(&self) -> impl Iterator<Item = &Holder> {
        std::iter::once(&self.first).chain(&self.others)
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

    /// False when a node that holds it has been restarted since: the lease is void, look up again.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.holders().all(Holder::is_current)
    }

    /// Holds it for `ttl` from now on (zero: the node's default). False: it is gone, or gone with one of the nodes that
    /// held it; look up again.
    ///
    /// # Errors
    /// When no node answers.
    pub async fn renew(&mut self, ttl: Duration) -> Result<bool, Error> {
        self.renew_by(ttl, self.until()).await
    }

    fn until(&self) -> Deadline {
        Deadline::after(&*self.first.inner.clock, self.deadline)
    }

    pub(crate) async fn renew_by(
        &mut self,
        ttl: Duration,
        deadline: Deadline,
    ) -> Result<bool, Error> {
        let ttl_ms = millis(ttl);
        let renewed = if self.others.is_empty() {
            self.first.renew(ttl_ms, deadline).await?
        } else {
            let calls = self.holders().map(|holder| holder.renew(ttl_ms, deadline));
            let answers = join_all(calls).await;
            if answers.iter().all(Result::is_err) {
                answers.into_iter().next().transpose()?.flatten()
            } else if self.is_borrowed {
                // Most nodes hold no part of it.
                answers.into_iter().filter_map(|a| a.ok().flatten()).min()
            } else {
                let of_each = answers.into_iter().map(|answer| answer.ok().flatten());
                let all: Option<Vec<u32>> = of_each.collect();
                all.and_then(|all| all.into_iter().min())
            }
        };
        match renewed {
            Some(ttl_ms) => self.ttl = Duration::from_millis(ttl_ms.into()),
            None => {
                // What single owners still hold is of no use.
                if self.held && !self.others.is_empty() {
                    self.holders()
                        .for_each(|holder| holder.inner.let_go(holder.id));
                }
                self.held = false;
            }
        }
        Ok(renewed.is_some())
    }

    /// Gives it back. False: it was gone already, at one of its nodes at least.
    ///
    /// # Errors
    /// When a node does not answer; the lease then ends there by its own time.
    pub async fn release(self) -> Result<bool, Error> {
        let deadline = self.until();
        self.release_by(deadline).await
    }

    pub(crate) async fn release_by(mut self, deadline: Deadline) -> Result<bool, Error> {
        self.held = false;
        if self.others.is_empty() {
            return release(&self.first.inner, deadline, self.first.id).await;
        }
        let calls = self.holders();
        let calls = calls.map(|holder| release(&holder.inner, deadline, holder.id));
        let answers: Result<Vec<bool>, Error> = join_all(calls).await.into_iter().collect();
        let mut released = answers?.into_iter();
        Ok(match self.is_borrowed {
            true => released.any(|released| released),
            false => released.all(|released| released),
        })
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease")
            .field("id", &self.first.id)
            .field("nodes", &(1 + self.others.len()))
            .field("blocks", &self.blocks)
            .field("bytes", &self.bytes)
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.held {
            // A node that has been restarted since holds nothing.
            for holder in self.holders().filter(|holder| holder.is_current()) {
                holder.inner.let_go(holder.id);
            }
        }
    }
}

/// Whole milliseconds of a time to live, as the wire has them.
pub(crate) fn millis(ttl: Duration) -> u32 {
    u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX)
}

async fn release(inner: &Inner, deadline: Deadline, id: LeaseId) -> Result<bool, Error> {
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
        let deadline = Deadline::after(&*inner.clock, RELEASE_DEADLINE);
        if let Err(error) = release(&inner, deadline, id).await {
            tracing::debug!(lease = ?id, %error, "release failed; the lease ends by its time");
        }
    }
}
