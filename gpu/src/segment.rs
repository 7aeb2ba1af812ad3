//! One piece of shared memory: a sealed memfd, its mapping, and its table of generations.
//!
//! ```text
//!  data fd   ├─ slot ─┤├── slot ──┤          write-mapped here, read-mapped by anyone who has the fd
//!  table fd  g0 g1 g2 g3 …                   one u64 per 4 KiB page, the same way
//! ```
//!
//! Both files are sealed with `SHRINK | GROW | FUTURE_WRITE | SEAL` after they are mapped, so that
//! nobody who gets a descriptor can truncate them under a reader (which would be SIGBUS), nor write
//! through a mapping of their own. The generation of a slot is the number at its first page; it grows
//! when the slot is given back, so a reader that finds it unchanged after a copy has copied the slot it
//! was told of (a sequence lock whose writer is the allocator).
//!
//! Units: bytes; `madvise(MADV_POPULATE_WRITE)` fills in pages ahead of use. `MADV_HUGEPAGE` is not
//! asked for: first touch was five times slower with it on virtual machines. `MADV_COLLAPSE` (Linux 6.1) does make
//! huge pages of a memfd whatever `shmem_enabled` says; copies out of them and into them were no faster than with
//! small ones (1 MiB: 203 µs to 208, 279 µs to 264), so it is not asked for either.
//! Errors: [`SegmentError`]; a kernel before 5.1 has no `FUTURE_WRITE`, then `write_sealed`
//! is false and descriptors must stay inside the process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::slots::PAGE_BYTES;

/// Pages are filled in by pieces of this size, so that dropping an arena need not wait for a segment.
const PREFAULT_STEP_BYTES: usize = 64 << 20;
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// What went wrong while making a segment.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The kernel refused a step; usually memory or a limit.
    #[error("segment of {length_bytes} bytes: {step}")]
    System {
        /// Which step.
        step: &'static str,
        /// How long the segment was to be.
        length_bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The arena was dropped before the segment was ready.
    #[error("segment abandoned because its arena is closing")]
    Stopped,
}

/// A write mapping of one whole memfd.
struct Mapping {
    fd: OwnedFd,
    base: NonNull<u8>,
    length: usize,
    write_sealed: bool,
}

