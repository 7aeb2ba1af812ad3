//! Blocks on their way between nodes: what a change of members costs, and what it must not.
//!
//! ```text
//!   lookup, get ── a miss, while a change is young ──► fetch.rs    candidates once, under a lease there, kept here
//!   a change of roster ─────────────────────────────► moves.rs    runs that changed owner, hottest first, paced
//!   put, where runs have several owners ────────────► replicas.rs  on to the next owner
//!   one run, one way at a time ─────────────────────► under_way.rs
//!   gets of one run, many at once ──────────────────► hot.rs      a second owner for a while, by the count in heat.rs
//!
//!                 Cluster (who owns what)   Transport (peers)   Holdings (what lies here)   Clock
//! ```
//!
//! Blocks are immutable and named by their content, so nothing here keeps two nodes in step: a copy that is found is a
//! right copy, or its sums betray it, and one that is not found is a miss. Therefore
//!
//! * whatever goes wrong costs the miss that it was, never an error and never more time than [`MotionConfig::wait`];
//! * peers are asked with no-forward: they answer from what they hold, so nothing can bounce;
//! * an invalidation reaches one node sooner and another later: what the later one hands over meanwhile is refused by the
//!   sooner one ([`Holdings::survived`]);
//! * what is leased stays where it is leased; a run that has moved is merely the first to go here afterwards.
//!
//! This room decides and waits; it knows neither sockets nor the engine, so that a simulator drives the same code with
//! [`Shelf`]s for nodes. Units: blocks, bytes, durations. Errors: none.
//! Bounds: [`MotionConfig`]; each file names its own.
//! Why the owner fetches, and not the client: one flight serves all who want the run, and its bytes are where they
//! belong afterwards.

mod fetch;
mod heat;
mod hot;
mod moves;
mod node;
mod replicas;
mod runs;
mod served;
mod shelf;
#[cfg(test)]
mod tests;
mod under_way;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use kvproto::{
    BlockKey, BootId, Kind, Member, MemberId, NamespaceId, Reason, RunHash, SequenceHash,
};
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use self::node::carried;
pub use self::{
    fetch::Brought,
    heat::{Heat, HotRules, MAX_COUNTED},
    hot::{MAX_GUESTS, MAX_HOT},
    moves::{Move, Progress, plan},
    node::NodeHoldings,
    replicas::{Passed, Passing},
    served::Served,
    shelf::Shelf,
};
use self::{fetch::Flight, hot::Hot, moves::Handed, under_way::Sent};
use crate::{
    clock::{Clock, Tick},
    cluster::{Cluster, Roster, Standing},
    engine::{HeldBlock, HeldRun, RunKey},
    peers::{Carried, Pace, Peer, Space, Transport},
    telemetry::metrics::MotionMetrics,
};

/// What a node holds, as far as motion has to know it.
pub trait Holdings: Send + Sync + 'static {
    /// A namespace that is known here.
    fn space(&self, id: &NamespaceId) -> Option<Arc<Space>>;

    /// Every run of which a block lies here, in the order of their keys.
    fn held(&self) -> Vec<HeldRun>;

    /// The blocks here of some runs; those of one run together, root side first.
    fn blocks_of(&self, runs: &BTreeSet<RunKey>) -> Vec<HeldBlock>;

    /// Whether a block is not here and may be looked for elsewhere: what was invalidated here may not.
    fn lacks(&self, key: &BlockKey) -> bool;

    /// The moment at which work begins that [`Holdings::keep`] will end.
    fn moment(&self) -> u64;

    /// Takes in a block that was on its way since `began`, if its bytes are what its header says and it was not
    /// invalidated here lately, but for what it has `survived` where it comes from.
    fn keep(&self, block: Carried, kind: Kind, began: u64, survived: &[u64]) -> Kept;

    /// Invalidations, by their ids, that blocks of these which are here now have survived.
    fn survived(&self, namespace: &NamespaceId, hashes: &[SequenceHash]) -> Vec<u64>;

    /// Whether a block is not here because it was invalidated.
    fn was_invalidated(&self, key: &BlockKey) -> bool;

    /// The bytes of a block that lies here; `None` when it has left.
    fn read(&self, block: &HeldBlock) -> BoxFuture<'static, Option<Carried>>;

    /// These lie elsewhere too, and may go before any other, from RAM and from the tiers below.
    fn first_to_go(&self, keys: &[BlockKey]);

    /// Those that may, and their runs, in no order; one that lies in several tiers may be told as often.
    fn going(&self) -> Vec<(BlockKey, RunHash)>;

    /// These do not go before others any more.
    fn stays(&self, keys: &[BlockKey]);
}

