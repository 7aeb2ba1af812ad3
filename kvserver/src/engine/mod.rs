//! Where every block is: index, leases, budgets and policy. Synchronous; it answers *where*, others move bytes.
//!
//! ```text
//!   put      reserve ─► MutableBlock ─(bytes, seal)─► publish ─► BlockRef, visible
//!   lookup   chain × parts ─► longest prefix present, tier of each run, one lease
//!   get      locate ─► Ram(BlockRef) | Below(tier) ─(landing, tier read)─► promoted
//!   mover    demotable ─(tier write)─► stored | lost
//!
//!   index.rs  key ─► Entry     ram.rs  handle ─► block, policies     lease.rs  who pins what
//!   walk.rs   along a chain, pinning
//!   budget.rs bytes by kind    fence.rs what an invalidation outlaws  losses.rs why it is gone
//!   held.rs   what lies here, by run    forgotten.rs which invalidations, for what peers hand over
//! ```
//!
//! Invariants:
//! * a block is visible only after its bytes are whole and checked (only a `SealedBlock` is published);
//! * a block that a living lease covers is never a victim, and [`ReclaimGuard::keep`](crate::tier::ReclaimGuard::keep) holds it below;
//! * what was invalidated is not brought back by work that began before: puts are fenced by their [`Ticket`],
//!   promotions and tier writes by finding no entry; nor by a peer that was not told of it yet;
//! * bytes in RAM are charged before they are written and given back exactly once.
//!
//! Locks, outermost first: RAM (handles and policies), one shard, events or budget. The lease table's lock is
//! never held together with any of them. None is ever held across I/O: the engine does none.
//! Units: bytes, blocks, milliseconds. Errors: none but in the config; answers are types.

mod budget;
mod config;
mod domains;
mod events;
mod fence;
mod forgotten;
mod held;
mod hold;
mod index;
mod invalidate;
mod lease;
mod lookup;
mod losses;
mod lower;
mod overflow;
pub mod policy;
mod ram;
pub mod recorder;
pub mod replay;
mod room;
mod stats;
#[cfg(test)]
mod tests;
mod walk;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use kvgpu::{Arena, SlotMut};
use kvproto::{BlockKey, Kind, NamespaceId, Place, Reason, TierKind};
use parking_lot::Mutex;
use tokio::sync::broadcast;

pub use budget::{KindBudget, slot_bytes};
pub use config::{Demotion, EngineConfig, EngineConfigError};
pub use domains::Domains;
pub use events::{BlockEvent, Change};
pub use forgotten::InvalidationId;
pub use held::{HeldBlock, HeldRun, RunKey};
pub use hold::Hold;
pub use index::TierSet;
pub use invalidate::{Invalidated, Target};
pub use lease::{Cover, LeaseGrant, Owner, TenantId};
pub use lookup::{Below, LeaseAsk, LookupAnswer, LookupQuery, Whereabouts};
pub use stats::{EngineStats, KindStats, NamespaceHolding, Tally};

use self::{
    budget::{Budget, Charge},
    events::Events,
    fence::Fences,
    forgotten::Forgotten,
    index::{Entry, InRam, Index, Shard},
    lease::{LeaseTable, Limits},
    overflow::Overflow,
    policy::{BlockId, BlockMeta, EvictionPolicy},
    ram::Ram,
    stats::Counts,
};
use crate::{
    clock::Clock,
    tier::{BlockRef, MutableBlock, SealedBlock},
};

/// What work under way holds in the engine: its bytes, and when it began. Dropping it gives the bytes back.
#[derive(Debug)]
pub struct Ticket {
    /// `None` for ordinary memory outside the arena, which no budget knows.
    charge: Option<Charge>,
    kind: Kind,
    /// Fences raised later outlaw the work.
    began: u64,
}

/// A place for a block that is to be written.
#[derive(Debug)]
pub struct Grant {
    /// The block, to be filled and sealed.
    pub block: MutableBlock,
    /// To be handed in with it.
    pub ticket: Ticket,
}

