//! The droppable tier on disk: foyer's block engine, and beside it all that foyer does not promise.
//!
//! ```text
//!  write  admit ─► queue (bytes) ─► flight (bytes) ─► foyer ─► in its index? ─► journal ─► Stored
//!           └ TierDown · TooLarge · Wear · QueueFull             └ no: Device, Evicted, Invalidated
//!  read   resident? ─► turn (bytes) ─► foyer decodes into the slot ─► seal fits? ─► still resident? ─► Hit
//!           └ Evicted     └ Busy          └ Device, Corrupt: forgotten, counted
//!
//!  <dir>/lock        who has it          <dir>/journal     who lives here (journal.rs)
//!  <dir>/extents/    foyer's files, one per extent, reserved at open
//! ```
//!
//! | foyer | here |
//! |---|---|
//! | drops what does not fit its queue or an extent, and only moves a counter | bytes are bounded before it, length is checked before it, and `Stored` is said after its index was asked |
//! | brings deleted keys back after a restart | only what the journal says is resident is ever read |
//! | keeps serving what is deleted while it is queued | a removal cancels the write: it ends as `Invalidated` |
//! | cannot list its keys | the journal lists ours; each is proven at open |
//! | tells of evictions only by asking a filter | the filter asks the [`ReclaimGuard`] and forgets in the same moment |
//! | carries entries over under their old sequence number, at which its recovery stops | what is kept is written as new |
//! | loses its write position after a failed write | the breaker opens at once, and foyer is built anew before writing again |
//! | `open` leaves sparse files | space is reserved before, so a full disk shows at open |
//!
//! Units: bytes, milliseconds. Every queue has a bound and every call a deadline; on a hung disk a read
//! ends as `Device`, and the disk's threads are not the node's.
//!
//! Power loss: entries are written but not synced, so after power loss some of them may be damaged:
//! reads find that and answer `Corrupt`. Invalidations are synced. Who needs more asks for `synced` and
//! the durable store.
//!
//! What the guard keeps is carried over by us (store.rs says why): it is served from RAM until it is
//! written anew, so a lease never waits for it. Two limits keep a disk full of leases from standing
//! still: what is in memory at once, and what is carried since the last new block. And `kill -9` in
//! between loses what is being carried: then it is dropped at open, and counted.

mod config;
mod residency;
mod store;

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use kvgpu::SlotMut;
use kvproto::{BlockKey, NamespaceId, Reason, TierKind};
use parking_lot::{Mutex, RwLock};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, oneshot},
    task::AbortHandle,
};

pub use self::config::{Geometry, MIN_CAPACITY_BYTES, NvmeConfig, NvmeError};
use self::{
    residency::{Begin, KeepLimits, Residency, Wear},
    store::{CARRY_EXTENTS, Loaded, Store, hash_of},
};
use super::{
    BlockRef, BoxFuture, Durability, Read, ReclaimGuard, Resident, Tier, TierStatus, WriteOutcome,
    gate::{Gate, within},
    health::Health,
    journal::{Entry, Journal, Tail},
};
use crate::clock::Clock;

const DAY_MS: u64 = 86_400_000;
/// Open files left for everything else when the limit has to be raised for the extents.
const SPARE_FILES: u64 = 4096;
/// What a closing tier waits for at most.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// The NVMe tier. Cheap to clone by `Arc`; dropping the last stops its threads.
pub struct NvmeTier {
    shared: Arc<Shared>,
}

/// What was found when a tier was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Blocks that are there, proven.
    pub blocks: u64,
    /// Blocks that the journal knew and foyer did not: dropped.
    pub dropped: u64,
    /// The journal could not be believed, or was written for other extents: started empty.
    pub started_cold: bool,
}

struct Shared {
    config: NvmeConfig,
    geometry: Geometry,
    clock: Arc<dyn Clock>,
    residency: Arc<Residency>,
    health: Health,
    store: RwLock<Option<Arc<Store>>>,
    queue: Gate,
    flight: Gate,
    turns: Gate,
    read_waiters: AtomicUsize,
    closed: AtomicBool,
    direct: bool,
    setup_note: String,
    recovered: Recovered,
    tasks: Handle,
    prober: Mutex<Option<AbortHandle>>,
    lock: Mutex<Option<File>>,
}

