//! A node's segment as another process reads it.
//!
//! ```text
//!  reader                                     node
//!  generation(offset) == as told ─┐
//!  copy(offset, destination)      │           slot freed: generation + 1, then (later) new bytes
//!  generation(offset) == as told ─┘ else what was copied is garbage
//! ```
//!
//! The node raises a slot's generation before a byte of its next tenant is written (`Segment::retire`), and
//! [`ReadSegment::generation`] is ordered behind the copy that comes before it: a copy that saw any byte of the
//! next tenant is followed by a generation that says so. A process that was stopped in the middle, for however
//! long, learns it when it goes on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::fs::{Mode, OFlags};
use rustix::mm::ProtFlags;

use super::mapped::Mapped;
use super::{OutOfBounds, SharedError, Toward};
use crate::arena::SegmentInfo;
use crate::slots::PAGE_BYTES;

/// What another process needs to read a segment. Neither can be written through, nor mapped for writing.
#[derive(Debug)]
pub struct SegmentFds {
    /// The bytes.
    pub data: OwnedFd,
    /// The generations.
    pub generations: OwnedFd,
}

impl SegmentInfo {
    /// Descriptors of this segment, opened anew for reading only, to be handed to another process.
    ///
    /// # Errors
    /// [`SharedError::NotSealed`] on a kernel without `FUTURE_WRITE`, where a reader could become a writer;
    /// otherwise what the kernel said.
    pub fn read_only_fds(&self) -> Result<SegmentFds, SharedError> {
        if !self.write_sealed {
            return Err(SharedError::NotSealed { what: "segment" });
        }
        Ok(SegmentFds {
            data: reopen(self.data_fd())?,
            generations: reopen(self.generations_fd())?,
        })
    }
}

/// The same file through a descriptor that cannot write.
fn reopen(fd: BorrowedFd<'_>) -> Result<OwnedFd, SharedError> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|source| {
        SharedError::System {
            step: "open for reading",
            source: source.into(),
        }
    })
}

/// A segment of a node's arena, mapped for reading by another process.
pub struct ReadSegment {
    data: Mapped,
    generations: Mapped,
}

impl ReadSegment {
    /// Maps a segment. The descriptors are closed; the mapping stays.
    ///
    /// # Errors
    /// [`SharedError`]: not sealed against shrinking, not as long as each other, or the kernel says no.
    pub fn map(data: OwnedFd, generations: OwnedFd) -> Result<Self, SharedError> {
        let data = Mapped::new("segment", data.as_fd(), ProtFlags::READ)?;
        let generations =
            Mapped::new("table of generations", generations.as_fd(), ProtFlags::READ)?;
        if generations.length() / 8 < data.length() / PAGE_BYTES {
            return Err(SharedError::Length {
                what: "table of generations",
                length_bytes: generations.length() as u64,
                problem: "shorter than its segment needs",
            });
        }
        Ok(Self { data, generations })
    }

    /// How long the segment is.
    pub fn length_bytes(&self) -> u64 {
        self.data.length() as u64
    }

    /// The generation of the slot whose first byte lies at `offset`; `None` outside the segment. Ordered
    /// behind every copy before it and ahead of every copy after it.
    pub fn generation(&self, offset: u64) -> Option<u64> {
        if offset >= self.length_bytes() {
            return None;
        }
        let cell = self.generations.cell(offset / PAGE_BYTES as u64 * 8)?;
        // SAFETY: eight aligned bytes inside the mapping, which lives as long as `self` and is only ever
        // touched as atomics, here and in the node. A read-only mapping takes atomic loads of this width.
        let cell = unsafe { AtomicU64::from_ptr(cell) };
        fence(Ordering::Acquire);
        Some(cell.load(Ordering::Acquire))
    }

    /// Copies bytes of the segment to `to`. What arrives is only worth something if the slot's generation is
    /// still the same afterwards.
    ///
    /// # Errors
    /// When the range is not inside the segment; nothing was copied.
    pub fn copy(&self, offset: u64, to: &mut [u8]) -> Result<(), OutOfBounds> {
        self.data.copy_out(offset, to)
    }

    /// As [`ReadSegment::copy`], and answers the XXH3-64 of what lies at `to` afterwards: one pass for a page.
    ///
    /// # Errors
    /// As [`ReadSegment::copy`].
    pub fn copy_summed(
        &self,
        offset: u64,
        to: &mut [u8],
        toward: Toward,
    ) -> Result<u64, OutOfBounds> {
        self.data.copy_out_summed(offset, to, toward)
    }
}

impl std::fmt::Debug for ReadSegment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadSegment")
            .field("length_bytes", &self.length_bytes())
            .finish_non_exhaustive()
    }
}

