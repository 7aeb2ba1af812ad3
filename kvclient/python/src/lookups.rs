//! Lookups that were asked, and what was answered: one per request, until the request is forgotten.
//!
//! ```text
//! ask ─► (new) Asked ──answer──► Answered{blocks, lease} ──forget──► gone, lease given back
//!                └──too late──► Answered{0}       the late answer finds another ticket, and gives its lease back
//! ```
//!
//! Units: blocks; a moment is a [`Tick`].
//! Errors: none; a table that is full answers 0.
//! Why a table: an engine asks again at every step until it has an answer, and again for every request that waits for
//! memory. Asking the node each time would multiply leases; answering otherwise the second time would confuse the engine.
//!
//! Nothing here waits or talks to anybody; the lease is whatever type the caller brings.

use std::{collections::HashMap, time::Duration};

use kvclient::clock::Tick;

use crate::{hashes::EngineHashes, misses::Misses};

/// Most bytes of hashes kept, all requests together.
pub const MAX_TABLE_BYTES: usize = 64 << 20;

/// Names one asking of one request; an answer for another is late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// What asking came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Ask {
    /// This many blocks may be loaded.
    Known(usize),
    /// On its way.
    Pending,
    /// Not known: the caller asks the node, and answers under this ticket.
    New(Ticket),
    /// No room for another.
    Full,
}

/// A lease under which blocks may be fetched.
#[derive(Debug)]
struct Held<L> {
    id: u64,
    /// `None` while it is being renewed.
    lease: Option<L>,
    renew_at: Tick,
}

#[derive(Debug)]
enum State<L> {
    Asked {
        since: Tick,
    },
    Answered {
        blocks: usize,
        held: Option<Held<L>>,
        at: Tick,
        /// The miss list when `blocks` was last compared with it.
        epoch: u64,
    },
}

#[derive(Debug)]
struct Entry<L> {
    ticket: Ticket,
    first: usize,
    hashes: EngineHashes,
    state: State<L>,
}

/// All lookups of one cache.
#[derive(Debug)]
pub struct Lookups<L> {
    entries: HashMap<String, Entry<L>>,
    bytes: usize,
    tickets: u64,
    max: usize,
    patience: Duration,
    late: u64,
}

impl<L> Lookups<L> {
    /// An empty table of at most `max` requests, whose answers may take `patience`.
    #[must_use]
    pub fn new(max: usize, patience: Duration) -> Self {
        Self {
            entries: HashMap::new(),
            bytes: 0,
            tickets: 0,
            max,
            patience,
            late: 0,
        }
    }

    /// Requests in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Lookups that were not answered in time.
    #[must_use]
    pub fn late(&self) -> u64 {
        self.late
    }

    /// What is known of `request` from block `first` on. `hashes` is called only if it must be asked.
    pub fn ask(
        &mut self,
        request: &str,
        first: usize,
        now: Tick,
        misses: &mut Misses,
        hashes: impl FnOnce() -> EngineHashes,
    ) -> Ask {
        if let Some(entry) = self.entries.get_mut(request) {
            match &mut entry.state {
                State::Asked { since } if now.since(*since) < self.patience => return Ask::Pending,
                State::Asked { .. } => {
                    self.late += 1;
                    entry.state = State::Answered {
                        blocks: 0,
                        held: None,
                        at: now,
                        epoch: misses.epoch(),
                    };
                    return Ask::Known(0);
                }
                // What was asked for begins later than what is wanted now: ask anew.
                State::Answered { .. } if first < entry.first => {}
                State::Answered { blocks, epoch, .. } => {
                    if *epoch != misses.epoch() {
                        let from = entry.first;
                        let known = (from..from + *blocks).map(|i| entry.hashes.get(i));
                        *blocks = misses.before(known, now);
                        *epoch = misses.epoch();
                    }
                    return Ask::Known((entry.first + *blocks).saturating_sub(first));
                }
            }
            self.forget(request);
        }
        let hashes = hashes();
        if self.entries.len() >= self.max || self.bytes + hashes.bytes() > MAX_TABLE_BYTES {
            self.make_room();
        }
        if self.entries.len() >= self.max || self.bytes + hashes.bytes() > MAX_TABLE_BYTES {
            return Ask::Full;
        }
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.bytes += hashes.bytes();
        let entry = Entry {
            ticket,
            first,
            hashes,
            state: State::Asked { since: now },
        };
        self.entries.insert(request.to_owned(), entry);
        Ask::New(ticket)
    }

