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
    NamespaceKey, Part, SequenceHash, View, hash,
};
use parking_lot::Mutex;
use tokio::{runtime::Handle, task::yield_now};

mod hot;

use super::{Holdings, HotRules, Kept, Motion, MotionConfig, MotionParts, Shelf, plan};
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
        let times = Times {
            suspect_grace: Duration::from_secs(30),
            motion_window: WINDOW,
            join_ramp: Duration::ZERO,
        };
        let members = Members::new(times, member(id), &View::default(), clock.now());
        let cluster = Cluster::new(members, Arc::clone(&clock));
        let shelf = Shelf::new(Arc::clone(&clock), 1 << 20);
        shelf.open(&self.space);
        let tiered = Arc::new(Tiered {
            shelf: Arc::clone(&shelf),
            busy: Mutex::default(),
        });
        self.net.attach(MemberId::from(id), shelf.clone());
        let config = MotionConfig {
            settle: Duration::from_millis(100),
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
async fn a_newcomer_fetches_what_it_owns_now_and_keeps_it() {
    let mut town = Town::new(&["a", "b"], 1);
    let moved = town.moved_to("c", 30);
    assert!(moved.len() > 3, "a third of them moves");
    for (chain, old) in &moved {
        assert!(town.has_none("c", chain));
        let lookup = tokio::spawn(town.lookup("c", chain));
        town.pass(Duration::from_millis(10)).await;
        assert!(lookup.is_finished());
        assert!(town.has_all("c", chain));
        assert!(town.has_all(&old.0, chain), "a copy is a copy");
        assert!(
            town.shelf(&old.0).leased().is_empty(),
            "the lease was given back"
        );
    }
    let calls = town.net.called().len();
    let again = tokio::spawn(town.lookup("c", &moved[0].0));
    settle().await;
    assert!(again.is_finished());
    assert_eq!(
        town.net.called().len(),
        calls,
        "what is here is asked of nobody"
    );
}

#[tokio::test]
async fn nobody_is_asked_for_what_somebody_else_owns_or_when_nothing_has_changed() {
    let mut town = Town::new(&["a", "b"], 1);
    let unknown = town.chain(1);
    town.lookup("a", &unknown).await;
    assert_eq!(town.net.called(), [], "no change is young");
    town.join("c");
    let owner = town.owner(&unknown);
    let other = ["a", "b", "c"]
        .into_iter()
        .find(|id| *id != owner.0)
        .unwrap();
    town.lookup(other, &unknown).await;
    assert_eq!(town.net.called(), [], "it is another's run");
    town.clock.advance(WINDOW);
    town.lookup(&owner.0, &unknown).await;
    assert_eq!(town.net.called(), [], "the change is old");
}

#[tokio::test]
async fn a_hundred_lookups_of_one_run_fetch_it_once() {
    let mut town = Town::new(&["a", "b"], 1);
    let (chain, _) = town.moved_to("c", 30).remove(0);
    let lookups: Vec<_> = (0..100)
        .map(|_| tokio::spawn(town.lookup("c", &chain)))
        .collect();
    town.pass(Duration::from_millis(10)).await;
    assert!(lookups.iter().all(|lookup| lookup.is_finished()));
    assert!(town.has_all("c", &chain));
    assert_eq!((town.called("lookup"), town.called("get")), (1, 1));
}

#[tokio::test]
async fn who_wants_more_of_a_run_than_is_on_its_way_waits_and_gets_it() {
    let mut town = Town::new(&["a", "b"], 1);
    let (chain, _) = town.moved_to("c", 30).remove(0);
    let head = chain.slice(0..2, RUN_BLOCKS);
    let first = tokio::spawn(town.lookup("c", &head));
    let second = tokio::spawn(town.lookup("c", &chain));
    town.pass(Duration::from_millis(20)).await;
    assert!(first.is_finished() && second.is_finished());
    assert!(town.has_all("c", &chain));
    assert_eq!(town.called("get"), 2);
}

#[tokio::test]
async fn a_dead_frozen_or_lying_candidate_costs_a_miss_and_no_time_beyond_the_bound() {
    for fault in [Fault::Dead, Fault::Frozen, Fault::Lies] {
        let mut town = Town::new(&["a", "b"], 1);
        let (chain, old) = town.moved_to("c", 30).remove(0);
        town.net.fault(&old, fault);
        let lookup = tokio::spawn(town.lookup("c", &chain));
        town.pass(Duration::from_millis(101)).await;
        assert!(lookup.is_finished(), "{fault:?}");
        assert!(
            town.has_none("c", &chain),
            "{fault:?}: a miss, and no wrong byte"
        );
        // The flight itself is bounded too, and the next one finds a node that is well again.
        town.pass(Duration::from_secs(2)).await;
        town.net.fault(&old, Fault::None);
        let lookup = tokio::spawn(town.lookup("c", &chain));
        town.pass(Duration::from_millis(20)).await;
        assert!(
            lookup.is_finished() && town.has_all("c", &chain),
            "{fault:?}"
        );
    }
}

#[tokio::test]
async fn a_prompt_that_is_nowhere_costs_one_question_each_and_is_not_asked_for_again_at_once() {
    let mut town = Town::new(&["a", "b"], 1);
    town.join("c");
    let tokens: Vec<u32> = (0..16 * RUN_BLOCKS * 50).collect();
    let long = Chain::from_root(hash::chain(&town.key, 16, &tokens));
    let first = RUN_BLOCKS as usize;
    let owner = town.owner(&long.slice(0..first, RUN_BLOCKS));
    for _ in 0..10 {
        let lookup = tokio::spawn(town.lookup(&owner.0, &long));
        town.pass(Duration::from_millis(10)).await;
        assert!(lookup.is_finished());
    }
    assert_eq!(town.called("lookup"), 2, "{:?}", town.net.called());
    town.pass(Duration::from_secs(1)).await;
    let lookup = tokio::spawn(town.lookup(&owner.0, &long));
    town.pass(Duration::from_millis(10)).await;
    assert!(lookup.is_finished());
    assert_eq!(
        town.called("lookup"),
        4,
        "a second later it is worth asking again"
    );
}

#[tokio::test]
async fn a_short_deadline_halves_the_wait() {
    let mut town = Town::new(&["a", "b"], 1);
    let (chain, old) = town.moved_to("c", 30).remove(0);
    town.net.fault(&old, Fault::Frozen);
    let motion = &town.node("c").motion;
    let time_left = Duration::from_millis(40);
    let lookup = tokio::spawn(motion.bring_prefix(&town.space, &chain, PARTS, time_left));
    town.pass(Duration::from_millis(19)).await;
    assert!(!lookup.is_finished());
    town.pass(Duration::from_millis(2)).await;
    assert!(lookup.is_finished());
}

#[tokio::test]
async fn two_nodes_that_each_think_to_be_the_owner_never_bounce_a_read() {
    let mut town = Town::new(&["a", "b"], 1);
    // Each believes that the other has left.
    for (me, other) in [("a", "b"), ("b", "a")] {
        let mut gone = member(other);
        (gone.version, gone.state) = (9, MemberState::Gone);
        town.node(me).cluster.merge([gone]);
    }
    town.clock.advance(Duration::from_millis(1));
    let chain = town.chain(77);
    let lookups = ["a", "b"].map(|id| tokio::spawn(town.lookup(id, &chain)));
    town.pass(Duration::from_millis(50)).await;
    assert!(lookups.iter().all(|lookup| lookup.is_finished()));
    assert!(
        town.called("lookup") <= 2,
        "each asks the other once: {:?}",
        town.net.called()
    );
    assert_eq!(town.called("get"), 0);
    town.join("c");
}

#[tokio::test]
async fn what_was_invalidated_while_it_was_on_its_way_does_not_come_back() {
    let mut town = Town::new(&["a", "b"], 1);
    let (chain, _) = town.moved_to("c", 30).remove(0);
    let lookup = tokio::spawn(town.lookup("c", &chain));
    settle().await; // it has been asked for, and is not here yet
    let keys = town.keys(&chain);
    town.shelf("c").invalidate(&keys[0], 1);
    town.pass(Duration::from_millis(20)).await;
    assert!(lookup.is_finished());
    assert!(!town.shelf("c").has(&keys[0]));
    // Nor later, although the old owner still has it.
    let lookup = tokio::spawn(town.lookup("c", &chain));
    town.pass(Duration::from_millis(20)).await;
    assert!(lookup.is_finished() && !town.shelf("c").has(&keys[0]));
}

#[tokio::test]
async fn what_changed_its_owner_moves_hottest_first_and_goes_first_only_then() {
    // Half a second for a run.
    let mut town = Town::paced(&["a", "b"], 1, 8 * BLOCK_BYTES as u64);
    town.nodes.values().for_each(|node| node.motion.start());
    let moved = town.moved_to("c", 40);
    // The hottest of one old owner, and another one of his.
    let from = |id: &str| {
        moved
            .iter()
            .filter(|(_, old)| old.0 == id)
            .collect::<Vec<_>>()
    };
    let of_a = from("a");
    assert!(of_a.len() > 2);
    let (hot, _) = of_a[of_a.len() / 2];
    let key = town.keys(hot)[1];
    for _ in 0..3 {
        assert!(town.shelf("a").find(&key).is_some());
    }
    town.pass(Duration::from_millis(150)).await;
    assert!(town.has_all("c", hot), "the first one goes without waiting");
    let arrived = of_a.iter().filter(|(chain, _)| town.has_all("c", chain));
    assert_eq!(arrived.count(), 1, "the next ones wait for their turn");
    let going = town.shelf("a").going();
    assert_eq!(
        going,
        town.keys(hot).into_iter().collect(),
        "acknowledged, and nothing else"
    );
    town.pass(Duration::from_secs(20)).await;
    for (chain, _) in &moved {
        assert!(town.has_all("c", chain));
    }
    let progress = town.node("a").motion.account();
    assert_eq!((progress.waiting_runs, progress.left_blocks), (0, 0));
    let bytes: u64 = ["a", "b"]
        .map(|id| town.node(id).motion.account().moved_bytes)
        .iter()
        .sum();
    let changed = moved.len() * RUN_BLOCKS as usize * BLOCK_BYTES;
    assert_eq!(bytes, changed as u64, "what changed its owner, once");
}

#[tokio::test]
async fn a_move_that_was_cut_off_goes_on_where_it_was() {
    let mut town = Town::new(&["a"], 1);
    let moved = town.moved_to("c", 12);
    let half = moved.len() / 2;
    for (chain, _) in &moved[..half] {
        town.put_at(chain, "c"); // they went before the node was stopped
    }
    town.node("a").motion.start();
    town.pass(Duration::from_millis(400)).await;
    for (chain, _) in &moved {
        assert!(town.has_all("c", chain));
    }
    assert_eq!(
        town.called("put"),
        moved.len() - half,
        "only the rest was sent"
    );
    let sent = town.node("a").motion.account();
    assert_eq!(sent.moved_runs as usize, moved.len() - half);
    let going = town.shelf("a").going().len();
    assert_eq!(going, moved.len() * RUN_BLOCKS as usize);
}

#[tokio::test]
async fn a_lease_is_honoured_while_its_run_moves() {
    let mut town = Town::new(&["a"], 1);
    let (chain, _) = town.put(0);
    let asked = Asked {
        space: Arc::clone(&town.space),
        chain: chain.clone(),
        parts: PARTS.to_vec(),
    };
    let lease = town.shelf("a").lease(&asked, Duration::from_secs(60)).lease;
    // Everything goes to the newcomer.
    town.build("c");
    town.node("a").cluster.set_weight(0);
    town.acquaint();
    town.node("a").motion.start();
    town.pass(Duration::from_millis(300)).await;
    assert!(town.has_all("c", &chain));
    assert!(!town.shelf("a").going().is_empty());
    // Room is needed; what is leased stays, although it is first to go.
    let roomy = (1 << 20) / BLOCK_BYTES as u32 / RUN_BLOCKS + 10;
    (1000..1000 + roomy).for_each(|seed| town.put_at(&town.chain(seed), "a"));
    for key in town.keys(&chain) {
        let got = Service::get(&**town.shelf("a"), &key, lease.map(|(id, _)| id));
        assert!(matches!(got, crate::peers::Fetched::Hit(_)));
    }
    town.clock.advance(Duration::from_secs(61));
    town.put_at(&town.chain(9000), "a");
    assert!(
        town.has_none("a", &chain),
        "first to go once nobody holds it"
    );
}

#[tokio::test]
async fn a_node_that_drains_loses_nothing() {
    let town = Town::new(&["a", "b", "c"], 1);
    let put: Vec<_> = (0..30).map(|seed| town.put(seed)).collect();
    town.nodes.values().for_each(|node| node.motion.start());
    town.node("a").cluster.drain();
    town.acquaint();
    let motion = Arc::clone(&town.node("a").motion);
    let until = town.clock.now().after(Duration::from_secs(60));
    let draining = tokio::spawn(async move { motion.drained(until).await });
    town.pass(Duration::from_secs(2)).await;
    assert!(draining.is_finished(), "long before its deadline");
    let account = draining.await.unwrap();
    assert!(account.is_draining);
    assert_eq!((account.left_blocks, account.at_stake_bytes()), (0, 0));
    for (chain, _) in &put {
        let owner = town.owner(chain);
        assert_ne!(owner.0, "a");
        assert!(town.has_all(&owner.0, chain));
    }
}

#[tokio::test]
async fn a_block_whose_tier_was_busy_is_at_stake_until_it_was_tried_again() {
    let town = Town::new(&["a", "b"], 1);
    let put: Vec<_> = (0..20).map(|seed| town.put(seed)).collect();
    let of_a = put.iter().filter(|(_, owner)| owner.0 == "a");
    let of_a: Vec<&Chain> = of_a.map(|(chain, _)| chain).collect();
    let busy = town.keys(of_a[1])[2];
    let a = town.node("a");
    a.tiered.busy.lock().insert(busy);
    a.motion.start();
    a.cluster.drain();
    town.acquaint();
    let (motion, until) = (Arc::clone(&a.motion), town.clock.now().after(LONG));
    let draining = tokio::spawn(async move { motion.drained(until).await });
    town.pass(Duration::from_secs(1)).await;
    assert!(!draining.is_finished(), "it has not handed over everything");
    assert!(a.tiered.busy.lock().is_empty() && !town.shelf("b").has(&busy));
    let account = a.motion.account();
    let at_stake = (account.left_blocks, account.at_stake_bytes());
    assert_eq!(at_stake, (1, BLOCK_BYTES as u64));
    assert_eq!(town.shelf("b").len(), put.len() * RUN_BLOCKS as usize - 1);
    // The next look finds the tier idle.
    town.pass(MotionConfig::default().again).await;
    assert!(draining.is_finished());
    assert_eq!(draining.await.unwrap().at_stake_bytes(), 0);
    assert!(of_a.iter().all(|chain| town.has_all("b", chain)));
}

#[tokio::test]
async fn a_drain_whose_deadline_passes_says_exactly_what_would_be_lost() {
    let town = Town::paced(&["a", "b"], 1, BLOCK_BYTES as u64 * 8);
    let put: Vec<_> = (0..20).map(|seed| town.put(seed)).collect();
    let of_a = put.iter().filter(|(_, owner)| owner.0 == "a");
    let of_a: Vec<&Chain> = of_a.map(|(chain, _)| chain).collect();
    town.node("a").motion.start();
    town.node("a").cluster.drain();
    town.acquaint();
    let motion = Arc::clone(&town.node("a").motion);
    let until = town.clock.now().after(Duration::from_millis(1300));
    let draining = tokio::spawn(async move { motion.drained(until).await });
    town.pass(Duration::from_millis(1310)).await;
    assert!(draining.is_finished());
    let account = draining.await.unwrap();
    let lost = of_a
        .iter()
        .filter(|chain| !town.has_all("b", chain))
        .count();
    assert!((1..of_a.len()).contains(&lost), "{lost} of {}", of_a.len());
    let blocks = (lost * RUN_BLOCKS as usize) as u64;
    assert_eq!(account.waiting_runs, lost as u64);
    assert_eq!(account.left_blocks, blocks);
    assert_eq!(account.at_stake_bytes(), blocks * BLOCK_BYTES as u64);
}

#[tokio::test]
async fn a_drain_waits_for_another_owner_where_the_one_that_took_a_run_falls_silent() {
    let town = Town::new(&["a", "b", "c"], 1);
    let put: Vec<_> = (0..30).map(|seed| town.put(seed)).collect();
    town.nodes.values().for_each(|node| node.motion.start());
    town.node("a").cluster.drain();
    town.acquaint();
    town.pass(Duration::from_secs(2)).await;
    // All is handed over, and half of it to somebody who dies right then.
    town.net.detach(&MemberId::from("b"));
    town.node("a").cluster.suspect(&MemberId::from("b"));
    let motion = Arc::clone(&town.node("a").motion);
    assert!(motion.account().at_stake_bytes() > 0);
    let until = town.clock.now().after(Duration::from_secs(60));
    let draining = tokio::spawn(async move { motion.drained(until).await });
    town.pass(Duration::from_secs(2)).await;
    assert!(!draining.is_finished());
    town.clock.advance(Duration::from_secs(30));
    town.node("a").cluster.tick();
    town.pass(Duration::from_secs(2)).await;
    assert!(draining.is_finished());
    assert_eq!(draining.await.unwrap().at_stake_bytes(), 0);
    for (chain, owner) in &put {
        assert!(owner.0 != "a" || town.has_all("c", chain));
    }
}

#[tokio::test]
async fn what_was_handed_to_a_node_that_drains_as_well_is_at_stake_until_somebody_who_stays_has_it()
{
    let town = Town::new(&["a", "b", "c"], 1);
    let put: Vec<_> = (0..30).map(|seed| town.put(seed)).collect();
    town.node("a").motion.start();
    town.node("a").cluster.drain();
    town.acquaint();
    town.pass(Duration::from_secs(2)).await;
    let motion = Arc::clone(&town.node("a").motion);
    assert_eq!(motion.account().at_stake_bytes(), 0);
    // Whether b will hand its copies on is not for a to know.
    town.node("b").cluster.drain();
    town.acquaint();
    assert!(motion.account().at_stake_bytes() > 0);
    let until = town.clock.now().after(LONG);
    let draining = tokio::spawn(async move { motion.drained(until).await });
    town.pass(Duration::from_secs(2)).await;
    assert!(draining.is_finished());
    assert_eq!(draining.await.unwrap().at_stake_bytes(), 0);
    for (chain, owner) in &put {
        assert!(owner.0 != "a" || town.has_all("c", chain));
    }
}

#[tokio::test]
async fn the_last_node_that_drains_is_told_that_all_would_be_lost() {
    let town = Town::new(&["a"], 1);
    town.put(0);
    town.node("a").motion.start();
    town.node("a").cluster.drain();
    let motion = Arc::clone(&town.node("a").motion);
    let until = town.clock.now().after(LONG);
    let draining = tokio::spawn(async move { motion.drained(until).await });
    town.pass(Duration::from_millis(300)).await;
    assert!(draining.is_finished(), "nobody will come");
    let account = draining.await.unwrap();
    assert_eq!(account.left_blocks, u64::from(RUN_BLOCKS));
}

#[tokio::test]
async fn a_further_owner_that_lost_its_copy_gets_it_back_by_reading() {
    let town = Town::new(&["a", "b", "c"], 2);
    let chain = town.chain(5);
    let roster = town.node("a").cluster.roster();
    let owners = roster.owners(&chain.hashes[0].into(), 2);
    town.put_at(&chain, &owners[0].id.0);
    // No change is young; that there is another owner is reason enough.
    let lookup = tokio::spawn(town.lookup(&owners[1].id.0, &chain));
    town.pass(Duration::from_millis(20)).await;
    assert!(lookup.is_finished());
    assert!(town.has_all(&owners[1].id.0, &chain));
}

#[tokio::test]
async fn a_lost_owner_is_replaced_by_the_next_and_every_run_has_two_again() {
    let town = Town::new(&["a", "b", "c"], 2);
    let chains: Vec<Chain> = (0..20).map(|seed| town.chain(seed)).collect();
    let owners = |chain: &Chain| -> Vec<MemberId> {
        let roster = town.node("b").cluster.roster();
        let owners = roster.owners(&chain.hashes[0].into(), 2);
        owners.iter().map(|owner| owner.id.clone()).collect()
    };
    for chain in &chains {
        owners(chain)
            .iter()
            .for_each(|id| town.put_at(chain, &id.0));
    }
    town.net.fault(&MemberId::from("a"), Fault::Dead);
    let mut gone = member("a");
    (gone.version, gone.state) = (9, MemberState::Gone);
    for id in ["b", "c"] {
        town.node(id).cluster.merge([gone.clone()]);
        town.node(id).motion.start();
    }
    town.pass(Duration::from_secs(1)).await;
    for chain in &chains {
        let owners = owners(chain);
        assert_eq!(owners.len(), 2);
        assert!(owners.iter().all(|id| town.has_all(&id.0, chain)));
    }
    // Nothing here is first to go: both are owners.
    assert!(town.shelf("b").going().is_empty() && town.shelf("c").going().is_empty());
}

#[tokio::test]
async fn an_owner_that_came_back_with_nothing_is_given_its_copies_again() {
    let mut town = Town::new(&["a", "b", "c"], 2);
    let chains: Vec<Chain> = (0..20).map(|seed| town.chain(seed)).collect();
    let owners = |town: &Town, chain: &Chain| -> Vec<MemberId> {
        let roster = town.node("a").cluster.roster();
        let owners = roster.owners(&chain.hashes[0].into(), 2);
        owners.iter().map(|owner| owner.id.clone()).collect()
    };
    for chain in &chains {
        for owner in owners(&town, chain) {
            town.put_at(chain, &owner.0);
        }
    }
    town.nodes.values().for_each(|node| node.motion.start());
    town.pass(Duration::from_secs(1)).await;
    assert_eq!(town.net.called(), [], "nothing has changed");

    // Its place is its own, and no change is young.
    town.build("b");
    town.node("b").cluster.merge(["a", "c"].map(member));
    for id in ["a", "c"] {
        let again = Member {
            generation: 2,
            ..member("b")
        };
        town.node(id).cluster.merge([again]);
    }
    town.pass(Duration::from_secs(1)).await;
    for chain in &chains {
        let owners = owners(&town, chain);
        assert!(owners.iter().all(|id| town.has_all(&id.0, chain)));
    }
    let is_to_b = town.net.called().iter().all(|call| call.peer.0 == "b");
    assert!(is_to_b, "nobody else is asked");
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

#[test]
fn a_plan_names_what_has_another_owner_hottest_first() {
    let clock = ManualClock::new(1);
    let times = Times {
        suspect_grace: LONG,
        motion_window: WINDOW,
        join_ramp: Duration::ZERO,
    };
    let members = Members::new(times, member("a"), &View::default(), clock.now());
    let cluster = Cluster::new(members, Arc::new(clock.clone()));
    let run = |n: u8| HeldRun {
        key: RunKey {
            namespace: kvproto::NamespaceId([1; 16]),
            run: kvproto::RunHash(blake(n)),
        },
        blocks: 1,
        bytes: 1,
        heat: u32::from(n),
    };
    let held: Vec<HeldRun> = (0..100).map(run).collect();
    assert_eq!(
        plan(&cluster.roster(), cluster.me(), &held, |_| 1, clock.now()),
        []
    );
    cluster.merge([member("b")]);
    let roster = cluster.roster();
    let moves = plan(&roster, cluster.me(), &held, |_| 1, clock.now());
    assert!(
        (25..75).contains(&moves.len()),
        "about half: {}",
        moves.len()
    );
    assert!(
        moves
            .windows(2)
            .all(|pair| pair[0].run.heat > pair[1].run.heat)
    );
    for one in &moves {
        assert_eq!(roster.owners(&one.run.key.run, 1)[0].id, one.to.id);
        assert!(one.leaves);
    }
}

/// Something like a hash.
fn blake(n: u8) -> [u8; 32] {
    let key = NamespaceKey::from_bytes([9; 32]);
    hash::chain(&key, 1, &[u32::from(n)])[0].0
}
