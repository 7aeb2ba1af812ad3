//! Moves: runs that have another owner now go there, hottest first.
//!
//! ```text
//! roster changes ─settle─► plan (what lies here × who owns it now) ─► per destination, one run after the other:
//!     probe what it has ─► read ─(pace)─► put ─acked─► first to go here
//!     another change, or nothing left: plan again; while a change is young, look again now and then
//! draining: the same, until nothing is left that nobody else has          Progress tells how far it is
//! ```
//!
//! A member that was restarted keeps its place, and may have come back with nothing: those who share runs with it look
//! through what it has.
//!
//! A plan is a pure function of roster and holdings, so a node that was stopped in between goes on where it was: what
//! the new owner has already is seen by the probe. Sums travel with the blocks and are checked where they arrive.
//! A node that is not an owner hands a run to its first owner. One that is, where runs have several owners, sees to the
//! owner after it: every gap that a change made is filled by exactly one of those who can.
//!
//! Units: runs, blocks, bytes. Errors: none; what a destination refuses stays here and is counted.
//! Bounds: `BATCH_RUNS` runs looked up at a time, 16 MiB in memory per destination, [`MAX_DESTINATIONS`] at
//! once, the pace of `peer_bytes_per_second` over all of them.

mod account;
mod plan;
mod push;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use kvproto::{BlockKey, MemberId, NamespaceId, SequenceHash, ViewDigest};

use self::plan::reborn_since;
pub(super) use self::{account::Handed, push::Pushed};
pub use self::{
    account::Progress,
    plan::{Move, plan},
};
use super::Motion;
use crate::{
    clock::Tick,
    cluster::Roster,
    engine::{HeldBlock, RunKey},
};

/// Runs whose blocks are listed at a time: one visit of the index serves so many.
const BATCH_RUNS: usize = 2048;

/// Destinations served at once.
const MAX_DESTINATIONS: usize = 8;

/// Failures in a row after which a destination is left for the next plan.
const FAILURES: u32 = 3;

impl Motion {
    pub(super) async fn work(self: Arc<Self>) {
        let mut changes = self.cluster.changes();
        let mut lives: BTreeMap<MemberId, u64> = BTreeMap::new();
        // Members whose copies have to be looked through, though no change is young.
        let mut reborn: BTreeSet<MemberId> = BTreeSet::new();
        loop {
            let roster = changes.borrow_and_update().clone();
            reborn.extend(reborn_since(&mut lives, &roster));
            let is_young = self.is_in_motion(&roster);
            if !is_young {
                // Those who have departed are asked for a while yet.
                let here: Vec<MemberId> = roster.present().map(|m| m.id.clone()).collect();
                self.transport.keep(&here);
                reborn.retain(|id| here.contains(id));
                self.handed.lock().clear();
            }
            if is_young || !reborn.is_empty() {
                tokio::select! {
                    biased;
                    () = self.stopping.cancelled() => return,
                    () = self.clock.sleep(self.config.settle) => {}
                }
                // What came in meanwhile belongs to the same plan.
                let roster = changes.borrow_and_update().clone();
                reborn.extend(reborn_since(&mut lives, &roster));
                let only = (!self.is_in_motion(&roster)).then_some(&reborn);
                tokio::select! {
                    biased;
                    () = self.stopping.cancelled() => return,
                    () = self.carry_out(&roster, only) => {}
                }
                if self.progress.borrow().left_blocks == 0 {
                    reborn.clear();
                }
            }
            let again = is_young || !reborn.is_empty();
            let again = again.then(|| self.clock.sleep(self.config.again));
            tokio::select! {
                biased;
                () = self.stopping.cancelled() => return,
                changed = changes.changed() => if changed.is_err() { return },
                () = async {
                    match again {
                        Some(again) => again.await,
                        None => std::future::pending().await,
                    }
                } => {}
            }
        }
    }

    /// Whether runs may have to go from here: a change is young, or this node drains.
    fn is_in_motion(&self, roster: &Roster) -> bool {
        roster.is_young(self.clock.now()) || self.is_draining(roster)
    }

