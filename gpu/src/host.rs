//! A device that is none: the same rules in ordinary memory.
//!
//! Each stream is a thread that works off its queue in order; an operation is done when its event says
//! so and not before, so that whoever forgets to wait is caught here and not first on a GPU. Gather and
//! scatter carry out [`CopyPlan::runs`], which is what the kernels are judged by.
//!
//! It can be told to misbehave: [`HostDevice::hold`] lets nothing be done until [`HostDevice::release`],
//! [`HostDevice::fail_after`] makes an operation fail as a device would, and its memory is bounded.
//!
//! No `unsafe`: device memory is a table of vectors under one lock, as if there were one copy engine.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::arena::SegmentInfo;
use crate::device::{
    Completion, Device, DeviceError, DeviceInfo, DeviceKind, DeviceMemory, DeviceSpan, Event,
    MAX_QUEUED, PageLock, PagedKv, Pending, Refused, Stream, next_device,
};
use crate::plan::CopyPlan;
use crate::slot::SlotMut;

/// Device memory of [`HostDevice::default`].
pub const HOST_DEVICE_BYTES: u64 = 1 << 30;

/// The host device; see the module.
#[derive(Debug)]
pub struct HostDevice {
    info: DeviceInfo,
    shared: Arc<Shared>,
}

struct Shared {
    device: u64,
    memory: Mutex<Memory>,
    faults: Mutex<Faults>,
    changed: Condvar,
    locked: Mutex<HashSet<u32>>,
}

#[derive(Default)]
struct Memory {
    next: u64,
    free_bytes: u64,
    allocations: HashMap<u64, Vec<u8>>,
}

#[derive(Default)]
struct Faults {
    held: bool,
    /// Operations that still succeed before one fails.
    fail_after: Option<u64>,
}

impl Default for HostDevice {
    fn default() -> Self {
        Self::new(HOST_DEVICE_BYTES)
    }
}

impl HostDevice {
    /// A device with this much memory, which is taken from the host's as it is allocated.
    pub fn new(memory_bytes: u64) -> Self {
        let info = DeviceInfo {
            kind: DeviceKind::Host,
            ordinal: 0,
            name: "host memory".into(),
            total_bytes: memory_bytes,
        };
        let shared = Shared {
            device: next_device(),
            memory: Mutex::new(Memory {
                free_bytes: memory_bytes,
                ..Memory::default()
            }),
            faults: Mutex::default(),
            changed: Condvar::new(),
            locked: Mutex::default(),
        };
        Self {
            info,
            shared: Arc::new(shared),
        }
    }

    /// From now on nothing is done.
    pub fn hold(&self) {
        self.shared.faults.lock().held = true;
    }

    /// Ends [`Self::hold`].
    pub fn release(&self) {
        self.shared.faults.lock().held = false;
        self.shared.changed.notify_all();
    }

    /// After `operations` more that succeed, one fails, and with it its stream.
    pub fn fail_after(&self, operations: u64) {
        self.shared.faults.lock().fail_after = Some(operations);
    }
}

impl Device for HostDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        Ok(self.shared.memory.lock().free_bytes)
    }

    fn alloc(&self, bytes: usize) -> Result<DeviceMemory, DeviceError> {
        let asked_bytes = bytes.max(1) as u64;
        let mut memory = self.shared.memory.lock();
        if asked_bytes > memory.free_bytes {
            return Err(DeviceError::OutOfMemory {
                asked_bytes,
                free_bytes: memory.free_bytes,
            });
        }
        memory.free_bytes -= asked_bytes;
        let id = memory.next;
        memory.next += 1;
        memory.allocations.insert(id, vec![0; asked_bytes as usize]);
        let backing = Arc::new(Allocation {
            id,
            shared: Arc::clone(&self.shared),
        });
        Ok(DeviceMemory {
            device: self.shared.device,
            bytes: asked_bytes as usize,
            backing,
        })
    }

    fn page_lock(&self, segment: &SegmentInfo) -> Result<PageLock, DeviceError> {
        let number = segment.segment;
        if !self.shared.locked.lock().insert(number) {
            return Err(DeviceError::AlreadyLocked { segment: number });
        }
        let lock = Locked {
            number,
            shared: Arc::clone(&self.shared),
            _segment: segment.clone(),
        };
        Ok(PageLock {
            bytes: segment.length_bytes,
            _lock: Box::new(lock),
        })
    }

    fn stream(&self) -> Result<Box<dyn Stream>, DeviceError> {
        let queue = Arc::new(Queue::default());
        let (theirs, shared) = (Arc::clone(&queue), Arc::clone(&self.shared));
        let worker = std::thread::Builder::new()
            .name("terrace-host-stream".into())
            .spawn(move || theirs.work(&shared))
            .map_err(|source| DeviceError::Failed {
                step: "starting a stream's thread",
                problem: source.to_string(),
            })?;
        let device = self.shared.device;
        Ok(Box::new(HostStream {
            device,
            queue,
            worker: Some(worker),
        }))
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

struct Allocation {
    id: u64,
    shared: Arc<Shared>,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let mut memory = self.shared.memory.lock();
        if let Some(bytes) = memory.allocations.remove(&self.id) {
            memory.free_bytes += bytes.len() as u64;
        }
    }
}

