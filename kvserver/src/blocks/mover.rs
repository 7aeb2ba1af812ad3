//! Moves blocks between RAM and the tiers below: everything that runs in the background.
//!
//! ```text
//!                 ┌─ read ◄── get (leased or not)          single flight per block, goes first
//!   tier ──up───► │
//!                 └─ prefetch ◄── lookup                   at most half of the reads, bounded queue
//!
//!   RAM ──down──► ┌─ write ◄── put with ack stored, synced  answered by the tier's own outcome
//!                 └─ demote, by itself: what the engine says would be lost soonest; waits while
//!                    anybody is being read to
//! ```
//!
//! Every task is owned: [`Mover::stop`] ends the loops and waits for what is under way. A caller that goes
//! away does not cancel a read that others may have joined; a block that was read is in RAM for the next one.
//! Bounds: `nvme_reads` reads hold a slot at once, `PREFETCH_QUEUE` prefetches wait, the tier's own queue
//! bounds writes, `DEMOTE_BATCH_BYTES` are demoted at a time.
//! Units: bytes, milliseconds. Errors: outcomes and reasons; what a tier refuses is counted by reason.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use kvproto::{BlockKey, Reason, TierKind};
use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore, oneshot},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::Tiers;
use crate::{
    clock::Clock,
    engine::{Below, Engine},
    server::DataDir,
    telemetry::Metrics,
    tier::{BlockRef, Read, Tier, WriteOutcome},
};

/// Prefetches that may wait; a lookup's further promotions are left to the get.
const PREFETCH_QUEUE: usize = 1024;

/// Bytes demoted in one batch: enough for a disk's full rate, little enough to get out of a read's way.
const DEMOTE_BATCH_BYTES: u64 = 16 << 20;

/// Pause between two looks for blocks to demote while there is work …
const DEMOTE_PAUSE: Duration = Duration::from_millis(20);

/// … and when there was none: lookups make blocks worth keeping without telling anybody.
const DEMOTE_IDLE: Duration = Duration::from_millis(250);

/// How long demotion waits for reads at most, so that it is slowed by them and never stopped.
const READS_FIRST: Duration = Duration::from_millis(50);

/// Shortest pause after a tier refused everything.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// Blocks a tier refused that are remembered, so that they do not stand in the way of others.
const REFUSED_BLOCKS: usize = 4096;

/// Pause before a leased read that a busy tier turned away is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// How often leases whose time is up are looked for.
const SWEEP_PAUSE: Duration = Duration::from_millis(200);

/// Why a block is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A get under a lease waits: it is never refused for want of a slot.
    Leased,
    /// A get without a lease waits.
    Asked,
    /// Nobody waits yet.
    Prefetch,
}

/// What a read brings: the block in RAM, or why not.
pub type Landed = Result<BlockRef, Reason>;

/// A read under way, shared by all who want the block.
pub type Reading = Shared<BoxFuture<'static, Landed>>;

/// The mover of one node.
pub struct Mover {
    engine: Arc<Engine>,
    tiers: Tiers,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    runtime: Handle,
    tasks: TaskTracker,
    stopping: CancellationToken,
    flights: Mutex<HashMap<BlockKey, Reading>>,
    /// Held by every read from before its slot is taken.
    reads: Semaphore,
    /// Held by prefetches besides, so that a get always finds a read free.
    prefetches: Semaphore,
    prefetching: AtomicUsize,
    /// Reads that a get waits for.
    awaited: AtomicUsize,
    writing: Mutex<HashMap<(TierKind, BlockKey), usize>>,
    work: Notify,
    /// Tasks hold the mover, and the tiers through it: the folder stays locked until the last is over.
    _data_dir: DataDir,
}

impl Mover {
    /// Starts the loops on `runtime`.
    #[must_use]
    pub(crate) fn start(
        engine: Arc<Engine>,
        tiers: Tiers,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
        runtime: Handle,
        reads: usize,
        data_dir: DataDir,
    ) -> Arc<Self> {
        let mover = Arc::new(Self {
            engine,
            tiers,
            clock,
            metrics,
            runtime,
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            flights: Mutex::new(HashMap::new()),
            reads: Semaphore::new(reads),
            prefetches: Semaphore::new((reads / 2).max(1)),
            prefetching: AtomicUsize::new(0),
            awaited: AtomicUsize::new(0),
            writing: Mutex::new(HashMap::new()),
            work: Notify::new(),
            _data_dir: data_dir,
        });
        mover.spawn(Arc::clone(&mover).sweep_leases());
        if let Some(nvme) = mover.tiers.nvme.clone() {
            mover.spawn(Arc::clone(&mover).demote(nvme));
        }
        mover
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn_on(task, &self.runtime);
    }

