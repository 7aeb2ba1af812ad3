//! Loads and saves: queued, run elsewhere, and reported once.
//!
//! ```text
//! submit ─► waiting ─► take ─► running ─► end ─► done ─► finished() or wait()
//!              └──────── at most `max` of all these ────────┘
//!
//! a save      └─ reads the engine's memory ─► gathered ─┘      wait_gathered() waits for that mark on all saves
//! ```
//!
//! Units: jobs. A job that is done counts until somebody has heard of it: an engine that never asks gets no more.
//! Errors: [`Refused`]; what goes wrong in a job is in its report.
//! Why a mark apart from the end: an engine may reuse a block as soon as its bytes are copied, long before the node has
//! them.
//!
//! The work itself is the caller's type; nothing here copies or talks to anybody.

#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    pin::pin,
    time::Duration,
};

use kvclient::clock::{Clock, Tick};
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobKind {
    /// From the node into the engine's blocks.
    Load,
    /// From the engine's blocks to the node.
    Save,
}

impl JobKind {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Save => "save",
        }
    }
}

/// What became of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// The number its submitter gave it.
    pub job: u64,
    /// What it did.
    pub kind: JobKind,
    /// Blocks that arrived verified, or that the node holds now.
    pub blocks: usize,
    /// Bytes of those.
    pub bytes: u64,
    /// Blocks of the engine that did not.
    pub failed_block_ids: Vec<u32>,
    /// From submission to end.
    pub took: Duration,
    /// Why the first of them failed.
    pub reason: Option<String>,
}

/// A job's outcome, as its runner knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Blocks that arrived verified, or that the node holds now.
    pub blocks: usize,
    /// Bytes of those.
    pub bytes: u64,
    /// Blocks of the engine that did not.
    pub failed: Vec<u32>,
    /// Why the first of them failed.
    pub reason: Option<String>,
}

/// Why a job was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// As many jobs are waiting, running or unreported as there may be.
    Full,
    /// One of this number is waiting, running or unreported.
    Known,
    /// No more jobs are taken.
    Closed,
}

/// A job in its runner's hands.
#[derive(Debug)]
pub struct Taken<W> {
    /// Its number.
    pub job: u64,
    /// What to do.
    pub work: W,
    /// For [`Jobs::hurried_since`].
    pub hurries: u64,
}

/// All jobs of one cache. `W` is what a runner needs to do one.
#[derive(Debug)]
pub struct Jobs<W> {
    max: usize,
    state: Mutex<State<W>>,
    /// A load, a save was submitted.
    submitted: [Notify; 2],
    /// A job ended, or a save has read all it needs.
    changed: Condvar,
    /// Saves shall stop reading the engine's memory.
    hurry: Notify,
}

#[derive(Debug)]
struct State<W> {
    waiting: [VecDeque<(u64, W)>; 2],
    live: HashMap<u64, Live>,
    done: VecDeque<Finished>,
    closed: bool,
    /// Grows with every call for saves to stop; a save stops when it began before.
    hurried: u64,
}

#[derive(Debug)]
struct Live {
    kind: JobKind,
    since: Tick,
    /// What the job has to do; what is reported failed if it never runs.
    block_ids: Vec<u32>,
    reads_memory: bool,
}

