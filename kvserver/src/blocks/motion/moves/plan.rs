//! What has to go where: a pure function of who owns what and what lies here.
//!
//! ```text
//! roster × held runs ─plan─► moves, hottest first         a node that is not an owner: to the first owner
//!                                                          one that is, of several:    to the owner after it
//! ```
//!
//! Units: runs. Errors: none.

use std::collections::{BTreeMap, BTreeSet};

use kvproto::{MemberId, MemberState, RunHash};

use super::super::peer;
use crate::{
    clock::Tick,
    cluster::Roster,
    engine::{HeldRun, RunKey},
    peers::Peer,
};

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

/// Who lives another life than when it was last looked at, and may have come back with nothing.
pub(super) fn reborn_since(
    lives: &mut BTreeMap<MemberId, u64>,
    roster: &Roster,
) -> BTreeSet<MemberId> {
    let now: BTreeMap<MemberId, u64> = roster
        .present()
        .map(|member| (member.id.clone(), member.generation))
        .collect();
    let before = std::mem::replace(lives, now);
    let is_reborn = |(id, life): &(&MemberId, &u64)| before.get(*id).is_some_and(|b| b < *life);
    let reborn = lives.iter().filter(is_reborn);
    reborn.map(|(id, _)| id.clone()).collect()
}
