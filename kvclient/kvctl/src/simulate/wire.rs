//! The transport between simulated nodes: the server's own in-process one over links that may be cut or slow, with an
//! account of what crossed it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream};
use kvproto::{BlockKey, LeaseId, MemberId, PutOutcome, convert::answer::PutResult};
use kvserver::{
    clock::Clock,
    cluster::Cluster,
    peers::{
        Asked, Carried, Fetched, Fetching, Given, Peer, PeerError, Seen, Space, Transport, net::Net,
    },
};

use parking_lot::RwLock;

use super::{
    clock::SimClock,
    history::History,
    ledger::Ledger,
    links::{Links, Place},
    town::index_of,
};

/// Bytes and calls between nodes.
#[derive(Default)]
pub(super) struct Traffic {
    /// Bytes of blocks that owners pushed.
    pub(super) pushed_bytes: AtomicU64,
    /// Bytes of blocks that owners fetched.
    pub(super) fetched_bytes: AtomicU64,
    /// Bytes of new blocks that owners passed on to the next.
    pub(super) copied_bytes: AtomicU64,
    /// Bytes of blocks that many read, on their way to a second owner.
    pub(super) hot_bytes: AtomicU64,
    /// Calls of all kinds.
    pub(super) calls: AtomicU64,
}

/// What all wires share.
pub(super) struct Lines {
    pub(super) clock: SimClock,
    pub(super) net: Arc<Net>,
    pub(super) links: Arc<Links>,
    pub(super) traffic: Traffic,
    pub(super) history: Arc<History>,
    pub(super) ledger: Arc<Ledger>,
    /// What each node knows, by its number.
    clusters: RwLock<BTreeMap<usize, Weak<Cluster>>>,
}

impl Lines {
    pub(super) fn new(
        clock: SimClock,
        net: Arc<Net>,
        links: Arc<Links>,
        history: Arc<History>,
        ledger: Arc<Ledger>,
    ) -> Self {
        Self {
            clock,
            net,
            links,
            traffic: Traffic::default(),
            history,
            ledger,
            clusters: RwLock::default(),
        }
    }

    /// What node `index` knows from now on.
    pub(super) fn knows(&self, index: usize, cluster: &Arc<Cluster>) {
        let mut clusters = self.clusters.write();
        clusters.insert(index, Arc::downgrade(cluster));
    }

    /// Whether `caller` gives away a copy of what is and stays its own: to somebody who does not own it.
    fn is_copy(&self, caller: usize, to: &MemberId, given: &Given) -> bool {
        let cluster = self.clusters.read().get(&caller).and_then(Weak::upgrade);
        let (Some(cluster), Some(block)) = (cluster, given.blocks.first()) else {
            return false;
        };
        let (roster, run) = (cluster.roster(), &block.header.place.run);
        let replicas = given.space.replicas;
        roster.owns(cluster.me(), run, replicas) && !roster.owns(to, run, replicas)
    }

    /// An answer brings a caller the members that it lacks, as between real nodes.
    fn answered(&self, caller: usize, by: usize) {
        let clusters = self.clusters.read();
        let of = |index| clusters.get(&index).and_then(Weak::upgrade);
        if let (Some(me), Some(other)) = (of(caller), of(by))
            && me.digest() != other.digest()
        {
            me.merge(other.roster().view.members().to_vec());
        }
    }
}

/// One node's way to the others.
pub(super) struct Wire {
    pub(super) from: kvproto::MemberId,
    pub(super) index: usize,
    pub(super) lines: Arc<Lines>,
}

impl Wire {
    fn note(&self, method: &str, peer: &Peer, blocks: usize) {
        let lines = &self.lines;
        lines.traffic.calls.fetch_add(1, Relaxed);
        lines
            .history
            .note(format_args!("{method} {} {} {blocks}", self.from, peer.id));
    }

