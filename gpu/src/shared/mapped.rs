//! A whole file mapped shared: an address, a length, and bounds.

use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use twox_hash::XxHash3_64;

use super::{
    OutOfBounds, SharedError, foreign,
    summed::{self, Toward},
};

/// What keeps a mapping from being cut under its reader.
const FIXED: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

pub(super) struct Mapped {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: shared memory that is only ever touched through `foreign::copy` and atomics.
unsafe impl Send for Mapped {}
// SAFETY: as above; concurrent change is what those expect.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps all of `fd`, whose size must be sealed.
    pub(super) fn new(
        what: &'static str,
        fd: impl AsFd,
        protection: ProtFlags,
    ) -> Result<Self, SharedError> {
        let fd = fd.as_fd();
        let failed = |step| {
            move |source: rustix::io::Errno| SharedError::System {
                step,
                source: source.into(),
            }
        };
        let seals = fcntl_get_seals(fd).map_err(failed("read seals"))?;
        if !seals.contains(FIXED) {
            return Err(SharedError::NotSealed { what });
        }
        let length_bytes = u64::try_from(fstat(fd).map_err(failed("fstat"))?.st_size).unwrap_or(0);
        let length = usize::try_from(length_bytes).unwrap_or(0);
        if length == 0 || isize::try_from(length).is_err() {
            return Err(SharedError::Length {
                what,
                length_bytes,
                problem: "which cannot be mapped",
            });
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { mmap(ptr::null_mut(), length, protection, MapFlags::SHARED, fd, 0) }
            .map_err(failed("mmap"))?;
        let base = NonNull::new(base.cast()).expect("mmap answers an address or an error");
        let mapped = Self { base, length };
        // SAFETY: the whole of this mapping; the advice changes no byte. It is advice: nothing is lost without it.
        let _ = unsafe { madvise(base.as_ptr().cast(), length, Advice::LinuxDontDump) };
        Ok(mapped)
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// The address of `length` bytes at `offset`.
    fn at(&self, offset: u64, length: usize) -> Result<NonNull<u8>, OutOfBounds> {
        let start = usize::try_from(offset).ok();
        let end = start.and_then(|start| start.checked_add(length));
        match (start, end) {
            // SAFETY: start ≤ end ≤ the mapping's length.
            (Some(start), Some(end)) if end <= self.length => Ok(unsafe { self.base.add(start) }),
            _ => Err(OutOfBounds {
                offset,
                length_bytes: length as u64,
                mapped_bytes: self.length as u64,
            }),
        }
    }

    /// Copies out; the mapping must be readable.
    pub(super) fn copy_out(&self, offset: u64, to: &mut [u8]) -> Result<(), OutOfBounds> {
        let from = self.at(offset, to.len())?;
        // SAFETY: `from` is inside the mapping, which lives as long as `self`; `to` is the caller's alone.
        unsafe { foreign::copy(to.as_mut_ptr(), from.as_ptr(), to.len()) };
        Ok(())
    }

    /// Copies out and answers the XXH3-64 of what lies at `to` then; the mapping must be readable.
    pub(super) fn copy_out_summed(
        &self,
        offset: u64,
        to: &mut [u8],
        toward: Toward,
    ) -> Result<u64, OutOfBounds> {
        let from = self.at(offset, to.len())?;
        // SAFETY: as `copy_out`.
        let sum = unsafe { summed::copy(to.as_mut_ptr(), from.as_ptr(), to.len(), toward) };
        match sum {
            Some(sum) => Ok(sum),
            None => {
                self.copy_out(offset, to)?;
                Ok(XxHash3_64::oneshot(to))
            }
        }
    }

    /// Copies in and answers the XXH3-64 of `from`; the mapping must be writable.
    pub(super) fn copy_in_summed(
        &self,
        offset: u64,
        from: &[u8],
        toward: Toward,
    ) -> Result<u64, OutOfBounds> {
        let to = self.at(offset, from.len())?;
        // SAFETY: as `copy_in`.
        let sum = unsafe { summed::copy(to.as_ptr(), from.as_ptr(), from.len(), toward) };
        match sum {
            Some(sum) => Ok(sum),
            None => {
                self.copy_in(offset, from)?;
                Ok(XxHash3_64::oneshot(from))
            }
        }
    }

    /// Copies in; the mapping must be writable.
    pub(super) fn copy_in(&self, offset: u64, from: &[u8]) -> Result<(), OutOfBounds> {
        let to = self.at(offset, from.len())?;
        // SAFETY: as above, the other way round; nobody holds a reference into the mapping.
        unsafe { foreign::copy(to.as_ptr(), from.as_ptr(), from.len()) };
        Ok(())
    }

    /// The `u64` at `offset`, which must be a multiple of 8.
    pub(super) fn cell(&self, offset: u64) -> Option<*mut u64> {
        let at = self.at(offset, 8).ok()?;
        offset.is_multiple_of(8).then(|| at.as_ptr().cast())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; nothing points into it beyond a call.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok());
    }
}
