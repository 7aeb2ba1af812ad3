//! A policy judged on recorded requests, without a server and without bytes.
//!
//! ```text
//! request ─► prefix hits: touched, tail first ─► the rest: room made, inserted head first
//! ```
//!
//! What is simulated is what the engine does with a policy: a lookup touches the leading present blocks, a put
//! makes room by `victim` and inserts under the parent's handle. A block present behind a gap is no hit: it is
//! computed again and found there when written, so it is touched. All blocks count as one unit of size.
//!
//! Units: capacities and hits in blocks; shares are of all block references.
//! Errors: [`TraceError`] when reading, [`ReplayError`] when asked for the impossible.
//! Why prefix hits: a block whose parent is missing cannot be used.

mod optimum;
pub mod synthetic;
mod trace;

use std::time::Duration;

pub use trace::{Trace, TraceError};

use super::policy::{self, BlockId, BlockMeta, EvictionPolicy};
use crate::clock::Clock;

/// Room for a replay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Capacity {
    /// A share of the trace's distinct blocks, above 0.
    Share(f64),
    /// So many blocks, at least 1.
    Blocks(u64),
}

impl Capacity {
    /// In blocks, for this trace: a share is rounded down, and never below one block.
    #[must_use]
    pub fn blocks(self, trace: &Trace) -> u64 {
        match self {
            Self::Share(share) => ((trace.unique_blocks() as f64 * share) as u64).max(1),
            Self::Blocks(blocks) => blocks,
        }
    }
}

/// Why there is no report.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ReplayError {
    /// Nobody of that name.
    #[error("policy: {name:?} is not one of {}", policy::NAMES.join(", "))]
    UnknownPolicy {
        /// What was asked for.
        name: String,
    },
    /// A share of at most zero or not a number, or no block at all.
    #[error("capacity: {capacity:?} is no room at all")]
    NoRoom {
        /// What was asked for.
        capacity: Capacity,
    },
}

/// What one policy made of a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// References that were leading and present.
    pub prefix_hits: u64,
    /// Blocks given up to make room.
    pub evictions: u64,
    /// Calls into the policy.
    pub policy_calls: u64,
}

/// One policy at one capacity beside LRU and the offline optimum at the same.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplayReport {
    /// Name the policy calls itself.
    pub policy: &'static str,
    /// Room, blocks.
    pub capacity_blocks: u64,
    /// Requests in the trace.
    pub requests: u64,
    /// Block references in the trace.
    pub block_refs: u64,
    /// Distinct blocks in the trace.
    pub unique_blocks: u64,
    /// Input tokens in the trace; 0 where it does not say.
    pub input_tokens: u64,
    /// References that were leading and present.
    pub prefix_hits: u64,
    /// The same as a share of all references.
    pub prefix_hit_share: f64,
    /// Blocks given up to make room.
    pub evictions: u64,
    /// LRU's share.
    pub lru_share: f64,
    /// The offline optimum's share.
    pub optimum_share: f64,
    /// The share without any eviction.
    pub unbounded_share: f64,
    /// Time the policy's replay took, the other three left out.
    pub elapsed: Duration,
}

impl ReplayReport {
    /// This policy's share over LRU's; 1 where both are nothing.
    #[must_use]
    pub fn ratio_to_lru(&self) -> f64 {
        ratio(self.prefix_hit_share, self.lru_share)
    }

    /// This policy's share over the optimum's; 1 where both are nothing.
    #[must_use]
    pub fn share_of_optimum(&self) -> f64 {
        ratio(self.prefix_hit_share, self.optimum_share)
    }
}

fn ratio(ours: f64, theirs: f64) -> f64 {
    if theirs > 0.0 { ours / theirs } else { 1.0 }
}

