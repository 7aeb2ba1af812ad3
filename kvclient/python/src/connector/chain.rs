//! An engine's hashes of one prompt, which grow as the prompt does.
//!
//! ```text
//! push h0, h1 ─► │ h0 │ h1 │ ─► push h2 ─► │ h0 │ h1 │ h2 │      all of one width
//! ```
//!
//! Errors: [`FieldError`] for a hash of another width than the first.

use kvproto::FieldError;

use crate::hashes::MAX_WIDTH;

/// Hashes of the blocks 0..n of one prompt, root first, joined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GrowingChain {
    bytes: Vec<u8>,
    width: usize,
}

impl GrowingChain {
    /// Blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        if self.width == 0 {
            return 0;
        }
        self.bytes.len() / self.width
    }

    /// True when there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes of each hash; 0 before the first.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// One block more.
    ///
    /// # Errors
    /// When the hash is empty, too long, or not as long as those before.
    pub fn push(&mut self, hash: &[u8]) -> Result<(), FieldError> {
        if self.width == 0 && (1..=MAX_WIDTH).contains(&hash.len()) {
            self.width = hash.len();
        }
        if hash.len() != self.width || hash.is_empty() {
            let problem = format!("has {} bytes where {} are wanted", hash.len(), self.width);
            return Err(FieldError::new("hash", problem));
        }
        self.bytes.extend_from_slice(hash);
        Ok(())
    }

    /// Hash of block `i`; `None` beyond the end.
    #[must_use]
    pub fn get(&self, i: usize) -> Option<&[u8]> {
        (i < self.len()).then(|| &self.bytes[i * self.width..(i + 1) * self.width])
    }

    /// The first `blocks` hashes, joined, or as many as there are.
    #[must_use]
    pub fn head(&self, blocks: usize) -> &[u8] {
        &self.bytes[..blocks.min(self.len()) * self.width]
    }

    /// Forgets all of it, and its width.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.width = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_stand_where_they_were_pushed() {
        let mut chain = GrowingChain::default();
        for hash in [b"aa", b"bb", b"cc"] {
            chain.push(hash).unwrap();
        }
        assert_eq!((chain.len(), chain.width()), (3, 2));
        assert_eq!(chain.get(1), Some(&b"bb"[..]));
        assert_eq!(chain.get(3), None);
        assert_eq!(
            (chain.head(2), chain.head(9)),
            (&b"aabb"[..], &b"aabbcc"[..])
        );
    }

    #[test]
    fn hashes_of_two_widths_are_no_chain() {
        let mut chain = GrowingChain::default();
        assert!(chain.push(b"").is_err());
        assert!(chain.push(&[0; MAX_WIDTH + 1]).is_err());
        chain.push(b"aa").unwrap();
        assert!(chain.push(b"b").is_err());
        assert_eq!(chain.len(), 1);
    }
}
