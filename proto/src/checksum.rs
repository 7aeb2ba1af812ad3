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

use twox_hash::XxHash3_64;
use twox_hash::xxhash3_64::{RawHasher, SecretBuffer};

pub use crate::header::{BlockHeader, Mismatch, seal};

/// Bytes under one page sum.
pub const PAGE_BYTES: usize = 64 * 1024;

/// Pages of a block of `length_bytes`.
pub const fn page_count(length_bytes: u64) -> u64 {
    length_bytes.div_ceil(PAGE_BYTES as u64)
}

/// The sum of one page: up to [`PAGE_BYTES`].
pub fn page_sum(page: &[u8]) -> u64 {
    XxHash3_64::oneshot(page)
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

    /// Takes a whole page as landed, whose sum was made on its way; all before it has landed.
    ///
    /// # Panics
    ///
    /// When a page is open.
    pub fn landed_page(&mut self, bytes: usize, sum: u64) {
        assert_eq!(
            self.landed_bytes,
            self.sums.len() * PAGE_BYTES,
            "a page begins where the one before ended"
        );
        self.landed_bytes += bytes;
        self.sums.push(sum);
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

    /// A whole page, or a shorter last one, whose sum was made elsewhere.
    ///
    /// # Panics
    ///
    /// When a page is open.
    pub fn page(&mut self, sum: u64) {
        assert_eq!(
            self.open_bytes, 0,
            "a page begins where the one before ended"
        );
        self.sums.push(sum);
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};
    use twox_hash::XxHash3_64;
    use xxhash_rust::xxh3::xxh3_64;

    use super::{Landing, PAGE_BYTES, PageSummer, copy_and_sum, page_sums};

    fn bytes(len: usize) -> Vec<u8> {
        (0..len)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect()
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

    }
}