impl NvmeTier {
    /// Opens the tier: takes the folder, reserves its space, recovers foyer's index, reads the journal
    /// and proves every entry. `guard` is asked before a resident makes room.
    ///
    /// Must be called within a tokio runtime; background work is spawned there.
    ///
    /// # Errors
    /// [`NvmeError`]: a wrong setting, the folder in use, no space, or the disk's own error.
    pub async fn open(
        config: NvmeConfig,
        clock: Arc<dyn Clock>,
        guard: Arc<dyn ReclaimGuard>,
    ) -> Result<Self, NvmeError> {
        let geometry = config.geometry()?;
        allow_open_files(u64::from(geometry.extents) + SPARE_FILES);
        let today = unix_day(&*clock);
        let prepared = tokio::task::spawn_blocking({
            let config = config.clone();
            move || prepare(&config, geometry, today)
        });
        let prepared = prepared.await.map_err(|error| NvmeError::Store {
            problem: error.to_string(),
        })??;
        let limits = KeepLimits {
            since_new_bytes: geometry.capacity_bytes() / 2,
            moving_bytes: CARRY_EXTENTS * geometry.extent_bytes,
        };
        let residency = Residency::new(
            prepared.residents,
            prepared.wear,
            prepared.journal,
            guard,
            limits,
        );
        let residency = Arc::new(residency);
        let store = Store::open(&config, geometry, prepared.direct, Arc::clone(&residency)).await?;
        let dropped = prove(&residency, &store);
        let (blocks, _) = residency.usage();
        let mut shared = Shared {
            queue: Gate::new(config.queue_bytes),
            flight: Gate::new(config.flight_bytes),
            turns: Gate::new(config.read_bytes),
            health: Health::new(Duration::from_millis(config.cooldown_ms)),
            geometry,
            clock,
            residency,
            store: RwLock::new(Some(Arc::new(store))),
            read_waiters: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            direct: prepared.direct,
            setup_note: prepared.note,
            recovered: Recovered {
                blocks,
                dropped,
                started_cold: prepared.started_cold,
            },
            tasks: Handle::current(),
            prober: Mutex::new(None),
            lock: Mutex::new(Some(prepared.lock)),
            config,
        };
        if shared.recovered.started_cold || dropped > 0 || shared.residency.journal.is_broken() {
            let residency = Arc::clone(&shared.residency);
            let rewritten = tokio::task::spawn_blocking(move || {
                residency.journal.rewrite(|| residency.truth())
            })
            .await;
            if let Ok(Err(source)) = rewritten {
                let path = shared.config.dir.join("journal");
                return Err(NvmeError::Io {
                    what: "write",
                    path,
                    source,
                });
            }
        }
        if shared.geometry.capacity_bytes() < shared.config.capacity_bytes / 10 * 9 {
            shared
                .setup_note
                .push_str("; a tenth of the capacity is lost to whole extents");
        }
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// What was found at open.
    #[must_use]
    pub fn recovered(&self) -> Recovered {
        self.shared.recovered
    }

    /// How the capacity is cut; [`Geometry::fits`] says whether a block can be stored at all.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    /// Occupies all of the tier's disk threads until the answer is dropped, as a disk does that answers
    /// nothing: for tests.
    #[doc(hidden)]
    #[must_use]
    pub fn hang_disk(&self) -> HungDisk {
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        if let Some(store) = self.shared.store() {
            for _ in 0..self.shared.config.reads + 4 {
                let held = Arc::clone(&held);
                // The threads queue for the receiver, and all end when its sender is gone.
                drop(store.blocking(move || held.lock().recv()));
            }
        }
        HungDisk { _release: release }
    }
}

/// See [`NvmeTier::hang_disk`].
#[doc(hidden)]
pub struct HungDisk {
    _release: std::sync::mpsc::Sender<()>,
}

impl std::fmt::Debug for NvmeTier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NvmeTier")
            .field("dir", &self.shared.config.dir)
            .finish_non_exhaustive()
    }
}

