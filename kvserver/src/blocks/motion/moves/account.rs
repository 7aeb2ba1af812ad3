//! How far moves are, and what would be lost by leaving now.
//!
//! ```text
//! Progress   what a plan still has to do, counted while it is carried out
//! account    the same, exactly, read from what lies here: for a drain's last word
//! drained    waits for nothing to be at stake, or for its time to be up
//! ```
//!
//! Units: runs, blocks, bytes. Errors: none; what is at stake is an answer.

use std::collections::{BTreeMap, BTreeSet};

use kvproto::{BlockKey, MemberId, MemberState};

use super::super::Motion;
use crate::{
    clock::Tick,
    cluster::{Roster, Standing},
    engine::RunKey,
};

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
pub(in crate::blocks::motion) struct Handed {
    pub(super) to: MemberId,
    /// In which life of its: in another one it may have come back with nothing.
    pub(super) life: u64,
    /// Blocks that it has.
    pub(super) there: BTreeSet<BlockKey>,
    pub(super) is_whole: bool,
    /// Blocks that lay here then.
    pub(super) blocks: u64,
}

impl Handed {
    /// Whether whoever took it still lives the life in which it did.
    pub(super) fn holds(&self, roster: &Roster) -> bool {
        let taker = roster.view.get(&self.to);
        taker.is_some_and(|to| to.state != MemberState::Gone && to.generation == self.life)
    }
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

    pub(super) fn is_draining(&self, roster: &Roster) -> bool {
        let me = roster.view.get(self.cluster.me());
        me.is_some_and(|me| me.state == MemberState::Draining)
    }

    pub(super) fn show_waiting(&self) {
        let progress = self.progress.borrow();
        self.metrics
            .waiting(progress.waiting_runs, progress.at_stake_bytes());
    }
}
