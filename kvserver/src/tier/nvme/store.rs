//! foyer's block engine, as far as the tier uses it.
//!
//! ```text
//! write   BlockRef ─encode─► foyer's aligned buffer ─one write per batch─► extent     (one copy)
//! read    extent ─► foyer's aligned buffer ─decode─► the reader's SlotMut, summed     (one copy)
//! ```
//!
//! This read is for entries whose position is not known, or was wrong; the others go by `direct.rs`.
//!
//! foyer's `Code::decode` is told nothing but where the bytes are. Where they shall *go* it finds in a
//! task-local [`Landing`] that [`Store::load`] sets around the very future in which foyer decodes: no
//! registry, no copy, and two readers of one key cannot be mixed up.
//!
//! When foyer has let go of a written value, its [`StoredValue`] is dropped, and that is the signal that
//! the write is over, one way or the other. Whether it succeeded only the index tells
//! ([`Store::contains`]).
//!
//! What is used and what is not (facts in `tests/tests/foyer_facts.rs`): positional reads and writes on a
//! runtime of our own, so that a stuck disk holds its threads and not the node's; no memory part; no
//! compression (the builder's setting never arrives), no tombstone log (it forgets its position), never
//! `clear` (it breaks the accounting), not the io_uring engine (it spins). One flusher, so that entries
//! lie in the order of their writes.

use std::{
    fs::{self, File, OpenOptions},
    hash::{BuildHasher, Hash, Hasher},
    io::{self, Read as _},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use foyer::{
    BlockEngineConfig, Code, DefaultHasher, DeviceBuilder, FifoPicker, FsDeviceBuilder,
    HybridCache, HybridCacheBuilder, HybridCachePolicy, InvalidRatioPicker, Load,
    PsyncIoEngineConfig, RecoverMode, Spawner, Statistics, StorageFilter, StorageFilterCondition,
    StorageFilterResult,
};
use kvgpu::SlotMut;
use kvproto::{BlockKey, Reason};
use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, OFlags};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, oneshot},
};

use super::{
    super::{
        Resident,
        block::{BlockRef, SealedBlock},
        land::{Landed, land},
        record,
        threads::DiskThreads,
    },
    config::{Geometry, NvmeConfig, NvmeError, PAGE},
    extents::Reclaimed,
    residency::{Reclaim, Residency},
};

/// Extents' worth of carried-over entries for which the flush buffer has room.
pub(super) const CARRY_EXTENTS: u64 = 3;

/// How long reclaim waits for readers of an entry that is kept. A read takes a millisecond.
const READER_PATIENCE: Duration = Duration::from_secs(2);

/// foyer's own file names; one file per extent.
const FILE_PREFIX: &str = "foyer-storage-direct-fs-";

/// A key, hashed by bytes that no compiler version changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct StoredKey(BlockKey);

impl Hash for StoredKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0.to_bytes());
    }
}

impl Code for StoredKey {
    fn encode(&self, writer: &mut impl io::Write) -> foyer::Result<()> {
        writer
            .write_all(&self.0.to_bytes())
            .map_err(foyer::Error::io_error)
    }

    fn decode(reader: &mut impl io::Read) -> foyer::Result<Self> {
        let mut bytes = [0; BlockKey::BYTES];
        reader
            .read_exact(&mut bytes)
            .map_err(foyer::Error::io_error)?;
        Ok(Self(BlockKey::from_bytes(&bytes)))
    }

    fn estimated_size(&self) -> usize {
        BlockKey::BYTES
    }
}

/// The hash by which foyer, and so the tier, knows a key.
pub(super) fn hash_of(key: &BlockKey) -> u64 {
    DefaultHasher::default().hash_one(StoredKey(*key))
}

/// What foyer is given to write; dropped when it has finished with it.
struct StoredValue {
    /// `None` for a value that was decoded: its bytes are in the landing.
    block: Option<BlockRef>,
    /// Held so that they end with foyer's work, whoever waits for it.
    _permits: Vec<OwnedSemaphorePermit>,
    _done: Option<oneshot::Sender<()>>,
}

