//! Checksums of a block: one per page, and a seal over what the block claims to be.
//!
//! ```text
//! bytes   │ page 0, 64 KiB │ page 1 │ … │ last page, may be short │
//! sums      XXH3-64          XXH3-64      XXH3-64
//! seal      XXH3-64 of  key 52 │ place 68 │ length u64 │ sums u64 each      (little-endian)
//! ```
//!
//! The writer makes them; they are checked when a block is sealed, when it comes back from a disk, and by the
//! reader after the last hop. Pages let a slice of a block be checked alone, and say where a block broke.
//!
//! Units: bytes. Errors: [`Mismatch`] says what differs first.
//! Why XXH3 and not BLAKE3: these find accidents at memory speed; who a block is, is BLAKE3's business. Why
//! page by page: a page of 64 KiB that has just been copied is still in the core's cache, so hashing it there
//! costs no second trip to memory. `twox-hash` picks its vector code at run time; its digests are
//! those of every other XXH3.

use std::hash::Hasher;
use std::sync::Arc;

use twox_hash::XxHash3_64;
use twox_hash::xxhash3_64::{RawHasher, SecretBuffer};

use crate::key::{BlockKey, Place};

/// Bytes under one page sum.
pub const PAGE_BYTES: usize = 64 * 1024;

/// Pages of a block of `length_bytes`.
pub const fn page_count(length_bytes: u64) -> u64 {
    length_bytes.div_ceil(PAGE_BYTES as u64)
}

/// The sum of every page of `bytes`; none for no bytes.
pub fn page_sums(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(PAGE_BYTES).map(XxHash3_64::oneshot).collect()
}

/// Copies `src` to `dst` and appends the sum of every page to `sums`, page by page in one pass.
///
/// The sums are those of `dst`, read back from the cache: they also cover the copy.
///
/// # Panics
///
/// When the lengths differ.
pub fn copy_and_sum(src: &[u8], dst: &mut [u8], sums: &mut Vec<u64>) {
    assert_eq!(
        src.len(),
        dst.len(),
        "source and destination must be equally long"
    );
    sums.reserve(src.len().div_ceil(PAGE_BYTES));
    for (src, dst) in src.chunks(PAGE_BYTES).zip(dst.chunks_mut(PAGE_BYTES)) {
        dst.copy_from_slice(src);
        sums.push(XxHash3_64::oneshot(dst));
    }
}

/// Copies a block that arrives in pieces of any size to where it shall lie, and sums its pages.
///
/// Each page is hashed once, where it lies, in the moment it is whole: its start was copied only just
/// before, so it is still in the cache, and no state is carried from piece to piece.
#[derive(Clone, Debug, Default)]
pub struct Landing {
    landed_bytes: usize,
    sums: Vec<u64>,
}

impl Landing {
    /// A landing for a block of about `length_bytes`.
    pub fn new(length_bytes: u64) -> Self {
        Self {
            landed_bytes: 0,
            sums: Vec::with_capacity(page_count(length_bytes).min(1 << 16) as usize),
        }
    }

    /// Bytes landed so far.
    pub fn landed_bytes(&self) -> usize {
        self.landed_bytes
    }

    /// Takes the next `bytes` of `block` as landed: they have been read right to their place.
    ///
    /// # Panics
    ///
    /// When `block` ends before them.
    pub fn landed(&mut self, bytes: usize, block: &[u8]) {
        self.landed_bytes += bytes;
        loop {
            let page_start = self.sums.len() * PAGE_BYTES;
            if self.landed_bytes < page_start + PAGE_BYTES {
                return;
            }
            self.sums.push(XxHash3_64::oneshot(
                &block[page_start..page_start + PAGE_BYTES],
            ));
        }
    }

    /// Copies the next piece to its place in `block`, the destination of the whole block.
    ///
    /// # Panics
    ///
    /// When the piece does not fit behind what has landed.
    pub fn land(&mut self, piece: &[u8], block: &mut [u8]) {
        let mut rest = piece;
        while !rest.is_empty() {
            let page_start = self.sums.len() * PAGE_BYTES;
            let take = rest.len().min(page_start + PAGE_BYTES - self.landed_bytes);
            let (now, later) = rest.split_at(take);
            block[self.landed_bytes..self.landed_bytes + take].copy_from_slice(now);
            self.landed_bytes += take;
            rest = later;
            if self.landed_bytes == page_start + PAGE_BYTES {
                self.sums
                    .push(XxHash3_64::oneshot(&block[page_start..self.landed_bytes]));
            }
        }
    }

    /// Sums the last page, if it is short, and answers all sums.
    ///
    /// # Panics
    ///
    /// When `block` is shorter than what has landed in it.
    pub fn finish(mut self, block: &[u8]) -> Vec<u64> {
        let page_start = self.sums.len() * PAGE_BYTES;
        if page_start < self.landed_bytes {
            self.sums
                .push(XxHash3_64::oneshot(&block[page_start..self.landed_bytes]));
        }
        self.sums
    }
}

