//! Making room in RAM: charge the budget, take a slot, evict what must go.
//!
//! ```text
//! charge ──short──► victim of a donor kind ─► charge again …      slot ──none──► victim ─► slot again …
//!                                                                        └─ still none ─► clear one stretch
//! ```
//!
//! Every block lies in a segment of its tenant's domain, so only blocks of that domain can make way for it. A domain
//! that is full also claims a segment of one that has at least two more (or of any, if it has none): the blocks there
//! go, and the arena replaces the memory in its own time. Until then the claimant evicts its own, or is told to come
//! again. So tenants that all want more end up with equal numbers of segments, and one that wants less leaves the
//! rest to the others.
//! A candidate is refused while a lease pins it, and while anybody reads its bytes: evicting those frees nothing.
//! Bounds: the slot loop gives up after evicting [`CRUMBS`] times what it needs; then the contents of at most
//! one stretch of the largest slot's size are given up, wherever policy would rather look.
//! Errors: `TooLarge`, `Budget` (the kind's ceiling, all of it in use), `NoSlot`.

use std::collections::HashMap;

use kvgpu::{DomainId, MAX_SLOT_BYTES, SlotMut};
use kvproto::{Kind, NamespaceId, Reason, TierKind};

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
    pub(super) fn room(
        &self,
        namespace: &NamespaceId,
        kind: Kind,
        length_bytes: u64,
    ) -> Result<(SlotMut, Charge), Reason> {
        let domain = self.domains.of(namespace);
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
            && let Some(slot) = self.arena.alloc(domain, length)
        {
            return Ok((slot, charge));
        }
        let mut ram = self.ram.lock();
        let charge = self.charge_by_evicting(&mut ram, kind, bytes)?;
        let slot = self
            .slot_by_evicting(&mut ram, domain, kind, length)
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
                .any(|donor| self.evict(ram, donor, None).is_some())
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
    fn slot_by_evicting(
        &self,
        ram: &mut Ram,
        domain: DomainId,
        kind: Kind,
        length: usize,
    ) -> Option<SlotMut> {
        let only = (!self.domains.are_one()).then_some(domain);
        if only.is_some() {
            if let Some(slot) = self.arena.alloc(domain, length) {
                return Some(slot);
            }
            // For the next time; this block has to do with what the domain has.
            if self.claim_a_segment(ram, domain, kind, length) == 0 {
                return None;
            }
        }
        let mut left = slot_bytes(length as u64).saturating_mul(CRUMBS);
        loop {
            if let Some(slot) = self.arena.alloc(domain, length) {
                return Some(slot);
            }
            if left == 0 {
                break;
            }
            match self.evict(ram, kind, only) {
                Some(freed) => left = left.saturating_sub(freed),
                None => break,
            }
        }
        self.clear_a_stretch(ram, domain, kind, length)
    }

    /// Empties another domain's segment, if that one has more than its share, and has the arena replace it: the
    /// domain has one more a moment later. How many it has now.
    fn claim_a_segment(&self, ram: &mut Ram, domain: DomainId, kind: Kind, length: usize) -> usize {
        let segments = self.arena.segments();
        let count = |of: DomainId| segments.iter().filter(|s| s.domain == Some(of)).count();
        let own = count(domain);
        // One at a time, and what is under way may be enough.
        if self.arena.is_building() {
            return own;
        }
        let has_more = |theirs: DomainId| own == 0 || count(theirs) >= own + 2;
        let mut from: Vec<_> = segments
            .iter()
            .filter(|s| s.length_bytes >= length as u64)
            .filter(|s| {
                s.domain
                    .is_some_and(|theirs| theirs != domain && has_more(theirs))
            })
            .collect();
        if from.is_empty() {
            return own;
        }
        from.sort_by_key(|segment| segment.used_bytes);
        let mut lying: HashMap<u32, (u64, Vec<BlockId>)> = HashMap::new();
        for (id, block) in ram.blocks() {
            if let Some(at) = block.location() {
                let (bytes, ids) = lying.entry(at.segment).or_default();
                *bytes += slot_bytes(block.len_bytes());
                ids.push(id);
            }
        }
        for segment in from {
            let Some((bytes, ids)) = lying.remove(&segment.segment) else {
                continue;
            };
            let may_go = |id: &BlockId| ram.block(*id).is_some_and(|b| self.may_clear(b, kind));
            // Slots that are no blocks in RAM are being written or read: they would keep it from being empty.
            if bytes != segment.used_bytes || !ids.iter().all(may_go) {
                continue;
            }
            ids.into_iter().for_each(|id| self.clear(ram, kind, id));
            // It finds nothing yet, and by that sends the segment to be replaced.
            drop(self.arena.alloc(domain, length));
            break;
        }
        own
    }

    /// Gives up the slots that the arena says are in the way, if all of them are blocks that may go. Looks at every
    /// block in RAM once, for when all else has failed.
    fn clear_a_stretch(
        &self,
        ram: &mut Ram,
        domain: DomainId,
        kind: Kind,
        length: usize,
    ) -> Option<SlotMut> {
        let lying: HashMap<(u32, u64), BlockId> = ram
            .blocks()
            .filter_map(|(id, block)| block.location().map(|at| ((at.segment, at.offset), id)))
            .collect();
        for clearing in self.arena.clearings(domain, length) {
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
            if let Some(slot) = self.arena.alloc(domain, length) {
                return Some(slot);
            }
        }
        None
    }

    /// Evicts one block of that kind, in the policy's order, of one domain `only` if so; how many bytes that freed.
    fn evict(&self, ram: &mut Ram, kind: Kind, only: Option<DomainId>) -> Option<u64> {
        let victim = ram.victim(kind, &mut |id, block| {
            only.is_none_or(|domain| self.domains.of(&block.key().namespace) == domain)
                && self.take(id, block)
        })?;
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
