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
//! Bounds: `BATCH_RUNS` runs looked up at a time, [`BATCH_BYTES`] in memory per destination, [`MAX_DESTINATIONS`] at
//! once, the pace of `peer_bytes_per_second` over all of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use kvproto::{
    Ack, BlockKey, Kind, MemberId, MemberState, Reason, RunHash, SequenceHash, ViewDigest,
};

use super::{
    Motion, peer,
    runs::{HeldChain, chains},
};
use crate::{
    clock::Tick,
    cluster::{Roster, Standing},
    engine::{HeldBlock, HeldRun, RunKey},
    peers::{Asked, Carried, Given, Peer, PeerError, Space},
};

/// Runs whose blocks are listed at a time: one visit of the index serves so many.
const BATCH_RUNS: usize = 2048;

/// Bytes read ahead of being sent, per destination.
const BATCH_BYTES: u64 = 16 << 20;

/// Destinations served at once.
const MAX_DESTINATIONS: usize = 8;

/// Failures in a row after which a destination is left for the next plan.
const FAILURES: u32 = 3;

/// A run that is to go somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// What.
    pub run: HeldRun,
    /// Where.
    pub to: Peer,
    /// Whether this node is no owner of it any more: its copy is the first to go once it has arrived.
    pub leaves: bool,
}

/// How far moves are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Plans made so far.
    pub plans: u64,
    /// Whether the last plan is done, as far as it could be.
    pub is_done: bool,
    /// Whether this node hands over all that it has.
    pub is_draining: bool,
    /// Runs that still have to go.
    pub waiting_runs: u64,
    /// Their bytes.
    pub waiting_bytes: u64,
    /// Runs that went, since start.
    pub moved_runs: u64,
    /// Bytes that went, since start.
    pub moved_bytes: u64,
    /// Blocks that a destination refused or could not be given, under this plan: they stay here.
    pub left_blocks: u64,
    /// Their bytes.
    pub left_bytes: u64,
}

impl Progress {
    /// What would be lost if this node went away now: what waits and what could not be given.
    #[must_use]
    pub fn at_stake_bytes(&self) -> u64 {
        self.waiting_bytes + self.left_bytes
    }
}

/// What was handed over of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Handed {
    to: MemberId,
    /// In which life of its: in another one it may have come back with nothing.
    life: u64,
    /// Blocks that it has.
    there: BTreeSet<BlockKey>,
    is_whole: bool,
    /// Blocks that lay here then.
    blocks: u64,
}

/// What has to go where under `roster`: hottest first, then in the order of keys.
///
/// A copy that was left behind by an earlier move stays where it is, unless this node drains: only who owned a run until
/// lately hands it over.
#[must_use]
pub fn plan(
    roster: &Roster,
    me: &MemberId,
    held: &[HeldRun],
    replicas: impl Fn(&RunKey) -> usize,
    now: Tick,
) -> Vec<Move> {
    let drains = roster
        .view
        .get(me)
        .is_some_and(|me| me.state == MemberState::Draining);
    let mut moves: Vec<Move> = held
        .iter()
        .filter_map(|run| {
            let replicas = replicas(&run.key);
            let (to, leaves) = destination(roster, me, &run.key.run, replicas)?;
            let was_mine = || roster.former(&run.key.run, now).contains(me);
            if leaves && !drains && replicas == 1 && !was_mine() {
                return None;
            }
            Some(Move {
                run: *run,
                to,
                leaves,
            })
        })
        .collect();
    moves.sort_by(|a, b| {
        let heat = b.run.heat.cmp(&a.run.heat);
        heat.then_with(|| a.run.key.cmp(&b.run.key))
    });
    moves
}

fn destination(
    roster: &Roster,
    me: &MemberId,
    run: &RunHash,
    replicas: usize,
) -> Option<(Peer, bool)> {
    let owners = roster.owners(run, replicas);
    match owners.iter().position(|owner| owner.id == *me) {
        None => owners.first().map(|owner| (peer(owner), true)),
        Some(_) if owners.len() < 2 => None,
        Some(at) => owners
            .get((at + 1) % owners.len())
            .map(|owner| (peer(owner), false)),
    }
}

