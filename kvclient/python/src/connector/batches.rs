//! An engine's jobs that are several jobs of the cache, told as one when the last has ended.
//!
//! ```text
//! begin(what, [ids, ids]) ─► jobs 7, 8      end(8) ─► None      end(7) ─► Whole{what, sums, failed ids}
//! ```
//!
//! Units: blocks, bytes, seconds.
//! Errors: none; the end of a job that is not known is nothing.

use std::collections::{BTreeMap, HashMap};

/// What became of one job of the cache.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ended {
    /// Its number.
    pub job: u64,
    /// Blocks that arrived verified, or that the node holds now.
    pub blocks: usize,
    /// Bytes of those.
    pub bytes: u64,
    /// The engine's blocks that did not.
    pub failed_block_ids: Vec<u32>,
    /// From its start to its end.
    pub seconds: f64,
    /// Why the first of them failed.
    pub reason: Option<String>,
}

/// What became of all jobs of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Whole<T> {
    /// What it was begun for.
    pub what: T,
    /// Blocks that arrived verified, or that the node holds now.
    pub blocks: usize,
    /// Bytes of those.
    pub bytes: u64,
    /// The engine's blocks that did not.
    pub failed: Vec<u32>,
    /// Of those, of jobs that the cache never took.
    pub dropped: usize,
    /// Of the job that took longest.
    pub seconds: f64,
    /// Why the first of them failed.
    pub reason: Option<String>,
}

#[derive(Debug)]
struct Batch<T> {
    whole: Whole<T>,
    open: usize,
}

/// Batches whose jobs have not all ended.
#[derive(Debug)]
pub struct Batches<T> {
    batches: HashMap<u64, Batch<T>>,
    /// Open jobs: their batch, and their blocks.
    jobs: BTreeMap<u64, (u64, Vec<u32>)>,
    next: u64,
}

impl<T> Default for Batches<T> {
    fn default() -> Self {
        Self {
            batches: HashMap::new(),
            jobs: BTreeMap::new(),
            next: 1,
        }
    }
}

impl<T> Batches<T> {
    /// One job per part, each with the engine's blocks that it moves: their numbers, never used before.
    ///
    /// # Panics
    /// Without a part: such a batch would never end.
    pub fn begin(&mut self, what: T, parts: Vec<Vec<u32>>) -> Vec<u64> {
        assert!(!parts.is_empty(), "a batch has jobs");
        let first = self.next;
        self.next += parts.len() as u64;
        let whole = Whole {
            what,
            blocks: 0,
            bytes: 0,
            failed: Vec::new(),
            dropped: 0,
            seconds: 0.0,
            reason: None,
        };
        let open = parts.len();
        self.batches.insert(first, Batch { whole, open });
        let jobs = (first..self.next).collect();
        self.jobs
            .extend((first..).zip(parts.into_iter().map(|ids| (first, ids))));
        jobs
    }

    /// A job has ended; its batch, if that was the last.
    pub fn end(&mut self, ended: Ended) -> Option<Whole<T>> {
        let (number, _) = self.jobs.remove(&ended.job)?;
        let batch = self
            .batches
            .get_mut(&number)
            .expect("an open job has a batch");
        let whole = &mut batch.whole;
        whole.blocks += ended.blocks;
        whole.bytes += ended.bytes;
        whole.seconds = whole.seconds.max(ended.seconds);
        if !ended.failed_block_ids.is_empty() {
            whole.reason = whole.reason.take().or(ended.reason);
            whole.failed.extend(ended.failed_block_ids);
        }
        batch.open -= 1;
        if batch.open > 0 {
            return None;
        }
        self.batches.remove(&number).map(|batch| batch.whole)
    }

    /// A job has ended without any of its blocks.
    pub fn give_up(&mut self, job: u64, reason: &str) -> Option<Whole<T>> {
        let failed_block_ids = self.jobs.get(&job)?.1.clone();
        self.end(Ended {
            job,
            failed_block_ids,
            reason: Some(reason.to_owned()),
            ..Ended::default()
        })
    }

    /// The cache did not take a job: it has ended without any of its blocks.
    pub fn refuse(&mut self, job: u64, reason: &str) -> Option<Whole<T>> {
        let (number, ids) = self.jobs.get(&job)?;
        if let Some(batch) = self.batches.get_mut(number) {
            batch.whole.dropped += ids.len();
        }
        self.give_up(job, reason)
    }

    /// Jobs that have not ended, oldest first.
    pub fn jobs(&self) -> impl Iterator<Item = (u64, &T)> {
        let what = |number| &self.batches[number].whole.what;
        self.jobs
            .iter()
            .map(move |(job, (number, _))| (*job, what(number)))
    }

    /// What the batches that have not ended were begun for.
    pub fn open(&self) -> impl Iterator<Item = &T> {
        self.batches.values().map(|batch| &batch.whole.what)
    }

    /// True when nothing is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::Just, prelude::Strategy, prop_assert, prop_assert_eq, proptest};

    use super::*;

    proptest! {
        /// Whatever the order in which jobs end: one report per batch, with every block that failed, and numbers never meet.
        #[test]
        fn every_batch_is_told_once_with_all_its_failures(
            sizes in proptest::collection::vec(1usize..5, 1..6),
            order in Just((0..64usize).collect::<Vec<_>>()).prop_shuffle(),
            ways in proptest::collection::vec(0u8..3, 64),
        ) {
            let mut batches = Batches::default();
            let mut jobs = Vec::new();
            for (what, parts) in sizes.iter().enumerate() {
                let ids = (0..*parts).map(|part| vec![(what * 10 + part) as u32]).collect();
                jobs.extend(batches.begin(what, ids).into_iter().zip(std::iter::repeat(what)));
            }
            let mut told = HashMap::new();
            for &at in order.iter().filter(|at| **at < jobs.len()) {
                let (job, what) = jobs[at];
                let whole = match ways[at] {
                    0 => batches.end(Ended { job, blocks: 1, bytes: 8, ..Ended::default() }),
                    1 => batches.give_up(job, "late"),
                    _ => batches.refuse(job, "full"),
                };
                prop_assert_eq!(batches.end(Ended { job, ..Ended::default() }), None);
                if let Some(whole) = whole {
                    prop_assert_eq!(whole.what, what);
                    prop_assert!(told.insert(what, whole).is_none());
                }
            }
            prop_assert!(batches.is_empty());
            for (what, parts) in sizes.iter().enumerate() {
                let whole = &told[&what];
                let went = |way: u8| (0..jobs.len()).filter(|at| jobs[*at].1 == what && ways[*at] == way).count();
                prop_assert_eq!(whole.failed.len(), went(1) + went(2));
                prop_assert_eq!((whole.blocks, whole.dropped), (went(0), went(2)));
                prop_assert_eq!(whole.reason.is_some(), went(0) < *parts);
            }
        }
    }
}
