//! Making room in RAM: charge the budget, take a slot, evict what must go.
//!
//! ```text
//! charge ──short──► victim of a donor kind ─► charge again …      slot ──none──► victim ─► slot again …
//!                                                                        └─ still none ─► clear one stretch
//! ```
//!
//! A candidate is refused while a lease pins it, and while anybody reads its bytes: evicting those frees nothing.
//! Bounds: the slot loop gives up after evicting [`CRUMBS`] times what it needs; then the contents of at most
//! one stretch of the largest slot's size are given up, wherever policy would rather look.
//! Errors: `TooLarge`, `Budget` (the kind's ceiling, all of it in use), `NoSlot`.

use std::collections::HashMap;

use kvgpu::{DomainId, MAX_SLOT_BYTES, SlotMut};
use kvproto::{Kind, Reason, TierKind};

use super::{
    Change, Engine,
    budget::{Charge, slot_bytes},
    policy::BlockId,
    ram::{OWN_REFERENCES, Ram},
};
use crate::tier::BlockRef;

/// How many times the bytes needed may be evicted in crumbs before a whole stretch is cleared instead.
const CRUMBS: u64 = 4;

impl Engine {
    pub(super) fn room(&self, kind: Kind, length_bytes: u64) -> Result<(SlotMut, Charge), Reason> {
        let bytes = slot_bytes(length_bytes);
        let ceiling = match kind {
            Kind::Kv => self.config.kv.ceiling_bytes,
            Kind::Checkpoint => self.config.checkpoint.ceiling_bytes,
        };
        if length_bytes == 0 || length_bytes > MAX_SLOT_BYTES as u64 || bytes > ceiling {
            return Err(Reason::TooLarge);
        }
        let length = length_bytes as usize;
        if let Ok(charge) = self.budget.charge(kind, bytes)
            && let Some(slot) = self.arena.alloc(DomainId::NODE, length)
        {
            return Ok((slot, charge));
        }
        let mut ram = self.ram.lock();
        let charge = self.charge_by_evicting(&mut ram, kind, bytes)?;
        let slot = self
            .slot_by_evicting(&mut ram, kind, length)
            .ok_or(Reason::NoSlot)?;
        Ok((slot, charge))
    }

    fn charge_by_evicting(&self, ram: &mut Ram, kind: Kind, bytes: u64) -> Result<Charge, Reason> {
        loop {
            let short = match self.budget.charge(kind, bytes) {
                Ok(charge) => return Ok(charge),
                Err(short) => short,
            };
            let donors = short.donors.into_iter().flatten();
            if !donors
                .into_iter()
                .any(|donor| self.evict(ram, donor).is_some())
            {
                return Err(if short.ceiling {
                    Reason::Budget
                } else {
                    Reason::NoSlot
                });
            }
        }
    }

    /// The budget allows it, so the other kind is within its rights and only this kind's blocks make way.
    fn slot_by_evicting(&self, ram: &mut Ram, kind: Kind, length: usize) -> Option<SlotMut> {
        let mut left = slot_bytes(length as u64).saturating_mul(CRUMBS);
        loop {
            if let Some(slot) = self.arena.alloc(DomainId::NODE, length) {
                return Some(slot);
            }
            if left == 0 {
                break;
            }
            match self.evict(ram, kind) {
                Some(freed) => left = left.saturating_sub(freed),
                None => break,
            }
        }
        self.clear_a_stretch(ram, kind, length)
    }

    /// Gives up the slots that the arena says are in the way, if all of them are blocks that may go. Looks at every
    /// block in RAM once, for when all else has failed.
    fn clear_a_stretch(&self, ram: &mut Ram, kind: Kind, length: usize) -> Option<SlotMut> {
        let lying: HashMap<(u32, u64), BlockId> = ram
            .blocks()
            .filter_map(|(id, block)| block.location().map(|at| ((at.segment, at.offset), id)))
            .collect();
        for clearing in self.arena.clearings(DomainId::NODE, length) {
            let at = |offset: &u64| lying.get(&(clearing.segment, *offset)).copied();
            let Some(ids) = clearing
                .offsets
                .iter()
                .map(at)
                .collect::<Option<Vec<BlockId>>>()
            else {
                continue;
            };
            if !ids.iter().all(|id| {
                ram.block(*id)
                    .is_some_and(|block| self.may_clear(block, kind))
            }) {
                continue;
            }
            ids.into_iter().for_each(|id| self.clear(ram, kind, id));
            if let Some(slot) = self.arena.alloc(DomainId::NODE, length) {
                return Some(slot);
            }
        }
        None
    }

    /// Evicts one block of that kind, in the policy's order; how many bytes that freed.
    fn evict(&self, ram: &mut Ram, kind: Kind) -> Option<u64> {
        let victim = ram.victim(kind, &mut |id, block| self.take(id, block))?;
        let bytes = slot_bytes(victim.len_bytes());
        self.budget.release(kind, bytes);
        Some(bytes)
    }

    /// Takes a block out of the index unless somebody needs it; its handle ends next.
    fn take(&self, id: BlockId, block: &BlockRef) -> bool {
        if block.strong_count() > OWN_REFERENCES {
            return false;
        }
        let key = block.key();
        let mut shard = self.index.shard(key);
        let Some(entry) = shard.get_mut(key).filter(|entry| entry.pins == 0) else {
            return false;
        };
        // The entry may have lost this very block to an invalidation that has yet to end the handle.
        if entry.ram.take_if(|held| held.id == id).is_none() {
            return false;
        }
        self.tell(key, entry, Change::Removed(Reason::Evicted), TierKind::Ram);
        shard.settle(key, Reason::Evicted);
        true
    }

    fn may_clear(&self, block: &BlockRef, kind: Kind) -> bool {
        let shard = self.index.shard(block.key());
        shard.get(block.key()).is_some_and(|entry| {
            entry.pins == 0 && entry.kind == kind && block.strong_count() <= OWN_REFERENCES
        })
    }

    fn clear(&self, ram: &mut Ram, kind: Kind, id: BlockId) {
        let Some(block) = ram.block(id) else { return };
        let bytes = slot_bytes(block.len_bytes());
        if self.take(id, block) {
            ram.remove(kind, id);
            self.budget.release(kind, bytes);
        }
    }
}
