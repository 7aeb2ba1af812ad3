//! Moving a job's blocks: in order, in calls of bounded size.
//!
//! ```text
//! load   chain[first..] ─cut─► call │ call │ …   one after the other: the head of the prefix is whole first
//!                               │                (through shared memory one call: it only says where they lie)
//!                               └─ each block verified, its length compared ─► the engine's memory
//!
//! save   chain[first..] ─probe─► what the node has is not sent
//!         same host:    ─cut─► put │ put │ …       from where the blocks lie into shared memory
//!         over gRPC:    ─cut─► gather │ gather │ … all gathered ─► the engine may reuse its blocks
//!                              put │ put │ …       as far as scratch goes, else one by one
//! ```
//!
//! Blocks on a device (`device`) come and go through its page-locked slots, the next batch while this one is on the wire.
//!
//! Units: blocks, bytes.
//! Errors: none; blocks that did not make it are in the [`Outcome`], with the first reason.
//! Why one call after the other: jobs run side by side already, and a prefix is of use from its head on. Why a save over
//! gRPC is gathered first: the engine's blocks would be in use until a socket has taken the last byte. Through shared memory
//! a put is little more than that copy itself; and whoever needs the blocks sooner, because the node is frozen, ends it by
//! `hurry`.

mod saving;

use std::{collections::VecDeque, ops::Range, time::Duration};

use kvclient::{
    Chain, GetOptions, GetOutcome, LeaseId, Part, Target,
    clock::{Clock, Tick},
};
use kvgpu::{Event, Moving};

use self::saving::Saving;
use crate::{
    device::{OnDevice, Use},
    hashes::EngineHashes,
    jobs::Outcome,
    memory::{ReadClaim, WriteClaim},
    node::{NodeLink, Way},
    scratch::{SCRATCH_BYTES, Scratch},
};

/// Most bytes of one call that carries them; a larger block goes alone.
pub const CALL_BYTES: usize = 16 << 20;

/// Most blocks of one call.
pub const CALL_BLOCKS: usize = 256;

/// What a load needs.
#[derive(Debug)]
pub struct Load {
    /// Lease to load under; 0: none.
    pub lease: u64,
    /// The chain from its root on.
    pub hashes: EngineHashes,
    /// Its first block to load.
    pub first: usize,
    /// Where they go.
    pub claim: WriteClaim,
}

/// What a save needs.
#[derive(Debug)]
pub struct Save {
    /// The chain from its root on.
    pub hashes: EngineHashes,
    /// Its first block to save.
    pub first: usize,
    /// Where they are.
    pub claim: ReadClaim,
}

/// What all transfers of a cache share.
#[derive(Debug)]
pub struct Mover {
    part: Part,
    timeout: Duration,
    scratch: Scratch,
}

/// How many blocks of `block_bytes` go in one call.
#[must_use]
pub fn blocks_per_call(block_bytes: usize) -> usize {
    (CALL_BYTES / block_bytes.max(1)).clamp(1, CALL_BLOCKS)
}

/// `range` in pieces of at most `step`.
fn cut(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(step)
        .map(move |start| start..(start + step).min(end))
}

/// Blocks `range` of a job as a chain that knows where it stands.
fn chain(way: &Way, hashes: &EngineHashes, first: usize, range: Range<usize>) -> Chain {
    let range = first + range.start..first + range.end;
    hashes.chain(way.namespace.key(), way.namespace.run_blocks(), range)
}

impl Mover {
    /// For blocks of this part, and jobs that may take this long each.
    #[must_use]
    pub fn new(part: Part, timeout: Duration) -> Self {
        Self {
            part,
            timeout,
            scratch: Scratch::new(SCRATCH_BYTES),
        }
    }

    /// Fills the engine's blocks. Also answers which of the chain's blocks were corrupt, for [`Mover::forget`].
    pub async fn load(&self, node: &NodeLink, mut load: Load) -> (Outcome, Vec<usize>) {
        let until = node.clock.now().after(self.timeout);
        let ids: Box<[u32]> = load.claim.blocks().into();
        let block_bytes = load.claim.block_bytes();
        let (mut outcome, mut corrupt) = (Outcome::default(), Vec::new());
        // Calls of which a device still writes the blocks, while the next call is on its way.
        let (mut scattering, mut unasked, mut away) = (VecDeque::new(), ids.len(), None);
        let step = match load.claim.device() {
            Some(on) => per_batch(on).min(blocks_per_call(block_bytes)),
            // Where the blocks lie is a short answer, however long they are.
            None if node.moving().is_some_and(|way| way.is_local()) => CALL_BLOCKS,
            None => blocks_per_call(block_bytes),
        };
        for range in cut(0..ids.len(), step) {
            match self.get(node, &mut load, range.clone(), until).await {
                Ok((got, moving)) => scattering.push_back((range, got, moving)),
                // Nobody to ask, or not in time: nor for the rest.
                Err(reason) => {
                    (unasked, away) = (range.start, Some(reason));
                    break;
                }
            }
        }
        for (range, got, moving) in scattering {
            let written = match moving {
                Some(moving) => moving.await.map_err(|error| error.to_string()),
                None => Ok(()),
            };
            for (at, lost) in range.zip(got) {
                let unwritten = |reason: &String| Lost {
                    reason: reason.clone(),
                    corrupt: false,
                };
                let Some(lost) = lost.or_else(|| written.as_ref().err().map(unwritten)) else {
                    outcome.blocks += 1;
                    continue;
                };
                if lost.corrupt {
                    corrupt.push(load.first + at);
                }
                outcome.failed.push(ids[at]);
                outcome.reason.get_or_insert(lost.reason);
            }
        }
        if let Some(reason) = away {
            outcome.failed.extend(&ids[unasked..]);
            outcome.reason.get_or_insert(reason);
        }
        outcome.bytes = (outcome.blocks * block_bytes) as u64;
        let counters = &node.counters;
        counters.loaded_blocks.add(outcome.blocks as u64);
        counters.loaded_bytes.add(outcome.bytes);
        counters.load_failed_blocks.add(outcome.failed.len() as u64);
        counters.corrupt_blocks.add(corrupt.len() as u64);
        (outcome, corrupt)
    }

