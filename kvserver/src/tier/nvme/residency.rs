//! Who is on the disk, as we see it: the truth that reads, writes, removals and reclaim agree on.
//!
//! ```text
//!            begin                    finish(proven)
//!   (absent) ─────► in flight ──────────────────────► resident ──lost──► (absent)
//!                       │ remove: cancelled               │ remove: Invalidated
//!                       │ reclaim: evicted                │ reclaim, guard says no: Gone
//!                       ▼                                 ▼ reclaim, guard says yes: moving
//!                   (absent)                          (absent)          │ carried
//!                                                         ▲─────────────┘
//! ```
//!
//! Every arrow changes the map and notes it in the journal under one lock, so the journal has the
//! order in which things happened; it never touches the file under that lock.
//!
//! The map is keyed by the 64-bit hash by which foyer knows its entries, because that is all its reclaim
//! tells us; keys are compared in full, and a second key with the same hash is refused. A resident costs
//! about 250 bytes here.
//!
//! foyer may show the same entry twice at reclaim: a key stored, removed and stored again has two copies,
//! and so has one that was carried over. If the guard lets the older copy go, the resident is forgotten
//! although the newer copy is still there: one block of a cache is lost early, nothing is ever wrong.

mod going;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::AtomicU64, atomic::Ordering::Relaxed},
    time::Duration,
};

use kvproto::{BlockKey, NamespaceId, Reason};
use parking_lot::{Condvar, Mutex};

pub(super) use self::going::Going;
use super::{
    super::{
        ReclaimGuard, Resident,
        journal::{Entry, Journal},
    },
    extents::{Line, Position},
};

/// The map, its journal and its counters.
pub(super) struct Residency {
    state: Mutex<State>,
    /// Told whenever the last reader of a resident has finished.
    read_ended: Condvar,
    pub(super) journal: Journal,
    guard: Arc<dyn ReclaimGuard>,
    drops: Vec<AtomicU64>,
    limits: KeepLimits,
}

/// How much reclaim may carry over before it must let go even of what the guard would keep.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeepLimits {
    /// Since the last new block: beyond this nothing new would ever find room.
    pub(super) since_new_bytes: u64,
    /// At once: foyer's buffer has room for no more and would drop the rest without a word.
    pub(super) moving_bytes: u64,
}

#[derive(Default)]
struct State {
    removals: u64,
    residents: HashMap<u64, Resident>,
    used_bytes: u64,
    in_flight: HashMap<u64, InFlight>,
    /// Where the entries of those two are believed to lie; what is not here foyer is asked for.
    positions: HashMap<u64, Position>,
    /// Residents that lie elsewhere too.
    going: HashSet<u64>,
    /// Residents that are being carried over to another extent, and their bytes there.
    moving: HashMap<u64, u64>,
    moving_bytes: u64,
    /// How many are reading an entry at the place where it lies now.
    readers: HashMap<u64, u32>,
    /// Carried over since the last new block.
    kept_bytes: u64,
    wear: Wear,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wear {
    pub(super) day: u32,
    pub(super) bytes: u64,
}

struct InFlight {
    resident: Resident,
    cancelled: bool,
    evicted: bool,
}

/// What a write may do about a block.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// Write it, then [`Residency::finish`].
    Write,
    /// It is there, the same bytes.
    Held,
    /// It is being written by someone else.
    Busy,
    /// Another key has this hash.
    Collides,
}

/// What reclaim does with an entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reclaim {
    /// Carry it over, then say how that went: [`Residency::carried`] or [`Residency::not_carried`].
    Keep(Resident),
    /// Let it go.
    Drop,
}

impl Residency {
    pub(super) fn new(
        residents: HashMap<u64, Resident>,
        wear: Wear,
        journal: Journal,
        guard: Arc<dyn ReclaimGuard>,
        limits: KeepLimits,
    ) -> Self {
        let used_bytes = residents
            .values()
            .map(|resident| resident.length_bytes)
            .sum();
        let state = State {
            residents,
            used_bytes,
            wear,
            ..State::default()
        };
        let drops = Reason::ALL.iter().map(|_| AtomicU64::new(0)).collect();
        Self {
            state: Mutex::new(state),
            read_ended: Condvar::new(),
            journal,
            guard,
            drops,
            limits,
        }
    }

