//! A batch on its way, and what becomes of it.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::{Condvar, Mutex};

use crate::device::{DeviceError, Event};

/// A batch on its way. Await it, or [`Self::wait`]; whoever drops it does not stop it.
#[must_use = "the pages are in use until the batch is done"]
pub struct Moving<T> {
    fate: Arc<Fate<T>>,
    event: Event,
}

impl<T> Moving<T> {
    pub(super) fn new(fate: Arc<Fate<T>>, event: Event) -> Self {
        Self { fate, event }
    }

    /// The moment from which the engine's pages are its own again, for [`crate::EngineStream::wait_for`].
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// Whether [`Self::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        matches!(*self.fate.state.lock(), State::Done(_))
    }

    /// Waits for it, blocking the thread.
    ///
    /// # Errors
    /// What the device failed with.
    ///
    /// # Panics
    /// If it was awaited to its end already.
    pub fn wait(self) -> Result<T, DeviceError> {
        let mut state = self.fate.state.lock();
        loop {
            match std::mem::replace(&mut *state, State::Told) {
                State::Done(outcome) => return outcome,
                State::Told => panic!("the batch was awaited already"),
                under_way @ State::UnderWay(_) => *state = under_way,
            }
            self.fate.known.wait(&mut state);
        }
    }
}

impl<T> Future for Moving<T> {
    type Output = Result<T, DeviceError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.fate.state.lock();
        match std::mem::replace(&mut *state, State::Told) {
            State::Done(outcome) => Poll::Ready(outcome),
            State::Told => panic!("the batch was awaited already"),
            State::UnderWay(_) => {
                *state = State::UnderWay(Some(context.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl<T> fmt::Debug for Moving<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Moving")
            .field("done", &self.is_done())
            .finish_non_exhaustive()
    }
}

enum State<T> {
    UnderWay(Option<Waker>),
    Done(Result<T, DeviceError>),
    Told,
}

/// What the waiting thread and the caller share.
pub(super) struct Fate<T> {
    state: Mutex<State<T>>,
    known: Condvar,
}

impl<T> Fate<T> {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::UnderWay(None)),
            known: Condvar::new(),
        })
    }

    pub(super) fn settle(&self, outcome: Result<T, DeviceError>) {
        let before = std::mem::replace(&mut *self.state.lock(), State::Done(outcome));
        self.known.notify_all();
        if let State::UnderWay(Some(waker)) = before {
            waker.wake();
        }
    }
}
