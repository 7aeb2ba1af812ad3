//! What to expect of a block, learnt online from what became of others like it.
//!
//! ```text
//! started(class) ──┬─ hit(class, age)       used again at that age
//!                  └─ ended(class, age)     no longer watched at that age, and not used until then
//!
//! every epoch: hazard(class, age) ─► worth(class, age), a table that the policy reads
//! ```
//!
//! The **hazard** of an age is the share of the blocks watched at that age that were used then; blocks still
//! being watched count as not used so far (Kaplan and Meier, 1958), so that rare long waits are judged fairly.
//! The **worth** of a block is the best it offers per slot and time, over all times one might go on keeping it:
//! `max over T of P(used within T) / E[time kept until used or T]`, the index of Gittins (1979). What is given up first is
//! what is worth least.
//!
//! Units: ages in insertions, so a turnover of the cache is as many as it has blocks; two buckets an octave.
//! Forgetting: each epoch takes 2 % off all counts; with eight epochs a turnover, habits of four turnovers ago
//! weigh half. A class that has seen little is judged like all classes together, and before anything was
//! seen every octave of age promises the same, which orders blocks as LRU does.
//! Errors: none. Cost: two additions per event; an epoch costs some 20,000 operations, whatever the cache's size.

/// Two an octave, up to 2^24 insertions; beyond, all ages are alike.
const BUCKETS: usize = 48;
/// Starts are told apart by epoch for this long, eight turnovers.
const EPOCHS: u32 = 64;
/// Share of the counts that an epoch keeps.
const KEEP: f32 = 0.98;
/// Observations that the judgement of all classes together counts for in each.
const PRIOR_WEIGHT: f32 = 32.0;
/// Chance of use in each bucket before anything was seen.
const PRIOR_HAZARD: f32 = 0.02;
/// Below this chance to be unused still, longer waits do not change the worth.
const NEGLIGIBLE: f32 = 1e-3;

type Table = [f32; BUCKETS];

fn bucket(age: u64) -> usize {
    let age = age + 1;
    let octave = age.ilog2() as usize;
    let upper_half = octave > 0 && (age >> (octave - 1)) & 1 == 1;
    (2 * octave + usize::from(upper_half)).min(BUCKETS - 1)
}

/// Time spent in a bucket, insertions.
fn width(bucket: usize) -> f32 {
    match bucket {
        0 => 1.0,
        1 => 0.0, // ages are whole numbers: the first octave has no upper half
        _ => (1_u64 << (bucket / 2)) as f32 / 2.0,
    }
}

/// What became of the blocks of one class.
#[derive(Clone, Debug)]
struct Fate {
    hits: Table,
    ends: Table,
    /// Still watched, by the epoch in which they started.
    watched: [i32; EPOCHS as usize],
    /// Still watched, started before all of those.
    ancient: i32,
    worth: Table,
}

/// The expectations of a policy, by class.
#[derive(Debug)]
pub(super) struct Outlook {
    fates: Vec<Fate>,
    epoch: u32,
    epoch_starts: [u64; EPOCHS as usize],
}

impl Outlook {
    pub(super) fn new(classes: usize) -> Self {
        let fate = Fate {
            hits: [0.0; BUCKETS],
            ends: [0.0; BUCKETS],
            watched: [0; EPOCHS as usize],
            ancient: 0,
            worth: [0.0; BUCKETS],
        };
        let mut outlook = Self {
            fates: vec![fate; classes],
            epoch: 0,
            epoch_starts: [0; EPOCHS as usize],
        };
        outlook.learn(0);
        outlook
    }

    /// The epoch in which blocks start now; remember it with the block.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// A block of that class is watched from now on.
    pub(super) fn started(&mut self, class: usize) {
        self.fates[class].watched[(self.epoch % EPOCHS) as usize] += 1;
    }

    /// A watched block was used again.
    pub(super) fn hit(&mut self, class: usize, epoch: u32, age: u64) {
        self.fates[class].hits[bucket(age)] += 1.0;
        self.unwatch(class, epoch);
    }

    /// A watched block is lost from sight.
    pub(super) fn ended(&mut self, class: usize, epoch: u32, age: u64) {
        self.fates[class].ends[bucket(age)] += 1.0;
        self.unwatch(class, epoch);
    }

    /// A block that has just started belongs to another class, as it turns out.
    pub(super) fn unwatch(&mut self, class: usize, epoch: u32) {
        let fate = &mut self.fates[class];
        match self.epoch.wrapping_sub(epoch) {
            0..EPOCHS => fate.watched[(epoch % EPOCHS) as usize] -= 1,
            _ => fate.ancient -= 1,
        }
    }

    /// What keeping a block of that class and age promises, in uses per insertion.
    pub(super) fn worth(&self, class: usize, age: u64) -> f32 {
        self.fates[class].worth[bucket(age)]
    }

