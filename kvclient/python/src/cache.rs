//! One engine process's view of one namespace: lookups that never wait, loads and saves in threads of their own.
//!
//! ```text
//! engine's thread                     asking (1 thread)             moving (`threads`)
//!   lookup ─► Lookups table ─────────► lookup at the node
//!          ◄── None, or how many ◄──── answer, lease ─ renewed until forgotten
//!   load ───► claim blocks ─► Jobs ──────────────────────────────► get, verify, into the engine's memory
//!   save ───► claim blocks ─► Jobs ──────────────────────────────► gather, put
//!   finished, wait, wait_gathered ◄── Jobs ◄───────────────────────┘
//! ```
//!
//! Units: blocks, bytes, milliseconds where a name says so.
//! Errors: [`Error`] for a call that can never work. That the node is away, late, full or wrong is an answer: 0 blocks, a failed
//! job.
//! Why tasks and not calls: the engine's thread schedules every request; a microsecond there is a microsecond for all.

mod asking;
mod moving;

use std::{
    collections::HashMap,
    sync::{Arc, mpsc},
    time::Duration,
};

use kvclient::{Lease, Namespace, Part, Path, PathReport, Target, clock::Clock};
use parking_lot::{Condvar, Mutex};
use tokio::runtime::{Builder, Handle, Runtime};

pub use self::moving::Blocks;
use crate::{
    cache::moving::Work,
    device::DeviceProblem,
    jobs::{Finished, JobKind, Jobs},
    layout::LayoutError,
    lookups::Lookups,
    memory::{ClaimError, EngineMemory},
    misses::Misses,
    node::{NodeLink, NodeSettings, NodeState},
    transfer::Mover,
};

/// How long closing may take to give leases back.
const FAREWELL: Duration = Duration::from_millis(200);

