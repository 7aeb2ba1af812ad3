//! Moments in a stream, and what is in a device's hands until they come.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{DeviceError, Refused};

/// How a device tells that something is done.
pub(crate) trait Completion: Any + Send + Sync {
    fn is_done(&self) -> Result<bool, DeviceError>;
    fn wait(&self) -> Result<(), DeviceError>;
}

/// A moment in a stream.
#[derive(Clone)]
pub struct Event {
    pub(crate) device: u64,
    pub(crate) completion: Arc<dyn Completion>,
}

impl Event {
    /// Whether it has come; does not wait.
    ///
    /// # Errors
    /// What the operation, or one before it in its stream, failed with.
    pub fn is_done(&self) -> Result<bool, DeviceError> {
        self.completion.is_done()
    }

    /// Waits for it, blocking the thread.
    ///
    /// # Errors
    /// As [`Self::is_done`].
    pub fn wait(&self) -> Result<(), DeviceError> {
        self.completion.wait()
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event")
            .field("done", &self.is_done())
            .finish_non_exhaustive()
    }
}

/// Something a device is still writing. Dropping it waits.
pub struct Pending<T> {
    berth: Berth<T>,
    event: Event,
}

/// Where the value is meanwhile; whoever carries out the operation may take it and must put it back.
pub(crate) type Berth<T> = Arc<Mutex<Option<T>>>;

impl<T> Pending<T> {
    pub(crate) fn new(berth: Berth<T>, event: Event) -> Self {
        Self { berth, event }
    }

    /// Its event.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// Whether [`Self::wait`] would return at once.
    ///
    /// # Errors
    /// As [`Event::is_done`].
    pub fn is_done(&self) -> Result<bool, DeviceError> {
        self.event.is_done()
    }

    /// Waits and hands it over.
    ///
    /// # Errors
    /// What the operation failed with; the value comes back, its bytes are worthless.
    pub fn wait(self) -> Result<T, Refused<T>> {
        let done = self.event.wait();
        let value = self
            .berth
            .lock()
            .take()
            .expect("put back before the event is done");
        match done {
            Ok(()) => Ok(value),
            Err(error) => Err(Refused { value, error }),
        }
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        // Failed or done, nobody writes the value any more.
        let _ = self.event.wait();
    }
}

impl<T> fmt::Debug for Pending<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("event", &self.event)
            .finish_non_exhaustive()
    }
}

/// A page-locked segment; unlocked when dropped. Keeps the segment mapped.
pub struct PageLock {
    pub(crate) bytes: u64,
    pub(crate) _lock: Box<dyn Any + Send + Sync>,
}

impl PageLock {
    /// How much is locked.
    pub fn len_bytes(&self) -> u64 {
        self.bytes
    }
}

impl fmt::Debug for PageLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageLock")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}
