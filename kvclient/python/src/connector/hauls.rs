//! What a worker moves for its scheduler, and what it says of it: the half of vLLM's connector that touches KV.
//!
//! ```text
//! load(order) ─► one job of the cache, or two ─┐
//! save(order) ─► one job ──────────────────────┴─► ended ─► received, failed │ done ─► sent
//! ```
//!
//! Units: the engine's blocks, bytes, seconds.
//! Errors: none; a job that fails is an answer, and the engine computes its blocks.
//! Why two jobs: two of the cache's threads copy the halves of a long load side by side. It is told as one.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

use super::{
    batches::{Batches, Ended, Whole},
    counts::Counts,
    order::Order,
};

/// A job of fewer bytes is not worth a thread of its own.
pub const PART_BYTES: usize = 16 << 20;

/// Blocks of an order, as one job of the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its number.
    pub job: u64,
    /// Of which order.
    pub order: Arc<Order>,
    /// Which of the order's blocks.
    pub blocks: Range<usize>,
}

impl Part {
    /// The first block's place in the chain.
    #[must_use]
    pub fn first(&self) -> usize {
        self.order.first + self.blocks.start
    }

    /// The engine's blocks.
    #[must_use]
    pub fn block_ids(&self) -> &[u32] {
        &self.order.block_ids[self.blocks.clone()]
    }
}

#[derive(Debug)]
enum Task {
    Load(Arc<Order>),
    Save(Arc<Order>),
}

/// Blocks that a worker did not store, by the scheduler's job.
pub type Done = HashMap<u64, BTreeSet<u32>>;

/// A worker's loads and saves.
#[derive(Debug, Default)]
pub struct Hauls {
    batches: Batches<Task>,
    /// Bytes of a block, all layers; 0 until they are known.
    block_bytes: usize,
    /// Finished requests whose blocks wait for their saves.
    held: HashSet<String>,
    failed: BTreeSet<u32>,
    received: HashSet<String>,
    done: Done,
    counts: Counts,
}

impl Hauls {
    /// Says how many bytes a block has.
    pub fn measure(&mut self, block_bytes: usize) {
        self.block_bytes = block_bytes;
    }

    /// The jobs of a load.
    pub fn load(&mut self, order: Arc<Order>) -> Vec<Part> {
        let (middle, end) = (order.block_ids.len() / 2, order.block_ids.len());
        let long = middle * self.block_bytes >= PART_BYTES && middle > 0;
        let cuts: &[usize] = if long { &[0, middle, end] } else { &[0, end] };
        self.begin(Task::Load(Arc::clone(&order)), &order, cuts)
    }

    /// The job of a save.
    pub fn save(&mut self, order: Arc<Order>) -> Part {
        let cuts = [0, order.block_ids.len()];
        let mut parts = self.begin(Task::Save(Arc::clone(&order)), &order, &cuts);
        parts.pop().expect("one part, one job")
    }

    /// A job for the blocks between each two cuts.
    fn begin(&mut self, task: Task, order: &Arc<Order>, cuts: &[usize]) -> Vec<Part> {
        let parts: Vec<Range<usize>> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
        let ids = |blocks: &Range<usize>| order.block_ids[blocks.clone()].to_vec();
        let jobs = self.batches.begin(task, parts.iter().map(ids).collect());
        let part = |(job, blocks)| Part {
            job,
            order: Arc::clone(order),
            blocks,
        };
        jobs.into_iter().zip(parts).map(part).collect()
    }

    /// A job of the cache has ended. What an operator must know of it, in one line.
    pub fn ended(&mut self, ended: Ended) -> Option<String> {
        let whole = self.batches.end(ended)?;
        self.settle(whole)
    }

    /// The cache did not take a job, or it was taken from it: as if all of its blocks had failed.
    pub fn give_up(&mut self, job: u64, reason: &str) -> Option<String> {
        let whole = self.batches.give_up(job, reason)?;
        self.settle(whole)
    }

    /// Gives up whatever is in hand; the lines that say so.
    pub fn give_up_all(&mut self, reason: &str) -> Vec<String> {
        let jobs: Vec<u64> = self.batches.jobs().map(|(job, _)| job).collect();
        jobs.into_iter()
            .filter_map(|job| self.give_up(job, reason))
            .collect()
    }

    fn settle(&mut self, whole: Whole<Task>) -> Option<String> {
        let (blocks, bytes) = (whole.blocks as f64, whole.bytes as f64);
        let lost = whole.failed.len();
        let counts = &mut self.counts;
        match whole.what {
            Task::Load(order) => {
                counts.add("loads", 1.0);
                counts.add("load_seconds", whole.seconds);
                counts.add("failed_blocks", lost as f64);
                counts.add("loaded_blocks", blocks);
                counts.add("loaded_bytes", bytes);
                self.received.insert(order.request.clone());
                self.failed.extend(whole.failed);
                let (wanted, request) = (order.block_ids.len(), &order.request);
                let why = whole
                    .reason
                    .unwrap_or_else(|| "no reason was given".to_owned());
                (lost > 0).then(|| {
                    format!("{lost} of {wanted} blocks of {request} are computed instead: {why}")
                })
            }
            Task::Save(order) => {
                counts.add("saves", 1.0);
                counts.add("save_seconds", whole.seconds);
                counts.add("dropped_blocks", lost as f64);
                counts.add("saved_blocks", blocks);
                counts.add("saved_bytes", bytes);
                self.done
                    .insert(order.job, whole.failed.into_iter().collect());
                None
            }
        }
    }

