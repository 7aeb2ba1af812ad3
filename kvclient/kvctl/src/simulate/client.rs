//! Simulated callers: the client's own routing, around it a model of its loop.
//!
//! ```text
//! real    kvclient::route: what is known of the cluster, the split by owner, the assembly of the prefix
//! model   one lookup per owner at once, once more where another view says so; where a run has a second owner, that one
//!         is asked when the first fails or takes long; a get under each lease after a while; a put of what was missing
//!         at whoever owns it by the client's view
//! ```
//!
//! A lease that was given is written down; a block under it that cannot be read afterwards is counted, unless its node
//! was killed, frozen, started anew or cut off meanwhile: losses that the answer states. Units: blocks. Errors: none.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture, future::join_all};
use kvclient::{
    clock::Tick,
    route::{Assembly, Known, Split, Table},
};
use kvproto::{Chain, LeaseId, Member, RunHash, checksum::page_sums};
use kvserver::{
    blocks::motion::MotionConfig,
    clock::{Clock, Tick as SimTick},
    peers::{Asked, Fetched, Seen, net::Service},
};

use super::{
    clock::mix,
    gossip::{LONGEST_SILENCE, LONGEST_WAY},
    links::Place,
    node::{Health, Node},
    town::{LATENCY, PARTS, RUN_BLOCKS, TIMES, Town},
};

/// Of every call.
const DEADLINE: Duration = Duration::from_millis(500);
/// Of every lease.
const LEASE: Duration = Duration::from_secs(10);
/// The longest that a lease is held before it is read.
const THINK_MS: u64 = 1500;
/// When those are asked that hold an owner's runs as well.
const HEDGE_AFTER: Duration = Duration::from_millis(30);
/// Who has been silent for so long is asked by nobody any more: noticed, given up after its grace, told to all nodes,
/// and told to callers with the next answer.
const FORGOTTEN: Duration = Duration::from_secs(8);

/// What all callers saw.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) lookups: AtomicU64,
    pub(super) asked_blocks: AtomicU64,
    pub(super) hit_blocks: AtomicU64,
    /// Blocks that were nowhere: lost with a node, or not yet put.
    pub(super) absent_blocks: AtomicU64,
    /// Blocks that were given up everywhere for want of room.
    pub(super) evicted_blocks: AtomicU64,
    /// Blocks that were somewhere, and behind an owner that did not answer.
    pub(super) behind_silence_blocks: AtomicU64,
    /// Blocks that were somewhere, and not found.
    pub(super) moving_blocks: AtomicU64,
    pub(super) leased_blocks: AtomicU64,
    pub(super) read_blocks: AtomicU64,
    pub(super) stated_losses: AtomicU64,
    pub(super) unreadable_under_lease: AtomicU64,
    pub(super) wrong_blocks: AtomicU64,
    pub(super) late_calls: AtomicU64,
    /// Calls to those who had been silent for so long that nobody should ask them any more.
    pub(super) stale_calls: AtomicU64,
    pub(super) slowest_lookup_us: AtomicU64,
}

/// A lease at one owner, and the positions that it covers.
struct Leased {
    node: Arc<Node>,
    /// The life in which it was given.
    life: u64,
    id: LeaseId,
    positions: Vec<usize>,
}

/// What came of one share of a lookup.
#[derive(Default)]
struct OfShare {
    present: usize,
    leases: Vec<Leased>,
    /// Views of those who see another one.
    views: Vec<Vec<Member>>,
}

/// Who asks what, until when.
#[derive(Clone)]
struct Asking {
    town: Arc<Town>,
    tally: Arc<Tally>,
    table: Arc<Table>,
    number: usize,
    until: SimTick,
}

/// One caller.
pub(super) struct Caller {
    town: Arc<Town>,
    tally: Arc<Tally>,
    known: Known,
    prompts: u32,
    chance: u64,
    number: usize,
}

impl Caller {
    pub(super) fn new(
        town: Arc<Town>,
        tally: Arc<Tally>,
        prompts: u32,
        number: usize,
        seed: u64,
    ) -> Self {
        let mut known = Known::default();
        let roster = town.node(0).life.lock().cluster.roster();
        known.merge(roster.view.members().to_vec(), moment(&town));
        let chance = seed ^ ((number as u64 + 1) << 40);
        Self {
            town,
            tally,
            known,
            prompts,
            chance,
            number,
        }
    }

    /// Goes on until nobody wants it any more.
    pub(super) async fn work(mut self, pause_ms: u64) {
        loop {
            let wait = pause_ms / 2 + mix(&mut self.chance) % pause_ms.max(1);
            self.town.clock.sleep(Duration::from_millis(wait)).await;
            self.turn().await;
        }
    }

