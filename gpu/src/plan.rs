//! Which pages become which blocks, and back.
//!
//! ```text
//!  pages [7, 3, 4, 9], pages_per_block 2
//!    block 0 = [layer][K, V][page 7 │ page 3]    block 1 = [layer][K, V][page 4 │ page 9]
//! ```
//!
//! A plan is a batch: all its blocks lie one behind the other, are moved by one kernel and one transfer,
//! and each is a contiguous stretch that Terrace stores as one block. Blocks may also lie further apart
//! ([`CopyPlan::spaced`]), where layers of another shape fill the rest of each. Gather reads the pages, scatter
//! writes them; the plan is the same. It is checked once, when it is made, so that a device need only
//! check that the memory given is as long as the plan says.

use crate::layout::{KvLayout, LayoutError, MAX_GRID};

/// A checked batch of pages to gather or scatter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyPlan {
    layout: KvLayout,
    pages: Vec<u32>,
    pages_per_block: u32,
    /// Bytes from a block to the next.
    block_stride: u64,
}

/// Bytes that lie together on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyRun {
    /// Which layer.
    pub layer: u32,
    /// First byte within the layer.
    pub paged: u64,
    /// First byte within the blocks.
    pub block: u64,
    /// How many bytes.
    pub length: u64,
}

impl CopyPlan {
    /// The most pages in one plan.
    pub const MAX_PAGES: usize = MAX_GRID as usize;

    /// A plan for `pages` of `layout`, `pages_per_block` of them to a block.
    ///
    /// # Errors
    /// Names the field: anything [`KvLayout::validate`] refuses, a page outside the layout, too many
    /// pages, none, or a last block that is not full.
    pub fn new(
        layout: KvLayout,
        pages: Vec<u32>,
        pages_per_block: u32,
    ) -> Result<Self, LayoutError> {
        layout.validate()?;
        let wrong = |field, problem: String| Err(LayoutError::new(field, problem));
        if pages_per_block == 0 {
            return wrong("pages_per_block", "must not be zero".into());
        }
        if pages.is_empty() || pages.len() > Self::MAX_PAGES {
            return wrong(
                "pages",
                format!("{} pages, must be 1 to {}", pages.len(), Self::MAX_PAGES),
            );
        }
        if !pages.len().is_multiple_of(pages_per_block as usize) {
            let problem = format!(
                "{} pages are no whole blocks of {pages_per_block}",
                pages.len()
            );
            return wrong("pages", problem);
        }
        if let Some(page) = pages.iter().find(|page| **page >= layout.pages) {
            return wrong(
                "pages",
                format!("page {page} of a layout with {}", layout.pages),
            );
        }
        Ok(Self {
            layout,
            pages,
            pages_per_block,
            block_stride: layout.page_bytes_all_layers() * u64::from(pages_per_block),
        })
    }

    /// The same with `stride_bytes` from the start of a block to that of the next.
    ///
    /// # Errors
    /// Names the field: blocks that would overlap, or exceed the address space.
    pub fn spaced(mut self, stride_bytes: u64) -> Result<Self, LayoutError> {
        let fits = stride_bytes >= self.block_bytes()
            && stride_bytes
                .checked_mul(self.blocks() as u64)
                .is_some_and(|all| all <= i64::MAX as u64);
        if !fits {
            let problem = format!("{stride_bytes} between blocks of {}", self.block_bytes());
            return Err(LayoutError::new("stride_bytes", problem));
        }
        self.block_stride = stride_bytes;
        Ok(self)
    }

    /// The layout it is for.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The pages, in order.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Pages per block.
    pub fn pages_per_block(&self) -> u32 {
        self.pages_per_block
    }

    /// How many blocks.
    pub fn blocks(&self) -> usize {
        self.pages.len() / self.pages_per_block as usize
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> u64 {
        self.layout.page_bytes_all_layers() * u64::from(self.pages_per_block)
    }

    /// Bytes from the start of a block to that of the next.
    pub fn block_stride(&self) -> u64 {
        self.block_stride
    }

    /// Bytes from the start of the first block to the end of the last.
    pub fn total_bytes(&self) -> u64 {
        self.block_stride * (self.blocks() as u64 - 1) + self.block_bytes()
    }

    /// Whether the plan can scatter: a page written from two places would end as a mixture.
    ///
    /// # Errors
    /// Names the page that occurs twice.
    pub fn check_scatter(&self) -> Result<(), LayoutError> {
        let mut sorted = self.pages.clone();
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(LayoutError::new(
                "pages",
                format!("page {} would be written twice", pair[0]),
            )),
            None => Ok(()),
        }
    }

