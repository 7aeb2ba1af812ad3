//! Limits by bytes and by time that both disk tiers set.

use std::{future::Future, pin::pin, sync::Arc, time::Duration};

use futures_util::future::{Either, select};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::clock::Clock;

/// Semaphores count in these, because they count in 32 bits.
const UNIT: u64 = 4096;
/// What a full queue is taken to drain at for the retry hint: 512 MiB/s, a modest NVMe disk.
const DRAIN_BYTES_PER_MS: u64 = 512 * 1024;

/// At most so many bytes at once.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    semaphore: Arc<Semaphore>,
    units: u32,
}

impl Gate {
    pub(super) fn new(limit_bytes: u64) -> Self {
        let units = (limit_bytes / UNIT).clamp(1, u64::from(u32::MAX >> 3)) as u32;
        Self {
            semaphore: Arc::new(Semaphore::new(units as usize)),
            units,
        }
    }

    /// Passes now, or not at all. More than the limit passes alone.
    pub(super) fn try_enter(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.semaphore)
            .try_acquire_many_owned(self.share(bytes))
            .ok()
    }

    /// Waits for its turn; `None` when the gate was closed.
    pub(super) async fn enter(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.semaphore)
            .acquire_many_owned(self.share(bytes))
            .await
            .ok()
    }

    /// Waits until nobody is inside, and keeps everybody out as long as the answer lives.
    pub(super) async fn clear(&self) -> Option<OwnedSemaphorePermit> {
        self.enter(u64::MAX).await
    }

    pub(super) fn close(&self) {
        self.semaphore.close();
    }

    /// Bytes inside, in whole pages.
    pub(super) fn inside_bytes(&self) -> u64 {
        u64::from(self.units).saturating_sub(self.semaphore.available_permits() as u64) * UNIT
    }

    /// When there will be room again, as far as anybody can tell.
    pub(super) fn retry_after_ms(&self) -> u32 {
        (self.inside_bytes() / DRAIN_BYTES_PER_MS).clamp(1, 1000) as u32
    }

    fn share(&self, bytes: u64) -> u32 {
        bytes.div_ceil(UNIT).clamp(1, u64::from(self.units)) as u32
    }
}

/// The answer, if it comes before the deadline; otherwise the work is dropped.
pub(super) async fn within<T>(
    clock: &dyn Clock,
    deadline: Duration,
    work: impl Future<Output = T>,
) -> Option<T> {
    match select(pin!(work), clock.sleep(deadline)).await {
        Either::Left((answer, _)) => Some(answer),
        Either::Right(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_limit_holds_and_one_larger_passes_alone() {
        let gate = Gate::new(8 * UNIT);
        let some = gate.try_enter(5 * UNIT).expect("room");
        assert!(gate.try_enter(4 * UNIT).is_none());
        assert_eq!(gate.inside_bytes(), 5 * UNIT);
        drop(some);
        let large = gate.try_enter(100 * UNIT).expect("alone");
        assert!(gate.try_enter(1).is_none());
        drop(large);
        assert!(gate.clear().await.is_some());
        assert_eq!(gate.inside_bytes(), 0);
    }
}