    /// Removals so far, by key or namespace: a reader compares it to tell being removed from being reclaimed.
    pub(super) fn removals(&self) -> u64 {
        self.state.lock().removals
    }

    /// The entry that a reader means, if it is still there.
    pub(super) fn holds(&self, hash: u64, resident: &Resident) -> bool {
        let state = self.state.lock();
        state
            .residents
            .get(&hash)
            .is_some_and(|held| held.key == resident.key && held.seal == resident.seal)
    }

    /// Where the entry of a resident is believed to lie.
    pub(super) fn position(&self, hash: u64) -> Option<Position> {
        self.state.lock().positions.get(&hash).copied()
    }

    /// Takes note of where entries lie. Lines of entries that are nobody's are passed over.
    pub(super) fn place(&self, lines: &[Line]) {
        let mut state = self.state.lock();
        for line in lines {
            if !state.residents.contains_key(&line.hash)
                && !state.in_flight.contains_key(&line.hash)
            {
                continue;
            }
            let position = state.positions.entry(line.hash).or_insert(line.position);
            if position.sequence <= line.position.sequence {
                *position = line.position;
            }
        }
    }

    pub(super) fn misplace(&self, by_bytes: u32) {
        for position in self.state.lock().positions.values_mut() {
            position.offset += by_bytes;
        }
    }

    /// Forgets a position at which the entry was not found.
    pub(super) fn displace(&self, hash: u64, position: Position) {
        let mut state = self.state.lock();
        if state.positions.get(&hash) == Some(&position) {
            state.positions.remove(&hash);
        }
    }

    /// Registers a write. A resident of the same key with other bytes is forgotten first.
    pub(super) fn begin(&self, hash: u64, resident: Resident) -> Begin {
        let mut state = self.state.lock();
        match state.residents.get(&hash) {
            Some(held) if held.key != resident.key => return Begin::Collides,
            Some(held) if held.seal == resident.seal => return Begin::Held,
            _ => {}
        }
        match state.in_flight.get(&hash) {
            Some(other) if other.resident.key != resident.key => return Begin::Collides,
            Some(_) => return Begin::Busy,
            None => {}
        }
        if let Some(old) = state.take(hash) {
            self.journal.note(Entry::Gone(old.key));
        }
        state.in_flight.insert(
            hash,
            InFlight {
                resident,
                cancelled: false,
                evicted: false,
            },
        );
        Begin::Write
    }

    /// Ends a write. `proven`: foyer has it. Answers why it is not resident now, if it is not.
    pub(super) fn finish(&self, hash: u64, proven: bool) -> Result<(), Reason> {
        let mut state = self.state.lock();
        let Some(flight) = state.in_flight.remove(&hash) else {
            return Err(Reason::Invalidated);
        };
        let refused = match (flight.cancelled, flight.evicted, proven) {
            (true, _, _) => Some(Reason::Invalidated),
            (_, true, _) => Some(Reason::Evicted),
            (_, _, false) => Some(Reason::Device),
            _ => None,
        };
        if let Some(reason) = refused {
            state.positions.remove(&hash);
            return Err(reason);
        }
        state.kept_bytes = 0;
        state.put(hash, flight.resident);
        self.journal.note(Entry::Stored(flight.resident));
        Ok(())
    }

    /// Forgets a resident that turned out to be damaged or missing. Answers whether it was there.
    pub(super) fn lose(&self, hash: u64, resident: &Resident, reason: Reason) -> bool {
        let mut state = self.state.lock();
        if state
            .residents
            .get(&hash)
            .is_none_or(|held| held.seal != resident.seal)
        {
            return false;
        }
        state.take(hash);
        self.journal.note(Entry::Gone(resident.key));
        drop(state);
        self.count(reason, 1);
        true
    }

