//! An engine's own block hashes, as they came, and the chain they make.
//!
//! ```text
//! hashes  │ h0 │ h1 │ h2 │ h3 │ …      `width` bytes each, root first
//!                    └─first─┘
//! ```
//!
//! Units: blocks; a hash is `width` bytes.
//! Errors: [`FieldError`] when the bytes are no whole number of hashes, or too many.
//! Why the whole chain and not a part of it: a block's place (its run, its parent) follows from what stands before it.

use std::{ops::Range, sync::Arc};

use kvproto::{Chain, FieldError, NamespaceKey, SequenceHash, chain::MAX_CHAIN_BLOCKS, hash};

/// Longest engine hash, bytes.
pub const MAX_WIDTH: usize = 256;

/// Engine hashes of the blocks 0..n of one prompt. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineHashes {
    bytes: Arc<[u8]>,
    width: usize,
}

impl EngineHashes {
    /// The hashes in `bytes`.
    ///
    /// # Errors
    /// When `width` is 0 or above [`MAX_WIDTH`], `bytes` is no multiple of it, or holds more than a chain may have.
    pub fn new(bytes: &[u8], width: usize) -> Result<Self, FieldError> {
        count(bytes, width)?;
        Ok(Self {
            bytes: bytes.into(),
            width,
        })
    }

    /// Blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.width
    }

    /// True when there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Hash of block `i`.
    ///
    /// # Panics
    /// When there is no such block.
    #[must_use]
    pub fn get(&self, i: usize) -> &[u8] {
        &self.bytes[i * self.width..(i + 1) * self.width]
    }

    /// Those in `range`, root side first.
    pub fn iter(&self, range: Range<usize>) -> impl Iterator<Item = &[u8]> {
        range.map(|i| self.get(i))
    }

    /// The chain of the blocks in `range`, which knows where it stands.
    ///
    /// # Panics
    /// When `range` is empty or out of range, or `run_blocks` is 0.
    #[must_use]
    pub fn chain(&self, key: &NamespaceKey, run_blocks: u32, range: Range<usize>) -> Chain {
        assert!(
            !range.is_empty() && range.end <= self.len(),
            "{range:?} of {}",
            self.len()
        );
        let fold = |i: usize| -> SequenceHash { hash::engine(key, self.get(i)) };
        let first = range.start;
        let into_run = first % run_blocks as usize;
        Chain {
            first_index: u32::try_from(first).expect("a chain has at most 65,536 blocks"),
            run: (into_run > 0).then(|| fold(first - into_run).into()),
            parent: (first > 0).then(|| fold(first - 1)),
            hashes: range.map(fold).collect(),
            jumps: Vec::new(),
        }
    }
}

/// How many hashes of `width` bytes lie in `bytes`.
///
/// # Errors
/// As [`EngineHashes::new`].
pub fn count(bytes: &[u8], width: usize) -> Result<usize, FieldError> {
    if width == 0 || width > MAX_WIDTH {
        return Err(FieldError::new(
            "width",
            format!("is {width}; 1 to {MAX_WIDTH} bytes are allowed"),
        ));
    }
    let count = bytes.len() / width;
    let problem = if !bytes.len().is_multiple_of(width) {
        format!("has {} bytes, no multiple of {width}", bytes.len())
    } else if count > MAX_CHAIN_BLOCKS {
        format!("has {count} blocks; at most {MAX_CHAIN_BLOCKS} are allowed")
    } else {
        return Ok(count);
    };
    Err(FieldError::new("hashes", problem))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert_eq, proptest};

    use super::*;

    const KEY: NamespaceKey = NamespaceKey::from_bytes([3; 32]);

    proptest! {
        #[test]
        fn a_part_of_the_chain_is_a_slice_of_the_whole(
            blocks in 1usize..50, run in 1u32..9, first in 0usize..50, len in 1usize..50, width in 1usize..40,
        ) {
            let bytes: Vec<u8> = (0..blocks * width).map(|i| (i * 7 / 3) as u8).collect();
            let hashes = EngineHashes::new(&bytes, width).unwrap();
            let whole = hashes.chain(&KEY, run, 0..blocks);
            let first = first % blocks;
            let range = first..(first + len).min(blocks);
            let part = hashes.chain(&KEY, run, range.clone());
            prop_assert_eq!(part.validate(run), Ok(()));
            prop_assert_eq!(part, whole.slice(range, run));
        }
    }

    #[test]
    fn half_a_hash_is_refused() {
        let problem = |bytes: usize, width| {
            EngineHashes::new(&vec![0; bytes], width)
                .unwrap_err()
                .to_string()
        };
        assert!(problem(33, 32).contains("33 bytes, no multiple of 32"));
        assert!(problem(32, 0).starts_with("width"));
        assert!(problem((MAX_CHAIN_BLOCKS + 1) * 8, 8).contains("at most 65536"));
    }
}
