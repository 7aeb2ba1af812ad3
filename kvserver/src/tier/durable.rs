//! The durable tier: one synced file per block, never evicted.
//!
//! ```text
//!  write  reserve room ─► tmp/<n>: record ─► fsync ─► rename ─► fsync of the folder ─► Synced
//!           └ TierFull · QueueFull · TierDown       └ unless it was removed meanwhile: Invalidated
//!  remove unlink ─► fsync of the folder
//!
//!  <dir>/lock                    who has it
//!  <dir>/tmp/                    what is being written; emptied at open
//!  <dir>/blocks/3f/<key>.blk     a record (record.rs); 256 folders by the hash's first byte
//!                  <key>.corrupt found damaged twice: kept for whoever wants to look, never read
//! ```
//!
//! Shape: the folder *is* the index: at open every file's header is read and checked. Units: bytes,
//! milliseconds.
//!
//! Errors: a full disk is `TierFull`, like a spent capacity; any other error of the disk is `Device`,
//! and takes the tier out of service for a while that doubles; the first write after it is the probe.
//!
//! Why files and not foyer: foyer never syncs and may always evict; and why not a log: removal of one
//! checkpoint's chunks must give its space back at once, without moving the others.

mod config;
mod files;
mod reading;
mod removal;
mod writing;

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use kvgpu::SlotMut;
use kvproto::{BlockKey, NamespaceId, Reason, TierKind};
use parking_lot::Mutex;
use tokio::runtime::Handle;

pub use self::config::{DurableConfig, DurableError};
use self::files::{Found, fault, scan};
use super::{
    BlockRef, BoxFuture, Durability, Read, Resident, Tier, TierStatus, WriteOutcome,
    gate::{Gate, within},
    health::Health,
    owned_write,
    threads::DiskThreads,
    unix_day,
};
use crate::clock::Clock;

const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// The durable tier.
pub struct DurableTier {
    shared: Arc<Shared>,
}

struct Shared {
    config: DurableConfig,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    health: Health,
    threads: DiskThreads,
    queue: Gate,
    turns: Gate,
    drops: Mutex<HashMap<Reason, u64>>,
    next_tmp: AtomicU64,
    closed: AtomicBool,
    tasks: Handle,
    lock: Mutex<Option<File>>,
}

#[derive(Default)]
struct State {
    residents: HashMap<BlockKey, Resident>,
    /// Writes under way, and whether a removal has overtaken them.
    writing: HashMap<BlockKey, Writing>,
    /// Removals under way, counted; a new write of such a key has to wait.
    removing: HashMap<BlockKey, u32>,
    /// Removals that failed: nobody lists these blocks, and their files may still be there.
    unremoved: HashSet<BlockKey>,
    /// Bytes of records on disk or promised to writes under way, damaged ones included.
    used_bytes: u64,
    corrupt_files: u64,
    day: u32,
    written_today: u64,
}

#[derive(Default)]
struct Writing {
    cancelled: bool,
    in_place: bool,
}

impl DurableTier {
    /// Opens the tier: takes the folder, clears away what was never finished, and reads the header of
    /// every block. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`DurableError`].
    pub async fn open(config: DurableConfig, clock: Arc<dyn Clock>) -> Result<Self, DurableError> {
        let threads = DiskThreads::start("terrace-durable", 1, 2 * config.depth + 2);
        let threads = threads.map_err(fault("start threads for", &config.dir))?;
        let scanned = threads.blocking({
            let config = config.clone();
            move || scan(&config)
        });
        let found = scanned
            .await
            .map_err(|error| fault("scan", &config.dir)(io::Error::other(error)))??;
        let Found {
            lock,
            residents,
            used_bytes,
            corrupt_files,
        } = found;
        let state = State {
            residents,
            used_bytes,
            corrupt_files,
            ..State::default()
        };
        let shared = Shared {
            state: Mutex::new(state),
            health: Health::new(Duration::from_millis(config.cooldown_ms.max(1))),
            threads,
            queue: Gate::new(config.queue_bytes),
            turns: Gate::new(config.depth as u64 * TURN_BYTES),
            drops: Mutex::default(),
            next_tmp: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            tasks: Handle::current(),
            lock: Mutex::new(Some(lock)),
            clock,
            config,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }
}

/// The turns of readers are counted by a gate that counts bytes.
const TURN_BYTES: u64 = 1 << 20;

impl std::fmt::Debug for DurableTier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DurableTier")
            .field("dir", &self.shared.config.dir)
            .finish_non_exhaustive()
    }
}

impl Tier for DurableTier {
    fn kind(&self) -> TierKind {
        TierKind::Durable
    }

    fn durability(&self) -> Durability {
        Durability::Durable
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
        let doomed = self.shared.forget(keys);
        let shared = Arc::clone(&self.shared);
        let task = self
            .shared
            .tasks
            .spawn(async move { shared.unlink(doomed).await });
        Box::pin(async move { task.await.map_err(io::Error::other)? })
    }

    fn remove_namespace(&self, namespace: NamespaceId) -> BoxFuture<'static, io::Result<()>> {
        let state = self.shared.state.lock();
        let all = state.residents.keys().chain(state.writing.keys()).copied();
        let keys: HashSet<BlockKey> = all.filter(|key| key.namespace == namespace).collect();
        drop(state);
        self.remove(&keys.into_iter().collect::<Vec<_>>())
    }

    fn residents(&self) -> Vec<Resident> {
        self.shared
            .state
            .lock()
            .residents
            .values()
            .copied()
            .collect()
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
    fn failed(&self, why: &str) {
        let now = self.clock.now();
        if self.health.write_failed(now, why) {
            tracing::warn!(dir = %self.config.dir.display(), why, "the durable tier is out of service");
        } else if self
            .health
            .writes_down(now)
            .is_some_and(|wait| wait.is_zero())
        {
            // That was the probe.
            self.health.still_down(now, why);
        }
    }

    fn count(&self, reason: Reason) {
        *self.drops.lock().entry(reason).or_default() += 1;
    }

    async fn close(self: &Arc<Self>) {
        if self.closed.swap(true, Relaxed) {
            return;
        }
        let _drained = within(&*self.clock, CLOSE_DEADLINE, self.queue.clear()).await;
        self.turns.close();
        self.lock.lock().take();
    }

    fn status(&self) -> TierStatus {
        let state = self.state.lock();
        let closed = self.closed.load(Relaxed);
        let why = if closed {
            Some("closed".to_owned())
        } else {
            self.health.why()
        };
        let aside = match state.corrupt_files {
            0 => String::new(),
            n => format!("{n} damaged files set aside"),
        };
        let mut drops: Vec<(Reason, u64)> =
            self.drops.lock().iter().map(|(r, n)| (*r, *n)).collect();
        drops.sort_unstable();
        let today = unix_day(&*self.clock);
        TierStatus {
            capacity_bytes: self.config.capacity_bytes,
            used_bytes: state.used_bytes,
            blocks: state.residents.len() as u64,
            in_service: why.is_none(),
            note: [why.unwrap_or_default(), aside]
                .into_iter()
                .filter(|s| !s.is_empty())
                .collect::<Vec<_>>()
                .join("; "),
            queued_bytes: self.queue.inside_bytes(),
            written_bytes_today: if state.day == today {
                state.written_today
            } else {
                0
            },
            drops,
        }
    }
}

impl State {
    fn charge(&mut self, today: u32, bytes: u64) {
        if self.day != today {
            (self.day, self.written_today) = (today, 0);
        }
        self.written_today += bytes;
    }
}