    /// What others were handed of a namespace, or of one block's run, they have forgotten by now, as has this node: what
    /// is put here from now on is new, and nobody has it.
    pub(in crate::blocks) fn forget(&self, namespace: NamespaceId, hash: Option<SequenceHash>) {
        let mut handed = self.handed.lock();
        if hash.is_none() {
            self.forgets.fetch_add(1, Ordering::Relaxed); // under the lock
        }
        handed.retain(|run, handed| {
            let is_of_it = run.namespace == namespace
                && hash.is_none_or(|hash| handed.there.iter().any(|key| key.hash == hash));
            !is_of_it
        });
    }

    /// What has to go, to anybody or to some alone, and was not handed over already.
    fn to_do(&self, roster: &Roster, only: Option<&BTreeSet<MemberId>>) -> Vec<Move> {
        let held = self.holdings.held();
        let mut spaces: BTreeMap<NamespaceId, usize> = BTreeMap::new();
        for run in &held {
            spaces.entry(run.key.namespace).or_insert_with(|| {
                let space = self.holdings.space(&run.key.namespace);
                space.map_or(1, |space| space.replicas)
            });
        }
        let replicas = |key: &RunKey| spaces.get(&key.namespace).copied().unwrap_or(1);
        let mut moves = plan(roster, self.cluster.me(), &held, replicas, self.clock.now());
        let handed = self.handed.lock();
        moves.retain(|one| {
            let is_there = handed.get(&one.run.key).is_some_and(|handed| {
                handed.to == one.to.id
                    && handed.holds(roster)
                    && handed.is_whole
                    && handed.blocks >= one.run.blocks
            });
            !is_there && only.is_none_or(|only| only.contains(&one.to.id))
        });
        moves
    }

    /// Copies that were left behind by a move and are this node's own again do not go first any more: whoever took them
    /// hands them back by naming what is here already, and lets its own go.
    fn take_back(&self, roster: &Roster) {
        let mut is_mine: BTreeMap<RunKey, bool> = BTreeMap::new();
        let mut going = self.holdings.going();
        going.retain(|(key, run)| {
            let key = RunKey {
                namespace: key.namespace,
                run: *run,
            };
            *is_mine.entry(key).or_insert_with(|| {
                let space = self.holdings.space(&key.namespace);
                self.owns(roster, run, space.map_or(1, |space| space.replicas))
            })
        });
        if !going.is_empty() {
            let keys: Vec<BlockKey> = going.into_iter().map(|(key, _)| key).collect();
            self.holdings.stays(&keys);
        }
    }

    /// One plan, as far as it can be carried out before the next change.
    async fn carry_out(self: &Arc<Self>, roster: &Arc<Roster>, only: Option<&BTreeSet<MemberId>>) {
        self.take_back(roster);
        let moves = self.to_do(roster, only);
        let bytes = moves.iter().map(|one| one.run.bytes).sum();
        self.progress.send_modify(|progress| {
            progress.plans += 1;
            progress.is_done = moves.is_empty();
            progress.is_draining = self.is_draining(roster);
            progress.waiting_runs = moves.len() as u64;
            progress.waiting_bytes = bytes;
            (progress.left_blocks, progress.left_bytes) = (0, 0);
        });
        self.show_waiting();
        if !moves.is_empty() {
            tracing::info!(
                runs = moves.len(),
                bytes,
                "runs have another owner now; moving them"
            );
        }
        let mut gone: BTreeSet<MemberId> = BTreeSet::new();
        for batch in moves.chunks(BATCH_RUNS) {
            if self.cluster.digest() != roster.digest {
                return;
            }
            let keys: BTreeSet<RunKey> = batch.iter().map(|one| one.run.key).collect();
            let mut blocks: BTreeMap<RunKey, Vec<HeldBlock>> = BTreeMap::new();
            for block in self.holdings.blocks_of(&keys) {
                let key = RunKey {
                    namespace: block.key.namespace,
                    run: block.place.run,
                };
                blocks.entry(key).or_default().push(block);
            }
            // Per destination in the batch's order, which is by heat.
            let mut queues: BTreeMap<MemberId, Vec<(Move, Vec<HeldBlock>)>> = BTreeMap::new();
            for one in batch {
                let blocks = blocks.remove(&one.run.key).unwrap_or_default();
                let queue = queues.entry(one.to.id.clone()).or_default();
                queue.push((one.clone(), blocks));
            }
            let mut queues = queues.into_iter();
            let mut under_way = FuturesUnordered::new();
            loop {
                while under_way.len() < MAX_DESTINATIONS
                    && let Some((to, queue)) = queues.next()
                {
                    let is_gone = gone.contains(&to);
                    let me = Arc::clone(self);
                    under_way.push(me.serve(roster.digest, to, queue, is_gone).boxed());
                }
                match under_way.next().await {
                    Some(Some(failed)) => {
                        gone.insert(failed);
                    }
                    Some(None) => {}
                    None => break,
                }
            }
        }
        self.progress
            .send_modify(|progress| progress.is_done = true);
        self.show_waiting();
    }

