//! Reads from below RAM: who goes next, who waits, and who has stopped waiting.
//!
//! ```text
//! get ──────► awaited    ─┐ first                    ┌─► landed, told to all who wait
//!    joins ─► │ hurried   ├─► running: at most `reads` ┤
//! lookup ───► prefetches ─┘ at most half of them      └─► nobody waits and no lease holds it: dropped
//! ```
//!
//! Shape: one flight per block, shared by all who want it. A get that joins a prefetch takes it out of the queue
//! of prefetches and in among the gets; its lease, if it has one, then speaks for the flight.
//! A [`Reading`] is a place at the table: when the last get lets go of a flight that has not begun, the flight is
//! forgotten, or goes back among the prefetches if a lookup had asked for it. One that runs goes on: the block is
//! in RAM for the next who asks.
//! Bounds: `reads` run; `waiting` flights of gets without a lease wait, more are answered `Overloaded`; leased
//! ones are as many as leases can pin, and are never refused; [`PREFETCH_QUEUE`] prefetches.
//! Errors: reasons. Why not semaphores: a place in their queue can be neither hurried nor given up by name.

use std::{
    collections::{BTreeMap, HashMap},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use kvproto::{BlockKey, Reason};
use tokio::sync::oneshot;

use super::{BUSY_PAUSE, Mover};
use crate::{
    clock::Tick,
    engine::Below,
    tier::{BlockRef, Read},
};

/// Prefetches that may wait or run; a lookup's further promotions are left to the get.
pub(super) const PREFETCH_QUEUE: usize = 1024;

/// Why a get reads a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// It has no lease on the block.
    Asked,
    /// It has: the read is never refused for want of a slot.
    Leased,
}

/// What a read brings: the block in RAM, or why not.
pub type Landed = Result<BlockRef, Reason>;

/// How many reads there may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadLimits {
    /// That hold a slot at once; half of them may be prefetches.
    pub(crate) reads: usize,
    /// That gets without a lease wait for.
    pub(crate) waiting: usize,
}

/// One get's hold on a read under way; dropping it is not waiting any more.
pub struct Reading {
    landed: Shared<BoxFuture<'static, Landed>>,
    place: Option<(Arc<Mover>, BlockKey, u64)>,
}

impl Reading {
    fn refused(reason: Reason) -> Self {
        Self {
            landed: futures_util::future::ready(Err(reason)).boxed().shared(),
            place: None,
        }
    }
}

impl Future for Reading {
    type Output = Landed;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Landed> {
        self.landed.poll_unpin(cx)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Some((mover, key, flight)) = self.place.take() {
            mover.reads.lock().leave(&key, flight);
        }
    }
}

/// Queues and flights. Under one lock; a shard's lock of the engine may be taken below it.
pub(super) struct Reads {
    limits: ReadLimits,
    flights: HashMap<BlockKey, Flight>,
    awaited: BTreeMap<u64, BlockKey>,
    prefetches: BTreeMap<u64, BlockKey>,
    running: usize,
    running_prefetches: usize,
    next: u64,
}

struct Flight {
    /// Its name: the block may fly again after this flight is over.
    number: u64,
    below: Below,
    /// Of the most urgent who ever waited; `None` while it is a prefetch only.
    urgency: Option<Urgency>,
    /// A lookup has asked for it.
    is_prefetch: bool,
    /// Gets that wait.
    waiting: usize,
    state: State,
    asked: Tick,
    answer: oneshot::Sender<Landed>,
    landed: Shared<BoxFuture<'static, Landed>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// In the queue that its urgency says, at this place.
    Queued(u64),
    /// On one of the reads, and on a share of the prefetches if so.
    Running { as_prefetch: bool },
}

impl Reads {
    pub(super) fn new(limits: ReadLimits) -> Self {
        Self {
            limits,
            flights: HashMap::new(),
            awaited: BTreeMap::new(),
            prefetches: BTreeMap::new(),
            running: 0,
            running_prefetches: 0,
            next: 0,
        }
    }

    /// Reads that a get waits for.
    pub(super) fn awaited(&self) -> usize {
        self.awaited.len() + self.running - self.running_prefetches
    }

