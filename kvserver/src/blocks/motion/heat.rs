//! Which runs are read so much that one owner is too few: a count of reads that forgets, and the rule over it.
//!
//! ```text
//! get ─► its runs, and the calls that it found being served ─► Heat ── look, every now and then ──► those that are hot
//!                                                              └─ halves every count: what was, fades
//! hot      a share of this node's gets (`share_percent`), while gets find a queue (`calls`)
//! stays    hot while both are at least a quarter of that: a second owner takes half of the reads, and the queue with it
//! ```
//!
//! Pure; no clock. Shape: runs per get are counted once, so that a prompt of many runs is as hot in each of them.
//! Units: gets, calls. Errors: none. Bounds: [`MAX_COUNTED`] runs; while the table is full of others a run is counted
//! from the next look on, which drops what is not read again.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::RunKey;

/// Runs that are counted at a time.
pub const MAX_COUNTED: usize = 4096;

/// Gets of a run below which nothing is called hot: a few say nothing of the next few.
const LEAST_GETS: u64 = 16;

/// What of both marks keeps hot what is hot.
const STAYS: u64 = 4;

/// From when on a run is hot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotRules {
    /// Calls that gets find being served, on average; 0: nothing is ever hot.
    pub calls: u32,
    /// Gets of the run, in percent of this node's.
    pub share_percent: u32,
}

/// What is read here, and how many wait meanwhile. See the module's page.
#[derive(Debug, Default)]
pub struct Heat {
    runs: BTreeMap<RunKey, u64>,
}

/// What gets have found since the last look, fading like the counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Gets.
    pub gets: u64,
    /// Calls that each found being served, summed.
    pub calls: u64,
}

impl HotRules {
    /// Whether a run is hot that is read by `gets` of those that were `seen`.
    #[must_use]
    pub fn is_hot(&self, gets: u64, seen: Seen, is_hot: bool) -> bool {
        let eases = if is_hot { STAYS } else { 1 };
        let (calls, share) = (u64::from(self.calls), u64::from(self.share_percent));
        calls > 0
            && gets * eases >= LEAST_GETS
            && gets * 100 * eases >= share * seen.gets
            && seen.calls * eases >= calls * seen.gets
    }

    /// Whether a get is worth counting that finds so many calls: those in a quiet hour make nothing hot.
    #[must_use]
    pub fn counts(&self, calls: u32) -> bool {
        self.calls > 0 && u64::from(calls) * STAYS >= u64::from(self.calls)
    }
}

impl Heat {
    /// One get of these runs.
    pub fn read(&mut self, runs: impl IntoIterator<Item = RunKey>) {
        for run in runs {
            let is_full = self.runs.len() >= MAX_COUNTED;
            match self.runs.get_mut(&run) {
                Some(gets) => *gets += 1,
                None if is_full => {}
                None => {
                    self.runs.insert(run, 1);
                }
            }
        }
    }

    /// The runs that are hot now, hottest first, and halves every count. `seen` is halved by whoever counts it.
    pub fn look(&mut self, rules: &HotRules, seen: Seen, hot: &BTreeSet<RunKey>) -> Vec<RunKey> {
        let is_hot = |(run, gets): &(&RunKey, &u64)| rules.is_hot(**gets, seen, hot.contains(run));
        let mut found: Vec<(u64, RunKey)> = self
            .runs
            .iter()
            .filter(is_hot)
            .map(|(run, gets)| (*gets, *run))
            .collect();
        found.sort_by(|(a, x), (b, y)| b.cmp(a).then_with(|| x.cmp(y)));
        self.runs.retain(|_, gets| {
            *gets /= 2;
            *gets > 0
        });
        found.into_iter().map(|(_, run)| run).collect()
    }
}

#[cfg(test)]
mod tests {
    use kvproto::{NamespaceId, RunHash};
    use proptest::prelude::*;

    use super::*;

    const RULES: HotRules = HotRules {
        calls: 16,
        share_percent: 10,
    };

    fn run(n: u16) -> RunKey {
        let mut hash = [0; 32];
        hash[..2].copy_from_slice(&n.to_be_bytes());
        RunKey {
            namespace: NamespaceId([1; 16]),
            run: RunHash(hash),
        }
    }

    fn seen(gets: u64, each: u64) -> Seen {
        Seen {
            gets,
            calls: gets * each,
        }
    }

    #[test]
    fn a_run_is_hot_by_its_share_while_there_is_a_queue() {
        assert!(RULES.is_hot(100, seen(1000, 16), false));
        assert!(!RULES.is_hot(99, seen(1000, 16), false), "too few");
        assert!(!RULES.is_hot(1000, seen(1000, 15), false), "nobody waits");
        assert!(!RULES.is_hot(15, seen(15, 100), false), "a moment's chance");
        let off = HotRules { calls: 0, ..RULES };
        assert!(!off.is_hot(1000, seen(1000, 1000), true));
    }

    #[test]
    fn what_is_hot_stays_so_when_half_of_its_reads_go_elsewhere() {
        assert!(RULES.is_hot(500, seen(1000, 8), true));
        assert!(RULES.is_hot(25, seen(1000, 4), true));
        assert!(!RULES.is_hot(24, seen(1000, 4), true));
        assert!(!RULES.is_hot(1000, seen(1000, 3), true));
    }

    #[test]
    fn the_hottest_come_first_and_every_count_fades() {
        let mut heat = Heat::default();
        for n in 0..3_u16 {
            (0..100 * (n + 1)).for_each(|_| heat.read([run(n)]));
        }
        let none = BTreeSet::new();
        let hot = heat.look(&RULES, seen(600, 20), &none);
        assert_eq!(hot, [run(2), run(1), run(0)]);
        // 50 of the next 1000.
        let hot = heat.look(&RULES, seen(1000, 20), &none);
        assert_eq!(hot, [run(2), run(1)]);
        (0..20).for_each(|_| drop(heat.look(&RULES, seen(1, 20), &none)));
        assert!(heat.runs.is_empty());
    }

    #[test]
    fn what_is_read_once_makes_room_for_what_is_read_often() {
        let mut heat = Heat::default();
        (0..MAX_COUNTED as u16 + 10).for_each(|n| heat.read([run(n)]));
        assert_eq!(heat.runs.len(), MAX_COUNTED);
        heat.look(&RULES, seen(5000, 20), &BTreeSet::new());
        (0..100).for_each(|_| heat.read([run(9999)]));
        assert_eq!(
            heat.look(&RULES, seen(100, 20), &BTreeSet::new()),
            [run(9999)]
        );
    }

    proptest! {
        #[test]
        fn more_reads_and_more_calls_never_cool(gets in 0..10_000_u64, all in 1..10_000_u64, each in 0..100_u64, more in 0..100_u64) {
            let is_hot = |gets, each, was| RULES.is_hot(gets, seen(all, each), was);
            for was in [false, true] {
                if is_hot(gets, each, was) {
                    prop_assert!(is_hot(gets + more, each, was));
                    prop_assert!(is_hot(gets, each + more, was));
                    prop_assert!(is_hot(gets, each, true), "it stays hot where it would become so");
                }
            }
        }
    }
}