    /// Finished requests whose blocks wait for their saves.
    pub fn hold(&mut self, requests: impl IntoIterator<Item = String>) {
        self.held.extend(requests);
    }

    /// Held requests whose saves have all ended, each once.
    pub fn take_sent(&mut self) -> HashSet<String> {
        let read: HashSet<&str> = self.batches.open().filter_map(Task::reads).collect();
        let sent = self.held.extract_if(|request| !read.contains(&**request));
        sent.collect()
    }

    /// Requests whose load has ended, each once.
    pub fn take_received(&mut self) -> HashSet<String> {
        std::mem::take(&mut self.received)
    }

    /// True while failed blocks were not told: whatever the engine computes now may stand on them.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        !self.failed.is_empty()
    }

    /// Blocks that were promised and did not come, each once.
    pub fn take_failed(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.failed)
    }

    /// Saves that have ended, each once.
    pub fn take_done(&mut self) -> Done {
        std::mem::take(&mut self.done)
    }

    /// Loads that have not ended.
    #[must_use]
    pub fn loading(&self) -> usize {
        self.batches
            .open()
            .filter(|task| task.reads().is_none())
            .count()
    }

    /// The cache's jobs of saves that have not ended, oldest first.
    #[must_use]
    pub fn saving(&self) -> Vec<u64> {
        let jobs = self.batches.jobs();
        jobs.filter(|(_, task)| task.reads().is_some())
            .map(|(job, _)| job)
            .collect()
    }

    /// What was counted since the last call.
    pub fn counts(&mut self) -> &mut Counts {
        &mut self.counts
    }
}

impl Task {
    /// The request whose blocks it reads.
    fn reads(&self) -> Option<&str> {
        match self {
            Self::Load(_) => None,
            Self::Save(order) => Some(&order.request),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(job: u64, request: &str, ids: &[u32]) -> Arc<Order> {
        Arc::new(Order {
            job,
            request: request.to_owned(),
            hashes: (0..ids.len() as u8 + 2).collect(),
            width: 1,
            first: 2,
            block_ids: ids.to_vec(),
            lease: 5,
        })
    }

    fn ended(job: u64, blocks: usize, failed: &[u32]) -> Ended {
        Ended {
            job,
            blocks,
            bytes: blocks as u64 * 10,
            failed_block_ids: failed.to_vec(),
            seconds: job as f64,
            reason: (!failed.is_empty()).then(|| "gone".to_owned()),
        }
    }

    #[test]
    fn a_long_load_is_two_jobs_and_is_told_once() {
        let mut hauls = Hauls::default();
        assert_eq!(hauls.load(order(1, "short", &[1, 2, 3, 4])).len(), 1);
        hauls.measure(PART_BYTES / 2);
        let parts = hauls.load(order(2, "long", &[9, 8, 7, 6, 5]));
        let cut: Vec<_> = parts
            .iter()
            .map(|part| (part.first(), part.block_ids().to_vec()))
            .collect();
        assert_eq!(cut, [(2, vec![9, 8]), (4, vec![7, 6, 5])]);
        assert_eq!(hauls.ended(ended(parts[1].job, 2, &[6])), None);
        assert!(hauls.take_received().is_empty() && !hauls.has_failed());
        let line = hauls.ended(ended(parts[0].job, 2, &[])).unwrap();
        assert_eq!(line, "1 of 5 blocks of long are computed instead: gone");
        assert_eq!(hauls.take_received(), HashSet::from(["long".to_owned()]));
        assert_eq!(hauls.take_failed(), BTreeSet::from([6]));
        assert_eq!(hauls.counts().take()["load_seconds"], parts[1].job as f64);
        assert_eq!(hauls.loading(), 1);
    }

    #[test]
    fn a_long_block_is_not_cut() {
        let mut hauls = Hauls::default();
        hauls.measure(PART_BYTES * 4);
        assert_eq!(hauls.load(order(1, "one", &[1])).len(), 1);
    }

    #[test]
    fn a_held_request_is_sent_when_its_last_save_has_ended() {
        let mut hauls = Hauls::default();
        let (one, two) = (
            hauls.save(order(1, "r", &[1])),
            hauls.save(order(2, "r", &[2])),
        );
        hauls.hold(["r".to_owned(), "idle".to_owned()]);
        assert_eq!(hauls.take_sent(), HashSet::from(["idle".to_owned()]));
        assert_eq!(hauls.saving(), [one.job, two.job]);
        assert_eq!(hauls.ended(ended(one.job, 1, &[])), None);
        assert!(hauls.take_sent().is_empty());
        assert_eq!(hauls.give_up(two.job, "full"), None);
        assert_eq!(hauls.take_sent(), HashSet::from(["r".to_owned()]));
        assert_eq!(
            hauls.take_done(),
            HashMap::from([(1, BTreeSet::new()), (2, BTreeSet::from([2]))])
        );
        assert!(hauls.take_sent().is_empty() && hauls.take_done().is_empty());
    }

    #[test]
    fn what_is_given_up_has_failed() {
        let mut hauls = Hauls::default();
        hauls.load(order(1, "r", &[1, 2]));
        hauls.save(order(2, "s", &[3]));
        let lines = hauls.give_up_all("the cache was reset");
        assert_eq!(
            lines,
            ["2 of 2 blocks of r are computed instead: the cache was reset"]
        );
        assert_eq!(hauls.take_failed(), BTreeSet::from([1, 2]));
        assert_eq!((hauls.loading(), hauls.saving().len()), (0, 0));
    }
}