    /// Draws the lessons at `now` and begins the next epoch.
    pub(super) fn learn(&mut self, now: u64) {
        let exposures: Vec<Table> = self
            .fates
            .iter()
            .map(|fate| self.exposure(fate, now))
            .collect();
        let mut common = [PRIOR_HAZARD; BUCKETS];
        for (bucket, common) in common.iter_mut().enumerate() {
            let hits: f32 = self.fates.iter().map(|fate| fate.hits[bucket]).sum();
            let exposed: f32 = exposures.iter().map(|exposure| exposure[bucket]).sum();
            *common = blend(hits, exposed, PRIOR_HAZARD);
        }
        for (fate, exposure) in self.fates.iter_mut().zip(&exposures) {
            let hazard: Table =
                std::array::from_fn(|b| blend(fate.hits[b], exposure[b], common[b]).min(1.0));
            fate.worth = worth(&hazard);
            fate.hits
                .iter_mut()
                .chain(&mut fate.ends)
                .for_each(|count| *count *= KEEP);
        }
        self.epoch = self.epoch.wrapping_add(1);
        let oldest = (self.epoch % EPOCHS) as usize;
        for fate in &mut self.fates {
            fate.ancient += std::mem::take(&mut fate.watched[oldest]);
        }
        self.epoch_starts[oldest] = now;
    }

    /// How many of a class were seen at each age, unused until then; who was lost from sight there counts half.
    fn exposure(&self, fate: &Fate, now: u64) -> Table {
        let mut lost = fate.ends;
        for (watched, start) in fate.watched.iter().zip(&self.epoch_starts) {
            lost[bucket(now.saturating_sub(*start))] += (*watched).max(0) as f32;
        }
        let oldest = self.epoch_starts[(self.epoch.wrapping_add(1) % EPOCHS) as usize];
        lost[bucket(now.saturating_sub(oldest))] += fate.ancient.max(0) as f32;
        let mut beyond = 0.0;
        let mut exposure = [0.0; BUCKETS];
        for b in (0..BUCKETS).rev() {
            exposure[b] = beyond + fate.hits[b] + lost[b] / 2.0;
            beyond += fate.hits[b] + lost[b];
        }
        exposure
    }
}

fn blend(hits: f32, exposed: f32, elsewhere: f32) -> f32 {
    (hits + PRIOR_WEIGHT * elsewhere) / (exposed + PRIOR_WEIGHT)
}

/// Gittins' index at the start of each bucket.
fn worth(hazard: &Table) -> Table {
    std::array::from_fn(|from| {
        let (mut unused, mut used, mut time, mut best) = (1.0_f32, 0.0_f32, 0.0_f32, 0.0_f32);
        for (b, hazard) in hazard.iter().enumerate().skip(from) {
            let now = unused * hazard;
            used += now;
            time += (unused - now / 2.0) * width(b);
            unused -= now;
            if time > 0.0 {
                best = best.max(used / time);
            }
            if unused < NEGLIGIBLE {
                break;
            }
        }
        best
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_half_octaves() {
        let ages = [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 15, u64::MAX - 1];
        let buckets = ages.map(bucket);
        assert_eq!(buckets, [0, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8, BUCKETS - 1]);
        let total: f32 = (0..2 * 10).map(width).sum();
        assert_eq!(total, 1023.0, "the widths add up to the ages they hold");
    }

    #[test]
    fn before_anything_is_seen_the_older_is_worth_less() {
        let outlook = Outlook::new(2);
        for (young, old) in [(0, 10), (10, 100), (1000, 100_000)] {
            assert!(outlook.worth(0, young) > outlook.worth(0, old));
            assert_eq!(outlook.worth(0, old), outlook.worth(1, old));
        }
    }

    #[test]
    fn a_class_that_comes_back_is_worth_more_than_one_that_does_not() {
        let mut outlook = Outlook::new(2);
        for _ in 0..200 {
            let epoch = outlook.epoch();
            outlook.started(0);
            outlook.started(1);
            outlook.hit(0, epoch, 100);
            outlook.ended(1, epoch, 1000);
        }
        outlook.learn(2000);
        assert!(outlook.worth(0, 10) > 5.0 * outlook.worth(1, 10));
    }

    #[test]
    fn those_still_watched_count_against_a_class() {
        let learnt = |watched: usize| {
            let mut outlook = Outlook::new(1);
            (0..watched).for_each(|_| outlook.started(0));
            for _ in 0..50 {
                outlook.started(0);
                outlook.hit(0, outlook.epoch(), 20);
            }
            outlook.learn(5000);
            outlook.worth(0, 0)
        };
        assert!(learnt(1000) < learnt(0) / 2.0);
    }

    #[test]
    fn a_new_habit_replaces_an_old_one() {
        let mut outlook = Outlook::new(2);
        let mut era = |good: usize, epochs: usize, now: &mut u64| {
            for _ in 0..epochs {
                for _ in 0..100 {
                    let epoch = outlook.epoch();
                    outlook.started(good);
                    outlook.started(1 - good);
                    outlook.hit(good, epoch, 50);
                    outlook.ended(1 - good, epoch, 500);
                }
                *now += 100;
                outlook.learn(*now);
            }
            outlook.worth(good, 10) > outlook.worth(1 - good, 10)
        };
        let mut now = 0;
        assert!(era(0, 100, &mut now) && era(1, 100, &mut now));
    }
}
