//! What a real node holds, as motion sees it: engine, tiers and the registry of namespaces.
//!
//! ```text
//! keep   reserve ─► slot, each page summed while it is copied ─► seal ─► publish       an ordinary block
//! read   RAM: by reference      below: read past RAM into ordinary memory, so that moving evicts nothing
//! ```
//!
//! Units: blocks, bytes. Errors: outcomes.

use std::{collections::BTreeSet, sync::Arc};

use futures_util::{FutureExt, future::BoxFuture};
use kvgpu::SlotMut;
use kvproto::{BlockKey, Kind, NamespaceId, Reason, RunHash, SequenceHash, checksum::Landing};

use super::{Holdings, Kept};
use crate::{
    blocks::{Tiers, mover::Mover, namespaces::Spaces},
    engine::{Engine, HeldBlock, HeldRun, Published, Reserve, RunKey, Whereabouts},
    peers::{Carried, Space},
    tier::{BlockRef, Read},
};

/// The holdings of a node.
pub struct NodeHoldings {
    engine: Arc<Engine>,
    tiers: Tiers,
    mover: Arc<Mover>,
    spaces: Spaces,
    max_block_bytes: u64,
}

impl NodeHoldings {
    pub(crate) fn new(
        engine: Arc<Engine>,
        tiers: Tiers,
        mover: Arc<Mover>,
        spaces: Spaces,
        max_block_bytes: u64,
    ) -> Self {
        Self {
            engine,
            tiers,
            mover,
            spaces,
            max_block_bytes,
        }
    }
}

impl Holdings for NodeHoldings {
    fn space(&self, id: &NamespaceId) -> Option<Arc<Space>> {
        self.spaces.get(id)
    }

    fn held(&self) -> Vec<HeldRun> {
        self.engine.held()
    }

    fn blocks_of(&self, runs: &BTreeSet<RunKey>) -> Vec<HeldBlock> {
        self.engine.blocks_of(runs)
    }

    fn lacks(&self, key: &BlockKey) -> bool {
        let gone = self.engine.why_gone(key);
        gone.is_some_and(|reason| reason != Reason::Invalidated)
    }

    fn moment(&self) -> u64 {
        self.engine.moment()
    }

    fn keep(&self, block: Carried, kind: Kind, began: u64, survived: &[u64]) -> Kept {
        let Carried { header, pieces } = block;
        let bytes: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if bytes != header.length_bytes || bytes == 0 {
            return Kept::Corrupt;
        }
        if bytes > self.max_block_bytes {
            return Kept::Refused(Reason::TooLarge);
        }
        let reserved = self
            .engine
            .reserve_since(header.key, header.place, bytes, kind, began);
        let mut grant = match reserved {
            Reserve::Granted(grant) => grant,
            Reserve::Present(_) => return Kept::Present,
            Reserve::Rejected { reason, .. } => return Kept::Refused(reason),
        };
        // After the reservation: what is invalidated from now on, its ticket knows.
        if self.engine.is_undone(&header.key, survived) {
            return Kept::Refused(Reason::Invalidated);
        }
        let mut landing = Landing::new(bytes);
        for piece in &pieces {
            landing.land(piece, grant.block.bytes_mut());
        }
        let sums = landing.finish(grant.block.bytes());
        let Ok(sealed) = grant.block.seal_summed(header, &sums) else {
            return Kept::Corrupt;
        };
        match self.engine.publish(sealed, grant.ticket) {
            Published::New(_) => {
                self.mover.look_for_work();
                Kept::New
            }
            Published::Twin(_) => Kept::Present,
            Published::Invalidated => Kept::Refused(Reason::Invalidated),
        }
    }

    fn survived(&self, namespace: &NamespaceId, hashes: &[SequenceHash]) -> Vec<u64> {
        self.engine.survived(*namespace, hashes)
    }

    fn was_invalidated(&self, key: &BlockKey) -> bool {
        self.engine.why_gone(key) == Some(Reason::Invalidated)
    }

    fn read(&self, block: &HeldBlock) -> BoxFuture<'static, Option<Carried>> {
        let below = match self.engine.peek(&block.key) {
            Whereabouts::Ram(block) => {
                return std::future::ready(Some(carried(&block))).boxed();
            }
            Whereabouts::Gone(_) => return std::future::ready(None).boxed(),
            Whereabouts::Below(below) => below,
        };
        let Some(tier) = self.tiers.get(below.tier).cloned() else {
            return std::future::ready(None).boxed();
        };
        let Ok(length) = usize::try_from(below.resident.length_bytes) else {
            return std::future::ready(None).boxed();
        };
        async move {
            match tier.read(below.resident, SlotMut::heap(length)).await {
                Read::Hit(block) => Some(carried(&block.share())),
                Read::Gone(_) | Read::Busy => None,
            }
        }
        .boxed()
    }

    fn first_to_go(&self, keys: &[BlockKey]) {
        self.engine.first_to_go(keys);
        self.tiers.iter().for_each(|tier| tier.first_to_go(keys));
    }

    fn going(&self) -> Vec<(BlockKey, RunHash)> {
        let mut going = self.engine.going();
        for tier in self.tiers.iter() {
            let below = tier.going().into_iter();
            going.extend(below.map(|resident| (resident.key, resident.place.run)));
        }
        going
    }

    fn stays(&self, keys: &[BlockKey]) {
        self.engine.stays(keys);
        self.tiers.iter().for_each(|tier| tier.stays(keys));
    }
}

/// A block by reference: its slot lives as long as the slices do.
pub(crate) fn carried(block: &BlockRef) -> Carried {
    let length = usize::try_from(block.len_bytes()).unwrap_or(usize::MAX);
    Carried {
        header: block.header().clone(),
        pieces: vec![block.slice(0..length)],
    }
}