impl Code for StoredValue {
    fn encode(&self, writer: &mut impl io::Write) -> foyer::Result<()> {
        let Some(block) = &self.block else {
            return Err(foyer::Error::new(
                foyer::ErrorKind::Unsupported,
                "a value that was read is not written",
            ));
        };
        writer
            .write_all(&record::encode_head(block.header()))
            .map_err(foyer::Error::io_error)?;
        writer
            .write_all(block.bytes())
            .map_err(foyer::Error::io_error)
    }

    fn decode(reader: &mut impl io::Read) -> foyer::Result<Self> {
        let landed = LANDING
            .try_with(|landing| landing.lock().land(reader))
            .unwrap_or(false);
        if !landed {
            // The landing knows why.
            return Err(foyer::Error::new(foyer::ErrorKind::Parse, "record refused"));
        }
        Ok(Self {
            block: None,
            _permits: Vec::new(),
            _done: None,
        })
    }

    fn estimated_size(&self) -> usize {
        self.block
            .as_ref()
            .map_or(0, |block| record::record_bytes(block.len_bytes()) as usize)
    }
}

tokio::task_local! {
    /// Where the value that is decoded in this task shall land.
    static LANDING: Arc<Mutex<Landing>>;
}

struct Landing {
    resident: Resident,
    slot: Option<SlotMut>,
    landed: Option<Loaded>,
}

/// What a load came to.
#[allow(
    clippy::large_enum_variant,
    reason = "a block is the rule, and moving it beats boxing it"
)]
pub(super) enum Loaded {
    /// Verified, in the reader's slot.
    Block(SealedBlock),
    /// The bytes are not those that were written.
    Corrupt,
    /// Another block, or another version of this one, lies where this one was.
    Other,
    /// foyer does not have it.
    Missing,
    /// The disk failed.
    Failed(String),
}

impl Landing {
    /// Reads a record into the slot and verifies it. Answers whether it landed.
    fn land(&mut self, reader: &mut impl io::Read) -> bool {
        let Some(slot) = self.slot.take() else {
            return false;
        };
        let landed = match land(reader, &self.resident, slot) {
            Landed::Block(block) => Loaded::Block(block),
            Landed::Corrupt => Loaded::Corrupt,
            Landed::Other => Loaded::Other,
            Landed::Failed(error) => Loaded::Failed(error.to_string()),
        };
        let good = matches!(landed, Loaded::Block(_));
        self.landed = Some(landed);
        good
    }
}

/// foyer's cache, as we use it. Cheap to clone.
#[derive(Clone)]
struct Foyer {
    cache: HybridCache<StoredKey, StoredValue>,
    /// Held while a block is queued: foyer numbers it first and queues it then, and where two change places in between,
    /// its recovery leaves the extent at the number that goes back, with all that was stored behind it.
    in_order: Arc<Mutex<()>>,
}

impl Foyer {
    fn contains(&self, key: &BlockKey) -> bool {
        self.cache.storage().may_contains(&StoredKey(*key))
    }

    fn delete(&self, key: &BlockKey) {
        self.cache.storage().delete(&StoredKey(*key));
    }

    /// Queues a block; the receiver ends (with an error, as nothing is sent) when foyer has finished
    /// with it, whatever became of it.
    fn enqueue(
        &self,
        block: BlockRef,
        permits: Vec<OwnedSemaphorePermit>,
    ) -> oneshot::Receiver<()> {
        let key = StoredKey(*block.key());
        let (done, receiver) = oneshot::channel();
        let value = StoredValue {
            block: Some(block),
            _permits: permits,
            _done: Some(done),
        };
        let _in_order = self.in_order.lock();
        drop(self.cache.storage_writer(key).force().insert(value));
        receiver
    }

