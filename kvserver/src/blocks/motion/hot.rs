//! Hot runs: what many read at once lies with a second owner for a while.
//!
//! ```text
//! get ─► Heat ── a look, now and then ──► hot, and this node is its first owner
//!                                          │ the next in rendezvous order (another zone where there is one), unless it
//!                                          ▼ is silent or has half as much to do itself
//!           blocks pushed there as a move is ─► named in answers to lookups, with the time that is left of `hot_time`
//!                                                   └► callers ask whoever of both has the shorter queue
//! cooled    not named any more ─► callers forget it in time ─► nobody reads it there ─► first to go there
//! ```
//!
//! Nothing keeps the two in step: what the second one lacks (it was put since, or evicted) is a miss there, for which
//! the caller asks the first. An invalidation reaches it as it reaches every member.
//!
//! The second owner is told nothing. A run that a peer handed over and that is not this node's is a [guest](Guests): once
//! nobody has read it for twice `hot_time` it is the first to go.
//!
//! Units: gets, calls, blocks. Errors: none; what cannot be pushed is not named. Bounds: [`MAX_HOT`], [`MAX_GUESTS`].
//! Why the owner decides, and not the readers: it alone sees all reads of a run.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use kvproto::{
    BlockKey, Chain, MemberState, NamespaceId, RunHash, ViewDigest, convert::answer::Second,
};
use parking_lot::Mutex;

use super::{
    Motion,
    heat::{Heat, Seen},
    moves::{Move, Pushed},
    peer,
};
use crate::{
    clock::Tick,
    cluster::Roster,
    engine::{HeldBlock, HeldRun, RunKey},
    peers::Peer,
};

/// Runs of this node that have a second owner at once.
pub const MAX_HOT: usize = 256;

/// Runs of others that are remembered as such; more are ordinary blocks.
pub const MAX_GUESTS: usize = 1024;

/// What this node knows of heat.
#[derive(Default)]
pub(super) struct Hot {
    /// Somebody else is there who could be a second owner.
    is_on: AtomicBool,
    heat: Mutex<Heat>,
    gets: AtomicU64,
    calls: AtomicU64,
    seconds: Mutex<BTreeMap<RunKey, Named>>,
    /// How many there are: answers look no further while there is none.
    named: AtomicUsize,
    guests: Mutex<Guests>,
    guest_count: AtomicUsize,
}

/// A second owner.
struct Named {
    to: Peer,
    until: Tick,
}

/// Runs of others that a peer handed over, and when each was last read here.
type Guests = BTreeMap<RunKey, Tick>;

impl Hot {
    /// What gets have found since the last look; half of it is forgotten.
    fn seen(&self) -> Seen {
        let half = |count: &AtomicU64| {
            let now = count.load(Ordering::Relaxed);
            count.fetch_sub(now.div_ceil(2), Ordering::Relaxed);
            now
        };
        Seen {
            gets: half(&self.gets),
            calls: half(&self.calls),
        }
    }
}

impl Motion {
    /// A get of somebody who is no node begins; `calls` are being served, it among them.
    pub fn note_get(&self, namespace: NamespaceId, chain: &Chain, run_blocks: u32, calls: u32) {
        let hot = &self.hot;
        if !hot.is_on.load(Ordering::Relaxed) {
            return;
        }
        hot.gets.fetch_add(1, Ordering::Relaxed);
        hot.calls.fetch_add(calls.into(), Ordering::Relaxed);
        let runs = || {
            let runs = chain.runs(run_blocks);
            runs.map(|(run, _)| RunKey { namespace, run })
        };
        if self.config.hot.counts(calls) {
            hot.heat.lock().read(runs());
        }
        if hot.guest_count.load(Ordering::Relaxed) > 0 {
            let now = self.clock.now();
            let mut guests = hot.guests.lock();
            for run in runs() {
                if let Some(read) = guests.get_mut(&run) {
                    *read = now;
                }
            }
        }
    }

