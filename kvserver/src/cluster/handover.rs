//! What a draining node still has to hand over, between whoever moves it and whoever waits for that.
//!
//! The mover of runs sees in the roster that this node drains, and tells its progress here; the `Drain` call waits here.
//! Neither knows the other. Units: blocks, bytes.

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::clock::Tick;

/// How far handing over has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Blocks that others have taken, or had already.
    pub moved_blocks: u64,
    /// Their bytes.
    pub moved_bytes: u64,
    /// Blocks that nobody else has yet.
    pub left_blocks: u64,
    /// Their bytes.
    pub left_bytes: u64,
    /// Everything was looked at, and nothing more will be moved.
    pub done: bool,
}

/// Where progress is told and waited for.
#[derive(Debug)]
pub struct Handover {
    progress: watch::Sender<Option<Progress>>,
    until: Mutex<Option<Tick>>,
}

impl Default for Handover {
    fn default() -> Self {
        Self {
            progress: watch::Sender::new(None),
            until: Mutex::new(None),
        }
    }
}

impl Handover {
    /// A drain begins, or goes on with another deadline; what was told before is void.
    pub(super) fn begin(&self, until: Option<Tick>) {
        *self.until.lock() = until;
        self.progress.send_replace(None);
    }

    /// When it must be over; `None`: whenever it is.
    #[must_use]
    pub fn until(&self) -> Option<Tick> {
        *self.until.lock()
    }

    /// This far it has come.
    pub fn tell(&self, progress: Progress) {
        self.progress.send_replace(Some(progress));
    }

    /// Told of every step; `None` until the first.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Option<Progress>> {
        self.progress.subscribe()
    }
}
