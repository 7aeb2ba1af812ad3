//! The transport between simulated nodes: the server's own in-process one, with an account of what crossed it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use kvproto::{LeaseId, MemberId, convert::answer::PutResult};
use kvserver::peers::{
    Asked, Fetched, Fetching, Given, Peer, PeerError, Seen, Space, Transport, net::Net,
};

use super::history::History;

/// Bytes and calls between nodes.
#[derive(Default)]
pub(super) struct Traffic {
    /// Bytes of blocks that owners pushed.
    pub(super) pushed_bytes: AtomicU64,
    /// Bytes of blocks that owners fetched.
    pub(super) fetched_bytes: AtomicU64,
    /// Calls of all kinds.
    pub(super) calls: AtomicU64,
}

/// One node's way to the others.
pub(super) struct Wire {
    pub(super) from: MemberId,
    pub(super) net: Arc<Net>,
    pub(super) traffic: Arc<Traffic>,
    pub(super) history: Arc<History>,
}

impl Wire {
    fn call(&self, method: &str, peer: &Peer, blocks: usize) {
        self.traffic.calls.fetch_add(1, Ordering::Relaxed);
        self.history
            .note(format_args!("{method} {} {} {blocks}", self.from, peer.id));
    }
}

impl Transport for Wire {
    fn lookup(
        &self,
        peer: &Peer,
        asked: &Asked,
        lease: Option<Duration>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Seen, PeerError>> {
        self.call("lookup", peer, asked.chain.len());
        self.net.lookup(peer, asked, lease, deadline)
    }

    fn get(
        &self,
        peer: &Peer,
        asked: &Asked,
        lease: Option<LeaseId>,
        deadline: Duration,
    ) -> Fetching {
        self.call("get", peer, asked.chain.len());
        let traffic = Arc::clone(&self.traffic);
        let count = move |answer: &Result<(u32, Fetched), PeerError>| {
            if let Ok((_, Fetched::Hit(block))) = answer {
                traffic
                    .fetched_bytes
                    .fetch_add(block.len_bytes(), Ordering::Relaxed);
            }
        };
        self.net
            .get(peer, asked, lease, deadline)
            .inspect(count)
            .boxed()
    }

    fn put(
        &self,
        peer: &Peer,
        given: Given,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<PutResult>, PeerError>> {
        self.call("put", peer, given.blocks.len());
        let bytes = given.blocks.iter().map(|block| block.len_bytes()).sum();
        self.traffic
            .pushed_bytes
            .fetch_add(bytes, Ordering::Relaxed);
        self.net.put(peer, given, deadline).boxed()
    }

    fn open(
        &self,
        peer: &Peer,
        space: &Arc<Space>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<(), PeerError>> {
        self.call("open", peer, 0);
        self.net.open(peer, space, deadline)
    }

    fn release(
        &self,
        peer: &Peer,
        space: &Arc<Space>,
        lease: LeaseId,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<(), PeerError>> {
        self.call("release", peer, 0);
        self.net.release(peer, space, lease, deadline)
    }
}
