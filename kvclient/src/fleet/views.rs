//! What a client knows of its cluster, by the answers of all its nodes.
//!
//! ```text
//! members, with answers ─► Known ─► version + 1 ─► another roster with the next call
//! seconds, with lookups ─► Seconds                 runs that many read, and who has them too
//! digest ─► every request: who differs answers the members that it lacks
//! ```
//!
//! Units: members, runs. Errors: none; what makes no sense is left aside.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use kvproto::{
    Member, MemberId,
    convert::{AnswerContext, answer::Second},
    key::RunHash,
    v1,
};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    clock::{Clock, Tick},
    route::{Known, Seconds, Table},
};

/// What a client knows of its cluster, by all its nodes' answers.
#[derive(Debug, Default)]
pub(crate) struct Views {
    known: Mutex<Known>,
    /// Of the view, for every request.
    digest: AtomicU64,
    /// Changes so far.
    version: AtomicU64,
    /// The same, for who waits for one.
    news: watch::Sender<u64>,
    /// A member is not where it was last heard to be, which no digest tells: the next request asks for the whole list.
    is_in_doubt: AtomicBool,
    /// Such requests so far.
    doubts: AtomicU64,
    /// More than one member was seen: from then on calls are routed.
    is_cluster: AtomicBool,
    /// Runs that many read, and who has them too.
    seconds: Mutex<Seconds>,
    /// There are some.
    names_seconds: AtomicBool,
}

impl Views {
    /// What goes with every request.
    pub(crate) fn digest(&self) -> u64 {
        if self.is_in_doubt.load(Ordering::Relaxed)
            && self.is_in_doubt.swap(false, Ordering::Relaxed)
        {
            // One that no view has: a node says the same thing over one connection only once in a while.
            let doubts = self.doubts.fetch_add(1, Ordering::Relaxed) + 1;
            return self
                .digest
                .load(Ordering::Relaxed)
                .wrapping_add(doubts)
                .max(1);
        }
        self.digest.load(Ordering::Relaxed)
    }

    /// Takes note of what an answer says of its node's view.
    pub(crate) fn heard(&self, context: &v1::ResponseContext, clock: &dyn Clock) {
        if context.members.is_empty() {
            return;
        }
        match AnswerContext::try_from(context.clone()) {
            Ok(context) => self.merge(context.members, clock.now()),
            Err(error) => tracing::debug!(%error, "members that make no sense are left aside"),
        }
    }

    /// More than one member is there.
    pub(crate) fn is_cluster(&self) -> bool {
        self.is_cluster.load(Ordering::Relaxed)
    }

    /// An owner says who else has some of its runs.
    pub(crate) fn heard_of(&self, seconds: Vec<Second>, now: Tick) {
        if seconds.is_empty() {
            return;
        }
        let mut known = self.seconds.lock();
        for Second {
            run,
            member,
            ttl_ms,
        } in seconds
        {
            let until = now.after(Duration::from_millis(ttl_ms.into()));
            known.heard(run, member, until, now);
        }
        self.names_seconds.store(true, Ordering::Relaxed);
    }

    /// Whether some run may have a second owner.
    pub(super) fn names_seconds(&self) -> bool {
        self.names_seconds.load(Ordering::Relaxed)
    }

    /// Who has a run beside its owner.
    pub(super) fn second(&self, run: &RunHash, now: Tick) -> Option<MemberId> {
        if !self.names_seconds() {
            return None;
        }
        let mut known = self.seconds.lock();
        if known.forget_all_past(now) {
            self.names_seconds.store(false, Ordering::Relaxed);
        }
        known.of(run, now).cloned()
    }

    /// Who was said to have a run beside its owner lacked what was asked of it.
    pub(super) fn shun(&self, run: &RunHash) {
        self.seconds.lock().shun(run);
    }

    /// A member is not where it was last heard to be.
    pub(super) fn doubt(&self) {
        self.is_in_doubt.store(true, Ordering::Relaxed);
    }

    /// Told of every change.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// Changes so far.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Who owns what, who did before the last change, and of which version that is.
    pub(super) fn tables(&self) -> (Arc<Table>, Option<Arc<Table>>, u64) {
        let known = self.known.lock();
        let version = self.version.load(Ordering::Acquire);
        (known.table().clone(), known.before().cloned(), version)
    }

    fn merge(&self, members: Vec<Member>, now: Tick) {
        let mut known = self.known.lock();
        if !known.merge(members, now) {
            return;
        }
        let (digest, members) = (known.digest(), known.table().members().len());
        if members > 1 {
            self.is_cluster.store(true, Ordering::Relaxed);
        }
        tracing::debug!(%digest, members, "another view of the cluster");
        self.digest.store(digest.0, Ordering::Relaxed);
        let version = self.version.fetch_add(1, Ordering::Release) + 1;
        self.news.send_replace(version);
    }
}
