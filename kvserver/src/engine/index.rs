//! Every block this node holds, in shards by key.
//!
//! ```text
//! BlockKey ─► shard ─► Entry { place, length, seal, where: RAM handle · tiers below, pins, why gone }
//! ```
//!
//! Shape: one hash table per shard under one lock; 160 bytes a block, of which 52 are its key and 72 its place.
//! Page sums live with the bytes, so only blocks in RAM have them.
//! Locks: a shard's lock is taken under the RAM lock and never the other way round, and one shard at a time.
//! Why by key and not by run: a get names a key alone.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, Hasher},
};

use kvproto::{BlockKey, Kind, Place, Reason, TierKind};
use parking_lot::{Mutex, MutexGuard};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{losses::Losses, policy::BlockId};
use crate::tier::{BlockRef, Resident};

/// A set of tiers below RAM.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct TierSet(u8);

impl TierSet {
    /// None.
    pub const EMPTY: Self = Self(0);

    /// The tiers in it, nearest first.
    pub fn iter(self) -> impl Iterator<Item = TierKind> {
        TierKind::ALL
            .iter()
            .copied()
            .filter(move |tier| self.contains(*tier))
    }

    /// Whether it is in.
    #[must_use]
    pub fn contains(self, tier: TierKind) -> bool {
        self.0 & (1 << tier as u8) != 0
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The nearest one.
    #[must_use]
    pub fn nearest(self) -> Option<TierKind> {
        self.iter().next()
    }

    /// Puts a tier in; whether it was not in before.
    pub fn insert(&mut self, tier: TierKind) -> bool {
        let before = self.0;
        self.0 |= 1 << tier as u8;
        self.0 != before
    }

    /// Takes a tier out; whether it was in.
    pub fn remove(&mut self, tier: TierKind) -> bool {
        let before = self.0;
        self.0 &= !(1 << tier as u8);
        self.0 != before
    }
}

impl std::fmt::Debug for TierSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// A block in RAM: its bytes, and the handle under which the policy knows it.
#[derive(Clone, Debug)]
pub(super) struct InRam {
    pub(super) block: BlockRef,
    pub(super) id: BlockId,
}

/// All that is known of one block.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) place: Place,
    pub(super) length_bytes: u64,
    pub(super) seal: u64,
    pub(super) ram: Option<InRam>,
    /// Leases that cover it.
    pub(super) pins: u32,
    pub(super) below: TierSet,
    pub(super) kind: Kind,
    /// Lookups that found it, up to 255.
    pub(super) uses: u8,
    /// Why a block that leases still pin is nowhere any more.
    pub(super) gone: Option<Reason>,
}

impl Entry {
    pub(super) fn is_present(&self) -> bool {
        self.ram.is_some() || !self.below.is_empty()
    }

    /// The nearest tier that has it.
    pub(super) fn nearest(&self) -> Option<TierKind> {
        match (&self.ram, self.below.nearest()) {
            (Some(_), Some(TierKind::Gpu)) => Some(TierKind::Gpu),
            (Some(_), _) => Some(TierKind::Ram),
            (None, below) => below,
        }
    }

    pub(super) fn resident(&self, key: &BlockKey) -> Resident {
        Resident {
            key: *key,
            place: self.place,
            length_bytes: self.length_bytes,
            seal: self.seal,
        }
    }

    pub(super) fn used(&mut self) {
        self.uses = self.uses.saturating_add(1);
    }
}

/// A key as the tables hash it: its bytes in one piece.
#[derive(Clone, Copy, PartialEq, Eq)]
struct TableKey(BlockKey);

impl Hash for TableKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0.to_bytes());
    }
}

/// XXH3 under a seed of this process, so that nobody outside can aim at one bucket.
#[derive(Clone, Copy)]
struct Seed(u64);

struct Xxh3(u64);

impl BuildHasher for Seed {
    type Hasher = Xxh3;