/// Replays the trace against the policy of that name, against LRU and against the optimum.
///
/// # Errors
/// An unknown name, or no room.
pub fn report(
    trace: &Trace,
    policy_name: &str,
    capacity: Capacity,
    clock: &dyn Clock,
) -> Result<ReplayReport, ReplayError> {
    let policy = policy::by_name(policy_name).ok_or_else(|| ReplayError::UnknownPolicy {
        name: policy_name.to_owned(),
    })?;
    let room = match capacity {
        Capacity::Share(share) => share > 0.0,
        Capacity::Blocks(blocks) => blocks > 0,
    };
    if !room {
        return Err(ReplayError::NoRoom { capacity });
    }
    let blocks = capacity.blocks(trace);
    let share = |hits: u64| ratio(hits as f64, trace.block_refs().max(1) as f64);
    let name = policy.name();
    let start = clock.now();
    let outcome = replay(trace, policy, blocks);
    let elapsed = clock.now().since(start);
    Ok(ReplayReport {
        policy: name,
        capacity_blocks: blocks,
        requests: trace.len() as u64,
        block_refs: trace.block_refs(),
        unique_blocks: trace.unique_blocks(),
        input_tokens: trace.input_tokens(),
        prefix_hits: outcome.prefix_hits,
        prefix_hit_share: share(outcome.prefix_hits),
        evictions: outcome.evictions,
        lru_share: share(replay(trace, Box::new(policy::Lru::new()), blocks).prefix_hits),
        optimum_share: share(optimum::prefix_hits(trace, blocks)),
        unbounded_share: share(optimum::prefix_hits(trace, u64::MAX)),
        elapsed,
    })
}

/// Replays the trace against one policy with room for `capacity` blocks.
#[must_use]
pub fn replay(trace: &Trace, policy: Box<dyn EvictionPolicy>, capacity: u64) -> Outcome {
    let mut ram = Ram::new(trace, policy, capacity);
    let mut touches = Vec::new();
    for request in trace.requests() {
        let hits = request
            .iter()
            .take_while(|block| ram.holds(**block))
            .count();
        ram.outcome.prefix_hits += hits as u64;
        touches.clear();
        touches.extend(
            request[..hits]
                .iter()
                .rev()
                .filter_map(|block| ram.handle(*block)),
        );
        ram.touch(&touches);
        for (index, &block) in request.iter().enumerate().skip(hits) {
            let parent = index.checked_sub(1).map(|before| request[before]);
            ram.write(block, parent, index as u32);
        }
    }
    ram.outcome
}

/// The part of the engine that a policy sees: handles, and nobody's bytes.
struct Ram {
    policy: Box<dyn EvictionPolicy>,
    capacity: u64,
    handles: Vec<Option<BlockId>>, // by block
    blocks: Vec<u32>,              // by handle
    free: Vec<BlockId>,
    outcome: Outcome,
}

impl Ram {
    fn new(trace: &Trace, policy: Box<dyn EvictionPolicy>, capacity: u64) -> Self {
        Self {
            policy,
            capacity,
            handles: vec![None; trace.unique_blocks() as usize],
            blocks: Vec::new(),
            free: Vec::new(),
            outcome: Outcome::default(),
        }
    }

    fn holds(&self, block: u32) -> bool {
        self.handle(block).is_some()
    }

    fn handle(&self, block: u32) -> Option<BlockId> {
        self.handles[block as usize]
    }

    fn touch(&mut self, ids: &[BlockId]) {
        if !ids.is_empty() {
            self.outcome.policy_calls += 1;
            self.policy.touched(ids);
        }
    }

    fn write(&mut self, block: u32, parent: Option<u32>, index: u32) {
        if let Some(id) = self.handle(block) {
            return self.touch(&[id]);
        }
        let held = (self.blocks.len() - self.free.len()) as u64;
        if held >= self.capacity && !self.evict() {
            return;
        }
        let id = self.free.pop().unwrap_or(BlockId(self.blocks.len() as u32));
        if id.0 as usize == self.blocks.len() {
            self.blocks.push(block);
        }
        self.blocks[id.0 as usize] = block;
        self.handles[block as usize] = Some(id);
        let parent = parent.and_then(|parent| self.handle(parent));
        let fingerprint = u64::from(block).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.outcome.policy_calls += 1;
        self.policy.inserted(
            id,
            &BlockMeta {
                parent,
                index,
                bytes: 1,
                fingerprint,
            },
        );
    }

    fn evict(&mut self) -> bool {
        self.outcome.policy_calls += 2;
        let Some(id) = self.policy.victim(&mut |_| true) else {
            return false;
        };
        self.policy.removed(id);
        self.handles[self.blocks[id.0 as usize] as usize] = None;
        self.free.push(id);
        self.outcome.evictions += 1;
        true
    }
}
