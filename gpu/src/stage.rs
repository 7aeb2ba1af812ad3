//! A stage: private memory for direct I/O, in huge pages where the kernel gives them.
//!
//! ```text
//!   disk ─one request, few segments─► Stage ─copy past the cache─► slot
//! ```
//!
//! Why: each scattered page of 4 KiB that a direct read fills is pinned, listed in the request and looked
//! up by the device's other side. A huge page is one of each. Transparent huge pages serve here and
//! not for the arena, because nobody else maps a stage, and it is small and used again and again.
//!
//! Units: bytes. Errors: the kernel's, when there is no memory.

use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Zeros at first; aligned to a huge page. Unmapped when dropped.
#[derive(Debug)]
pub struct Stage {
    mapped: NonNull<u8>,
    mapped_bytes: usize,
    /// First byte of the stage, aligned, within what is mapped.
    start: usize,
    length: usize,
}

// SAFETY: the mapping is private and belongs to this value alone.
unsafe impl Send for Stage {}
// SAFETY: a shared reference gives only `&[u8]`.
unsafe impl Sync for Stage {}

impl Stage {
    /// A stage of `length` bytes, rounded up to whole huge pages.
    ///
    /// # Errors
    /// The kernel refuses the mapping.
    pub fn new(length: usize) -> std::io::Result<Self> {
        let length = length.max(1).next_multiple_of(HUGE_PAGE_BYTES);
        // One more than needed, so that an aligned start lies in it.
        let mapped_bytes = length + HUGE_PAGE_BYTES;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let mapped = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                mapped_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let mapped: NonNull<u8> =
            NonNull::new(mapped.cast()).expect("mmap answers an address or an error");
        let stage = Self {
            mapped,
            mapped_bytes,
            start: mapped.as_ptr().align_offset(HUGE_PAGE_BYTES),
            length,
        };
        // Advice: a kernel without them loses nothing; block bytes are not for core files.
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontDump] {
            // SAFETY: the range lies in this mapping, and neither advice changes a byte.
            let _ = unsafe { madvise(stage.base().cast(), length, advice) };
        }
        Ok(stage)
    }

    fn base(&self) -> *mut u8 {
        // SAFETY: the aligned start is less than a huge page behind the mapping's, which is that much longer.
        unsafe { self.mapped.as_ptr().add(self.start) }
    }
}

impl Deref for Stage {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `length` bytes from the base lie in the mapping, which the kernel has filled with zeros.
        unsafe { std::slice::from_raw_parts(self.base(), self.length) }
    }
}

impl DerefMut for Stage {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base(), self.length) }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and the slices given out have ended.
        let unmapped = unsafe { munmap(self.mapped.as_ptr().cast(), self.mapped_bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_aligned_zero_and_holds_what_is_written() {
        for asked in [0, 1, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 1] {
            let mut stage = Stage::new(asked).expect("memory");
            assert!(stage.len() >= asked && stage.len().is_multiple_of(HUGE_PAGE_BYTES));
            assert_eq!(stage.as_ptr() as usize % HUGE_PAGE_BYTES, 0);
            assert!(stage.iter().all(|&byte| byte == 0));
            let last = stage.len() - 1;
            stage[last] = 7;
            assert_eq!(stage[last], 7);
        }
    }
}
