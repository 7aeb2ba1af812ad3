//! What the engine is told by, and tells, the tiers below RAM.
//!
//! ```text
//! demotable ─► tier write ─► stored (true: it counts; false: it was invalidated, remove it again)
//! tier read fails, or a tier drops something ─► lost        tier wants room ─► keep?
//! start ─► residents ─► recover
//! ```
//!
//! Whoever writes a block to a tier keeps its `BlockRef` until it has called `stored`: RAM does not evict what
//! somebody reads, so the entry is still there unless it was invalidated.

use std::{cmp::Reverse, collections::HashMap};

use kvproto::{BlockKey, Kind, Reason, TierKind};

use super::{Change, Demotion, Engine, TierSet, index::Entry, policy::BlockId};
use crate::tier::{BlockRef, ReclaimGuard, Resident};

/// Blocks that one call looks at: the coldest that are all below already need no second copy.
const LOOK_AHEAD: usize = 1024;

impl Engine {
    /// Blocks that are in RAM alone and would be lost soonest, coldest first, up to so many bytes; those that the
    /// configured demotion admits.
    pub fn demotable(&self, max_bytes: u64) -> Vec<BlockRef> {
        let ram = self.ram.lock();
        let mut chosen = Vec::new();
        let mut bytes = 0;
        let mut coldest = Vec::new();
        for kind in Kind::ALL {
            coldest.clear();
            ram.policy(*kind).coldest(LOOK_AHEAD, &mut coldest);
            // What lies elsewhere too is not worth a write.
            let stay = coldest.iter().filter(|id| !ram.is_going(*kind, **id));
            for block in stay.filter_map(|id| ram.block(*id)) {
                if !self.should_demote(block) {
                    continue;
                }
                bytes += block.len_bytes();
                // One block larger than the whole budget goes alone; it must not stop all others for good.
                if bytes > max_bytes && !chosen.is_empty() {
                    return chosen;
                }
                chosen.push(block.clone());
            }
        }
        chosen
    }

    /// Every block that is in RAM alone, most valuable first: what a policy parks out of danger (heads of chains),
    /// then its own order from the warm end, each after those of its chain that it is nothing without. KV blocks
    /// before checkpoint chunks, which the origin has.
    #[must_use]
    pub fn only_in_ram(&self) -> Vec<BlockRef> {
        let ram = self.ram.lock();
        let mut chosen = Vec::new();
        for kind in Kind::ALL {
            let policy = ram.policy(*kind);
            let mut ids = Vec::with_capacity(policy.len());
            policy.coldest(policy.len(), &mut ids);
            let rank: HashMap<BlockId, usize> =
                ids.iter().enumerate().map(|(n, id)| (*id, n)).collect();
            let mut blocks: Vec<(usize, &BlockRef)> = ram
                .blocks()
                .filter(|(_, block)| self.is_only_in_ram(block, *kind))
                .map(|(id, block)| (rank.get(&id).copied().unwrap_or(usize::MAX), block))
                .collect();
            blocks.sort_by_key(|(rank, block)| (Reverse(*rank), block.place().index));
            chosen.extend(heads_first(blocks.into_iter().map(|(_, block)| block)));
        }
        chosen
    }

    fn is_only_in_ram(&self, block: &BlockRef, kind: Kind) -> bool {
        let shard = self.index.shard(block.key());
        shard.get(block.key()).is_some_and(|entry| {
            entry.kind == kind && entry.ram.is_some() && entry.below.is_empty()
        })
    }

    fn should_demote(&self, block: &BlockRef) -> bool {
        let shard = self.index.shard(block.key());
        shard.get(block.key()).is_some_and(|entry| {
            entry.below.is_empty()
                && match self.config.demotion {
                    Demotion::Open => true,
                    Demotion::Reuse => entry.uses > 0,
                }
        })
    }

    /// Whether any tier has the block; leaves no trace in the policy.
    #[must_use]
    pub fn is_present(&self, key: &BlockKey) -> bool {
        self.index
            .shard(key)
            .get(key)
            .is_some_and(Entry::is_present)
    }

