//! foyer's block engine, as far as the tier uses it.
//!
//! ```text
//! write   BlockRef ─encode─► foyer's aligned buffer ─one write per batch─► extent     (one copy)
//! read    extent ─► foyer's aligned buffer ─decode─► the reader's SlotMut, summed     (one copy)
//! ```
//!
//! This read is for entries whose position is not known, or was wrong; the others go by `direct.rs`.
//!
//! How the bytes find the reader's slot, and what tells that a write is over, says `entry.rs`. Whether a write
//! succeeded only the index tells ([`Store::contains`]). What an extent holds that must stay when it is reclaimed
//! is carried over by `filter.rs`.
//!
//! What is used and what is not (facts in `tests/tests/foyer_facts.rs`): positional reads and writes on a
//! runtime of our own, so that a stuck disk holds its threads and not the node's; no memory part; no
//! compression (the builder's setting never arrives), no tombstone log (it forgets its position), never
//! `clear` (it breaks the accounting), not the io_uring engine (it spins). One flusher, so that entries
//! lie in the order of their writes.

mod entry;
mod filter;

use std::{io::Read as _, sync::Arc};

use foyer::{
    BlockEngineConfig, DeviceBuilder, FifoPicker, FsDeviceBuilder, HybridCache, HybridCacheBuilder,
    HybridCachePolicy, InvalidRatioPicker, Load, PsyncIoEngineConfig, RecoverMode, Spawner,
    StorageFilter,
};
use kvgpu::SlotMut;
use kvproto::BlockKey;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

pub(super) use self::entry::{Loaded, hash_of};
use self::{
    entry::{LANDING, Landing, StoredKey, StoredValue},
    filter::ReclaimFilter,
};
use super::{
    super::{Resident, block::BlockRef, record, threads::DiskThreads},
    config::{Geometry, NvmeConfig, NvmeError},
    extents::Reclaimed,
    files::files_dir,
    residency::{Going, Residency},
};

/// Extents' worth of carried-over entries for which the flush buffer has room.
pub(super) const CARRY_EXTENTS: u64 = 3;

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
        let value = StoredValue::new(block, permits, done);
        let _in_order = self.in_order.lock();
        drop(self.cache.storage_writer(key).force().insert(value));
        receiver
    }

    async fn load(&self, resident: Resident, slot: SlotMut) -> Loaded {
        let key = StoredKey(resident.key);
        let landing = Arc::new(Mutex::new(Landing::new(resident, slot)));
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
        let going = Going::new(Arc::clone(&residency), geometry.extent_bytes);
        let filter = ReclaimFilter {
            residency,
            foyer: Arc::downgrade(&for_filter),
        };
        let built = Self::build(
            config,
            geometry,
            direct,
            filter,
            (reclaimed, going),
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
        (reclaimed, going): (Reclaimed, Going),
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
                    Box::new(going),
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
