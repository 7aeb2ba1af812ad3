//! Blocks that a lookup must not promise for a while.
//!
//! ```text
//! a load failed ─► add ─► lookups stop before it ─► miss_ms later, or saved again ─► remove
//! ```
//!
//! Units: blocks; a moment is a [`Tick`].
//! Errors: none.
//! Why: a node may have lost what it promised (a disk erred, a block was corrupt). An engine that was told "present",
//! failed to load and asked again would be told "present" again, and never come to compute it.
//! Why a hash of the hash: the list need not know how wide an engine's hashes are, and that two of them meet, one in
//! 2^64, costs one block computed once more.

use std::{
    collections::{HashMap, VecDeque, hash_map::RandomState},
    hash::BuildHasher,
    time::Duration,
};

use kvclient::clock::Tick;

/// Most blocks on the list; the oldest leave first, which costs one more failed load each.
pub const MAX_MISSES: usize = 65_536;

/// Blocks that a lookup must not promise for a while.
#[derive(Debug)]
pub struct Misses {
    keep: Duration,
    seed: RandomState,
    until: HashMap<u64, Tick>,
    /// In the order they were added; an entry counts only while `until` says the same.
    order: VecDeque<(Tick, u64)>,
    epoch: u64,
}

impl Misses {
    /// An empty list whose entries stay for `keep`.
    #[must_use]
    pub fn new(keep: Duration) -> Self {
        Self {
            keep,
            seed: RandomState::new(),
            until: HashMap::new(),
            order: VecDeque::new(),
            epoch: 0,
        }
    }

    /// Grows whenever a block is added: an answer made before need not be looked at again until it does.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.until.len()
    }

    /// True when there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.until.is_empty()
    }

    /// Lookups stop before this block until `keep` has passed.
    pub fn add(&mut self, hash: &[u8], now: Tick) {
        self.expire(now);
        let (key, until) = (self.seed.hash_one(hash), now.after(self.keep));
        self.until.insert(key, until);
        self.order.push_back((until, key));
        self.epoch += 1;
        while self.order.len() > MAX_MISSES {
            self.pop();
        }
    }

    /// It is there again.
    pub fn remove(&mut self, hash: &[u8]) {
        if !self.until.is_empty() {
            self.until.remove(&self.seed.hash_one(hash));
        }
    }

    /// How many of `hashes` come before the first that is on the list.
    pub fn before<'h>(&mut self, hashes: impl Iterator<Item = &'h [u8]>, now: Tick) -> usize {
        self.expire(now);
        let mut clear = 0;
        for hash in hashes {
            if !self.until.is_empty() && self.until.contains_key(&self.seed.hash_one(hash)) {
                break;
            }
            clear += 1;
        }
        clear
    }

    fn expire(&mut self, now: Tick) {
        while self.order.front().is_some_and(|(until, _)| *until <= now) {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some((until, key)) = self.order.pop_front()
            && self.until.get(&key) == Some(&until)
        {
            self.until.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Tick {
        Tick(Duration::from_millis(ms))
    }

    fn before(misses: &mut Misses, now: u64) -> usize {
        misses.before([b"a", b"b", b"c"].iter().map(|hash| &hash[..]), at(now))
    }

    #[test]
    fn lookups_stop_before_a_miss_until_its_time_is_over() {
        let mut misses = Misses::new(Duration::from_millis(100));
        assert_eq!(before(&mut misses, 0), 3);
        misses.add(b"b", at(0));
        assert_eq!(before(&mut misses, 99), 1);
        assert_eq!(before(&mut misses, 100), 3);
        assert!(misses.is_empty());
    }

    #[test]
    fn a_saved_block_may_be_promised_again() {
        let mut misses = Misses::new(Duration::from_millis(100));
        misses.add(b"b", at(0));
        misses.remove(b"b");
        assert_eq!(before(&mut misses, 1), 3);
        // An entry that was removed and added again stays its whole time.
        misses.add(b"b", at(50));
        assert_eq!(before(&mut misses, 120), 1);
    }

    #[test]
    fn the_list_is_bounded_and_the_oldest_leave() {
        let mut misses = Misses::new(Duration::from_secs(1));
        misses.add(b"a", at(0));
        let before_all = misses.epoch();
        for i in 0..MAX_MISSES {
            misses.add(&i.to_le_bytes(), at(1));
        }
        assert_eq!(misses.len(), MAX_MISSES);
        assert_eq!(before(&mut misses, 2), 3);
        assert_eq!(misses.epoch() - before_all, MAX_MISSES as u64);
    }
}