    /// The node's answer: `blocks` from `first` on, under `lease`. Hands the lease back when nobody waits for it.
    ///
    /// # Errors
    /// The lease, of an answer that came too late.
    pub fn answer(
        &mut self,
        request: &str,
        ticket: Ticket,
        blocks: usize,
        lease: Option<(u64, L)>,
        now: Tick,
        renew_at: Tick,
    ) -> Result<(), Option<L>> {
        let entry = self.entries.get_mut(request);
        match entry {
            Some(entry) if entry.ticket == ticket && matches!(entry.state, State::Asked { .. }) => {
                entry.state = State::Answered {
                    blocks: blocks.min(entry.hashes.len() - entry.first),
                    held: lease.map(|(id, lease)| Held {
                        id,
                        lease: Some(lease),
                        renew_at,
                    }),
                    at: now,
                    // Compared with the miss list when it is first handed out.
                    epoch: u64::MAX,
                };
                Ok(())
            }
            _ => Err(lease.map(|(_, lease)| lease)),
        }
    }

    /// The id of the lease of `request`; 0: none.
    #[must_use]
    pub fn lease(&self, request: &str) -> u64 {
        match self.entries.get(request).map(|entry| &entry.state) {
            Some(State::Answered {
                held: Some(held), ..
            }) => held.id,
            _ => 0,
        }
    }

    /// True while `request` has no answer.
    #[must_use]
    pub fn is_pending(&self, request: &str) -> bool {
        let state = self.entries.get(request).map(|entry| &entry.state);
        matches!(state, Some(State::Asked { .. }))
    }

    /// Forgets every request; their leases.
    pub fn clear(&mut self) -> Vec<L> {
        let requests: Vec<String> = self.entries.keys().cloned().collect();
        requests
            .iter()
            .filter_map(|request| self.forget(request))
            .collect()
    }

    /// Forgets `request`; its lease, if it is at home.
    pub fn forget(&mut self, request: &str) -> Option<L> {
        let entry = self.entries.remove(request)?;
        self.bytes -= entry.hashes.bytes();
        match entry.state {
            State::Answered {
                held: Some(held), ..
            } => held.lease,
            _ => None,
        }
    }

    /// Takes the leases to be renewed now. Each comes back by [`Lookups::renewed`]. Those whose request was answered
    /// longer than `keep` ago are given up instead: their requests are forgotten, and would be asked anew.
    pub fn due(&mut self, now: Tick, keep: Duration) -> (Vec<(String, Ticket, L)>, Vec<L>) {
        let (mut due, mut old, mut given_up) = (Vec::new(), Vec::new(), Vec::new());
        for (request, entry) in &mut self.entries {
            let State::Answered {
                held: Some(held),
                at,
                ..
            } = &mut entry.state
            else {
                continue;
            };
            if held.renew_at > now {
                continue;
            }
            if now.since(*at) >= keep {
                old.push(request.clone());
            } else if let Some(lease) = held.lease.take() {
                due.push((request.clone(), entry.ticket, lease));
            }
        }
        for request in old {
            given_up.extend(self.forget(&request));
        }
        (due, given_up)
    }