    async fn turn(&mut self) {
        // Some prompts are asked for much more often than others.
        let (a, b) = (mix(&mut self.chance), mix(&mut self.chance));
        let number = (a % u64::from(self.prompts)).min(b % u64::from(self.prompts)) as u32;
        let chain = self.town.prompt(number);
        let began = self.town.clock.now();
        let digest = self.known.digest();
        // So that a call by an outdated view can be made again.
        let until = began.after(DEADLINE * 3 / 4);
        let (mut prefix, mut leases, mut silent) = self.lookup(&chain, until).await;
        if prefix < chain.len() && silent == 0 && self.known.digest() != digest {
            leases.into_iter().for_each(Leased::let_go);
            (prefix, leases, silent) = self.lookup(&chain, began.after(DEADLINE)).await;
        }
        let took = self.town.clock.now().since(began);
        self.account(&chain, number, prefix, silent, took);
        self.town
            .clock
            .sleep(Duration::from_millis(mix(&mut self.chance) % THINK_MS))
            .await;
        for lease in leases {
            self.read(&chain, lease, prefix).await;
        }
        self.put(&chain, prefix).await;
    }

    /// The prefix that is there, its leases, and how many owners did not answer.
    async fn lookup(&mut self, chain: &Chain, until: SimTick) -> (usize, Vec<Leased>, usize) {
        let asking = Asking {
            town: Arc::clone(&self.town),
            tally: Arc::clone(&self.tally),
            table: Arc::clone(self.known.table()),
            number: self.number,
            until,
        };
        // Nobody takes runs only in a cluster of nobody.
        let owner = |run: &RunHash| asking.table.owner(run).unwrap_or(0);
        let split = Split::new(chain, RUN_BLOCKS, owner);
        let calls = split.shares.iter().map(|share| {
            let positions = share.ranges.iter().cloned().flatten().collect();
            let chain = share.chain(chain, RUN_BLOCKS);
            asking.clone().share(share.member, chain, positions)
        });
        let answers = join_all(calls.collect::<Vec<_>>()).await;
        let mut assembly = Assembly::new(&split);
        let mut silent = 0;
        for (number, answer) in answers.iter().enumerate() {
            match answer {
                Some(answer) => assembly.answered(number, answer.present),
                None => {
                    assembly.lost(number);
                    silent += 1;
                }
            }
        }
        let prefix = assembly.prefix();
        let mut leases = Vec::new();
        for answer in answers.into_iter().flatten() {
            for members in answer.views {
                self.known.merge(members, moment(&self.town));
            }
            for mut lease in answer.leases {
                lease.positions.retain(|position| *position < prefix);
                match lease.positions.is_empty() {
                    true => lease.let_go(),
                    false => leases.push(lease),
                }
            }
        }
        (prefix, leases, silent)
    }

    fn account(&self, chain: &Chain, number: u32, prefix: usize, silent: usize, took: Duration) {
        let (town, tally) = (&self.town, &self.tally);
        tally.lookups.fetch_add(1, Relaxed);
        tally.asked_blocks.fetch_add(chain.len() as u64, Relaxed);
        tally.hit_blocks.fetch_add(prefix as u64, Relaxed);
        let is_there = |i: &usize| {
            let key = town.key_of(chain, *i);
            town.ledger.has(&key) && town.is_anywhere(&key)
        };
        let there = (prefix..chain.len()).take_while(is_there).count();
        let why = if silent > 0 {
            &tally.behind_silence_blocks
        } else {
            &tally.moving_blocks
        };
        why.fetch_add(there as u64, Relaxed);
        if there > 0 && silent == 0 {
            town.history
                .note(format_args!("astray {} {number} {prefix}", self.number));
        }
        let mut evicted = 0;
        for i in prefix + there..chain.len() {
            let key = town.key_of(chain, i);
            if town.ledger.has(&key) && !town.is_anywhere(&key) {
                town.ledger.evicted(&key);
                evicted += 1;
            }
        }
        tally.evicted_blocks.fetch_add(evicted, Relaxed);
        let absent = (chain.len() - prefix - there) as u64 - evicted;
        tally.absent_blocks.fetch_add(absent, Relaxed);
        // Both tries of a lookup share its deadline; the wire takes a moment more.
        let is_late = took > DEADLINE + 4 * LATENCY;
        tally.late_calls.fetch_add(u64::from(is_late), Relaxed);
        tally
            .slowest_lookup_us
            .fetch_max(took.as_micros() as u64, Relaxed);
        town.history.note(format_args!(
            "looked {} {number} {prefix} {silent} {}",
            self.number,
            took.as_nanos()
        ));
    }

