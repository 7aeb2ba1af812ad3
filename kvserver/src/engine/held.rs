//! What lies here, by run; and what may go first because it lies elsewhere too.
//!
//! ```text
//! held      every shard in turn ─► runs: blocks, bytes, heat
//! blocks_of some of those runs  ─► their blocks
//! first_to_go  blocks ─► given up before the policy is asked, unless somebody leases, reads or touches them
//! ```
//!
//! A run is what an index entry's place says; who owns it is not known here, nor why anybody asks.
//! Cost: each listing visits the whole index, one shard at a time. Units: blocks, bytes. Errors: none.

use std::collections::{BTreeMap, BTreeSet};

use kvproto::{BlockKey, Kind, NamespaceId, Place, Reason, RunHash};

use super::{Engine, Reserve, Whereabouts, budget::slot_of, policy::BlockId, ram::Ram};
use crate::tier::Resident;

/// A run of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunKey {
    /// Whose.
    pub namespace: NamespaceId,
    /// Which.
    pub run: RunHash,
}

/// What lies here of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldRun {
    /// Which.
    pub key: RunKey,
    /// Its blocks here, parts counted.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How often its most wanted block was found, up to 255, and 256 more while it is in RAM: greater is hotter.
    pub heat: u32,
}

/// One block that lies here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldBlock {
    /// Which.
    pub key: BlockKey,
    /// Where in its chain.
    pub place: Place,
    /// How long.
    pub length_bytes: u64,
    /// Whose budget it draws on.
    pub kind: Kind,
}

/// Heat of whatever is in RAM above what is not.
const RAM_HEAT: u32 = 256;

impl Engine {
    /// Every run of which a block lies here, in the order of their keys.
    #[must_use]
    pub fn held(&self) -> Vec<HeldRun> {
        let mut runs: BTreeMap<RunKey, HeldRun> = BTreeMap::new();
        for shard in self.index.shards() {
            for (key, entry) in shard.iter().filter(|(_, entry)| entry.is_present()) {
                let run = RunKey {
                    namespace: key.namespace,
                    run: entry.place.run,
                };
                let held = runs.entry(run).or_insert(HeldRun {
                    key: run,
                    blocks: 0,
                    bytes: 0,
                    heat: 0,
                });
                held.blocks += 1;
                held.bytes += entry.length_bytes;
                let in_ram = if entry.ram.is_some() { RAM_HEAT } else { 0 };
                held.heat = held.heat.max(u32::from(entry.uses) + in_ram);
            }
        }
        runs.into_values().collect()
    }

    /// The blocks here of some runs, those of one run together, root side first.
    #[must_use]
    pub fn blocks_of(&self, runs: &BTreeSet<RunKey>) -> Vec<HeldBlock> {
        let mut blocks = Vec::new();
        for shard in self.index.shards() {
            let held = shard.iter().filter(|(key, entry)| {
                let run = RunKey {
                    namespace: key.namespace,
                    run: entry.place.run,
                };
                entry.is_present() && runs.contains(&run)
            });
            blocks.extend(held.map(|(key, entry)| HeldBlock {
                key: *key,
                place: entry.place,
                length_bytes: entry.length_bytes,
                kind: entry.kind,
            }));
        }
        let order = |block: &HeldBlock| {
            let HeldBlock { key, place, .. } = block;
            (key.namespace, place.run, place.index, key.hash, key.part)
        };
        blocks.sort_by_key(order);
        blocks
    }

    /// Where a block's bytes are, without leaving a trace in policy or counts.
    #[must_use]
    pub fn peek(&self, key: &BlockKey) -> Whereabouts {
        self.find(key, false).0
    }

    /// What a tier below RAM is to be asked for.
    #[must_use]
    pub fn resident(&self, key: &BlockKey) -> Option<Resident> {
        let shard = self.index.shard(key);
        let entry = shard.get(key).filter(|entry| entry.is_present())?;
        Some(entry.resident(key))
    }

    /// Why a block is not here; `None` while it is.
    #[must_use]
    pub fn why_gone(&self, key: &BlockKey) -> Option<Reason> {
        let shard = self.index.shard(key);
        let is_here = shard.get(key).is_some_and(super::index::Entry::is_present);
        (!is_here).then(|| shard.why_gone(key))
    }

    /// As [`Engine::reserve`], for work that began at `began` (see [`Engine::moment`]): what was invalidated since then
    /// is not brought back by it.
    pub fn reserve_since(
        &self,
        key: BlockKey,
        place: Place,
        length_bytes: u64,
        kind: Kind,
        began: u64,
    ) -> Reserve {
        let mut reserved = self.reserve(key, place, length_bytes, kind);
        if let Reserve::Granted(grant) = &mut reserved {
            grant.ticket.began = grant.ticket.began.min(began);
        }
        reserved
    }

    /// Blocks in RAM that may go before any other, because they lie elsewhere too. A lease still holds what it holds,
    /// and who is asked for again is an ordinary block again.
    pub fn first_to_go(&self, keys: &[BlockKey]) {
        self.each_in_ram(keys, Ram::first_to_go);
    }

    /// Those of them that nobody has asked for since, and their runs.
    #[must_use]
    pub fn going(&self) -> Vec<(BlockKey, RunHash)> {
        let ram = self.ram.lock();
        let going = ram.going().filter_map(|id| ram.block(id));
        going
            .map(|block| (*block.key(), block.header().place.run))
            .collect()
    }

    /// These go in their turn again, as any other.
    pub fn stays(&self, keys: &[BlockKey]) {
        self.each_in_ram(keys, Ram::stays);
    }

    /// Those of the blocks that lie in RAM, by their policy's slot and their handle.
    fn each_in_ram(&self, keys: &[BlockKey], mut then: impl FnMut(&mut Ram, usize, BlockId)) {
        let mut ram = self.ram.lock();
        for key in keys {
            let found = {
                let shard = self.index.shard(key);
                shard
                    .get(key)
                    .and_then(|entry| Some((entry.kind, entry.ram.as_ref()?.id)))
            };
            if let Some((kind, id)) = found {
                then(&mut ram, slot_of(kind), id);
            }
        }
    }
}
