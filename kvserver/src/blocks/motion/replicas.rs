//! Copies: a block that is new at one owner of its run goes on to the next.
//!
//! ```text
//! put ──► first owner ──► second ──► third          each passes on only what was new to it, and only to its successor
//!            │ ack cached: answered at once          so a chain ends, whatever two nodes think of each other
//!            └ ack stored, synced: answered when the rest of the chain has answered
//! ```
//!
//! Where the chain breaks, the block is as safe here as was asked for and less so elsewhere; the answer says why, and
//! reads repair it: an owner that misses asks the others ([`Motion::may_ask`]), and after a change moves see to the
//! owner behind each one.
//! Units: blocks, bytes. Errors: reasons. Bounds: [`MAX_PASSING_BYTES`]; what comes beyond is not passed on.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use kvproto::{Ack, Kind, MemberId, Reason, RunHash};
use tokio::sync::oneshot;

use super::{Motion, peer};
use crate::{
    cluster::Roster,
    peers::{Carried, Given, Peer, PeerError, Space},
};

/// Bytes of blocks on their way to further owners; each keeps its slot meanwhile.
const MAX_PASSING_BYTES: u64 = 256 << 20;

/// Blocks of a put that are to be passed on, each with its number in the put.
#[derive(Default)]
pub struct Passing {
    /// Whose runs; each keeps its slot.
    pub blocks: Vec<(usize, Carried)>,
    /// Bytes of them.
    pub bytes: u64,
}

impl Passing {
    /// Block `number` of the put is to be passed on too.
    pub fn push(&mut self, number: usize, block: Carried) {
        self.bytes += block.len_bytes();
        self.blocks.push((number, block));
    }
}

/// Blocks that did not reach the next owner, and why.
pub type Passed = Vec<(usize, Reason)>;

impl Motion {
    /// Passes blocks on to the next owner of each; the answer comes when all have answered. `None` where there is no
    /// further owner.
    pub fn pass_on(
        self: &Arc<Self>,
        space: &Arc<Space>,
        ack: Ack,
        kind: Kind,
        passing: Passing,
    ) -> Option<oneshot::Receiver<Passed>> {
        let roster = self.cluster.roster();
        let mut queues: BTreeMap<MemberId, (Peer, Vec<(usize, Carried)>)> = BTreeMap::new();
        for (number, block) in passing.blocks {
            if let Some(next) = self.successor(&roster, &block.header.place.run, space.replicas) {
                let queue = queues
                    .entry(next.id.clone())
                    .or_insert_with(|| (next, Vec::new()));
                queue.1.push((number, block));
            }
        }
        if queues.is_empty() {
            return None;
        }
        let (answer, answered) = oneshot::channel();
        let over = self
            .passing_bytes
            .fetch_add(passing.bytes, Ordering::Relaxed)
            + passing.bytes;
        let (me, space) = (Arc::clone(self), Arc::clone(space));
        self.spawn(async move {
            let mut failed = Passed::new();
            for (peer, mut blocks) in queues.into_values() {
                let hashes: Vec<_> = blocks
                    .iter()
                    .map(|(_, block)| block.header.key.hash)
                    .collect();
                let survived = me.holdings.survived(&space.id, &hashes);
                // What was put before one of these is not among those that have survived it.
                blocks.retain(|(number, block)| {
                    let is_gone = me.holdings.was_invalidated(&block.header.key);
                    if is_gone {
                        failed.push((*number, Reason::Invalidated));
                    }
                    !is_gone
                });
                if blocks.is_empty() {
                    continue;
                }
                let (numbers, blocks): (Vec<usize>, Vec<Carried>) = blocks.into_iter().unzip();
                let given = Given {
                    survived,
                    space: Arc::clone(&space),
                    ack,
                    kind,
                    passes_on: true,
                    blocks,
                };
                let passed = match over > MAX_PASSING_BYTES {
                    true => Err(Reason::QueueFull),
                    false => me.hand_on(&peer, given).await,
                };
                match passed {
                    Ok(results) => {
                        let results = numbers.into_iter().zip(results);
                        failed.extend(results.filter_map(|(n, why)| Some((n, why?))));
                    }
                    Err(reason) => failed.extend(numbers.into_iter().map(|n| (n, reason))),
                }
            }
            me.passing_bytes.fetch_sub(passing.bytes, Ordering::Relaxed);
            for (_, reason) in &failed {
                me.metrics.refused(*reason);
            }
            // Who put with ack `cached` does not listen.
            let _ = answer.send(failed);
        });
        Some(answered)
    }

    /// Who has the run after this node.
    fn successor(&self, roster: &Roster, run: &RunHash, replicas: usize) -> Option<Peer> {
        let owners = roster.owners(run, replicas);
        let at = owners
            .iter()
            .position(|owner| owner.id == *self.cluster.me())?;
        owners.get(at + 1).map(|owner| peer(owner))
    }

    /// Per block why it was not kept, or why the whole call failed.
    async fn hand_on(&self, to: &Peer, given: Given) -> Result<Vec<Option<Reason>>, Reason> {
        let time = self.config.move_time;
        let bytes: u64 = given.blocks.iter().map(super::Carried::len_bytes).sum();
        self.pace.spend(bytes);
        let mut put = self.transport.put(to, given.clone(), time).await;
        if put == Err(PeerError::UnknownNamespace) {
            put = match self.transport.open(to, &given.space, time).await {
                Ok(()) => self.transport.put(to, given, time).await,
                Err(error) => Err(error),
            };
        }
        match put {
            Ok(results) => {
                let kept = results.iter().filter(|result| result.is_kept()).count();
                self.metrics.replica_blocks.inc_by(kept as u64);
                let why = |result: &kvproto::convert::answer::PutResult| {
                    (!result.is_kept()).then_some(result.reason.unwrap_or(Reason::Corrupt))
                };
                Ok(results.iter().map(why).collect())
            }
            Err(error) => {
                tracing::debug!(peer = %to.id, %error, "blocks could not be passed on");
                if error.hurts() {
                    self.hurt(&to.id);
                }
                Err(match error {
                    PeerError::Refused {
                        reason: Some(reason),
                        ..
                    } => reason,
                    PeerError::Late => Reason::Deadline,
                    PeerError::Busy(_) => Reason::Overloaded,
                    PeerError::UnknownNamespace => Reason::UnknownNamespace,
                    _ => Reason::TierDown,
                })
            }
        }
    }
}
