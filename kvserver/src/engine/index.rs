//! Every block this node holds, in shards by key.
//!
//! ```text
//! BlockKey ─► shard ─► Entry { place, length, seal, where: RAM handle · tiers below, pins, why gone }
//! ```
//!
//! Shape: one hash table per shard under one lock; 160 bytes a block, of which 52 are its key and 72 its place. A
//! look-up reads the first half of an entry, key included; its place and seal lie behind that.
//! Page sums live with the bytes, so only blocks in RAM have them.
//! Locks: a shard's lock is taken under the RAM lock and never the other way round, and one shard at a time. Whoever
//! has many keys visits each shard once ([`Index::visit`]): a lock is a fence that makes the memory wait, and between
//! two of them the misses of several keys overlap.
//! Why by key and not by run: a get names a key alone.

use hashbrown::HashTable;
use kvproto::{BlockKey, Kind, Place, Reason, TierKind};
use parking_lot::{Mutex, MutexGuard};

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
#[repr(C)] // what a look-up reads comes first
pub(super) struct Entry {
    pub(super) ram: Option<InRam>,
    pub(super) length_bytes: u64,
    /// Leases that cover it.
    pub(super) pins: u32,
    pub(super) below: TierSet,
    pub(super) kind: Kind,
    /// Lookups that found it, up to 255.
    pub(super) uses: u8,
    /// Why a block that leases still pin is nowhere any more.
    pub(super) gone: Option<Reason>,
    pub(super) seal: u64,
    pub(super) place: Place,
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

/// An entry under its key, side by side.
#[repr(C)]
struct Named {
    key: BlockKey,
    entry: Entry,
}

/// Hashes keys under a seed of this process, so that nobody outside can aim at one bucket.
///
/// Block hashes are uniform already where callers are honest; two multiplications of seeded halves keep those who
/// are not from choosing where they collide, at a few nanoseconds.
#[derive(Clone, Copy)]
struct Hasher([u64; 3]);

impl Hasher {
    fn new(seed: u64) -> Self {
        // The golden ratio and two of the primes of XXH3, so that no word of the seed is zero.
        Self([
            seed ^ 0x9e37_79b9_7f4a_7c15,
            seed.rotate_left(21) ^ 0x9fb2_1c65_1e98_df25,
            seed.rotate_left(42) ^ 0xc2b2_ae3d_27d4_eb4f,
        ])
    }

    fn hash(self, key: &BlockKey) -> u64 {
        let word = |bytes: &[u8], n: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * n..8 * n + 8]);
            u64::from_le_bytes(word)
        };
        let hash = &key.hash.0;
        let space = &key.namespace.0;
        let part = u64::from(key.part.rank) << 32 | u64::from(key.part.layer_group);
        let [a, b, c] = self.0;
        fold(word(hash, 0) ^ a, word(hash, 1) ^ b)
            ^ fold(word(hash, 2) ^ b, word(hash, 3) ^ c)
            ^ fold(word(space, 0) ^ c, word(space, 1) ^ a ^ part)
    }
}

/// Both halves of the product, one upon the other.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// One shard: its entries, and what it lost lately.
pub(super) struct Shard {
    entries: HashTable<Named>,
    hasher: Hasher,
    pub(super) losses: Losses,
}

impl Shard {
    pub(super) fn get(&self, key: &BlockKey) -> Option<&Entry> {
        let hash = self.hasher.hash(key);
        let named = self.entries.find(hash, |named| named.key == *key)?;
        Some(&named.entry)
    }

    pub(super) fn get_mut(&mut self, key: &BlockKey) -> Option<&mut Entry> {
        self.get_hashed(self.hasher.hash(key), key)
    }

    fn get_hashed(&mut self, hash: u64, key: &BlockKey) -> Option<&mut Entry> {
        let named = self.entries.find_mut(hash, |named| named.key == *key)?;
        Some(&mut named.entry)
    }

