//! Residents that lie elsewhere too: which extents they fill.
//!
//! ```text
//! first_to_go ─► going ── a read, a removal, a reclaim, stays ──► not any more
//!                  └─ by position ─► bytes per extent ─► Going picks the fullest, if at least half of it is
//! ```
//!
//! foyer gives up whole extents, and asks its pickers which. So a block that may go does not go alone: the extent goes of
//! which most may, or is dead already by foyer's own count, and what else lies in it goes with it or is carried over, as
//! the guard says. Below half of an extent the price is more than the gain, and the oldest goes as ever: its marked blocks
//! with it.
//!
//! Positions are hints: what is not known to lie in an extent is not counted there. Marks are not kept over a restart.
//! Units: bytes. Errors: none. Locks: foyer's own, then the tier's state; nobody takes them the other way round.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use foyer::{EvictionInfo, EvictionPicker};

use super::{super::super::Resident, Residency};

/// Part of an extent that must be of no use before it goes out of its turn.
const LEAST: f64 = 0.5;

impl Residency {
    /// These lie elsewhere too; who is no resident is passed over.
    pub(in crate::tier::nvme) fn first_to_go(&self, hashes: impl IntoIterator<Item = u64>) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let held = hashes
            .into_iter()
            .filter(|hash| state.residents.contains_key(hash));
        state.going.extend(held);
    }

    /// Those of them that are still residents.
    pub(in crate::tier::nvme) fn going(&self) -> Vec<Resident> {
        let state = self.state.lock();
        let going = state.going.iter();
        going
            .filter_map(|hash| state.residents.get(hash).copied())
            .collect()
    }

    /// These go with what lies around them, as any other.
    pub(in crate::tier::nvme) fn stays(&self, hashes: impl IntoIterator<Item = u64>) {
        let mut state = self.state.lock();
        for hash in hashes {
            state.going.remove(&hash);
        }
    }

    /// Bytes of such residents, by the extent in which they are believed to lie.
    fn going_bytes(&self) -> HashMap<u32, u64> {
        let state = self.state.lock();
        let mut bytes: HashMap<u32, u64> = HashMap::new();
        for hash in &state.going {
            if let (Some(resident), Some(position)) =
                (state.residents.get(hash), state.positions.get(hash))
            {
                *bytes.entry(position.extent).or_default() += resident.length_bytes;
            }
        }
        bytes
    }
}

/// Picks the extent of which most lies elsewhere too.
pub(in crate::tier::nvme) struct Going {
    residency: Arc<Residency>,
    extent_bytes: u64,
}

impl Going {
    pub(in crate::tier::nvme) fn new(residency: Arc<Residency>, extent_bytes: u64) -> Self {
        Self {
            residency,
            extent_bytes,
        }
    }
}

impl std::fmt::Debug for Going {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Going").finish_non_exhaustive()
    }
}

impl EvictionPicker for Going {
    fn pick(&mut self, info: EvictionInfo<'_>) -> Option<u32> {
        let going = self.residency.going_bytes();
        let useless = going
            .into_iter()
            .filter(|(extent, _)| info.evictable.contains(extent))
            .map(|(extent, bytes)| {
                let dead = info.blocks[extent as usize]
                    .statistics()
                    .invalid
                    .load(Relaxed);
                (bytes + dead as u64, extent)
            });
        let (bytes, extent) = useless.max()?;
        (bytes as f64 >= LEAST * self.extent_bytes as f64).then_some(extent)
    }

    fn on_block_evictable(&mut self, _: EvictionInfo<'_>, _: u32) {}

    fn on_block_evict(&mut self, _: EvictionInfo<'_>, _: u32) {}
}
