//! The simulated nodes: the server's own membership and motion, over maps for blocks and a model for gossip.
//!
//! ```text
//! real    cluster::Members (merge, suspicion, grace, tombstones, ramp, drain)   blocks::motion   kvproto::placement
//! model   gossip: news reach each node 0.2 to 1.4 s after they were made, silence is seen after 1 to 2.5 s
//!         engine: a map with leases (blocks::motion::Shelf); disks survive a restart, not a kill
//! ```
//!
//! Every node has a round twice a second, each at its own moment: it ticks, hears what has arrived, suspects who is
//! silent, and tells what it declares. Units: [`Tick`]. Errors: none.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use kvproto::{
    BlockHeader, BlockKey, Chain, Kind, Member, MemberId, MemberState, Namespace, NamespaceKey,
    Part, View, ViewDigest, hash,
};
use kvserver::{
    blocks::motion::{Motion, MotionConfig, MotionParts, Shelf},
    clock::{Clock, Tick},
    cluster::{Cluster, Members, Times},
    peers::{
        Carried, Pace, Space,
        net::{Fault, Net},
    },
    telemetry::metrics::Metrics,
};
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;

use super::{
    clock::SimClock,
    feed::Event,
    history::History,
    ledger::Ledger,
    wire::{Traffic, Wire},
};

/// Blocks of a run, runs of a prompt, tokens of a block, bytes of a block.
pub(super) const RUN_BLOCKS: u32 = 4;
pub(super) const PROMPT_RUNS: u32 = 8;
const BLOCK_TOKENS: u32 = 16;
const BLOCK_BYTES: usize = 64;
/// Room of a node: nothing is evicted, so that every miss has one of the reasons that are looked for.
const CAPACITY_BYTES: u64 = 1 << 20;
/// Weight of the lighter half of the nodes: enough for every step of a ramp.
const UNIT: u32 = 4;
/// Zones of the cluster.
const ZONES: usize = 5;
/// From one round of a node to its next.
const ROUND: Duration = Duration::from_millis(500);
/// The longest that news are on their way to a node.
const LONGEST_WAY: Duration = Duration::from_millis(2000);
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

/// Whether a node answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Up,
    Frozen,
    Down,
}

/// One node.
pub(super) struct Node {
    pub(super) id: MemberId,
    pub(super) shelf: Arc<Shelf>,
    pub(super) life: Mutex<Life>,
}

/// What of a node begins anew with a restart.
pub(super) struct Life {
    pub(super) cluster: Arc<Cluster>,
    pub(super) motion: Arc<Motion>,
    pub(super) health: Health,
    /// News that are still on their way here, and up to which all have been sent off.
    coming: Vec<usize>,
    sent_off: usize,
    told: (u64, u64),
    digest: ViewDigest,
}

struct News {
    member: Member,
    born: Tick,
}

/// All nodes.
pub(super) struct Town {
    pub(super) clock: SimClock,
    pub(super) net: Arc<Net>,
    pub(super) space: Arc<Space>,
    pub(super) history: Arc<History>,
    pub(super) traffic: Arc<Traffic>,
    pub(super) ledger: Ledger,
    pub(super) nodes: RwLock<Vec<Arc<Node>>>,
    key: NamespaceKey,
    metrics: Arc<Metrics>,
    news: Mutex<Vec<News>>,
    /// Who answers nobody, and since when; who answers again, and since when.
    silent: Mutex<BTreeMap<usize, Tick>>,
    back: Mutex<BTreeMap<usize, Tick>>,
    seen: Mutex<BTreeSet<ViewDigest>>,
}

