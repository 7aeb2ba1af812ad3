//! Simulated callers: the client's own routing, around it a model of its loop.
//!
//! ```text
//! real    kvclient::route: what is known of the cluster, the split by owner, the assembly of the prefix
//! model   one lookup per owner at once, once more where another view says so; a get under each lease after a while;
//!         a put of what was missing at whoever owns it by the client's view
//! ```
//!
//! A lease that was given is written down; a block under it that cannot be read afterwards is counted, unless its node
//! was killed or frozen meanwhile, which is a loss that the cluster states. Units: blocks. Errors: none.

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
    route::{Assembly, Known, Share, Split, Table},
};
use kvproto::{Chain, LeaseId, checksum::page_sums};
use kvserver::{
    clock::{Clock, Tick as SimTick},
    peers::{Asked, Fetched, Seen, net::Service},
};

use super::{
    clock::mix,
    town::{Health, LATENCY, Node, PARTS, RUN_BLOCKS, Town},
};

/// Of every call.
const DEADLINE: Duration = Duration::from_millis(500);
/// Of every lease.
const LEASE: Duration = Duration::from_secs(10);
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
    pub(super) slowest_lookup_us: AtomicU64,
}

/// A lease at one owner, and the positions that it covers.
struct Leased {
    node: Arc<Node>,
    id: LeaseId,
    positions: Vec<usize>,
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
        let until = began.after(DEADLINE);
        let digest = self.known.digest();
        let (mut prefix, mut leases, mut silent) = self.lookup(&chain, until).await;
        if prefix < chain.len() && silent == 0 && self.known.digest() != digest {
            // Another view: once more.
            for lease in leases {
                lease.node.shelf.release(lease.id);
            }
            (prefix, leases, silent) = self.lookup(&chain, until).await;
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
        self.put(&chain, prefix);
    }

    /// The prefix that is there, its leases, and how many owners did not answer.
    async fn lookup(&mut self, chain: &Chain, until: SimTick) -> (usize, Vec<Leased>, usize) {
        let table = Arc::clone(self.known.table());
        // Nobody takes runs only in a cluster of nobody.
        let split = Split::new(chain, RUN_BLOCKS, |run| table.owner(run).unwrap_or(0));
        let asked = split
            .shares
            .iter()
            .map(|share| self.ask(chain, share, &table, until));
        let answers = join_all(asked.collect::<Vec<_>>()).await;
        let mut assembly = Assembly::new(&split);
        let mut silent = 0;
        for (number, answer) in answers.iter().enumerate() {
            match answer {
                Some((seen, _, _)) => assembly.answered(number, seen.blocks as usize),
                None => {
                    assembly.lost(number);
                    silent += 1;
                }
            }
        }
        let prefix = assembly.prefix();
        let mut leases = Vec::new();
        for (share, answer) in split.shares.iter().zip(answers) {
            let Some((seen, members, node)) = answer else {
                continue;
            };
            if !members.is_empty() {
                self.known.merge(members, moment(&self.town));
            }
            let Some((id, blocks)) = seen.lease else {
                continue;
            };
            let positions = (0..blocks as usize).filter_map(|i| share.position(i));
            let positions: Vec<usize> = positions.filter(|position| *position < prefix).collect();
            match positions.is_empty() {
                true => node.shelf.release(id),
                false => leases.push(Leased {
                    node,
                    id,
                    positions,
                }),
            }
        }
        (prefix, leases, silent)
    }