impl Tier for NvmeTier {
    fn kind(&self) -> TierKind {
        TierKind::Nvme
    }

    fn durability(&self) -> Durability {
        Durability::Droppable
    }

    fn write(&self, blocks: Vec<BlockRef>) -> BoxFuture<'static, Vec<WriteOutcome>> {
        let shared = Arc::clone(&self.shared);
        let count = blocks.len();
        // A task of its own, so that a caller who goes away leaves no write half accounted for.
        let task = self
            .shared
            .tasks
            .spawn(async move { shared.write(blocks).await });
        Box::pin(async move {
            let down = WriteOutcome::Rejected {
                reason: Reason::TierDown,
                retry_after_ms: 0,
            };
            task.await.unwrap_or_else(|_| vec![down; count])
        })
    }

    fn read(&self, resident: Resident, into: SlotMut) -> BoxFuture<'static, Read> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.read(resident, into).await })
    }

    fn remove(&self, keys: &[BlockKey]) -> BoxFuture<'static, io::Result<()>> {
        let store = self.shared.store();
        for key in keys {
            self.shared.residency.remove(hash_of(key), key);
            if let Some(store) = &store {
                store.delete(key);
            }
        }
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.seal_removal().await })
    }

    fn remove_namespace(&self, namespace: NamespaceId) -> BoxFuture<'static, io::Result<()>> {
        let store = self.shared.store();
        for key in self.shared.residency.remove_namespace(namespace) {
            if let Some(store) = &store {
                store.delete(&key);
            }
        }
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.seal_removal().await })
    }

    fn residents(&self) -> Vec<Resident> {
        self.shared.residency.residents()
    }

    fn status(&self) -> TierStatus {
        self.shared.status()
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.close().await })
    }
}

/// A block on its way through foyer.
struct Flying {
    at: usize,
    hash: u64,
    key: BlockKey,
    done: oneshot::Receiver<()>,
}

impl Shared {
    async fn write(self: &Arc<Self>, blocks: Vec<BlockRef>) -> Vec<WriteOutcome> {
        let mut outcomes = vec![None; blocks.len()];
        let mut flying = Vec::new();
        let deadline = Duration::from_millis(self.config.write_deadline_ms);
        for (at, block) in blocks.into_iter().enumerate() {
            let queued = match self.admit(&block) {
                Ok(queued) => queued,
                // The queue may be full of this call's own blocks: wait for them, then try once more.
                Err((Reason::QueueFull, _)) if !flying.is_empty() => {
                    self.land(std::mem::take(&mut flying), &mut outcomes).await;
                    match self.admit(&block) {
                        Ok(queued) => queued,
                        Err(refused) => {
                            outcomes[at] = Some(self.refuse(refused));
                            continue;
                        }
                    }
                }
                Err(refused) => {
                    outcomes[at] = Some(self.refuse(refused));
                    continue;
                }
            };
            let resident = Resident::of(&block);
            let hash = hash_of(&resident.key);
            match self.residency.begin(hash, resident) {
                Begin::Write => {}
                Begin::Held => {
                    outcomes[at] = Some(WriteOutcome::Stored);
                    continue;
                }
                Begin::Busy => {
                    outcomes[at] = Some(self.refuse((Reason::QueueFull, 10)));
                    continue;
                }
                Begin::Collides => {
                    outcomes[at] = Some(self.refuse((Reason::Admission, 0)));
                    continue;
                }
            }
            let entry_bytes = self.geometry.entry_bytes(resident.length_bytes);
            let today = unix_day(&*self.clock);
            if !self
                .residency
                .charge(today, entry_bytes, self.config.wear_bytes_per_day)
            {
                let _ = self.residency.finish(hash, false);
                let until_midnight = DAY_MS - self.clock.unix_ms() % DAY_MS;
                outcomes[at] = Some(self.refuse((Reason::Wear, until_midnight as u32)));
                continue;
            }
            let flight = self.flight.enter(entry_bytes);
            let flight = within(&*self.clock, deadline, flight).await.flatten();
            let (Some(flight), Some(store)) = (flight, self.store()) else {
                let _ = self.residency.finish(hash, false);
                self.write_failed("writes do not finish");
                outcomes[at] = Some(self.refuse((Reason::Device, self.config.cooldown_ms as u32)));
                continue;
            };
            let done = store.enqueue(block, vec![queued, flight]);
            flying.push(Flying {
                at,
                hash,
                key: resident.key,
                done,
            });
        }
        self.land(flying, &mut outcomes).await;
        outcomes
            .into_iter()
            .map(|outcome| outcome.expect("every block was answered"))
            .collect()
    }