impl Town {
    pub(super) fn new(clock: SimClock, history: Arc<History>) -> Arc<Self> {
        let shape = Namespace::opaque("simulation", BLOCK_TOKENS, RUN_BLOCKS);
        let space = Space {
            id: shape.id("default"),
            tenant: "default".into(),
            shape: Arc::new(shape),
            replicas: 1,
        };
        Arc::new(Self {
            net: Net::new(Arc::new(clock.clone()), LATENCY),
            clock,
            space: Arc::new(space),
            history,
            traffic: Arc::default(),
            ledger: Ledger::default(),
            nodes: RwLock::default(),
            key: NamespaceKey::from_bytes([3; 32]),
            metrics: Metrics::new(),
            news: Mutex::default(),
            silent: Mutex::default(),
            back: Mutex::default(),
            seen: Mutex::default(),
        })
    }

    /// Nodes that have known each other for a long time, of weights 1 and 2 in turn.
    pub(super) fn found(self: &Arc<Self>, count: usize) {
        let member = |index: usize| declared(index, UNIT * (1 + (index % 2) as u32), 1);
        let view = View::new((0..count).map(member));
        for index in 0..count {
            self.build(index, member(index), &view);
        }
        self.ledger
            .learn(view.members().iter().cloned(), self.clock.now());
    }

