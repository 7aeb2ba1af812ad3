//! A slot: the place of one block's bytes, and who may touch them.
//!
//! ```text
//!  Arena::alloc ──► SlotMut ──freeze──► Slot ──drop──► back in the arena, generation + 1
//!                     └───────drop─────────────────────┘
//! ```
//!
//! A [`SlotMut`] has one owner that may write; a [`Slot`] can be shared and is never written again.
//! Either gives its place back when dropped. Bytes of a new slot are whatever was there before: the
//! writer overwrites them, and nobody sees a slot before it is frozen.
//!
//! Why a heap slot: a leased block must land somewhere even when the arena is full, so the last resort
//! is ordinary memory of the same alignment, which has no [`Location`] and cannot be mapped by others.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::arena::Arena;
use crate::slots::PAGE_BYTES;

/// Where a slot lies, for a process that has mapped the arena's segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Location {
    /// The server's life in which this is true.
    pub boot_id: u64,
    /// Which segment; numbers are not used twice in one life.
    pub segment: u32,
    /// First byte within the segment.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// What the segment's table says at the slot's first page as long as the slot lives.
    pub generation: u64,
}

enum Home {
    Arena {
        arena: Arc<Arena>,
        page: u32,
        location: Location,
    },
    /// Ordinary memory, and what is let go of together with it.
    Heap { _held: Option<Box<dyn Send + Sync>> },
}

/// A slot that its one owner may write.
pub struct SlotMut {
    base: NonNull<u8>,
    length: usize,
    home: Home,
}

// SAFETY: the bytes belong to this value alone until it is dropped; the arena's own state is behind
// a lock.
unsafe impl Send for SlotMut {}
// SAFETY: a shared reference gives only `&[u8]`.
unsafe impl Sync for SlotMut {}

impl SlotMut {
    /// Takes over `page` of the arena.
    ///
    /// # Safety
    /// `base` is valid for `length` rounded up to whole pages, initialised, exclusively the new slot's
    /// until `arena.free(page)`, and stays mapped as long as the arena lives.
    pub(crate) unsafe fn from_arena(
        arena: Arc<Arena>,
        base: NonNull<u8>,
        page: u32,
        location: Location,
    ) -> Self {
        Self {
            base,
            length: location.length as usize,
            home: Home::Arena {
                arena,
                page,
                location,
            },
        }
    }

    /// A slot of `length` zeros in ordinary memory, aligned to a page like any other.
    pub fn heap(length: usize) -> Self {
        Self::heap_with(length, None)
    }

    /// As [`SlotMut::heap`]; `held` is dropped with the slot, so that its owner can count what is out.
    pub fn heap_held(length: usize, held: Box<dyn Send + Sync>) -> Self {
        Self::heap_with(length, Some(held))
    }

    fn heap_with(length: usize, held: Option<Box<dyn Send + Sync>>) -> Self {
        let layout = heap_layout(length);
        // SAFETY: the layout is never empty.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(layout));
        Self {
            base,
            length,
            home: Home::Heap { _held: held },
        }
    }

    /// Length in bytes, as asked for.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether the length is zero; only a heap slot's can be.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes that belong to the slot: the length rounded up to whole pages.
    pub fn capacity_bytes(&self) -> usize {
        capacity(self.length)
    }

    /// All bytes that belong to the slot, for direct reads that must be whole pages long. Page-aligned.
    pub fn padded_mut(&mut self) -> &mut [u8] {
        // SAFETY: the slot owns its whole pages, they are initialised, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), capacity(self.length)) }
    }

    /// Where it lies in shared memory; `None` for a heap slot.
    pub fn location(&self) -> Option<Location> {
        match &self.home {
            Home::Arena { location, .. } => Some(*location),
            Home::Heap { .. } => None,
        }
    }

    /// Ends writing.
    pub fn freeze(self) -> Slot {
        Slot(self)
    }
}

impl Deref for SlotMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `length` initialised bytes belong to this slot until it is dropped.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.length) }
    }
}

impl DerefMut for SlotMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.length) }
    }
}

impl Drop for SlotMut {
    fn drop(&mut self) {
        match &self.home {
            Home::Arena {
                arena,
                page,
                location,
            } => arena.give_back(*page, location),
            // SAFETY: allocated by `heap_with` with this very layout.
            Home::Heap { .. } => unsafe { dealloc(self.base.as_ptr(), heap_layout(self.length)) },
        }
    }
}

impl fmt::Debug for SlotMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotMut")
            .field("len", &self.length)
            .field("location", &self.location())
            .finish()
    }
}

/// A slot that nobody writes any more. Fit to be the owner of a `bytes::Bytes`.
pub struct Slot(SlotMut);

impl Slot {
    /// Where it lies in shared memory; `None` for a heap slot.
    pub fn location(&self) -> Option<Location> {
        self.0.location()
    }

    /// All bytes that belong to the slot, for direct writes that must be whole pages long. What lies
    /// behind the slot's length is arbitrary.
    pub fn padded(&self) -> &[u8] {
        // SAFETY: as in `SlotMut::padded_mut`, and frozen bytes are only read.
        unsafe { std::slice::from_raw_parts(self.0.base.as_ptr(), capacity(self.0.length)) }
    }
}

impl Deref for Slot {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for Slot {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("len", &self.0.length)
            .field("location", &self.location())
            .finish()
    }
}

fn capacity(length: usize) -> usize {
    length.max(1).next_multiple_of(PAGE_BYTES)
}

fn heap_layout(length: usize) -> Layout {
    Layout::from_size_align(capacity(length), PAGE_BYTES)
        .expect("a slot is shorter than isize::MAX")
}
