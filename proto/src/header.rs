//! What the writer declares of a block: who it is, where it stands, and how its bytes sum up.
//!
//! ```text
//! seal = XXH3-64 of  key 52 │ place 68 │ length u64 │ page sums u64 each      (little-endian)
//! ```
//!
//! The header travels and is stored with the bytes. Page sums alone would let right bytes pass under a wrong
//! name; the seal ties them to key, place and length.
//! Errors: [`Mismatch`] says what differs first.

use std::sync::Arc;

use twox_hash::XxHash3_64;

use crate::checksum::{PAGE_BYTES, page_count, page_sums};
use crate::key::{BlockKey, Place};

/// XXH3-64 over key, place, length and page sums: what a block claims to be.
pub fn seal(key: &BlockKey, place: &Place, length_bytes: u64, page_sums: &[u64]) -> u64 {
    /// Blocks of up to 8 MiB are sealed without an allocation.
    const STACK_SUMS: usize = 128;
    const HEAD: usize = BlockKey::BYTES + Place::BYTES + 8;
    let mut stack = [0; HEAD + 8 * STACK_SUMS];
    let mut heap;
    let len = HEAD + 8 * page_sums.len();
    let input: &mut [u8] = if len <= stack.len() {
        &mut stack[..len]
    } else {
        heap = vec![0; len];
        &mut heap
    };
    input[..BlockKey::BYTES].copy_from_slice(&key.to_bytes());
    input[BlockKey::BYTES..HEAD - 8].copy_from_slice(&place.to_bytes());
    input[HEAD - 8..HEAD].copy_from_slice(&length_bytes.to_le_bytes());
    for (bytes, sum) in input[HEAD..].chunks_exact_mut(8).zip(page_sums) {
        bytes.copy_from_slice(&sum.to_le_bytes());
    }
    XxHash3_64::oneshot(input)
}

/// How a block differs from its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// The header's seal is not that of its own fields.
    #[error("seal does not match key, place, length and page sums")]
    Seal,
    /// There are more or fewer bytes than the header says.
    #[error("length is {found_bytes} bytes, the header says {expected_bytes}")]
    Length {
        /// Bytes the header says.
        expected_bytes: u64,
        /// Bytes there are.
        found_bytes: u64,
    },
    /// There are more or fewer page sums than the length needs.
    #[error("there are {found} page sums, the length needs {expected}")]
    Pages {
        /// Page sums expected.
        expected: u64,
        /// Page sums there are.
        found: u64,
    },
    /// The bytes of a page are not those that were written.
    #[error("page {page} does not match its sum")]
    Page {
        /// The first page that differs.
        page: u64,
    },
}

/// What the writer declares of a block and every later holder and reader checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    /// Which block.
    pub key: BlockKey,
    /// Where it stands.
    pub place: Place,
    /// Its length.
    pub length_bytes: u64,
    /// XXH3-64 of each of its pages.
    pub page_sums: Arc<[u64]>,
    /// XXH3-64 over all of the above.
    pub seal: u64,
}

/// What a writer declares of a block whose bytes it has not summed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Which block.
    pub key: BlockKey,
    /// Where it stands.
    pub place: Place,
    /// Its length.
    pub length_bytes: u64,
}

impl Announced {
    /// The header, now that the writer has said its sums.
    pub fn with_sums(self, page_sums: impl Into<Arc<[u64]>>, seal: u64) -> BlockHeader {
        BlockHeader {
            key: self.key,
            place: self.place,
            length_bytes: self.length_bytes,
            page_sums: page_sums.into(),
            seal,
        }
    }
}

impl From<&BlockHeader> for Announced {
    fn from(header: &BlockHeader) -> Self {
        Self {
            key: header.key,
            place: header.place,
            length_bytes: header.length_bytes,
        }
    }
}

impl BlockHeader {
    /// The header of a block with these bytes.
    pub fn describe(key: BlockKey, place: Place, bytes: &[u8]) -> Self {
        Self::with_sums(key, place, bytes.len() as u64, page_sums(bytes))
    }

    /// The header of a block whose pages have been summed already.
    pub fn with_sums(
        key: BlockKey,
        place: Place,
        length_bytes: u64,
        page_sums: impl Into<Arc<[u64]>>,
    ) -> Self {
        let page_sums = page_sums.into();
        let seal = seal(&key, &place, length_bytes, &page_sums);
        Self {
            key,
            place,
            length_bytes,
            page_sums,
            seal,
        }
    }

    /// True when the header is whole: its seal and its number of page sums fit its other fields.
    pub fn check_seal(&self) -> bool {
        self.page_sums.len() as u64 == page_count(self.length_bytes)
            && self.seal == seal(&self.key, &self.place, self.length_bytes, &self.page_sums)
    }

    /// Checks sums computed while the bytes were moved, and the seal.
    ///
    /// # Errors
    ///
    /// The first thing that differs.
    pub fn check(&self, computed_sums: &[u64]) -> Result<(), Mismatch> {
        let expected = page_count(self.length_bytes);
        for found in [self.page_sums.len() as u64, computed_sums.len() as u64] {
            if found != expected {
                return Err(Mismatch::Pages { expected, found });
            }
        }
        if let Some(page) = self
            .page_sums
            .iter()
            .zip(computed_sums)
            .position(|(a, b)| a != b)
        {
            return Err(Mismatch::Page { page: page as u64 });
        }
        if !self.check_seal() {
            return Err(Mismatch::Seal);
        }
        Ok(())
    }