impl Handed {
    /// Whether whoever took it still lives the life in which it did.
    fn holds(&self, roster: &Roster) -> bool {
        let taker = roster.view.get(&self.to);
        taker.is_some_and(|to| to.state != MemberState::Gone && to.generation == self.life)
    }
}

/// What became of one run.
#[derive(Default)]
pub(super) struct Pushed {
    sent_bytes: u64,
    /// Blocks that the destination has now.
    pub(super) there: Vec<BlockKey>,
    pub(super) left_blocks: u64,
    left_bytes: u64,
}

impl Motion {
    /// How far moves are, now and from now on.
    #[must_use]
    pub fn progress(&self) -> tokio::sync::watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Waits until a node that drains has nothing left to hand over, or cannot do better, or `until` has come; what it
    /// answers as [`Progress::at_stake_bytes`] is what would be lost by leaving now.
    pub async fn drained(&self, until: Tick) -> Progress {
        let mut progress = self.progress();
        let late = self.clock.sleep(self.left(until));
        tokio::select! {
            biased;
            () = async {
                loop {
                    let done = progress.wait_for(|p| p.is_draining && p.is_done && p.at_stake_bytes() == 0);
                    // Who has taken it may have fallen silent since; another owner takes it when its grace is over.
                    if done.await.is_err() || self.takers().iter().all(|(_, is_well)| *is_well) {
                        return;
                    }
                    self.clock.sleep(self.config.settle).await;
                }
            } => {}
            () = late => {}
            () = self.stopping.cancelled() => {}
        }
        self.account()
    }

    /// An exact account of what is still to go, read from what lies here. While this node drains that is every block
    /// that nobody has acknowledged who is well, whether there is anybody to take it or not: what would be lost by
    /// leaving now.
    #[must_use]
    pub fn account(&self) -> Progress {
        let roster = self.cluster.roster();
        let is_draining = self.is_draining(&roster);
        let runs: BTreeSet<RunKey> = match is_draining {
            true => self.holdings.held().iter().map(|run| run.key).collect(),
            false => self
                .to_do(&roster, None)
                .iter()
                .map(|one| one.run.key)
                .collect(),
        };
        let blocks = self.holdings.blocks_of(&runs);
        let takers = self.takers();
        let handed = self.handed.lock();
        let is_there = |key: &RunKey, block: &BlockKey| {
            let is_well =
                |handed: &&Handed| handed.holds(&roster) && takers.get(&handed.to) == Some(&true);
            let handed = handed.get(key).filter(is_well);
            handed.is_some_and(|handed| handed.there.contains(block))
        };
        let mut waiting: BTreeSet<RunKey> = BTreeSet::new();
        let mut now = self.progress.borrow().clone();
        (now.left_blocks, now.left_bytes, now.waiting_bytes) = (0, 0, 0);
        for block in blocks {
            let run = RunKey {
                namespace: block.key.namespace,
                run: block.place.run,
            };
            if !is_there(&run, &block.key) {
                waiting.insert(run);
                now.left_blocks += 1;
                now.left_bytes += block.length_bytes;
            }
        }
        now.waiting_runs = waiting.len() as u64;
        now.is_draining = is_draining;
        now
    }

    /// Who has taken runs, and whether each is well and stays: two that drain at once could each count on the other.
    fn takers(&self) -> BTreeMap<MemberId, bool> {
        let roster = self.cluster.roster();
        let stays = |id: &MemberId| {
            let member = roster.view.get(id);
            member.is_some_and(|member| member.state.takes_runs())
        };
        let handed = self.handed.lock();
        let mut takers: BTreeMap<MemberId, bool> = BTreeMap::new();
        for handed in handed.values() {
            if !takers.contains_key(&handed.to) {
                let is_well = self.cluster.standing(&handed.to) == Standing::Well;
                takers.insert(handed.to.clone(), is_well && stays(&handed.to));
            }
        }
        takers
    }

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