    /// Flights that have not begun.
    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.awaited.len() + self.prefetches.len()
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A flight for a block that has none.
    fn enter(&mut self, below: Below, urgency: Option<Urgency>, asked: Tick) {
        let (answer, answered) = oneshot::channel();
        let landed = answered
            .map(|landed: Result<Landed, _>| landed.unwrap_or(Err(Reason::Draining)))
            .boxed()
            .shared();
        let (number, key) = (self.number(), below.resident.key);
        match urgency {
            Some(_) => self.awaited.insert(number, key),
            None => self.prefetches.insert(number, key),
        };
        let flight = Flight {
            number,
            below,
            urgency,
            is_prefetch: urgency.is_none(),
            waiting: 0,
            state: State::Queued(number),
            asked,
            answer,
            landed,
        };
        self.flights.insert(key, flight);
    }

    /// A get waits for a flight, which is hurried if need be.
    fn join(&mut self, key: &BlockKey, urgency: Urgency) -> Option<(u64, Reading)> {
        let place = self.number();
        let flight = self.flights.get_mut(key)?;
        if flight.urgency.is_none() {
            match &mut flight.state {
                State::Queued(queued) => {
                    self.prefetches.remove(queued);
                    self.awaited.insert(place, *key);
                    *queued = place;
                }
                State::Running { as_prefetch } => {
                    if std::mem::take(as_prefetch) {
                        self.running_prefetches -= 1;
                    }
                }
            }
        }
        flight.urgency = flight.urgency.max(Some(urgency));
        flight.waiting += 1;
        let landed = flight.landed.clone();
        Some((
            flight.number,
            Reading {
                landed,
                place: None,
            },
        ))
    }

    /// A get waits no longer.
    fn leave(&mut self, key: &BlockKey, number: u64) {
        let place = self.number();
        let Some(flight) = self.flights.get_mut(key).filter(|f| f.number == number) else {
            return;
        };
        flight.waiting -= 1;
        let State::Queued(queued) = flight.state else {
            return;
        };
        if flight.waiting > 0 {
            return;
        }
        self.awaited.remove(&queued);
        if flight.is_prefetch {
            flight.urgency = None;
            flight.state = State::Queued(place);
            self.prefetches.insert(place, *key);
        } else {
            self.flights.remove(key);
        }
    }

    /// The flight that begins next, if there is a read for it.
    fn begin(&mut self, is_leased: impl Fn(&BlockKey) -> bool) -> Option<Below> {
        if self.running >= self.limits.reads {
            return None;
        }
        let mut as_prefetch = false;
        let key = match self.awaited.pop_first() {
            Some((_, key)) => key,
            None => loop {
                if self.running_prefetches >= (self.limits.reads / 2).max(1) {
                    return None;
                }
                let (_, key) = self.prefetches.pop_first()?;
                // Its lease has ended, and nobody came for it.
                if is_leased(&key) {
                    as_prefetch = true;
                    break key;
                }
                self.flights.remove(&key);
            },
        };
        self.running += 1;
        self.running_prefetches += usize::from(as_prefetch);
        let flight = self.flights.get_mut(&key)?;
        flight.state = State::Running { as_prefetch };
        Some(flight.below)
    }

    /// A flight is over; who is to be told, and when it was asked for.
    fn end(&mut self, key: &BlockKey) -> Option<(oneshot::Sender<Landed>, Tick)> {
        let flight = self.flights.remove(key)?;
        self.running -= 1;
        if flight.state == (State::Running { as_prefetch: true }) {
            self.running_prefetches -= 1;
        }
        Some((flight.answer, flight.asked))
    }

    /// Whether a get with a lease on the block waits, and whether anybody does.
    fn wanted(&self, key: &BlockKey) -> (bool, bool) {
        self.flights.get(key).map_or((false, false), |flight| {
            (flight.urgency == Some(Urgency::Leased), flight.waiting > 0)
        })
    }

    /// Gives up what nobody waits for yet: the node stops.
    pub(super) fn drop_prefetches(&mut self) {
        for key in std::mem::take(&mut self.prefetches).into_values() {
            self.flights.remove(&key);
        }
    }
}