    pub(super) fn entry(&mut self, key: &BlockKey, make: impl FnOnce() -> Entry) -> &mut Entry {
        let hasher = self.hasher;
        let entry = self.entries.entry(
            hasher.hash(key),
            |named| named.key == *key,
            |named| hasher.hash(&named.key),
        );
        let make = || Named {
            key: *key,
            entry: make(),
        };
        &mut entry.or_insert_with(make).into_mut().entry
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
            return;
        }
        let hash = self.hasher.hash(key);
        if let Ok(found) = self.entries.find_entry(hash, |named| named.key == *key) {
            found.remove();
        }
        self.losses.remember(key, reason);
    }

    /// Why it is not here; a block that was never here made room for others, as far as anybody can tell.
    pub(super) fn why_gone(&self, key: &BlockKey) -> Reason {
        let pinned = self.get(key).and_then(|entry| entry.gone);
        pinned
            .or_else(|| self.losses.reason(key))
            .unwrap_or(Reason::Evicted)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&BlockKey, &Entry)> {
        let named = self.entries.iter();
        named.map(|named| (&named.key, &named.entry))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// All shards.
pub(super) struct Index {
    shards: Box<[Mutex<Shard>]>,
    mask: usize,
    hasher: Hasher,
}

/// A key on a visit: its number among those that were brought, and its hash.
#[derive(Clone, Copy)]
pub(super) struct Visitor {
    pub(super) number: u32,
    hash: u64,
}

impl Shard {
    /// The entry of a key on a visit.
    pub(super) fn visited(&mut self, visitor: Visitor, key: &BlockKey) -> Option<&mut Entry> {
        self.get_hashed(visitor.hash, key)
    }
}

impl Index {
    /// So many shards, at least one, rounded up to a power of two; `losses` remembered in all of them together.
    pub(super) fn new(shards: usize, losses: usize, seed: u64) -> Self {
        let shards = shards.clamp(1, 4096).next_power_of_two();
        let hasher = Hasher::new(seed);
        let shard = || Shard {
            entries: HashTable::new(),
            hasher,
            losses: Losses::new(losses.div_ceil(shards), seed),
        };
        Self {
            shards: (0..shards).map(|_| Mutex::new(shard())).collect(),
            mask: shards - 1,
            hasher,
        }
    }

    /// The tables take their bucket from the low end of a hash and their tag from the high one.
    fn place(&self, hash: u64) -> usize {
        (hash >> 32) as usize & self.mask
    }

    /// The shard of a key, locked.
    pub(super) fn shard(&self, key: &BlockKey) -> MutexGuard<'_, Shard> {
        self.shards[self.place(self.hasher.hash(key))].lock()
    }

    /// Brings `count` keys to their shards. Each shard that is concerned is locked once and handed to `each` with
    /// those of its keys; numbers within a shard ascend. One shard at a time.
    pub(super) fn visit(
        &self,
        count: usize,
        key: impl Fn(usize) -> BlockKey,
        mut each: impl FnMut(&mut Shard, &[Visitor]),
    ) {
        let visitor = |number: usize| Visitor {
            number: number as u32,
            hash: self.hasher.hash(&key(number)),
        };
        // Few keys seldom share a shard; sorting them would cost more than it saves.
        if count < FEW || count * 4 < self.shards.len() {
            for visitor in (0..count).map(visitor) {
                each(
                    &mut self.shards[self.place(visitor.hash)].lock(),
                    &[visitor],
                );
            }
            return;
        }
        let unsorted: Vec<Visitor> = (0..count).map(visitor).collect();
        // A counting sort: where each shard's keys begin …
        let mut ends = vec![0_u32; self.shards.len()];
        for visitor in &unsorted {
            ends[self.place(visitor.hash)] += 1;
        }
        let mut begin = 0;
        for end in &mut ends {
            begin += std::mem::replace(end, begin);
        }
        // … and, once each has been put where its shard's next goes, where they end.
        let mut sorted = vec![Visitor { number: 0, hash: 0 }; count];
        for visitor in unsorted {
            let end = &mut ends[self.place(visitor.hash)];
            sorted[*end as usize] = visitor;
            *end += 1;
        }
        let mut begin = 0;
        for (shard, end) in self.shards.iter().zip(ends) {
            let end = end as usize;
            if begin < end {
                each(&mut shard.lock(), &sorted[begin..end]);
            }
            begin = end;
        }
    }

    /// Every shard in turn, locked one at a time.
    pub(super) fn shards(&self) -> impl Iterator<Item = MutexGuard<'_, Shard>> {
        self.shards.iter().map(|shard| shard.lock())
    }
}

/// Fewer keys than this are brought one by one.
const FEW: usize = 8;

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
        let bytes = size_of::<Named>();
        assert!(bytes <= 176, "{bytes} bytes a block");
    }

    fn key(n: u64) -> BlockKey {
        let mut hash = [7; 32];
        hash[8..16].copy_from_slice(&n.to_le_bytes());
        BlockKey {
            namespace: kvproto::NamespaceId([1; 16]),
            hash: kvproto::SequenceHash(hash),
            part: kvproto::Part::default(),
        }
    }

    #[test]
    fn a_visit_brings_every_key_to_its_own_shard_once() {
        for count in [0, 1, FEW - 1, FEW, 100, 1000] {
            for shards in [1, 16, 4096] {
                let index = Index::new(shards, 16, 5);
                let mut seen = vec![0; count];
                let mut visits = 0;
                let key_of = |n| key(n as u64);
                index.visit(count, key_of, |shard, visitors| {
                    visits += 1;
                    for visitor in visitors {
                        seen[visitor.number as usize] += 1;
                        let key = key(visitor.number.into());
                        assert!(shard.visited(*visitor, &key).is_none());
                        shard.entry(&key, || Entry {
                            ram: None,
                            length_bytes: 0,
                            pins: 0,
                            below: TierSet::EMPTY,
                            kind: Kind::Kv,
                            uses: 0,
                            gone: None,
                            seal: 0,
                            place: kvproto::Chain::from_root(vec![key.hash]).place(0, 1),
                        });
                    }
                });
                assert!(seen.iter().all(|times| *times == 1));
                assert!(visits <= count.min(shards).max(count.min(FEW)) || count < shards);
                // Whoever comes alone finds what was left there.
                assert!((0..count).all(|n| index.shard(&key_of(n)).get(&key_of(n)).is_some()));
            }
        }
    }

    #[test]
    fn keys_that_differ_in_one_word_spread_over_shards() {
        let index = Index::new(64, 16, 5);
        let mut held = vec![0_u32; 64];
        for n in 0..6400 {
            held[index.place(index.hasher.hash(&key(n)))] += 1;
        }
        assert!(
            held.iter().all(|held| (50..=160).contains(held)),
            "{held:?}"
        );
    }
}
