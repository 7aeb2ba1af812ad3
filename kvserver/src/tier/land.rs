//! Reading a stored record straight into the slot of whoever asked, verified on the way.
//!
//! Each page is summed right after it was copied, while it is still in the core's cache, so the copy and
//! the check cost one pass over memory. Nothing is visible before all of it fits the resident's seal.

use std::io::Read;

use kvgpu::SlotMut;
use kvproto::checksum::{PAGE_BYTES, page_sums};

use super::{
    Resident,
    block::{MutableBlock, SealedBlock},
    record,
};

/// What a record turned out to be.
#[allow(
    clippy::large_enum_variant,
    reason = "a block is the rule, and moving it beats boxing it"
)]
pub(super) enum Landed {
    /// The block, verified.
    Block(SealedBlock),
    /// The bytes are not those that were written.
    Corrupt,
    /// A whole record, but of another block or another version of this one.
    Other,
    /// Reading it failed.
    Failed(std::io::Error),
}

/// Reads the record that `from` stands at into the beginning of `slot`.
pub(super) fn land(from: &mut impl Read, resident: &Resident, mut slot: SlotMut) -> Landed {
    let header = match record::read_head(from) {
        Ok(header) => header,
        Err(record::RecordError::Io(error)) => return Landed::Failed(error),
        Err(_) => return Landed::Corrupt,
    };
    if header.key != resident.key
        || header.seal != resident.seal
        || header.place != resident.place
        || header.length_bytes != resident.length_bytes
    {
        return Landed::Other;
    }
    let mut sums = Vec::with_capacity(header.page_sums.len());
    for page in slot[..header.length_bytes as usize].chunks_mut(PAGE_BYTES) {
        match from.read_exact(page) {
            Ok(()) => sums.extend(page_sums(page)),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Landed::Corrupt;
            }
            Err(error) => return Landed::Failed(error),
        }
    }
    let block = MutableBlock::new(header.key, header.place, header.length_bytes, slot);
    match block.seal_summed(header, &sums) {
        Ok(block) => Landed::Block(block),
        Err(_) => Landed::Corrupt,
    }
}
