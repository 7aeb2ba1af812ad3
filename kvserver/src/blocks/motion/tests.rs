//! Motion over maps, on a clock that stands still: what it decides, and what it costs when something is wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use kvproto::{
    BlockHeader, BlockKey, Chain, Kind, Member, MemberId, MemberState, Namespace, NamespaceId,
    NamespaceKey, Part, RunHash, SequenceHash, View, hash,
};
use parking_lot::Mutex;
use tokio::{runtime::Handle, task::yield_now};

mod drain;
mod fetch;
mod hot;
mod moves;
mod replicas;

use super::{Holdings, HotRules, Kept, Motion, MotionConfig, MotionParts, Served, Shelf};
use crate::{
    clock::{Clock, ManualClock},
    cluster::{Cluster, Members, Times},
    engine::{HeldBlock, HeldRun, RunKey},
    peers::{
        Asked, Carried, Pace, Space,
        net::{Fault, Net, Service},
    },
    telemetry::metrics::MotionMetrics,
};

const RUN_BLOCKS: u32 = 4;
const BLOCK_BYTES: usize = 64;
const WINDOW: Duration = Duration::from_secs(600);
const LONG: Duration = Duration::from_secs(30);
const SETTLE: Duration = Duration::from_millis(100);
const TIMES: Times = Times {
    suspect_grace: Duration::from_secs(30),
    motion_window: WINDOW,
    join_ramp: Duration::ZERO,
};
const PARTS: &[Part] = &[Part {
    rank: 0,
    layer_group: 0,
}];

/// A shelf whose blocks lie in a tier that may be busy.
struct Tiered {
    shelf: Arc<Shelf>,
    /// Blocks whose next read finds it so.
    busy: Mutex<BTreeSet<BlockKey>>,
}

impl Holdings for Tiered {
    fn space(&self, id: &NamespaceId) -> Option<Arc<Space>> {
        self.shelf.space(id)
    }

    fn held(&self) -> Vec<HeldRun> {
        self.shelf.held()
    }

    fn blocks_of(&self, runs: &BTreeSet<RunKey>) -> Vec<HeldBlock> {
        self.shelf.blocks_of(runs)
    }

    fn lacks(&self, key: &BlockKey) -> bool {
        self.shelf.lacks(key)
    }

    fn moment(&self) -> u64 {
        self.shelf.moment()
    }

    fn keep(&self, block: Carried, kind: Kind, began: u64, survived: &[u64]) -> Kept {
        self.shelf.keep(block, kind, began, survived)
    }

    fn survived(&self, namespace: &NamespaceId, hashes: &[SequenceHash]) -> Vec<u64> {
        self.shelf.survived(namespace, hashes)
    }

    fn was_invalidated(&self, key: &BlockKey) -> bool {
        self.shelf.was_invalidated(key)
    }

    fn read(&self, block: &HeldBlock) -> BoxFuture<'static, Option<Carried>> {
        match self.busy.lock().remove(&block.key) {
            true => std::future::ready(None).boxed(),
            false => self.shelf.read(block),
        }
    }

    fn first_to_go(&self, keys: &[BlockKey]) {
        self.shelf.first_to_go(keys);
    }

    fn going(&self) -> Vec<(BlockKey, RunHash)> {
        Holdings::going(&*self.shelf)
    }

    fn stays(&self, keys: &[BlockKey]) {
        self.shelf.stays(keys);
    }
}

struct Node {
    shelf: Arc<Shelf>,
    tiered: Arc<Tiered>,
    cluster: Arc<Cluster>,
    motion: Arc<Motion>,
}

struct Town {
    clock: ManualClock,
    net: Arc<Net>,
    space: Arc<Space>,
    key: NamespaceKey,
    rate: u64,
    hot: HotRules,
    nodes: BTreeMap<&'static str, Node>,
}

fn member(id: &str) -> Member {
    Member {
        id: MemberId::from(id),
        generation: 1,
        version: 1,
        weight: 1,
        zone: id.to_owned(),
        state: MemberState::Active,
        address: format!("http://{id}"),
    }
}

