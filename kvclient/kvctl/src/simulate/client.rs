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

use futures_util::future::join_all;
use kvclient::{
    clock::Tick,
    route::{Assembly, Known, Split},
};
use kvproto::{Chain, RunHash, checksum::page_sums};
use kvserver::{
    clock::{Clock, Tick as SimTick},
    peers::{Fetched, net::Service},
};

use super::{
    asking::{Asking, Leased},
    clock::mix,
    hot::{Fashion, HOT_PAUSE_MS, HOT_PROMPT, HotTally, Readers},
    links::Place,
    node::Health,
    town::{LATENCY, RUN_BLOCKS, Town},
};

/// Of every call.
const DEADLINE: Duration = Duration::from_millis(500);
/// The longest that a lease is held before it is read.
const THINK_MS: u64 = 1500;

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
    pub(super) hot: HotTally,
}

/// What a lookup found.
struct Found {
    prefix: usize,
    leases: Vec<Leased>,
    /// How many did not answer.
    silent: usize,
    /// The first run behind the prefix was asked of who has it for a while.
    was_guest: bool,
}

/// One caller.
pub(super) struct Caller {
    town: Arc<Town>,
    tally: Arc<Tally>,
    known: Known,
    readers: Arc<Readers>,
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
            readers: Arc::default(),
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

    /// One of the crowd: reads one prompt over and over, for as long as that lasts.
    pub(super) async fn follow(mut self, fashion: Fashion) {
        let clock = self.town.clock.clone();
        clock.sleep(fashion.from.since(clock.now())).await;
        while fashion.is_on(clock.now()) {
            let wait = HOT_PAUSE_MS / 2 + mix(&mut self.chance) % HOT_PAUSE_MS;
            clock.sleep(Duration::from_millis(wait)).await;
            self.ask(HOT_PROMPT, true).await;
        }
    }

    async fn turn(&mut self) {
        // Some prompts are asked for much more often than others.
        let (a, b) = (mix(&mut self.chance), mix(&mut self.chance));
        let number = (a % u64::from(self.prompts)).min(b % u64::from(self.prompts));
        self.ask(number as u32, false).await;
    }

    /// Looks a prompt up, reads what is there, and puts what is not.
    async fn ask(&mut self, number: u32, is_hot: bool) {
        let chain = self.town.prompt(number);
        let began = self.town.clock.now();
        let digest = self.known.digest();
        // So that a call by an outdated view can be made again.
        let until = began.after(DEADLINE * 3 / 4);
        let mut found = self.lookup(&chain, until).await;
        let has_moved = |me: &Self| found.silent == 0 && me.known.digest() != digest;
        if found.prefix < chain.len() && (has_moved(self) || found.was_guest) {
            found.leases.into_iter().for_each(Leased::let_go);
            found = self.lookup(&chain, began.after(DEADLINE)).await;
        }
        let took = self.town.clock.now().since(began);
        self.account(&chain, number, &found, took);
        let think_ms = if is_hot { HOT_PAUSE_MS } else { THINK_MS };
        self.town
            .clock
            .sleep(Duration::from_millis(mix(&mut self.chance) % think_ms))
            .await;
        let prefix = found.prefix;
        let reads = found.leases.into_iter();
        match is_hot {
            true => {
                join_all(reads.map(|lease| self.read(&chain, lease, prefix, is_hot))).await;
            }
            false => {
                for lease in reads {
                    self.read(&chain, lease, prefix, is_hot).await;
                }
            }
        }
        self.put(&chain, prefix).await;
    }

    /// The prefix that is there, and its leases.
    async fn lookup(&mut self, chain: &Chain, until: SimTick) -> Found {
        let asking = Asking {
            town: Arc::clone(&self.town),
            tally: Arc::clone(&self.tally),
            table: Arc::clone(self.known.table()),
            readers: Arc::clone(&self.readers),
            number: self.number,
            until,
        };
        let now = moment(&self.town);
        let reader = |run: &RunHash| self.readers.reader(&asking.table, run, now);
        let split = Split::new(chain, RUN_BLOCKS, reader);
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
        let was_guest = prefix < chain.len() && self.shun_guests(chain, prefix, &asking, &split);
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
        Found {
            prefix,
            leases,
            silent,
            was_guest,
        }
    }

