//! A block of KV bytes, from being filled to being shared; each step consumes the one before.
//!
//! ```text
//!   MutableBlock ──seal──► SealedBlock ──share──► BlockRef (clone, slice)
//!        │ bytes_mut()          │ header(), bytes()     │
//!      SlotMut                Slot                   Arc of it
//!        └────── dropping any of them gives the slot back to the arena ──────┘
//! ```
//!
//! Shape: a block is a [`BlockHeader`] (who it is, where in its chain, its checksums) and
//! `length_bytes` bytes in one slot. Units: bytes.
//!
//! Errors: sealing checks the writer's header against what is really in the slot, and on a difference
//! hands the block back as it was ([`Unsealed`]), so that the caller decides what becomes of the slot.
//!
//! Why types and not a state field: nobody can publish, store or serve bytes that were not checked,
//! because the functions that do so take a [`SealedBlock`] or a [`BlockRef`]; and bytes that can still
//! change cannot be shared, because a [`MutableBlock`] has one owner.

use std::{fmt, ops::Range, sync::Arc};

use bytes::Bytes;
use kvgpu::{Location, Slot, SlotMut};
use kvproto::{
    BlockHeader, BlockKey, Place,
    checksum::{Mismatch, page_sums},
};

/// A slot being filled with the bytes of one block.
pub struct MutableBlock {
    key: BlockKey,
    place: Place,
    length_bytes: u64,
    slot: SlotMut,
}

#[allow(
    clippy::result_large_err,
    reason = "on failure the caller gets its block back, and a box for it would be the only allocation here"
)]
impl MutableBlock {
    /// A block of `length_bytes` to be written into the beginning of `slot`.
    ///
    /// # Panics
    /// When the slot is shorter than the block: whoever allocated it asked for too little.
    #[must_use]
    pub fn new(key: BlockKey, place: Place, length_bytes: u64, slot: SlotMut) -> Self {
        assert!(slot.len() as u64 >= length_bytes, "a slot holds its block");
        Self {
            key,
            place,
            length_bytes,
            slot,
        }
    }

    /// Who this block will be.
    #[must_use]
    pub fn key(&self) -> &BlockKey {
        &self.key
    }

    /// Where in its chain.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// How many bytes it will hold.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// The bytes written so far (and, before that, whatever the slot's last tenant left).
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.slot[..self.length_bytes as usize]
    }

    /// Where to write; `length_bytes` long.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.slot[..self.length_bytes as usize]
    }

    /// Hashes the bytes and seals the block if they are what `header` says.
    ///
    /// # Errors
    /// [`Unsealed`]: the header names another block, or the bytes differ from its checksums.
    pub fn seal(self, header: BlockHeader) -> Result<SealedBlock, Unsealed> {
        let computed = page_sums(self.bytes());
        self.seal_summed(header, &computed)
    }

    /// Seals the block with page sums that were computed while its bytes were copied in.
    ///
    /// `computed` must come from the very bytes that lie in the slot now; no byte is read here.
    ///
    /// # Errors
    /// As [`MutableBlock::seal`].
    pub fn seal_summed(
        self,
        header: BlockHeader,
        computed: &[u64],
    ) -> Result<SealedBlock, Unsealed> {
        let why = if header.key != self.key || header.place != self.place {
            SealError::AnotherBlock
        } else if header.length_bytes != self.length_bytes {
            SealError::Length {
                header_bytes: header.length_bytes,
                block_bytes: self.length_bytes,
            }
        } else if let Err(mismatch) = header.check(computed) {
            SealError::Checksum(mismatch)
        } else {
            return Ok(SealedBlock {
                header,
                slot: self.slot.freeze(),
            });
        };
        Err(Unsealed { block: self, why })
    }

    /// Gives the slot back without sealing.
    #[must_use]
    pub fn into_slot(self) -> SlotMut {
        self.slot
    }
}

impl fmt::Debug for MutableBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MutableBlock")
            .field("key", &self.key)
            .field("length_bytes", &self.length_bytes)
            .finish_non_exhaustive()
    }
}

/// A block that could not be sealed, handed back with the reason.
#[derive(Debug)]
pub struct Unsealed {
    /// The block as it was; dropping it frees the slot.
    pub block: MutableBlock,
    /// What did not fit.
    pub why: SealError,
}

impl fmt::Display for Unsealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "block {:?} cannot be sealed: {}",
            self.block.key, self.why
        )
    }
}

impl std::error::Error for Unsealed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.why)
    }
}

/// Why a block could not be sealed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Key or place differ from what was reserved.
    #[error("the header names another block or place")]
    AnotherBlock,
    /// The header speaks of another length.
    #[error("the header says {header_bytes} bytes, the block has {block_bytes}")]
    Length {
        /// What the header says.
        header_bytes: u64,
        /// What was reserved and written.
        block_bytes: u64,
    },
    /// The bytes are not those that the writer summed.
    #[error("checksum differs: {0}")]
    Checksum(Mismatch),
}

