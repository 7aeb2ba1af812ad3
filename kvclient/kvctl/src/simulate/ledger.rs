//! What really is, as nobody in the simulation knows it: the members there are, what is stored, what had to move.
//!
//! ```text
//! news, tombstones of the dead ─► true view ─► owners before and after ─► bytes that changed owner
//! puts at whom a stale view names ─────────────────────────────────────► bytes that have to move once more
//! kills ─► blocks that are lost: with a node that alone had them, or (a broken promise) although two had them
//! ```
//!
//! Who is cut off is no less there for it: the true view knows nothing of sides. Units: bytes, blocks. Errors: none.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use kvproto::{BlockKey, Member, MemberId, RunHash, View, ViewDigest, placement::Placement};
use kvserver::{
    blocks::motion::{Holdings, Shelf},
    clock::Tick,
    engine::HeldBlock,
};
use parking_lot::Mutex;

use super::gossip::{LONGEST_SILENCE, ROUND};

/// Within so long of one that has gone, copies are being made; who dies then may have had the only one.
const REPAIR: Duration = Duration::from_secs(20);

/// The true state and the bill.
pub(super) struct Ledger {
    replicas: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    view: View,
    digest: ViewDigest,
    placement: Placement,
    changed: Tick,
    changes: u64,
    /// When the last member went.
    bereaved: Option<Tick>,
    /// When the last one was killed.
    died: Option<Tick>,
    blocks: BTreeMap<BlockKey, Stored>,
    runs: BTreeMap<RunHash, Run>,
    /// Who has had which block; kept only where room is short.
    arrivals: Option<BTreeSet<(MemberId, BlockKey)>>,
    bill: Bill,
}

struct Stored {
    run: RunHash,
    bytes: u64,
    /// Whether all owners have acknowledged it.
    is_copied: bool,
}

#[derive(Default)]
struct Run {
    owners: Vec<MemberId>,
    blocks: Vec<BlockKey>,
}

/// What had to move, and what is lost.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bill {
    /// Bytes whose owner changed, plus those put at somebody who was not their owner.
    pub(super) changed_owner_bytes: u64,
    /// Bytes that came to a node again, because it had given them up for want of room.
    pub(super) came_again_bytes: u64,
    /// Blocks whose only copy was on a node that was killed.
    pub(super) lost_blocks: u64,
    /// Those of them of which there had been two, and time to make another.
    pub(super) lost_copied_blocks: u64,
    /// Blocks that were given up everywhere for want of room.
    pub(super) evicted_blocks: u64,
    /// Bytes that drained nodes said would be lost as they left, and those that they did not speak of.
    pub(super) drain_lost_bytes: u64,
    pub(super) drain_unsaid_bytes: u64,
}

impl Ledger {
    /// Of a cluster with so many owners per run; `is_tight`: nodes give blocks up.
    pub(super) fn new(replicas: usize, is_tight: bool) -> Self {
        let state = State {
            arrivals: is_tight.then(BTreeSet::new),
            ..State::default()
        };
        Self {
            replicas,
            state: Mutex::new(state),
        }
    }