/// Sums the pages of a block that arrives in pieces of any size, for those who do not keep it in one place.
///
/// Whole pages inside a piece are hashed in one go; only a page that is split between pieces goes
/// through the slower streaming hasher. [`Landing`] does better where the block has a destination.
pub struct PageSummer {
    sums: Vec<u64>,
    open_bytes: usize,
    open: RawHasher<&'static [u8; SECRET_BYTES]>,
}

/// Length of XXH3's default secret.
const SECRET_BYTES: usize = 192;

impl PageSummer {
    /// A summer that has seen nothing.
    pub fn new() -> Self {
        Self {
            sums: Vec::new(),
            open_bytes: 0,
            open: open_page(),
        }
    }

    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some(piece) = self.cut(&mut rest) {
            self.sum(piece);
        }
    }

    /// The next bytes, copied to `dst` on the way and hashed there.
    ///
    /// # Panics
    ///
    /// When the lengths differ.
    pub fn update_copy(&mut self, src: &[u8], dst: &mut [u8]) {
        assert_eq!(
            src.len(),
            dst.len(),
            "source and destination must be equally long"
        );
        let mut rest = src;
        let mut dst = dst;
        while let Some(piece) = self.cut(&mut rest) {
            let (now, later) = dst.split_at_mut(piece.len());
            now.copy_from_slice(piece);
            self.sum(now);
            dst = later;
        }
    }

    /// The sums of all pages; a last short page is summed as it is.
    pub fn finish(mut self) -> Vec<u64> {
        if self.open_bytes > 0 {
            self.sums.push(self.open.finish());
        }
        self.sums
    }

    /// Takes off `rest` what still belongs to the current page.
    fn cut<'a>(&self, rest: &mut &'a [u8]) -> Option<&'a [u8]> {
        let (piece, later) = rest.split_at(rest.len().min(PAGE_BYTES - self.open_bytes));
        *rest = later;
        (!piece.is_empty()).then_some(piece)
    }

    /// Hashes bytes that do not cross the end of the current page.
    fn sum(&mut self, piece: &[u8]) {
        if piece.len() == PAGE_BYTES {
            self.sums.push(XxHash3_64::oneshot(piece));
            return;
        }
        self.open.write(piece);
        self.open_bytes += piece.len();
        if self.open_bytes == PAGE_BYTES {
            self.sums.push(self.open.finish());
            self.open = open_page();
            self.open_bytes = 0;
        }
    }
}

impl Default for PageSummer {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for PageSummer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageSummer")
            .field("pages", &self.sums.len())
            .field("open_bytes", &self.open_bytes)
            .finish()
    }
}

fn open_page() -> RawHasher<&'static [u8; SECRET_BYTES]> {
    RawHasher::new(SecretBuffer::default())
}

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
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};
    use twox_hash::XxHash3_64;
    use xxhash_rust::xxh3::xxh3_64;

    use super::{
        BlockHeader, Landing, Mismatch, PAGE_BYTES, PageSummer, copy_and_sum, page_sums, seal,
    };
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
        fn both_crates_agree_on_short_input(bytes in vec(any::<u8>(), 0..600)) {
            prop_assert_eq!(XxHash3_64::oneshot(&bytes), xxh3_64(&bytes));
        }

        #[test]
        fn any_split_gives_the_same_sums(len in 0usize..5 * PAGE_BYTES, cuts in vec(0usize..5 * PAGE_BYTES, 0..8)) {
            let source = bytes(len);
            let expected: Vec<u64> = source.chunks(PAGE_BYTES).map(xxh3_64).collect();
            prop_assert_eq!(&page_sums(&source), &expected);

            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(len)).chain([0, len]).collect();
            cuts.sort_unstable();
            let (mut plain, mut copying, mut landing) =
                (PageSummer::new(), PageSummer::new(), Landing::new(len as u64));
            let mut in_place = Landing::new(len as u64);
            let (mut copied, mut landed) = (vec![0; len], vec![0; len]);
            for cut in cuts.windows(2) {
                let piece = &source[cut[0]..cut[1]];
                plain.update(piece);
                copying.update_copy(piece, &mut copied[cut[0]..cut[1]]);
                landing.land(piece, &mut landed);
                in_place.landed(piece.len(), &source);
            }
            prop_assert_eq!(landing.landed_bytes(), len);
            prop_assert_eq!(&plain.finish(), &expected);
            prop_assert_eq!(&copying.finish(), &expected);
            prop_assert_eq!(&landing.finish(&landed), &expected);
            prop_assert_eq!(&in_place.finish(&source), &expected);
            prop_assert!(copied == source && landed == source);

            let (mut copy, mut sums) = (vec![0; len], Vec::new());
            copy_and_sum(&source, &mut copy, &mut sums);
            prop_assert_eq!(&sums, &expected);
            prop_assert!(copy == source);
        }

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