struct Locked {
    number: u32,
    shared: Arc<Shared>,
    _segment: SegmentInfo,
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.shared.locked.lock().remove(&self.number);
    }
}

/// Where a span lies in the table.
#[derive(Clone, Copy)]
struct Place {
    id: u64,
    offset: usize,
}

fn place(span: &DeviceSpan, offset: u64) -> Place {
    let allocation: &Allocation = span
        .memory
        .backing
        .downcast_ref()
        .expect("memory of this device is an `Allocation`");
    Place {
        id: allocation.id,
        offset: span.offset + offset as usize,
    }
}

impl Memory {
    fn bytes(&mut self, at: Place, length: usize) -> &mut [u8] {
        let allocation = self
            .allocations
            .get_mut(&at.id)
            .expect("operations keep their memory");
        &mut allocation[at.offset..at.offset + length]
    }

    fn copy(&mut self, from: Place, to: Place, length: usize) {
        if from.id == to.id {
            let all = self
                .allocations
                .get_mut(&from.id)
                .expect("operations keep their memory");
            return all.copy_within(from.offset..from.offset + length, to.offset);
        }
        let [Some(source), Some(target)] = self.allocations.get_disjoint_mut([&from.id, &to.id])
        else {
            unreachable!("operations keep their memory");
        };
        target[to.offset..to.offset + length]
            .copy_from_slice(&source[from.offset..from.offset + length]);
    }
}

/// Run once. `FnMut` because what it holds must outlive the lock it runs under: dropping the last handle
/// of some memory takes that lock.
type Work = Box<dyn FnMut(&mut Memory) + Send>;

enum Job {
    /// Something to do, and the moment it is done.
    Work(Work, Arc<Moment>),
    /// Something to wait for.
    Wait(Event),
}

#[derive(Default)]
struct Moment {
    outcome: Mutex<Option<Result<(), DeviceError>>>,
    known: Condvar,
}

impl Moment {
    fn settle(&self, outcome: Result<(), DeviceError>) {
        *self.outcome.lock() = Some(outcome);
        self.known.notify_all();
    }
}

impl Completion for Moment {
    fn is_done(&self) -> Result<bool, DeviceError> {
        match &*self.outcome.lock() {
            None => Ok(false),
            Some(outcome) => outcome.clone().map(|()| true),
        }
    }

    fn wait(&self) -> Result<(), DeviceError> {
        let mut outcome = self.outcome.lock();
        loop {
            match &*outcome {
                Some(outcome) => return outcome.clone(),
                None => self.known.wait(&mut outcome),
            }
        }
    }
}

#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    jobs: VecDeque<Job>,
    closing: bool,
    /// What the stream failed with; everything later fails alike.
    failed: Option<DeviceError>,
    /// The moment of the operation enqueued last.
    last: Option<Arc<Moment>>,
}

impl Queue {
    fn push(&self, job: Job) -> Result<(), DeviceError> {
        let mut state = self.state.lock();
        if state.jobs.len() >= MAX_QUEUED {
            return Err(DeviceError::QueueFull { depth: MAX_QUEUED });
        }
        if let Job::Work(_, moment) = &job {
            state.last = Some(Arc::clone(moment));
        }
        state.jobs.push_back(job);
        self.changed.notify_all();
        Ok(())
    }

    /// Works until the stream is closed and its queue is empty.
    fn work(&self, shared: &Shared) {
        loop {
            let (job, failed) = {
                let mut state = self.state.lock();
                loop {
                    if let Some(job) = state.jobs.pop_front() {
                        break (job, state.failed.clone());
                    }
                    if state.closing {
                        return;
                    }
                    self.changed.wait(&mut state);
                }
            };
            match job {
                Job::Wait(event) => {
                    // Its failure is its own stream's; a GPU goes on here too.
                    let _ = event.wait();
                }
                Job::Work(mut work, moment) => {
                    let outcome = match failed {
                        Some(error) => Err(error),
                        None => shared.admit(),
                    };
                    match &outcome {
                        Ok(()) => work(&mut shared.memory.lock()),
                        Err(error) => self.state.lock().failed = Some(error.clone()),
                    }
                    // What the operation kept alive goes before its event is done.
                    drop(work);
                    moment.settle(outcome);
                }
            }
        }
    }
}