    async fn read(&self, chain: &Chain, lease: Leased, prefix: usize) {
        let (town, tally) = (&self.town, &self.tally);
        let node = &lease.node;
        let until = town.clock.now().after(DEADLINE);
        let (from, to) = (Place::Caller(self.number), Place::Node(node.index));
        let way = town.clock.sleep(LATENCY);
        let reached = town.links.carry(from, to, until, way).await;
        // A node that was started anew meanwhile has forgotten its leases, and says so.
        let is_here = {
            let life = node.life.lock();
            life.health == Health::Up && life.number == lease.life
        };
        let mut read = 0u64;
        for &position in lease
            .positions
            .iter()
            .filter(|position| **position < prefix)
        {
            tally.leased_blocks.fetch_add(1, Relaxed);
            if reached.is_none() || !is_here {
                tally.stated_losses.fetch_add(1, Relaxed);
                continue;
            }
            let key = town.key_of(chain, position);
            match Service::get(&*node.shelf, &key, Some(lease.id)) {
                Fetched::Hit(block) => {
                    let bytes = block.pieces.concat();
                    let is_right = block.header.key == key
                        && block.header.check(&page_sums(&bytes)).is_ok()
                        && bytes.starts_with(&key.hash.0);
                    tally.wrong_blocks.fetch_add(u64::from(!is_right), Relaxed);
                    read += 1;
                }
                Fetched::Gone(why) => {
                    tally.unreadable_under_lease.fetch_add(1, Relaxed);
                    town.history
                        .note(format_args!("unreadable {} {} {why:?}", node.id, key.hash));
                }
            }
        }
        tally.read_blocks.fetch_add(read, Relaxed);
        node.shelf.release(lease.id);
        town.history
            .note(format_args!("read {} {} {read}", self.number, node.id));
    }

    /// What was missing has been computed, and goes to its owner.
    async fn put(&self, chain: &Chain, prefix: usize) {
        if prefix == chain.len() {
            return;
        }
        let town = &self.town;
        let table = self.known.table();
        let missing = chain.slice(prefix..chain.len(), RUN_BLOCKS);
        for (run, range) in missing.runs(RUN_BLOCKS) {
            let owner = table.owner(&run).and_then(|at| table.members().get(at));
            let Some(node) = owner.and_then(|member| town.named(&member.id)) else {
                continue;
            };
            let until = town.clock.now().after(DEADLINE);
            let (from, to) = (Place::Caller(self.number), Place::Node(node.index));
            let called = async {
                for i in range {
                    let i = prefix + i;
                    if node.is_up() && !node.shelf.has(&town.key_of(chain, i)) {
                        town.put(&node, chain, i);
                    }
                }
            };
            town.links.carry(from, to, until, called).await;
        }
    }
}

impl Asking {
    /// One share: of its owner, and of those that hold its runs as well where it fails or takes long. `None`: nobody
    /// answers in time.
    async fn share(self, member: usize, chain: Chain, positions: Vec<usize>) -> Option<OfShare> {
        let town = Arc::clone(&self.town);
        let owner = self.clone().one(member, chain.clone(), positions.clone());
        if town.setting.replicas < 2 {
            return owner.await;
        }
        // It goes on by itself while others are asked.
        let mut owner = tokio::spawn(owner).map(|ended| ended.ok().flatten());
        let early = tokio::select! {
            biased;
            answer = &mut owner => Some(answer),
            () = town.clock.sleep(HEDGE_AFTER) => None,
        };
        match early {
            Some(Some(answer)) => Some(answer),
            Some(None) => self.others(member, &chain, &positions).await,
            None => {
                let others = self.others(member, &chain, &positions).await;
                if others.as_ref().is_some_and(|o| o.present == chain.len()) {
                    tokio::spawn(owner.map(|late| late.into_iter().for_each(OfShare::let_go)));
                    return others;
                }
                // The owner may have more.
                match owner.await {
                    Some(answer) => {
                        others.into_iter().for_each(OfShare::let_go);
                        Some(answer)
                    }
                    None => others,
                }
            }
        }
    }