    /// A call over the link to `peer`, made with what is left of `deadline` when it arrives there.
    fn over<T: Send + 'static, F: Future<Output = Result<T, PeerError>> + Send + 'static>(
        &self,
        peer: &Peer,
        deadline: Duration,
        call: impl FnOnce(Arc<Net>, Duration) -> F + Send + 'static,
    ) -> BoxFuture<'static, Result<T, PeerError>> {
        let lines = Arc::clone(&self.lines);
        let (me, other) = (self.index, index_of(&peer.id).unwrap_or(self.index));
        let (from, to) = (Place::Node(me), Place::Node(other));
        async move {
            let until = lines.clock.now().after(deadline);
            let called = async {
                let left = until.since(lines.clock.now());
                call(Arc::clone(&lines.net), left).await
            };
            let answer = lines.links.carry(from, to, until, called).await;
            if let Some(Ok(_)) = &answer {
                lines.answered(me, other);
            }
            answer.unwrap_or(Err(PeerError::Late))
        }
        .boxed()
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
        self.note("lookup", peer, asked.chain.len());
        let (to, asked) = (peer.clone(), asked.clone());
        self.over(peer, deadline, move |net, left| {
            net.lookup(&to, &asked, lease, left)
        })
    }

    fn get(
        &self,
        peer: &Peer,
        asked: &Asked,
        lease: Option<LeaseId>,
        deadline: Duration,
    ) -> Fetching {
        self.note("get", peer, asked.chain.len());
        let (to, asked, me) = (peer.clone(), asked.clone(), self.from.clone());
        let lines = Arc::clone(&self.lines);
        let answers = self.over(peer, deadline, move |net, left| async move {
            let answers: Vec<_> = net.get(&to, &asked, lease, left).collect().await;
            Ok(answers)
        });
        let count = move |answer: &Result<(u32, Fetched), PeerError>| {
            if let Ok((_, Fetched::Hit(block))) = answer {
                let bytes = block.len_bytes();
                lines.traffic.fetched_bytes.fetch_add(bytes, Relaxed);
                lines.ledger.arrived(&me, block.header.key, bytes);
            }
        };
        stream::once(answers)
            .flat_map(|answers| stream::iter(answers.unwrap_or_else(|late| vec![Err(late)])))
            .inspect(count)
            .boxed()
    }

    fn put(
        &self,
        peer: &Peer,
        given: Given,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<PutResult>, PeerError>> {
        self.note("put", peer, given.blocks.len());
        let (to, lines, me) = (peer.clone(), Arc::clone(&self.lines), self.index);
        self.over(peer, deadline, move |net, left| async move {
            let block = |block: &Carried| (block.header.key, block.len_bytes());
            let sent: Vec<(BlockKey, u64)> = given.blocks.iter().map(block).collect();
            // What gets lost on its way has not moved.
            let moved = match given.passes_on {
                true => &lines.traffic.copied_bytes,
                false if lines.is_copy(me, &to.id, &given) => &lines.traffic.hot_bytes,
                false => &lines.traffic.pushed_bytes,
            };
            moved.fetch_add(sent.iter().map(|(_, bytes)| bytes).sum(), Relaxed);
            let results = net.put(&to, given, left).await?;
            for ((key, bytes), result) in sent.into_iter().zip(&results) {
                if result.is_kept() && result.outcome != PutOutcome::Present {
                    lines.ledger.arrived(&to.id, key, bytes);
                }
            }
            Ok(results)
        })
    }

    fn open(
        &self,
        peer: &Peer,
        space: &Arc<Space>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<(), PeerError>> {
        self.note("open", peer, 0);
        let (to, space) = (peer.clone(), Arc::clone(space));
        self.over(peer, deadline, move |net, left| net.open(&to, &space, left))
    }

    fn release(
        &self,
        peer: &Peer,
        space: &Arc<Space>,
        lease: LeaseId,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<(), PeerError>> {
        self.note("release", peer, 0);
        let (to, space) = (peer.clone(), Arc::clone(space));
        self.over(peer, deadline, move |net, left| {
            net.release(&to, &space, lease, left)
        })
    }
}