    /// Checks all bytes of the block, and the seal.
    ///
    /// # Errors
    ///
    /// The first thing that differs.
    pub fn verify(&self, bytes: &[u8]) -> Result<(), Mismatch> {
        let found_bytes = bytes.len() as u64;
        if found_bytes != self.length_bytes {
            return Err(Mismatch::Length {
                expected_bytes: self.length_bytes,
                found_bytes,
            });
        }
        if !self.check_seal() {
            return Err(Mismatch::Seal);
        }
        self.compare(0, bytes)
    }

    /// Checks whole pages of the block: `bytes` begins at page `first_page` and ends at a page's end or the block's.
    ///
    /// The seal is not checked; who reads slice after slice checks it once by [`BlockHeader::check_seal`].
    ///
    /// # Errors
    ///
    /// [`Mismatch::Length`] when `bytes` does not end where a page ends, else the first page that differs.
    pub fn verify_pages(&self, first_page: u64, bytes: &[u8]) -> Result<(), Mismatch> {
        let found_bytes = bytes.len() as u64;
        let start = first_page.saturating_mul(PAGE_BYTES as u64);
        let left = self.length_bytes.saturating_sub(start);
        let whole = found_bytes.next_multiple_of(PAGE_BYTES as u64).min(left);
        if found_bytes != whole {
            return Err(Mismatch::Length {
                expected_bytes: whole,
                found_bytes,
            });
        }
        self.compare(first_page, bytes)
    }

    fn compare(&self, first_page: u64, bytes: &[u8]) -> Result<(), Mismatch> {
        for (page, bytes) in (first_page..).zip(bytes.chunks(PAGE_BYTES)) {
            if self.page_sums.get(page as usize) != Some(&XxHash3_64::oneshot(bytes)) {
                return Err(Mismatch::Page { page });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert_eq, proptest};
    use xxhash_rust::xxh3::xxh3_64;

    use super::{BlockHeader, Mismatch, seal};
    use crate::checksum::{PAGE_BYTES, page_sums};
    use crate::key::{BlockKey, NamespaceId, Part, Place, RunHash, SequenceHash};

    fn bytes(len: usize) -> Vec<u8> {
        (0..len)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect()
    }

    fn header(bytes: &[u8]) -> BlockHeader {
        let key = BlockKey {
            namespace: NamespaceId([1; 16]),
            hash: SequenceHash([2; 32]),
            part: Part::default(),
        };
        let place = Place {
            run: RunHash([3; 32]),
            index: 9,
            parent: Some(SequenceHash([4; 32])),
        };
        BlockHeader::describe(key, place, bytes)
    }

    proptest! {
        #[test]
        fn one_flipped_bit_is_found_on_its_page(len in 1usize..3 * PAGE_BYTES, at: usize, bit in 0u8..8) {
            let mut block = bytes(len);
            let header = header(&block);
            prop_assert_eq!(header.verify(&block), Ok(()));
            let at = at % len;
            block[at] ^= 1 << bit;
            let page = (at / PAGE_BYTES) as u64;
            prop_assert_eq!(header.verify(&block), Err(Mismatch::Page { page }));
            prop_assert_eq!(header.check(&page_sums(&block)), Err(Mismatch::Page { page }));
            let start = page as usize * PAGE_BYTES;
            let end = len.min(start + PAGE_BYTES);
            prop_assert_eq!(header.verify_pages(page, &block[start..end]), Err(Mismatch::Page { page }));
            if start > 0 {
                prop_assert_eq!(header.verify_pages(0, &block[..start]), Ok(()));
            }
        }
    }

    #[test]
    fn a_header_that_was_altered_breaks_its_seal() {
        let block = bytes(PAGE_BYTES + 5);
        let good = header(&block);
        assert!(good.check_seal());
        let mut other = good.clone();
        other.place.index += 1;
        assert_eq!(other.verify(&block), Err(Mismatch::Seal));
        assert_eq!(other.check(&page_sums(&block)), Err(Mismatch::Seal));
        let mut other = good.clone();
        other.key.part.rank = 1;
        assert!(!other.check_seal());
        let longer = bytes(PAGE_BYTES + 6);
        assert_eq!(
            good.verify(&longer),
            Err(Mismatch::Length {
                expected_bytes: PAGE_BYTES as u64 + 5,
                found_bytes: PAGE_BYTES as u64 + 6
            })
        );
        assert_eq!(
            good.check(&good.page_sums[..1]),
            Err(Mismatch::Pages {
                expected: 2,
                found: 1
            })
        );
    }

    #[test]
    fn a_slice_that_ends_inside_a_page_cannot_be_checked() {
        let block = bytes(2 * PAGE_BYTES + 5);
        let header = header(&block);
        assert_eq!(header.verify_pages(1, &block[PAGE_BYTES..]), Ok(()));
        assert!(matches!(
            header.verify_pages(1, &block[PAGE_BYTES..PAGE_BYTES + 7]),
            Err(Mismatch::Length { .. })
        ));
        assert!(matches!(
            header.verify_pages(u64::MAX, &block),
            Err(Mismatch::Length { .. })
        ));
    }

    #[test]
    fn long_and_short_blocks_are_sealed_alike() {
        let header = header(&[]);
        let sums: Vec<u64> = (0..1024).collect();
        for pages in [0, 1, 127, 128, 129, 1024] {
            let mut input = header.key.to_bytes().to_vec();
            input.extend(header.place.to_bytes());
            input.extend(77u64.to_le_bytes());
            input.extend(sums[..pages].iter().flat_map(|sum| sum.to_le_bytes()));
            assert_eq!(
                seal(&header.key, &header.place, 77, &sums[..pages]),
                xxh3_64(&input)
            );
        }
    }
}
