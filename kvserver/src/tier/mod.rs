//! Where bytes rest: blocks as types, and the stores below RAM behind one trait.
//!
//! ```text
//!   engine ──(where?)──► mover ──► Tier::write(BlockRef…) ──► Stored | Synced | Rejected{reason}
//!                          │  ◄──  Tier::read(Resident, SlotMut) = Hit | Gone(reason) | Busy
//!                          ▼
//!            ┌─────────────┴──────────────┐
//!        NvmeTier  (droppable)        DurableTier  (durable)
//!        foyer's block engine         one synced file per block
//!        + journal of residency       never evicted
//!            └── record.rs: one stored form for both ──┘
//! ```
//!
//! Shape: a tier knows blocks by [`BlockKey`]; what it holds it can list ([`Tier::residents`]), and
//! that list is how the engine's index comes back after a restart. Units: bytes, milliseconds.
//!
//! Promises, checked by [`conformance`] over every tier:
//! * `Stored` is said only of a block that is really on the medium and survives `kill -9`; `Synced`
//!   only of one that survives power loss. Everything else is `Rejected` with its reason.
//! * A read is verified against the resident's seal, page by page, before anyone sees it. A flipped bit
//!   is [`Read::Gone`], never a wrong byte.
//! * What was removed stays gone, also after `kill -9`, also when it was still being written.
//! * Before a droppable tier forgets a resident to make room it asks the [`ReclaimGuard`].
//! * Every queue has a bound and every call ends: a slow or broken device is an answer.
//!
//! Why the trait knows nothing of tokens, leases or policy: those belong to the engine, which must not
//! wait for a disk, and a tier that knew them could not be replaced.

pub mod block;
#[doc(hidden)]
pub mod conformance;
pub mod durable;
pub mod fault;
mod gate;
mod health;
pub mod journal;
mod land;
pub mod nvme;
pub mod record;
mod threads;

use std::{future::Future, io, pin::Pin};

use kvgpu::SlotMut;
use kvproto::{BlockKey, NamespaceId, Place, Reason, TierKind};
use tokio::runtime::Handle;

use crate::clock::Clock;

pub use self::{
    block::{BlockRef, MutableBlock, SealError, SealedBlock, Unsealed},
    durable::{DurableConfig, DurableError, DurableTier},
    fault::{Fault, Faults, FaultyTier},
    nvme::{NvmeConfig, NvmeError, NvmeTier},
};

/// A future that a tier answers with; owns all it needs.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Whether a tier may lose a block by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// A cache: it may refuse, and it makes room by dropping.
    Droppable,
    /// Keeps what it took until it is told to remove it.
    Durable,
}

/// What became of a block that was given to a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// On the medium, listed among the residents, there after `kill -9`.
    Stored,
    /// As `Stored`, and there after power loss.
    Synced,
    /// Not taken; the block is where it was before.
    Rejected {
        /// Why.
        reason: Reason,
        /// When to try again, at the earliest; 0 when trying again will not help.
        retry_after_ms: u32,
    },
}

impl WriteOutcome {
    /// Whether the tier holds the block now.
    #[must_use]
    pub fn is_held(self) -> bool {
        matches!(self, Self::Stored | Self::Synced)
    }
}

/// What a read found.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "a hit is the rule, and moving it beats boxing it"
)]
pub enum Read {
    /// The block, verified, in the slot that was supplied.
    Hit(SealedBlock),
    /// Not to be had; the slot is free again. `Corrupt`, `Evicted` and `Invalidated` are for good;
    /// `Device` and `TierDown` may pass.
    Gone(Reason),
    /// Too many reads are waiting already; the slot is free again. Try later.
    Busy,
}

/// One block that a tier holds: enough to find it, place it in its chain and know it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Resident {
    /// Who.
    pub key: BlockKey,
    /// Where in its chain.
    pub place: Place,
    /// How many bytes.
    pub length_bytes: u64,
    /// The checksum over key, place, length and page sums; what a read must find.
    pub seal: u64,
}

impl Resident {
    /// The entry for this block.
    #[must_use]
    pub fn of(block: &BlockRef) -> Self {
        let header = block.header();
        Self {
            key: header.key,
            place: header.place,
            length_bytes: header.length_bytes,
            seal: header.seal,
        }
    }
}

