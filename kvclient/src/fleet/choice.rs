//! Whom one call asks for each run: its first owner, or who has it too and less to do.
//!
//! ```text
//! run ─► first owner ── little to do ──────────────────────────► first owner, and nothing else is looked at
//!            ├── a queue ────────► the next that has it too and is not silent; its queue is shorter ─► that one
//!            └── silent ─────────► the next that has it too and is not silent, whatever its queue
//!                                      └─ all are silent ─► first owner
//! ```
//!
//! Who has it too: the other owners (replicas), then its second owner for a while (many read it). Silent is who gave no
//! answer last time and no sign of life since ([`crate::retry::Breaker::is_hurt`]); connections find out by themselves
//! that it is back, so no call has to.
//!
//! Two are compared, however many copies there are: the better of two is nearly as good as the best, and never the one
//! that everybody runs to at once.
//!
//! Units: calls. Errors: none.

use std::collections::BTreeSet;

use kvproto::{Chain, key::RunHash};

use super::Roster;
use crate::{
    clock::Tick,
    route::{Split, goes_second, is_worth_leaving},
};

/// The choices of one call.
pub(crate) struct Choice<'a> {
    roster: &'a Roster,
    replicas: usize,
    now: Tick,
    /// Of first owners: whether to look for somebody else, and the queue that they have.
    left: Vec<(usize, Leaving)>,
    /// What was chosen of each two: a call does not change its mind half way.
    made: Vec<((usize, usize), usize)>,
    /// Somebody else than its first owner is asked for a run.
    strays: bool,
    /// Runs asked of who has them for a while.
    guests: BTreeSet<RunHash>,
}

/// Whether somebody else than a first owner should be looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// It is well, and has little to do.
    No,
    /// It has a queue.
    Queue(u32),
    /// It does not answer.
    Silent,
}

/// A chain split by whom to ask.
pub(crate) struct Chosen {
    pub(crate) split: Split,
    /// Somebody else than its first owner is asked for a run.
    pub(crate) strays: bool,
    /// Runs asked of who has them for a while, and is no owner of theirs.
    pub(crate) guests: BTreeSet<RunHash>,
}

impl<'a> Choice<'a> {
    pub(crate) fn new(roster: &'a Roster, replicas: usize) -> Self {
        Self {
            roster,
            replicas,
            now: roster.recipe.clock.now(),
            left: Vec::new(),
            made: Vec::new(),
            strays: false,
            guests: BTreeSet::new(),
        }
    }

    /// A chain, each run by whom to ask for it.
    pub(crate) fn split(mut self, chain: &Chain, run_blocks: u32) -> Chosen {
        let split = Split::new(chain, run_blocks, |run| self.reader(run));
        Chosen {
            split,
            strays: self.strays,
            guests: self.guests,
        }
    }

    /// Whom to ask for a run.
    pub(crate) fn reader(&mut self, run: &RunHash) -> usize {
        let first = self.roster.owner(run);
        let leaving = self.leaving(first);
        if leaving == Leaving::No {
            return first;
        }
        let others = self.roster.readers(run, self.replicas).into_iter();
        let mut others = others.filter(|other| *other != first);
        let Some(other) = others.find(|other| !self.roster.is_silent(*other)) else {
            return first;
        };
        let made = self.made.iter().find(|(of, _)| *of == (first, other));
        let chosen = match made {
            Some((_, chosen)) => *chosen,
            None => {
                let goes = match leaving {
                    Leaving::No => false,
                    Leaving::Queue(calls) => goes_second(calls, self.queue(other)),
                    Leaving::Silent => true,
                };
                let chosen = if goes { other } else { first };
                self.made.push(((first, other), chosen));
                chosen
            }
        };
        if chosen != first {
            self.strays = true;
            if !self.roster.owners(run, self.replicas).contains(&chosen) {
                self.guests.insert(*run);
            }
        }
        chosen
    }

    fn leaving(&mut self, first: usize) -> Leaving {
        if let Some((_, leaving)) = self.left.iter().find(|(of, _)| *of == first) {
            return *leaving;
        }
        let leaving = match self.roster.in_use(first) {
            None => Leaving::No, // nothing is known of it
            Some(_) if self.roster.is_silent(first) => Leaving::Silent,
            Some(_) => match self.queue(first) {
                calls if is_worth_leaving(calls) => Leaving::Queue(calls),
                _ => Leaving::No,
            },
        };
        self.left.push((first, leaving));
        leaving
    }

    fn queue(&self, member: usize) -> u32 {
        let inner = self.roster.in_use(member);
        inner.map_or(0, |inner| inner.queue.len(self.now))
    }
}
