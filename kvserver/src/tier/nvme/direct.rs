//! One entry, read from its position into the reader's slot.
//!
//! ```text
//!   on disk   │ foyer's header 36 │ record's head │ block │ key │
//!                └──── whole pages, up to 2 MiB at once ────┘ ─► stage (huge page, used again)
//!                                       └ 64 KiB at a time ─► slot, past the cache; summed while warm
//! ```
//!
//! Why a stage and not the slot itself: a slot in ordinary shared memory is so many scattered pages of
//! 4 KiB, each of which is pinned, listed in the request and looked up by whoever serves it. Measured on a
//! virtual disk, 1 MiB into scattered pages goes at half the rate of 1 MiB into one huge page, and
//! costs as much more as the copy; with the copy past the cache the stage is the cheaper way as well. Why
//! not foyer's buffer: it is new for each read, and summed once more.
//!
//! Errors: none. What does not fit the resident in every field and every sum is [`Direct::Stray`], with
//! the slot as it was given, for foyer to try.

use std::io;

use kvgpu::{SlotMut, Stage, copy};
use kvproto::{
    BlockHeader,
    checksum::{PAGE_BYTES, page_sums},
};
use parking_lot::Mutex;

use super::{
    super::{
        Resident,
        block::{MutableBlock, SealedBlock},
        record,
    },
    config::{ENTRY_HEADER_BYTES, Geometry, PAGE},
    extents::{Extents, Position},
};

/// Bytes read at once: a huge page, which holds the usual block and its head.
const STAGE_BYTES: usize = 2 << 20;
/// Stages kept for the next reads; more than these exist only while so many reads are under way.
const SPARE_STAGES: usize = 16;

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

/// Memory that entries are read into. One per disk thread at most.
#[derive(Debug, Default)]
pub(super) struct Stages(Mutex<Vec<Stage>>);

impl Stages {
    fn take(&self) -> io::Result<Stage> {
        let spare = self.0.lock().pop();
        spare.map_or_else(|| Stage::new(STAGE_BYTES), Ok)
    }

    fn give_back(&self, stage: Stage) {
        let mut spare = self.0.lock();
        if spare.len() < SPARE_STAGES {
            spare.push(stage);
        }
    }
}

/// Reads the resident's entry into the beginning of `slot`. Blocks.
pub(super) fn read_entry(
    extents: &Extents,
    geometry: Geometry,
    position: Position,
    resident: &Resident,
    mut slot: SlotMut,
) -> Direct {
    let Ok(mut stage) = extents.stages.take() else {
        return Direct::Stray(slot);
    };
    let entry_bytes = geometry.entry_bytes(resident.length_bytes) as usize;
    let entry = Entry {
        extents,
        position,
        bytes: entry_bytes,
    };
    let read = entry.read(resident, &mut stage, &mut slot);
    extents.stages.give_back(stage);
    let Some((header, sums)) = read else {
        return Direct::Stray(slot);
    };
    let block = MutableBlock::new(resident.key, resident.place, resident.length_bytes, slot);
    match block.seal_summed(header, &sums) {
        Ok(block) => Direct::Block(block),
        Err(unsealed) => Direct::Stray(unsealed.block.into_slot()),
    }
}

struct Entry<'a> {
    extents: &'a Extents,
    position: Position,
    bytes: usize,
}

impl Entry<'_> {
    /// The header, and the sums of what was put into the slot.
    fn read(
        &self,
        resident: &Resident,
        stage: &mut Stage,
        slot: &mut SlotMut,
    ) -> Option<(BlockHeader, Vec<u64>)> {
        let length = resident.length_bytes as usize;
        let block = slot.get_mut(..length)?;
        let block_at = ENTRY_HEADER_BYTES + record::head_bytes(resident.length_bytes);
        // Far more than the longest block's head.
        let mut piece = self.stage(0, stage)?;
        let header = head_of(piece.get(..block_at)?, resident)?;
        piece = &piece[block_at..];
        let (mut done, mut sums) = (0, Vec::with_capacity(header.page_sums.len()));
        loop {
            let there = piece.len().min(length - done);
            // Whole pages, but for the last of all: sums are by page.
            let take = match done + there == length {
                true => there,
                false => there / PAGE_BYTES * PAGE_BYTES,
            };
            put(&piece[..take], &mut block[done..done + take], &mut sums);
            done += take;
            if done == length {
                return Some((header, sums));
            }
            piece = self.stage(block_at + done, stage)?;
        }
    }

    /// What of the entry lies at `from` and behind it, as far as the stage holds it.
    fn stage<'s>(&self, from: usize, stage: &'s mut Stage) -> Option<&'s [u8]> {
        let page = PAGE as usize;
        let begin = from / page * page;
        let bytes = self.bytes.checked_sub(begin)?.min(STAGE_BYTES);
        let at = Position {
            offset: self.position.offset.checked_add(begin as u32)?,
            ..self.position
        };
        let staged = stage.get_mut(..bytes)?;
        self.extents.read(at, staged).ok()?;
        staged.get(from - begin..)
    }
}

/// Copies whole pages, past the cache if there is much of it, and sums each where it still is in the
/// cache: in the stage, which then is the same.
fn put(source: &[u8], target: &mut [u8], sums: &mut Vec<u64>) {
    let streams = source.len() >= copy::STREAM_FROM_BYTES;
    let pages = source.chunks(PAGE_BYTES).zip(target.chunks_mut(PAGE_BYTES));
    for (source, target) in pages {
        match streams {
            true => copy::stream(target, source),
            false => target.copy_from_slice(source),
        }
        sums.extend(page_sums(source));
    }
}

/// The record's header, if it is the resident's and ends where `head` does.
fn head_of(head: &[u8], resident: &Resident) -> Option<BlockHeader> {
    let mut rest = head.get(ENTRY_HEADER_BYTES..)?;
    let header = record::read_head(&mut rest).ok()?;
    let same = header.key == resident.key
        && header.seal == resident.seal
        && header.place == resident.place
        && header.length_bytes == resident.length_bytes;
    (same && rest.is_empty()).then_some(header)
}