    /// Takes back a resident that could not be journaled.
    pub(super) fn forget(&self, hash: u64, key: &BlockKey) {
        let mut state = self.state.lock();
        if state
            .residents
            .get(&hash)
            .is_some_and(|held| held.key == *key)
        {
            state.take(hash);
        }
    }

    /// Removes a key, whether it is there, on its way, or neither.
    pub(super) fn remove(&self, hash: u64, key: &BlockKey) {
        let mut state = self.state.lock();
        state.removals += 1;
        if state
            .residents
            .get(&hash)
            .is_some_and(|held| held.key == *key)
        {
            state.take(hash);
        }
        if let Some(flight) = state
            .in_flight
            .get_mut(&hash)
            .filter(|flight| flight.resident.key == *key)
        {
            flight.cancelled = true;
        }
        self.journal.note(Entry::Invalidated(*key));
    }

    /// Removes all of a namespace; answers the keys that were there.
    pub(super) fn remove_namespace(&self, namespace: NamespaceId) -> Vec<BlockKey> {
        let mut state = self.state.lock();
        state.removals += 1;
        let of_it = |resident: &Resident| resident.key.namespace == namespace;
        let gone: Vec<(u64, BlockKey)> = state
            .residents
            .iter()
            .filter(|(_, r)| of_it(r))
            .map(|(hash, r)| (*hash, r.key))
            .collect();
        for (hash, _) in &gone {
            state.take(*hash);
        }
        for flight in state
            .in_flight
            .values_mut()
            .filter(|flight| of_it(&flight.resident))
        {
            flight.cancelled = true;
        }
        self.journal.note(Entry::InvalidatedNamespace(namespace));
        gone.into_iter().map(|(_, key)| key).collect()
    }

    /// foyer is about to reclaim the extent in which the entry of this hash lies.
    pub(super) fn reclaim(&self, hash: u64, entry_bytes: u64) -> Reclaim {
        // The guard is asked without our lock: it may take the engine's.
        let (resident, over_limit) = {
            let mut state = self.state.lock();
            if let Some(flight) = state.in_flight.get_mut(&hash) {
                // Written and reclaimed before anybody could be told: its writer will hear.
                flight.evicted = true;
                return Reclaim::Drop;
            }
            let Some(resident) = state.residents.get(&hash).copied() else {
                return Reclaim::Drop;
            };
            if state.moving.contains_key(&hash) {
                // An older copy; the newer one is on its way.
                return Reclaim::Drop;
            }
            let over_limit = state.kept_bytes + entry_bytes > self.limits.since_new_bytes
                || state.moving_bytes + entry_bytes > self.limits.moving_bytes;
            (resident, over_limit)
        };
        let keep = self.guard.keep(&resident.key) && !over_limit;
        let mut state = self.state.lock();
        if state.residents.get(&hash) != Some(&resident) {
            return Reclaim::Drop;
        }
        if keep {
            state.kept_bytes += entry_bytes;
            state.wear.bytes += entry_bytes;
            state.moving_bytes += entry_bytes;
            state.moving.insert(hash, entry_bytes);
            state.positions.remove(&hash);
            return Reclaim::Keep(resident);
        }
        state.take(hash);
        let crowded = self.journal.note(Entry::Gone(resident.key));
        drop(state);
        self.count(Reason::Evicted, 1);
        if crowded {
            // A failure marks the journal broken, which the next write sees and handles.
            let _ = self.journal.flush(false);
        }
        Reclaim::Drop
    }