    /// Whether this block may be written now; if so, its part of the queue.
    fn admit(&self, block: &BlockRef) -> Result<OwnedSemaphorePermit, (Reason, u32)> {
        if self.closed.load(Relaxed) {
            return Err((Reason::TierDown, 0));
        }
        if let Some(wait) = self.health.writes_down(self.clock.now()) {
            return Err((Reason::TierDown, wait.as_millis().max(1) as u32));
        }
        if !self.geometry.fits(block.len_bytes()) {
            return Err((Reason::TooLarge, 0));
        }
        let queued = self
            .queue
            .try_enter(self.geometry.entry_bytes(block.len_bytes()));
        queued.ok_or_else(|| (Reason::QueueFull, self.queue.retry_after_ms()))
    }

    fn refuse(&self, (reason, retry_after_ms): (Reason, u32)) -> WriteOutcome {
        self.residency.count(reason, 1);
        WriteOutcome::Rejected {
            reason,
            retry_after_ms,
        }
    }

    /// Waits until foyer has finished with these blocks, asks its index for each, notes those that are
    /// there, and only then answers.
    async fn land(self: &Arc<Self>, flying: Vec<Flying>, outcomes: &mut [Option<WriteOutcome>]) {
        if flying.is_empty() {
            return;
        }
        let deadline = Duration::from_millis(self.config.write_deadline_ms);
        let (mut dones, mut flights) = (Vec::new(), Vec::new());
        for flight in flying {
            dones.push(flight.done);
            flights.push((flight.at, flight.hash, flight.key));
        }
        let all_done = within(
            &*self.clock,
            deadline,
            futures_util::future::join_all(dones),
        )
        .await
        .is_some();
        let store = self.store();
        let mut stored = Vec::new();
        let mut failed = !all_done;
        for (at, hash, key) in flights {
            let proven = all_done && store.as_ref().is_some_and(|store| store.contains(&key));
            match self.residency.finish(hash, proven) {
                Ok(()) => stored.push((at, hash, key)),
                Err(reason) => {
                    failed |= reason == Reason::Device;
                    if proven && let Some(store) = &store {
                        store.delete(&key);
                    }
                    let retry_after_ms = if reason == Reason::Invalidated { 0 } else { 1 };
                    outcomes[at] = Some(self.refuse((reason, retry_after_ms)));
                }
            }
        }
        self.residency.note_wear();
        let journaled = stored.is_empty() || self.flush_journal(false).await.is_ok();
        for (at, hash, key) in stored {
            if journaled {
                outcomes[at] = Some(WriteOutcome::Stored);
                continue;
            }
            // Readable now, but nobody would know of it after a restart: that is not `Stored`.
            failed = true;
            self.residency.forget(hash, &key);
            if let Some(store) = &store {
                store.delete(&key);
            }
            outcomes[at] = Some(self.refuse((Reason::Device, self.config.cooldown_ms as u32)));
        }
        if failed {
            self.write_failed(if all_done {
                "a write was lost (disk full, read-only or failing?)"
            } else {
                "writes do not finish"
            });
        }
    }

