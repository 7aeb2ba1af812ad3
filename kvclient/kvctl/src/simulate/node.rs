//! One simulated node: the server's own membership and motion over a map for blocks.
//!
//! ```text
//! callers ──► shelf ◄── Served ◄── peers        what is put by a peer that passes on goes to the next owner
//!               └──► motion ──► wire ──► peers
//! ```
//!
//! The shelf survives a restart, as a disk does; everything else of a life begins anew. Errors: those of peers.

use std::sync::Arc;

use kvproto::{Kind, MemberId, ViewDigest};
use kvserver::{
    blocks::motion::{Motion, Passing, Shelf},
    clock::Tick,
    cluster::Cluster,
    peers::{Carried, Space},
};
use parking_lot::Mutex;

use super::hot::Desk;

/// Whether a node answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Up,
    /// It takes calls and answers none.
    Frozen,
    /// It was killed and will be started again.
    Away,
    /// For good.
    Down,
}

/// One node.
pub(super) struct Node {
    pub(super) id: MemberId,
    pub(super) index: usize,
    /// Once it has joined.
    pub(super) weight: u32,
    pub(super) shelf: Arc<Shelf>,
    pub(super) desk: Desk,
    pub(super) life: Mutex<Life>,
}

/// What of a node begins anew with a restart.
pub(super) struct Life {
    /// The how manyeth it is.
    pub(super) number: u64,
    pub(super) born: Tick,
    pub(super) cluster: Arc<Cluster>,
    pub(super) motion: Arc<Motion>,
    pub(super) health: Health,
    /// News that are still on their way here, and up to which all have been sent off.
    pub(super) coming: Vec<usize>,
    pub(super) sent_off: usize,
    pub(super) told: (u64, u64),
    pub(super) digest: ViewDigest,
    /// Its last round.
    pub(super) looked: Tick,
}

impl Node {
    /// Whether it answers.
    pub(super) fn is_up(&self) -> bool {
        self.life.lock().health == Health::Up
    }

    /// Has the motion of its present life pass a block on.
    pub(super) fn pass_on(
        &self,
        space: &Arc<Space>,
        block: Carried,
    ) -> Option<tokio::sync::oneshot::Receiver<kvserver::blocks::motion::Passed>> {
        let motion = Arc::clone(&self.life.lock().motion);
        let mut passing = Passing::default();
        passing.push(0, block);
        motion.pass_on(space, kvproto::Ack::Cached, Kind::Kv, passing)
    }
}