    /// Ends the loops and waits for the reads and writes under way.
    pub async fn stop(&self) {
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Something was stored that may have to go down.
    pub fn look_for_work(&self) {
        self.work.notify_one();
    }

    /// Brings a block up into RAM, or joins whoever does already.
    pub fn read(self: &Arc<Self>, below: Below, urgency: Urgency) -> Reading {
        let key = below.resident.key;
        let mut flights = self.flights.lock();
        if let Some(reading) = flights.get(&key) {
            return reading.clone();
        }
        let (sender, receiver) = oneshot::channel();
        let me = Arc::clone(self);
        // Counted before it runs, so that a long lookup cannot start more than the queue holds.
        self.waiting(urgency).fetch_add(1, Ordering::Relaxed);
        self.spawn(async move {
            // A defect in a tier must not leave this flight, and its count, behind for ever.
            let landed = std::panic::AssertUnwindSafe(me.bring_up(below, urgency))
                .catch_unwind()
                .await
                .unwrap_or(Err(Reason::Device));
            me.waiting(urgency).fetch_sub(1, Ordering::Relaxed);
            me.flights.lock().remove(&key);
            // Nobody listens when every caller has gone; the block is in RAM all the same.
            let _ = sender.send(landed);
        });
        let reading = receiver
            .map(|landed| landed.unwrap_or(Err(Reason::Draining)))
            .boxed()
            .shared();
        flights.insert(key, reading.clone());
        reading
    }

    /// Starts to bring up what a lookup has leased.
    pub fn prefetch(self: &Arc<Self>, wanted: Vec<Below>) {
        for below in wanted {
            if self.prefetching.load(Ordering::Relaxed) >= PREFETCH_QUEUE {
                return;
            }
            drop(self.read(below, Urgency::Prefetch));
        }
    }

    /// How many reads of that urgency are under way.
    fn waiting(&self, urgency: Urgency) -> &AtomicUsize {
        match urgency {
            Urgency::Prefetch => &self.prefetching,
            Urgency::Asked | Urgency::Leased => &self.awaited,
        }
    }

    async fn bring_up(&self, below: Below, urgency: Urgency) -> Landed {
        let started = self.clock.now();
        let landed = self.land(below, urgency).await;
        let seconds = self.clock.now().since(started).as_secs_f64();
        self.metrics
            .moved_up(below.tier, landed.as_ref().err().copied(), seconds);
        landed
    }

    async fn land(&self, below: Below, urgency: Urgency) -> Landed {
        let Below {
            tier: kind,
            resident,
            kind: budget,
        } = below;
        let Some(tier) = self.tiers.get(kind) else {
            return Err(Reason::TierDown);
        };
        let _share = match urgency {
            Urgency::Prefetch => Some(
                self.prefetches
                    .acquire()
                    .await
                    .map_err(|_| Reason::Draining)?,
            ),
            Urgency::Asked | Urgency::Leased => None,
        };
        let _turn = self.reads.acquire().await.map_err(|_| Reason::Draining)?;
        loop {
            let leased = urgency == Urgency::Leased;
            let landing = self
                .engine
                .landing(resident.length_bytes, budget, leased)
                .ok_or(Reason::NoSlot)?;
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
                Read::Busy if leased && !self.stopping.is_cancelled() => {
                    self.clock.sleep(BUSY_PAUSE).await;
                }
                Read::Busy => return Err(Reason::Overloaded),
            }
        }
    }

    /// Writes a block to a tier because a caller waits for it; answered by what the tier says.
    pub fn write(
        self: &Arc<Self>,
        tier: TierKind,
        block: BlockRef,
    ) -> oneshot::Receiver<WriteOutcome> {
        let (sender, receiver) = oneshot::channel();
        let Some(tier) = self.tiers.get(tier).cloned() else {
            let _ = sender.send(WriteOutcome::Rejected {
                reason: Reason::TierDown,
                retry_after_ms: 0,
            });
            return receiver;
        };
        let me = Arc::clone(self);
        self.spawn(async move {
            let outcomes = me.write_down(&tier, vec![block]).await;
            let _ = sender.send(outcomes[0]);
        });
        receiver
    }

    /// Whether a block is on its way to a tier.
    #[must_use]
    pub fn is_writing(&self, tier: TierKind, key: &BlockKey) -> bool {
        self.writing.lock().contains_key(&(tier, *key))
    }

    /// Writes blocks and tells the engine. What was invalidated meanwhile leaves the tier again.
    async fn write_down(&self, tier: &Arc<dyn Tier>, blocks: Vec<BlockRef>) -> Vec<WriteOutcome> {
        let kind = tier.kind();
        let _writing = Writing::new(self, kind, &blocks);
        let began = self.engine.moment();
        // Asked only now that an invalidation would see it as being written: either it was forgotten
        // before, and is not written, or it is removed together with this write.
        let present: Vec<bool> = blocks
            .iter()
            .map(|block| self.engine.is_present(block.key()))
            .collect();
        let wanted: Vec<BlockRef> = blocks
            .iter()
            .zip(&present)
            .filter(|(_, present)| **present)
            .map(|(block, _)| block.clone())
            .collect();
        let mut answers = match wanted.is_empty() {
            true => Vec::new(),
            false => tier.write(wanted).await,
        }
        .into_iter();
        let gone = WriteOutcome::Rejected {
            reason: Reason::Invalidated,
            retry_after_ms: 0,
        };
        let mut outcomes: Vec<WriteOutcome> = present
            .into_iter()
            .map(|present| {
                if present {
                    answers.next().unwrap_or(gone)
                } else {
                    gone
                }
            })
            .collect();
        let mut outlawed = Vec::new();
        for (block, outcome) in blocks.iter().zip(&mut outcomes) {
            if outcome.is_held() && !self.engine.stored(block.key(), kind, began) {
                outlawed.push(*block.key());
                *outcome = gone;
            }
            let refused = match outcome {
                WriteOutcome::Stored | WriteOutcome::Synced => None,
                WriteOutcome::Rejected { reason, .. } => Some(*reason),
            };
            self.metrics.moved_down(kind, refused);
        }
        if !outlawed.is_empty()
            && let Err(error) = tier.remove(&outlawed).await
        {
            tracing::warn!(%error, tier = %kind, "cannot record that invalidated blocks are gone");
        }
        outcomes
    }