    async fn read(self: &Arc<Self>, resident: Resident, into: SlotMut) -> Read {
        if self.closed.load(Relaxed) || self.health.reads_down() {
            return Read::Gone(Reason::TierDown);
        }
        let hash = hash_of(&resident.key);
        if !self.residency.holds(hash, &resident) {
            return Read::Gone(Reason::Evicted);
        }
        let Some(_waiting) = Waiting::join(
            &self.read_waiters,
            self.config.read_queue + self.config.reads,
        ) else {
            return Read::Busy;
        };
        let deadline = Duration::from_millis(self.config.read_deadline_ms);
        match within(
            &*self.clock,
            deadline,
            self.read_in_turn(hash, resident, into),
        )
        .await
        {
            Some(read) => read,
            None => {
                self.read_failed("reads take longer than their deadline");
                Read::Gone(Reason::Device)
            }
        }
    }

    async fn read_in_turn(self: &Arc<Self>, hash: u64, resident: Resident, slot: SlotMut) -> Read {
        // Bytes bound the buffers, and a floor under them bounds the number of reads.
        let floor = self.config.read_bytes / self.config.reads as u64;
        let wanted = self.geometry.entry_bytes(resident.length_bytes).max(floor);
        let Some(_turn) = self.turns.enter(wanted).await else {
            return Read::Gone(Reason::TierDown);
        };
        let Some(store) = self.store() else {
            return Read::Gone(Reason::TierDown);
        };
        let removals = self.residency.removals();
        let loaded = {
            let _reading = self.residency.reading(hash);
            store.load(resident, slot).await
        };
        if !matches!(loaded, Loaded::Failed(_)) {
            self.health.read_worked();
        }
        let reason = match loaded {
            // Its place may have been reclaimed meanwhile; what was read is whole and verified all the same.
            Loaded::Block(block)
                if self.residency.removals() == removals
                    || self.residency.holds(hash, &resident) =>
            {
                return Read::Hit(block);
            }
            Loaded::Block(_) => return Read::Gone(Reason::Invalidated),
            Loaded::Corrupt => Reason::Corrupt,
            Loaded::Missing | Loaded::Other => Reason::Evicted,
            Loaded::Failed(why) => {
                self.read_failed(&why);
                return Read::Gone(Reason::Device);
            }
        };
        if !self.residency.lose(hash, &resident, reason) {
            return Read::Gone(Reason::Evicted);
        }
        store.delete(&resident.key);
        Read::Gone(reason)
    }

    /// Makes the removals noted so far durable.
    async fn seal_removal(self: &Arc<Self>) -> io::Result<()> {
        let sealed = self.flush_journal(true).await;
        if let Err(error) = &sealed {
            self.write_failed(&format!("the journal cannot be written: {error}"));
        }
        sealed
    }