/// A place for a block that is to be read from a lower tier.
#[derive(Debug)]
pub struct Landing {
    /// Where it goes.
    pub slot: SlotMut,
    /// To be handed in with it.
    pub ticket: Ticket,
}

/// Where a block that was to be written is already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presence {
    /// In RAM.
    pub ram: bool,
    /// The tiers below RAM that have it.
    pub below: TierSet,
}

/// The answer to a reservation.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "returned once and taken apart at once"
)]
pub enum Reserve {
    /// Go ahead.
    Granted(Grant),
    /// It is there already.
    Present(Presence),
    /// Not now, or not ever.
    Rejected {
        /// Why.
        reason: Reason,
        /// When to try again; 0 when trying again will not help.
        retry_after_ms: u32,
    },
}

/// What became of a block that was published.
#[derive(Debug)]
pub enum Published {
    /// It is visible now.
    New(BlockRef),
    /// A twin was first: this is the twin, and the bytes just written are gone.
    Twin(BlockRef),
    /// It was invalidated while it was written; the bytes are gone.
    Invalidated,
}

/// The engine of one node. See the module page.
pub struct Engine {
    config: EngineConfig,
    arena: Arc<Arena>,
    domains: Arc<Domains>,
    clock: Arc<dyn Clock>,
    index: Index,
    ram: Mutex<Ram>,
    leases: Mutex<LeaseTable>,
    budget: Arc<Budget>,
    fences: Fences,
    forgotten: Forgotten,
    events: Events,
    overflow: Overflow,
    /// Bytes pinned by leases, each block once. Changed under the block's shard lock.
    pinned_bytes: AtomicU64,
    /// Bytes that readers keep without a lease.
    held_bytes: AtomicU64,
    twins: AtomicU64,
    lookups: Counts,
    gets: Counts,
    removed: Counts,
    rejected: Counts,
}

