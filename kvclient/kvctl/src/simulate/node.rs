//! One simulated node: the server's own membership and motion over a map for blocks.
//!
//! ```text
//! callers ──► shelf ◄── Served ◄── peers        what is put by a peer that passes on goes to the next owner
//!               └──► motion ──► wire ──► peers
//! ```
//!
//! The shelf survives a restart, as a disk does; everything else of a life begins anew. Errors: those of peers.

use std::{
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use kvproto::{Kind, LeaseId, MemberId, PutOutcome, ViewDigest, convert::answer::PutResult};
use kvserver::{
    blocks::motion::{Motion, Passing, Shelf},
    clock::Tick,
    cluster::Cluster,
    peers::{Asked, Carried, Fetched, Given, PeerError, Seen, Space, net::Service},
};
use parking_lot::Mutex;

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

/// What a node answers its peers.
pub(super) struct Served {
    shelf: Arc<Shelf>,
    motion: OnceLock<Weak<Motion>>,
}

impl Served {
    pub(super) fn new(shelf: Arc<Shelf>) -> Arc<Self> {
        Arc::new(Self {
            shelf,
            motion: OnceLock::new(),
        })
    }

    /// Its motion, once that is there.
    pub(super) fn moves_by(&self, motion: &Arc<Motion>) {
        // Told once, when the node is built.
        let _ = self.motion.set(Arc::downgrade(motion));
    }
}

impl Service for Served {
    fn lookup(&self, asked: &Asked, lease: Option<Duration>) -> Result<Seen, PeerError> {
        self.shelf.lookup(asked, lease)
    }

    fn get(&self, key: &kvproto::BlockKey, lease: Option<LeaseId>) -> Fetched {
        self.shelf.get(key, lease)
    }

    /// As the node's own path does: what is new here goes on to the owner behind this one.
    fn put(&self, given: Given) -> Result<Vec<PutResult>, PeerError> {
        let passes = given.passes_on.then(|| given.blocks.clone());
        let (space, ack, kind) = (Arc::clone(&given.space), given.ack, given.kind);
        let results = Service::put(&*self.shelf, given)?;
        if let Some(blocks) = passes {
            let mut passing = Passing::default();
            for (number, (block, result)) in blocks.into_iter().zip(&results).enumerate() {
                if result.is_kept() && result.outcome != PutOutcome::Present {
                    passing.push(number, block);
                }
            }
            if let Some(motion) = self.motion.get().and_then(Weak::upgrade) {
                drop(motion.pass_on(&space, ack, kind, passing));
            }
        }
        Ok(results)
    }

    fn open(&self, space: &Arc<Space>) {
        self.shelf.open(space);
    }

    fn release(&self, lease: LeaseId) {
        self.shelf.release(lease);
    }
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
