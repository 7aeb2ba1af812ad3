//! A moment of the cluster as its readers see it: the view, who owns what, and who did until lately.
//!
//! ```text
//! past     ── oldest ── … ── before the last change ──┐
//! view     ───────────────────────────────────────────┴── now     owners(run)
//!            └──── candidates(run): whom to ask for what has not moved yet ────┘
//! ```
//!
//! A roster never changes; a change makes another one. Shape: shared by `Arc`, read without a lock.
//! Units: [`Tick`]. Errors: none; no owner is an empty answer.

use std::{sync::Arc, time::Duration};

use kvproto::{
    Member, MemberId, MemberState, View, ViewDigest, key::RunHash, placement::Placement,
};

use crate::clock::Tick;

/// Most members that a read in motion asks.
pub const MOST_CANDIDATES: usize = 4;

/// Who is here, at one moment.
#[derive(Clone, Debug)]
pub struct Roster {
    /// Every member, tombstones included.
    pub view: View,
    /// Its digest.
    pub digest: ViewDigest,
    /// Who owns what in it.
    pub placement: Arc<Placement>,
    /// When the digest last changed.
    pub changed: Tick,
    /// How long a change is young.
    pub(super) window: Duration,
    /// When each recent change was, and who owned what before it; newest first.
    pub(super) past: Vec<(Tick, Arc<Placement>)>,
    pub(super) me: MemberId,
}

impl Roster {
    /// Whether `me` is among the `replicas` owners of `run`.
    #[must_use]
    pub fn owns(&self, me: &MemberId, run: &RunHash, replicas: usize) -> bool {
        match replicas {
            1 => self.placement.first(run) == Some(me),
            _ => self.placement.owners(run, replicas).contains(&me),
        }
    }

    /// The owners of `run`, the first one first; at most `replicas`.
    #[must_use]
    pub fn owners(&self, run: &RunHash, replicas: usize) -> Vec<&Member> {
        let owners = self.placement.owners(run, replicas).into_iter();
        owners.filter_map(|id| self.view.get(id)).collect()
    }

    /// Whom to ask for `run` on a miss while a change is young: its owners under recent views, newest first and those
    /// just departed included, then the next in rendezvous order. Never this node, each member once, at most
    /// [`MOST_CANDIDATES`]; nobody when no change is young.
    #[must_use]
    pub fn candidates(&self, run: &RunHash, now: Tick) -> Vec<Member> {
        let mut found: Vec<Member> = Vec::new();
        if !self.is_young(now) {
            return found;
        }
        let before = self.recent(now).filter_map(|(_, past)| past.first(run));
        for id in before.chain(self.placement.ranked(run)) {
            let is_new = *id != self.me && found.iter().all(|known| known.id != *id);
            // Where it is now, and not where it was then.
            if let Some(member) = self.view.get(id).filter(|_| is_new) {
                found.push(member.clone());
            }
            if found.len() == MOST_CANDIDATES {
                break;
            }
        }
        found
    }

    /// Who owned `run` under recent views, newest first, each once.
    #[must_use]
    pub fn former(&self, run: &RunHash, now: Tick) -> Vec<MemberId> {
        let mut found: Vec<MemberId> = Vec::new();
        for id in self.recent(now).filter_map(|(_, past)| past.first(run)) {
            if !found.contains(id) {
                found.push(id.clone());
            }
        }
        found
    }

    /// Who owned what before the oldest change that is young.
    #[must_use]
    pub fn before(&self, now: Tick) -> Option<Arc<Placement>> {
        let oldest = self.recent(now).last();
        oldest.map(|(_, placement)| Arc::clone(placement))
    }

    /// Whether runs may still lie with those who owned them before a change.
    #[must_use]
    pub fn is_young(&self, now: Tick) -> bool {
        self.recent(now).next().is_some()
    }

    /// Until when a change is young; the beginning of time when none has been.
    #[must_use]
    pub fn young_until(&self) -> Tick {
        self.past
            .first()
            .map_or(Tick::default(), |(changed, _)| changed.after(self.window))
    }

    /// Members that are not gone, in the order of their ids.
    pub fn present(&self) -> impl Iterator<Item = &Member> {
        let is_present = |member: &&Member| member.state != MemberState::Gone;
        self.view.members().iter().filter(is_present)
    }

    fn recent(&self, now: Tick) -> impl Iterator<Item = &(Tick, Arc<Placement>)> {
        self.past
            .iter()
            .filter(move |(changed, _)| now.since(*changed) < self.window)
    }
}