/// What became of a block that came from a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It is here now.
    New,
    /// It was here already.
    Present,
    /// There was no room, or it was invalidated meanwhile.
    Refused(Reason),
    /// Its bytes are not what its header says.
    Corrupt,
}

/// How patient motion is, and how much of it there may be.
#[derive(Clone, Copy, Debug)]
pub struct MotionConfig {
    /// The most that a lookup waits for runs to be fetched. Half of its deadline bounds it too.
    pub wait: Duration,
    /// The most that one run's fetch takes, over all candidates.
    pub fetch_time: Duration,
    /// The most that one candidate has to say what it holds.
    pub ask_time: Duration,
    /// Runs being fetched at once; more are misses.
    pub fetches: usize,
    /// How long after a change moves begin: those that come together are one plan.
    pub settle: Duration,
    /// While a change is young, what is held is looked through again this often: callers with an old view go on
    /// putting at old owners for a while.
    pub again: Duration,
    /// Deadline of one call that moves blocks.
    pub move_time: Duration,
    /// From when on a run gets a second owner for a while. Default: never; a node's settings say.
    pub hot: HotRules,
    /// For how long a second owner is named; named anew while the run stays hot.
    pub hot_time: Duration,
    /// How often it is looked at what is hot.
    pub hot_look: Duration,
}

impl Default for MotionConfig {
    fn default() -> Self {
        Self {
            wait: Duration::from_millis(100),
            fetch_time: Duration::from_secs(5),
            ask_time: Duration::from_millis(500),
            fetches: 256,
            settle: Duration::from_millis(500),
            again: Duration::from_secs(5),
            move_time: Duration::from_secs(10),
            hot: HotRules {
                calls: 0,
                share_percent: 10,
            },
            hot_time: Duration::from_secs(30),
            hot_look: Duration::from_secs(1),
        }
    }
}

/// The motion of one node.
pub struct Motion {
    config: MotionConfig,
    cluster: Arc<Cluster>,
    transport: Arc<dyn Transport>,
    holdings: Arc<dyn Holdings>,
    clock: Arc<dyn Clock>,
    pace: Arc<Pace>,
    metrics: Arc<MotionMetrics>,
    runtime: Handle,
    tasks: TaskTracker,
    stopping: CancellationToken,
    /// The view that `young_until_ms` speaks of.
    seen_digest: AtomicU64,
    /// Until then a change is young; 0: none is.
    young_until_ms: AtomicU64,
    flights: Mutex<BTreeMap<RunKey, Flight>>,
    /// Runs that nobody had, until when that is believed, and the first block that was lacking.
    missed: Mutex<BTreeMap<RunKey, (Tick, SequenceHash)>>,
    handed: Mutex<BTreeMap<RunKey, Handed>>,
    /// Times that more than a block was forgotten; counted under the lock of `handed`.
    forgets: AtomicU64,
    /// Runs that are being sent.
    sending: Mutex<BTreeMap<RunKey, Sent>>,
    progress: watch::Sender<Progress>,
    /// Bytes on their way to further owners.
    passing_bytes: AtomicU64,
    hot: Hot,
}

/// Everything that motion works with.
pub struct MotionParts {
    /// Who owns what.
    pub cluster: Arc<Cluster>,
    /// The way to peers.
    pub transport: Arc<dyn Transport>,
    /// What lies here.
    pub holdings: Arc<dyn Holdings>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Bytes per second that moves may use.
    pub pace: Arc<Pace>,
    /// What is counted.
    pub metrics: Arc<MotionMetrics>,
    /// Where its tasks run.
    pub runtime: Handle,
}

