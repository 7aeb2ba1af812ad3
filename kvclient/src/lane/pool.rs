//! The lanes to one node: opened as calls need them, kept for the next call.
//!
//! ```text
//! call ─► permit ─► the lane used last, if it still lives, else a new one ─► LaneGuard
//!                                      back to the pile ◄── keep() ──┘  (dropped otherwise)
//! ```
//!
//! Units: lanes.
//! Errors: those of connecting.
//! Why last in, first out: a warm lane has warm windows and caches, and those that a burst left over stay idle.

use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::Lane;
use crate::{endpoint::Endpoint, error::Error};

/// The lanes to one node.
pub(crate) struct Lanes {
    endpoint: Endpoint,
    idle: Mutex<Vec<Lane>>,
    permits: Semaphore,
}

/// A lane for one call. Dropped without [`LaneGuard::keep`], its connection closes, which also tells the node
/// to stop working on the call.
pub(crate) struct LaneGuard<'a> {
    pub(crate) lane: Lane,
    lanes: &'a Lanes,
    _permit: SemaphorePermit<'a>,
}

impl Lanes {
    /// At most `count` lanes at once; more calls wait, within their deadline.
    pub(crate) fn new(endpoint: Endpoint, count: usize) -> Self {
        Self {
            endpoint,
            idle: Mutex::default(),
            permits: Semaphore::new(count.max(1)),
        }
    }

    /// A lane that is ready for a call.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub(crate) async fn take(&self) -> Result<LaneGuard<'_>, Error> {
        let permit = self
            .permits
            .acquire()
            .await
            .expect("nobody closes the semaphore");
        let lane = loop {
            let idle = self.idle.lock().pop();
            let Some(mut lane) = idle else {
                let opened = Lane::open(&self.endpoint).await;
                break opened.map_err(|source| Error::Connect {
                    endpoint: self.endpoint.to_string(),
                    source: source.into(),
                })?;
            };
            if lane.is_usable() {
                break lane;
            }
        };
        Ok(LaneGuard {
            lane,
            lanes: self,
            _permit: permit,
        })
    }

    /// Closes what is idle.
    pub(crate) fn clear(&self) {
        self.idle.lock().clear();
    }
}

impl LaneGuard<'_> {
    /// The call ended in good order: the lane may carry another.
    pub(crate) fn keep(self) {
        self.lanes.idle.lock().push(self.lane);
    }
}
