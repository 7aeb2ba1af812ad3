//! Runs that many read: what a node has to do meanwhile, and whom a caller asks of two that have a run.
//!
//! ```text
//! get ─► desk ── one after the other, GET_TIME each ──► blocks, and how many gets wait there
//!          └► note_get ─► heat ─► a second owner ─► named in answers ─► Readers ─► the shorter queue of two
//! ```
//!
//! real    heat, second owners and guests (`blocks::motion`); what was heard of them, the queues as a caller knows them,
//!         and the choice between two (`kvclient::route`)
//! model   how long a get takes; what of a node's load the others hear, and when
//!
//! Units: gets, durations. Errors: none.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use kvclient::{
    clock::Tick,
    route::{Queue, Seconds, Table, goes_second, is_worth_leaving},
};
use kvproto::{MemberId, RunHash, convert::answer::Second};
use kvserver::{
    blocks::motion::HotRules,
    clock::{Clock, Tick as SimTick},
};
use parking_lot::Mutex;

use super::clock::SimClock;

/// From when on a run is hot: a crowd that reads nothing else waits for itself so.
pub(super) const RULES: HotRules = HotRules {
    calls: 4,
    share_percent: 10,
};
/// For how long a second owner is named: short, so that a minute shows runs that become hot and cool again.
pub(super) const HOT_TIME: Duration = Duration::from_secs(4);
/// The prompt that a crowd reads, and how many there are besides the ordinary callers.
pub(super) const HOT_PROMPT: u32 = 0;
pub(super) const CROWD: u32 = 12;
/// Mean pause of one of the crowd.
pub(super) const HOT_PAUSE_MS: u64 = 4;
/// What a node takes for a get.
const GET_TIME: Duration = Duration::from_millis(20);

/// When a crowd reads one prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fashion {
    pub(super) from: SimTick,
    pub(super) until: SimTick,
}

impl Fashion {
    /// How long it does.
    pub(super) fn lasts(&self) -> Duration {
        self.until.since(self.from)
    }

    /// Whether it does now.
    pub(super) fn is_on(&self, now: SimTick) -> bool {
        (self.from..self.until).contains(&now)
    }

    /// From its end to nobody being named any more: what was read fades to nothing in a dozen looks, and who was named at
    /// the last of them is for so long.
    pub(super) fn is_long_over(&self, now: SimTick) -> bool {
        now >= self.until.after(12 * Duration::from_secs(1) + HOT_TIME)
    }
}

/// What came of reads of this prompt.
#[derive(Debug, Default)]
pub(super) struct HotTally {
    /// Runs read, and those of them at another node than their owner.
    pub(super) reads: AtomicU64,
    pub(super) reads_elsewhere: AtomicU64,
    /// Blocks that a lookup missed for a silent member although another one was known to have them, and had.
    pub(super) unsaved_blocks: AtomicU64,
    /// The longest queue that a get found, itself in it.
    pub(super) longest_queue: AtomicU64,
}

/// Where gets wait at a node.
#[derive(Default)]
pub(super) struct Desk {
    calls: AtomicU32,
    /// When the last of those that wait will have been served.
    free: Mutex<SimTick>,
    /// How many there were at its last round: what it says of itself.
    pub(super) told: AtomicU32,
}

/// A get that waits or is served, until dropped.
pub(super) struct Waiting<'a>(&'a Desk);

impl Desk {
    /// How many gets are here.
    pub(super) fn calls(&self) -> u32 {
        self.calls.load(Relaxed)
    }

    /// One more is here.
    pub(super) fn enter(&self) -> Waiting<'_> {
        self.calls.fetch_add(1, Relaxed);
        Waiting(self)
    }
}

impl Waiting<'_> {
    /// Waits for those before it, and for itself.
    pub(super) async fn served(&self, clock: &SimClock) {
        let now = clock.now();
        let until = {
            let mut free = self.0.free.lock();
            *free = (*free).max(now).after(GET_TIME);
            *free
        };
        clock.sleep(until.since(now)).await;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Relaxed);
    }
}

/// What one caller knows of who else has what, and of their queues.
#[derive(Default)]
pub(super) struct Readers(Mutex<Heard>);

#[derive(Default)]
struct Heard {
    seconds: Seconds,
    names_seconds: bool,
    queues: BTreeMap<MemberId, Arc<Queue>>,
}

impl Readers {
    /// What is known of a member's queue.
    pub(super) fn queue(&self, id: &MemberId) -> Arc<Queue> {
        let mut heard = self.0.lock();
        match heard.queues.get(id) {
            Some(queue) => Arc::clone(queue),
            None => Arc::clone(heard.queues.entry(id.clone()).or_default()),
        }
    }

    /// An answer says how many gets its node serves, and who else has runs of it.
    pub(super) fn heard(&self, from: &MemberId, calls: u32, seconds: Vec<Second>, now: Tick) {
        self.queue(from).heard(calls, now);
        let mut heard = self.0.lock();
        heard.names_seconds |= !seconds.is_empty();
        for Second {
            run,
            member,
            ttl_ms,
        } in seconds
        {
            let until = now.after(Duration::from_millis(ttl_ms.into()));
            heard.seconds.heard(run, member, until, now);
        }
    }

    /// Whether any run may have a second owner.
    pub(super) fn names_seconds(&self) -> bool {
        self.0.lock().names_seconds
    }

    /// Who has a run beside its owner, by its number in the table.
    pub(super) fn second(&self, table: &Table, run: &RunHash, now: Tick) -> Option<usize> {
        let heard = self.0.lock();
        table.number(heard.seconds.of(run, now)?)
    }

    /// Who was asked in an owner's place lacks it.
    pub(super) fn shun(&self, run: &RunHash) {
        self.0.lock().seconds.shun(run);
    }

    /// Whom to ask for a run: its owner, or who has it too and less to do.
    pub(super) fn reader(&self, table: &Table, run: &RunHash, now: Tick) -> usize {
        // Nobody takes runs only in a cluster of nobody.
        let first = table.owner(run).unwrap_or(0);
        if !self.names_seconds() {
            return first;
        }
        let calls = |member: usize| {
            let id = table.members().get(member).map(|member| &member.id);
            id.map_or(0, |id| self.queue(id).len(now))
        };
        let queue = calls(first);
        if !is_worth_leaving(queue) {
            return first;
        }
        let second = self.second(table, run, now);
        let second = second.filter(|second| goes_second(queue, calls(*second)));
        second.unwrap_or(first)
    }
}