impl Engine {
    /// An engine over that arena. `policy` decides about KV blocks, a fresh one of its sort about checkpoints.
    ///
    /// # Errors
    /// The first field of the config that is out of bounds.
    pub fn new(
        config: EngineConfig,
        arena: Arc<Arena>,
        policy: Box<dyn EvictionPolicy>,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>, EngineConfigError> {
        config.validate()?;
        let limits = Limits {
            max_leases: config.max_leases,
            bytes_per_owner: config.lease_bytes_per_owner,
        };
        let seed = clock.random_u64();
        Ok(Arc::new(Self {
            index: Index::new(config.shards, config.losses, seed),
            ram: Mutex::new(Ram::new(policy)),
            leases: Mutex::new(LeaseTable::new(limits)),
            budget: Budget::new(config.capacity_bytes, config.kv, config.checkpoint),
            fences: Fences::new(seed),
            forgotten: Forgotten::default(),
            events: Events::new(config.event_ring),
            overflow: Overflow::new(config.overflow_bytes),
            pinned_bytes: AtomicU64::new(0),
            held_bytes: AtomicU64::new(0),
            twins: AtomicU64::new(0),
            lookups: Counts::default(),
            gets: Counts::default(),
            removed: Counts::default(),
            rejected: Counts::default(),
            config,
            arena,
            domains: Arc::default(),
            clock,
        }))
    }

    /// Its settings.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// In whose memory the blocks of each namespace lie.
    #[must_use]
    pub fn domains(&self) -> &Arc<Domains> {
        &self.domains
    }

    /// A place for a block, made by evicting if need be; never a leased block, never the other kind's reserve.
    pub fn reserve(&self, key: BlockKey, place: Place, length_bytes: u64, kind: Kind) -> Reserve {
        if let Some(presence) = self.present_for_writing(&key) {
            return Reserve::Present(presence);
        }
        // Before room is made: an invalidation that comes in between must outlaw this put.
        let began = self.fences.now();
        match self.room(&key.namespace, kind, length_bytes) {
            Ok((slot, charge)) => Reserve::Granted(Grant {
                block: MutableBlock::new(key, place, length_bytes, slot),
                ticket: Ticket {
                    charge: Some(charge),
                    kind,
                    began,
                },
            }),
            Err(reason) => {
                self.rejected.gone(reason, 1);
                let retry_after_ms = match reason {
                    Reason::TooLarge => 0,
                    _ => self.config.retry_after_ms,
                };
                Reserve::Rejected {
                    reason,
                    retry_after_ms,
                }
            }
        }
    }

    /// A slot for a block on its way up from a lower tier. For a leased block this fails only while too much of
    /// it is out: under pressure it is ordinary memory, and the block is handed on without staying in RAM.
    pub fn landing(
        &self,
        namespace: &NamespaceId,
        length_bytes: u64,
        kind: Kind,
        leased: bool,
    ) -> Option<Landing> {
        let began = self.fences.now();
        match self.room(namespace, kind, length_bytes) {
            Ok((slot, charge)) => Some(Landing {
                slot,
                ticket: Ticket {
                    charge: Some(charge),
                    kind,
                    began,
                },
            }),
            Err(_) if leased => {
                let outside = self.overflow.take(slot_bytes(length_bytes))?;
                let length = usize::try_from(length_bytes).ok()?;
                let slot = SlotMut::heap_held(length, Box::new(outside));
                Some(Landing {
                    slot,
                    ticket: Ticket {
                        charge: None,
                        kind,
                        began,
                    },
                })
            }
            Err(reason) => {
                self.rejected.gone(reason, 1);
                None
            }
        }
    }

    /// Makes a written block visible. Of twins the first stays.
    pub fn publish(&self, block: SealedBlock, ticket: Ticket) -> Published {
        let key = block.header().key;
        let mut ram = self.ram.lock();
        let parent = self.parent(&key, &block.header().place);
        let mut shard = self.index.shard(&key);
        if self.fences.outlaw(&key, ticket.began) {
            return Published::Invalidated;
        }
        if let Some(InRam { block, id }) = shard.get(&key).and_then(|entry| entry.ram.clone()) {
            drop(shard);
            ram.touch(ticket.kind, &[id]);
            self.twins.fetch_add(1, Ordering::Relaxed);
            return Published::Twin(block);
        }
        Published::New(self.install(&mut ram, &mut shard, block.share(), ticket, parent))
    }

    /// Makes a block visible that came up from a lower tier; `None` if it was invalidated or lost meanwhile.
    pub fn promoted(&self, block: SealedBlock, ticket: Ticket) -> Option<BlockRef> {
        let key = block.header().key;
        let mut ram = self.ram.lock();
        let parent = self.parent(&key, &block.header().place);
        let mut shard = self.index.shard(&key);
        let entry = shard.get(&key).filter(|entry| entry.is_present())?;
        // A key that was invalidated and put anew is present again, perhaps with other bytes than were read.
        let header = block.header();
        if entry.seal != header.seal || entry.length_bytes != header.length_bytes {
            return None;
        }
        if let Some(InRam { block, .. }) = &entry.ram {
            return Some(block.clone());
        }
        let block = block.share();
        if ticket.charge.is_none() || block.location().is_none() {
            return Some(block);
        }
        Some(self.install(&mut ram, &mut shard, block, ticket, parent))
    }

    /// Puts a block into RAM and index. Both locks are held; the block is not in RAM yet.
    fn install(
        &self,
        ram: &mut Ram,
        shard: &mut Shard,
        block: BlockRef,
        ticket: Ticket,
        parent: Option<BlockId>,
    ) -> BlockRef {
        let header = block.header();
        let key = header.key;
        let meta = BlockMeta {
            parent,
            index: header.place.index,
            bytes: slot_bytes(header.length_bytes),
            fingerprint: self.fences.fingerprint(&key),
        };
        let entry = shard.entry(&key, || Entry {
            place: header.place,
            length_bytes: header.length_bytes,
            seal: header.seal,
            ram: None,
            pins: 0,
            below: TierSet::EMPTY,
            kind: ticket.kind,
            uses: 0,
            gone: None,
        });
        if entry.pins > 0 {
            // A pinned block that had gone comes back, perhaps in another length.
            self.pinned_bytes.fetch_add(meta.bytes, Ordering::Relaxed);
            self.pinned_bytes
                .fetch_sub(slot_bytes(entry.length_bytes), Ordering::Relaxed);
        }
        entry.place = header.place;
        entry.length_bytes = header.length_bytes;
        entry.seal = header.seal;
        entry.gone = None;
        // Whoever pays for the slot now is whom eviction will pay back.
        entry.kind = ticket.kind;
        let id = ram.insert(ticket.kind, block.clone(), &meta);
        entry.ram = Some(InRam {
            block: block.clone(),
            id,
        });
        if let Some(charge) = ticket.charge {
            charge.keep();
        }
        self.tell(&key, entry, Change::Stored, TierKind::Ram);
        block
    }

    /// The handle of a block's parent. The RAM lock is held, so it stays what it is.
    fn parent(&self, key: &BlockKey, place: &Place) -> Option<BlockId> {
        let parent = BlockKey {
            hash: place.parent?,
            ..*key
        };
        self.index
            .shard(&parent)
            .get(&parent)?
            .ram
            .as_ref()
            .map(|held| held.id)
    }

    /// Where a block to be written is already; being written again counts as a use.
    fn present_for_writing(&self, key: &BlockKey) -> Option<Presence> {
        let (presence, kind, id) = {
            let shard = self.index.shard(key);
            let entry = shard.get(key).filter(|entry| entry.is_present())?;
            let presence = Presence {
                ram: entry.ram.is_some(),
                below: entry.below,
            };
            (presence, entry.kind, entry.ram.as_ref().map(|held| held.id))
        };
        if let Some(id) = id {
            self.ram.lock().touch(kind, &[id]);
        }
        Some(presence)
    }

    /// Tells the listeners. The shard's lock is held, so the events of one block keep their order.
    fn tell(&self, key: &BlockKey, entry: &Entry, change: Change, tier: TierKind) {
        if let Change::Removed(reason) = change {
            self.removed.gone(reason, 1);
        }
        self.events.send(|sequence| BlockEvent {
            sequence,
            change,
            key: *key,
            place: entry.place,
            length_bytes: entry.length_bytes,
            tier,
            present: entry.is_present(),
        });
    }

    /// Listens to what comes and goes, from now on.
    pub fn events(&self) -> broadcast::Receiver<BlockEvent> {
        self.events.subscribe()
    }

    /// Counts and levels. Walks the shards once for the number of blocks.
    pub fn stats(&self) -> EngineStats {
        let leases = self.leases.lock().len() as u64;
        let blocks = self.index.shards().map(|shard| shard.len() as u64).sum();
        let ram = self.ram.lock();
        let kind = |kind| KindStats {
            used_bytes: self.budget.used(kind),
            blocks: ram.policy(kind).len() as u64,
        };
        EngineStats {
            lookups: self.lookups.tally(),
            gets: self.gets.tally(),
            removed: self.removed.tally(),
            rejected: self.rejected.tally(),
            blocks,
            kv: kind(Kind::Kv),
            checkpoint: kind(Kind::Checkpoint),
            capacity_bytes: self.config.capacity_bytes,
            leases,
            leased_bytes: self.pinned_bytes.load(Ordering::Relaxed),
            overflow_bytes: self.overflow.out_bytes(),
            twins: self.twins.load(Ordering::Relaxed),
            events: self.events.sequence(),
            policy: ram.policy(Kind::Kv).name(),
        }
    }
    /// What there is of each of these. Visits the whole index, one shard at a time.
    pub fn holdings(&self, of: &HashSet<NamespaceId>) -> HashMap<NamespaceId, NamespaceHolding> {
        let mut holdings: HashMap<NamespaceId, NamespaceHolding> = HashMap::new();
        for shard in self.index.shards() {
            for (key, entry) in shard.iter() {
                if entry.is_present() && of.contains(&key.namespace) {
                    let holding = holdings.entry(key.namespace).or_default();
                    holding.blocks += 1;
                    holding.bytes += entry.length_bytes;
                }
            }
        }
        holdings
    }
}