    /// Writes the journal's pending records, on the disk's own threads and within the deadline; rewrites
    /// it when it has grown too long.
    async fn flush_journal(self: &Arc<Self>, sync: bool) -> io::Result<()> {
        let residency = Arc::clone(&self.residency);
        let work = move || {
            residency.journal.flush(sync)?;
            if residency.journal.wants_rewrite(residency.usage().0) {
                residency.journal.rewrite(|| residency.truth())?;
            }
            Ok(())
        };
        let Some(store) = self.store() else {
            return Err(io::Error::other("the tier is closed"));
        };
        let deadline = Duration::from_millis(self.config.write_deadline_ms);
        match within(&*self.clock, deadline, store.blocking(work)).await {
            Some(Ok(flushed)) => flushed,
            Some(Err(error)) => Err(io::Error::other(error)),
            None => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn write_failed(self: &Arc<Self>, why: &str) {
        if self.health.write_failed(self.clock.now(), why) {
            self.go_down(why);
        }
    }

    fn read_failed(self: &Arc<Self>, why: &str) {
        self.residency.count(Reason::Device, 1);
        if self.health.read_failed(self.clock.now(), why) {
            self.go_down(why);
        }
    }

    /// Starts the prober that will bring the tier back.
    fn go_down(self: &Arc<Self>, why: &str) {
        tracing::warn!(dir = %self.config.dir.display(), why, "the NVMe tier is out of service");
        let weak = Arc::downgrade(self);
        let clock = Arc::clone(&self.clock);
        let wait = self.health.cooldown();
        let task = self
            .tasks
            .spawn(async move { probe(weak, clock, wait).await });
        if let Some(before) = self.prober.lock().replace(task.abort_handle()) {
            before.abort();
        }
    }

    /// Tries the disk; if it works, builds foyer anew and proves what it has.
    async fn come_back(self: &Arc<Self>) -> Result<(), String> {
        let dir = self.config.dir.clone();
        let residency = Arc::clone(&self.residency);
        let deadline = Duration::from_millis(self.config.write_deadline_ms);
        // The node's threads: foyer's may all be stuck. One probe at a time, so it can hold only one.
        let disk = tokio::task::spawn_blocking(move || {
            store::probe_disk(&dir)?;
            residency.journal.rewrite(|| residency.truth())
        });
        match within(&*self.clock, deadline, disk).await {
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => return Err(error.to_string()),
            Some(Err(error)) => return Err(error.to_string()),
            None => return Err("the disk does not answer".to_owned()),
        }
        if let Some(old) = self.store() {
            // What it still reclaims should end before another foyer reads the files; if it cannot, its
            // threads are left behind and its entries are checked like any other.
            let _ = within(&*self.clock, CLOSE_DEADLINE, old.close()).await;
        }
        let opened = Store::open(
            &self.config,
            self.geometry,
            self.direct,
            Arc::clone(&self.residency),
        );
        let store = match within(&*self.clock, deadline, opened).await {
            Some(Ok(store)) => store,
            Some(Err(error)) => return Err(error.to_string()),
            None => return Err("the store does not open in time".to_owned()),
        };
        if self.closed.load(Relaxed) {
            return Err("closed".to_owned());
        }
        prove(&self.residency, &store);
        *self.store.write() = Some(Arc::new(store));
        Ok(())
    }

    async fn close(self: &Arc<Self>) {
        if self.closed.swap(true, Relaxed) {
            return;
        }
        if let Some(prober) = self.prober.lock().take() {
            prober.abort();
        }
        // Every write holds a part of the queue until foyer has finished with it.
        let _drained = within(&*self.clock, CLOSE_DEADLINE, self.queue.clear()).await;
        if let Err(error) = self.flush_journal(true).await {
            tracing::warn!(%error, "the NVMe journal could not be closed cleanly");
        }
        let store = self.store.write().take();
        if let Some(store) = store {
            let _ = within(&*self.clock, CLOSE_DEADLINE, store.close()).await;
        }
        self.turns.close();
        self.lock.lock().take();
    }

    fn status(&self) -> TierStatus {
        let (blocks, used_bytes) = self.residency.usage();
        let closed = self.closed.load(Relaxed);
        let why = if closed {
            Some("closed".to_owned())
        } else {
            self.health.why()
        };
        TierStatus {
            capacity_bytes: self.geometry.capacity_bytes(),
            used_bytes,
            blocks,
            in_service: why.is_none(),
            note: why.map_or_else(
                || self.setup_note.clone(),
                |why| format!("{why}; {}", self.setup_note),
            ),
            queued_bytes: self.queue.inside_bytes(),
            written_bytes_today: self.residency.written_today(unix_day(&*self.clock)),
            drops: self.residency.drops(),
        }
    }

    fn store(&self) -> Option<Arc<Store>> {
        self.store.read().clone()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(prober) = self.prober.lock().take() {
            prober.abort();
        }
        // What reclaim noted last; without it the next open would find out by asking foyer.
        let _ = self.residency.journal.flush(false);
    }
}

/// Waits out the cool-down, tries the tier, and again, until it works or is gone.
async fn probe(shared: Weak<Shared>, clock: Arc<dyn Clock>, mut wait: Duration) {
    loop {
        clock.sleep(wait).await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        match shared.come_back().await {
            Ok(()) => {
                tracing::info!(dir = %shared.config.dir.display(), "the NVMe tier is in service again");
                shared.health.up();
                return;
            }
            Err(why) => wait = shared.health.still_down(shared.clock.now(), &why),
        }
    }
}

/// Drops every resident that foyer does not have; answers how many.
fn prove(residency: &Residency, store: &Store) -> u64 {
    let mut dropped = 0;
    for (hash, resident) in residency.hashes() {
        if !store.contains(&resident.key) && residency.lose(hash, &resident, Reason::Evicted) {
            dropped += 1;
        }
    }
    dropped
}

/// What is ready before foyer is built.
struct Prepared {
    lock: File,
    journal: Journal,
    residents: HashMap<u64, Resident>,
    wear: Wear,
    direct: bool,
    started_cold: bool,
    note: String,
}

/// Takes the folder, reads the journal and reserves the space. Blocks.
fn prepare(config: &NvmeConfig, geometry: Geometry, today: u32) -> Result<Prepared, NvmeError> {
    let dir = &config.dir;
    let fault = |what, path: &std::path::Path| {
        let path = path.to_owned();
        move |source| NvmeError::Io { what, path, source }
    };
    fs::create_dir_all(dir).map_err(fault("make", dir))?;
    let lock_path = dir.join("lock");
    let lock = File::create(&lock_path).map_err(fault("make", &lock_path))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| NvmeError::InUse { dir: dir.clone() })?;

    let mut residents = HashMap::new();
    let mut wear = Wear::default();
    let path = dir.join("journal");
    let (journal, found) = Journal::open(&path, geometry.extent_bytes, |entry| match entry {
        Entry::Stored(resident) => {
            residents.insert(hash_of(&resident.key), resident);
        }
        Entry::Gone(key) | Entry::Invalidated(key) => {
            let hash = hash_of(&key);
            if residents
                .get(&hash)
                .is_some_and(|held: &Resident| held.key == key)
            {
                residents.remove(&hash);
            }
        }
        Entry::InvalidatedNamespace(namespace) => {
            residents.retain(|_, held: &mut Resident| held.key.namespace != namespace);
        }
        Entry::Wear { day, bytes } => wear = Wear { day, bytes },
    })
    .map_err(fault("open", &path))?;
    let other_extents = found.extent_bytes != 0 && found.extent_bytes != geometry.extent_bytes;
    let damaged = found.tail == Tail::Damaged;
    if other_extents || damaged {
        residents.clear();
    }
    if wear.day != today {
        wear = Wear {
            day: today,
            bytes: 0,
        };
    }
    // Without a journal nothing in the files is known; with other extents nothing is where it was.
    let no_journal = found.extent_bytes == 0;
    let space_note = store::prepare_files(config, geometry, other_extents || no_journal)?;
    let direct = config.direct_io && store::direct_io_works(dir);
    let mut notes = vec![match (direct, config.direct_io) {
        (true, _) => "direct I/O",
        (false, true) => "buffered I/O: the file system does not take direct I/O",
        (false, false) => "buffered I/O as configured",
    }];
    notes.extend(space_note);
    if damaged {
        notes.push("the journal was damaged: started empty");
    } else if other_extents {
        notes.push("the extent size has changed: started empty");
    }
    let started_cold = other_extents || damaged;
    Ok(Prepared {
        lock,
        journal,
        residents,
        wear,
        direct,
        started_cold,
        note: notes.join("; "),
    })
}

/// Raises the soft limit of open files towards what the extents need; foyer keeps each of them open. What
/// the hard limit does not allow shows as an error when they are opened.
fn allow_open_files(wanted: u64) {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = Some(limit.maximum.map_or(wanted, |most| most.min(wanted)));
        let _ = setrlimit(Resource::Nofile, limit);
    }
}

fn unix_day(clock: &dyn Clock) -> u32 {
    (clock.unix_ms() / DAY_MS) as u32
}

/// One reader in the waiting room.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn join(room: &'a AtomicUsize, seats: usize) -> Option<Self> {
        if room.fetch_add(1, Relaxed) >= seats {
            room.fetch_sub(1, Relaxed);
            return None;
        }
        Some(Self(room))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