    /// One owner's answer; `None` when there is none in time.
    fn ask(
        &self,
        chain: &Chain,
        share: &Share,
        table: &Table,
        until: SimTick,
    ) -> impl Future<Output = Option<(Seen, Vec<kvproto::Member>, Arc<Node>)>> + use<> {
        let town = Arc::clone(&self.town);
        let node = table
            .members()
            .get(share.member)
            .and_then(|member| town.named(&member.id));
        let asked = Asked {
            space: Arc::clone(&town.space),
            chain: share.chain(chain, RUN_BLOCKS),
            parts: PARTS.to_vec(),
        };
        let digest = table.digest();
        async move {
            let node = node?;
            town.clock.sleep(LATENCY).await;
            let (health, cluster, motion) = {
                let life = node.life.lock();
                (
                    life.health,
                    Arc::clone(&life.cluster),
                    Arc::clone(&life.motion),
                )
            };
            match health {
                Health::Up => {}
                Health::Down => return None,
                Health::Frozen => {
                    town.clock.sleep(until.since(town.clock.now())).await;
                    return None;
                }
            }
            // As the node's own lookup does: what is missing and may lie elsewhere is brought first.
            if motion.may_ask(asked.space.replicas) {
                let left = until.since(town.clock.now());
                let brought = motion.bring_prefix(&asked.space, &asked.chain, &asked.parts, left);
                brought.await;
            }
            let seen = node.shelf.lease(&asked, LEASE);
            town.clock.sleep(LATENCY).await;
            let is_up = node.life.lock().health == Health::Up;
            let (_, members) = cluster.answer(digest);
            is_up.then_some((seen, members, node))
        }
    }

    fn account(&self, chain: &Chain, number: u32, prefix: usize, silent: usize, took: Duration) {
        let (town, tally) = (&self.town, &self.tally);
        tally.lookups.fetch_add(1, Relaxed);
        tally.asked_blocks.fetch_add(chain.len() as u64, Relaxed);
        tally.hit_blocks.fetch_add(prefix as u64, Relaxed);
        let there = (prefix..chain.len())
            .take_while(|&i| town.ledger.has(&town.key_of(chain, i)))
            .count();
        let why = if silent > 0 {
            &tally.behind_silence_blocks
        } else {
            &tally.moving_blocks
        };
        why.fetch_add(there as u64, Relaxed);
        tally
            .absent_blocks
            .fetch_add((chain.len() - prefix - there) as u64, Relaxed);
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
        town.clock.sleep(LATENCY).await;
        let is_up = lease.node.life.lock().health == Health::Up;
        let mut read = 0u64;
        for &position in lease
            .positions
            .iter()
            .filter(|position| **position < prefix)
        {
            tally.leased_blocks.fetch_add(1, Relaxed);
            if !is_up {
                tally.stated_losses.fetch_add(1, Relaxed);
                continue;
            }
            let key = town.key_of(chain, position);
            match Service::get(&*lease.node.shelf, &key, Some(lease.id)) {
                Fetched::Hit(block) => {
                    let bytes = block.pieces.concat();
                    let is_right = block.header.key == key
                        && block.header.check(&page_sums(&bytes)).is_ok()
                        && bytes.starts_with(&key.hash.0);
                    tally.wrong_blocks.fetch_add(u64::from(!is_right), Relaxed);
                    read += 1;
                }
                // A node that was restarted meanwhile has forgotten its leases, and says so.
                Fetched::Gone(_) => {
                    tally.unreadable_under_lease.fetch_add(1, Relaxed);
                    town.history
                        .note(format_args!("unreadable {} {}", lease.node.id, key.hash));
                }
            }
        }
        tally.read_blocks.fetch_add(read, Relaxed);
        lease.node.shelf.release(lease.id);
        town.history.note(format_args!(
            "read {} {} {read}",
            self.number, lease.node.id
        ));
    }

    /// What was missing has been computed, and goes to its owner.
    fn put(&self, chain: &Chain, prefix: usize) {
        let table = self.known.table();
        for i in prefix..chain.len() {
            let run = chain.place(i, RUN_BLOCKS).run;
            let owner = table
                .owner(&run)
                .and_then(|owner| table.members().get(owner));
            let Some(node) = owner.and_then(|member| self.town.named(&member.id)) else {
                continue;
            };
            let is_up = node.life.lock().health == Health::Up;
            if is_up && !node.shelf.has(&self.town.key_of(chain, i)) {
                self.town.put(&node, chain, i);
            }
        }
    }
}

/// The present moment as the client counts it.
fn moment(town: &Town) -> Tick {
    Tick(town.clock.now().0)
}
