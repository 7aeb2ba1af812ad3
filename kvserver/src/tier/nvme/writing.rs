//! Writing blocks and the journal: from a caller to an answer that holds.
//!
//! ```text
//!   admit ─► begin ─► wear ─► flight ─► foyer … done ─► in its index? ─► journal ─► Stored
//! ```
//!
//! Nothing is said before it is so: foyer drops silently, so its index is asked, and what the journal
//! does not know would be gone after a restart. Units: bytes, milliseconds. Errors: outcomes; what the
//! device lost puts the tier out of service at once (health.rs).

use std::{
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use kvproto::{BlockKey, Reason};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{Shared, residency::Begin, store::hash_of};
use crate::tier::{BlockRef, DAY_MS, Resident, WriteOutcome, gate::within, unix_day};

/// A block on its way through foyer.
struct Flying {
    at: usize,
    hash: u64,
    key: BlockKey,
    done: oneshot::Receiver<()>,
}

impl Shared {
    pub(super) async fn write(self: &Arc<Self>, blocks: Vec<BlockRef>) -> Vec<WriteOutcome> {
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
        self.look_soon();
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

    /// Makes the removals noted so far durable.
    pub(super) async fn seal_removal(self: &Arc<Self>) -> io::Result<()> {
        let sealed = self.flush_journal(true).await;
        if let Err(error) = &sealed {
            self.write_failed(&format!("the journal cannot be written: {error}"));
        }
        sealed
    }

    /// Writes the journal's pending records, on the disk's own threads and within the deadline; rewrites
    /// it when it has grown too long.
    pub(super) async fn flush_journal(self: &Arc<Self>, sync: bool) -> io::Result<()> {
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

    pub(super) fn write_failed(self: &Arc<Self>, why: &str) {
        if self.health.write_failed(self.clock.now(), why) {
            self.go_down(why);
        }
    }
}