impl Town {
    /// Nodes that have known each other for a long time.
    fn new(ids: &[&'static str], replicas: usize) -> Self {
        Self::paced(ids, replicas, 0)
    }

    fn paced(ids: &[&'static str], replicas: usize, rate: u64) -> Self {
        let clock = ManualClock::new(7);
        let shape = Namespace::opaque("town", 16, RUN_BLOCKS);
        let space = Arc::new(Space {
            id: shape.id("default"),
            tenant: "default".into(),
            shape: Arc::new(shape),
            replicas,
        });
        let key = NamespaceKey::from_bytes([3; 32]);
        let mut town = Self {
            net: Net::new(Arc::new(clock.clone()), Duration::from_millis(1)),
            clock,
            space,
            key,
            rate,
            hot: MotionConfig::default().hot,
            nodes: BTreeMap::new(),
        };
        for id in ids {
            town.build(id);
        }
        town.acquaint();
        town.clock.advance(WINDOW);
        town
    }

    /// A node that nobody knows yet.
    fn build(&mut self, id: &'static str) {
        let clock: Arc<dyn Clock> = Arc::new(self.clock.clone());
        let members = Members::new(TIMES, member(id), &View::default(), clock.now());
        let shelf = Shelf::new(clock, 1 << 20);
        shelf.open(&self.space);
        self.begin(id, members, shelf);
    }

    /// A node is killed and started again: what it holds, whom it knew, and who owned what before is still there.
    async fn start_again(&mut self, id: &'static str) {
        let node = self.node(id);
        node.motion.stop().await;
        let (roster, shelf) = (node.cluster.roster(), Arc::clone(&node.shelf));
        let now = self.clock.now();
        let me = Member {
            generation: 2,
            ..member(id)
        };
        let mut members = Members::new(TIMES, me, &roster.view, now);
        if let Some(before) = roster.before(now) {
            members.owned_by(before, now);
        }
        self.begin(id, members, shelf);
    }

    /// A life of a node.
    fn begin(&mut self, id: &'static str, members: Members, shelf: Arc<Shelf>) {
        let clock: Arc<dyn Clock> = Arc::new(self.clock.clone());
        let cluster = Cluster::new(members, Arc::clone(&clock));
        let tiered = Arc::new(Tiered {
            shelf: Arc::clone(&shelf),
            busy: Mutex::default(),
        });
        let served = Served::new(Arc::clone(&shelf));
        self.net.attach(MemberId::from(id), served.clone());
        let config = MotionConfig {
            settle: SETTLE,
            hot: self.hot,
            hot_time: Duration::from_secs(4),
            ..MotionConfig::default()
        };
        let motion = Motion::new(
            config,
            MotionParts {
                cluster: Arc::clone(&cluster),
                transport: self.net.clone(),
                holdings: tiered.clone(),
                pace: Arc::new(Pace::new(Arc::clone(&clock), self.rate)),
                clock,
                metrics: Arc::new(MotionMetrics::alone()),
                runtime: Handle::current(),
            },
        );
        served.moves_by(&motion);
        let node = Node {
            shelf,
            tiered,
            cluster,
            motion,
        };
        self.nodes.insert(id, node);
    }

    /// Everybody hears of everybody.
    fn acquaint(&self) {
        for node in self.nodes.values() {
            let all = self.nodes.values().map(|node| {
                let roster = node.cluster.roster();
                roster.view.get(node.cluster.me()).cloned().unwrap()
            });
            node.cluster.merge(all.collect::<Vec<_>>());
        }
    }

    fn join(&mut self, id: &'static str) {
        self.build(id);
        self.acquaint();
    }

    fn node(&self, id: &str) -> &Node {
        &self.nodes[id]
    }

    fn shelf(&self, id: &str) -> &Arc<Shelf> {
        &self.node(id).shelf
    }

    /// One run's worth of a prompt.
    fn chain(&self, seed: u32) -> Chain {
        let tokens: Vec<u32> = (0..16 * RUN_BLOCKS).map(|i| seed * 100_003 + i).collect();
        Chain::from_root(hash::chain(&self.key, 16, &tokens))
    }

    fn keys(&self, chain: &Chain) -> Vec<BlockKey> {
        super::runs::keys(self.space.id, chain, PARTS).collect()
    }

    fn block(&self, chain: &Chain, i: usize) -> Carried {
        let key = self.keys(chain)[i];
        let bytes = Bytes::from(vec![key.hash.0[0]; BLOCK_BYTES]);
        Carried {
            header: BlockHeader::describe(key, chain.place(i, RUN_BLOCKS), &bytes),
            pieces: vec![bytes],
        }
    }

    /// Puts a prompt where it belongs under a node's view; answers who that was.
    fn put(&self, seed: u32) -> (Chain, MemberId) {
        let chain = self.chain(seed);
        let roster = self.nodes.values().next().unwrap().cluster.roster();
        let run = chain.hashes[0].into();
        let owner = roster.owners(&run, 1)[0].id.clone();
        self.put_at(&chain, &owner.0);
        (chain, owner)
    }

    fn put_at(&self, chain: &Chain, id: &str) {
        for i in 0..chain.len() {
            self.shelf(id).put(self.block(chain, i), Kind::Kv);
        }
    }

    /// The owner of a prompt now.
    fn owner(&self, chain: &Chain) -> MemberId {
        let roster = self.nodes.values().next().unwrap().cluster.roster();
        roster.owners(&chain.hashes[0].into(), 1)[0].id.clone()
    }

    fn has_all(&self, id: &str, chain: &Chain) -> bool {
        self.keys(chain).iter().all(|key| self.shelf(id).has(key))
    }

    fn has_none(&self, id: &str, chain: &Chain) -> bool {
        self.keys(chain).iter().all(|key| !self.shelf(id).has(key))
    }

    /// What a lookup of this chain waits for.
    fn lookup(&self, id: &str, chain: &Chain) -> impl Future<Output = ()> + use<> {
        let motion = &self.node(id).motion;
        let may_ask = motion.may_ask(self.space.replicas);
        let waited = may_ask.then(|| motion.bring_prefix(&self.space, chain, PARTS, LONG));
        async {
            if let Some(waited) = waited {
                waited.await;
            }
        }
    }

    /// Time passes in small steps; whoever is due does its work.
    async fn pass(&self, time: Duration) {
        let step = match time > Duration::from_millis(500) {
            true => Duration::from_millis(10),
            false => Duration::from_millis(1),
        };
        let mut passed = Duration::ZERO;
        settle().await;
        while passed < time {
            self.clock.advance(step);
            settle().await;
            passed += step;
        }
    }

    fn called(&self, method: &str) -> usize {
        let called = self.net.called();
        called.iter().filter(|call| call.method == method).count()
    }

    /// Prompts that had an owner before and have `newcomer` now.
    fn moved_to(&mut self, newcomer: &'static str, prompts: u32) -> Vec<(Chain, MemberId)> {
        let put: Vec<_> = (0..prompts).map(|seed| self.put(seed)).collect();
        self.join(newcomer);
        put.into_iter()
            .filter(|(chain, _)| self.owner(chain).0 == newcomer)
            .collect()
    }
}

async fn settle() {
    for _ in 0..60 {
        yield_now().await;
    }
}

#[tokio::test]
async fn the_same_town_has_the_same_history() {
    let history = || async {
        let mut town = Town::paced(&["a", "b"], 1, 1 << 12);
        town.nodes.values().for_each(|node| node.motion.start());
        let moved = town.moved_to("c", 20);
        let lookup = tokio::spawn(town.lookup("c", &moved[0].0));
        town.pass(Duration::from_millis(700)).await;
        assert!(lookup.is_finished());
        town.net.called()
    };
    let (first, second) = (history().await, history().await);
    assert!(first.len() > 10);
    assert_eq!(first, second);
}
