//! A node that is a map: what motion needs of one, for tests and for the simulator.
//!
//! ```text
//! Shelf ── Holdings ──► Motion            the same decisions as on a real node, over maps
//!       └─ Service  ──► Net               and what it answers its peers
//! ```
//!
//! It verifies what it keeps, honours leases, and gives up what is first to go before anything else when it is full.
//! Everything is ordered: the same calls give the same history. Units: blocks, bytes. Errors: those of peers.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use kvproto::{
    BlockKey, GetOutcome, Kind, LeaseId, NamespaceId, PutOutcome, Reason, RunHash, SequenceHash,
    checksum::page_sums, convert::answer::PutResult,
};
use parking_lot::Mutex;

use super::{Holdings, Kept};
use crate::{
    clock::{Clock, Tick},
    engine::{HeldBlock, HeldRun, RunKey},
    peers::{Asked, Carried, Fetched, Given, PeerError, Seen, Space, net::Service},
};

/// A node's blocks, in a map.
pub struct Shelf {
    clock: Arc<dyn Clock>,
    /// Bytes it has room for.
    capacity_bytes: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    spaces: BTreeMap<NamespaceId, Arc<Space>>,
    blocks: BTreeMap<BlockKey, Stored>,
    bytes: u64,
    leases: BTreeMap<u64, (Tick, BTreeSet<BlockKey>)>,
    first_to_go: BTreeSet<BlockKey>,
    gone: BTreeSet<BlockKey>,
    moment: u64,
    /// What was invalidated, when, and by which invalidation.
    fences: BTreeMap<BlockKey, (u64, u64)>,
    arrivals: u64,
}

struct Stored {
    block: Carried,
    kind: Kind,
    heat: u32,
    /// The order in which it came: the oldest is given up first.
    arrived: u64,
}

impl Shelf {
    /// An empty node with so much room.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, capacity_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            clock,
            capacity_bytes,
            state: Mutex::default(),
        })
    }

    /// A namespace is known from now on.
    pub fn open(&self, space: &Arc<Space>) {
        let mut state = self.state.lock();
        state.spaces.insert(space.id, Arc::clone(space));
    }

    /// Puts a block, as a client does.
    pub fn put(&self, block: Carried, kind: Kind) -> Kept {
        let moment = self.moment();
        self.store(block, kind, moment, None)
    }

    /// A block, as a client reads it; counts as a use.
    #[must_use]
    pub fn find(&self, key: &BlockKey) -> Option<Carried> {
        let mut state = self.state.lock();
        let stored = state.blocks.get_mut(key)?;
        stored.heat = stored.heat.saturating_add(1).min(255);
        let block = stored.block.clone();
        state.first_to_go.remove(key);
        Some(block)
    }

    /// Whether a block is here.
    #[must_use]
    pub fn has(&self, key: &BlockKey) -> bool {
        self.state.lock().blocks.contains_key(key)
    }

    /// How many blocks are here.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state.lock().blocks.len()
    }

    /// Whether nothing is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes here.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.state.lock().bytes
    }

    /// Forgets a block on purpose; `id` is that of the invalidation, at whatever node.
    pub fn invalidate(&self, key: &BlockKey, id: u64) {
        let mut state = self.state.lock();
        state.moment += 1;
        let moment = state.moment;
        state.fences.insert(*key, (moment, id));
        state.drop_block(key);
        state.gone.insert(*key);
    }

    /// Forgets everything, as a node that lost its memory.
    pub fn clear(&self) {
        let mut state = self.state.lock();
        state.blocks.clear();
        state.leases.clear();
        state.first_to_go.clear();
        state.bytes = 0;
    }

    /// Blocks that a living lease holds.
    #[must_use]
    pub fn leased(&self) -> BTreeSet<BlockKey> {
        let now = self.clock.now();
        let state = self.state.lock();
        let alive = state.leases.values().filter(|(until, _)| *until > now);
        alive.flat_map(|(_, keys)| keys.iter().copied()).collect()
    }

    /// Blocks that are first to go.
    #[must_use]
    pub fn going(&self) -> BTreeSet<BlockKey> {
        self.state.lock().first_to_go.clone()
    }

    /// Leases the leading blocks of a chain that are here: what a lookup answers.
    #[must_use]
    pub fn lease(&self, asked: &Asked, time: Duration) -> Seen {
        let mut state = self.state.lock();
        let present = state.prefix(asked);
        if present == 0 {
            return Seen::default();
        }
        let held = super::runs::keys(asked.space.id, &asked.chain, &asked.parts)
            .take(present * asked.parts.len())
            .collect();
        let id = loop {
            let id = self.clock.random_u64();
            if id != 0 && !state.leases.contains_key(&id) {
                break id;
            }
        };
        let now = self.clock.now();
        state.leases.retain(|_, (until, _)| *until > now);
        state.leases.insert(id, (now.after(time), held));
        Seen {
            blocks: present as u32,
            lease: Some((LeaseId(id), present as u32)),
            survived: Vec::new(),
        }
    }
}

