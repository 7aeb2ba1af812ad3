//! What a node of maps answers its peers: for tests and for the simulator.
//!
//! ```text
//! callers ──► shelf ◄── Served ◄── peers        what is put by a peer that passes on goes to the next owner
//!               └──► motion ──► transport ──► peers
//! ```
//!
//! Errors: those of peers.

use std::{
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use futures_util::future::BoxFuture;
use kvproto::{BlockKey, LeaseId, PutOutcome, convert::answer::PutResult};

use super::{Motion, Passing, Shelf};
use crate::peers::{Asked, Fetched, Given, PeerError, Seen, Space, net::Service};

/// What a node answers its peers.
pub struct Served {
    shelf: Arc<Shelf>,
    motion: OnceLock<Weak<Motion>>,
}

impl Served {
    /// Over a shelf, without motion yet.
    #[must_use]
    pub fn new(shelf: Arc<Shelf>) -> Arc<Self> {
        Arc::new(Self {
            shelf,
            motion: OnceLock::new(),
        })
    }

    /// Its motion, once that is there.
    pub fn moves_by(&self, motion: &Arc<Motion>) {
        // Told once, when the node is built.
        let _ = self.motion.set(Arc::downgrade(motion));
    }
}

impl Service for Served {
    fn lookup(&self, asked: &Asked, lease: Option<Duration>) -> Result<Seen, PeerError> {
        self.shelf.lookup(asked, lease)
    }

    fn under_way(
        &self,
        asked: &Asked,
        lease: Option<Duration>,
        time: Duration,
    ) -> Option<BoxFuture<'static, ()>> {
        let motion = self.motion.get().and_then(Weak::upgrade)?;
        motion.under_way(&asked.space, &asked.chain, lease.is_none(), time)
    }

    fn get(&self, key: &BlockKey, lease: Option<LeaseId>) -> Fetched {
        self.shelf.get(key, lease)
    }

    /// As the node's own path does: what is new here goes on to the owner behind this one, or is a guest if a node hands
    /// over what is not this one's.
    fn put(&self, given: Given) -> Result<Vec<PutResult>, PeerError> {
        let (blocks, passes_on) = (given.blocks.clone(), given.passes_on);
        let (space, ack, kind) = (Arc::clone(&given.space), given.ack, given.kind);
        let results = Service::put(&*self.shelf, given)?;
        let Some(motion) = self.motion.get().and_then(Weak::upgrade) else {
            return Ok(results);
        };
        let is_new = |result: &PutResult| result.is_kept() && result.outcome != PutOutcome::Present;
        if passes_on {
            let mut passing = Passing::default();
            for (number, (block, result)) in blocks.into_iter().zip(&results).enumerate() {
                if is_new(result) {
                    passing.push(number, block);
                }
            }
            drop(motion.pass_on(&space, ack, kind, passing));
            return Ok(results);
        }
        for (block, result) in blocks.iter().zip(&results) {
            if is_new(result) {
                let header = &block.header;
                motion.hosts(&header.key, header.place.run, space.replicas);
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