impl<W> Jobs<W> {
    /// Room for `max` jobs.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self {
            max,
            state: Mutex::new(State {
                waiting: [VecDeque::new(), VecDeque::new()],
                live: HashMap::new(),
                done: VecDeque::new(),
                closed: false,
                hurried: 0,
            }),
            submitted: [Notify::new(), Notify::new()],
            changed: Condvar::new(),
            hurry: Notify::new(),
        }
    }

    /// Queues a job; `work` is made only when there is room for it.
    ///
    /// # Errors
    /// [`Refused`]; then nothing has happened.
    pub fn submit(
        &self,
        job: u64,
        kind: JobKind,
        block_ids: Vec<u32>,
        now: Tick,
        work: impl FnOnce() -> W,
    ) -> Result<(), Refused> {
        let mut state = self.state.lock();
        self.enter(&mut state, job, kind, block_ids, now)?;
        let work = work();
        state.waiting[kind as usize].push_back((job, work));
        drop(state);
        self.submitted[kind as usize].notify_one();
        Ok(())
    }

    /// A job that cannot even begin: reported failed, all of it, as if it had run.
    ///
    /// # Errors
    /// As [`Jobs::submit`].
    pub fn submit_failed(
        &self,
        job: u64,
        kind: JobKind,
        block_ids: Vec<u32>,
        reason: &str,
        now: Tick,
    ) -> Result<(), Refused> {
        let mut state = self.state.lock();
        self.enter(&mut state, job, kind, block_ids, now)?;
        state.give_up(job, reason, now);
        Ok(())
    }

    /// A job that is in a runner's hands already: that of a test.
    #[cfg(test)]
    pub fn submit_taken(&self, job: u64, kind: JobKind, block_ids: Vec<u32>, now: Tick) {
        let mut state = self.state.lock();
        self.enter(&mut state, job, kind, block_ids, now).unwrap();
    }

    fn enter(
        &self,
        state: &mut State<W>,
        job: u64,
        kind: JobKind,
        block_ids: Vec<u32>,
        now: Tick,
    ) -> Result<(), Refused> {
        if state.closed {
            return Err(Refused::Closed);
        }
        if state.knows(job) {
            return Err(Refused::Known);
        }
        if state.live.len() + state.done.len() >= self.max {
            return Err(Refused::Full);
        }
        let live = Live {
            kind,
            since: now,
            block_ids,
            reads_memory: kind == JobKind::Save,
        };
        state.live.insert(job, live);
        Ok(())
    }

    /// The next job of this kind, once there is one. Dropping the future loses none.
    pub async fn take(&self, kind: JobKind) -> Taken<W> {
        loop {
            // Listening before looking: of two jobs submitted between a look and listening, only one call would be kept.
            let mut submitted = pin!(self.submitted[kind as usize].notified());
            submitted.as_mut().enable();
            let next = {
                let mut state = self.state.lock();
                let next = state.waiting[kind as usize].pop_front();
                next.map(|(job, work)| Taken {
                    job,
                    work,
                    hurries: state.hurried,
                })
            };
            match next {
                Some(taken) => return taken,
                None => submitted.await,
            }
        }
    }

    /// The save `job` reads the engine's memory no more.
    pub fn gathered(&self, job: u64) {
        if let Some(live) = self.state.lock().live.get_mut(&job) {
            live.reads_memory = false;
        }
        self.changed.notify_all();
    }

    /// The job is over. Does nothing for a job that is not known (any more).
    pub fn end(&self, job: u64, outcome: Outcome, now: Tick) {
        let mut state = self.state.lock();
        if let Some(live) = state.live.remove(&job) {
            state.done.push_back(live.finish(job, outcome, now));
            drop(state);
            self.changed.notify_all();
        }
    }

    /// The job is over, and nothing came of it.
    pub fn fail(&self, job: u64, reason: &str, now: Tick) {
        self.state.lock().give_up(job, reason, now);
        self.changed.notify_all();
    }

    /// What has ended since the last call.
    pub fn finished(&self) -> Vec<Finished> {
        self.state.lock().done.drain(..).collect()
    }

    /// Waits for one job; `None` when it is not known or not over in time.
    pub fn wait(&self, job: u64, timeout: Duration, clock: &dyn Clock) -> Option<Finished> {
        let until = clock.now().after(timeout);
        let mut state = self.state.lock();
        loop {
            if let Some(at) = state.done.iter().position(|done| done.job == job) {
                return state.done.remove(at);
            }
            let left = until.since(clock.now());
            if left.is_zero() || !state.live.contains_key(&job) {
                return None;
            }
            self.changed.wait_for(&mut state, left);
        }
    }

    /// Waits until no save reads the engine's memory. When time is up, those that wait are ended, those that run are told to
    /// stop, and it waits for that: `false`, and none reads it then either.
    pub fn wait_gathered(&self, timeout: Duration, clock: &dyn Clock) -> bool {
        let until = clock.now().after(timeout);
        let mut state = self.state.lock();
        loop {
            if !state.reads_memory() {
                return true;
            }
            let left = until.since(clock.now());
            if left.is_zero() {
                break;
            }
            self.changed.wait_for(&mut state, left);
        }
        let waiting = self.hurry_saves(&mut state, clock.now());
        while state.reads_memory() {
            self.changed.wait(&mut state);
        }
        drop(state);
        drop(waiting);
        false
    }

    /// Ends the saves that wait and tells those that run to stop reading the engine's memory; does not wait for it.
    pub fn hurry(&self, now: Tick) {
        let mut state = self.state.lock();
        let waiting = self.hurry_saves(&mut state, now);
        drop(state);
        drop(waiting);
        self.changed.notify_all();
    }

    /// The work of those that waited, to be dropped without the lock.
    fn hurry_saves(&self, state: &mut State<W>, now: Tick) -> VecDeque<(u64, W)> {
        state.hurried += 1;
        let waiting = std::mem::take(&mut state.waiting[JobKind::Save as usize]);
        for (job, _) in &waiting {
            state.give_up(*job, "given up: the engine wants its blocks back", now);
        }
        self.hurry.notify_waiters();
        waiting
    }

    /// Ready once saves that were taken at `hurries` shall stop reading the engine's memory.
    pub async fn hurried_since(&self, hurries: u64) {
        loop {
            let hurry = self.hurry.notified();
            if self.state.lock().hurried != hurries {
                return;
            }
            hurry.await;
        }
    }

    /// Jobs that wait or run.
    #[must_use]
    pub fn live(&self) -> usize {
        self.state.lock().live.len()
    }

    /// Takes no more jobs, and ends those that wait. Runners must have been stopped before [`Jobs::end_all`].
    pub fn close(&self, now: Tick) {
        let mut state = self.state.lock();
        state.closed = true;
        state.hurried += 1;
        let waiting = std::mem::take(&mut state.waiting);
        for (job, _) in waiting.iter().flatten() {
            state.give_up(*job, "the cache was closed", now);
        }
        self.hurry.notify_waiters();
        drop(state);
        drop(waiting);
        self.changed.notify_all();
    }

    /// Ends whatever is left: the runners are gone.
    pub fn end_all(&self, reason: &str, now: Tick) {
        let mut state = self.state.lock();
        let left: Vec<u64> = state.live.keys().copied().collect();
        for job in left {
            state.give_up(job, reason, now);
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl<W> State<W> {
    fn knows(&self, job: u64) -> bool {
        self.live.contains_key(&job) || self.done.iter().any(|done| done.job == job)
    }

    fn reads_memory(&self) -> bool {
        self.live.values().any(|live| live.reads_memory)
    }

    fn give_up(&mut self, job: u64, reason: &str, now: Tick) {
        if let Some(live) = self.live.remove(&job) {
            let outcome = Outcome {
                failed: live.block_ids.clone(),
                reason: Some(reason.to_owned()),
                ..Outcome::default()
            };
            self.done.push_back(live.finish(job, outcome, now));
        }
    }
}

impl Live {
    fn finish(self, job: u64, outcome: Outcome, now: Tick) -> Finished {
        Finished {
            job,
            kind: self.kind,
            blocks: outcome.blocks,
            bytes: outcome.bytes,
            failed_block_ids: outcome.failed,
            took: now.since(self.since),
            reason: outcome.reason,
        }
    }
}
