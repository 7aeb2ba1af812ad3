//! One entry, read from its position by one system call: no copy of a large block, one pass over it.
//!
//! ```text
//!   on disk   │ foyer's header 36 │ record's head │ padding │ block, from a page on │ key │
//!   large     └────────── one or a few pages ─────────────┘ └── right into the slot ──┘       summed there
//!   small     └────────────────────── a buffer, copied to the slot and summed on the way ──┘
//! ```
//!
//! Large is what [`Geometry::is_padded`] says: there the padding costs under two per cent of the disk,
//! and the copy would cost as much as the sums.
//!
//! Errors: none. What does not fit the resident in every field and every sum is [`Direct::Stray`], with
//! the slot as it was given, for foyer to try.

use std::io::IoSliceMut;

use kvgpu::SlotMut;
use kvproto::{
    BlockHeader,
    checksum::{copy_and_sum, page_sums},
};

use super::{
    super::{
        Resident,
        block::{MutableBlock, SealedBlock},
        record,
    },
    config::{ENTRY_HEADER_BYTES, Geometry, PAGE},
    extents::{Extents, Position},
};

/// What a direct read came to.
#[allow(
    clippy::large_enum_variant,
    reason = "a block is the rule, and moving it beats boxing it"
)]
pub(super) enum Direct {
    /// The block, verified, in the slot.
    Block(SealedBlock),
    /// It is not there, or cannot be read; the slot holds anything.
    Stray(SlotMut),
}

/// Reads the resident's entry into the beginning of `slot`. Blocks.
pub(super) fn read_entry(
    extents: &Extents,
    geometry: Geometry,
    position: Position,
    resident: &Resident,
    mut slot: SlotMut,
) -> Direct {
    let read = if geometry.is_padded(resident.length_bytes) {
        read_in_place(extents, position, resident, &mut slot)
    } else {
        let entry_bytes = geometry.entry_bytes(resident.length_bytes) as usize;
        read_and_copy(extents, position, entry_bytes, resident, &mut slot)
    };
    let Some((header, sums)) = read else {
        return Direct::Stray(slot);
    };
    let block = MutableBlock::new(resident.key, resident.place, resident.length_bytes, slot);
    match block.seal_summed(header, &sums) {
        Ok(block) => Direct::Block(block),
        Err(unsealed) => Direct::Stray(unsealed.block.into_slot()),
    }
}

fn read_in_place(
    extents: &Extents,
    position: Position,
    resident: &Resident,
    slot: &mut SlotMut,
) -> Option<(BlockHeader, Vec<u64>)> {
    let length = resident.length_bytes as usize;
    let head_bytes = ENTRY_HEADER_BYTES
        + record::head_bytes(resident.length_bytes)
        + record::padding_bytes(resident.length_bytes, ENTRY_HEADER_BYTES);
    let mut head = SlotMut::heap(head_bytes);
    // The slot's last page takes what lies behind the block; the entry is whole pages long.
    let pages = length.next_multiple_of(PAGE as usize);
    let block = slot.padded_mut().get_mut(..pages)?;
    let mut buffers = [IoSliceMut::new(head.padded_mut()), IoSliceMut::new(block)];
    extents.read(position, &mut buffers).ok()?;
    let (header, rest) = head_of(&head, resident)?;
    // Behind the head the block begins, and so does the slot.
    rest.is_empty()
        .then(|| (header, page_sums(&slot[..length])))
}

fn read_and_copy(
    extents: &Extents,
    position: Position,
    entry_bytes: usize,
    resident: &Resident,
    slot: &mut SlotMut,
) -> Option<(BlockHeader, Vec<u64>)> {
    let length = resident.length_bytes as usize;
    let mut entry = SlotMut::heap(entry_bytes);
    extents
        .read(position, &mut [IoSliceMut::new(entry.padded_mut())])
        .ok()?;
    let (header, rest) = head_of(&entry, resident)?;
    let mut sums = Vec::new();
    copy_and_sum(rest.get(..length)?, slot.get_mut(..length)?, &mut sums);
    Some((header, sums))
}

/// The record's header, if it is the resident's, and what lies behind it.
fn head_of<'a>(entry: &'a [u8], resident: &Resident) -> Option<(BlockHeader, &'a [u8])> {
    let mut rest = entry.get(ENTRY_HEADER_BYTES..)?;
    let header = record::read_head(&mut rest).ok()?;
    let same = header.key == resident.key
        && header.seal == resident.seal
        && header.place == resident.place
        && header.length_bytes == resident.length_bytes;
    same.then_some((header, rest))
}
