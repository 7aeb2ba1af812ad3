//! What foyer's reclaimer asks before it takes an extent, and how what must stay is carried over.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use foyer::{Statistics, StorageFilterCondition, StorageFilterResult};
use kvgpu::SlotMut;
use kvproto::Reason;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::{Foyer, Loaded};
use crate::tier::{
    Resident,
    nvme::{
        config::PAGE,
        residency::{Reclaim, Residency},
    },
};

/// How long reclaim waits for readers of an entry that is kept. A read takes a millisecond.
const READER_PATIENCE: Duration = Duration::from_secs(2);

/// Asked by foyer for every entry of an extent that it is about to reclaim.
///
/// foyer would carry over what is admitted here, but with its old sequence number, and its recovery
/// stops reading an extent at the first number that goes back: after a restart that entry and all
/// behind it would be lost. So what is to be kept is read here, while it is still in its place, queued
/// as a new entry, and refused. Until it is written, foyer serves it from its queue.
pub(super) struct ReclaimFilter {
    pub(super) residency: Arc<Residency>,
    pub(super) foyer: Weak<Mutex<Option<Foyer>>>,
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
