//! An engine's whole KV memory on a device.
//!
//! ```text
//!  groups   A: 32 layers of latent attention     B: 32 layers of its indexer
//!  block    │ A layer 0 … A layer 31 │ B layer 0 … B layer 31 │
//! ```
//!
//! One kernel moves layers of one shape and stride, so layers that differ are groups of their own; each writes its
//! part of every block, and all leave in one transfer.

use crate::device::{DeviceError, PagedKv};
use crate::layout::LayoutError;
use crate::plan::CopyPlan;

/// The most groups of one pool.
pub const MAX_GROUPS: usize = 256;

/// See the module.
#[derive(Debug, Clone)]
pub struct KvPool {
    groups: Vec<PagedKv>,
    pages: u32,
    pages_per_block: u32,
    block_bytes: u64,
}

/// One group's part of a batch.
pub(super) struct Part<'a> {
    pub(super) plan: CopyPlan,
    pub(super) paged: &'a PagedKv,
    /// Where the group begins in each block.
    pub(super) offset: usize,
}

impl Part<'_> {
    pub(super) fn bytes(&self) -> usize {
        self.plan.total_bytes() as usize
    }
}

impl KvPool {
    /// The groups in the order in which they make up a block of `pages_per_block` pages.
    ///
    /// # Errors
    /// Names the field: no groups or too many, groups with different numbers of pages, or blocks of no pages.
    pub fn new(groups: Vec<PagedKv>, pages_per_block: u32) -> Result<Self, DeviceError> {
        let wrong = |field, problem: String| Err(LayoutError::new(field, problem).into());
        if groups.is_empty() || groups.len() > MAX_GROUPS {
            let problem = format!("{} groups, must be 1 to {MAX_GROUPS}", groups.len());
            return wrong("groups", problem);
        }
        if pages_per_block == 0 {
            return wrong("pages_per_block", "must not be zero".into());
        }
        let pages = groups[0].layout().pages;
        if let Some(other) = groups.iter().find(|group| group.layout().pages != pages) {
            let problem = format!("{} beside {pages} in the first group", other.layout().pages);
            return wrong("pages", problem);
        }
        let page_bytes: u64 = groups
            .iter()
            .map(|group| group.layout().page_bytes_all_layers())
            .sum();
        match page_bytes.checked_mul(pages_per_block.into()) {
            Some(block_bytes) => Ok(Self {
                groups,
                pages,
                pages_per_block,
                block_bytes,
            }),
            None => wrong("pages_per_block", "blocks exceed the address space".into()),
        }
    }

    /// Pages of the engine.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Pages of one block.
    pub fn pages_per_block(&self) -> u32 {
        self.pages_per_block
    }

    /// Bytes of one block, all groups.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Bytes of a batch of this many pages.
    pub fn batch_bytes(&self, pages: usize) -> u64 {
        (pages / self.pages_per_block as usize) as u64 * self.block_bytes
    }

    /// Each group's part of a batch.
    pub(super) fn plans(&self, pages: &[u32]) -> Result<Vec<Part<'_>>, DeviceError> {
        let mut offset = 0;
        let mut parts = Vec::with_capacity(self.groups.len());
        for paged in &self.groups {
            let plan = CopyPlan::new(*paged.layout(), pages.to_vec(), self.pages_per_block)?;
            let length = plan.block_bytes();
            parts.push(Part {
                plan: plan.spaced(self.block_bytes)?,
                paged,
                offset: offset as usize,
            });
            offset += length;
        }
        Ok(parts)
    }
}
