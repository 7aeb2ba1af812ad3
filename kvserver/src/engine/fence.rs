//! What an invalidation outlaws among work that is still under way.
//!
//! ```text
//! put begins (now = 7) ··· invalidate raises a fence (8) ··· put ends: 7 < 8, dropped
//! ```
//!
//! Shape: a clock of invalidations and a fixed table of fences, by namespace and by block. Two namespaces that share
//! a place in the table share fences: a put is lost that need not have been, and nothing is ever kept that must go.
//! Why not per block for prefixes: of a block still being written nobody knows its ancestors, so a fence on a prefix
//! is one on its namespace.

use std::sync::atomic::{AtomicU64, Ordering};

use kvproto::{BlockKey, NamespaceId, SequenceHash};
use xxhash_rust::xxh3::xxh3_64_with_seed;

const PLACES: usize = 4096;

pub(super) struct Fences {
    now: AtomicU64,
    namespaces: Box<[AtomicU64]>,
    blocks: Box<[AtomicU64]>,
    seed: u64,
}

impl Fences {
    pub(super) fn new(seed: u64) -> Self {
        let table = || (0..PLACES).map(|_| AtomicU64::new(0)).collect();
        Self {
            now: AtomicU64::new(1),
            namespaces: table(),
            blocks: table(),
            seed,
        }
    }

    /// The moment at which work begins.
    pub(super) fn now(&self) -> u64 {
        self.now.load(Ordering::Acquire)
    }

    /// Outlaws all work in the namespace that has begun so far.
    pub(super) fn raise(&self, namespace: &NamespaceId) {
        self.raise_at(&self.namespaces[self.place(&namespace.0)]);
    }

    /// Outlaws all work on a block, in any part, that has begun so far.
    pub(super) fn raise_for(&self, namespace: &NamespaceId, hash: &SequenceHash) {
        self.raise_at(&self.blocks[self.block_place(namespace, hash)]);
    }

    /// Whether a fence was raised since `began`. Asked under the block's shard lock: an invalidation raises its
    /// fence first and visits the shard after, so one of the two sees the block.
    pub(super) fn outlaw(&self, key: &BlockKey, began: u64) -> bool {
        let namespace = &self.namespaces[self.place(&key.namespace.0)];
        let block = &self.blocks[self.block_place(&key.namespace, &key.hash)];
        namespace.load(Ordering::Acquire) > began || block.load(Ordering::Acquire) > began
    }

    /// A hash of the key under this process's seed.
    pub(super) fn fingerprint(&self, key: &BlockKey) -> u64 {
        xxh3_64_with_seed(&key.to_bytes(), self.seed)
    }

    fn raise_at(&self, fence: &AtomicU64) {
        let now = self.now.fetch_add(1, Ordering::AcqRel) + 1;
        fence.fetch_max(now, Ordering::AcqRel);
    }

    fn place(&self, bytes: &[u8]) -> usize {
        xxh3_64_with_seed(bytes, self.seed) as usize % PLACES
    }

    fn block_place(&self, namespace: &NamespaceId, hash: &SequenceHash) -> usize {
        let mut bytes = [0; 48];
        bytes[..16].copy_from_slice(&namespace.0);
        bytes[16..].copy_from_slice(&hash.0);
        self.place(&bytes)
    }
}
