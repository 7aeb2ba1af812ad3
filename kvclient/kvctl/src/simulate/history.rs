//! What happened, in order, as a digest: two runs that differ in a single byte of it differ here.
//!
//! Shape: each line is the moment in nanoseconds, one word, and the facts. With `--history FILE` the lines are kept.
//! Errors: none; a line that cannot be written ends the file, never the run.

use std::{fmt::Arguments, fmt::Write as _, io::Write, sync::Arc};

use kvserver::clock::{Clock, Tick};
use parking_lot::Mutex;

use super::clock::SimClock;

/// The history of a run.
pub(super) struct History {
    clock: SimClock,
    state: Mutex<State>,
}

struct State {
    digest: blake3::Hasher,
    lines: u64,
    line: String,
    file: Option<Box<dyn Write + Send>>,
}

impl History {
    pub(super) fn new(clock: SimClock, file: Option<Box<dyn Write + Send>>) -> Arc<Self> {
        let state = State {
            digest: blake3::Hasher::new(),
            lines: 0,
            line: String::new(),
            file,
        };
        Arc::new(Self {
            clock,
            state: Mutex::new(state),
        })
    }

    /// Something happened now.
    pub(super) fn note(&self, what: Arguments<'_>) {
        let Tick(now) = self.clock.now();
        let mut state = self.state.lock();
        let State {
            digest,
            lines,
            line,
            file,
        } = &mut *state;
        line.clear();
        // Writing to a string does not fail.
        let _ = writeln!(line, "{} {what}", now.as_nanos());
        digest.update(line.as_bytes());
        *lines += 1;
        if file
            .as_mut()
            .is_some_and(|file| file.write_all(line.as_bytes()).is_err())
        {
            *file = None;
        }
    }

    /// The digest so far, and how many lines it is of.
    pub(super) fn digest(&self) -> (String, u64) {
        let state = self.state.lock();
        (state.digest.finalize().to_hex().to_string(), state.lines)
    }
}