impl Mover {
    /// Brings a block up into RAM for a get, or joins whoever does already.
    pub fn read(self: &Arc<Self>, below: Below, urgency: Urgency) -> Reading {
        let key = below.resident.key;
        let mut reads = self.reads.lock();
        if !reads.flights.contains_key(&key) {
            if urgency == Urgency::Asked && reads.awaited.len() >= reads.limits.waiting {
                drop(reads);
                self.metrics
                    .moved_up(below.tier, Some(Reason::Overloaded), 0.0);
                return Reading::refused(Reason::Overloaded);
            }
            reads.enter(below, Some(urgency), self.clock.now());
        }
        let Some((number, mut reading)) = reads.join(&key, urgency) else {
            return Reading::refused(Reason::Draining);
        };
        reading.place = Some((Arc::clone(self), key, number));
        self.begin_reads(&mut reads);
        reading
    }

    /// Starts to bring up what a lookup has leased.
    pub fn prefetch(self: &Arc<Self>, wanted: Vec<Below>) {
        if wanted.is_empty() || self.stopping.is_cancelled() {
            return;
        }
        let now = self.clock.now();
        let mut reads = self.reads.lock();
        for below in wanted {
            if reads.prefetches.len() + reads.running_prefetches >= PREFETCH_QUEUE {
                break;
            }
            match reads.flights.get_mut(&below.resident.key) {
                Some(flight) => flight.is_prefetch = true,
                None => reads.enter(below, None, now),
            }
        }
        self.begin_reads(&mut reads);
    }

    fn begin_reads(self: &Arc<Self>, reads: &mut Reads) {
        while let Some(below) = reads.begin(|key| self.engine.is_pinned(key)) {
            let me = Arc::clone(self);
            self.spawn(async move {
                // A defect in a tier must not leave this flight, and its count, behind for ever.
                let landed = std::panic::AssertUnwindSafe(me.land(below))
                    .catch_unwind()
                    .await
                    .unwrap_or(Err(Reason::Device));
                me.end_read(below, landed);
            });
        }
    }

    fn end_read(self: &Arc<Self>, below: Below, landed: Landed) {
        let mut reads = self.reads.lock();
        let ended = reads.end(&below.resident.key);
        self.begin_reads(&mut reads);
        drop(reads);
        let Some((answer, asked)) = ended else { return };
        let seconds = self.clock.now().since(asked).as_secs_f64();
        let gone = landed.as_ref().err().copied();
        self.metrics.moved_up(below.tier, gone, seconds);
        // Nobody listens when every caller has gone; the block is in RAM all the same.
        let _ = answer.send(landed);
    }

    async fn land(&self, below: Below) -> Landed {
        let Below {
            tier: kind,
            resident,
            kind: budget,
        } = below;
        let Some(tier) = self.tiers.get(kind) else {
            return Err(Reason::TierDown);
        };
        loop {
            // As of now: somebody with a lease may have joined since it was queued.
            let (is_leased, is_awaited) = self.reads.lock().wanted(&resident.key);
            let patient = is_leased && is_awaited && !self.stopping.is_cancelled();
            let namespace = &resident.key.namespace;
            let Some(landing) =
                self.engine
                    .landing(namespace, resident.length_bytes, budget, is_leased)
            else {
                if !patient {
                    return Err(Reason::NoSlot);
                }
                // Room and overflow are both in the hands of readers, who will let go.
                self.clock.sleep(BUSY_PAUSE).await;
                continue;
            };
            match tier.read(resident, landing.slot).await {
                Read::Hit(block) => {
                    return self
                        .engine
                        .promoted(block, landing.ticket)
                        .ok_or(Reason::Invalidated);
                }
                Read::Gone(reason) => {
                    // A device that failed once may answer the next time; the others are for good.
                    if !matches!(reason, Reason::Device | Reason::TierDown) {
                        self.engine.lost(&resident.key, kind, reason);
                    }
                    return Err(reason);
                }
                Read::Busy if patient => self.clock.sleep(BUSY_PAUSE).await,
                Read::Busy => return Err(Reason::Overloaded),
            }
        }
    }
}
