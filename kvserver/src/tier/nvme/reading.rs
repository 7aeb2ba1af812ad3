//! Reading a block: the short way where its position is known, and foyer's otherwise.
//!
//! ```text
//!   resident? ─► waiting room ─► turn (bytes) ─► position? ─► direct.rs ─ whole ─► still resident? ─► Hit
//!                                                   └ no, or not there ─► foyer ─┘
//! ```
//!
//! Units: bytes, milliseconds. Errors: reasons; three reads in a row that the device failed put the tier
//! out of service (health.rs). Only foyer's answer is believed about what is damaged, missing or
//! unreadable: a position may simply be old.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use kvgpu::SlotMut;
use kvproto::Reason;

use super::{
    Shared,
    direct::{Direct, read_entry},
    store::{Loaded, Store, hash_of},
};
use crate::tier::{Read, Resident, gate::within};

impl Shared {
    pub(super) async fn read(self: &Arc<Self>, resident: Resident, into: SlotMut) -> Read {
        if self.closed.load(Relaxed) || self.health.reads_down() {
            return Read::Gone(Reason::TierDown);
        }
        let hash = hash_of(&resident.key);
        if !self.residency.holds(hash, &resident) {
            return Read::Gone(Reason::Evicted);
        }
        let Some(_waiting) = Waiting::join(
            &self.read_waiters,
            self.config.read_queue + self.config.reads,
        ) else {
            return Read::Busy;
        };
        let deadline = Duration::from_millis(self.config.read_deadline_ms);
        match within(
            &*self.clock,
            deadline,
            self.read_in_turn(hash, resident, into),
        )
        .await
        {
            Some(read) => read,
            None => {
                self.read_failed("reads take longer than their deadline");
                Read::Gone(Reason::Device)
            }
        }
    }

    async fn read_in_turn(self: &Arc<Self>, hash: u64, resident: Resident, slot: SlotMut) -> Read {
        // Bytes bound the buffers, and a floor under them bounds the number of reads.
        let floor = self.config.read_bytes / self.config.reads as u64;
        let wanted = self.geometry.entry_bytes(resident.length_bytes).max(floor);
        let Some(_turn) = self.turns.enter(wanted).await else {
            return Read::Gone(Reason::TierDown);
        };
        let Some(store) = self.store() else {
            return Read::Gone(Reason::TierDown);
        };
        let removals = self.residency.removals();
        let loaded = {
            let _reading = self.residency.reading(hash);
            self.load(&store, hash, resident, slot).await
        };
        if !matches!(loaded, Loaded::Failed(_)) {
            self.health.read_worked();
        }
        let reason = match loaded {
            // Its place may have been reclaimed meanwhile; what was read is whole and verified all the same.
            Loaded::Block(block)
                if self.residency.removals() == removals
                    || self.residency.holds(hash, &resident) =>
            {
                return Read::Hit(block);
            }
            Loaded::Block(_) => return Read::Gone(Reason::Invalidated),
            Loaded::Corrupt => Reason::Corrupt,
            Loaded::Missing | Loaded::Other => Reason::Evicted,
            Loaded::Failed(why) => {
                self.read_failed(&why);
                return Read::Gone(Reason::Device);
            }
        };
        if !self.residency.lose(hash, &resident, reason) {
            return Read::Gone(Reason::Evicted);
        }
        store.delete(&resident.key);
        Read::Gone(reason)
    }

    /// Reads it where it is believed to lie; where that is not known, or was wrong, through foyer.
    async fn load(
        self: &Arc<Self>,
        store: &Arc<Store>,
        hash: u64,
        resident: Resident,
        slot: SlotMut,
    ) -> Loaded {
        let known = self.extents.as_ref().zip(self.residency.position(hash));
        let Some((extents, position)) = known else {
            self.look_soon();
            self.paths.through_foyer.fetch_add(1, Relaxed);
            return store.load(resident, slot).await;
        };
        let (extents, geometry) = (Arc::clone(extents), self.geometry);
        let read =
            store.blocking(move || read_entry(&extents, geometry, position, &resident, slot));
        match read.await {
            Ok(Direct::Block(block)) => {
                self.paths.direct.fetch_add(1, Relaxed);
                Loaded::Block(block)
            }
            Ok(Direct::Stray(slot)) => {
                self.residency.displace(hash, position);
                self.paths.strayed.fetch_add(1, Relaxed);
                store.load(resident, slot).await
            }
            Err(error) => Loaded::Failed(error.to_string()),
        }
    }

    /// Has somebody look where foyer has written lately. At most one look waits.
    pub(super) fn look_soon(self: &Arc<Self>) {
        let (Some(extents), Some(store)) = (&self.extents, self.store()) else {
            return;
        };
        if extents.wants_look() {
            let (extents, residency) = (Arc::clone(extents), Arc::clone(&self.residency));
            drop(store.blocking(move || extents.look(&residency)));
        }
    }

    fn read_failed(self: &Arc<Self>, why: &str) {
        self.residency.count(Reason::Device, 1);
        if self.health.read_failed(self.clock.now(), why) {
            self.go_down(why);
        }
    }
}

/// Which ways reads went; see [`ReadPaths`].
#[derive(Debug, Default)]
pub(super) struct Paths {
    direct: AtomicU64,
    strayed: AtomicU64,
    through_foyer: AtomicU64,
}

impl Paths {
    pub(super) fn counts(&self) -> ReadPaths {
        ReadPaths {
            direct: self.direct.load(Relaxed),
            strayed: self.strayed.load(Relaxed),
            through_foyer: self.through_foyer.load(Relaxed),
        }
    }
}

/// Which ways reads went since the tier was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadPaths {
    /// Found where they were believed to lie.
    pub direct: u64,
    /// Not found there, whole; foyer was asked.
    pub strayed: u64,
    /// Their position was not known; foyer was asked.
    pub through_foyer: u64,
}

/// One reader in the waiting room.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn join(room: &'a AtomicUsize, seats: usize) -> Option<Self> {
        if room.fetch_add(1, Relaxed) >= seats {
            room.fetch_sub(1, Relaxed);
            return None;
        }
        Some(Self(room))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