    /// The plan as copies, in the order of the blocks; what is adjacent on both sides is one run. This is
    /// what the kernels must amount to, and what a device without kernels does.
    pub fn runs(&self) -> Vec<CopyRun> {
        let mut runs: Vec<CopyRun> = Vec::new();
        let mut push = |run: CopyRun| {
            if let Some(last) = runs.last_mut()
                && last.layer == run.layer
                && last.paged + last.length == run.paged
                && last.block + last.length == run.block
            {
                last.length += run.length;
            } else {
                runs.push(run);
            }
        };
        let (layout, strides) = (&self.layout, self.layout.strides());
        for (i, pages) in self.pages.chunks(self.pages_per_block as usize).enumerate() {
            let mut block = i as u64 * self.block_stride;
            for layer in 0..layout.layers {
                for half in 0..u64::from(layout.kv) {
                    for page in pages {
                        let paged = half * strides.kv + u64::from(*page) * strides.page;
                        if layout.pages_are_flat() {
                            push(CopyRun {
                                layer,
                                paged,
                                block,
                                length: layout.page_bytes(),
                            });
                            block += layout.page_bytes();
                            continue;
                        }
                        for token in 0..u64::from(layout.page_tokens) {
                            for head in 0..u64::from(layout.heads) {
                                let paged = paged + token * strides.token + head * strides.head;
                                push(CopyRun {
                                    layer,
                                    paged,
                                    block,
                                    length: layout.row_bytes(),
                                });
                                block += layout.row_bytes();
                            }
                        }
                    }
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::{CopyPlan, CopyRun};
    use crate::layout::{Arrangement, KvLayout, KvOrder};

    const LAYOUT: KvLayout = KvLayout {
        layers: 2,
        kv: 2,
        pages: 10,
        page_tokens: 4,
        heads: 2,
        head_size: 8,
        dtype_bytes: 2,
        order: KvOrder::Nhd,
        arrangement: Arrangement::KvFirst,
    };

    #[test]
    fn adjacent_pages_are_one_run() {
        let plan = CopyPlan::new(LAYOUT, vec![3, 4, 5, 8], 4).unwrap();
        let page = LAYOUT.page_bytes();
        let runs = plan.runs();
        assert_eq!(runs.len(), 2 * 2 * 2);
        assert_eq!(
            runs[0],
            CopyRun {
                layer: 0,
                paged: 3 * page,
                block: 0,
                length: 3 * page
            }
        );
        assert_eq!(
            runs[1],
            CopyRun {
                layer: 0,
                paged: 8 * page,
                block: 3 * page,
                length: page
            }
        );
        assert_eq!(runs[2].paged, (10 + 3) * page);
        assert_eq!(plan.total_bytes(), 4 * 4 * page);
    }

    #[test]
    fn runs_cover_every_byte_of_the_blocks_once_and_in_turn() {
        for order in [KvOrder::Nhd, KvOrder::Hnd] {
            for arrangement in [Arrangement::KvFirst, Arrangement::PageFirst] {
                let layout = KvLayout {
                    order,
                    arrangement,
                    ..LAYOUT
                };
                let plan = CopyPlan::new(layout, vec![9, 0, 1, 5, 5, 2], 2).unwrap();
                let mut end = 0;
                for run in plan.runs() {
                    assert_eq!(run.block, end);
                    assert!(run.paged + run.length <= layout.layer_bytes());
                    end += run.length;
                }
                assert_eq!(end, plan.total_bytes());
            }
        }
    }

    #[test]
    fn spaced_blocks_leave_room_and_never_overlap() {
        let plan = CopyPlan::new(LAYOUT, vec![3, 5], 1).unwrap();
        let (block, runs) = (plan.block_bytes(), plan.runs());
        let wide = plan.clone().spaced(block + 100).unwrap();
        assert_eq!(wide.total_bytes(), 2 * block + 100);
        for (run, near) in wide.runs().iter().zip(&runs) {
            let shift = if near.block >= block { 100 } else { 0 };
            assert_eq!(run.block, near.block + shift);
            assert_eq!((run.paged, run.length), (near.paged, near.length));
        }
        assert_eq!(plan.spaced(block - 1).unwrap_err().field, "stride_bytes");
    }

    #[test]
    fn what_cannot_be_names_its_field() {
        let field = |pages: Vec<u32>, per| CopyPlan::new(LAYOUT, pages, per).unwrap_err().field;
        assert_eq!(field(vec![], 1), "pages");
        assert_eq!(field(vec![10], 1), "pages");
        assert_eq!(field(vec![1, 2, 3], 2), "pages");
        assert_eq!(field(vec![1], 0), "pages_per_block");
        assert_eq!(field(vec![1; 70_000], 1), "pages");
        let broken = KvLayout { kv: 0, ..LAYOUT };
        assert_eq!(CopyPlan::new(broken, vec![1], 1).unwrap_err().field, "kv");
    }

    #[test]
    fn a_page_cannot_be_scattered_to_twice() {
        let plan = CopyPlan::new(LAYOUT, vec![1, 2, 1], 1).unwrap();
        assert_eq!(
            plan.check_scatter().unwrap_err().to_string(),
            "pages: page 1 would be written twice"
        );
        assert!(
            CopyPlan::new(LAYOUT, vec![1, 2], 1)
                .unwrap()
                .check_scatter()
                .is_ok()
        );
    }
}
