//! The host device's memory: its own vectors and what it adopted, in one table.
//!
//! Operations find their bytes here by number and not by pointer: what an operation keeps alive is in the table,
//! and what is in the table is whole. A range is checked against its entry before anything is copied.

use std::collections::HashMap;
use std::sync::Arc;

use super::Shared;
use crate::device::{DeviceError, DeviceSpan};
use crate::shared::foreign;

/// See the module.
pub(super) struct Memory {
    next: u64,
    free_bytes: u64,
    entries: HashMap<u64, Entry>,
}

enum Entry {
    Own(Vec<u8>),
    /// Somebody else's, who may change it at any time. The address of the first byte, and how many.
    Adopted(usize, usize),
}

/// Where a span lies in the table.
#[derive(Clone, Copy)]
pub(super) struct Place {
    id: u64,
    offset: usize,
}

impl Place {
    /// `offset` bytes into `span`.
    pub(super) fn of(span: &DeviceSpan, offset: u64) -> Self {
        let allocation: &Allocation = span
            .memory
            .backing
            .downcast_ref()
            .expect("memory of this device is an `Allocation`");
        Self {
            id: allocation.id,
            offset: span.offset + offset as usize,
        }
    }
}

impl Memory {
    pub(super) fn new(free_bytes: u64) -> Self {
        Self {
            next: 0,
            free_bytes,
            entries: HashMap::new(),
        }
    }

    pub(super) fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// The number and the address of `bytes` zeros.
    pub(super) fn alloc(&mut self, bytes: usize) -> Result<(u64, u64), DeviceError> {
        let asked_bytes = bytes as u64;
        if asked_bytes > self.free_bytes {
            return Err(DeviceError::OutOfMemory {
                asked_bytes,
                free_bytes: self.free_bytes,
            });
        }
        self.free_bytes -= asked_bytes;
        let zeros = vec![0; bytes];
        let address = zeros.as_ptr() as u64;
        Ok((self.add(Entry::Own(zeros)), address))
    }

    /// The number of memory that is somebody else's.
    ///
    /// # Safety
    /// As [`crate::Device::adopt`], until [`Self::remove`].
    pub(super) unsafe fn adopt(&mut self, address: u64, bytes: usize) -> Result<u64, DeviceError> {
        let start = usize::try_from(address).unwrap_or(0);
        if start == 0 || start.checked_add(bytes).is_none() {
            return Err(DeviceError::Foreign { field: "address" });
        }
        Ok(self.add(Entry::Adopted(start, bytes)))
    }

    fn add(&mut self, entry: Entry) -> u64 {
        let id = self.next;
        self.next += 1;
        self.entries.insert(id, entry);
        id
    }

    fn remove(&mut self, id: u64) {
        if let Some(Entry::Own(bytes)) = self.entries.remove(&id) {
            self.free_bytes += bytes.len() as u64;
        }
    }

    /// The address of `length` bytes that the table has.
    fn address(&mut self, at: Place, length: usize) -> *mut u8 {
        let entry = self
            .entries
            .get_mut(&at.id)
            .expect("operations keep their memory");
        let (base, limit) = match entry {
            Entry::Own(bytes) => (bytes.as_mut_ptr(), bytes.len()),
            Entry::Adopted(address, bytes) => {
                (std::ptr::with_exposed_provenance_mut(*address), *bytes)
            }
        };
        assert!(
            at.offset
                .checked_add(length)
                .is_some_and(|end| end <= limit),
            "{length} bytes at {} of {limit}: spans are checked before",
            at.offset
        );
        base.wrapping_add(at.offset)
    }

    /// From host bytes into the device.
    pub(super) fn write(&mut self, to: Place, source: &[u8]) {
        let to = self.address(to, source.len());
        // SAFETY: the table has these bytes; they are not `source`, which nobody can write. Others may change
        // adopted bytes meanwhile, which this copy expects.
        unsafe { foreign::copy(to, source.as_ptr(), source.len()) }
    }

    /// From the device into host bytes.
    pub(super) fn read(&mut self, from: Place, target: &mut [u8]) {
        let from = self.address(from, target.len());
        // SAFETY: as in `write`; `target` is borrowed for writing by the caller alone.
        unsafe { foreign::copy(target.as_mut_ptr(), from, target.len()) }
    }

    /// Within the device; the ranges lie apart, or are of memory that was adopted twice, whose owner then sees
    /// bytes of either.
    pub(super) fn copy(&mut self, from: Place, to: Place, length: usize) {
        let (from, to) = (self.address(from, length), self.address(to, length));
        // SAFETY: the table has both; operations refuse spans that overlap by address (`check_apart`).
        unsafe { foreign::copy(to, from, length) }
    }
}

/// A handle of an entry, which goes with its last one.
pub(super) struct Allocation {
    id: u64,
    shared: Arc<Shared>,
}

impl Allocation {
    pub(super) fn new(id: u64, shared: Arc<Shared>) -> Self {
        Self { id, shared }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.shared.memory.lock().remove(self.id);
    }
}
