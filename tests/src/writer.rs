//! What the `tier_writer` process and the test that kills it have in common.

/// Capacity of its tiers: enough that nothing is evicted before it is killed.
pub const CAPACITY_BYTES: u64 = 256 << 20;
/// Length of its blocks.
pub const LENGTH_BYTES: usize = 96 << 10;