    fn is_draining(&self, roster: &Roster) -> bool {
        let me = roster.view.get(self.cluster.me());
        me.is_some_and(|me| me.state == MemberState::Draining)
    }

    /// What has to go, to anybody or to some alone, and was not handed over already.
    fn to_do(&self, roster: &Roster, only: Option<&BTreeSet<MemberId>>) -> Vec<Move> {
        let held = self.holdings.held();
        let mut spaces: BTreeMap<kvproto::NamespaceId, usize> = BTreeMap::new();
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

    /// One plan, as far as it can be carried out before the next change.
    async fn carry_out(self: &Arc<Self>, roster: &Arc<Roster>, only: Option<&BTreeSet<MemberId>>) {
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
            let mut pushed = Pushed::default();
            if is_gone || self.is_suspect(&to) {
                pushed.left(&blocks);
            } else {
                match self.push(&one, &blocks, &mut pushed).await {
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
            self.account_for(&one, life.unwrap_or_default(), &blocks, &pushed, began);
        }
        is_gone.then_some(to)
    }

    fn account_for(
        &self,
        one: &Move,
        life: u64,
        blocks: &[HeldBlock],
        pushed: &Pushed,
        began: Tick,
    ) {
        if one.leaves {
            self.holdings.first_to_go(&pushed.there);
        }
        let is_whole = pushed.left_blocks == 0;
        let handed = Handed {
            to: one.to.id.clone(),
            life,
            there: pushed.there.iter().copied().collect(),
            is_whole,
            blocks: blocks.len() as u64,
        };
        self.handed.lock().insert(one.run.key, handed);
        let moved = is_whole && pushed.sent_bytes > 0;
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

    fn show_waiting(&self) {
        let progress = self.progress.borrow();
        self.metrics
            .waiting(progress.waiting_runs, progress.at_stake_bytes());
    }

    /// One run to its destination.
    pub(super) async fn push(
        self: &Arc<Self>,
        one: &Move,
        blocks: &[HeldBlock],
        pushed: &mut Pushed,
    ) -> Result<(), PeerError> {
        let Some(space) = self.holdings.space(&one.run.key.namespace) else {
            // A tenant that is no longer there: nobody can ask for it.
            return Ok(());
        };
        for held in chains(blocks, space.run_blocks()) {
            let present = self.probe(&one.to, &space, &held).await?;
            let (there, missing) = held.blocks.split_at(present * held.parts.len());
            pushed.there.extend(there.iter().map(|block| block.key));
            for (kind, batch) in batches(missing) {
                self.send(&one.to, &space, kind, batch, pushed).await?;
            }
        }
        Ok(())
    }

    /// How many leading blocks of a chain the destination has already.
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
        Ok((seen?.blocks as usize).min(held.chain.len()))
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
        let bytes = sent.iter().map(|(_, bytes)| bytes).sum();
        self.pace.take(bytes).await;
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

/// Who lives another life than when it was last looked at, and may have come back with nothing.
fn reborn_since(lives: &mut BTreeMap<MemberId, u64>, roster: &Roster) -> BTreeSet<MemberId> {
    let now: BTreeMap<MemberId, u64> = roster
        .present()
        .map(|member| (member.id.clone(), member.generation))
        .collect();
    let before = std::mem::replace(lives, now);
    let is_reborn = |(id, life): &(&MemberId, &u64)| before.get(*id).is_some_and(|b| b < *life);
    let reborn = lives.iter().filter(is_reborn);
    reborn.map(|(id, _)| id.clone()).collect()
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
    fn left<'a>(&mut self, blocks: impl IntoIterator<Item = &'a HeldBlock>) {
        for block in blocks {
            self.left_blocks += 1;
            self.left_bytes += block.length_bytes;
        }
    }
}
