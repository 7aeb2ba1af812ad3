//! Writing one file per block: room first, durable before it is said.
//!
//! ```text
//!   admit (room, queue) ─► tmp/<n>, synced ─► renamed under the lock ─► folder synced ─► booked ─► Synced
//! ```
//!
//! The rename is under the lock that removals take, so a removal sees either no file or one that it must
//! unlink. Units: bytes, milliseconds. Errors: outcomes; room is given back whatever went wrong.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use kvproto::{BlockKey, Reason};
use tokio::{sync::OwnedSemaphorePermit, task::JoinHandle};

use super::{
    Shared, Writing,
    files::{path_of, write_record},
};
use crate::tier::{BlockRef, Resident, WriteOutcome, gate::within, record, unix_day};

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
    pub(super) async fn write(self: &Arc<Self>, blocks: Vec<BlockRef>) -> Vec<WriteOutcome> {
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

    pub(super) async fn sync_folders(&self, keys: &[BlockKey]) -> io::Result<()> {
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
                state.charge(unix_day(&*self.clock), bytes);
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
}