    /// Who else has runs of a chain, for whoever looks them up.
    #[must_use]
    pub fn seconds_of(
        &self,
        namespace: NamespaceId,
        chain: &Chain,
        run_blocks: u32,
    ) -> Vec<Second> {
        if self.hot.named.load(Ordering::Relaxed) == 0 {
            return Vec::new();
        }
        let now = self.clock.now();
        let seconds = self.hot.seconds.lock();
        let second = |(run, _)| {
            let named = seconds.get(&RunKey { namespace, run })?;
            let left = named.until.since(now);
            (!left.is_zero()).then(|| Second {
                run,
                member: named.to.id.clone(),
                ttl_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
            })
        };
        chain.runs(run_blocks).filter_map(second).collect()
    }

    /// A block came from a peer and is here now.
    pub fn hosts(&self, key: &BlockKey, run: RunHash, replicas: usize) {
        if self.config.hot.calls == 0 {
            return;
        }
        let run = RunKey {
            namespace: key.namespace,
            run,
        };
        let mut guests = self.hot.guests.lock();
        if !guests.contains_key(&run)
            && (guests.len() >= MAX_GUESTS || self.owns(&self.cluster.roster(), &run.run, replicas))
        {
            return;
        }
        guests.insert(run, self.clock.now());
        self.hot.guest_count.store(guests.len(), Ordering::Relaxed);
    }

    pub(super) async fn watch_heat(self: Arc<Self>) {
        loop {
            tokio::select! {
                biased;
                () = self.stopping.cancelled() => return,
                () = self.clock.sleep(self.config.hot_look) => {}
            }
            tokio::select! {
                biased;
                () = self.stopping.cancelled() => return,
                () = self.look() => {}
            }
        }
    }

    /// Gives what is hot a second owner, and lets go what has cooled.
    pub(super) async fn look(self: &Arc<Self>) {
        let roster = self.cluster.roster();
        let is_on = self.config.hot.calls > 0 && roster.placement.len() > 1;
        self.hot.is_on.store(is_on, Ordering::Relaxed);
        self.see_guests_off(&roster);
        let named: BTreeSet<RunKey> = self.hot.seconds.lock().keys().copied().collect();
        let seen = self.hot.seen();
        let hot = {
            let mut heat = self.hot.heat.lock();
            heat.look(&self.config.hot, seen, &named)
        };
        self.name(&roster, &hot, seen).await;
        self.forget_cooled(&roster);
    }

    /// Gives each of these a second owner, or the one that it has some more time.
    async fn name(self: &Arc<Self>, roster: &Arc<Roster>, hot: &[RunKey], seen: Seen) {
        let now = self.clock.now();
        let is_due = |run: &&RunKey| {
            let seconds = self.hot.seconds.lock();
            match seconds.get(run) {
                Some(named) => named.until.since(now) <= self.config.hot_time / 2,
                None => seconds.len() < MAX_HOT,
            }
        };
        let due: BTreeMap<RunKey, Peer> = hot
            .iter()
            .filter(is_due)
            .filter_map(|run| Some((*run, self.second_for(roster, run, seen)?)))
            .collect();
        if due.is_empty() {
            return;
        }
        let mut blocks: BTreeMap<RunKey, Vec<HeldBlock>> = BTreeMap::new();
        for block in self.holdings.blocks_of(&due.keys().copied().collect()) {
            let run = RunKey {
                namespace: block.key.namespace,
                run: block.place.run,
            };
            blocks.entry(run).or_default().push(block);
        }
        for run in hot {
            let (Some(to), Some(blocks)) = (due.get(run), blocks.remove(run)) else {
                continue;
            };
            if self.cluster.digest() != roster.digest {
                return;
            }
            self.give(roster.digest, *run, to, &blocks).await;
        }
    }

