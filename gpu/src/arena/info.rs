//! What goes into an arena and what it says of itself: plain values.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::SEGMENT_BYTES;
use crate::segment::{Segment, SegmentError};

/// Who may see a segment: processes of one trust domain may map each other's segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainId(pub u32);

impl DomainId {
    /// The node's own domain.
    pub const NODE: Self = Self(0);
}

/// Whether to use huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Where the kernel has enough free ones set aside (`vm.nr_hugepages`), else ordinary pages.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// How large an arena is and how it gets its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArenaConfig {
    /// All segments together; rounded down to whole pages.
    pub capacity_bytes: u64,
    /// Length of each segment but the last; whole pages.
    pub segment_bytes: u64,
    /// Huge pages or not.
    pub huge_pages: HugePages,
    /// Whether memory is filled in before it is used. Off, an arena costs nothing until it is written
    /// to, and the first write of each page is slow.
    pub prefault: bool,
    /// The server's life, for [`crate::Location`].
    pub boot_id: u64,
}

impl Default for ArenaConfig {
    fn default() -> Self {
        Self {
            capacity_bytes: SEGMENT_BYTES,
            segment_bytes: SEGMENT_BYTES,
            huge_pages: HugePages::Auto,
            prefault: true,
            boot_id: 0,
        }
    }
}

/// Why there is no arena.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// A field of the configuration cannot be.
    #[error("{field} = {value}: {problem}")]
    Config {
        /// Which field.
        field: &'static str,
        /// What it was.
        value: u64,
        /// What would be right.
        problem: &'static str,
    },
    /// The first segment could not be had.
    #[error("no memory for the arena")]
    Segment(#[from] SegmentError),
    /// The thread that fills in segments could not be started.
    #[error("no thread for the arena")]
    Thread(#[source] std::io::Error),
}

/// What an arena holds at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct ArenaStats {
    /// What it will hold when every segment is ready.
    pub capacity_bytes: u64,
    /// What it can hold now.
    pub ready_bytes: u64,
    /// Taken by slots, in whole pages.
    pub used_bytes: u64,
    /// Asked for by the owners of those slots.
    pub requested_bytes: u64,
    /// The longest slot that can be had now in some domain (an unbound segment counts), at most 64 MiB.
    pub largest_free_bytes: u64,
    /// Spent beside the bytes: page map and generations, at most.
    pub overhead_bytes: u64,
    /// 0 when a slot of the largest size, or of all that is free, can be had; near 1 when what is free
    /// lies in crumbs.
    pub fragmentation: f64,
    /// Whether every ready segment is of huge pages.
    pub huge_pages: bool,
    /// Whether no ready segment can be mapped for writing by others.
    pub write_sealed: bool,
    /// Taken slots.
    pub slots: u64,
    /// Why a segment is missing, if one is.
    pub note: Option<String>,
}

/// A ready segment, for handing to another process or to a device.
#[derive(Clone)]
pub struct SegmentInfo {
    /// Its number, as in [`crate::Location::segment`].
    pub segment: u32,
    /// Whose it is; `None` while nobody needed it.
    pub domain: Option<DomainId>,
    /// Its length.
    pub length_bytes: u64,
    /// Taken by slots, in whole pages.
    pub used_bytes: u64,
    /// Whether it is of huge pages.
    pub huge_pages: bool,
    /// Whether the kernel refuses new write mappings; if not, keep the descriptors in the process.
    pub write_sealed: bool,
    pub(super) memory: Arc<Segment>,
}

impl SegmentInfo {
    /// The bytes, to be mapped shared and read-only.
    pub fn data_fd(&self) -> BorrowedFd<'_> {
        self.memory.data_fd()
    }

    /// The table of generations: one native-endian `u64` per 4 KiB page of the bytes. Read the number
    /// at a slot's first page, copy, put an acquire fence, read again: if both equal
    /// [`crate::Location::generation`] the copy is of that slot.
    pub fn generations_fd(&self) -> BorrowedFd<'_> {
        self.memory.generations_fd()
    }

    /// The address of the first byte in this process, for registering with a device. What lies there
    /// belongs to the slots.
    pub fn base(&self) -> *mut u8 {
        self.memory.base().as_ptr()
    }
}

impl std::fmt::Debug for SegmentInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SegmentInfo")
            .field("segment", &self.segment)
            .field("domain", &self.domain)
            .field("length_bytes", &self.length_bytes)
            .finish_non_exhaustive()
    }
}

/// Slots whose going makes room for one of the size asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clearing {
    /// In which segment.
    pub segment: u32,
    /// Where the slots in the way start: [`crate::Location::offset`] of each.
    pub offsets: Vec<u64>,
    /// How much they hold together, in whole pages.
    pub used_bytes: u64,
}
