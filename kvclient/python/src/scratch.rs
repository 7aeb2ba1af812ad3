//! Memory in which blocks wait for the node: bounded, and used again.
//!
//! Units: bytes, counted in units of 4 KiB against [`SCRATCH_BYTES`].
//! Errors: none; who finds no room waits.
//! Why used again: fresh memory is a page fault every 4 KiB, which costs as much as the copy into it.

use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Most bytes gathered and not yet taken by the node, all saves together.
pub const SCRATCH_BYTES: usize = 256 << 20;

/// Buffers kept for the next save.
const SPARE_BUFFERS: usize = 4;

const UNIT_BYTES: usize = 4096;

/// Bounded memory.
#[derive(Debug)]
pub struct Scratch {
    room: Semaphore,
    units: usize,
    spare: Mutex<Vec<Vec<u8>>>,
}

/// A piece of it, given back when dropped.
#[derive(Debug)]
pub struct Buffer<'s> {
    scratch: &'s Scratch,
    bytes: Vec<u8>,
    _room: SemaphorePermit<'s>,
}

impl Scratch {
    /// Of `bytes` in all.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let units = (bytes / UNIT_BYTES).max(1);
        Self {
            room: Semaphore::new(units),
            units,
            spare: Mutex::default(),
        }
    }

    /// Room for `bytes`, if there is some now. More than there is at all counts as all there is.
    pub fn try_take(&self, bytes: usize) -> Option<Buffer<'_>> {
        let room = self.room.try_acquire_many(self.need(bytes)).ok()?;
        Some(self.buffer(bytes, room))
    }

    /// Room for `bytes`, once there is some.
    pub async fn take(&self, bytes: usize) -> Buffer<'_> {
        let room = self.room.acquire_many(self.need(bytes)).await;
        self.buffer(bytes, room.expect("the semaphore is never closed"))
    }

    fn need(&self, bytes: usize) -> u32 {
        let units = bytes.div_ceil(UNIT_BYTES).min(self.units);
        u32::try_from(units).unwrap_or(u32::MAX)
    }

    fn buffer<'s>(&'s self, bytes: usize, room: SemaphorePermit<'s>) -> Buffer<'s> {
        let mut spare = self.spare.lock().pop().unwrap_or_default();
        spare.clear();
        spare.reserve_exact(bytes);
        Buffer {
            scratch: self,
            bytes: spare,
            _room: room,
        }
    }
}

impl Buffer<'_> {
    /// Appends.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// What was appended.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        let mut spare = self.scratch.spare.lock();
        if spare.len() < SPARE_BUFFERS {
            spare.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_as_much_as_there_is() {
        let scratch = Scratch::new(4 * UNIT_BYTES);
        let (a, b) = (
            scratch.try_take(3 * UNIT_BYTES).unwrap(),
            scratch.try_take(1),
        );
        assert!(b.is_some() && scratch.try_take(1).is_none());
        drop(a);
        assert!(scratch.try_take(3 * UNIT_BYTES).is_some());
        drop(b);
        // One block larger than all of it goes alone.
        assert!(scratch.try_take(9 * UNIT_BYTES).is_some());
    }

    #[test]
    fn a_buffer_used_again_is_empty() {
        let scratch = Scratch::new(4 * UNIT_BYTES);
        let mut buffer = scratch.try_take(100).unwrap();
        buffer.extend(&[7; 100]);
        drop(buffer);
        let buffer = scratch.try_take(50).unwrap();
        assert!(buffer.bytes().is_empty() && buffer.bytes.capacity() >= 100);
    }
}
