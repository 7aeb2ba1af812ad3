//! The arena, page-locked for a device.
//!
//! A transfer from ordinary memory is first copied by the processor into a buffer of the driver's; from
//! page-locked memory it is one DMA that runs by itself. Segments become ready one after another and may
//! be replaced, so locking is a thing to repeat: [`PinnedArena::refresh`] locks what is new and lets go
//! of what is gone. Until then a replaced segment stays mapped here, which costs memory and harms nobody.
//!
//! Transfers to and from slots that are not locked (heap slots, new segments) work too, only slower.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::arena::Arena;
use crate::device::{Device, DeviceError, PageLock};

/// The page locks of one arena for one device.
#[derive(Debug)]
pub struct PinnedArena {
    arena: Arc<Arena>,
    device: Arc<dyn Device>,
    locks: Mutex<BTreeMap<u32, PageLock>>,
}

impl PinnedArena {
    /// Locks the segments that are ready.
    ///
    /// # Errors
    /// As [`Device::page_lock`].
    pub fn new(arena: Arc<Arena>, device: Arc<dyn Device>) -> Result<Self, DeviceError> {
        let pinned = Self {
            arena,
            device,
            locks: Mutex::default(),
        };
        pinned.refresh()?;
        Ok(pinned)
    }

    /// Locks segments that have become ready and lets go of replaced ones; answers what is locked, in
    /// bytes.
    ///
    /// # Errors
    /// As [`Device::page_lock`]; what was locked stays so.
    pub fn refresh(&self) -> Result<u64, DeviceError> {
        let segments = self.arena.segments();
        let mut locks = self.locks.lock();
        locks.retain(|number, _| segments.iter().any(|segment| segment.segment == *number));
        for segment in &segments {
            if let Entry::Vacant(place) = locks.entry(segment.segment) {
                place.insert(self.device.page_lock(segment)?);
            }
        }
        Ok(locks.values().map(PageLock::len_bytes).sum())
    }

    /// What is locked, in bytes.
    pub fn locked_bytes(&self) -> u64 {
        self.locks.lock().values().map(PageLock::len_bytes).sum()
    }
}
