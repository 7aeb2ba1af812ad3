//! The droppable tier on disk: foyer's block engine, and beside it all that foyer does not promise.
//!
//! ```text
//!  write  admit ─► queue (bytes) ─► flight (bytes) ─► foyer ─► in its index? ─► journal ─► Stored
//!           └ TierDown · TooLarge · Wear · QueueFull             └ no: Device, Evicted, Invalidated
//!  read   resident? ─► turn (bytes) ─► from its position, else by foyer ─► seal fits? ─► still resident? ─► Hit
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
//! | tells no positions, sums with XXH64 and copies | positions are read from its indexes, and a read goes from there to its slot, summed once |
//! | cannot list its keys | the journal lists ours; each is proven at open |
//! | tells of evictions only by asking a filter | the filter asks the [`ReclaimGuard`] and forgets in the same moment |
//! | carries entries over under their old sequence number, at which its recovery stops | what is kept is written as new |
//! | numbers an entry and then queues it, so that two at once may lie in the wrong order, with the same end | one at a time is queued |
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
//! What the guard keeps is carried over by us (store/filter.rs says why): it is served from RAM until it is
//! written anew, so a lease never waits for it. Two limits keep a disk full of leases from standing
//! still: what is in memory at once, and what is carried since the last new block. And `kill -9` in
//! between loses what is being carried: then it is dropped at open, and counted.

mod config;
mod direct;
mod extents;
mod files;
mod prepare;
mod reading;
mod residency;
mod service;
mod store;
mod writing;

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use kvgpu::SlotMut;
use kvproto::{BlockKey, NamespaceId, TierKind};
use parking_lot::{Mutex, RwLock};
use tokio::{runtime::Handle, task::AbortHandle};

pub use self::{
    config::{Geometry, MIN_CAPACITY_BYTES, NvmeConfig, NvmeError},
    reading::ReadPaths,
};
use self::{
    extents::{Extents, Reclaimed},
    prepare::{allow_open_files, prepare},
    reading::Paths,
    residency::{KeepLimits, Residency},
    service::prove,
    store::{CARRY_EXTENTS, Store, hash_of},
};
use super::{
    BlockRef, BoxFuture, Durability, Read, ReclaimGuard, Resident, Tier, TierStatus, WriteOutcome,
    gate::Gate, health::Health, owned_write, unix_day,
};
use crate::clock::Clock;

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
    /// `None`: they could not be opened, and all reads go through foyer.
    extents: Option<Arc<Extents>>,
    reclaimed: Reclaimed,
    paths: Paths,
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
        let may_open = allow_open_files(geometry);
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
        let reclaimed = Reclaimed::default();
        let (direct, books) = (prepared.direct, Arc::clone(&residency));
        let store = Store::open(&config, geometry, direct, books, reclaimed.clone()).await?;
        let extents = match may_open {
            true => Extents::open(&config.dir, geometry, direct, reclaimed.clone()),
            false => Err(io::Error::other("too few open files are allowed")),
        };
        let mut setup_note = prepared.note;
        let extents = extents.inspect_err(|error| {
            setup_note.push_str(&format!("; all reads go through foyer: {error}"));
            tracing::warn!(dir = %config.dir.display(), %error, "reads take the long way");
        });
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
            extents: extents.ok().map(Arc::new),
            reclaimed,
            paths: Paths::default(),
            read_waiters: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            direct: prepared.direct,
            setup_note,
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
        let shared = Arc::new(shared);
        shared.look_soon();
        Ok(Self { shared })
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

    /// Which ways reads went.
    #[must_use]
    pub fn read_paths(&self) -> ReadPaths {
        self.shared.paths.counts()
    }

    /// Returns when the position of what was written before is known as far as it can be: for tests.
    #[doc(hidden)]
    pub async fn look(&self) {
        let (extents, residency) = (self.shared.extents.clone(), self.shared.residency.clone());
        if let (Some(extents), Some(store)) = (extents, self.shared.store()) {
            let _ = store.blocking(move || extents.look(&residency)).await;
        }
    }

    /// Makes all positions wrong by so many bytes: for tests.
    #[doc(hidden)]
    pub fn misplace(&self, by_bytes: u32) {
        self.shared.residency.misplace(by_bytes);
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
        owned_write(&self.shared.tasks, count, async move {
            shared.write(blocks).await
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

    fn first_to_go(&self, keys: &[BlockKey]) {
        self.shared.residency.first_to_go(keys.iter().map(hash_of));
    }

    fn going(&self) -> Vec<Resident> {
        self.shared.residency.going()
    }

    fn stays(&self, keys: &[BlockKey]) {
        self.shared.residency.stays(keys.iter().map(hash_of));
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

impl Shared {
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
