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

mod files;

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use kvgpu::SlotMut;
use kvproto::{BlockKey, NamespaceId, Reason, TierKind};
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::OwnedSemaphorePermit, task::JoinHandle};

use self::files::{Found, fault, path_of, scan, set_aside, write_record};
use super::{
    BlockRef, BoxFuture, Durability, Read, Resident, Tier, TierStatus, WriteOutcome,
    gate::{Gate, within},
    health::Health,
    land::{Landed, land},
    record,
    threads::DiskThreads,
};
use crate::clock::Clock;

const DAY_MS: u64 = 86_400_000;
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// Settings of a [`DurableTier`].
#[derive(Clone, Debug)]
pub struct DurableConfig {
    /// Folder that belongs to this tier alone; made if missing.
    pub dir: PathBuf,
    /// Bytes of records that it may hold; more is answered `tier_full`.
    pub capacity_bytes: u64,
    /// Blocks that it may hold. Default 4 Mi; each costs about 250 bytes of memory.
    pub max_blocks: u64,
    /// Bytes that may be on their way at once; more is answered `queue_full`. Default 256 MiB.
    pub queue_bytes: u64,
    /// Reads, and writes, at once. Default 8.
    pub depth: usize,
    /// A read that takes longer is given up as a device failure. Default 10 000.
    pub read_deadline_ms: u64,
    /// A write that takes longer is given up as a device failure. Default 60 000.
    pub write_deadline_ms: u64,
    /// How long it stays out of service after an error, doubling up to sixty times as long. Default
    /// 1 000.
    pub cooldown_ms: u64,
}

impl DurableConfig {
    /// Defaults for a tier of `capacity_bytes` in `dir`.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, capacity_bytes: u64) -> Self {
        Self {
            dir: dir.into(),
            capacity_bytes,
            max_blocks: 4 << 20,
            queue_bytes: 256 << 20,
            depth: 8,
            read_deadline_ms: 10_000,
            write_deadline_ms: 60_000,
            cooldown_ms: 1_000,
        }
    }
}

/// Why a durable tier could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    /// Another process (or another tier of this one) has the folder.
    #[error("{} is in use by another process", dir.display())]
    InUse {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder holds more than the settings allow.
    #[error("{} holds more than max_blocks = {max_blocks} blocks", dir.display())]
    TooManyBlocks {
        /// The folder.
        dir: PathBuf,
        /// The limit.
        max_blocks: u64,
    },
    /// The disk answered with an error.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
}

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

/// A write that was given to the disk's threads.
struct UnderWay {
    at: usize,
    resident: Resident,
    done: JoinHandle<io::Result<Place>>,
}

/// Where a finished write has left its file.
enum Place {
    /// In its place; its folder has to be synced.
    InPlace,
    /// Nowhere: a removal came first.
    Cancelled,
}

impl Shared {
    async fn write(self: &Arc<Self>, blocks: Vec<BlockRef>) -> Vec<WriteOutcome> {
        let mut outcomes = vec![None; blocks.len()];
        let mut under_way = Vec::new();
        for (at, block) in blocks.into_iter().enumerate() {
            let mut admitted = self.admit(&block);
            if matches!(admitted, Err((Reason::QueueFull, _))) && !under_way.is_empty() {
                // Full of this call's own blocks: wait for them, then try once more.
                self.finish(std::mem::take(&mut under_way), &mut outcomes)
                    .await;
                admitted = self.admit(&block);
            }
            match admitted {
                Ok(Some(queued)) => under_way.push(self.start(at, block, queued)),
                Ok(None) => outcomes[at] = Some(WriteOutcome::Synced),
                Err(refused) => outcomes[at] = Some(self.refuse(refused)),
            }
        }
        self.finish(under_way, &mut outcomes).await;
        outcomes
            .into_iter()
            .map(|outcome| outcome.expect("every block was answered"))
            .collect()
    }