    async fn load(&self, resident: Resident, slot: SlotMut) -> Loaded {
        let key = StoredKey(resident.key);
        let landing = Arc::new(Mutex::new(Landing {
            resident,
            slot: Some(slot),
            landed: None,
        }));
        let known = self.contains(&resident.key);
        let loaded = LANDING
            .scope(Arc::clone(&landing), self.cache.storage().load(&key))
            .await;
        let mut landing = landing.lock();
        if let Some(landed) = landing.landed.take() {
            return landed;
        }
        match loaded {
            // foyer thought that it had it, and then found its own checksum wrong.
            Ok(Load::Miss) if known => Loaded::Corrupt,
            Ok(Load::Miss | Load::Throttled) => Loaded::Missing,
            Ok(Load::Entry { .. }) => Loaded::Other,
            // Still in foyer's write queue: the bytes are in RAM.
            Ok(Load::Piece { piece, .. }) => match &piece.value().block {
                Some(block) => {
                    let head = record::encode_head(block.header());
                    landing.land(&mut head.as_slice().chain(block.bytes()));
                    landing.landed.take().unwrap_or(Loaded::Other)
                }
                None => Loaded::Other,
            },
            Err(error) => Loaded::Failed(error.to_string()),
        }
    }
}

/// Asked by foyer for every entry of an extent that it is about to reclaim.
///
/// foyer would carry over what is admitted here, but with its old sequence number, and its recovery
/// stops reading an extent at the first number that goes back: after a restart that entry and all
/// behind it would be lost. So what is to be kept is read here, while it is still in its place, queued
/// as a new entry, and refused. Until it is written, foyer serves it from its queue.
struct ReclaimFilter {
    residency: Arc<Residency>,
    foyer: Weak<Mutex<Option<Foyer>>>,
}

impl std::fmt::Debug for ReclaimFilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReclaimFilter").finish_non_exhaustive()
    }
}

impl StorageFilterCondition for ReclaimFilter {
    fn filter(&self, _: &Arc<Statistics>, hash: u64, entry_bytes: usize) -> StorageFilterResult {
        let entry_bytes = (entry_bytes as u64).div_ceil(PAGE) * PAGE;
        if let Reclaim::Keep(resident) = self.residency.reclaim(hash, entry_bytes) {
            let foyer = self.foyer.upgrade().and_then(|foyer| foyer.lock().clone());
            match foyer {
                Some(foyer) => self.carry_over(&foyer, hash, resident),
                None => self.residency.not_carried(hash, &resident, Reason::Device),
            }
        }
        StorageFilterResult::Reject
    }
}

impl ReclaimFilter {
    /// Reads a resident, verified, and queues it again. Blocks the reclaimer, which has nothing better
    /// to do, and none of the runtime's other work.
    fn carry_over(&self, foyer: &Foyer, hash: u64, resident: Resident) {
        let slot = SlotMut::heap(resident.length_bytes as usize);
        let loaded =
            tokio::task::block_in_place(|| Handle::current().block_on(foyer.load(resident, slot)));
        let reason = match loaded {
            Loaded::Block(block) => {
                let done = foyer.enqueue(block.share(), Vec::new());
                // Whoever comes now reads from the queue; whoever came before should finish first.
                tokio::task::block_in_place(|| self.residency.await_readers(hash, READER_PATIENCE));
                let (foyer, residency) = (foyer.clone(), Arc::clone(&self.residency));
                // On the disk's own runtime; ends with it.
                Handle::current().spawn(async move {
                    let _ = done.await;
                    if foyer.contains(&resident.key) {
                        residency.carried(hash);
                    } else {
                        residency.not_carried(hash, &resident, Reason::Device);
                    }
                });
                return;
            }
            Loaded::Corrupt => Reason::Corrupt,
            Loaded::Failed(_) => Reason::Device,
            Loaded::Other | Loaded::Missing => Reason::Evicted,
        };
        self.residency.not_carried(hash, &resident, reason);
    }
}

/// foyer and the threads it works on. Dropping it stops them.
pub(super) struct Store {
    foyer: Foyer,
    /// The filter's way to foyer, which has to exist before foyer does; emptied at drop, because it
    /// would keep foyer alive from within.
    for_filter: Arc<Mutex<Option<Foyer>>>,
    /// Last, because the others end on it.
    threads: DiskThreads,
}

