//! One run on its way to one destination: what it has is asked first, and only the rest is sent.
//!
//! ```text
//! chains of the run ─► probe ─► blocks that are missing ─► portions ─pace, probe again, read─► put ─► what is there now
//! ```
//!
//! Units: blocks, bytes. Errors: [`PeerError`]; what a destination refuses is counted, with its reason.
//! Bounds: [`BATCH_BYTES`] in memory per destination.

use std::{sync::Arc, time::Duration};

use kvproto::{Ack, BlockKey, Kind, Reason, SequenceHash, ViewDigest};

use super::{
    super::{
        Motion,
        runs::{HeldChain, chains},
    },
    Move,
};
use crate::{
    engine::HeldBlock,
    peers::{Asked, Carried, Given, Peer, PeerError, Space},
};

/// Bytes read ahead of being sent, per destination.
const BATCH_BYTES: u64 = 16 << 20;

/// What a destination said that it lacks is asked again after so long.
const STALE: Duration = Duration::from_millis(5);

/// What became of one run.
#[derive(Default)]
pub(in crate::blocks::motion) struct Pushed {
    pub(super) sent_bytes: u64,
    /// Blocks that the destination has now.
    pub(in crate::blocks::motion) there: Vec<BlockKey>,
    pub(in crate::blocks::motion) left_blocks: u64,
    pub(super) left_bytes: u64,
}

impl Motion {
    /// One run to its destination, while the view is this one.
    pub(in crate::blocks::motion) async fn push(
        self: &Arc<Self>,
        digest: ViewDigest,
        one: &Move,
        blocks: &[HeldBlock],
        pushed: &mut Pushed,
    ) -> Result<(), PeerError> {
        let Some(space) = self.holdings.space(&one.run.key.namespace) else {
            // A tenant that is no longer there: nobody can ask for it.
            return Ok(());
        };
        for held in chains(blocks, space.run_blocks()) {
            let mut there = self.probe(&one.to, &space, &held).await?;
            let mut at = there;
            pushed.there.extend(keys(&held.blocks[..at]));
            for (kind, mut batch) in batches(&held.blocks[at..]) {
                // The destination's own answer may have said that the run belongs to somebody else now.
                if self.cluster.digest() != digest {
                    pushed.left(&batch);
                    at += batch.len();
                    continue;
                }
                let asked = self.clock.now();
                let bytes = batch.iter().map(|block| block.length_bytes).sum();
                self.pace.take(bytes).await;
                if self.clock.now().since(asked) >= STALE {
                    // A reader may have fetched it while it waited here for its turn.
                    there = self.probe(&one.to, &space, &held).await?;
                }
                let known = there.saturating_sub(at).min(batch.len());
                at += batch.len();
                pushed.there.extend(keys(&batch[..known]));
                batch.drain(..known);
                // As may this one, or anybody while it waited.
                if self.cluster.digest() != digest {
                    pushed.left(&batch);
                    continue;
                }
                let _sending = self.send_off(one.run.key);
                self.send(&one.to, &space, kind, batch, pushed).await?;
            }
        }
        Ok(())
    }

    /// How many leading blocks of a chain, parts counted, the destination has already.
    async fn probe(
        &self,
        to: &Peer,
        space: &Arc<Space>,
        held: &HeldChain,
    ) -> Result<usize, PeerError> {
        let asked = Asked {
            space: Arc::clone(space),
            chain: held.chain.clone(),
            parts: held.parts.clone(),
        };
        let time = self.config.move_time;
        let mut seen = self.transport.lookup(to, &asked, None, time).await;
        if seen == Err(PeerError::UnknownNamespace) {
            self.transport.open(to, space, time).await?;
            seen = self.transport.lookup(to, &asked, None, time).await;
        }
        let present = (seen?.blocks as usize).min(held.chain.len());
        Ok(present * held.parts.len())
    }

    async fn send(
        &self,
        to: &Peer,
        space: &Arc<Space>,
        kind: Kind,
        batch: Vec<HeldBlock>,
        pushed: &mut Pushed,
    ) -> Result<(), PeerError> {
        // Before they are read: what this node is told of from now on, they may not have survived.
        let hashes: Vec<SequenceHash> = batch.iter().map(|block| block.key.hash).collect();
        let survived = self.holdings.survived(&space.id, &hashes);
        let mut carried: Vec<Carried> = Vec::with_capacity(batch.len());
        for block in &batch {
            // While it is, others may have been told to forget this block.
            if self.cluster.is_behind() {
                self.cluster.caught_up().await;
            }
            match self.holdings.read(block).await {
                Some(block) => carried.push(block),
                // It has left, or its tier is busy: the next plan sees which, and tries again what is still here.
                None => pushed.left([block]),
            }
        }
        if carried.is_empty() {
            return Ok(());
        }
        let sent: Vec<(BlockKey, u64)> = carried
            .iter()
            .map(|block| (block.header.key, block.header.length_bytes))
            .collect();
        let given = Given {
            space: Arc::clone(space),
            ack: Ack::Cached,
            kind,
            passes_on: false,
            survived,
            blocks: carried,
        };
        let results = self.transport.put(to, given, self.config.move_time).await?;
        for ((key, bytes), result) in sent.into_iter().zip(results) {
            if result.is_kept() {
                pushed.sent_bytes += bytes;
                pushed.there.push(key);
            } else {
                self.metrics
                    .refused(result.reason.unwrap_or(Reason::Corrupt));
                pushed.left_blocks += 1;
                pushed.left_bytes += bytes;
            }
        }
        Ok(())
    }
}

fn keys(blocks: &[HeldBlock]) -> impl Iterator<Item = BlockKey> + '_ {
    blocks.iter().map(|block| block.key)
}

/// Blocks in portions of one kind, none of more than [`BATCH_BYTES`] unless it is one block.
fn batches(blocks: &[HeldBlock]) -> Vec<(Kind, Vec<HeldBlock>)> {
    let mut batches: Vec<(Kind, Vec<HeldBlock>)> = Vec::new();
    let mut bytes = 0;
    for block in blocks {
        bytes += block.length_bytes;
        match batches.last_mut() {
            Some((kind, batch)) if *kind == block.kind && bytes <= BATCH_BYTES => {
                batch.push(*block);
            }
            _ => {
                bytes = block.length_bytes;
                batches.push((block.kind, vec![*block]));
            }
        }
    }
    batches
}

impl Pushed {
    pub(super) fn left<'a>(&mut self, blocks: impl IntoIterator<Item = &'a HeldBlock>) {
        for block in blocks {
            self.left_blocks += 1;
            self.left_bytes += block.length_bytes;
        }
    }
}