/// How a tier is, for people, metrics and the mover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierStatus {
    /// How many bytes of blocks it is meant to hold.
    pub capacity_bytes: u64,
    /// Bytes of the blocks it holds now.
    pub used_bytes: u64,
    /// How many blocks it holds now.
    pub blocks: u64,
    /// `false`: it has failed too often, answers `TierDown`, and tries itself again by and by.
    pub in_service: bool,
    /// One line for people: how it was set up, and what is wrong if something is. May be empty.
    pub note: String,
    /// Bytes that were accepted and are not yet on the medium.
    pub queued_bytes: u64,
    /// Bytes written since midnight UTC, restarts included.
    pub written_bytes_today: u64,
    /// Blocks refused or lost since the tier was opened, by reason; reasons that never occurred are
    /// left out.
    pub drops: Vec<(Reason, u64)>,
}

/// A place below RAM where blocks rest.
///
/// Futures own what they need and may be dropped at any time: a dropped write may still happen, a
/// dropped read frees its slot.
pub trait Tier: Send + Sync + 'static {
    /// Which tier this is.
    fn kind(&self) -> TierKind;

    /// Whether it may drop blocks by itself.
    fn durability(&self) -> Durability;

    /// Stores blocks; one outcome per block, in order, each only after it is really there. A block that
    /// is already held is not written again.
    fn write(&self, blocks: Vec<BlockRef>) -> BoxFuture<'static, Vec<WriteOutcome>>;

    /// Reads a block into the beginning of `into` and verifies it against `resident.seal`.
    fn read(&self, resident: Resident, into: SlotMut) -> BoxFuture<'static, Read>;

    /// Removes blocks for good: when it returns `Ok`, they stay gone after `kill -9`, writes still
    /// under way included. They are gone from this moment on even when it fails; an error means that
    /// they may come back after a restart. Unknown keys are no error. A block put again later is
    /// present again.
    fn remove(&self, keys: &[BlockKey]) -> BoxFuture<'static, io::Result<()>>;

    /// As [`Tier::remove`], for every block of a namespace, writes under way included.
    fn remove_namespace(&self, namespace: NamespaceId) -> BoxFuture<'static, io::Result<()>> {
        let residents = self.residents().into_iter();
        let keys: Vec<BlockKey> = residents
            .map(|held| held.key)
            .filter(|key| key.namespace == namespace)
            .collect();
        self.remove(&keys)
    }

    /// Blocks that lie elsewhere too: whoever makes room by dropping may drop them before others. Unknown keys are no
    /// error, and a block that is read is an ordinary one again.
    fn first_to_go(&self, keys: &[BlockKey]) {
        let _ = keys;
    }

    /// Those that were said to, and are here and were not read since.
    fn going(&self) -> Vec<Resident> {
        Vec::new()
    }

    /// Blocks that are ordinary ones again.
    fn stays(&self, keys: &[BlockKey]) {
        let _ = keys;
    }

    /// What it holds, in no order.
    fn residents(&self) -> Vec<Resident>;

    /// How it is.
    fn status(&self) -> TierStatus;

    /// Finishes what is under way and lets go of the medium; every later call is answered `TierDown`.
    fn close(&self) -> BoxFuture<'static, ()>;
}

/// Runs a write of `count` blocks as a task of its own, so that a caller who goes away leaves none half
/// accounted for.
fn owned_write(
    tasks: &Handle,
    count: usize,
    write: impl Future<Output = Vec<WriteOutcome>> + Send + 'static,
) -> BoxFuture<'static, Vec<WriteOutcome>> {
    let task = tasks.spawn(write);
    Box::pin(async move {
        let down = WriteOutcome::Rejected {
            reason: Reason::TierDown,
            retry_after_ms: 0,
        };
        task.await.unwrap_or_else(|_| vec![down; count])
    })
}

/// Length of the days by which tiers count what they write.
const DAY_MS: u64 = 86_400_000;

/// The day since 1970, UTC.
fn unix_day(clock: &dyn Clock) -> u32 {
    (clock.unix_ms() / DAY_MS) as u32
}

/// Who is asked before a tier drops a resident to make room. The engine implements it.
///
/// Called from a tier's background work: it must be quick and must not call the tier.
pub trait ReclaimGuard: Send + Sync + 'static {
    /// `true`: leased or pinned, carry it over. `false`: it is forgotten in this very moment, so the
    /// callee drops its own entry too.
    fn keep(&self, key: &BlockKey) -> bool;
}

/// A guard that lets everything go.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeepNothing;

impl ReclaimGuard for KeepNothing {
    fn keep(&self, _: &BlockKey) -> bool {
        false
    }
}