/// A whole, checked block with one owner. Nobody can change its bytes any more.
pub struct SealedBlock {
    header: BlockHeader,
    slot: Slot,
}

impl SealedBlock {
    /// Who it is, and its checksums.
    #[must_use]
    pub fn header(&self) -> &BlockHeader {
        &self.header
    }

    /// Its bytes, `header().length_bytes` of them.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.slot[..self.header.length_bytes as usize]
    }

    /// Makes it shareable.
    #[must_use]
    pub fn share(self) -> BlockRef {
        BlockRef(Arc::new(self))
    }
}

impl fmt::Debug for SealedBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedBlock")
            .field("key", &self.header.key)
            .field("length_bytes", &self.header.length_bytes)
            .finish_non_exhaustive()
    }
}

/// A shared hold on a sealed block; the slot is free again when the last one is gone.
#[derive(Clone)]
pub struct BlockRef(Arc<SealedBlock>);

impl BlockRef {
    /// Who it is, and its checksums.
    #[must_use]
    pub fn header(&self) -> &BlockHeader {
        &self.0.header
    }

    /// Who it is.
    #[must_use]
    pub fn key(&self) -> &BlockKey {
        &self.0.header.key
    }

    /// Where in its chain.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.0.header.place
    }

    /// How many bytes it holds.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.0.header.length_bytes
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    /// Part of its bytes by reference: nothing is copied, and the slot lives as long as the slice.
    ///
    /// # Panics
    /// When the range is outside the block.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(
            range.start <= range.end && range.end <= self.bytes().len(),
            "a slice lies inside its block"
        );
        if range.is_empty() {
            return Bytes::new();
        }
        Bytes::from_owner(Held {
            block: self.clone(),
            range,
        })
    }

    /// Where its bytes lie in the arena; `None` for ordinary memory.
    #[must_use]
    pub fn location(&self) -> Option<Location> {
        self.0.slot.location()
    }

    /// How many hold it now, slices included.
    #[must_use]
    pub fn strong_count(&self) -> usize {
        Arc::strong_count(&self.0)
    }
}

impl fmt::Debug for BlockRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockRef")
            .field("key", self.key())
            .field("length_bytes", &self.len_bytes())
            .field("held", &self.strong_count())
            .finish()
    }
}

/// What a [`BlockRef::slice`] owns.
struct Held {
    block: BlockRef,
    range: Range<usize>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.block.bytes()[self.range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use kvproto::{NamespaceId, Part, RunHash, SequenceHash};

    use super::*;

    fn filled(fill: u8, length_bytes: usize) -> (MutableBlock, BlockHeader) {
        let key = BlockKey {
            namespace: NamespaceId([1; 16]),
            hash: SequenceHash([fill; 32]),
            part: Part::default(),
        };
        let place = Place {
            run: RunHash([fill; 32]),
            index: 0,
            parent: None,
        };
        let mut block =
            MutableBlock::new(key, place, length_bytes as u64, SlotMut::heap(length_bytes));
        block.bytes_mut().fill(fill);
        let header = BlockHeader::describe(key, place, block.bytes());
        (block, header)
    }

    #[test]
    fn what_was_written_is_what_is_shared() {
        let (block, header) = filled(7, 100_000);
        let shared = block.seal(header).expect("sums fit").share();
        assert_eq!(shared.len_bytes(), 100_000);
        assert!(shared.bytes().iter().all(|&b| b == 7));
    }

    #[test]
    fn a_changed_byte_keeps_a_block_unsealed_and_hands_it_back() {
        let (mut block, header) = filled(7, 100_000);
        block.bytes_mut()[99_999] ^= 1;
        let unsealed = block.seal(header.clone()).expect_err("one bit differs");
        assert!(matches!(unsealed.why, SealError::Checksum(_)));
        let mut block = unsealed.block;
        block.bytes_mut()[99_999] ^= 1;
        block.seal(header).expect("repaired");
    }

    #[test]
    fn another_blocks_header_does_not_seal() {
        let (block, _) = filled(7, 4096);
        let (_, other) = filled(8, 4096);
        assert_eq!(
            block.seal(other).expect_err("another key").why,
            SealError::AnotherBlock
        );
    }

    #[test]
    fn a_slice_is_the_same_memory_and_holds_the_slot() {
        let (block, header) = filled(7, 8192);
        let shared = block.seal(header).expect("sums fit").share();
        let slice = shared.slice(4096..8192);
        assert_eq!(slice.as_ptr(), shared.bytes()[4096..].as_ptr());
        assert_eq!(shared.strong_count(), 2);
        drop(shared);
        assert!(slice.iter().all(|&b| b == 7));
    }
}