impl State {
    /// Leading blocks that are here in all parts.
    fn prefix(&self, asked: &Asked) -> usize {
        let keys = super::runs::keys(asked.space.id, &asked.chain, &asked.parts);
        let present = keys.take_while(|key| self.blocks.contains_key(key)).count();
        present / asked.parts.len().max(1)
    }

    fn drop_block(&mut self, key: &BlockKey) {
        if let Some(stored) = self.blocks.remove(key) {
            self.bytes -= stored.block.len_bytes();
        }
        self.first_to_go.remove(key);
    }

    /// Makes room for so many bytes; false when what is left is leased.
    fn make_room(&mut self, bytes: u64, capacity: u64, now: Tick) -> bool {
        if self.bytes + bytes <= capacity {
            return true;
        }
        if bytes > capacity {
            return false;
        }
        self.leases.retain(|_, (until, _)| *until > now);
        let leased: BTreeSet<BlockKey> = self
            .leases
            .values()
            .flat_map(|(_, keys)| keys.iter().copied())
            .collect();
        while self.bytes + bytes > capacity {
            let going = self.first_to_go.iter().find(|key| !leased.contains(*key));
            let oldest = || {
                let free = self.blocks.iter().filter(|(key, _)| !leased.contains(*key));
                free.min_by_key(|(_, stored)| stored.arrived)
                    .map(|(key, _)| *key)
            };
            let Some(victim) = going.copied().or_else(oldest) else {
                return false;
            };
            self.drop_block(&victim);
        }
        true
    }
}

impl Holdings for Shelf {
    fn space(&self, id: &NamespaceId) -> Option<Arc<Space>> {
        self.state.lock().spaces.get(id).cloned()
    }

    fn held(&self) -> Vec<HeldRun> {
        let state = self.state.lock();
        let mut runs: BTreeMap<RunKey, HeldRun> = BTreeMap::new();
        for (key, stored) in &state.blocks {
            let run = RunKey {
                namespace: key.namespace,
                run: stored.block.header.place.run,
            };
            let held = runs.entry(run).or_insert(HeldRun {
                key: run,
                blocks: 0,
                bytes: 0,
                heat: 0,
            });
            held.blocks += 1;
            held.bytes += stored.block.header.length_bytes;
            held.heat = held.heat.max(stored.heat);
        }
        runs.into_values().collect()
    }

    fn blocks_of(&self, runs: &BTreeSet<RunKey>) -> Vec<HeldBlock> {
        let state = self.state.lock();
        let mut blocks: Vec<HeldBlock> = state
            .blocks
            .iter()
            .map(|(key, stored)| HeldBlock {
                key: *key,
                place: stored.block.header.place,
                length_bytes: stored.block.header.length_bytes,
                kind: stored.kind,
            })
            .filter(|block| {
                runs.contains(&RunKey {
                    namespace: block.key.namespace,
                    run: block.place.run,
                })
            })
            .collect();
        blocks.sort_by_key(|b| {
            (
                b.key.namespace,
                b.place.run,
                b.place.index,
                b.key.hash,
                b.key.part,
            )
        });
        blocks
    }

    fn lacks(&self, key: &BlockKey) -> bool {
        let state = self.state.lock();
        !state.blocks.contains_key(key) && !state.gone.contains(key)
    }

    fn moment(&self) -> u64 {
        self.state.lock().moment
    }

    fn keep(&self, block: Carried, kind: Kind, began: u64, survived: &[u64]) -> Kept {
        self.store(block, kind, began, Some(survived))
    }

    fn survived(&self, namespace: &NamespaceId, hashes: &[SequenceHash]) -> Vec<u64> {
        let state = self.state.lock();
        let of = |key: &BlockKey| key.namespace == *namespace && hashes.contains(&key.hash);
        let fences = state.fences.iter().filter(|(key, _)| of(key));
        fences.map(|(_, (_, id))| *id).collect()
    }

    fn was_invalidated(&self, key: &BlockKey) -> bool {
        self.state.lock().gone.contains(key)
    }

