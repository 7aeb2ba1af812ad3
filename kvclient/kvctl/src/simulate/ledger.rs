//! What really is, as nobody in the simulation knows it: the members there are, what is stored, what had to move.
//!
//! ```text
//! news, tombstones ─► true view ─► owners before and after ─► bytes that changed owner
//! puts at whom a stale view names ─────────────────────────► bytes that have to move once more
//! kills ───────────────────────────────────────────────────► blocks that are lost, and said to be
//! ```
//!
//! Units: bytes, blocks. Errors: none.

use std::{collections::BTreeMap, sync::Arc};

use kvproto::{BlockKey, Member, MemberId, RunHash, View, ViewDigest, placement::Placement};
use kvserver::{
    blocks::motion::{Holdings, Shelf},
    clock::Tick,
};
use parking_lot::Mutex;

/// The true state and the bill.
#[derive(Default)]
pub(super) struct Ledger(Mutex<State>);

#[derive(Default)]
struct State {
    view: View,
    digest: ViewDigest,
    placement: Placement,
    changed: Tick,
    changes: u64,
    blocks: BTreeMap<BlockKey, (RunHash, u64)>,
    runs: BTreeMap<RunHash, u64>,
    bill: Bill,
}

/// What had to move, and what is lost.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bill {
    /// Bytes whose owner changed, plus those put at somebody who was not their owner.
    pub(super) changed_owner_bytes: u64,
    /// Blocks whose only copy was on a node that was killed.
    pub(super) lost_blocks: u64,
    /// Bytes that drained nodes said would be lost as they left.
    pub(super) drain_lost_bytes: u64,
}

impl Ledger {
    /// Members as they are from now on.
    pub(super) fn learn(&self, news: impl IntoIterator<Item = Member>, now: Tick) {
        let mut state = self.0.lock();
        for member in news {
            state.view.merge_one(member);
        }
        let digest = state.view.digest();
        if digest == state.digest {
            return;
        }
        let next = Placement::new(&state.view);
        let before = std::mem::replace(&mut state.placement, next);
        (state.digest, state.changed) = (digest, now);
        state.changes += 1;
        let moved: u64 = state
            .runs
            .iter()
            .filter(|(run, _)| before.first(run) != state.placement.first(run))
            .map(|(_, bytes)| bytes)
            .sum();
        state.bill.changed_owner_bytes += moved;
    }

    /// A block was put at `at`.
    pub(super) fn stored(&self, key: BlockKey, run: RunHash, bytes: u64, at: &MemberId) {
        let mut state = self.0.lock();
        if state.placement.first(&run) != Some(at) {
            state.bill.changed_owner_bytes += bytes;
        }
        if state.blocks.insert(key, (run, bytes)).is_none() {
            *state.runs.entry(run).or_default() += bytes;
        }
    }

    /// Whether a copy of a block is anywhere.
    pub(super) fn has(&self, key: &BlockKey) -> bool {
        self.0.lock().blocks.contains_key(key)
    }

    /// What lay in `dead` is lost, but for what is in one of `left`.
    pub(super) fn lost(&self, dead: &Shelf, left: &[Arc<Shelf>]) {
        let runs = dead.held().into_iter().map(|run| run.key).collect();
        let mut state = self.0.lock();
        for block in dead.blocks_of(&runs) {
            if left.iter().any(|shelf| shelf.has(&block.key)) {
                continue;
            }
            if let Some((run, bytes)) = state.blocks.remove(&block.key) {
                state.bill.lost_blocks += 1;
                if let Some(left) = state.runs.get_mut(&run) {
                    *left -= bytes;
                }
            }
        }
    }

    /// A node left with so much not handed over.
    pub(super) fn drained(&self, at_stake_bytes: u64) {
        self.0.lock().bill.drain_lost_bytes += at_stake_bytes;
    }

    /// Digest of the true view.
    pub(super) fn digest(&self) -> ViewDigest {
        self.0.lock().digest
    }

    /// When the true view last changed.
    pub(super) fn changed(&self) -> Tick {
        self.0.lock().changed
    }

    /// How often the true view changed.
    pub(super) fn changes(&self) -> u64 {
        self.0.lock().changes
    }

    /// The true view, and what had to move.
    pub(super) fn close(&self) -> (View, Bill) {
        let state = self.0.lock();
        (state.view.clone(), state.bill)
    }

    /// Who owns a run in truth.
    pub(super) fn owner(&self, run: &RunHash) -> Option<MemberId> {
        self.0.lock().placement.first(run).cloned()
    }
}