    /// A node that knows `view`, living from now on.
    fn build(self: &Arc<Self>, index: usize, me: Member, view: &View) {
        let clock: Arc<dyn Clock> = Arc::new(self.clock.clone());
        let known = self.nodes.read().get(index).cloned();
        let shelf = match &known {
            Some(node) => Arc::clone(&node.shelf),
            None => Shelf::new(Arc::clone(&clock), CAPACITY_BYTES),
        };
        shelf.open(&self.space);
        self.net.attach(me.id.clone(), shelf.clone());
        let id = me.id.clone();
        let members = Members::new(TIMES, me, view, clock.now());
        let cluster = Cluster::new(members, Arc::clone(&clock));
        let wire = Wire {
            from: id.clone(),
            net: Arc::clone(&self.net),
            traffic: Arc::clone(&self.traffic),
            history: Arc::clone(&self.history),
        };
        let motion = Motion::new(
            MotionConfig {
                settle: SETTLE,
                ..MotionConfig::default()
            },
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
        motion.start();
        let now = self.clock.now();
        let news = self.news.lock();
        let life = Life {
            digest: cluster.digest(),
            health: Health::Up,
            coming: Vec::new(),
            // What is older was heard by whoever told it of the cluster.
            sent_off: news.partition_point(|news| news.born.after(LONGEST_WAY) < now),
            // A founder is known to all; whoever comes later tells of itself.
            told: match view.get(&id).is_some() && known.is_none() {
                true => (cluster.declared().generation, cluster.declared().version),
                false => (0, 0),
            },
            cluster,
            motion,
        };
        drop(news);
        match known {
            Some(node) => *node.life.lock() = life,
            None => self.nodes.write().push(Arc::new(Node {
                id,
                shelf,
                life: Mutex::new(life),
            })),
        }
        let (me, clock) = (Arc::clone(self), self.clock.clone());
        let (cluster, nodes) = (
            Arc::clone(&self.nodes.read()[index].life.lock().cluster),
            index,
        );
        tokio::spawn(async move {
            // Everybody at a moment of its own.
            clock.sleep(ROUND * (nodes as u32 % 97) / 97).await;
            while me.is_living(nodes, &cluster) {
                me.round(nodes);
                clock.sleep(ROUND).await;
            }
        });
    }

    fn is_living(&self, index: usize, cluster: &Arc<Cluster>) -> bool {
        let node = Arc::clone(&self.nodes.read()[index]);
        let life = node.life.lock();
        life.health != Health::Down && Arc::ptr_eq(&life.cluster, cluster)
    }

    /// What a node does twice a second.
    fn round(&self, index: usize) {
        let node = Arc::clone(&self.nodes.read()[index]);
        let mut life = node.life.lock();
        if life.health != Health::Up {
            return;
        }
        let now = self.clock.now();
        life.cluster.tick();
        self.hear(index, &mut life, now);
        for (&other, &since) in &*self.silent.lock() {
            let noticed = Duration::from_millis(1000 + spread(index, other) % 1500);
            if other != index && now >= since.after(noticed) {
                life.cluster.suspect(&id(other));
            }
        }
        for (&other, &since) in &*self.back.lock() {
            if life.cluster.suspects() > 0 {
                life.cluster.hear(&id(other), since);
            }
        }
        self.tell(&node, &mut life, now);
    }

    fn hear(&self, index: usize, life: &mut Life, now: Tick) {
        let news = self.news.lock();
        life.coming.extend(life.sent_off..news.len());
        life.sent_off = news.len();
        let mut heard = Vec::new();
        life.coming.retain(|&at| {
            let way = Duration::from_millis(200 + spread(index, at) % 1200);
            let is_here = now >= news[at].born.after(way);
            if is_here {
                heard.push(news[at].member.clone());
            }
            !is_here
        });
        if !heard.is_empty() {
            life.cluster.merge(heard);
        }
    }

    /// What a node declares goes on its way, and what it sees is written down.
    fn tell(&self, node: &Node, life: &mut Life, now: Tick) {
        let me = life.cluster.declared();
        if (me.generation, me.version) != life.told {
            life.told = (me.generation, me.version);
            self.history.note(format_args!(
                "declares {} {} {} {} {}",
                node.id, me.generation, me.version, me.weight, me.state as u8
            ));
            self.ledger.learn([me.clone()], now);
            self.news.lock().push(News {
                member: me,
                born: now,
            });
        }
        let digest = life.cluster.digest();
        if digest != life.digest {
            life.digest = digest;
            self.history.note(format_args!("sees {} {digest}", node.id));
            // A tombstone is written by whoever is first to give somebody up.
            if digest != self.ledger.digest() && self.seen.lock().insert(digest) {
                let view = life.cluster.roster().view.clone();
                let buried = view
                    .members()
                    .iter()
                    .filter(|member| member.state == MemberState::Gone);
                self.ledger.learn(buried.cloned(), now);
            }
        }
    }

    /// Something happens.
    pub(super) async fn befall(self: &Arc<Self>, event: Event) {
        let index = match event {
            Event::Join { .. } => self.nodes.read().len(),
            Event::Kill { nth }
            | Event::Restart { nth, .. }
            | Event::Freeze { nth, .. }
            | Event::Drain { nth } => match self.living(nth) {
                Some(index) => index,
                None => return,
            },
        };
        self.history
            .note(format_args!("befalls {} {event:?}", id(index)));
        match event {
            Event::Join { weight } => {
                let asked = self.living(spread(index, 1)).unwrap_or(0);
                let view = self.node(asked).life.lock().cluster.roster().view.clone();
                self.build(index, declared(index, UNIT * weight, 1), &view);
                self.round(index);
            }
            Event::Kill { .. } => {
                self.stop(index, true).await;
                self.ledger.lost(&self.node(index).shelf, &self.shelves());
                self.node(index).shelf.clear();
            }
            Event::Restart { down, .. } => {
                let (view, me) = {
                    let node = self.node(index);
                    let life = node.life.lock();
                    (life.cluster.roster().view.clone(), life.cluster.declared())
                };
                self.stop(index, true).await;
                self.clock.sleep(down).await;
                let me = Member {
                    generation: me.generation + 1,
                    version: 1,
                    ..me
                };
                self.silent.lock().remove(&index);
                self.back.lock().insert(index, self.clock.now());
                self.build(index, me, &view);
                // Its first call to another brings what it has missed.
                if let Some(asked) = self.living(spread(index, 1)) {
                    let told = self.node(asked).life.lock().cluster.roster();
                    let cluster = Arc::clone(&self.node(index).life.lock().cluster);
                    cluster.merge(told.view.members().to_vec());
                }
                self.round(index);
            }
            Event::Freeze { down, .. } => {
                self.fault(index, Health::Frozen, Fault::Frozen);
                self.clock.sleep(down).await;
                self.fault(index, Health::Up, Fault::None);
            }
            Event::Drain { .. } => self.drain(index).await,
        }
    }

    fn fault(&self, index: usize, health: Health, fault: Fault) {
        let now = self.clock.now();
        let node = self.node(index);
        self.net.fault(&node.id, fault);
        node.life.lock().health = health;
        if health == Health::Up {
            self.silent.lock().remove(&index);
            self.back.lock().insert(index, now);
        } else {
            self.back.lock().remove(&index);
            self.silent.lock().insert(index, now);
        }
    }

    async fn drain(self: &Arc<Self>, index: usize) {
        let node = self.node(index);
        let (cluster, motion) = {
            let life = node.life.lock();
            (Arc::clone(&life.cluster), Arc::clone(&life.motion))
        };
        cluster.drain();
        self.round(index);
        let until = self.clock.now().after(Duration::from_secs(12));
        let progress = motion.drained(until).await;
        self.history.note(format_args!(
            "drained {} {} {}",
            node.id,
            progress.moved_runs,
            progress.at_stake_bytes()
        ));
        self.ledger.drained(progress.at_stake_bytes());
        cluster.leave();
        self.round(index);
        // Its last word is out; what it still holds may be fetched until it has been heard by all.
        self.clock.sleep(Duration::from_secs(2)).await;
        self.stop(index, false).await;
    }

    async fn stop(&self, index: usize, is_sudden: bool) {
        let node = self.node(index);
        let motion = {
            let mut life = node.life.lock();
            life.health = Health::Down;
            Arc::clone(&life.motion)
        };
        self.net.detach(&node.id);
        if is_sudden {
            self.back.lock().remove(&index);
            self.silent.lock().insert(index, self.clock.now());
        }
        motion.stop().await;
    }

    /// The nth of those who are up and take runs.
    fn living(&self, nth: u64) -> Option<usize> {
        let nodes = self.nodes.read();
        let is_living = |index: &usize| {
            let life = nodes[*index].life.lock();
            life.health == Health::Up && life.cluster.declared().state == MemberState::Active
        };
        let living: Vec<usize> = (0..nodes.len()).filter(is_living).collect();
        // Never the last few: somebody has to be there.
        (living.len() > 3).then(|| living[(nth % living.len() as u64) as usize])
    }

    pub(super) fn node(&self, index: usize) -> Arc<Node> {
        Arc::clone(&self.nodes.read()[index])
    }

    /// The node of this name.
    pub(super) fn named(&self, id: &MemberId) -> Option<Arc<Node>> {
        let index: usize = id.0.strip_prefix("node-")?.parse().ok()?;
        self.nodes.read().get(index).cloned()
    }

    fn shelves(&self) -> Vec<Arc<Shelf>> {
        let nodes = self.nodes.read();
        let is_here = |node: &&Arc<Node>| node.life.lock().health != Health::Down;
        nodes
            .iter()
            .filter(is_here)
            .map(|node| Arc::clone(&node.shelf))
            .collect()
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
    pub(super) fn block(&self, chain: &Chain, i: usize) -> Carried {
        let key = self.key_of(chain, i);
        let bytes = Bytes::from(key.hash.0.repeat(BLOCK_BYTES / 32));
        Carried {
            header: BlockHeader::describe(key, chain.place(i, RUN_BLOCKS), &bytes),
            pieces: vec![bytes],
        }
    }

    /// Puts a block at a node, as a client does.
    pub(super) fn put(&self, node: &Node, chain: &Chain, i: usize) {
        node.shelf.put(self.block(chain, i), Kind::Kv);
        let place = chain.place(i, RUN_BLOCKS);
        self.ledger.stored(
            self.key_of(chain, i),
            place.run,
            BLOCK_BYTES as u64,
            &node.id,
        );
    }
}

fn id(index: usize) -> MemberId {
    MemberId(format!("node-{index:04}"))
}

fn declared(index: usize, weight: u32, generation: u64) -> Member {
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
fn spread(a: usize, b: usize) -> u64 {
    let mut state = (a as u64) << 32 | b as u64;
    super::clock::mix(&mut state)
}
