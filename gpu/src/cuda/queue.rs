//! A stream of a GPU: enqueueing copies and kernels, and keeping what they use until they are done.

use std::any::Any;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use cudarc::driver::{CudaEvent, CudaStream, result, sys};
use parking_lot::Mutex;

use super::shape::{Shape, WORDS, word_width};
use super::{Allocation, Shared, failed};
use crate::device::{
    Completion, DeviceError, DeviceSpan, Event, MAX_QUEUED, PagedKv, Pending, Refused, Stream,
};
use crate::plan::CopyPlan;
use crate::slot::SlotMut;

const THREADS: u32 = 256;
/// Words that each thread moves, if the page is long enough.
const WORDS_PER_THREAD: u32 = 4;

/// Room for the tables of some thousand pages.
const MIN_TABLES_BYTES: usize = 16 << 10;

/// What an operation uses until it is done.
type Kept = Box<dyn Any + Send>;

/// Whoever waits for an event sleeps; the driver's default is to spin.
pub(super) const WAIT_WITHOUT_SPINNING: sys::CUevent_flags =
    sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;

/// The end of one operation.
pub(super) struct Moment {
    event: CudaEvent,
    kept: Mutex<Option<Kept>>,
}

impl Moment {
    /// A moment of a stream that keeps nothing.
    pub(super) fn of(event: CudaEvent) -> Self {
        Self {
            event,
            kept: Mutex::new(None),
        }
    }

    /// The driver's event of an event of this device.
    pub(super) fn event_of(event: &Event) -> &CudaEvent {
        let completion: &dyn Any = &*event.completion;
        let moment: &Self = completion
            .downcast_ref()
            .expect("events of this device are these");
        &moment.event
    }
}

impl Completion for Moment {
    fn is_done(&self) -> Result<bool, DeviceError> {
        let bound = self.event.context().bind_to_thread();
        match bound.and_then(|()| self.event.try_is_complete()) {
            Ok(false) => Ok(false),
            // A failed operation is over as well: its context does nothing any more.
            over => {
                self.kept.lock().take();
                over.map_err(failed("an operation on the GPU"))
            }
        }
    }

    fn wait(&self) -> Result<(), DeviceError> {
        let over = self.event.synchronize();
        self.kept.lock().take();
        over.map_err(failed("an operation on the GPU"))
    }
}

struct State {
    /// Operations that may not be done, in order.
    moments: VecDeque<Arc<Moment>>,
    /// Device memory for the kernels' tables of layers and pages, and its length: the last is in use. Operations of a
    /// stream run in turn, so one is enough; what it outgrew stays, because operations before may use it, and whoever
    /// enqueues shall not wait for them. Each is twice the one before, so all together are less than twice the last.
    tables: Vec<(Arc<Allocation>, usize)>,
}

pub(super) struct Queue {
    shared: Arc<Shared>,
    stream: Arc<CudaStream>,
    state: Mutex<State>,
}

impl Queue {
    pub(super) fn new(shared: Arc<Shared>, stream: Arc<CudaStream>) -> Self {
        let state = State {
            moments: VecDeque::new(),
            tables: Vec::new(),
        };
        Self {
            shared,
            stream,
            state: Mutex::new(state),
        }
    }

    /// Enqueues by `launch` and keeps `kept` until that is done.
    fn submit(
        &self,
        kept: Kept,
        launch: impl FnOnce(&mut State) -> Result<(), DeviceError>,
    ) -> Result<Event, DeviceError> {
        self.shared.bind()?;
        let mut state = self.state.lock();
        while state
            .moments
            .front()
            .is_some_and(|moment| !matches!(moment.is_done(), Ok(false)))
        {
            state.moments.pop_front();
        }
        if state.moments.len() >= MAX_QUEUED {
            return Err(DeviceError::QueueFull { depth: MAX_QUEUED });
        }
        let recorded = launch(&mut state).and_then(|()| {
            self.stream
                .record_event(Some(WAIT_WITHOUT_SPINNING))
                .map_err(failed("recording an event"))
        });
        match recorded {
            Ok(event) => {
                let moment = Arc::new(Moment {
                    event,
                    kept: Mutex::new(Some(kept)),
                });
                state.moments.push_back(Arc::clone(&moment));
                Ok(Event {
                    device: self.shared.device,
                    completion: moment,
                })
            }
            Err(error) => {
                // Part of it may be under way and nothing will say when it is done: wait before what it
                // uses goes.
                let _ = self.stream.synchronize();
                drop(kept);
                Err(error)
            }
        }
    }