    fn build_hasher(&self) -> Xxh3 {
        Xxh3(self.0)
    }
}

impl Hasher for Xxh3 {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64_with_seed(bytes, self.0);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// One shard: its entries, and what it lost lately.
pub(super) struct Shard {
    entries: HashMap<TableKey, Entry, Seed>,
    pub(super) losses: Losses,
}

impl Shard {
    pub(super) fn get(&self, key: &BlockKey) -> Option<&Entry> {
        self.entries.get(&TableKey(*key))
    }

    pub(super) fn get_mut(&mut self, key: &BlockKey) -> Option<&mut Entry> {
        self.entries.get_mut(&TableKey(*key))
    }

    pub(super) fn entry(&mut self, key: &BlockKey, make: impl FnOnce() -> Entry) -> &mut Entry {
        self.entries.entry(TableKey(*key)).or_insert_with(make)
    }

    /// Forgets an entry that is nowhere and that nobody pins; a pinned one stays, to say why it is gone.
    pub(super) fn settle(&mut self, key: &BlockKey, reason: Reason) {
        let Some(entry) = self.get_mut(key) else {
            return;
        };
        if entry.is_present() {
            return;
        }
        if entry.pins > 0 {
            entry.gone = Some(reason);
        } else {
            self.entries.remove(&TableKey(*key));
            self.losses.remember(key, reason);
        }
    }

    /// Why it is not here; a block that was never here made room for others, as far as anybody can tell.
    pub(super) fn why_gone(&self, key: &BlockKey) -> Reason {
        let pinned = self.get(key).and_then(|entry| entry.gone);
        pinned
            .or_else(|| self.losses.reason(key))
            .unwrap_or(Reason::Evicted)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&BlockKey, &Entry)> {
        self.entries.iter().map(|(key, entry)| (&key.0, entry))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// All shards.
pub(super) struct Index {
    shards: Box<[Mutex<Shard>]>,
    mask: usize,
}

impl Index {
    /// `shards` is rounded up to a power of two; `losses` are remembered over all shards.
    pub(super) fn new(shards: usize, losses: usize, seed: u64) -> Self {
        let shards = shards.clamp(1, 4096).next_power_of_two();
        let shard = || Shard {
            entries: HashMap::with_hasher(Seed(seed)),
            losses: Losses::new(losses.div_ceil(shards), seed),
        };
        Self {
            shards: (0..shards).map(|_| Mutex::new(shard())).collect(),
            mask: shards - 1,
        }
    }

    /// The shard of a key, locked. Hashes are uniform already; one that is not costs contention alone.
    pub(super) fn shard(&self, key: &BlockKey) -> MutexGuard<'_, Shard> {
        let [a, b, c, d, ..] = key.hash.0;
        let word = u32::from_le_bytes([a, b, c, d]) as usize;
        let part = usize::from(key.part.rank) ^ (usize::from(key.part.layer_group) << 4);
        self.shards[(word ^ part.wrapping_mul(0x9e37_79b1)) & self.mask].lock()
    }

    /// Every shard in turn, locked one at a time.
    pub(super) fn shards(&self) -> impl Iterator<Item = MutexGuard<'_, Shard>> {
        self.shards.iter().map(|shard| shard.lock())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_set_lists_the_nearest_first() {
        let mut set = TierSet::EMPTY;
        assert!(set.insert(TierKind::Durable) && set.insert(TierKind::Nvme));
        assert!(!set.insert(TierKind::Nvme));
        assert_eq!(set.nearest(), Some(TierKind::Nvme));
        assert!(set.remove(TierKind::Nvme) && !set.remove(TierKind::Nvme));
        assert_eq!(set.iter().collect::<Vec<_>>(), [TierKind::Durable]);
    }

    #[test]
    fn an_entry_stays_within_its_budget_of_memory() {
        let bytes = size_of::<Entry>() + size_of::<TableKey>();
        assert!(bytes <= 176, "{bytes} bytes a block");
    }
}
