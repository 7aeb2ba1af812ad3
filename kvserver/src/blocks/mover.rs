//! Moves blocks between RAM and the tiers below: everything that runs in the background.
//!
//! ```text
//!                 ┌─ read ◄── get (leased or not)          single flight per block, goes first
//!   tier ──up───► │                                                                      reads.rs
//!                 └─ prefetch ◄── lookup                   at most half of the reads, bounded queue
//!
//!   RAM ──down──► ┌─ write ◄── put with ack stored, synced  answered by the tier's own outcome  writes.rs
//!                 └─ demote, by itself: what the engine says would be lost soonest; waits while
//!                    anybody is being read to                                            demote.rs
//!                 └─ save, at an orderly end: what is only in RAM, most valuable first       save.rs
//!
//!   out of a tier:  remove ◄── invalidation; what a tier could not make durable is tried again  removals.rs
//! ```
//!
//! Every task is owned: [`Mover::stop`] ends the loops and waits for what is under way. A caller that goes
//! away does not cancel a read that has begun; a block that was read is in RAM for the next one.
//! Bounds: each file names its own; the tier's own queue bounds writes, `DEMOTE_BATCH_BYTES` are demoted at a
//! time.
//! Units: bytes, milliseconds. Errors: outcomes and reasons; what a tier refuses is counted by reason.

mod demote;
mod reads;
mod removals;
mod save;
#[cfg(test)]
mod tests;
mod writes;

use std::{collections::HashMap, sync::Arc, time::Duration};

use kvproto::{BlockKey, TierKind};
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::Notify};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use self::{reads::ReadLimits, removals::MAX_OWED};
use self::{reads::Reads, removals::Removals, writes::Running};
pub use self::{
    reads::{Landed, Reading, Urgency},
    save::Saved,
};
use super::Tiers;
use crate::{clock::Clock, data_dir::DataDir, engine::Engine, telemetry::Metrics};

/// Bytes demoted in one batch: enough for a disk's full rate, little enough to get out of a read's way.
const DEMOTE_BATCH_BYTES: u64 = 16 << 20;

/// Pause before a read that found no room, or a busy tier, is tried again for somebody with a lease.
const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// How often leases whose time is up are looked for.
const SWEEP_PAUSE: Duration = Duration::from_millis(200);

/// The mover of one node.
pub struct Mover {
    engine: Arc<Engine>,
    tiers: Tiers,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    runtime: Handle,
    tasks: TaskTracker,
    stopping: CancellationToken,
    reads: Mutex<Reads>,
    writing: Mutex<HashMap<(TierKind, BlockKey), Running>>,
    removals: Mutex<Removals>,
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
        reads: ReadLimits,
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
            reads: Mutex::new(Reads::new(reads)),
            writing: Mutex::new(HashMap::new()),
            removals: Mutex::default(),
            work: Notify::new(),
            _data_dir: data_dir,
        });
        mover.spawn(Arc::clone(&mover).sweep_leases());
        mover.spawn(Arc::clone(&mover).settle_removals());
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
        self.reads.lock().drop_prefetches();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Something was stored that may have to go down.
    pub fn look_for_work(&self) {
        self.work.notify_one();
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
