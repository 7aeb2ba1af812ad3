//! A stream of the host device: a thread that works off a bounded queue in order.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use super::Shared;
use super::memory::{Memory, Place};
use crate::device::{
    Completion, DeviceError, DeviceSpan, EngineStream, Event, MAX_QUEUED, PagedKv, Pending,
    Refused, Stream,
};
use crate::plan::CopyPlan;
use crate::slot::SlotMut;

pub(super) struct HostStream {
    device: u64,
    handle: u64,
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    worker: Option<JoinHandle<()>>,
}

impl HostStream {
    pub(super) fn start(shared: &Arc<Shared>) -> Result<Self, DeviceError> {
        let queue = Arc::new(Queue::default());
        let mut streams = shared.streams.lock();
        streams.last += 1;
        let handle = streams.last;
        streams.by_handle.insert(handle, Arc::downgrade(&queue));
        drop(streams);
        let (theirs, device) = (Arc::clone(&queue), Arc::clone(shared));
        let worker = std::thread::Builder::new()
            .name("terrace-host-stream".into())
            .spawn(move || theirs.work(&device, handle))
            .map_err(|source| DeviceError::Failed {
                step: "starting a stream's thread",
                problem: source.to_string(),
            })?;
        Ok(Self {
            device: shared.device,
            handle,
            shared: Arc::clone(shared),
            queue,
            worker: Some(worker),
        })
    }

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
                let page = Place::of(&paged.layers[run.layer as usize], run.paged);
                let block = Place::of(&blocks, run.block);
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
        self.shared.streams.lock().by_handle.remove(&self.handle);
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
            memory.write(Place::of(&target, 0), &source);
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
                memory.read(Place::of(&source, 0), target);
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
            memory.copy(Place::of(&source, 0), Place::of(&target, 0), source.length);
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

    fn handle(&self) -> u64 {
        self.handle
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        let last = self.queue.state.lock().last.clone();
        last.map_or(Ok(()), |moment| moment.wait())
    }
}

/// A stream known by its handle; without a queue the thread that calls, which has done what it was given.
pub(super) struct Borrowed {
    device: u64,
    queue: Option<Arc<Queue>>,
}

impl Borrowed {
    pub(super) fn new(device: u64, queue: Option<Arc<Queue>>) -> Self {
        Self { device, queue }
    }
}

impl fmt::Debug for Borrowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Borrowed")
            .field("thread", &self.queue.is_none())
            .finish_non_exhaustive()
    }
}

impl EngineStream for Borrowed {
    fn record(&self) -> Result<Event, DeviceError> {
        let moment = Arc::new(Moment::default());
        match &self.queue {
            Some(queue) => queue.push(Job::Mark(Arc::clone(&moment)))?,
            None => moment.settle(Ok(())),
        }
        Ok(Event {
            device: self.device,
            completion: moment,
        })
    }

    fn wait_for(&self, event: &Event) -> Result<(), DeviceError> {
        if event.device != self.device {
            return Err(DeviceError::Foreign { field: "event" });
        }
        match &self.queue {
            Some(queue) => queue.push(Job::Wait(event.clone())),
            None => event.wait(),
        }
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
    /// Nothing to do; a moment to come.
    Mark(Arc<Moment>),
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
pub(super) struct Queue {
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
        if state.closing {
            // Only an adopted handle can outlive its stream, against its promise.
            return Err(DeviceError::Foreign { field: "handle" });
        }
        if state.jobs.len() >= MAX_QUEUED {
            return Err(DeviceError::QueueFull { depth: MAX_QUEUED });
        }
        if let Job::Work(_, moment) | Job::Mark(moment) = &job {
            state.last = Some(Arc::clone(moment));
        }
        state.jobs.push_back(job);
        self.changed.notify_all();
        Ok(())
    }

    /// Works until the stream is closed and its queue is empty.
    fn work(&self, shared: &Shared, handle: u64) {
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
                Job::Mark(moment) => moment.settle(failed.map_or(Ok(()), Err)),
                Job::Work(mut work, moment) => {
                    let outcome = match failed {
                        Some(error) => Err(error),
                        None => shared.admit(handle),
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
