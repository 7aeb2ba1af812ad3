//! Runs that lie with a second member for a while, and which of two is asked.
//!
//! ```text
//! answers to lookups ─► Seconds: run ─► member, until      forgotten by themselves; not asked again after a miss there
//! two who have a run ─► is_worth_leaving, goes_second      the shorter queue, the first owner among equals
//! ```
//!
//! A queue is what the member last said it serves, fading over [`FRESH`], and what this client asks of it just now.
//!
//! Units: calls. Errors: none. Bounds: [`MAX_SECONDS`] runs.
//! Why the first among equals: blocks are put there, so it has the newest ones, and with two readers that always agree
//! one copy stays warm.

use std::{collections::BTreeMap, time::Duration};

use kvproto::{MemberId, key::RunHash};

use crate::clock::Tick;

/// Runs that are remembered; more are read at their owners.
pub const MAX_SECONDS: usize = 4096;

/// For how long a member's word on its queue counts, less and less. After that it may have nothing to do, and is tried.
pub const FRESH: Duration = Duration::from_millis(250);

/// How many calls longer the first owner's queue must be before another is asked: the call that brings the news is in it
/// itself.
pub const WORTH: u32 = 2;

/// A later end than was told by less than this is the same word again, a network's delay later.
const SAME: Duration = Duration::from_secs(1);

/// Whether a queue is long enough to look for somebody else at all.
#[must_use]
pub fn is_worth_leaving(first: u32) -> bool {
    first >= WORTH
}

/// Whether the second of two is asked, by the lengths of their queues.
#[must_use]
pub fn goes_second(first: u32, second: u32) -> bool {
    first.checked_sub(second).is_some_and(|more| more >= WORTH)
}

#[derive(Clone, Debug)]
struct Second {
    member: MemberId,
    until: Tick,
    /// It lacked what was asked of it.
    is_shunned: bool,
}

/// Second owners, as far as this client was told.
#[derive(Clone, Debug, Default)]
pub struct Seconds {
    of: BTreeMap<RunHash, Second>,
    /// When all of it will be over.
    last: Tick,
}

impl Seconds {
    /// An owner says that `member` has the run too, until then.
    pub fn heard(&mut self, run: RunHash, member: MemberId, until: Tick, now: Tick) {
        self.last = self.last.max(until);
        if let Some(known) = self.of.get_mut(&run) {
            let is_news = known.member != member || until.since(known.until) > SAME;
            known.is_shunned &= !is_news;
            (known.member, known.until) = (member, until);
            return;
        }
        if self.of.len() >= MAX_SECONDS {
            self.of.retain(|_, known| known.until > now);
        }
        if self.of.len() < MAX_SECONDS {
            let second = Second {
                member,
                until,
                is_shunned: false,
            };
            self.of.insert(run, second);
        }
    }

    /// Who has the run beside its owner.
    #[must_use]
    pub fn of(&self, run: &RunHash, now: Tick) -> Option<&MemberId> {
        let known = self.of.get(run)?;
        (known.until > now && !known.is_shunned).then_some(&known.member)
    }

    /// It lacked what was asked of it: its owner is asked until that one says so anew.
    pub fn shun(&mut self, run: &RunHash) {
        if let Some(known) = self.of.get_mut(run) {
            known.is_shunned = true;
        }
    }

    /// Forgets everything once all of it is over; whether it is.
    pub fn forget_all_past(&mut self, now: Tick) -> bool {
        let is_over = now >= self.last;
        if is_over {
            self.of.clear();
        }
        is_over
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(ms: u64) -> Tick {
        Tick(Duration::from_millis(ms))
    }

    fn run(n: u16) -> RunHash {
        let mut hash = [0; 32];
        hash[..2].copy_from_slice(&n.to_be_bytes());
        RunHash(hash)
    }

    #[test]
    fn a_second_owner_is_known_for_as_long_as_was_told() {
        let mut seconds = Seconds::default();
        seconds.heard(run(1), "b".into(), at(5000), at(0));
        assert_eq!(seconds.of(&run(1), at(4999)), Some(&"b".into()));
        assert_eq!(seconds.of(&run(1), at(5000)), None);
        assert_eq!(seconds.of(&run(2), at(0)), None);
        assert!(!seconds.forget_all_past(at(4999)) && seconds.forget_all_past(at(5000)));
    }

    #[test]
    fn who_lacked_a_run_is_asked_again_once_its_owner_says_so_anew() {
        let mut seconds = Seconds::default();
        seconds.heard(run(1), "b".into(), at(5000), at(0));
        seconds.shun(&run(1));
        assert_eq!(seconds.of(&run(1), at(1)), None);
        // The same word, by another answer.
        seconds.heard(run(1), "b".into(), at(5020), at(100));
        assert_eq!(seconds.of(&run(1), at(101)), None);
        seconds.heard(run(1), "b".into(), at(9000), at(4000));
        assert_eq!(seconds.of(&run(1), at(4001)), Some(&"b".into()));
        seconds.shun(&run(1));
        seconds.heard(run(1), "c".into(), at(9000), at(4002));
        assert_eq!(seconds.of(&run(1), at(4003)), Some(&"c".into()));
    }

    #[test]
    fn a_full_table_drops_what_is_over_and_nothing_else() {
        let mut seconds = Seconds::default();
        (0..MAX_SECONDS as u16).for_each(|n| seconds.heard(run(n), "b".into(), at(100), at(0)));
        seconds.heard(run(9999), "b".into(), at(200), at(99));
        assert_eq!(seconds.of(&run(9999), at(99)), None);
        assert!(seconds.of(&run(0), at(99)).is_some());
        seconds.heard(run(9999), "b".into(), at(200), at(100));
        assert!(seconds.of(&run(9999), at(100)).is_some());
    }

    proptest! {
        #[test]
        fn nobody_is_sent_to_a_longer_queue(first in any::<u32>(), second in any::<u32>()) {
            if goes_second(first, second) {
                prop_assert!(second < first && is_worth_leaving(first));
                prop_assert!(!goes_second(second, first));
            }
        }

        /// Any number of readers, each by the queues it finds: neither of two is ever ahead by more than it is worth.
        #[test]
        fn two_queues_stay_level(steps in proptest::collection::vec(any::<bool>(), 0..500)) {
            let (mut first, mut second) = (0_u32, 0_u32);
            for ends in steps {
                match (ends, goes_second(first, second)) {
                    (true, _) => { first = first.saturating_sub(1); second = second.saturating_sub(1); }
                    (false, true) => second += 1,
                    (false, false) => first += 1,
                }
                prop_assert!(first.abs_diff(second) <= WORTH, "{first} {second}");
            }
        }
    }
}