    /// Reserves the room and registers the write; `None`: it is there already.
    fn admit(&self, block: &BlockRef) -> Result<Option<OwnedSemaphorePermit>, (Reason, u32)> {
        if self.closed.load(Relaxed) {
            return Err((Reason::TierDown, 0));
        }
        // When the cool-down is over, this write is the probe.
        match self.health.writes_down(self.clock.now()) {
            Some(wait) if !wait.is_zero() => {
                return Err((Reason::TierDown, wait.as_millis().max(1) as u32));
            }
            _ => {}
        }
        if block.len_bytes() > record::MAX_LENGTH_BYTES {
            return Err((Reason::TooLarge, 0));
        }
        let bytes = record::record_bytes(block.len_bytes());
        let mut state = self.state.lock();
        let held = state.residents.get(block.key());
        if held.is_some_and(|held| held.seal == block.header().seal) {
            return Ok(None);
        }
        if state.writing.contains_key(block.key()) || state.removing.contains_key(block.key()) {
            return Err((Reason::QueueFull, 10));
        }
        let blocks = (state.residents.len() + state.writing.len()) as u64;
        if state.used_bytes + bytes > self.config.capacity_bytes || blocks >= self.config.max_blocks
        {
            return Err((Reason::TierFull, 0));
        }
        let Some(queued) = self.queue.try_enter(bytes) else {
            return Err((Reason::QueueFull, self.queue.retry_after_ms()));
        };
        state.used_bytes += bytes;
        state.writing.insert(*block.key(), Writing::default());
        Ok(Some(queued))
    }

    fn refuse(&self, (reason, retry_after_ms): (Reason, u32)) -> WriteOutcome {
        self.count(reason);
        WriteOutcome::Rejected {
            reason,
            retry_after_ms,
        }
    }

    /// Writes one file and puts it in its place, on a thread of the disk's.
    fn start(
        self: &Arc<Self>,
        at: usize,
        block: BlockRef,
        queued: OwnedSemaphorePermit,
    ) -> UnderWay {
        let resident = Resident::of(&block);
        let shared = Arc::clone(self);
        let done = self.threads.blocking(move || {
            let _queued = queued;
            let number = shared.next_tmp.fetch_add(1, Relaxed);
            let tmp = shared.config.dir.join("tmp").join(number.to_string());
            let placed =
                write_record(&tmp, &block).and_then(|()| shared.put_in_place(&tmp, block.key()));
            if !matches!(placed, Ok(Place::InPlace)) {
                let _ = fs::remove_file(&tmp);
            }
            placed
        });
        UnderWay { at, resident, done }
    }

    /// Renames under the lock, so that a removal sees either no file or one that it must unlink.
    fn put_in_place(&self, tmp: &Path, key: &BlockKey) -> io::Result<Place> {
        let mut state = self.state.lock();
        let Some(writing) = state
            .writing
            .get_mut(key)
            .filter(|writing| !writing.cancelled)
        else {
            return Ok(Place::Cancelled);
        };
        fs::rename(tmp, path_of(&self.config.dir, key))?;
        writing.in_place = true;
        Ok(Place::InPlace)
    }

    /// Waits for writes, syncs their folders (each once), and answers.
    async fn finish(
        self: &Arc<Self>,
        under_way: Vec<UnderWay>,
        outcomes: &mut [Option<WriteOutcome>],
    ) {
        if under_way.is_empty() {
            return;
        }
        let mut problem = None;
        let answers: Vec<(usize, Resident, io::Result<Place>)> = match self.synced(under_way).await
        {
            Ok(answers) => answers,
            Err(late) => {
                problem = Some("writes do not finish".to_owned());
                let late = late.into_iter();
                late.map(|(at, resident)| (at, resident, Err(io::ErrorKind::TimedOut.into())))
                    .collect()
            }
        };
        let mut worked = false;
        for (at, resident, placed) in answers {
            let refused = match self.end(&resident, &placed) {
                Ok(()) => {
                    worked = true;
                    outcomes[at] = Some(WriteOutcome::Synced);
                    continue;
                }
                Err(reason) => reason,
            };
            if let (Reason::Device, Err(error)) = (refused, &placed) {
                problem.get_or_insert_with(|| format!("a write failed: {error}"));
            }
            let retry_after_ms = if refused == Reason::Device {
                self.config.cooldown_ms as u32
            } else {
                0
            };
            outcomes[at] = Some(self.refuse((refused, retry_after_ms)));
        }
        match problem {
            Some(problem) => self.failed(&problem),
            None if worked => self.health.up(),
            None => {}
        }
    }