    /// One call: for each block of `range` nothing, if it is there, or why it is not; and when a device has written them.
    async fn get(
        &self,
        node: &NodeLink,
        load: &mut Load,
        range: Range<usize>,
        until: Tick,
    ) -> Result<(Vec<Option<Lost>>, Option<Moving<()>>), String> {
        let way = node.moving().ok_or(AWAY)?;
        let chain = chain(&way, &load.hashes, load.first, range.clone());
        let client = way.client.with_deadline(until.since(node.clock.now()));
        let lease = (load.lease != 0).then(|| client.lease_of_owner(LeaseId(load.lease)));
        let options = GetOptions {
            lease: lease.as_ref(),
            parts: &[self.part],
        };
        let block_bytes = load.claim.block_bytes();
        let mut slot = match load.claim.device() {
            Some((device, _)) => Some(device.slot(Use::Load, range.len()).await?),
            None => None,
        };
        let mut blocks = match &mut slot {
            Some(slot) => {
                let blocks = slot.bytes_mut().chunks_exact_mut(block_bytes);
                blocks.map(|block| vec![block]).collect()
            }
            None => load.claim.pieces(range.clone()),
        };
        let got = client
            .get_scattered(&way.namespace, &chain, options, &mut blocks)
            .await
            .map_err(|error| node.failed(&error))?;
        drop(blocks);
        let judge = |got: kvclient::Got| match got.outcome {
            GetOutcome::Hit if got.length_bytes == block_bytes => None,
            GetOutcome::Hit => Some(Lost {
                reason: format!(
                    "a block has {} bytes, the engine's have {block_bytes}",
                    got.length_bytes
                ),
                corrupt: false,
            }),
            other => Some(Lost {
                reason: format!("a block was answered {other}"),
                corrupt: other == GetOutcome::Corrupt,
            }),
        };
        let got: Vec<Option<Lost>> = got.into_iter().map(judge).collect();
        let Some((slot, (device, turn))) = slot.zip(load.claim.device()) else {
            return Ok((got, None));
        };
        if got.iter().all(Option::is_some) {
            return Ok((got, None));
        }
        // Blocks that did not come are reported and hold garbage, here as on the host.
        let ids = &load.claim.blocks()[range];
        let moving = device.scatter(slot, ids, turn, load.claim.share())?;
        Ok((got, Some(moving)))
    }

    /// Tells the node to forget blocks whose bytes were wrong, so that they can be saved anew.
    pub async fn forget(&self, node: &NodeLink, hashes: &EngineHashes, corrupt: &[usize]) {
        let Some(way) = node.moving().filter(|_| !corrupt.is_empty()) else {
            return;
        };
        for &block in corrupt {
            let target = Target::Block(way.namespace.engine_hash(hashes.get(block)));
            if let Err(error) = way.client.invalidate(&way.namespace, target).await {
                tracing::warn!(%error, block, "a corrupt block could not be invalidated");
                return;
            }
        }
    }

    /// Stores the engine's blocks. Calls `gathered` once it reads the engine's memory no more; `hurry` is ready when it
    /// must stop doing so. Also answers which of the chain's blocks the node has now.
    pub async fn save(
        &self,
        node: &NodeLink,
        save: Save,
        hurry: impl Future<Output = ()>,
        gathered: impl FnOnce(),
    ) -> (Outcome, Vec<usize>) {
        let Save {
            hashes,
            first,
            claim,
        } = save;
        let mut saving = Saving::new(self, node, &hashes, first, claim.blocks().len());
        tokio::select! {
            biased;
            () = hurry => saving.fail("given up: the engine wants its blocks back"),
            () = saving.gather(&claim) => {}
        }
        saving.read().await;
        let (ids, block_bytes): (Box<[u32]>, _) = (claim.blocks().into(), claim.block_bytes());
        drop(claim);
        gathered();
        while saving.put_next(block_bytes).await {}
        saving.finish(&ids, block_bytes)
    }
}

const AWAY: &str = "the node is away";

fn per_batch((device, _): (&OnDevice, &Event)) -> usize {
    device.blocks_per_batch()
}

/// Why a block did not come.
struct Lost {
    reason: String,
    corrupt: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_at_least_one_block_and_keeps_its_bounds() {
        assert_eq!(blocks_per_call(CALL_BYTES * 3), 1);
        assert_eq!(blocks_per_call(1 << 20), 16);
        assert_eq!(blocks_per_call(1), CALL_BLOCKS);
    }

    #[test]
    fn pieces_of_a_range_follow_each_other() {
        assert_eq!(cut(3..10, 3).collect::<Vec<_>>(), [3..6, 6..9, 9..10]);
        assert_eq!(cut(0..0, 3).count(), 0);
    }
}