    /// A lease that was renewed (`Some`) or is gone. A request whose lease is gone is forgotten, so that asking again asks the
    /// node again. Hands the lease back when nobody wants it any more.
    ///
    /// # Errors
    /// The lease, of a request that was forgotten meanwhile.
    pub fn renewed(
        &mut self,
        request: &str,
        ticket: Ticket,
        lease: Option<L>,
        renew_at: Tick,
    ) -> Result<(), Option<L>> {
        let Some(entry) = self.entries.get_mut(request).filter(|e| e.ticket == ticket) else {
            return Err(lease);
        };
        match (&mut entry.state, lease) {
            (
                State::Answered {
                    held: Some(held), ..
                },
                Some(lease),
            ) => {
                held.lease = Some(lease);
                held.renew_at = renew_at;
                Ok(())
            }
            (_, None) => {
                self.forget(request);
                Ok(())
            }
            (_, lease) => Err(lease),
        }
    }

    /// Leases held.
    #[must_use]
    pub fn leases(&self) -> usize {
        let held = |entry: &&Entry<L>| matches!(entry.state, State::Answered { held: Some(_), .. });
        self.entries.values().filter(held).count()
    }

    /// Forgets answers that hold no lease, oldest first, half of them: what an engine forgot to forget.
    fn make_room(&mut self) {
        let mut idle: Vec<(Tick, String)> = self
            .entries
            .iter()
            .filter_map(|(request, entry)| match &entry.state {
                State::Answered { held: None, at, .. } => Some((*at, request.clone())),
                _ => None,
            })
            .collect();
        idle.sort_unstable();
        let half = idle.len().div_ceil(2);
        for (_, request) in idle.into_iter().take(half) {
            self.forget(&request);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    struct Table {
        lookups: Lookups<&'static str>,
        misses: Misses,
    }

    impl Table {
        fn new(max: usize) -> Self {
            Self {
                lookups: Lookups::new(max, 200 * MS),
                misses: Misses::new(1000 * MS),
            }
        }

        fn ask(&mut self, request: &str, first: usize, now: u32) -> Ask {
            let hashes = || EngineHashes::new(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 1).unwrap();
            self.lookups
                .ask(request, first, at(now), &mut self.misses, hashes)
        }

        fn ticket(&mut self, request: &str, first: usize, now: u32) -> Ticket {
            match self.ask(request, first, now) {
                Ask::New(ticket) => ticket,
                other => panic!("{other:?}"),
            }
        }

        /// The node has 5 blocks, and renews their lease from 10 ms on.
        fn answer(
            &mut self,
            request: &str,
            ticket: Ticket,
            lease: Option<(u64, &'static str)>,
            now: u32,
        ) {
            let answered = self
                .lookups
                .answer(request, ticket, 5, lease, at(now), at(10));
            answered.expect("it is waited for");
        }
    }

    fn at(ms: u32) -> Tick {
        Tick(MS * ms)
    }

    #[test]
    fn an_answer_stays_until_it_is_forgotten() {
        let mut table = Table::new(8);
        let ticket = table.ticket("r", 2, 0);
        assert_eq!(table.ask("r", 2, 1), Ask::Pending);
        table.answer("r", ticket, Some((7, "lease")), 2);
        assert_eq!(table.ask("r", 2, 3), Ask::Known(5));
        assert_eq!(table.ask("r", 4, 3), Ask::Known(3));
        assert_eq!(table.ask("r", 9, 3), Ask::Known(0));
        assert_eq!(table.lookups.lease("r"), 7);
        assert_eq!(table.lookups.forget("r"), Some("lease"));
        assert_eq!(table.lookups.lease("r"), 0);
        assert!(matches!(table.ask("r", 2, 4), Ask::New(_)));
    }

    #[test]
    fn a_late_answer_is_none_and_its_lease_comes_back() {
        let mut table = Table::new(8);
        let ticket = table.ticket("r", 0, 0);
        assert_eq!(table.ask("r", 0, 200), Ask::Known(0));
        let late = table
            .lookups
            .answer("r", ticket, 5, Some((7, "lease")), at(201), at(9));
        assert_eq!(late, Err(Some("lease")));
        assert_eq!(
            (table.ask("r", 0, 202), table.lookups.late()),
            (Ask::Known(0), 1)
        );
    }

    #[test]
    fn an_answer_for_a_request_that_was_forgotten_and_asked_again_is_not_its() {
        let mut table = Table::new(8);
        let old = table.ticket("r", 0, 0);
        table.lookups.forget("r");
        let new = table.ticket("r", 0, 1);
        assert_eq!(
            table
                .lookups
                .answer("r", old, 5, Some((1, "old")), at(2), at(9)),
            Err(Some("old"))
        );
        table
            .lookups
            .answer("r", new, 3, Some((2, "new")), at(2), at(9))
            .unwrap();
        assert_eq!(
            (table.ask("r", 0, 3), table.lookups.lease("r")),
            (Ask::Known(3), 2)
        );
    }

    #[test]
    fn a_miss_cuts_answers_already_given() {
        let mut table = Table::new(8);
        let ticket = table.ticket("r", 2, 0);
        table.answer("r", ticket, None, 2);
        assert_eq!(table.ask("r", 2, 3), Ask::Known(5));
        table.misses.add(&[4], at(3));
        assert_eq!(table.ask("r", 2, 4), Ask::Known(2));
    }

    #[test]
    fn wanting_more_than_was_asked_asks_again() {
        let mut table = Table::new(8);
        let ticket = table.ticket("r", 5, 0);
        table.answer("r", ticket, None, 1);
        assert!(matches!(table.ask("r", 3, 2), Ask::New(_)));
    }

    #[test]
    fn a_full_table_forgets_answers_without_a_lease_and_else_says_no() {
        let mut table = Table::new(2);
        let (a, b) = (table.ticket("a", 0, 0), table.ticket("b", 0, 0));
        assert_eq!(table.ask("c", 0, 1), Ask::Full);
        table.answer("a", a, Some((1, "a")), 1);
        table.lookups.answer("b", b, 0, None, at(1), at(9)).unwrap();
        assert!(matches!(table.ask("c", 0, 2), Ask::New(_)));
        assert_eq!(table.lookups.lease("a"), 1);
        assert_eq!((table.lookups.len(), table.lookups.leases()), (2, 1));
    }

    #[test]
    fn leases_are_renewed_when_due_and_given_up_when_old() {
        let mut table = Table::new(8);
        let ticket = table.ticket("r", 0, 0);
        table.answer("r", ticket, Some((1, "one")), 0);
        let keep = 100 * MS;
        assert!(table.lookups.due(at(9), keep).0.is_empty());
        let (due, _) = table.lookups.due(at(10), keep);
        assert_eq!(due, [("r".to_owned(), ticket, "one")]);
        // Away for renewal: not due twice, and its id is still known.
        assert!(table.lookups.due(at(11), keep).0.is_empty());
        assert_eq!(table.lookups.lease("r"), 1);
        table
            .lookups
            .renewed("r", ticket, Some("one"), at(20))
            .unwrap();
        assert_eq!(table.lookups.due(at(100), keep), (vec![], vec!["one"]));
        assert!(table.lookups.is_empty());
    }

    #[test]
    fn a_lease_that_is_gone_lets_the_request_ask_again() {
        let mut table = Table::new(8);
        let ticket = table.ticket("r", 0, 0);
        table.answer("r", ticket, Some((1, "one")), 0);
        table.lookups.due(at(10), 100 * MS);
        table.lookups.renewed("r", ticket, None, at(20)).unwrap();
        assert!(matches!(table.ask("r", 0, 11), Ask::New(_)));
        // Forgotten while it was away.
        assert_eq!(
            table.lookups.renewed("gone", ticket, Some("two"), at(20)),
            Err(Some("two"))
        );
    }
}