// SAFETY: the mapping is plain shared memory owned by this value; who may touch which part of it is
// decided by the allocator, which hands out disjoint slots.
unsafe impl Send for Mapping {}
// SAFETY: as above; `Mapping` itself offers only pointers.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(name: &str, length: usize, huge: bool) -> Result<Self, SegmentError> {
        let failed = |step| {
            move |source: rustix::io::Errno| SegmentError::System {
                step,
                length_bytes: length as u64,
                source: source.into(),
            }
        };
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if huge {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = memfd_create(name, flags).map_err(failed("memfd_create"))?;
        ftruncate(&fd, length as u64).map_err(failed("ftruncate"))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }
        .map_err(failed("mmap"))?;
        let base = NonNull::new(base.cast()).expect("mmap answers an address or an error");
        let mut mapping = Self {
            fd,
            base,
            length,
            write_sealed: false,
        };
        // Block bytes are not for core files. Advice: a kernel that does not know it loses nothing.
        let _ = mapping.advise(0, length, Advice::LinuxDontDump);
        let fixed = SealFlags::SHRINK | SealFlags::GROW;
        mapping.write_sealed = fcntl_add_seals(
            &mapping.fd,
            fixed | SealFlags::FUTURE_WRITE | SealFlags::SEAL,
        )
        .is_ok();
        if !mapping.write_sealed {
            fcntl_add_seals(&mapping.fd, fixed | SealFlags::SEAL).map_err(failed("seal"))?;
        }
        Ok(mapping)
    }

    fn advise(&self, offset: usize, length: usize, advice: Advice) -> rustix::io::Result<()> {
        debug_assert!(offset + length <= self.length);
        // SAFETY: the range lies in this mapping, and the advices used (fill in, leave out of core
        // files) change no byte.
        unsafe { madvise(self.base.add(offset).as_ptr().cast(), length, advice) }
    }

    fn prefault(&self, stop: &AtomicBool) -> Result<(), SegmentError> {
        for offset in (0..self.length).step_by(PREFAULT_STEP_BYTES) {
            if stop.load(Ordering::Relaxed) {
                return Err(SegmentError::Stopped);
            }
            let length = PREFAULT_STEP_BYTES.min(self.length - offset);
            match self.advise(offset, length, Advice::LinuxPopulateWrite) {
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL) => self.touch(offset, length),
                Err(source) => {
                    return Err(SegmentError::System {
                        step: "prefault",
                        length_bytes: self.length as u64,
                        source: source.into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// For kernels before 5.14, which have no `MADV_POPULATE_WRITE`.
    fn touch(&self, offset: usize, length: usize) {
        for at in (offset..offset + length).step_by(PAGE_BYTES) {
            // SAFETY: inside the mapping, which nobody else has seen yet and which holds only zeros.
            unsafe { self.base.add(at).write_volatile(0) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; slots keep their arena, and the arena its segments,
        // alive, so nothing points here any more.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok());
    }
}

/// A mapped segment.
pub(crate) struct Segment {
    id: u32,
    huge_pages: bool,
    data: Mapping,
    generations: Mapping,
}

impl Segment {
    /// Makes a segment of `length` bytes (a multiple of a page); with `huge`, tries huge pages first.
    pub(crate) fn new(
        id: u32,
        length: usize,
        huge: bool,
        prefault: bool,
        stop: &AtomicBool,
    ) -> Result<Self, SegmentError> {
        let table = (length / PAGE_BYTES * 8).next_multiple_of(PAGE_BYTES);
        let generations = Mapping::new(&format!("terrace-generations-{id}"), table, false)?;
        let name = format!("terrace-segment-{id}");
        if huge
            && length.is_multiple_of(HUGE_PAGE_BYTES)
            && free_huge_pages() >= length / HUGE_PAGE_BYTES
        {
            // The mapping reserves its pages, so from here on touching them cannot fail for want of them.
            if let Ok(data) = Mapping::new(&name, length, true)
                && (!prefault || data.prefault(stop).is_ok())
            {
                return Ok(Self {
                    id,
                    huge_pages: true,
                    data,
                    generations,
                });
            }
        }
        let data = Mapping::new(&name, length, false)?;
        if prefault {
            data.prefault(stop)?;
            generations.prefault(stop)?;
        }
        Ok(Self {
            id,
            huge_pages: false,
            data,
            generations,
        })
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn length(&self) -> usize {
        self.data.length
    }

    pub(crate) fn huge_pages(&self) -> bool {
        self.huge_pages
    }

    /// Whether nobody can map this segment for writing any more.
    pub(crate) fn write_sealed(&self) -> bool {
        self.data.write_sealed && self.generations.write_sealed
    }

    /// The first byte; valid for [`Self::length`] bytes as long as `self` lives.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.data.base
    }

    pub(crate) fn data_fd(&self) -> BorrowedFd<'_> {
        self.data.fd.as_fd()
    }

    pub(crate) fn generations_fd(&self) -> BorrowedFd<'_> {
        self.generations.fd.as_fd()
    }

    /// The generation of the slot that starts at `page` of this segment.
    pub(crate) fn generation(&self, page: u32) -> u64 {
        self.cell(page).load(Ordering::Relaxed)
    }

    /// Ends the tenancy of the slot that starts at `page`: called before its bytes may be written anew.
    pub(crate) fn retire(&self, page: u32) {
        self.cell(page).fetch_add(1, Ordering::Release);
        // The new number must be visible before any byte of the next tenant is.
        fence(Ordering::SeqCst);
    }

    fn cell(&self, page: u32) -> &AtomicU64 {
        let at = page as usize * 8;
        assert!(
            at + 8 <= self.generations.length,
            "page {page} lies outside the segment"
        );
        // SAFETY: in bounds by the assertion, aligned because the mapping is page-aligned, and only
        // ever accessed as an atomic here; other processes cannot write it.
        unsafe { AtomicU64::from_ptr(self.generations.base.add(at).as_ptr().cast()) }
    }
}

/// Free huge pages of 2 MiB, 0 where the kernel has none.
pub fn free_huge_pages() -> usize {
    std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}
