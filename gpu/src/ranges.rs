//! Ranges of some memory, given out and taken back in constant time.
//!
//! ```text
//! alloc(bytes) ─► offset ─ … ─► free(offset)        0 ≤ offset, a multiple of 4 KiB
//! ```
//!
//! The arena's own allocator ([`crate::slots`]), for memory that is not an arena: a client's staging memory. It
//! knows lengths, not bytes, and touches none.
//!
//! Units: bytes. Errors: none; "no room" is `None`.

use crate::slots::{MAX_SLOT_BYTES, PAGE_BYTES, Slots};

/// Who holds which range.
pub struct Ranges {
    slots: Slots,
}

impl Ranges {
    /// All of `bytes` is free; what is beyond the last whole page, or 2^32 pages, is never given out.
    pub fn new(bytes: u64) -> Self {
        let pages = u32::try_from(bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX);
        let mut slots = Slots::new(pages, pages.max(1));
        if pages > 0 {
            slots.bind(0, 0);
        }
        Self { slots }
    }

    /// A range of `bytes`, 1 to [`MAX_SLOT_BYTES`]: its offset. `None` when no run is long enough.
    pub fn alloc(&mut self, bytes: u64) -> Option<u64> {
        if bytes == 0 || bytes > MAX_SLOT_BYTES as u64 {
            return None;
        }
        let pages = u32::try_from(bytes.div_ceil(PAGE_BYTES as u64)).ok()?;
        let page = self.slots.alloc(0, pages)?;
        Some(u64::from(page) * PAGE_BYTES as u64)
    }

    /// Takes back the range at `offset`.
    ///
    /// # Panics
    /// When no range that was given out starts there.
    pub fn free(&mut self, offset: u64) {
        let page = u32::try_from(offset / PAGE_BYTES as u64).expect("an offset that was given out");
        self.slots.free(page);
    }

    /// Ranges that are out.
    pub fn len(&self) -> u64 {
        self.slots.slots()
    }

    /// Whether none is out.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl std::fmt::Debug for Ranges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ranges").field("out", &self.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::Ranges;
    use crate::slots::MAX_SLOT_BYTES;

    #[test]
    fn ranges_do_not_overlap_and_all_of_it_can_be_had_again() {
        let mut ranges = Ranges::new(1 << 20);
        for _ in 0..3 {
            let mut out = Vec::new();
            for bytes in [1, 4096, 4097, 100_000, 64 << 10].into_iter().cycle() {
                let Some(offset) = ranges.alloc(bytes) else {
                    break;
                };
                out.push((offset, offset + bytes));
            }
            out.sort_unstable();
            assert!(out.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{out:?}");
            assert!(out.last().is_some_and(|last| last.1 <= 1 << 20));
            for (offset, _) in out {
                ranges.free(offset);
            }
            assert!(ranges.is_empty());
            let all = ranges.alloc(1 << 20).expect("one range");
            ranges.free(all);
        }
    }

    #[test]
    fn nothing_too_much_and_what_is_not_there_is_refused() {
        let mut ranges = Ranges::new(128 << 20);
        assert_eq!(ranges.alloc(0), None);
        assert_eq!(ranges.alloc(MAX_SLOT_BYTES as u64 + 1), None);
        assert_eq!(Ranges::new(4095).alloc(1), None);
        assert_eq!(Ranges::new(0).alloc(1), None);
        assert!(ranges.alloc(MAX_SLOT_BYTES as u64).is_some());
    }
}
