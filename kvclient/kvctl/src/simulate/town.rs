//! The simulated cluster: its nodes, what they share, and what is stored in them.
//!
//! ```text
//! real    cluster::Members (merge, suspicion, grace, tombstones, ramp, drain)   blocks::motion   kvproto::placement
//! model   gossip (`gossip.rs`)   links (`links.rs`)   engine: a map with leases that may be full (`motion::Shelf`)
//! ```
//!
//! Units: [`Tick`], bytes. Errors: none.

use std::{
    sync::{Arc, atomic::AtomicU64, atomic::Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use kvproto::{
    BlockHeader, BlockKey, Chain, Kind, Member, MemberId, MemberState, Namespace, NamespaceKey,
    Part, View, hash, placement::Placement,
};
use kvserver::{
    blocks::motion::{Kept, Motion, MotionConfig, MotionParts, Served, Shelf},
    clock::{Clock, Tick},
    cluster::{Cluster, Members, Placements, Times},
    peers::{Carried, Pace, Space, net::Net},
    telemetry::metrics::Metrics,
};
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;

use super::{
    clock::SimClock,
    feed::Setting,
    gossip::{ROUND, Talk},
    history::History,
    hot::{Desk, HOT_PROMPT, HOT_TIME, RULES},
    ledger::Ledger,
    links::Links,
    node::{Health, Life, Node},
    wire::{Lines, Traffic, Wire},
};

/// Blocks of a run, runs of a prompt, tokens of a block, bytes of a block.
pub(super) const RUN_BLOCKS: u32 = 4;
pub(super) const PROMPT_RUNS: u32 = 8;
const BLOCK_TOKENS: u32 = 16;
const BLOCK_BYTES: usize = 64;
/// Prompts per node: with eight runs each, sixteen runs lie on a node.
pub(super) const PROMPTS_PER_NODE: u32 = 2;
/// Room of a node where it is not short: nothing is given up, so that every miss has another reason.
const AMPLE_BYTES: u64 = 1 << 20;
/// Room where it is short, of the bytes that would lie on the node.
const TIGHT_PERCENT: u64 = 60;
/// Weight of the lighter half of the nodes: enough for every step of a ramp.
pub(super) const UNIT: u32 = 4;
/// Zones of the cluster.
const ZONES: usize = 5;
/// One way through the network.
pub(super) const LATENCY: Duration = Duration::from_micros(250);
pub(super) const PARTS: [Part; 1] = [Part {
    rank: 0,
    layer_group: 0,
}];

/// Times of the simulated cluster: shorter than the defaults, so that a minute shows whole lives.
pub(super) const TIMES: Times = Times {
    suspect_grace: Duration::from_secs(8),
    motion_window: Duration::from_secs(30),
    join_ramp: Duration::from_secs(6),
};

/// From a change to the moves that come of it: longer than the default, so that readers overtake them.
pub(super) const SETTLE: Duration = Duration::from_secs(3);

/// All nodes.
pub(super) struct Town {
    pub(super) clock: SimClock,
    pub(super) setting: Setting,
    pub(super) net: Arc<Net>,
    pub(super) links: Arc<Links>,
    pub(super) space: Arc<Space>,
    pub(super) history: Arc<History>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) nodes: RwLock<Vec<Arc<Node>>>,
    pub(super) talk: Talk,
    /// Puts that were refused, and those of them for no good reason.
    pub(super) refused_puts: AtomicU64,
    pub(super) dishonest_answers: AtomicU64,
    lines: Arc<Lines>,
    placements: Arc<Placements>,
    key: NamespaceKey,
    metrics: Arc<Metrics>,
}

impl Town {
    pub(super) fn new(clock: SimClock, history: Arc<History>, setting: Setting) -> Arc<Self> {
        let shape = Namespace::opaque("simulation", BLOCK_TOKENS, RUN_BLOCKS);
        let space = Space {
            id: shape.id("default"),
            tenant: "default".into(),
            shape: Arc::new(shape),
            replicas: setting.replicas,
        };
        let net = Net::new(Arc::new(clock.clone()), LATENCY);
        let links = Arc::new(Links::new(clock.clone()));
        let ledger = Arc::new(Ledger::new(setting.replicas, setting.is_tight));
        Arc::new(Self {
            lines: Arc::new(Lines::new(
                clock.clone(),
                Arc::clone(&net),
                Arc::clone(&links),
                Arc::clone(&history),
                Arc::clone(&ledger),
            )),
            clock,
            setting,
            net,
            links,
            space: Arc::new(space),
            history,
            ledger,
            nodes: RwLock::default(),
            talk: Talk::default(),
            refused_puts: AtomicU64::new(0),
            dishonest_answers: AtomicU64::new(0),
            placements: Arc::default(),
            key: NamespaceKey::from_bytes([3; 32]),
            metrics: Metrics::new(),
        })
    }

    /// Nodes that have known each other for a long time, of weights 1 and 2 in turn.
    pub(super) fn found(self: &Arc<Self>, count: usize) {
        let member = |index: usize| declared(index, UNIT * (1 + (index % 2) as u32), 1);
        let view = View::new((0..count).map(member));
        for index in 0..count {
            self.build(index, member(index), &view, None);
        }
        self.learn(view.members().iter().cloned(), self.clock.now());
    }

    /// A node that knows `view`, living from now on; `before`: who owned what when most of what it has was put there, if
    /// that is known from an earlier life.
    pub(super) fn build(
        self: &Arc<Self>,
        index: usize,
        me: Member,
        view: &View,
        before: Option<Arc<Placement>>,
    ) {
        let clock: Arc<dyn Clock> = Arc::new(self.clock.clone());
        let known = self.nodes.read().get(index).cloned();
        let (id, weight) = (me.id.clone(), me.weight);
        let shelf = match &known {
            Some(node) => Arc::clone(&node.shelf),
            None => Shelf::new(Arc::clone(&clock), self.room(weight)),
        };
        shelf.open(&self.space);
        let served = Served::new(Arc::clone(&shelf));
        self.net.attach(id.clone(), served.clone());
        let now = self.clock.now();
        let mut members = Members::sharing(TIMES, me, view, now, Arc::clone(&self.placements));
        if let Some(before) = before {
            members.owned_by(before, now);
        }
        let cluster = Cluster::new(members, Arc::clone(&clock));
        self.lines.knows(index, &cluster);
        let wire = Wire {
            from: id.clone(),
            index,
            lines: Arc::clone(&self.lines),
        };
        let motion = Motion::new(
            self.patience(),
            MotionParts {
                cluster: Arc::clone(&cluster),
                transport: Arc::new(wire),
                holdings: shelf.clone(),
                pace: Arc::new(Pace::new(Arc::clone(&clock), 1 << 30)),
                clock,
                metrics: Arc::clone(&self.metrics.motion),
                runtime: Handle::current(),
            },
        );
        served.moves_by(&motion);
        motion.start();
        let declared = cluster.declared();
        let life = Life {
            number: known.as_ref().map_or(0, |node| node.life.lock().number + 1),
            born: now,
            digest: cluster.digest(),
            health: Health::Up,
            coming: Vec::new(),
            sent_off: self.talk.old(now),
            // A founder is known to all; whoever comes later tells of itself.
            told: match view.get(&id).is_some() && known.is_none() {
                true => (declared.generation, declared.version),
                false => (0, 0),
            },
            looked: now,
            cluster: Arc::clone(&cluster),
            motion,
        };
        match known {
            Some(node) => *node.life.lock() = life,
            None => self.nodes.write().push(Arc::new(Node {
                id,
                index,
                weight,
                shelf,
                desk: Desk::default(),
                life: Mutex::new(life),
            })),
        }
        let (me, clock) = (Arc::clone(self), self.clock.clone());
        tokio::spawn(async move {
            // Everybody at a moment of its own.
            clock.sleep(ROUND * (index as u32 % 97) / 97).await;
            while me.is_living(index, &cluster) {
                me.round(index);
                clock.sleep(ROUND).await;
            }
        });
    }

    /// How patient nodes are, and from when on a run is hot.
    fn patience(&self) -> MotionConfig {
        let settled = MotionConfig {
            settle: SETTLE,
            ..MotionConfig::default()
        };
        match self.setting.hot {
            None => settled,
            Some(_) => MotionConfig {
                hot: RULES,
                hot_time: HOT_TIME,
                ..settled
            },
        }
    }

    /// Runs of the prompt that many read of which somebody says that another has them too.
    pub(super) fn named_runs(&self) -> u64 {
        let nodes = self.nodes.read();
        let motions = nodes.iter().filter(|node| node.is_up());
        let motions: Vec<_> = motions
            .map(|node| Arc::clone(&node.life.lock().motion))
            .collect();
        let chain = self.prompt(HOT_PROMPT);
        let of = |motion: &Arc<Motion>| motion.seconds_of(self.space.id, &chain, RUN_BLOCKS);
        motions.iter().map(|motion| of(motion).len() as u64).sum()
    }

    /// How often a run got a second owner.
    pub(super) fn hot_copies(&self) -> u64 {
        self.metrics.motion.hot_copies.get()
    }

    /// Bytes that a node of this weight has room for.
    fn room(&self, weight: u32) -> u64 {
        // Half of the nodes weigh a unit, the others two.
        let runs = u64::from(PROMPTS_PER_NODE * PROMPT_RUNS) * self.setting.replicas as u64;
        let mean = runs * u64::from(RUN_BLOCKS) * BLOCK_BYTES as u64;
        let share = mean * 2 * u64::from(weight) / (3 * u64::from(UNIT));
        match self.setting.is_tight {
            true => share * TIGHT_PERCENT / 100,
            false => AMPLE_BYTES,
        }
    }

    fn is_living(&self, index: usize, cluster: &Arc<Cluster>) -> bool {
        let node = self.node(index);
        let life = node.life.lock();
        let is_here = matches!(life.health, Health::Up | Health::Frozen);
        is_here && Arc::ptr_eq(&life.cluster, cluster)
    }

    pub(super) fn node(&self, index: usize) -> Arc<Node> {
        Arc::clone(&self.nodes.read()[index])
    }

    /// How many nodes there have been.
    pub(super) fn count(&self) -> usize {
        self.nodes.read().len()
    }

    /// The node of this name.
    pub(super) fn named(&self, id: &MemberId) -> Option<Arc<Node>> {
        self.nodes.read().get(index_of(id)?).cloned()
    }

    /// What crossed the wires.
    pub(super) fn traffic(&self) -> &Traffic {
        &self.lines.traffic
    }

    /// Members as they really are from now on.
    pub(super) fn learn(&self, news: impl IntoIterator<Item = Member>, now: Tick) {
        self.ledger.learn(news, now, |key| self.is_anywhere(key));
    }

    /// Whether some node that is there has a block; where nothing is given up, whoever stored it knows.
    pub(super) fn is_anywhere(&self, key: &BlockKey) -> bool {
        if !self.setting.is_tight {
            return true;
        }
        let nodes = self.nodes.read();
        nodes.iter().any(|node| node.shelf.has(key))
    }

    /// Blocks that are there, and not where readers look for them once no change is young.
    pub(super) fn stranded(&self) -> u64 {
        let has = |id: &MemberId, key: &BlockKey| {
            let node = self.named(id);
            node.is_some_and(|node| node.is_up() && node.shelf.has(key))
        };
        let nodes = self.nodes.read().clone();
        let is_anywhere =
            |key: &BlockKey| nodes.iter().any(|node| node.is_up() && node.shelf.has(key));
        self.ledger.stranded(has, is_anywhere)
    }

    /// Whether all who are up see the same members, and those that there are.
    pub(super) fn is_agreed(&self) -> bool {
        let truth = self.ledger.digest();
        let nodes = self.nodes.read();
        nodes.iter().all(|node| {
            let life = node.life.lock();
            life.health != Health::Up || life.cluster.digest() == truth
        })
    }

    /// Who is seen in another state than the true one, by whom: the first of them.
    pub(super) fn disagreement(&self) -> Option<String> {
        let (truth, _) = self.ledger.close();
        let nodes = self.nodes.read();
        let of = |node: &Arc<Node>| {
            let life = node.life.lock();
            let roster = life.cluster.roster();
            if life.health != Health::Up || roster.digest == truth.digest() {
                return None;
            }
            let told = |member: &Member| (member.id.clone(), member.weight, member.state);
            let seen: Vec<_> = roster.view.members().iter().map(told).collect();
            let is_other = |member: &&Member| !seen.contains(&told(member));
            let missed = truth.members().iter().find(is_other).map(|member| {
                let (seen, is) = (roster.view.get(&member.id), member.state);
                let seen =
                    seen.map(|seen| (seen.generation, seen.version, seen.weight, seen.state));
                let true_one = (member.generation, member.version, member.weight, is);
                format!("{} is {true_one:?} and seen as {seen:?}", member.id)
            });
            let missed = missed.unwrap_or_else(|| "somebody is seen who is not there".to_owned());
            Some(format!("at {}: {missed}", node.id))
        };
        nodes.iter().find_map(of)
    }

    /// How many nodes hold more than they have room for.
    pub(super) fn overfull(&self) -> u64 {
        let nodes = self.nodes.read();
        let is_over = |node: &&Arc<Node>| node.shelf.bytes() > self.room(node.weight);
        nodes.iter().filter(is_over).count() as u64
    }

    /// A prompt of this number.
    pub(super) fn prompt(&self, number: u32) -> Chain {
        let tokens =
            (0..BLOCK_TOKENS * RUN_BLOCKS * PROMPT_RUNS).map(|i| number.wrapping_mul(100_003) ^ i);
        Chain::from_root(hash::chain(
            &self.key,
            BLOCK_TOKENS,
            &tokens.collect::<Vec<_>>(),
        ))
    }

    /// The key of block `i` of a chain.
    pub(super) fn key_of(&self, chain: &Chain, i: usize) -> BlockKey {
        BlockKey {
            namespace: self.space.id,
            hash: chain.hashes[i],
            part: PARTS[0],
        }
    }

    /// Block `i` of a chain, as whoever computed it brings it.
    fn block(&self, chain: &Chain, i: usize) -> Carried {
        let key = self.key_of(chain, i);
        let bytes = Bytes::from(key.hash.0.repeat(BLOCK_BYTES / 32));
        Carried {
            header: BlockHeader::describe(key, chain.place(i, RUN_BLOCKS), &bytes),
            pieces: vec![bytes],
        }
    }

    /// Every prompt at all owners of its runs, for a long time.
    pub(super) fn fill(&self, prompts: u32) {
        for number in 0..prompts {
            let chain = self.prompt(number);
            for (run, range) in chain.runs(RUN_BLOCKS) {
                let owners = self.ledger.owners(&run);
                for i in range {
                    let block = self.block(&chain, i);
                    let (key, bytes) = (block.header.key, block.len_bytes());
                    for owner in owners.iter().filter_map(|owner| self.named(owner)) {
                        owner.shelf.put(block.clone(), Kind::Kv);
                        self.ledger.arrived(&owner.id, key, bytes);
                    }
                    self.ledger.stored(key, run, bytes, &owners, |_| true);
                }
            }
        }
        self.ledger.all_copied();
    }

    /// Puts a block at a node, as it does when a client asks.
    pub(super) fn put(self: &Arc<Self>, node: &Node, chain: &Chain, i: usize) {
        let block = self.block(chain, i);
        let (header, bytes) = (block.header.clone(), block.len_bytes());
        match node.shelf.put(block.clone(), Kind::Kv) {
            Kept::New => {}
            Kept::Present => return,
            kept => {
                self.refused_puts.fetch_add(1, Relaxed);
                let is_honest =
                    kept == Kept::Refused(kvproto::Reason::NoSlot) && self.has_no_room(node, bytes);
                self.dishonest_answers
                    .fetch_add(u64::from(!is_honest), Relaxed);
                return;
            }
        }
        let (key, run) = (header.key, header.place.run);
        self.ledger.arrived(&node.id, key, bytes);
        let mut at = vec![node.id.clone()];
        if self.setting.replicas > 1 {
            // Only an owner passes on, to the one behind it.
            let roster = node.life.lock().cluster.roster();
            let owners = roster.owners(&run, self.setting.replicas);
            let own = owners.iter().position(|owner| owner.id == node.id);
            let next = own.and_then(|own| owners.get(own + 1));
            at.extend(next.map(|next| next.id.clone()));
        }
        let has = |id: &MemberId| self.named(id).is_some_and(|node| node.shelf.has(&key));
        self.ledger.stored(key, run, bytes, &at, has);
        if self.setting.replicas < 2 {
            return;
        }
        if let Some(passed) = node.pass_on(&self.space, block) {
            let ledger = Arc::clone(&self.ledger);
            tokio::spawn(async move {
                let is_there = passed.await.is_ok_and(|failed| failed.is_empty());
                ledger.copied(&key, is_there);
            });
        }
    }

    /// Whether all that a node could give up for a block is leased.
    fn has_no_room(&self, node: &Node, bytes: u64) -> bool {
        let leased = node.shelf.leased().len() as u64 * BLOCK_BYTES as u64;
        leased + bytes > self.room(node.weight)
    }
}

/// The name of a node.
pub(super) fn id(index: usize) -> MemberId {
    MemberId(format!("node-{index:04}"))
}

/// The number of a node.
pub(super) fn index_of(id: &MemberId) -> Option<usize> {
    id.0.strip_prefix("node-")?.parse().ok()
}

pub(super) fn declared(index: usize, weight: u32, generation: u64) -> Member {
    Member {
        id: id(index),
        generation,
        version: 1,
        weight,
        zone: format!("zone-{}", index % ZONES),
        state: MemberState::Active,
        address: format!("http://node-{index:04}"),
    }
}

/// A number that two others settle, for delays that differ from pair to pair.
pub(super) fn spread(a: usize, b: usize) -> u64 {
    let mut state = (a as u64) << 32 | b as u64;
    super::clock::mix(&mut state)
}