impl Store {
    /// Builds foyer over the prepared files and lets it recover its index.
    pub(super) async fn open(
        config: &NvmeConfig,
        geometry: Geometry,
        direct: bool,
        residency: Arc<Residency>,
        reclaimed: Reclaimed,
    ) -> Result<Self, NvmeError> {
        let threads = DiskThreads::start("terrace-nvme", 2, config.reads + 4);
        let threads = threads.map_err(|source| NvmeError::Io {
            what: "start threads for",
            path: config.dir.clone(),
            source,
        })?;
        let for_filter = Arc::new(Mutex::new(None));
        let filter = ReclaimFilter {
            residency,
            foyer: Arc::downgrade(&for_filter),
        };
        let built = Self::build(
            config,
            geometry,
            direct,
            filter,
            reclaimed,
            Spawner::from(threads.handle().clone()),
        );
        // On that runtime, because foyer spawns while it recovers.
        let cache = threads.handle().spawn(built).await;
        let failed = |problem: String| NvmeError::Store { problem };
        let cache = cache.map_err(|error| failed(error.to_string()))?;
        let cache = cache.map_err(|error| failed(error.to_string()))?;
        let foyer = Foyer {
            cache,
            in_order: Arc::default(),
        };
        *for_filter.lock() = Some(foyer.clone());
        Ok(Self {
            foyer,
            for_filter,
            threads,
        })
    }

    fn build(
        config: &NvmeConfig,
        geometry: Geometry,
        direct: bool,
        filter: ReclaimFilter,
        reclaimed: Reclaimed,
        spawner: Spawner,
    ) -> impl Future<Output = foyer::Result<HybridCache<StoredKey, StoredValue>>> + Send + 'static
    {
        let dir = files_dir(&config.dir);
        // All that may be in flight can meet in one buffer: a full flight, or one larger block, and
        // what reclaim carries over. Untouched parts cost address space only.
        let flight_bytes = config.flight_bytes.max(geometry.extent_bytes) + geometry.extent_bytes;
        let buffer_bytes = flight_bytes + CARRY_EXTENTS * geometry.extent_bytes;
        async move {
            let device = FsDeviceBuilder::new(dir)
                .with_capacity(geometry.capacity_bytes() as usize)
                .with_direct(direct)
                .build()?;
            let engine = BlockEngineConfig::new(device)
                .with_block_size(geometry.extent_bytes as usize)
                .with_flushers(1)
                .with_reclaimers(1)
                .with_clean_block_threshold(1)
                .with_buffer_pool_size(buffer_bytes as usize)
                .with_submit_queue_size_threshold(2 * buffer_bytes as usize)
                .with_eviction_pickers(vec![
                    Box::new(reclaimed),
                    // foyer's own choice.
                    Box::new(InvalidRatioPicker::new(0.8)),
                    Box::<FifoPicker>::default(),
                ])
                .with_reinsertion_filter(StorageFilter::new().with_condition(filter));
            HybridCacheBuilder::new()
                .with_name("terrace-nvme")
                .with_policy(HybridCachePolicy::WriteOnInsertion)
                .with_flush_on_close(false)
                .memory(1)
                .with_shards(1)
                .storage()
                .with_spawner(spawner)
                .with_io_engine_config(PsyncIoEngineConfig::new())
                .with_engine_config(engine)
                .with_recover_mode(RecoverMode::Quiet)
                .build()
                .await
        }
    }

    /// Hands a block to foyer; see [`Foyer::enqueue`].
    pub(super) fn enqueue(
        &self,
        block: BlockRef,
        permits: Vec<OwnedSemaphorePermit>,
    ) -> oneshot::Receiver<()> {
        if self.contains(block.key()) {
            // A copy of an earlier life; it must not pass for this one.
            self.delete(block.key());
        }
        self.foyer.enqueue(block, permits)
    }

    /// Whether foyer's index (or its queue) has it.
    pub(super) fn contains(&self, key: &BlockKey) -> bool {
        self.foyer.contains(key)
    }

    /// Takes it out of foyer's index (until a restart: foyer forgets deletions).
    pub(super) fn delete(&self, key: &BlockKey) {
        self.foyer.delete(key);
    }

    /// Reads an entry into the slot.
    pub(super) async fn load(&self, resident: Resident, slot: SlotMut) -> Loaded {
        self.foyer.load(resident, slot).await
    }

