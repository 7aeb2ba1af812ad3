//! Which block leaves RAM next.
//!
//! ```text
//! inserted ─► [ policy's own order over dense handles ] ─► victim
//!                 ▲ touched (a lookup's hits, tail first)
//! ```
//!
//! A policy sees handles and a few facts, never keys, bytes or locks. The engine keeps one policy per kind of
//! block, calls it under one lock, and assigns the handles: dense, so that a policy's lists are plain arrays
//! indexed by handle and only ghosts (memories of blocks that left) are hashed.
//!
//! Rules of the seam, checked for every policy by the suite in `suite.rs`:
//!
//! * a handle is `inserted` once, then `touched` any number of times, then `removed` once; it may be reused after;
//! * `victim` asks `evictable` for candidates in its order of choice, and returns the first one for which the
//!   answer is yes: the engine takes the block away *inside* that question, so a policy never asks again after a
//!   yes. `removed` follows;
//! * a block refused by `evictable` is in use; a policy may treat it as recently used;
//! * it terminates: each block is asked at most once per call.
//!
//! Cost: constant or logarithmic per call, amortised; a microsecond at most. Errors: none.
//! Why a trait: it is chosen at run time by name, judged by `replay`, and its fake is the recorder.

mod foresight;
mod list;
mod lru;
mod outlook;
mod s3fifo;
#[cfg(test)]
mod suite;

pub use foresight::Foresight;
pub use lru::Lru;
pub use s3fifo::S3Fifo;

/// Dense handle of a block in RAM. The engine assigns it and reuses it after the block has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    pub(crate) fn slot(self) -> usize {
        self.0 as usize
    }
}

/// What a policy is told of a block that enters RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockMeta {
    /// The block before it in its chain, if that one is in RAM now.
    pub parent: Option<BlockId>,
    /// Position in the chain, in blocks; 0 is the root.
    pub index: u32,
    /// Size in RAM, rounding included.
    pub bytes: u64,
    /// Hash of the key: recognises a block that comes back.
    pub fingerprint: u64,
}

/// An order of eviction. See the module page for the rules.
pub trait EvictionPolicy: Send {
    /// The name by which [`by_name`] finds it.
    fn name(&self) -> &'static str;

    /// An empty policy of the same sort, for another kind of block.
    fn fresh(&self) -> Box<dyn EvictionPolicy>;

    /// A block has entered RAM under an unused handle.
    fn inserted(&mut self, id: BlockId, meta: &BlockMeta);

    /// Blocks were asked for, those of one chain tail first, so that a head is always the more recent.
    /// Handles that are not (or no longer) in RAM are passed over.
    fn touched(&mut self, ids: &[BlockId]);

    /// The block has left RAM, as the victim or for another reason. An unknown handle is passed over.
    fn removed(&mut self, id: BlockId);

    /// The block to give up next: the first in the policy's order for which `evictable` says yes.
    fn victim(&mut self, evictable: &mut dyn FnMut(BlockId) -> bool) -> Option<BlockId>;

    /// Up to `limit` blocks that would go first, coldest first, as far as the policy can tell cheaply.
    fn coldest(&self, limit: usize, out: &mut Vec<BlockId>);

    /// Blocks it holds.
    fn len(&self) -> usize;

    /// Whether it holds none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Names that [`by_name`] knows, the default first.
pub const NAMES: [&str; 4] = ["best", "foresight", "s3fifo", "lru"];

/// The policy of that name; `best` is the one judged best by replay.
#[must_use]
pub fn by_name(name: &str) -> Option<Box<dyn EvictionPolicy>> {
    match name {
        "best" | "foresight" => Some(Box::new(Foresight::new())),
        "s3fifo" => Some(Box::new(S3Fifo::new())),
        "lru" => Some(Box::new(Lru::new())),
        _ => None,
    }
}