    /// Members as they are from now on; `is_held` says what is anywhere.
    pub(super) fn learn(
        &self,
        news: impl IntoIterator<Item = Member>,
        now: Tick,
        is_held: impl Fn(&BlockKey) -> bool,
    ) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if !state.view.merge_all(news) {
            return;
        }
        let digest = state.view.digest();
        if digest == state.digest {
            return;
        }
        state.placement = Placement::new(&state.view);
        (state.digest, state.changed) = (digest, now);
        state.changes += 1;
        for (run, known) in &mut state.runs {
            let owners = state.placement.owners(run, self.replicas);
            if owners.iter().copied().eq(&known.owners) {
                continue;
            }
            let gained = owners.iter().filter(|id| !known.owners.contains(id));
            let gained = gained.count() as u64;
            if gained > 0 {
                let held = known.blocks.iter().filter(|key| is_held(key));
                let bytes: u64 = held
                    .filter_map(|key| Some(state.blocks.get(key)?.bytes))
                    .sum();
                state.bill.changed_owner_bytes += gained * bytes;
            }
            known.owners = owners.into_iter().cloned().collect();
        }
    }

    /// A block has come to the members `at`; whoever else owns it and does not have it (`has`) gets it by a move.
    pub(super) fn stored(
        &self,
        key: BlockKey,
        run: RunHash,
        bytes: u64,
        at: &[MemberId],
        has: impl Fn(&MemberId) -> bool,
    ) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let known = state.runs.entry(run).or_insert_with(|| Run {
            owners: owners(&state.placement, &run, self.replicas),
            blocks: Vec::new(),
        });
        let lacks = |id: &&MemberId| !at.contains(id) && !has(id);
        let left = known.owners.iter().filter(lacks).count() as u64;
        state.bill.changed_owner_bytes += left * bytes;
        if !known.blocks.contains(&key) {
            known.blocks.push(key);
        }
        state.blocks.entry(key).or_insert(Stored {
            run,
            bytes,
            is_copied: false,
        });
    }

    /// All owners have a block; or its copy did not arrive, and has to be made by a move.
    pub(super) fn copied(&self, key: &BlockKey, is_there: bool) {
        let mut state = self.state.lock();
        let Some(stored) = state.blocks.get_mut(key) else {
            return;
        };
        stored.is_copied |= is_there;
        let bytes = stored.bytes;
        if !is_there {
            state.bill.changed_owner_bytes += bytes;
        }
    }

    /// Every owner of every run has its blocks.
    pub(super) fn all_copied(&self) {
        let mut state = self.state.lock();
        let blocks = state.blocks.values_mut();
        blocks.for_each(|stored| stored.is_copied = self.replicas > 1);
    }

    /// A block has come to a node.
    pub(super) fn arrived(&self, at: &MemberId, key: BlockKey, bytes: u64) {
        let mut state = self.state.lock();
        let Some(arrivals) = &mut state.arrivals else {
            return;
        };
        if !arrivals.insert((at.clone(), key)) {
            state.bill.came_again_bytes += bytes;
        }
    }

    /// Whether a block was stored and not lost.
    pub(super) fn has(&self, key: &BlockKey) -> bool {
        self.state.lock().blocks.contains_key(key)
    }

    /// A block is nowhere any more, because room was short.
    pub(super) fn evicted(&self, key: &BlockKey) {
        let mut state = self.state.lock();
        if state.forget(key).is_some() {
            state.bill.evicted_blocks += 1;
        }
    }

    /// What lay in `dead` is lost, but for what is in one of `left`.
    pub(super) fn lost(&self, dead: &Shelf, left: &[Arc<Shelf>], now: Tick) {
        let runs = dead.held().into_iter().map(|run| run.key).collect();
        let mut state = self.state.lock();
        let is_tight = state.arrivals.is_some();
        let is_early = |at: Tick| now.since(at) < REPAIR;
        let is_excused = is_tight || state.bereaved.is_some_and(is_early);
        (state.bereaved, state.died) = (Some(now), Some(now));
        for block in dead.blocks_of(&runs) {
            if left.iter().any(|shelf| shelf.has(&block.key)) {
                continue;
            }
            if let Some(stored) = state.forget(&block.key) {
                state.bill.lost_blocks += 1;
                let is_broken = stored.is_copied && !is_excused;
                state.bill.lost_copied_blocks += u64::from(is_broken);
            }
        }
    }

    /// A node left, and said that so much of what it `spoke_of` was not handed over; what else of that is in nobody's
    /// hands now it kept to itself.
    pub(super) fn drained(
        &self,
        gone: &Shelf,
        spoke_of: &[HeldBlock],
        left: &[Arc<Shelf>],
        said_bytes: u64,
        said_at: Tick,
    ) {
        let runs = gone.held().into_iter().map(|run| run.key).collect();
        let mut state = self.state.lock();
        // Who took it may have died since, or a moment before, which nobody could know.
        let is_excused = state
            .died
            .is_some_and(|died| died.after(LONGEST_SILENCE + 2 * ROUND) >= said_at);
        state.bereaved = state.bereaved.max(Some(said_at));
        state.bill.drain_lost_bytes += said_bytes;
        let is_left = |key: &BlockKey| left.iter().any(|shelf| shelf.has(key));
        let lost = spoke_of.iter().filter(|block| !is_left(&block.key));
        let lost_bytes: u64 = lost.map(|block| block.length_bytes).sum();
        // What was handed over may have been given up since, where room is short.
        if state.arrivals.is_none() && !is_excused {
            state.bill.drain_unsaid_bytes += lost_bytes.saturating_sub(said_bytes);
        }
        for block in gone.blocks_of(&runs) {
            if !is_left(&block.key) {
                state.forget(&block.key);
            }
        }
    }

    /// Nothing keeps members apart from now on.
    pub(super) fn healed(&self, now: Tick) {
        self.state.lock().changed = now;
    }

    /// Digest of the true view.
    pub(super) fn digest(&self) -> ViewDigest {
        self.state.lock().digest
    }

    /// When the true view last changed, or could last be told to all.
    pub(super) fn changed(&self) -> Tick {
        self.state.lock().changed
    }

    /// How often the true view changed.
    pub(super) fn changes(&self) -> u64 {
        self.state.lock().changes
    }

    /// The true view, and what had to move.
    pub(super) fn close(&self) -> (View, Bill) {
        let state = self.state.lock();
        (state.view.clone(), state.bill)
    }

    /// Blocks that lie with somebody and with no owner of theirs.
    pub(super) fn stranded(
        &self,
        has: impl Fn(&MemberId, &BlockKey) -> bool,
        is_anywhere: impl Fn(&BlockKey) -> bool,
    ) -> u64 {
        let state = self.state.lock();
        let of_run = |run: &Run| {
            let is_owned = |key: &&BlockKey| run.owners.iter().any(|owner| has(owner, key));
            let stranded = run
                .blocks
                .iter()
                .filter(|key| !is_owned(key) && is_anywhere(key));
            stranded.count() as u64
        };
        state.runs.values().map(of_run).sum()
    }

    /// Who owns a run in truth, and who comes next: so many.
    pub(super) fn ranked(&self, run: &RunHash, count: usize) -> Vec<MemberId> {
        owners(&self.state.lock().placement, run, count)
    }

    /// Who owns a run in truth.
    pub(super) fn owners(&self, run: &RunHash) -> Vec<MemberId> {
        owners(&self.state.lock().placement, run, self.replicas)
    }
}

impl State {
    fn forget(&mut self, key: &BlockKey) -> Option<Stored> {
        let stored = self.blocks.remove(key)?;
        if let Some(run) = self.runs.get_mut(&stored.run) {
            run.blocks.retain(|known| known != key);
        }
        Some(stored)
    }
}

fn owners(placement: &Placement, run: &RunHash, replicas: usize) -> Vec<MemberId> {
    let owners = placement.owners(run, replicas);
    owners.into_iter().cloned().collect()
}