    /// Who could serve a run beside this node, its first owner.
    fn second_for(&self, roster: &Roster, key: &RunKey, seen: Seen) -> Option<Peer> {
        let replicas = self.holdings.space(&key.namespace)?.replicas.max(1);
        let owners = roster.owners(&key.run, replicas + 1);
        let me = self.cluster.me();
        if owners.first().is_none_or(|first| first.id != *me) {
            return None;
        }
        let next = owners.get(replicas)?;
        let is_there = next.state != MemberState::Draining && !self.is_suspect(&next.id);
        let is_known = || self.hot.seconds.lock().contains_key(key);
        // As gossip has it: a second or two old, and good enough to tell idle from busy.
        let is_busy = || {
            let load = self.cluster.load(&next.id).unwrap_or_default();
            u64::from(load.calls) * 2 * seen.gets > seen.calls
        };
        (is_there && (is_known() || !is_busy())).then(|| peer(next))
    }

    /// A run to its second owner; named once it is all there.
    async fn give(
        self: &Arc<Self>,
        digest: ViewDigest,
        run: RunKey,
        to: &Peer,
        blocks: &[HeldBlock],
    ) {
        let one = Move {
            run: HeldRun {
                key: run,
                blocks: blocks.len() as u64,
                bytes: blocks.iter().map(|block| block.length_bytes).sum(),
                heat: 0,
            },
            to: to.clone(),
            leaves: false,
        };
        let mut pushed = Pushed::default();
        let given = self.push(digest, &one, blocks, &mut pushed).await;
        let is_there = given.is_ok() && pushed.left_blocks == 0 && !pushed.there.is_empty();
        if let Err(error) = given {
            tracing::debug!(peer = %to.id, %error, "a hot run could not be given to a second owner");
            if error.hurts() {
                self.hurt(&to.id);
            }
        }
        let mut seconds = self.hot.seconds.lock();
        if !is_there {
            seconds.remove(&run);
        } else if seconds.len() < MAX_HOT || seconds.contains_key(&run) {
            let named = Named {
                to: to.clone(),
                until: self.clock.now().after(self.config.hot_time),
            };
            if seconds.insert(run, named).is_none() {
                tracing::debug!(peer = %to.id, "many read a run; it has a second owner for a while");
                self.metrics.hot_copies.inc();
            }
        }
        self.show_hot(&seconds);
    }

    fn forget_cooled(&self, roster: &Roster) {
        let now = self.clock.now();
        let mut seconds = self.hot.seconds.lock();
        seconds.retain(|run, named| {
            let is_mine = || roster.placement.first(&run.run) == Some(self.cluster.me());
            named.until > now && is_mine()
        });
        self.show_hot(&seconds);
    }

    fn show_hot(&self, seconds: &BTreeMap<RunKey, Named>) {
        self.hot.named.store(seconds.len(), Ordering::Relaxed);
        let count = i64::try_from(seconds.len()).unwrap_or(i64::MAX);
        self.metrics.hot_runs.set(count);
    }

    /// What nobody reads here any more, and is somebody else's, goes first.
    fn see_guests_off(&self, roster: &Roster) {
        let now = self.clock.now();
        let left: BTreeSet<RunKey> = {
            let mut guests = self.hot.guests.lock();
            let stays = self.config.hot_time * 2;
            let left = guests.extract_if(.., |_, read| now.since(*read) >= stays);
            let left = left.map(|(run, _)| run).collect();
            self.hot.guest_count.store(guests.len(), Ordering::Relaxed);
            left
        };
        let is_mine = |run: &RunKey| {
            let space = self.holdings.space(&run.namespace);
            self.owns(roster, &run.run, space.map_or(1, |space| space.replicas))
        };
        let left: BTreeSet<RunKey> = left.into_iter().filter(|run| !is_mine(run)).collect();
        if !left.is_empty() {
            let blocks = self.holdings.blocks_of(&left);
            let keys: Vec<BlockKey> = blocks.iter().map(|block| block.key).collect();
            self.holdings.first_to_go(&keys);
        }
    }
}