/// Why a call can never work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field is wrong.
    #[error(transparent)]
    Field(#[from] kvproto::FieldError),
    /// The endpoint, the token.
    #[error(transparent)]
    Client(#[from] kvclient::Error),
    /// The layers, a block.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A block is named twice by one load.
    #[error(transparent)]
    Claim(ClaimError),
    /// The device of the engine's memory.
    #[error(transparent)]
    Device(#[from] DeviceProblem),
    /// Blocks are named before the layout was.
    #[error("the engine's memory is not known; call layout first")]
    NoLayout,
    /// A job of this number is not over, or not reported yet.
    #[error("job {job} is not over, or was not reported yet")]
    JobKnown {
        /// Its number.
        job: u64,
    },
    /// The machine gives no threads.
    #[error("no threads")]
    Threads(#[from] std::io::Error),
    /// Its threads and connections are another process's.
    #[error("the cache was made before a fork; make a new one after it")]
    Forked,
}

/// How a cache works.
#[derive(Clone, Debug)]
pub struct CacheSettings {
    /// Where the node is.
    pub node: NodeSettings,
    /// What must be equal for two engines to share bytes.
    pub spec: Namespace,
    /// This process's part of every block.
    pub part: Part,
    /// Parts that a lookup asks for; empty: only `part`.
    pub parts: Vec<Part>,
    /// How long a lookup may take.
    pub lookup_timeout: Duration,
    /// How long a load or save may take.
    pub transfer_timeout: Duration,
    /// How long a lease holds before it must be renewed.
    pub lease: Duration,
    /// How long lookups stop before a block that failed to load.
    pub miss: Duration,
    /// Threads that move bytes, 1 to 64.
    pub threads: usize,
    /// Loads and saves that wait, run or are unreported.
    pub max_jobs: usize,
    /// Requests whose lookups are remembered.
    pub max_lookups: usize,
}

impl CacheSettings {
    /// The defaults.
    #[must_use]
    pub fn new(node: NodeSettings, spec: Namespace) -> Self {
        Self {
            node,
            spec,
            part: Part::default(),
            parts: Vec::new(),
            lookup_timeout: Duration::from_millis(200),
            transfer_timeout: Duration::from_secs(5),
            lease: Duration::from_secs(10),
            miss: Duration::from_secs(60),
            threads: 2,
            max_jobs: 256,
            max_lookups: 4096,
        }
    }
}

/// A line for the engine's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// Nothing that somebody should look into.
    pub good: bool,
    /// What is new of the node, beginning with a verb.
    pub line: String,
}

/// One engine process's view of one namespace.
#[derive(Debug)]
pub struct Cache {
    shared: Arc<Shared>,
    runtimes: Mutex<Option<Runtimes>>,
    asking: Handle,
    memory: Mutex<Option<Arc<EngineMemory>>>,
    /// What [`Cache::news`] said last.
    told: Mutex<(NodeState, Option<Path>)>,
    /// Of the process that made it: a forked child has the object, and none of its threads.
    process: u32,
}

#[derive(Debug)]
struct Runtimes {
    asking: Runtime,
    moving: Runtime,
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    node: NodeLink,
    /// Taken before `misses` where both are.
    lookups: Mutex<Lookups<Lease>>,
    misses: Mutex<Misses>,
    answered: Condvar,
    jobs: Jobs<Work>,
    mover: Mover,
    parts: Vec<Part>,
    lookup_timeout: Duration,
    lease: Duration,
}

impl Cache {
    /// Starts, and does not wait for the node.
    ///
    /// # Errors
    /// For a setting that can never work.
    pub fn new(settings: CacheSettings) -> Result<Self, Error> {
        settings.spec.validate()?;
        let threads = settings.threads.clamp(1, 64);
        let runtime = |name: &str, threads| {
            Builder::new_multi_thread()
                .worker_threads(threads)
                .max_blocking_threads(4)
                .thread_name(name)
                .enable_all()
                .build()
        };
        let runtimes = Runtimes {
            asking: runtime("terrace-ask", 1)?,
            moving: runtime("terrace-move", threads)?,
        };
        let client = |runtime: &Runtime| {
            let _inside = runtime.enter();
            settings.node.client()
        };
        let node = NodeLink::new(
            client(&runtimes.asking)?,
            client(&runtimes.moving)?,
            settings.spec,
            settings.node.strict,
        );
        let parts = if settings.parts.is_empty() {
            vec![settings.part]
        } else {
            settings.parts
        };
        let shared = Arc::new(Shared {
            node,
            lookups: Mutex::new(Lookups::new(settings.max_lookups, settings.lookup_timeout)),
            misses: Mutex::new(Misses::new(settings.miss)),
            answered: Condvar::new(),
            jobs: Jobs::new(settings.max_jobs),
            mover: Mover::new(settings.part, settings.transfer_timeout),
            parts,
            lookup_timeout: settings.lookup_timeout,
            lease: settings.lease,
        });
        let keeper = Arc::clone(&shared);
        runtimes
            .asking
            .spawn(async move { keeper.node.keep().await });
        runtimes.asking.spawn(asking::renew(Arc::clone(&shared)));
        for _ in 0..threads {
            runtimes
                .moving
                .spawn(moving::run(Arc::clone(&shared), JobKind::Load));
        }
        for _ in 0..threads.div_ceil(2) {
            runtimes
                .moving
                .spawn(moving::run(Arc::clone(&shared), JobKind::Save));
        }
        Ok(Self {
            shared,
            asking: runtimes.asking.handle().clone(),
            runtimes: Mutex::new(Some(runtimes)),
            memory: Mutex::new(None),
            told: Mutex::new((NodeState::Connecting, None)),
            process: std::process::id(),
        })
    }

    /// Whether the node is asked.
    #[must_use]
    pub fn state(&self) -> NodeState {
        self.shared.node.state()
    }

    /// One line: what differs from the namespace known under this label, or why the node is not ready.
    #[must_use]
    pub fn difference(&self) -> Option<String> {
        self.shared.node.problem()
    }

    /// Which way loads and saves go, and what went.
    #[must_use]
    pub fn path(&self) -> PathReport {
        self.shared.node.path()
    }

    /// What is new since the last call: the node was found or lost, or is reached another way.
    #[must_use]
    pub fn news(&self) -> Option<News> {
        let state = self.state();
        let path = (state == NodeState::Ready).then(|| self.path().path);
        let mut told = self.told.lock();
        if std::mem::replace(&mut *told, (state, path)) == (state, path) {
            return None;
        }
        let problem = self.difference();
        let news = |good, line| Some(News { good, line });
        match (path, problem) {
            (Some(path), None) => news(true, format!("is there, over {path}")),
            (Some(path), Some(difference)) => {
                let shared = "no prefix is shared with those who came before";
                news(
                    false,
                    format!("is there, over {path}; {shared}: {difference}"),
                )
            }
            (None, _) if state == NodeState::Connecting => None,
            (None, problem) => {
                let why = problem
                    .map(|problem| format!(" ({problem})"))
                    .unwrap_or_default();
                let then = "the engine goes on without it, and uses it again when it is back";
                news(false, format!("is away{why}; {then}"))
            }
        }
    }

    /// The jobs that ended since the last call.
    #[must_use]
    pub fn finished(&self) -> Vec<Finished> {
        self.shared.jobs.finished()
    }

    /// Waits until no save reads the engine's memory. `false`: time ran out and the rest was given up; none reads it then either.
    #[must_use]
    pub fn wait_gathered(&self, timeout: Duration) -> bool {
        // The copies that a forked child knows of read its parent's memory.
        self.is_forked()
            || self
                .shared
                .jobs
                .wait_gathered(timeout, &*self.shared.node.clock)
    }

    /// Waits for one job.
    #[must_use]
    pub fn wait(&self, job: u64, timeout: Duration) -> Option<Finished> {
        self.shared
            .jobs
            .wait(job, timeout, &*self.shared.node.clock)
    }

    /// Forgets the whole namespace at the node; how many blocks.
    ///
    /// # Errors
    /// Why not, in one line.
    pub fn invalidate_all(&self, timeout: Duration) -> Result<u64, String> {
        let way = self.shared.node.asking().ok_or("the node is away")?;
        let (answer, answered) = mpsc::sync_channel(1);
        self.asking.spawn(async move {
            let client = way.client.with_deadline(timeout);
            let forgotten = client.invalidate(&way.namespace, Target::All).await;
            // Nobody may be waiting any more.
            let _ = answer.send(forgotten);
        });
        match answered.recv_timeout(timeout + FAREWELL) {
            Ok(Ok(blocks)) => Ok(blocks),
            Ok(Err(error)) => Err(self.shared.node.failed(&error)),
            Err(_) => Err("no answer in time".to_owned()),
        }
    }

    /// Counters by name, and what is held now.
    #[must_use]
    pub fn stats(&self) -> HashMap<&'static str, u64> {
        let shared = &self.shared;
        let mut stats: HashMap<_, _> = shared.node.counters.list().into_iter().collect();
        let lookups = shared.lookups.lock();
        stats.insert("lookups_late", lookups.late());
        stats.insert("lookups_known", lookups.len() as u64);
        stats.insert("leases", lookups.leases() as u64);
        drop(lookups);
        stats.insert("misses", shared.misses.lock().len() as u64);
        stats.insert("jobs", shared.jobs.live() as u64);
        stats
    }

    /// Ends every copy and stops the threads. Whoever calls it, and how many at once: none returns before that.
    pub fn close(&self) {
        if self.is_forked() {
            // Nothing runs here. Locks may be held for ever, by threads that only the parent has.
            return;
        }
        // Held to the end, so that a second caller waits for the first.
        let mut runtimes = self.runtimes.lock();
        let Some(Runtimes { asking, moving }) = runtimes.take() else {
            return;
        };
        let shared = &self.shared;
        let ready = shared.node.asking().is_some();
        shared.node.close();
        let now = shared.node.clock.now();
        shared.jobs.close(now);
        // Waits for polls in hand and drops the tasks, and with them every claim on the engine's memory.
        drop(moving);
        let mut memory = self.memory.lock();
        if let Some(memory) = memory.take() {
            // What a device was told to copy it copies; no job is reported before, for its blocks are still in use.
            memory.retire();
        }
        drop(memory);
        shared.jobs.end_all("the cache was closed", now);
        let leases = shared.lookups.lock().clear();
        if ready && !leases.is_empty() {
            asking.block_on(async {
                tokio::select! {
                    () = shared.node.clock.sleep(FAREWELL) => {}
                    () = async { for lease in leases { if lease.release().await.is_err() { break } } } => {}
                }
            });
        }
        drop(asking);
        // Leases that were answered meanwhile, and those that the farewell had no time for: they end with the connection.
        let late = shared.lookups.lock().clear();
        drop(late);
        shared.node.hang_up();
        shared.answered.notify_all();
    }

    fn is_forked(&self) -> bool {
        std::process::id() != self.process
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        if !self.is_forked() {
            return self.close();
        }
        // Threads to wait for are not here, and to unregister a connection would be to do so for the parent.
        std::mem::forget(self.runtimes.get_mut().take());
        std::mem::forget(self.memory.get_mut().take());
        std::mem::forget(Arc::clone(&self.shared));
    }
}

#[cfg(test)]
mod tests;