impl Motion {
    /// Motion of a node; [`Motion::start`] begins to move what lies here.
    #[must_use]
    pub fn new(config: MotionConfig, parts: MotionParts) -> Arc<Self> {
        let MotionParts {
            cluster,
            transport,
            holdings,
            clock,
            pace,
            metrics,
            runtime,
        } = parts;
        Arc::new(Self {
            config,
            cluster,
            transport,
            holdings,
            clock,
            pace,
            metrics,
            runtime,
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            seen_digest: AtomicU64::new(0),
            young_until_ms: AtomicU64::new(0),
            flights: Mutex::default(),
            missed: Mutex::default(),
            handed: Mutex::default(),
            forgets: AtomicU64::new(0),
            sending: Mutex::default(),
            progress: watch::Sender::new(Progress::default()),
            passing_bytes: AtomicU64::new(0),
            hot: Hot::default(),
        })
    }

    /// Moves what changes its owner, from now on.
    pub fn start(self: &Arc<Self>) {
        self.spawn(Arc::clone(self).work());
        if self.config.hot.calls > 0 {
            self.spawn(Arc::clone(self).watch_heat());
        }
    }

    /// Ends all of it and waits for that.
    pub async fn stop(&self) {
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// The cluster it follows.
    #[must_use]
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// Whether a miss is worth asking peers for: while a change is young, and where runs have several owners.
    ///
    /// One load and one comparison while nothing changes.
    #[must_use]
    pub fn may_ask(&self, replicas: usize) -> bool {
        let digest = self.cluster.digest().0;
        if self.seen_digest.load(Ordering::Acquire) != digest {
            let roster = self.cluster.roster();
            self.young_until_ms
                .store(roster.young_until().as_millis(), Ordering::Release);
            self.missed.lock().clear();
            self.seen_digest.store(roster.digest.0, Ordering::Release);
        }
        let until = self.young_until_ms.load(Ordering::Acquire);
        let is_young = until > 0 && self.clock.now().as_millis() < until;
        is_young || replicas > 1
    }

    /// Whether this node is to have `run`.
    fn owns(&self, roster: &Roster, run: &RunHash, replicas: usize) -> bool {
        roster.owns(self.cluster.me(), run, replicas)
    }

    /// Whom to ask for a run that is missing here: its other owners, then those who had it before a change. Those who
    /// are suspect come last: they may cost a deadline.
    fn candidates(&self, roster: &Roster, run: &RunHash, replicas: usize) -> Vec<Peer> {
        let me = self.cluster.me();
        let mut found: Vec<Peer> = Vec::new();
        let mut add = |member: &Member| {
            if member.id != *me && found.iter().all(|known| known.id != member.id) {
                found.push(peer(member));
            }
        };
        if replicas > 1 {
            roster.owners(run, replicas).into_iter().for_each(&mut add);
        }
        roster
            .candidates(run, self.clock.now())
            .iter()
            .for_each(&mut add);
        found.sort_by_key(|peer| self.is_suspect(&peer.id));
        found
    }

    fn is_suspect(&self, id: &MemberId) -> bool {
        matches!(self.cluster.standing(id), Standing::Suspect { .. })
    }

    /// A call to a member got no answer.
    fn hurt(&self, id: &MemberId) {
        self.cluster.hurt(id, BootId(0));
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn_on(task, &self.runtime);
    }

    /// Waits on the node's own runtime, whoever waits for it; the callers of the same-host path have none.
    fn on_runtime<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> impl Future<Output = Option<T>> + Send + 'static {
        let task = self.tasks.spawn_on(work, &self.runtime);
        async { task.await.ok() }
    }

    fn left(&self, until: Tick) -> Duration {
        until.since(self.clock.now())
    }
}

fn peer(member: &Member) -> Peer {
    Peer {
        id: member.id.clone(),
        address: member.address.clone(),
    }
}
