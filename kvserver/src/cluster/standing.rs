//! How a member stands with this node: well, suspect, or departed.
//!
//! ```text
//! silent ──► Suspect { since } ──`suspect_grace`──► tombstone {its generation, version + 1, Gone}
//!    ▲            │ heard again, or a later generation
//!    └── Well ◄───┘
//! ```
//!
//! Suspicion is local: it is told to nobody and moves no owner, so a node that only pauses keeps its place. A tombstone
//! is news like any other. Nodes that lose the same member write the same tombstone, and a member that finds one of
//! itself raises its version above it and lives again.
//!
//! Units: [`Tick`]. Errors: none. Why not in the view: what one node cannot hear another may hear well.

use std::{collections::BTreeMap, time::Duration};

use kvproto::{Member, MemberId};

use crate::clock::Tick;

/// How a member stands with this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is heard, or was not yet silent for long enough.
    Well,
    /// It is silent, or failed somebody. It keeps its runs until its grace is over.
    Suspect {
        /// From when on.
        since: Tick,
    },
    /// It has left, was declared lost, or was never known.
    Departed,
}

/// Those who are silent, since when, and in which of their lives.
#[derive(Clone, Debug, Default)]
pub(super) struct Suspects(BTreeMap<MemberId, Suspicion>);

#[derive(Clone, Copy, Debug)]
struct Suspicion {
    since: Tick,
    generation: u64,
}

impl Suspects {
    /// `member` is silent; an earlier moment stays. True when that is new.
    pub(super) fn add(&mut self, member: &Member, now: Tick) -> bool {
        match self.0.get(&member.id) {
            Some(known) if known.generation == member.generation => false,
            _ => {
                let suspicion = Suspicion {
                    since: now,
                    generation: member.generation,
                };
                self.0.insert(member.id.clone(), suspicion);
                true
            }
        }
    }

    /// It was heard after `at`. True when it had been suspect since an earlier moment.
    pub(super) fn clear_before(&mut self, id: &MemberId, at: Tick) -> bool {
        match self.0.get(id) {
            Some(suspicion) if suspicion.since < at => self.0.remove(id).is_some(),
            _ => false,
        }
    }

    /// It is gone, or lives another life. True when it had been suspect.
    pub(super) fn clear(&mut self, id: &MemberId) -> bool {
        self.0.remove(id).is_some()
    }

    /// Since when the member is suspect in this life of its.
    pub(super) fn since(&self, member: &Member) -> Option<Tick> {
        let suspicion = self.0.get(&member.id)?;
        (suspicion.generation == member.generation).then_some(suspicion.since)
    }

    /// Those whose grace is over.
    pub(super) fn lost(&self, grace: Duration, now: Tick) -> Vec<MemberId> {
        let lost = |(_, suspicion): &(&MemberId, &Suspicion)| now.since(suspicion.since) >= grace;
        self.0
            .iter()
            .filter(lost)
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