    /// What became of each write once its folder was synced; on the deadline, whose they were.
    async fn synced(
        self: &Arc<Self>,
        under_way: Vec<UnderWay>,
    ) -> Result<Vec<(usize, Resident, io::Result<Place>)>, Vec<(usize, Resident)>> {
        let whose: Vec<_> = under_way
            .iter()
            .map(|write| (write.at, write.resident))
            .collect();
        let work = async {
            let mut answers = Vec::with_capacity(under_way.len());
            for write in under_way {
                let placed = write.done.await.map_err(io::Error::other).flatten();
                answers.push((write.at, write.resident, placed));
            }
            let placed = answers
                .iter()
                .filter(|(_, _, placed)| matches!(placed, Ok(Place::InPlace)));
            let keys: Vec<BlockKey> = placed.map(|(_, resident, _)| resident.key).collect();
            if let Err(error) = self.sync_folders(&keys).await {
                for (_, _, placed) in &mut answers {
                    if matches!(placed, Ok(Place::InPlace)) {
                        *placed = Err(io::Error::new(error.kind(), error.to_string()));
                    }
                }
            }
            answers
        };
        let deadline = Duration::from_millis(self.config.write_deadline_ms);
        within(&*self.clock, deadline, work).await.ok_or(whose)
    }

    async fn sync_folders(&self, keys: &[BlockKey]) -> io::Result<()> {
        let paths = keys.iter().map(|key| path_of(&self.config.dir, key));
        let folders: HashSet<PathBuf> = paths
            .filter_map(|path| path.parent().map(Path::to_owned))
            .collect();
        if folders.is_empty() {
            return Ok(());
        }
        let work = move || {
            folders
                .iter()
                .try_for_each(|folder| File::open(folder)?.sync_all())
        };
        self.threads
            .blocking(work)
            .await
            .map_err(io::Error::other)?
    }

    /// Ends a write in the books; why it is not resident, if it is not.
    fn end(&self, resident: &Resident, placed: &io::Result<Place>) -> Result<(), Reason> {
        let bytes = record::record_bytes(resident.length_bytes);
        let mut state = self.state.lock();
        let writing = state.writing.remove(&resident.key).unwrap_or_default();
        let reason = match placed {
            Ok(Place::InPlace) if !writing.cancelled => {
                state.charge((self.clock.unix_ms() / DAY_MS) as u32, bytes);
                if let Some(old) = state.residents.insert(resident.key, *resident) {
                    state.used_bytes -= record::record_bytes(old.length_bytes);
                }
                return Ok(());
            }
            Ok(_) => Reason::Invalidated,
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Reason::TierFull,
            Err(_) => Reason::Device,
        };
        state.used_bytes -= bytes;
        if writing.in_place && !writing.cancelled {
            // In its place, but not certainly durable: it has replaced whatever was there before.
            if let Some(old) = state.residents.remove(&resident.key) {
                state.used_bytes -= record::record_bytes(old.length_bytes);
            }
            let _ = fs::remove_file(path_of(&self.config.dir, &resident.key));
        }
        Err(reason)
    }

