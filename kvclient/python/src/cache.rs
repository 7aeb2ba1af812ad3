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

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, mpsc},
    time::Duration,
};

use kvclient::{Lease, LookupOptions, Namespace, Part, PathReport, Target, clock::Clock};
use parking_lot::{Condvar, Mutex};
use tokio::runtime::{Builder, Handle, Runtime};

use crate::{
    device::{DeviceProblem, OnDevice},
    hashes::{self, EngineHashes},
    jobs::{Finished, JobKind, Jobs, Outcome, Refused, Taken},
    layout::{Layer, Layout, LayoutError},
    lookups::{Ask, Lookups, Ticket},
    memory::{ClaimError, EngineMemory},
    misses::Misses,
    node::{NodeLink, NodeSettings, NodeState, Way},
    transfer::{Load, Mover, Save},
};

/// Leases are given up this many lives after their lookup, whatever the engine does.
const LEASE_LIVES: u32 = 12;

/// Shortest pause between two looks at which leases are due.
const RENEW_PAUSE: Duration = Duration::from_millis(20);

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

/// One engine process's view of one namespace.
#[derive(Debug)]
pub struct Cache {
    shared: Arc<Shared>,
    runtimes: Mutex<Option<Runtimes>>,
    asking: Handle,
    memory: Mutex<Option<Arc<EngineMemory>>>,
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

#[derive(Debug)]
enum Work {
    Load(Load),
    Save(Save),
}

impl Work {
    /// Ready once nobody has a claim on its blocks.
    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        match self {
            Self::Load(load) => Box::pin(load.claim.ended()),
            Self::Save(save) => Box::pin(save.claim.ended()),
        }
    }
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
        runtimes.asking.spawn(renew(Arc::clone(&shared)));
        for _ in 0..threads {
            runtimes
                .moving
                .spawn(run(Arc::clone(&shared), JobKind::Load));
        }
        for _ in 0..threads.div_ceil(2) {
            runtimes
                .moving
                .spawn(run(Arc::clone(&shared), JobKind::Save));
        }
        Ok(Self {
            shared,
            asking: runtimes.asking.handle().clone(),
            runtimes: Mutex::new(Some(runtimes)),
            memory: Mutex::new(None),
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

    /// How many blocks from `first` on may be loaded; `None`: on its way.
    ///
    /// # Errors
    /// When the hashes are no hashes.
    pub fn lookup(
        &self,
        request: &str,
        hashes: &[u8],
        width: usize,
        first: usize,
        probe: bool,
    ) -> Result<Option<usize>, Error> {
        let count = hashes::count(hashes, width)?;
        let shared = &self.shared;
        let Some(way) = shared.node.asking() else {
            shared.node.counters.lookups_away.add(1);
            return Ok(Some(0));
        };
        if first >= count {
            return Ok(Some(0));
        }
        let whole = EngineHashes::new;
        let now = shared.node.clock.now();
        let mut lookups = shared.lookups.lock();
        let mut misses = shared.misses.lock();
        let mut asked = None;
        let ticket = match lookups.ask(request, first, now, &mut misses, || {
            let hashes = whole(hashes, width).expect("counted above");
            asked = Some(hashes.clone());
            hashes
        }) {
            Ask::Known(blocks) => return Ok(Some(blocks)),
            Ask::Pending => return Ok(None),
            Ask::Full => {
                shared.node.counters.lookups_full.add(1);
                return Ok(Some(0));
            }
            Ask::New(ticket) => ticket,
        };
        let hashes = asked.expect("a new lookup has taken its hashes");
        let wanted = misses.before(hashes.iter(first..count), now);
        if wanted < count - first {
            shared.node.counters.lookups_cut.add(1);
        }
        if wanted == 0 {
            let none = lookups.answer(request, ticket, 0, None, now, now);
            debug_assert!(none.is_ok());
            return Ok(Some(0));
        }
        drop((misses, lookups));
        shared.node.counters.lookups_asked.add(1);
        let asking = Asking {
            request: request.to_owned(),
            ticket,
            hashes,
            first,
            wanted,
            probe,
        };
        self.asking.spawn(ask(Arc::clone(shared), way, asking));
        Ok(None)
    }

    /// The lease of an answered lookup; 0: none.
    #[must_use]
    pub fn lease(&self, request: &str) -> u64 {
        self.shared.lookups.lock().lease(request)
    }

    /// Gives the lease back and forgets the answer.
    pub fn forget(&self, request: &str) {
        let lease = self.shared.lookups.lock().forget(request);
        // Dropping it queues its release, without waiting.
        drop(lease);
    }

    /// Lookups stop before these blocks for a while.
    ///
    /// # Errors
    /// When the hashes are no hashes.
    pub fn miss(&self, hashes: &[u8], width: usize) -> Result<(), Error> {
        hashes::count(hashes, width)?;
        let now = self.shared.node.clock.now();
        let mut misses = self.shared.misses.lock();
        for hash in hashes.chunks_exact(width) {
            misses.add(hash, now);
        }
        Ok(())
    }

    /// Says where the engine's blocks lie; an empty list forgets it. Waits for copies in the memory known before.
    ///
    /// # Errors
    /// When the layers make no layout; then nothing has changed.
    ///
    /// # Safety
    /// As [`EngineMemory::new`], until [`Cache::close`] or the next call of this has returned. A block belongs to the cache from
    /// `load` or `save` until its job is reported, or for a save until [`Cache::wait_gathered`] has returned.
    #[allow(unsafe_code)]
    pub unsafe fn layout(&self, layers: Vec<Layer>) -> Result<(), Error> {
        // SAFETY: the caller's promise is the same.
        self.relayout(layers, |layout| Ok(unsafe { EngineMemory::new(layout) }))
    }

    /// As [`Cache::layout`], with addresses of `device` (`cuda:N`, or `host`) and the number of the engine's stream there. Jobs
    /// wait on the device for what that stream was given before them.
    ///
    /// # Errors
    /// As [`Cache::layout`], and for a device that is not there; then nothing is known any more.
    ///
    /// # Safety
    /// As [`Cache::layout`], for memory of the device, and the stream exists as long.
    #[allow(unsafe_code)]
    pub unsafe fn layout_on(
        &self,
        layers: Vec<Layer>,
        device: &str,
        stream: u64,
    ) -> Result<(), Error> {
        self.relayout(layers, |layout| {
            // SAFETY: the caller's promise is the same.
            let device = unsafe { OnDevice::new(&layout, device, stream) }?;
            Ok(EngineMemory::on_device(layout, device))
        })
    }

    fn relayout(
        &self,
        layers: Vec<Layer>,
        memory_of: impl FnOnce(Layout) -> Result<Arc<EngineMemory>, Error>,
    ) -> Result<(), Error> {
        let layout = (!layers.is_empty())
            .then(|| Layout::new(layers))
            .transpose()?;
        if self.is_forked() {
            return Err(Error::Forked);
        }
        let mut memory = self.memory.lock();
        if let Some(old) = memory.take() {
            // Claims are what is waited for, not reports: a close that runs meanwhile makes those only after this.
            self.shared.jobs.hurry(self.shared.node.clock.now());
            old.retire();
        }
        *memory = layout.map(memory_of).transpose()?;
        Ok(())
    }

    /// Starts to load blocks `first`, `first + 1`, … into `block_ids`. `false`: the queue is full.
    ///
    /// # Errors
    /// For blocks that are not there, or hashes that do not reach so far.
    pub fn load(
        &self,
        job: u64,
        lease: u64,
        hashes: &[u8],
        width: usize,
        first: usize,
        block_ids: Vec<u32>,
    ) -> Result<bool, Error> {
        let hashes = reaching(hashes, width, first, block_ids.len())?;
        let claim = self.memory()?.write(&block_ids);
        self.submit(job, JobKind::Load, block_ids, claim, |claim| {
            Work::Load(Load {
                lease,
                hashes,
                first,
                claim,
            })
        })
    }

    /// Starts to store `block_ids` as blocks `first`, `first + 1`, …. `false`: the queue is full.
    ///
    /// # Errors
    /// As [`Cache::load`].
    pub fn save(
        &self,
        job: u64,
        hashes: &[u8],
        width: usize,
        first: usize,
        block_ids: Vec<u32>,
    ) -> Result<bool, Error> {
        let hashes = reaching(hashes, width, first, block_ids.len())?;
        let claim = self.memory()?.read(&block_ids);
        self.submit(job, JobKind::Save, block_ids, claim, |claim| {
            Work::Save(Save {
                hashes,
                first,
                claim,
            })
        })
    }

    fn memory(&self) -> Result<Arc<EngineMemory>, Error> {
        if self.is_forked() {
            return Err(Error::Forked);
        }
        self.memory.lock().clone().ok_or(Error::NoLayout)
    }

    fn submit<C>(
        &self,
        job: u64,
        kind: JobKind,
        block_ids: Vec<u32>,
        claim: Result<C, ClaimError>,
        work: impl FnOnce(C) -> Work,
    ) -> Result<bool, Error> {
        let (jobs, now) = (&self.shared.jobs, self.shared.node.clock.now());
        let submitted = match claim {
            Ok(claim) => jobs.submit(job, kind, block_ids, now, || work(claim)),
            // The engine's other jobs are at these blocks, or its memory is just going: an outcome like any other.
            Err(busy @ (ClaimError::Busy { .. } | ClaimError::Retired | ClaimError::Stream(_))) => {
                jobs.submit_failed(job, kind, block_ids, &busy.to_string(), now)
            }
            Err(ClaimError::Layout(error)) => return Err(error.into()),
            Err(twice) => return Err(Error::Claim(twice)),
        };
        match submitted {
            Ok(()) => Ok(true),
            Err(Refused::Known) => Err(Error::JobKnown { job }),
            Err(Refused::Full | Refused::Closed) => {
                self.shared.node.counters.jobs_refused.add(1);
                Ok(false)
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

    /// Waits for a lookup: how many blocks from `first` on are there. With a `request` it is leased and remembered.
    ///
    /// # Errors
    /// When the hashes are no hashes.
    pub fn exists(
        &self,
        hashes: &[u8],
        width: usize,
        timeout: Duration,
        first: usize,
        request: Option<&str>,
    ) -> Result<usize, Error> {
        let clock = &self.shared.node.clock;
        let until = clock.now().after(timeout);
        let unnamed;
        let (request, probe) = match request {
            Some(request) => (request, false),
            None => {
                // Longer than any engine's id, and of this call alone.
                unnamed = format!(
                    "terrace/exists/{:016x}{:016x}",
                    clock.random_u64(),
                    clock.random_u64()
                );
                (unnamed.as_str(), true)
            }
        };
        let found = loop {
            if let Some(found) = self.lookup(request, hashes, width, first, probe)? {
                break found;
            }
            let mut lookups = self.shared.lookups.lock();
            // An answer that came since is seen by the next turn; one that comes from now on wakes this one.
            if lookups.is_pending(request) {
                let left = until.since(clock.now());
                if left.is_zero() {
                    break 0;
                }
                self.shared
                    .answered
                    .wait_for(&mut lookups, left.min(self.shared.lookup_timeout));
            }
        };
        if probe {
            self.forget(request);
        }
        Ok(found)
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

/// Hashes that reach to the last of `count` blocks from `first` on.
fn reaching(bytes: &[u8], width: usize, first: usize, count: usize) -> Result<EngineHashes, Error> {
    let known = hashes::count(bytes, width)?;
    match first.checked_add(count) {
        Some(end) if end <= known => Ok(EngineHashes::new(&bytes[..end * width], width)?),
        _ => Err(kvproto::FieldError::new(
            "hashes",
            format!("has {known} blocks; {count} from {first} on are wanted"),
        )
        .into()),
    }
}

/// One lookup on its way.
struct Asking {
    request: String,
    ticket: Ticket,
    hashes: EngineHashes,
    first: usize,
    wanted: usize,
    probe: bool,
}

async fn ask(shared: Arc<Shared>, way: Way, asking: Asking) {
    let range = asking.first..asking.first + asking.wanted;
    let chain = asking
        .hashes
        .chain(way.namespace.key(), way.namespace.run_blocks(), range);
    let options = LookupOptions {
        parts: shared.parts.clone(),
        probe: asking.probe,
        lease_ttl: shared.lease,
        idempotency_key: None,
    };
    let client = way.client.with_deadline(shared.lookup_timeout);
    let (blocks, lease) = match client.lookup(&way.namespace, &chain, &options).await {
        Ok(found) if asking.probe => (found.present_blocks as usize, None),
        Ok(found) => (found.leased_blocks() as usize, found.lease),
        Err(error) => {
            shared.node.failed(&error);
            shared.node.counters.lookups_away.add(1);
            (0, None)
        }
    };
    let now = shared.node.clock.now();
    let lease = lease.map(|lease| (lease.id().0, lease));
    let renew_at = now.after(shared.lease / 2);
    let answered =
        shared
            .lookups
            .lock()
            .answer(&asking.request, asking.ticket, blocks, lease, now, renew_at);
    if answered.is_ok() {
        shared.node.counters.lookups_answered.add(1);
        shared.node.counters.lookup_blocks.add(blocks as u64);
    }
    // A late answer's lease is released by being dropped here.
    drop(answered);
    shared.answered.notify_all();
}

/// Keeps the leases of answered lookups alive.
async fn renew(shared: Arc<Shared>) {
    loop {
        let pause = (shared.lease / 4).max(RENEW_PAUSE);
        shared.node.clock.sleep(pause).await;
        let now = shared.node.clock.now();
        let (due, given_up) = shared.lookups.lock().due(now, shared.lease * LEASE_LIVES);
        drop(given_up);
        let mut answering = true;
        for (request, ticket, mut lease) in due {
            let renewed = match answering.then_some(()) {
                Some(()) => lease.renew(shared.lease).await,
                None => Ok(false),
            };
            let lease = match renewed {
                Ok(true) => {
                    shared.node.counters.leases_renewed.add(1);
                    Some(lease)
                }
                Ok(false) => None,
                Err(error) => {
                    shared.node.failed(&error);
                    answering = false;
                    None
                }
            };
            let renew_at = shared.node.clock.now().after(shared.lease / 2);
            let unwanted = shared
                .lookups
                .lock()
                .renewed(&request, ticket, lease, renew_at);
            drop(unwanted);
        }
    }
}

/// Does one job of this kind after the other.
async fn run(shared: Arc<Shared>, kind: JobKind) {
    loop {
        let taken = shared.jobs.take(kind).await;
        let job = taken.job;
        let ended = taken.work.ended();
        // A task of its own: should it panic, its claims are dropped, its job ends, and the next one is done.
        let done = tokio::spawn(work(Arc::clone(&shared), taken)).await;
        if let Err(error) = done {
            // A device that was told to copy has shares of them still.
            ended.await;
            shared
                .jobs
                .fail(job, &format!("a defect: {error}"), shared.node.clock.now());
        }
    }
}

async fn work(shared: Arc<Shared>, taken: Taken<Work>) {
    let (node, job) = (&shared.node, taken.job);
    match taken.work {
        Work::Load(load) => {
            let (hashes, first) = (load.hashes.clone(), load.first);
            let blocks: Box<[u32]> = load.claim.blocks().into();
            let (outcome, corrupt) = shared.mover.load(node, load).await;
            shared.missed(&hashes, first, &blocks, &outcome);
            shared.jobs.end(job, outcome, node.clock.now());
            shared.mover.forget(node, &hashes, &corrupt).await;
        }
        Work::Save(save) => {
            let hashes = save.hashes.clone();
            let hurry = shared.jobs.hurried_since(taken.hurries);
            let gathered = || shared.jobs.gathered(job);
            let (outcome, kept) = shared.mover.save(node, save, hurry, gathered).await;
            let mut misses = shared.misses.lock();
            for block in kept {
                misses.remove(hashes.get(block));
            }
            drop(misses);
            shared.jobs.end(job, outcome, node.clock.now());
        }
    }
}

impl Shared {
    /// What a load did not bring, lookups must not promise again at once.
    fn missed(&self, hashes: &EngineHashes, first: usize, blocks: &[u32], outcome: &Outcome) {
        if outcome.failed.is_empty() {
            return;
        }
        let now = self.node.clock.now();
        let mut misses = self.misses.lock();
        // Failed blocks are in the job's order, so one walk finds them.
        let mut failed = outcome.failed.iter().peekable();
        for (at, block) in blocks.iter().enumerate() {
            if failed.next_if_eq(&block).is_some() {
                misses.add(hashes.get(first + at), now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use super::*;

    /// A cache of a node that is not there, and one layer of two blocks for it.
    fn cache(buffer: &mut [u8; 16]) -> Cache {
        let node = NodeSettings {
            endpoint: "127.0.0.1:9".to_owned(),
            owner: None,
            token: None,
            local: "off".to_owned(),
            strict: false,
        };
        let spec = Namespace::opaque("tests", 16, 1);
        let cache = Cache::new(CacheSettings::new(node, spec)).unwrap();
        let layer = Layer {
            address: buffer.as_mut_ptr().expose_provenance(),
            blocks: 2,
            stride_bytes: 8,
            block_bytes: 8,
        };
        // SAFETY: the tests keep the buffer until the cache is closed, and do not look at it.
        #[allow(unsafe_code)]
        unsafe {
            cache.layout(vec![layer]).unwrap();
        }
        cache
    }

    #[test]
    fn no_close_or_layout_returns_and_no_job_is_reported_while_a_copy_runs() {
        let mut buffer = [0; 16];
        let cache = cache(&mut buffer);
        let memory = cache.memory().unwrap();
        // As a device has it, whose copy outlasts the task that started it.
        let copy = memory.write(&[1]).unwrap();
        let now = cache.shared.node.clock.now();
        cache
            .shared
            .jobs
            .submit_taken(7, JobKind::Load, vec![1], now);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let close = || {
                cache.close();
                assert!(over.load(Ordering::SeqCst), "closed while a copy ran");
            };
            scope.spawn(close);
            while memory.read(&[0]).is_ok() {
                thread::yield_now();
            }
            scope.spawn(close);
            scope.spawn(|| {
                // SAFETY: an empty layout promises nothing.
                #[allow(unsafe_code)]
                unsafe {
                    cache.layout(Vec::new()).unwrap();
                }
                assert!(over.load(Ordering::SeqCst), "laid out while a copy ran");
            });
            for _ in 0..1000 {
                thread::yield_now();
            }
            assert!(cache.finished().is_empty());
            over.store(true, Ordering::SeqCst);
            drop(copy);
        });
        assert_eq!(cache.finished()[0].failed_block_ids, [1]);
    }
}