    fn launch(
        &self,
        plan: &CopyPlan,
        paged: &PagedKv,
        blocks: &DeviceSpan,
        direction: usize,
    ) -> Result<Event, DeviceError> {
        paged.check(plan, blocks, self.shared.device)?;
        let bases: Vec<u64> = paged.layers.iter().map(DeviceSpan::address).collect();
        let target = blocks.address();
        let width = word_width(plan, bases.iter().copied().chain([target]));
        let shape = Shape::new(plan, WORDS[width]);
        let kernel = self.shared.kernels[width][direction];
        // Layers first: they need the alignment.
        let mut tables: Vec<u8> = bases.iter().flat_map(|base| base.to_ne_bytes()).collect();
        tables.extend(plan.pages().iter().flat_map(|page| page.to_ne_bytes()));
        let tables: Arc<[u8]> = tables.into();
        let kept = Box::new((paged.clone(), blocks.clone(), Arc::clone(&tables)));
        self.submit(kept, |state| {
            let device = match state.tables.last() {
                Some((device, length)) if *length >= tables.len() => Arc::clone(device),
                _ => {
                    let length = tables.len().next_power_of_two().max(MIN_TABLES_BYTES);
                    let device = Arc::new(self.shared.alloc(length)?);
                    state.tables.push((Arc::clone(&device), length));
                    device
                }
            };
            let layers = device.address;
            let pages = layers + bases.len() as u64 * 8;
            let grid = (
                shape
                    .page_words
                    .div_ceil(THREADS * WORDS_PER_THREAD)
                    .min(64),
                plan.pages().len() as u32,
                plan.layout().layers * plan.layout().kv,
            );
            let pointer = |value: &u64| std::ptr::from_ref(value).cast_mut().cast::<c_void>();
            let mut parameters = [
                pointer(&layers),
                pointer(&pages),
                pointer(&target),
                std::ptr::from_ref(&shape).cast_mut().cast(),
            ];
            // SAFETY: the tables are as long as `tables`, which outlives the copy in `kept`; the driver
            // reads the parameters before it returns, and they are of the kernel's types; the kernel
            // touches what the plan names, which was checked to lie in `paged` and `blocks`, and both
            // are kept until it is done.
            unsafe {
                result::memcpy_htod_async(layers, &tables, self.stream.cu_stream())
                    .map_err(failed("sending a plan to the GPU"))?;
                result::launch_kernel(
                    kernel.0,
                    grid,
                    (THREADS, 1, 1),
                    0,
                    self.stream.cu_stream(),
                    &mut parameters,
                )
                .map_err(failed("starting a kernel"))
            }
        })
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // What is kept must not go while the GPU uses it.
        let _ = self.stream.synchronize();
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("moments", &self.state.lock().moments.len())
            .finish()
    }
}

impl Stream for Queue {
    fn upload(&self, source: Bytes, target: &DeviceSpan) -> Result<Event, DeviceError> {
        target.check("target", self.shared.device, source.len() as u64)?;
        let to = target.address();
        let kept = Box::new((source.clone(), target.clone()));
        self.submit(kept, |_| {
            // SAFETY: the span is as long as the source, and both are kept until it is done.
            unsafe { result::memcpy_htod_async(to, &source, self.stream.cu_stream()) }
                .map_err(failed("copying to the GPU"))
        })
    }

    fn download(
        &self,
        source: &DeviceSpan,
        target: SlotMut,
    ) -> Result<Pending<SlotMut>, Refused<SlotMut>> {
        if let Err(error) = source.check("source", self.shared.device, target.len() as u64) {
            return Err(Refused {
                value: target,
                error,
            });
        }
        let from = source.address();
        let berth = Arc::new(Mutex::new(Some(target)));
        let kept = Box::new((source.clone(), Arc::clone(&berth)));
        let submitted = self.submit(kept, |_| {
            let mut berth = berth.lock();
            let target = berth.as_deref_mut().expect("nobody took it");
            // SAFETY: the span is as long as the slot; both are kept until it is done, and nobody sees
            // the slot's bytes before `Pending` has waited for that.
            unsafe { result::memcpy_dtoh_async(target, from, self.stream.cu_stream()) }
                .map_err(failed("copying from the GPU"))
        });
        match submitted {
            Ok(event) => Ok(Pending::new(berth, event)),
            Err(error) => {
                let value = berth.lock().take().expect("nobody took it");
                Err(Refused { value, error })
            }
        }
    }

    fn copy(&self, source: &DeviceSpan, target: &DeviceSpan) -> Result<Event, DeviceError> {
        source.check("source", self.shared.device, source.length as u64)?;
        target.check("target", self.shared.device, source.length as u64)?;
        source.check_apart(target)?;
        let (from, to) = (source.address(), target.address());
        self.submit(Box::new((source.clone(), target.clone())), |_| {
            // SAFETY: equally long spans that lie apart, kept until it is done.
            unsafe { result::memcpy_dtod_async(to, from, source.length, self.stream.cu_stream()) }
                .map_err(failed("copying within the GPU"))
        })
    }

    fn gather(
        &self,
        plan: &CopyPlan,
        paged: &PagedKv,
        blocks: &DeviceSpan,
    ) -> Result<Event, DeviceError> {
        self.launch(plan, paged, blocks, 0)
    }

    fn scatter(
        &self,
        plan: &CopyPlan,
        blocks: &DeviceSpan,
        paged: &PagedKv,
    ) -> Result<Event, DeviceError> {
        plan.check_scatter()?;
        self.launch(plan, paged, blocks, 1)
    }

    fn wait_for(&self, event: &Event) -> Result<(), DeviceError> {
        if event.device != self.shared.device {
            return Err(DeviceError::Foreign { field: "event" });
        }
        self.stream
            .wait(Moment::event_of(event))
            .map_err(failed("waiting for an event"))
    }

    fn handle(&self) -> u64 {
        self.stream.cu_stream() as u64
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        let waited = self
            .stream
            .synchronize()
            .map_err(failed("an operation on the GPU"));
        self.state.lock().moments.clear();
        waited
    }
}
