//! Out of service and back, and the end.
//!
//! A tier that has failed is tried again after a cool-down: the disk itself first, then foyer built anew,
//! whose own write position is not to be trusted after an error. Errors: sentences for the log and the
//! status.

use std::{
    sync::{Arc, Weak, atomic::Ordering::Relaxed},
    time::Duration,
};

use kvproto::Reason;

use super::{CLOSE_DEADLINE, Shared, files::probe_disk, residency::Residency, store::Store};
use crate::{clock::Clock, tier::gate::within};

impl Shared {
    /// Starts the prober that will bring the tier back.
    pub(super) fn go_down(self: &Arc<Self>, why: &str) {
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
    pub(super) async fn come_back(self: &Arc<Self>) -> Result<(), String> {
        let dir = self.config.dir.clone();
        let residency = Arc::clone(&self.residency);
        let deadline = Duration::from_millis(self.config.write_deadline_ms);
        // The node's threads: foyer's may all be stuck. One probe at a time, so it can hold only one.
        let disk = tokio::task::spawn_blocking(move || {
            probe_disk(&dir)?;
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
            self.reclaimed.clone(),
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
        if let Some(extents) = &self.extents {
            extents.forget();
        }
        *self.store.write() = Some(Arc::new(store));
        Ok(())
    }

    pub(super) async fn close(self: &Arc<Self>) {
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
pub(super) fn prove(residency: &Residency, store: &Store) -> u64 {
    let mut dropped = 0;
    for (hash, resident) in residency.hashes() {
        if !store.contains(&resident.key) && residency.lose(hash, &resident, Reason::Evicted) {
            dropped += 1;
        }
    }
    dropped
}