    /// Runs blocking work on foyer's threads.
    pub(super) fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.threads.blocking(work)
    }

    /// Finishes what is queued.
    pub(super) async fn close(&self) {
        if let Err(error) = self.foyer.cache.close().await {
            tracing::warn!(%error, "closing the store failed");
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.for_filter.lock().take();
    }
}

/// The file of an extent.
pub(super) fn path_of(dir: &Path, extent: u32) -> PathBuf {
    files_dir(dir).join(format!("{FILE_PREFIX}{extent:08}"))
}

/// Where foyer's files lie.
pub(super) fn files_dir(dir: &Path) -> PathBuf {
    dir.join("extents")
}

/// Makes the files and reserves their space before foyer opens them (it would leave them sparse).
/// Answers a note when the file system cannot reserve.
pub(super) fn prepare_files(
    config: &NvmeConfig,
    geometry: Geometry,
    start_cold: bool,
) -> Result<Option<&'static str>, NvmeError> {
    let dir = files_dir(&config.dir);
    let fault = |what, path: &Path| {
        let path = path.to_owned();
        move |source| NvmeError::Io { what, path, source }
    };
    fs::create_dir_all(&dir).map_err(fault("make", &dir))?;
    for entry in fs::read_dir(&dir).map_err(fault("list", &dir))? {
        let path = entry.map_err(fault("list", &dir))?.path();
        let number = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix(FILE_PREFIX)?.parse::<u32>().ok());
        if number.is_some_and(|number| start_cold || number >= geometry.extents) {
            fs::remove_file(&path).map_err(fault("remove", &path))?;
        }
    }
    let path_of = |number| path_of(&config.dir, number);
    let reserved = |number| fs::metadata(path_of(number)).map_or(0, |file| file.blocks() * 512);
    let needed_bytes: u64 = (0..geometry.extents)
        .map(|number| geometry.extent_bytes.saturating_sub(reserved(number)))
        .sum();
    let space = rustix::fs::statvfs(&dir).map_err(|errno| fault("measure", &dir)(errno.into()))?;
    let free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
    let no_space = || NvmeError::NoSpace {
        dir: config.dir.clone(),
        capacity_bytes: config.capacity_bytes,
        needed_bytes,
        free_bytes,
    };
    if needed_bytes > free_bytes {
        return Err(no_space());
    }
    if !config.preallocate {
        return Ok(Some("space checked, not reserved"));
    }
    for number in 0..geometry.extents {
        let path = path_of(number);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(fault("open", &path))?;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, geometry.extent_bytes) {
            Ok(()) => {}
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                return Ok(Some("space checked; the file system cannot reserve it"));
            }
            Err(rustix::io::Errno::NOSPC) => return Err(no_space()),
            Err(errno) => return Err(fault("reserve", &path)(errno.into())),
        }
    }
    Ok(None)
}

/// Whether direct I/O really works here: opens, writes and reads a page.
pub(super) fn direct_io_works(dir: &Path) -> bool {
    let path = dir.join("probe-direct");
    let flags = OFlags::DIRECT | OFlags::NOATIME;
    let try_it = || -> io::Result<()> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .custom_flags(flags.bits() as i32)
            .open(&path)?;
        // A heap slot is page-aligned ordinary memory.
        let mut page = SlotMut::heap(PAGE as usize);
        file.write_all_at(&page, 0)?;
        file.read_exact_at(&mut page, 0)
    };
    let works = try_it().is_ok();
    let _ = fs::remove_file(&path);
    works
}

/// Writes, syncs, reads back and removes a small file: is the disk a disk again?
pub(super) fn probe_disk(dir: &Path) -> io::Result<()> {
    let path = dir.join("probe");
    let written = [0x5a_u8; 16 * 1024];
    let mut read = Vec::new();
    let file = File::create(&path)?;
    file.write_all_at(&written, 0)?;
    file.sync_all()?;
    File::open(&path)?.read_to_end(&mut read)?;
    fs::remove_file(&path)?;
    if read != written {
        return Err(io::Error::other("what was written did not come back"));
    }
    Ok(())
}