/// So that a caller can say `?` in a function that answers [`io::Result`].
impl From<SharedError> for io::Error {
    fn from(error: SharedError) -> Self {
        match error {
            SharedError::System { source, .. } => source,
            other => Self::new(io::ErrorKind::InvalidData, other),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd, OwnedFd};
    use std::ptr;
    use std::sync::Arc;

    use rustix::fs::{FallocateFlags, Mode, OFlags, SealFlags};
    use rustix::io::Errno;
    use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

    use super::{ReadSegment, SegmentFds};
    use crate::arena::{Arena, ArenaConfig, DomainId, HugePages};
    use crate::shared::{OutOfBounds, SharedError};
    use crate::slots::PAGE_BYTES;

    const SEGMENT_BYTES: u64 = 1 << 20;

    fn arena() -> Arc<Arena> {
        Arena::new(ArenaConfig {
            capacity_bytes: SEGMENT_BYTES,
            segment_bytes: SEGMENT_BYTES,
            huge_pages: HugePages::Off,
            prefault: false,
            boot_id: 1,
        })
        .expect("a small arena")
    }

    fn fds(arena: &Arena) -> SegmentFds {
        arena.segments()[0]
            .read_only_fds()
            .expect("two descriptors")
    }

    /// As a reader in ill faith would: the same file, opened for writing.
    fn reopened(fd: &OwnedFd) -> OwnedFd {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        rustix::fs::open(path, OFlags::RDWR, Mode::empty())
            .expect("the owner may open its own file")
    }

    fn map(fd: impl AsFd, protection: ProtFlags) -> Result<*mut std::ffi::c_void, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice; the tests leave it mapped.
        unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                PAGE_BYTES,
                protection,
                MapFlags::SHARED,
                fd,
                0,
            )
        }
    }

    #[test]
    fn a_reader_sees_a_slot_and_the_end_of_its_tenancy() {
        let arena = arena();
        let SegmentFds { data, generations } = fds(&arena);
        let segment = ReadSegment::map(data, generations).expect("a mapping");
        let mut slot = arena.alloc(DomainId::NODE, 10_000).expect("room");
        for (i, byte) in slot.iter_mut().enumerate() {
            *byte = (i * 7) as u8;
        }
        let place = slot.location().expect("in the arena");
        assert_eq!(segment.generation(place.offset), Some(place.generation));
        let mut copied = vec![0; 10_000];
        segment.copy(place.offset, &mut copied).expect("inside");
        assert!(copied[..] == slot[..]);
        assert_eq!(segment.generation(place.offset), Some(place.generation));
        drop(slot);
        assert_ne!(segment.generation(place.offset), Some(place.generation));
    }

    #[test]
    fn what_lies_outside_is_neither_copied_nor_read() {
        let arena = arena();
        let SegmentFds { data, generations } = fds(&arena);
        let segment = ReadSegment::map(data, generations).expect("a mapping");
        let mut two = [9; 2];
        for offset in [SEGMENT_BYTES - 1, SEGMENT_BYTES, u64::MAX - 1, u64::MAX] {
            let outside = OutOfBounds {
                offset,
                length_bytes: 2,
                mapped_bytes: SEGMENT_BYTES,
            };
            assert_eq!(segment.copy(offset, &mut two), Err(outside));
        }
        assert_eq!(two, [9; 2]);
        assert_eq!(segment.copy(SEGMENT_BYTES, &mut []), Ok(()));
        assert_eq!(segment.generation(SEGMENT_BYTES), None);
        assert_eq!(segment.generation(u64::MAX), None);
        assert!(segment.generation(SEGMENT_BYTES - 1).is_some());
    }

    #[test]
    fn a_reader_cannot_become_a_writer() {
        let arena = arena();
        let SegmentFds { data, generations } = fds(&arena);
        for read_only in [&data, &generations] {
            assert_eq!(rustix::io::write(read_only, &[1]), Err(Errno::BADF));
            assert_eq!(
                map(read_only, ProtFlags::READ | ProtFlags::WRITE),
                Err(Errno::ACCESS)
            );
            let writable = reopened(read_only);
            for fd in [read_only, &writable] {
                let readable = map(fd, ProtFlags::READ).expect("readable");
                // SAFETY: the page just mapped, which nothing points into.
                let raised =
                    unsafe { rustix::mm::mprotect(readable, PAGE_BYTES, MprotectFlags::WRITE) };
                assert_eq!(raised, Err(Errno::ACCESS));
                assert!(rustix::fs::ftruncate(fd, 0).is_err());
                assert!(rustix::fs::ftruncate(fd, 4 << 20).is_err());
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                assert!(rustix::fs::fallocate(fd, hole, 0, PAGE_BYTES as u64).is_err());
                assert!(rustix::fs::fcntl_add_seals(fd, SealFlags::WRITE).is_err());
            }
            assert_eq!(rustix::io::write(&writable, &[1]), Err(Errno::PERM));
            assert_eq!(rustix::io::pwrite(&writable, &[1], 0), Err(Errno::PERM));
            let mapped = map(&writable, ProtFlags::READ | ProtFlags::WRITE);
            assert_eq!(mapped, Err(Errno::PERM));
        }
    }

    #[test]
    fn files_that_could_shrink_are_not_mapped() {
        let arena = arena();
        let open = || {
            let fd =
                rustix::fs::memfd_create("open", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
            rustix::fs::ftruncate(&fd, SEGMENT_BYTES).unwrap();
            fd
        };
        let refused = ReadSegment::map(open(), fds(&arena).generations);
        assert!(matches!(refused, Err(SharedError::NotSealed { .. })));
        let refused = ReadSegment::map(fds(&arena).data, open());
        assert!(matches!(refused, Err(SharedError::NotSealed { .. })));
        let swapped = ReadSegment::map(fds(&arena).data, {
            let fd = open();
            rustix::fs::ftruncate(&fd, 8).unwrap();
            rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
            fd
        });
        assert!(matches!(swapped, Err(SharedError::Length { .. })));
    }
}