    /// Somebody reads the entry now, until the answer is dropped.
    pub(super) fn reading(&self, hash: u64) -> Reading<'_> {
        let mut state = self.state.lock();
        *state.readers.entry(hash).or_default() += 1;
        // It is wanted here.
        state.going.remove(&hash);
        drop(state);
        Reading {
            residency: self,
            hash,
        }
    }

    /// Waits, at most `patience`, until nobody reads the entry: its place is about to be overwritten, and
    /// foyer takes a reader who comes too late for a sign of damage. Blocks.
    pub(super) fn await_readers(&self, hash: u64, patience: Duration) {
        let mut state = self.state.lock();
        let still = |state: &mut State| state.readers.contains_key(&hash);
        self.read_ended.wait_while_for(&mut state, still, patience);
    }

    /// What was to be kept has arrived at its new place.
    pub(super) fn carried(&self, hash: u64) {
        self.state.lock().end_move(hash);
    }

    /// It could not be kept.
    pub(super) fn not_carried(&self, hash: u64, resident: &Resident, reason: Reason) {
        self.state.lock().end_move(hash);
        self.lose(hash, resident, reason);
    }

    /// Takes `bytes` from the day's budget; `false` when it is spent.
    pub(super) fn charge(&self, today: u32, bytes: u64, budget_bytes: u64) -> bool {
        let mut state = self.state.lock();
        if state.wear.day != today {
            state.wear = Wear {
                day: today,
                bytes: 0,
            };
        }
        if budget_bytes > 0 && state.wear.bytes + bytes > budget_bytes {
            return false;
        }
        state.wear.bytes += bytes;
        true
    }

    /// Notes the day's total, so that a restart goes on from it.
    pub(super) fn note_wear(&self) {
        let state = self.state.lock();
        self.journal.note(Entry::Wear {
            day: state.wear.day,
            bytes: state.wear.bytes,
        });
    }

    pub(super) fn written_today(&self, today: u32) -> u64 {
        let wear = self.state.lock().wear;
        if wear.day == today { wear.bytes } else { 0 }
    }

    /// Everything, as the journal should say it; what is pending there is covered by it.
    pub(super) fn truth(&self) -> Vec<Entry> {
        let state = self.state.lock();
        self.journal.forget_pending();
        let wear = Entry::Wear {
            day: state.wear.day,
            bytes: state.wear.bytes,
        };
        std::iter::once(wear)
            .chain(state.residents.values().copied().map(Entry::Stored))
            .collect()
    }

    pub(super) fn residents(&self) -> Vec<Resident> {
        self.state.lock().residents.values().copied().collect()
    }

    pub(super) fn hashes(&self) -> Vec<(u64, Resident)> {
        self.state
            .lock()
            .residents
            .iter()
            .map(|(hash, resident)| (*hash, *resident))
            .collect()
    }

    /// Blocks and their bytes.
    pub(super) fn usage(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.residents.len() as u64, state.used_bytes)
    }

    pub(super) fn count(&self, reason: Reason, blocks: u64) {
        let at = Reason::ALL
            .iter()
            .position(|&known| known == reason)
            .expect("ALL has every reason");
        self.drops[at].fetch_add(blocks, Relaxed);
    }

    pub(super) fn drops(&self) -> Vec<(Reason, u64)> {
        let counts = self.drops.iter().map(|count| count.load(Relaxed));
        Reason::ALL
            .iter()
            .copied()
            .zip(counts)
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

/// See [`Residency::reading`].
pub(super) struct Reading<'a> {
    residency: &'a Residency,
    hash: u64,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let mut state = self.residency.state.lock();
        if let Some(count) = state.readers.get_mut(&self.hash) {
            *count -= 1;
            if *count == 0 {
                state.readers.remove(&self.hash);
                self.residency.read_ended.notify_all();
            }
        }
    }
}

impl State {
    fn put(&mut self, hash: u64, resident: Resident) {
        self.used_bytes += resident.length_bytes;
        if let Some(old) = self.residents.insert(hash, resident) {
            self.used_bytes -= old.length_bytes;
        }
    }

    fn end_move(&mut self, hash: u64) {
        self.moving_bytes -= self.moving.remove(&hash).unwrap_or(0);
    }

    fn take(&mut self, hash: u64) -> Option<Resident> {
        self.end_move(hash);
        self.positions.remove(&hash);
        self.going.remove(&hash);
        let resident = self.residents.remove(&hash)?;
        self.used_bytes -= resident.length_bytes;
        Some(resident)
    }
}
