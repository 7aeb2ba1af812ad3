//! What the engine has counted, in closed sets.
//!
//! Each request is counted once, under what it met: a tier, or a reason. What was *asked* is the sum of the two
//! and is stored nowhere, so `hits by tier + gone by reason = asked` cannot fail.

use std::sync::atomic::{AtomicU64, Ordering};

use kvproto::{Reason, TierKind};

/// Members of the closed sets start at 1.
const TIERS: usize = TierKind::ALL.len() + 1;
const REASONS: usize = Reason::ALL.len() + 1;

/// How requests for blocks went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    hits: [u64; TIERS],
    gone: [u64; REASONS],
}

impl Tally {
    /// Found in that tier.
    #[must_use]
    pub fn hits(&self, tier: TierKind) -> u64 {
        self.hits[tier as usize]
    }

    /// Not to be had, for that reason; `Evicted` is the plain miss.
    #[must_use]
    pub fn gone(&self, reason: Reason) -> u64 {
        self.gone[reason as usize]
    }

    /// All requests.
    #[must_use]
    pub fn asked(&self) -> u64 {
        self.hits.iter().sum::<u64>() + self.gone.iter().sum::<u64>()
    }
}

/// A [`Tally`] in the making.
#[derive(Debug, Default)]
pub(super) struct Counts {
    hits: [AtomicU64; TIERS],
    gone: [AtomicU64; REASONS],
}

impl Counts {
    pub(super) fn hit(&self, tier: TierKind, count: u64) {
        self.hits[tier as usize].fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn gone(&self, reason: Reason, count: u64) {
        self.gone[reason as usize].fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn tally(&self) -> Tally {
        Tally {
            hits: std::array::from_fn(|i| self.hits[i].load(Ordering::Relaxed)),
            gone: std::array::from_fn(|i| self.gone[i].load(Ordering::Relaxed)),
        }
    }
}

/// One kind's part of RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindStats {
    /// Bytes of slots, those being written included.
    pub used_bytes: u64,
    /// Blocks in RAM.
    pub blocks: u64,
}

/// What there is of a namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceHolding {
    /// Blocks in the index, wherever they are.
    pub blocks: u64,
    /// Their sizes added up, each once however many tiers hold it.
    pub bytes: u64,
}

/// The engine at a glance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Blocks of chains asked for by lookups, probes included.
    pub lookups: Tally,
    /// Blocks asked for by gets.
    pub gets: Tally,
    /// Blocks that left RAM or a tier, or were refused a place: under the reason.
    pub removed: Tally,
    /// Refused puts and landings, by reason.
    pub rejected: Tally,
    /// Blocks in the index, wherever they are.
    pub blocks: u64,
    /// KV blocks in RAM.
    pub kv: KindStats,
    /// Checkpoint chunks in RAM.
    pub checkpoint: KindStats,
    /// RAM that both may share, bytes.
    pub capacity_bytes: u64,
    /// Living leases, those past their deadline and not yet swept included.
    pub leases: u64,
    /// Bytes pinned by leases, each block once.
    pub leased_bytes: u64,
    /// Bytes of leased blocks that found no slot and lie in ordinary memory.
    pub overflow_bytes: u64,
    /// Blocks written that were there already.
    pub twins: u64,
    /// Events since the engine was made.
    pub events: u64,
    /// The eviction policy.
    pub policy: &'static str,
}