    /// Sends down what would be lost soonest, for as long as the node runs.
    async fn demote(self: Arc<Self>, nvme: Arc<dyn Tier>) {
        let mut refused = Refused::default();
        loop {
            let pause = match self.demote_once(&nvme, &mut refused).await {
                Demoted::All => DEMOTE_PAUSE,
                Demoted::Nothing => {
                    tokio::select! {
                        () = self.stopping.cancelled() => return,
                        () = self.work.notified() => {}
                        () = self.clock.sleep(DEMOTE_IDLE) => {}
                    }
                    DEMOTE_PAUSE
                }
                Demoted::Refused(retry_after) => retry_after.max(REFUSED_PAUSE),
            };
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.clock.sleep(pause) => {}
            }
        }
    }

    async fn demote_once(&self, nvme: &Arc<dyn Tier>, refused: &mut Refused) -> Demoted {
        self.let_reads_go_first().await;
        let mut blocks = self.engine.demotable(DEMOTE_BATCH_BYTES + refused.bytes);
        let mut bytes = 0;
        blocks.retain(|block| {
            let is_first = bytes == 0;
            if refused.keys.contains(block.key()) {
                return false;
            }
            bytes += block.len_bytes();
            is_first || bytes <= DEMOTE_BATCH_BYTES
        });
        if blocks.is_empty() {
            refused.forget();
            return Demoted::Nothing;
        }
        let outcomes = self.write_down(nvme, blocks.clone()).await;
        let mut retry_after = None;
        let mut held = false;
        for (block, outcome) in blocks.iter().zip(outcomes) {
            match outcome {
                WriteOutcome::Stored | WriteOutcome::Synced => held = true,
                // Trying again will not help: it must not stand in the way of the others.
                WriteOutcome::Rejected {
                    retry_after_ms: 0, ..
                } => refused.remember(block),
                WriteOutcome::Rejected { retry_after_ms, .. } => {
                    retry_after =
                        retry_after.max(Some(Duration::from_millis(retry_after_ms.into())));
                }
            }
        }
        match retry_after {
            Some(retry_after) if !held => Demoted::Refused(retry_after),
            _ => Demoted::All,
        }
    }

    async fn let_reads_go_first(&self) {
        let mut waited = Duration::ZERO;
        while self.awaited.load(Ordering::Relaxed) > 0 && waited < READS_FIRST {
            self.clock.sleep(BUSY_PAUSE).await;
            waited += BUSY_PAUSE;
        }
    }

    async fn sweep_leases(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.clock.sleep(SWEEP_PAUSE) => {}
            }
            self.engine.expire_leases(self.clock.now());
        }
    }
}

/// How a batch of demotions went.
enum Demoted {
    All,
    Nothing,
    Refused(Duration),
}

/// Blocks that a tier will not take.
#[derive(Default)]
struct Refused {
    keys: HashSet<BlockKey>,
    bytes: u64,
}

impl Refused {
    fn remember(&mut self, block: &BlockRef) {
        if self.keys.len() >= REFUSED_BLOCKS {
            self.forget();
        }
        if self.keys.insert(*block.key()) {
            self.bytes += block.len_bytes();
        }
    }

    fn forget(&mut self) {
        *self = Self::default();
    }
}

/// Blocks on their way to a tier, until it is dropped.
struct Writing<'a> {
    mover: &'a Mover,
    entries: Vec<(TierKind, BlockKey)>,
}

impl<'a> Writing<'a> {
    fn new(mover: &'a Mover, tier: TierKind, blocks: &[BlockRef]) -> Self {
        let entries: Vec<_> = blocks.iter().map(|block| (tier, *block.key())).collect();
        let mut writing = mover.writing.lock();
        for entry in &entries {
            *writing.entry(*entry).or_insert(0) += 1;
        }
        drop(writing);
        Self { mover, entries }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let mut writing = self.mover.writing.lock();
        for entry in &self.entries {
            if let Some(count) = writing.get_mut(entry) {
                *count -= 1;
                if *count == 0 {
                    writing.remove(entry);
                }
            }
        }
    }
}