    fn read(&self, block: &HeldBlock) -> BoxFuture<'static, Option<Carried>> {
        let state = self.state.lock();
        let found = state.blocks.get(&block.key).map(|s| s.block.clone());
        std::future::ready(found).boxed()
    }

    fn first_to_go(&self, keys: &[BlockKey]) {
        let mut state = self.state.lock();
        let State {
            blocks,
            first_to_go,
            ..
        } = &mut *state;
        first_to_go.extend(keys.iter().filter(|key| blocks.contains_key(*key)));
    }

    fn going(&self) -> Vec<(BlockKey, RunHash)> {
        let state = self.state.lock();
        let going = state.first_to_go.iter();
        going
            .filter_map(|key| Some((*key, state.blocks.get(key)?.block.header.place.run)))
            .collect()
    }

    fn stays(&self, keys: &[BlockKey]) {
        let mut state = self.state.lock();
        for key in keys {
            state.first_to_go.remove(key);
        }
    }
}

impl Shelf {
    /// Takes in a block: a client's, or a peer's that has `survived` what that one was told of.
    fn store(&self, block: Carried, kind: Kind, began: u64, survived: Option<&[u64]>) -> Kept {
        let key = block.header.key;
        let bytes: Vec<u8> = block.pieces.concat();
        let is_right = bytes.len() as u64 == block.header.length_bytes
            && block.header.check(&page_sums(&bytes)).is_ok();
        if !is_right {
            return Kept::Corrupt;
        }
        let now = self.clock.now();
        let mut state = self.state.lock();
        if let Some((moment, id)) = state.fences.get(&key)
            && (*moment > began || survived.is_some_and(|survived| !survived.contains(id)))
        {
            return Kept::Refused(Reason::Invalidated);
        }
        if state.blocks.contains_key(&key) {
            return Kept::Present;
        }
        if !state.make_room(block.len_bytes(), self.capacity_bytes, now) {
            return Kept::Refused(Reason::NoSlot);
        }
        state.bytes += block.len_bytes();
        state.arrivals += 1;
        let arrived = state.arrivals;
        state.gone.remove(&key);
        let stored = Stored {
            block,
            kind,
            heat: 0,
            arrived,
        };
        state.blocks.insert(key, stored);
        Kept::New
    }
}

impl Service for Shelf {
    fn lookup(&self, asked: &Asked, lease: Option<Duration>) -> Result<Seen, PeerError> {
        {
            let state = self.state.lock();
            if !state.spaces.contains_key(&asked.space.id) {
                return Err(PeerError::UnknownNamespace);
            }
            if lease.is_none() {
                return Ok(Seen {
                    blocks: state.prefix(asked) as u32,
                    ..Seen::default()
                });
            }
        }
        Ok(Seen {
            survived: self.survived(&asked.space.id, &asked.chain.hashes),
            ..self.lease(asked, lease.unwrap_or_default())
        })
    }

    fn get(&self, key: &BlockKey, lease: Option<LeaseId>) -> Fetched {
        let now = self.clock.now();
        let state = self.state.lock();
        let is_alive = |lease: LeaseId| {
            let lease = state.leases.get(&lease.0);
            lease.is_some_and(|(until, _)| *until > now)
        };
        if !lease.is_none_or(is_alive) {
            return Fetched::Gone(GetOutcome::Expired);
        }
        match state.blocks.get(key) {
            Some(stored) => Fetched::Hit(stored.block.clone()),
            None => Fetched::Gone(GetOutcome::Miss),
        }
    }

    fn put(&self, given: Given) -> Result<Vec<PutResult>, PeerError> {
        if !self.state.lock().spaces.contains_key(&given.space.id) {
            return Err(PeerError::UnknownNamespace);
        }
        let moment = self.moment();
        let result = |block| match self.keep(block, given.kind, moment, &given.survived) {
            Kept::New => PutResult::kept(PutOutcome::Cached),
            Kept::Present => PutResult::kept(PutOutcome::Present),
            Kept::Refused(reason) => PutResult::rejected(reason, 50),
            Kept::Corrupt => PutResult {
                outcome: PutOutcome::Corrupt,
                retry_after_ms: 0,
                reason: Some(Reason::Corrupt),
            },
        };
        Ok(given.blocks.into_iter().map(result).collect())
    }

    fn open(&self, space: &Arc<Space>) {
        Shelf::open(self, space);
    }

    fn release(&self, lease: LeaseId) {
        self.state.lock().leases.remove(&lease.0);
    }
}