    /// Whether that tier below RAM has the block, as far as the index knows.
    #[must_use]
    pub fn is_held(&self, key: &BlockKey, tier: TierKind) -> bool {
        self.index
            .shard(key)
            .get(key)
            .is_some_and(|entry| entry.below.contains(tier))
    }

    /// Whether any lease holds the block.
    #[must_use]
    pub fn is_pinned(&self, key: &BlockKey) -> bool {
        self.index
            .shard(key)
            .get(key)
            .is_some_and(|entry| entry.pins > 0)
    }

    /// The moment at which work begins that [`Engine::stored`] will end.
    #[must_use]
    pub fn moment(&self) -> u64 {
        self.fences.now()
    }

    /// A lower tier has the block now, by a write that began at `began` (see [`Engine::moment`]). False if it was
    /// invalidated since: the caller removes it from the tier again, even if the same key was put anew.
    #[must_use = "what was invalidated must leave the tier again"]
    pub fn stored(&self, key: &BlockKey, tier: TierKind, began: u64) -> bool {
        let mut shard = self.index.shard(key);
        if self.fences.outlaw(key, began) {
            return false;
        }
        let Some(entry) = shard.get_mut(key).filter(|entry| entry.is_present()) else {
            return false;
        };
        if entry.below.insert(tier) {
            self.tell(key, entry, Change::Stored, tier);
        }
        true
    }

    /// A lower tier has the block no longer.
    pub fn lost(&self, key: &BlockKey, tier: TierKind, reason: Reason) {
        let mut shard = self.index.shard(key);
        let Some(entry) = shard.get_mut(key) else {
            return;
        };
        if entry.below.remove(tier) {
            self.tell(key, entry, Change::Removed(reason), tier);
            shard.settle(key, reason);
        }
    }

    /// What a tier proved to hold when it was opened.
    pub fn recover(&self, tier: TierKind, residents: Vec<Resident>, kind: Kind) {
        for resident in residents {
            let key = resident.key;
            let mut shard = self.index.shard(&key);
            let entry = shard.entry(&key, || Entry {
                place: resident.place,
                length_bytes: resident.length_bytes,
                seal: resident.seal,
                ram: None,
                pins: 0,
                below: TierSet::EMPTY,
                kind,
                uses: 0,
                gone: None,
            });
            if entry.below.insert(tier) {
                self.tell(&key, entry, Change::Stored, tier);
            }
        }
    }
}

/// The same blocks, each right behind those of its ancestors that have not come yet.
fn heads_first<'a>(blocks: impl Iterator<Item = &'a BlockRef>) -> Vec<BlockRef> {
    let blocks: Vec<&BlockRef> = blocks.collect();
    let mut waiting: HashMap<&BlockKey, &BlockRef> =
        blocks.iter().map(|block| (block.key(), *block)).collect();
    let mut ordered = Vec::with_capacity(blocks.len());
    let mut path = Vec::new();
    for block in blocks {
        let mut next = waiting.remove(block.key());
        while let Some(block) = next {
            path.push(block);
            next = block.place().parent.and_then(|hash| {
                let parent = BlockKey {
                    hash,
                    ..*block.key()
                };
                waiting.remove(&parent)
            });
        }
        ordered.extend(path.drain(..).rev().cloned());
    }
    ordered
}

impl ReclaimGuard for Engine {
    /// Leased blocks stay; any other is forgotten in this moment. Only the NVMe tier drops blocks to make room.
    fn keep(&self, key: &BlockKey) -> bool {
        let mut shard = self.index.shard(key);
        let Some(entry) = shard.get_mut(key) else {
            return false;
        };
        if entry.pins > 0 {
            return true;
        }
        if entry.below.remove(TierKind::Nvme) {
            self.tell(key, entry, Change::Removed(Reason::Evicted), TierKind::Nvme);
            shard.settle(key, Reason::Evicted);
        }
        false
    }
}
