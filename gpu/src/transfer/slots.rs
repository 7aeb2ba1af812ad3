//! The pool of page-locked slots.
//!
//! An arena of our own with a segment per slot: as many slots are out as there are segments at most, so one of any
//! length always finds an empty segment, however the others lie.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use super::TransferError;
use crate::arena::{Arena, ArenaConfig, DomainId};
use crate::device::Device;
use crate::pinned::PinnedArena;
use crate::slot::{Slot, SlotMut};
use crate::slots::PAGE_BYTES;

pub(super) struct SlotPool {
    arena: Arc<Arena>,
    pinned: PinnedArena,
    slot_bytes: usize,
    slots: usize,
    out: Mutex<usize>,
    back: Condvar,
}

impl SlotPool {
    pub(super) fn new(
        device: &Arc<dyn Device>,
        slot_bytes: usize,
        slots: usize,
    ) -> Result<Arc<Self>, TransferError> {
        let segment_bytes = slot_bytes.next_multiple_of(PAGE_BYTES) as u64;
        let arena = Arena::new(ArenaConfig {
            capacity_bytes: segment_bytes * slots as u64,
            segment_bytes,
            ..ArenaConfig::default()
        })
        .map_err(|source| TransferError::Slots { slots, source })?;
        arena.wait_ready();
        Ok(Arc::new(Self {
            pinned: PinnedArena::new(Arc::clone(&arena), Arc::clone(device))?,
            arena,
            slot_bytes,
            slots,
            out: Mutex::new(0),
            back: Condvar::new(),
        }))
    }

    pub(super) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    pub(super) fn in_use(&self) -> usize {
        *self.out.lock()
    }

    pub(super) fn locked_bytes(&self) -> u64 {
        self.pinned.locked_bytes()
    }

    pub(super) fn take(
        self: &Arc<Self>,
        bytes: usize,
        timeout: Duration,
    ) -> Result<Option<Staged>, TransferError> {
        if bytes == 0 || bytes > self.slot_bytes {
            return Err(TransferError::Batch {
                bytes: bytes as u64,
                slot_bytes: self.slot_bytes,
            });
        }
        let mut out = self.out.lock();
        if *out >= self.slots && !timeout.is_zero() {
            self.back
                .wait_while_for(&mut out, |out| *out >= self.slots, timeout);
        }
        if *out >= self.slots {
            return Ok(None);
        }
        *out += 1;
        drop(out);
        let permit = Permit(Arc::clone(self));
        // A segment that could not be had is missing; then a slot in ordinary memory does, only slower.
        let slot = self.arena.alloc(DomainId::NODE, bytes);
        Ok(Some(Staged {
            slot: Some(slot.unwrap_or_else(|| SlotMut::heap(bytes))),
            length: bytes,
            permit,
        }))
    }
}

/// One of the slots that may be out.
struct Permit(Arc<SlotPool>);

impl Drop for Permit {
    fn drop(&mut self) {
        *self.0.out.lock() -= 1;
        self.0.back.notify_one();
    }
}

/// Page-locked memory for one batch: a slot that its one owner may write. Goes back to the pool when dropped.
pub struct Staged {
    /// Away while a device writes it. Before the permit: the place is free when the next may come.
    slot: Option<SlotMut>,
    length: usize,
    permit: Permit,
}

impl Staged {
    /// How long it is.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it is empty; it never is.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The same bytes to be shared, never written again; back in the pool with the last handle.
    pub fn freeze(mut self) -> Bytes {
        let slot = self.take().freeze();
        Bytes::from_owner(Frozen {
            slot,
            _permit: self.permit,
        })
    }

    pub(super) fn take(&mut self) -> SlotMut {
        self.slot.take().expect("only a batch on its way takes it")
    }

    pub(super) fn put_back(&mut self, slot: SlotMut) {
        self.slot = Some(slot);
    }
}

impl Deref for Staged {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.slot.as_deref().expect("back before it is handed over")
    }
}

impl DerefMut for Staged {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.slot
            .as_deref_mut()
            .expect("back before it is handed over")
    }
}

impl fmt::Debug for Staged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Staged")
            .field("bytes", &self.length)
            .finish_non_exhaustive()
    }
}

struct Frozen {
    slot: Slot,
    _permit: Permit,
}

impl AsRef<[u8]> for Frozen {
    fn as_ref(&self) -> &[u8] {
        &self.slot
    }
}
