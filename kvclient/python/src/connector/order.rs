//! What a scheduler tells its workers to move.
//!
//! ```text
//! hashes     │ h0 │ h1 │ h2 │ h3 │      the chain up to the last block of the order
//! block_ids            │ 17 │  4 │      the engine's blocks; here `first` is 2
//! ```

/// Blocks of one request on their way: `block_ids` are blocks `first`, `first + 1`, … of the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Its number, given by the scheduler.
    pub job: u64,
    /// Whose blocks.
    pub request: String,
    /// Hashes of the chain from its root on.
    pub hashes: Vec<u8>,
    /// Bytes of each.
    pub width: usize,
    /// The first block.
    pub first: usize,
    /// The engine's blocks.
    pub block_ids: Vec<u32>,
    /// The lease of a load; 0: none.
    pub lease: u64,
}

impl Order {
    /// Hash of block `i` of the chain.
    #[must_use]
    pub fn hash(&self, i: usize) -> &[u8] {
        &self.hashes[i * self.width..(i + 1) * self.width]
    }

    /// The block after the last.
    #[must_use]
    pub fn end(&self) -> usize {
        self.first + self.block_ids.len()
    }
}