    /// Everything that goes to one destination, one run after the other; answers its name if it does not answer.
    async fn serve(
        self: Arc<Self>,
        digest: ViewDigest,
        to: MemberId,
        queue: Vec<(Move, Vec<HeldBlock>)>,
        mut is_gone: bool,
    ) -> Option<MemberId> {
        let mut failures = 0;
        for (one, blocks) in queue {
            if self.cluster.digest() != digest {
                return None;
            }
            let began = self.clock.now();
            // Before anything is sent: what a life takes that ends meanwhile is not there in the next.
            let life = self.cluster.roster().view.get(&to).map(|to| to.generation);
            let hashes: Vec<SequenceHash> = blocks.iter().map(|block| block.key.hash).collect();
            let forgets = self.forgets.load(Ordering::Relaxed);
            let before = self.holdings.survived(&one.run.key.namespace, &hashes);
            let mut pushed = Pushed::default();
            if is_gone || self.is_suspect(&to) {
                pushed.left(&blocks);
            } else {
                match self.push(digest, &one, &blocks, &mut pushed).await {
                    Ok(()) => failures = 0,
                    Err(error) => {
                        failures += 1;
                        is_gone = failures >= FAILURES;
                        tracing::debug!(peer = %to, %error, "a run could not be moved");
                        if error.hurts() {
                            self.hurt(&to);
                        }
                        let there: BTreeSet<BlockKey> = pushed.there.iter().copied().collect();
                        let rest = blocks.iter().filter(|block| !there.contains(&block.key));
                        (pushed.left_blocks, pushed.left_bytes) = (0, 0);
                        pushed.left(rest);
                    }
                }
            }
            let handed = Handed {
                to: to.clone(),
                life: life.unwrap_or_default(),
                there: pushed.there.iter().copied().collect(),
                is_whole: pushed.left_blocks == 0,
                blocks: blocks.len() as u64,
            };
            {
                // Under the lock: who is told to forget later waits for it, and forgets this as well. Of what was
                // forgotten meanwhile there may be a newer one here, which nobody has.
                let mut all = self.handed.lock();
                let now = self.holdings.survived(&one.run.key.namespace, &hashes);
                let is_forgotten = self.forgets.load(Ordering::Relaxed) != forgets
                    || now.iter().any(|id| !before.contains(id));
                if !is_forgotten {
                    if one.leaves {
                        self.holdings.first_to_go(&pushed.there);
                    }
                    all.insert(one.run.key, handed);
                }
            }
            self.account_for(&one, &pushed, began);
        }
        is_gone.then_some(to)
    }

    fn account_for(&self, one: &Move, pushed: &Pushed, began: Tick) {
        let moved = pushed.left_blocks == 0 && pushed.sent_bytes > 0;
        if moved {
            let seconds = self.clock.now().since(began).as_secs_f64();
            self.metrics.moved_runs.inc();
            self.metrics.move_seconds.observe(seconds);
        }
        self.metrics.moved_bytes.inc_by(pushed.sent_bytes);
        self.progress.send_modify(|progress| {
            progress.waiting_runs = progress.waiting_runs.saturating_sub(1);
            progress.waiting_bytes = progress.waiting_bytes.saturating_sub(one.run.bytes);
            progress.moved_runs += u64::from(moved);
            progress.moved_bytes += pushed.sent_bytes;
            progress.left_blocks += pushed.left_blocks;
            progress.left_bytes += pushed.left_bytes;
        });
        self.show_waiting();
    }
}