    /// Whether the prefix ends in a run that was asked of a guest; then those behind it are asked of their owners, until
    /// these say anew who else has them.
    fn shun_guests(&self, chain: &Chain, prefix: usize, asking: &Asking, split: &Split) -> bool {
        let shares = split.shares_by_position();
        let is_guest = |at: usize, run: &RunHash| {
            let asked = shares[at].map(|share| split.shares[share].member);
            asked.is_some() && asked != asking.table.owner(run)
        };
        let was_guest = is_guest(prefix, &chain.place(prefix, RUN_BLOCKS).run);
        if was_guest {
            let behind = chain.runs(RUN_BLOCKS).filter(|(_, at)| at.end > prefix);
            let lacking = behind.filter(|(run, at)| is_guest(at.start, run));
            lacking.for_each(|(run, _)| self.readers.shun(&run));
        }
        was_guest
    }

    fn account(&self, chain: &Chain, number: u32, found: &Found, took: Duration) {
        let (town, tally) = (&self.town, &self.tally);
        let (prefix, silent) = (found.prefix, found.silent);
        tally.lookups.fetch_add(1, Relaxed);
        tally.asked_blocks.fetch_add(chain.len() as u64, Relaxed);
        tally.hit_blocks.fetch_add(prefix as u64, Relaxed);
        let is_there = |i: &usize| {
            let key = town.key_of(chain, *i);
            town.ledger.has(&key) && town.is_anywhere(&key)
        };
        let there = (prefix..chain.len()).take_while(is_there).count();
        if silent > 0 && there > 0 && town.setting.hot.is_some() {
            self.account_unsaved(chain, prefix);
        }
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

    /// Whether the run behind the prefix lies whole with another than who was silent, and this caller knew.
    fn account_unsaved(&self, chain: &Chain, prefix: usize) {
        let (town, table) = (&self.town, self.known.table());
        let (run, range) = match chain.runs(RUN_BLOCKS).find(|(_, at)| at.contains(&prefix)) {
            Some(found) => found,
            None => return,
        };
        let second = self.readers.second(table, &run, moment(town));
        let readers = table.owner(&run).into_iter().chain(second);
        let has_it = |member: usize| {
            let node = table.members().get(member);
            let node = node.and_then(|member| town.named(&member.id));
            let has = |at: usize| {
                node.as_ref()
                    .is_some_and(|node| node.shelf.has(&town.key_of(chain, at)))
            };
            node.as_ref().is_some_and(|node| node.is_up()) && range.clone().all(has)
        };
        if second.is_some() && readers.into_iter().any(has_it) {
            let blocks = (range.end - prefix) as u64;
            self.tally.hot.unsaved_blocks.fetch_add(blocks, Relaxed);
            town.history
                .note(format_args!("unsaved {} {run}", self.number));
        }
    }

    async fn read(&self, chain: &Chain, lease: Leased, prefix: usize, is_hot: bool) {
        let (town, tally) = (&self.town, &self.tally);
        let node = &lease.node;
        let until = town.clock.now().after(DEADLINE);
        let (from, to) = (Place::Caller(self.number), Place::Node(node.index));
        let queue = self.readers.queue(&node.id);
        let under_way = queue.enter();
        let way = async {
            town.clock.sleep(LATENCY).await;
            match town.setting.hot {
                Some(_) => self.wait(&lease, is_hot).await,
                None => 0,
            }
        };
        let reached = town.links.carry(from, to, until, way).await;
        drop(under_way);
        queue.heard(reached.unwrap_or(0), moment(town));
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

    /// A get is counted as it comes in, and waits for its turn; how many are there when it has been served.
    async fn wait(&self, lease: &Leased, is_hot: bool) -> u32 {
        let (town, node, tally) = (&self.town, &lease.node, &self.tally.hot);
        let waiting = node.desk.enter();
        let calls = node.desk.calls();
        tally.longest_queue.fetch_max(calls.into(), Relaxed);
        let motion = Arc::clone(&node.life.lock().motion);
        motion.note_get(town.space.id, &lease.chain, RUN_BLOCKS, calls);
        if is_hot {
            for (run, _) in lease.chain.runs(RUN_BLOCKS) {
                let is_owner = town.ledger.owners(&run).contains(&node.id);
                tally.reads.fetch_add(1, Relaxed);
                tally
                    .reads_elsewhere
                    .fetch_add(u64::from(!is_owner), Relaxed);
            }
        }
        waiting.served(&town.clock).await;
        node.desk.calls()
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
/// The present moment as the client counts it.
pub(super) fn moment(town: &Town) -> Tick {
    Tick(town.clock.now().0)
}