    async fn read(self: &Arc<Self>, resident: Resident, into: SlotMut) -> Read {
        if self.closed.load(Relaxed) {
            return Read::Gone(Reason::TierDown);
        }
        if !self.holds(&resident) {
            return Read::Gone(Reason::Evicted);
        }
        let deadline = Duration::from_millis(self.config.read_deadline_ms);
        let landed = within(&*self.clock, deadline, async {
            let turn = self.turns.enter(TURN_BYTES).await?;
            let shared = Arc::clone(self);
            let task = self.threads.blocking(move || {
                let _turn = turn;
                shared.read_file(&resident, into)
            });
            task.await.ok()
        });
        match landed.await.flatten() {
            Some(Landed::Block(block)) if self.holds(&resident) => Read::Hit(block),
            Some(Landed::Block(_)) => Read::Gone(Reason::Invalidated),
            Some(Landed::Corrupt) => Read::Gone(self.lose(&resident)),
            Some(Landed::Other) => Read::Gone(Reason::Evicted),
            Some(Landed::Failed(error)) => {
                self.count(Reason::Device);
                self.failed(&format!("a read failed: {error}"));
                Read::Gone(Reason::Device)
            }
            None => {
                self.count(Reason::Device);
                self.failed("reads take longer than their deadline");
                Read::Gone(Reason::Device)
            }
        }
    }

    fn holds(&self, resident: &Resident) -> bool {
        let state = self.state.lock();
        state
            .residents
            .get(&resident.key)
            .is_some_and(|held| held.seal == resident.seal)
    }

    fn read_file(&self, resident: &Resident, slot: SlotMut) -> Landed {
        match File::open(path_of(&self.config.dir, &resident.key)) {
            Ok(mut file) => land(&mut file, resident, slot),
            // Removed between the look and the open, or by hand.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Landed::Other,
            Err(error) => Landed::Failed(error),
        }
    }

    /// Sets a damaged block aside; answers what to call it.
    fn lose(&self, resident: &Resident) -> Reason {
        let mut state = self.state.lock();
        if state
            .residents
            .get(&resident.key)
            .is_none_or(|held| held.seal != resident.seal)
        {
            return Reason::Evicted;
        }
        state.residents.remove(&resident.key);
        state.corrupt_files += 1;
        let path = path_of(&self.config.dir, &resident.key);
        if let Err(error) = set_aside(&path) {
            tracing::warn!(file = %path.display(), %error, "a damaged block cannot be set aside");
        }
        drop(state);
        self.count(Reason::Corrupt);
        Reason::Corrupt
    }

    /// Forgets keys; answers those that have a file to unlink.
    fn forget(&self, keys: &[BlockKey]) -> Vec<BlockKey> {
        let mut state = self.state.lock();
        let mut doomed = Vec::new();
        for key in keys {
            let resident = state.residents.remove(key);
            if let Some(resident) = &resident {
                state.used_bytes -= record::record_bytes(resident.length_bytes);
            }
            let in_place = state.writing.get_mut(key).is_some_and(|writing| {
                writing.cancelled = true;
                writing.in_place
            });
            let is_left = state.unremoved.contains(key);
            if resident.is_some() || in_place || is_left || state.removing.contains_key(key) {
                *state.removing.entry(*key).or_default() += 1;
                doomed.push(*key);
            }
        }
        doomed
    }

    async fn unlink(self: &Arc<Self>, doomed: Vec<BlockKey>) -> io::Result<()> {
        if doomed.is_empty() {
            return Ok(());
        }
        let shared = Arc::clone(self);
        let deadline = Duration::from_millis(self.config.write_deadline_ms);
        let work = async {
            let keys = doomed.clone();
            let unlinked = self.threads.blocking(move || {
                for key in &keys {
                    match fs::remove_file(path_of(&shared.config.dir, key)) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                Ok(())
            });
            unlinked.await.map_err(io::Error::other)??;
            self.sync_folders(&doomed).await
        };
        let removed = within(&*self.clock, deadline, work).await;
        let removed = removed.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()));
        let mut state = self.state.lock();
        for key in &doomed {
            match removed.is_ok() {
                true => state.unremoved.remove(key),
                false => state.unremoved.insert(*key),
            };
            if let Some(count) = state.removing.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    state.removing.remove(key);
                }
            }
        }
        drop(state);
        if let Err(error) = &removed {
            self.failed(&format!("a removal failed: {error}"));
        }
        removed
    }

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
        let today = (self.clock.unix_ms() / DAY_MS) as u32;
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