impl Shared {
    /// Waits while the device is held; fails if it was told to.
    fn admit(&self) -> Result<(), DeviceError> {
        let mut faults = self.faults.lock();
        while faults.held {
            self.changed.wait(&mut faults);
        }
        match faults.fail_after {
            Some(0) => {
                faults.fail_after = None;
                let problem = "the device was told to fail".to_owned();
                Err(DeviceError::Failed {
                    step: "an operation",
                    problem,
                })
            }
            Some(left) => {
                faults.fail_after = Some(left - 1);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

struct HostStream {
    device: u64,
    queue: Arc<Queue>,
    worker: Option<JoinHandle<()>>,
}

impl HostStream {
    fn enqueue(&self, work: Work) -> Result<Event, DeviceError> {
        let moment = Arc::new(Moment::default());
        self.queue.push(Job::Work(work, Arc::clone(&moment)))?;
        Ok(Event {
            device: self.device,
            completion: moment,
        })
    }

    /// The plan's runs, from pages to blocks or back.
    fn move_pages(
        &self,
        plan: &CopyPlan,
        paged: &PagedKv,
        blocks: &DeviceSpan,
        to_blocks: bool,
    ) -> Result<Event, DeviceError> {
        paged.check(plan, blocks, self.device)?;
        let (paged, blocks, runs) = (paged.clone(), blocks.clone(), plan.runs());
        self.enqueue(Box::new(move |memory| {
            for run in &runs {
                let page = place(&paged.layers[run.layer as usize], run.paged);
                let block = place(&blocks, run.block);
                let (from, to) = if to_blocks {
                    (page, block)
                } else {
                    (block, page)
                };
                memory.copy(from, to, run.length as usize);
            }
        }))
    }
}

impl Drop for HostStream {
    fn drop(&mut self) {
        self.queue.state.lock().closing = true;
        self.queue.changed.notify_all();
        if let Some(worker) = self.worker.take() {
            // A worker that panicked has said so already.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for HostStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queued = self.queue.state.lock().jobs.len();
        f.debug_struct("HostStream")
            .field("queued", &queued)
            .finish_non_exhaustive()
    }
}

impl Stream for HostStream {
    fn upload(&self, source: Bytes, target: &DeviceSpan) -> Result<Event, DeviceError> {
        target.check("target", self.device, source.len() as u64)?;
        let target = target.clone();
        self.enqueue(Box::new(move |memory| {
            memory
                .bytes(place(&target, 0), target.length)
                .copy_from_slice(&source);
        }))
    }

    fn download(
        &self,
        source: &DeviceSpan,
        target: SlotMut,
    ) -> Result<Pending<SlotMut>, Refused<SlotMut>> {
        if let Err(error) = source.check("source", self.device, target.len() as u64) {
            return Err(Refused {
                value: target,
                error,
            });
        }
        let (source, berth) = (source.clone(), Arc::new(Mutex::new(Some(target))));
        let theirs = Arc::clone(&berth);
        let work = Box::new(move |memory: &mut Memory| {
            if let Some(target) = &mut *theirs.lock() {
                target.copy_from_slice(memory.bytes(place(&source, 0), source.length));
            }
        });
        match self.enqueue(work) {
            Ok(event) => Ok(Pending::new(berth, event)),
            Err(error) => {
                let value = berth.lock().take().expect("nobody took it");
                Err(Refused { value, error })
            }
        }
    }

    fn copy(&self, source: &DeviceSpan, target: &DeviceSpan) -> Result<Event, DeviceError> {
        source.check("source", self.device, source.length as u64)?;
        target.check("target", self.device, source.length as u64)?;
        source.check_apart(target)?;
        let (source, target) = (source.clone(), target.clone());
        self.enqueue(Box::new(move |memory| {
            memory.copy(place(&source, 0), place(&target, 0), source.length);
        }))
    }

    fn gather(
        &self,
        plan: &CopyPlan,
        paged: &PagedKv,
        blocks: &DeviceSpan,
    ) -> Result<Event, DeviceError> {
        self.move_pages(plan, paged, blocks, true)
    }

    fn scatter(
        &self,
        plan: &CopyPlan,
        blocks: &DeviceSpan,
        paged: &PagedKv,
    ) -> Result<Event, DeviceError> {
        plan.check_scatter()?;
        self.move_pages(plan, paged, blocks, false)
    }

    fn wait_for(&self, event: &Event) -> Result<(), DeviceError> {
        if event.device != self.device {
            return Err(DeviceError::Foreign { field: "event" });
        }
        self.queue.push(Job::Wait(event.clone()))
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        let last = self.queue.state.lock().last.clone();
        last.map_or(Ok(()), |moment| moment.wait())
    }
}