    /// The same of those that hold the owner's runs as well.
    async fn others(&self, member: usize, chain: &Chain, positions: &[usize]) -> Option<OfShare> {
        let replicas = self.town.setting.replicas;
        let other = |run: &RunHash| {
            let mut owners = self.table.owners(run, replicas).into_iter();
            owners.find(|owner| *owner != member)
        };
        let mut runs = chain.runs(RUN_BLOCKS);
        let end = runs.find(|(run, _)| other(run).is_none());
        let end = end.map_or(chain.len(), |(_, range)| range.start);
        if end == 0 {
            return None;
        }
        let held = chain.slice(0..end, RUN_BLOCKS);
        let split = Split::new(&held, RUN_BLOCKS, |run| other(run).unwrap_or(member));
        let calls = split.shares.iter().map(|share| {
            let of_whole = share.ranges.iter().cloned().flatten();
            let of_whole = of_whole.filter_map(|at| positions.get(at).copied());
            let part = share.chain(&held, RUN_BLOCKS);
            self.clone().one(share.member, part, of_whole.collect())
        });
        let answers = join_all(calls.collect::<Vec<_>>()).await;
        let (mut assembly, mut whole, mut any) = (Assembly::new(&split), OfShare::default(), false);
        for (number, answer) in answers.into_iter().enumerate() {
            let Some(answer) = answer else {
                assembly.lost(number);
                continue;
            };
            any = true;
            assembly.answered(number, answer.present);
            whole.leases.extend(answer.leases);
            whole.views.extend(answer.views);
        }
        whole.present = assembly.prefix();
        any.then_some(whole)
    }

    /// One node's answer; `None` when there is none in time.
    fn one(
        self,
        member: usize,
        chain: Chain,
        positions: Vec<usize>,
    ) -> BoxFuture<'static, Option<OfShare>> {
        async move {
            let member = self.table.members().get(member)?;
            let node = self.town.named(&member.id)?;
            let (from, to) = (Place::Caller(self.number), Place::Node(node.index));
            let (town, until) = (Arc::clone(&self.town), self.until);
            self.judge(&node);
            let asked = Asked {
                space: Arc::clone(&town.space),
                chain,
                parts: PARTS.to_vec(),
            };
            let called = self.served(&node, &asked);
            let (seen, views, life) = town.links.carry(from, to, until, called).await??;
            let leases = seen.lease.map(|(id, blocks)| Leased {
                node,
                life,
                id,
                positions: positions.into_iter().take(blocks as usize).collect(),
            });
            Some(OfShare {
                present: seen.blocks as usize,
                leases: leases.into_iter().collect(),
                views,
            })
        }
        .boxed()
    }

    /// Whether this one should have been forgotten by now.
    fn judge(&self, node: &Node) {
        let now = self.town.clock.now();
        let known_by = TIMES.suspect_grace + LONGEST_SILENCE + LONGEST_WAY + FORGOTTEN;
        let silent = self.town.talk.silent.lock().get(&node.index).copied();
        if silent.is_some_and(|since| now.since(since) > known_by) {
            self.tally.stale_calls.fetch_add(1, Relaxed);
            self.town
                .history
                .note(format_args!("stale {} {}", self.number, node.id));
        }
    }

    /// As the node's own lookup does: what is missing and may lie elsewhere is brought first.
    async fn served(&self, node: &Node, asked: &Asked) -> Option<(Seen, Vec<Vec<Member>>, u64)> {
        let town = &self.town;
        town.clock.sleep(LATENCY).await;
        let (health, cluster, motion, number) = {
            let life = node.life.lock();
            (
                life.health,
                Arc::clone(&life.cluster),
                Arc::clone(&life.motion),
                life.number,
            )
        };
        match health {
            Health::Up => {}
            Health::Down | Health::Away => return None,
            Health::Frozen => {
                town.clock.sleep(self.until.since(town.clock.now())).await;
                return None;
            }
        }
        if motion.may_ask(asked.space.replicas) {
            let began = town.clock.now();
            let left = self.until.since(began);
            motion
                .bring_prefix(&asked.space, &asked.chain, &asked.parts, left)
                .await;
            let most = MotionConfig::default().wait.min(left / 2);
            if town.clock.now().since(began) > most {
                self.tally.late_calls.fetch_add(1, Relaxed);
                town.history.note(format_args!("late {}", node.id));
            }
        }
        let seen = node.shelf.lease(asked, LEASE);
        town.clock.sleep(LATENCY).await;
        let (_, members) = cluster.answer(self.table.digest());
        let views = match members.is_empty() {
            true => Vec::new(),
            false => vec![members],
        };
        let is_up = {
            let life = node.life.lock();
            life.health == Health::Up && life.number == number
        };
        is_up.then_some((seen, views, number))
    }
}

impl Leased {
    fn let_go(self) {
        self.node.shelf.release(self.id);
    }
}

impl OfShare {
    fn let_go(self) {
        self.leases.into_iter().for_each(Leased::let_go);
    }
}

/// The present moment as the client counts it.
fn moment(town: &Town) -> Tick {
    Tick(town.clock.now().0)
}
