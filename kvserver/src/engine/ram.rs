//! The blocks in RAM as the policies see them: dense handles, one policy per kind.
//!
//! Locks: the engine keeps this under one lock, which is taken *before* a shard's. Handles are given out and
//! taken back only under it.

use std::collections::BTreeSet;

use kvproto::Kind;

use super::{
    budget::slot_of,
    policy::{BlockId, BlockMeta, EvictionPolicy},
};
use crate::tier::BlockRef;

/// References that the engine itself holds on a block in RAM: one here, one in the index.
pub(super) const OWN_REFERENCES: usize = 2;

/// Blocks that are first to go and that one search for a victim looks at.
const LOOK_AHEAD: usize = 64;

/// Handles and policies.
pub(super) struct Ram {
    policies: [Box<dyn EvictionPolicy>; Kind::ALL.len()],
    blocks: Vec<Option<BlockRef>>,
    free: Vec<BlockId>,
    /// Asked before the policies: blocks that lie elsewhere too.
    going: [BTreeSet<BlockId>; Kind::ALL.len()],
}

impl Ram {
    pub(super) fn new(policy: Box<dyn EvictionPolicy>) -> Self {
        let other = policy.fresh();
        Self {
            policies: [policy, other],
            blocks: Vec::new(),
            free: Vec::new(),
            going: Default::default(),
        }
    }

    pub(super) fn policy(&self, kind: Kind) -> &dyn EvictionPolicy {
        self.policies[slot_of(kind)].as_ref()
    }

    pub(super) fn touch(&mut self, kind: Kind, tail_first: &[BlockId]) {
        if !tail_first.is_empty() {
            let going = &mut self.going[slot_of(kind)];
            if !going.is_empty() {
                tail_first.iter().for_each(|id| {
                    going.remove(id);
                });
            }
            self.policies[slot_of(kind)].touched(tail_first);
        }
    }

    /// A block that goes before any that the policy would choose.
    pub(super) fn first_to_go(&mut self, slot: usize, id: BlockId) {
        self.going[slot].insert(id);
    }

    /// A block that goes in its turn again.
    pub(super) fn stays(&mut self, slot: usize, id: BlockId) {
        self.going[slot].remove(&id);
    }

    /// Blocks that go before any other.
    pub(super) fn going(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.going.iter().flatten().copied()
    }

    /// Whether a block was said to lie elsewhere too, and nobody has asked for it since.
    pub(super) fn is_going(&self, kind: Kind, id: BlockId) -> bool {
        self.going[slot_of(kind)].contains(&id)
    }

    pub(super) fn block(&self, id: BlockId) -> Option<&BlockRef> {
        self.blocks.get(id.slot())?.as_ref()
    }

    pub(super) fn blocks(&self) -> impl Iterator<Item = (BlockId, &BlockRef)> {
        let numbered = self.blocks.iter().enumerate();
        numbered.filter_map(|(n, block)| block.as_ref().map(|block| (BlockId(n as u32), block)))
    }

    /// Takes a block in under a handle of its own.
    pub(super) fn insert(&mut self, kind: Kind, block: BlockRef, meta: &BlockMeta) -> BlockId {
        let id = self.free.pop().unwrap_or(BlockId(self.blocks.len() as u32));
        if id.slot() == self.blocks.len() {
            self.blocks.push(None);
        }
        self.blocks[id.slot()] = Some(block);
        self.policies[slot_of(kind)].inserted(id, meta);
        id
    }

    /// Ends a handle; the index has let go of the block already.
    pub(super) fn remove(&mut self, kind: Kind, id: BlockId) {
        if self
            .blocks
            .get_mut(id.slot())
            .is_some_and(|block| block.take().is_some())
        {
            self.policies[slot_of(kind)].removed(id);
            self.going[slot_of(kind)].remove(&id);
            self.free.push(id);
        }
    }

    /// Asks the kind's policy for a victim; `take` decides about one candidate and takes it out of the index.
    pub(super) fn victim(
        &mut self,
        kind: Kind,
        take: &mut dyn FnMut(BlockId, &BlockRef) -> bool,
    ) -> Option<BlockRef> {
        let blocks = &self.blocks;
        let going = &self.going[slot_of(kind)];
        // Those at the front may all be leased for the moment; the policy's own order serves then.
        let first = going.iter().copied().take(LOOK_AHEAD).find(|id| {
            blocks
                .get(id.slot())
                .and_then(Option::as_ref)
                .is_some_and(|block| take(*id, block))
        });
        if let Some(id) = first {
            let block = self.blocks[id.slot()].clone();
            self.remove(kind, id);
            return block;
        }
        let policy = &mut self.policies[slot_of(kind)];
        let id = policy.victim(&mut |id| {
            blocks
                .get(id.slot())
                .and_then(Option::as_ref)
                .is_some_and(|block| take(id, block))
        })?;
        let block = self.blocks[id.slot()].clone();
        self.remove(kind, id);
        block
    }
}
