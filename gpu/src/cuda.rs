//! NVIDIA GPUs, through the driver library loaded at run time.
//!
//! ```text
//!  paged KV ──gather kernel──► staging ──one DMA──► slot in a page-locked segment
//! ```
//!
//! Nothing is linked: without libcuda this crate builds, runs and says [`NoCuda`]. cudarc panics at the
//! first call of a symbol the driver lacks, so [`CudaDevice::open`] looks up every one that is called
//! here before it calls any. The kernels are embedded as PTX (`kernels/kv.ptx`), which the driver compiles
//! for its device; no toolkit is needed.
//!
//! Memory comes from `cuMemAlloc` and not from a pool, because pool memory cannot be exported to other
//! processes. Streams do not wait for the default stream. Each keeps what its operations use until their
//! events are done.
//!
//! `unsafe` here rests on three promises: every operation checks its spans against memory of this very
//! device (`DeviceSpan::check`), host memory is owned by the stream's queue or by a [`Pending`] until the
//! event is done, and a stream is waited for before any of that is dropped.

use std::any::Any;
use std::collections::VecDeque;
use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};
use parking_lot::Mutex;

use crate::arena::SegmentInfo;
use crate::device::{
    Completion, Device, DeviceError, DeviceInfo, DeviceKind, DeviceMemory, DeviceSpan, Event,
    MAX_QUEUED, NoCuda, PageLock, PagedKv, Pending, Refused, Stream, next_device,
};
use crate::plan::CopyPlan;
use crate::slot::SlotMut;

/// The kernels, as the driver takes them.
const KERNELS: &str = include_str!("kernels/kv.ptx");
const THREADS: u32 = 256;
/// Words that each thread moves, if the page is long enough.
const WORDS_PER_THREAD: u32 = 4;

/// Every symbol of the driver that this file or cudarc under it calls.
const SYMBOLS: [&str; 34] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8_v2",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// A GPU; see the module.
pub struct CudaDevice {
    info: DeviceInfo,
    shared: Arc<Shared>,
}

struct Shared {
    device: u64,
    context: Arc<CudaContext>,
    /// By word width: 16, 4, 1; gather and scatter. The module is never unloaded: it lives as long as
    /// the primary context.
    kernels: [[Kernel; 2]; 3],
}

#[derive(Clone, Copy)]
struct Kernel(sys::CUfunction);

// SAFETY: a function handle is a name for something in the context, usable from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// Word widths of the kernels, widest first.
const WORDS: [u64; 3] = [16, 4, 1];

/// As `Shape` in kernels/kv.cu, field by field.
#[repr(C)]
struct Shape {
    kv_stride: u64,
    page_stride: u64,
    token_stride: u64,
    head_stride: u64,
    page_bytes: u64,
    block_bytes: u64,
    kv: u32,
    pages_per_block: u32,
    heads: u32,
    row_words: u32,
    page_words: u32,
    flat: u32,
}

fn failed(step: &'static str) -> impl Fn(DriverError) -> DeviceError {
    move |error| DeviceError::Failed {
        step,
        problem: describe(error),
    }
}

fn describe(error: DriverError) -> String {
    let name = error
        .error_name()
        .map(|name| name.to_string_lossy().into_owned());
    let text = error
        .error_string()
        .map(|text| text.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{name} ({text})"),
        _ => format!("CUDA error {}", error.0 as u32),
    }
}

/// Looks for the driver and everything it must have, then counts devices.
///
/// # Errors
/// Why there is no CUDA here. Never panics.
pub fn probe() -> Result<u32, NoCuda> {
    // SAFETY: loads the system's libcuda, as any CUDA program does when it starts.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoCuda::NoDriver);
    }
    // SAFETY: as above; it was found a moment ago.
    let library = unsafe { sys::culib() };
    for symbol in SYMBOLS {
        // SAFETY: the address is only looked up; cudarc has the true signatures.
        let found = unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) };
        if found.is_err() {
            return Err(NoCuda::MissingSymbol { symbol });
        }
    }
    let driver = |step| move |error| NoCuda::Driver(failed(step)(error));
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        other => other.map_err(driver("initialising CUDA"))?,
    }
    let count = result::device::get_count().map_err(driver("counting GPUs"))?;
    Ok(u32::try_from(count).unwrap_or(0))
}

impl CudaDevice {
    /// Opens a GPU.
    ///
    /// # Errors
    /// Why it cannot be used. Never panics.
    pub fn open(ordinal: u32) -> Result<Self, NoCuda> {
        let count = probe()?;
        if ordinal >= count {
            return Err(NoCuda::NoDevice { ordinal, count });
        }
        Self::open_present(ordinal).map_err(NoCuda::Driver)
    }

    fn open_present(ordinal: u32) -> Result<Self, DeviceError> {
        let context = CudaContext::new(ordinal as usize).map_err(failed("opening the GPU"))?;
        let info = DeviceInfo {
            kind: DeviceKind::Cuda,
            ordinal,
            name: context.name().map_err(failed("naming the GPU"))?,
            total_bytes: context.total_mem().map_err(failed("sizing the GPU"))? as u64,
        };
        let image = CString::new(KERNELS).expect("PTX is text without zeros");
        // SAFETY: a zero-terminated PTX text, as the driver wants it.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map_err(failed("loading the kernels"))?;
        let kernel = |name: &str, width: u64| {
            let name = CString::new(format!("terrace_{name}_{width}")).expect("no zeros");
            // SAFETY: the module was just loaded and is never unloaded.
            let function = unsafe { result::module::get_function(module, name) };
            function.map(Kernel).map_err(failed("finding a kernel"))
        };
        let pair = |width| -> Result<[Kernel; 2], DeviceError> {
            Ok([kernel("gather", width)?, kernel("scatter", width)?])
        };
        let kernels = [pair(WORDS[0])?, pair(WORDS[1])?, pair(WORDS[2])?];
        Ok(Self {
            info,
            shared: Arc::new(Shared {
                device: next_device(),
                context,
                kernels,
            }),
        })
    }

    /// Takes device memory that another library owns, such as an engine's KV cache.
    ///
    /// # Safety
    /// `address..address + bytes` is memory of this GPU, and stays allocated and at this address until
    /// the last handle, and every operation that uses one, is gone.
    pub unsafe fn adopt(&self, address: u64, bytes: usize) -> DeviceMemory {
        let allocation = Allocation {
            address,
            owned: false,
            shared: Arc::clone(&self.shared),
        };
        DeviceMemory {
            device: self.shared.device,
            bytes,
            backing: Arc::new(allocation),
        }
    }
}

impl Shared {
    fn bind(&self) -> Result<(), DeviceError> {
        self.context
            .bind_to_thread()
            .map_err(failed("binding the GPU to a thread"))
    }

    fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Allocation, DeviceError> {
        self.bind()?;
        // SAFETY: the context is bound.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(Allocation {
                address,
                owned: true,
                shared: Arc::clone(self),
            }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (free, _) = self
                    .context
                    .mem_get_info()
                    .map_err(failed("asking for memory"))?;
                let (asked_bytes, free_bytes) = (bytes as u64, free as u64);
                Err(DeviceError::OutOfMemory {
                    asked_bytes,
                    free_bytes,
                })
            }
            Err(error) => Err(failed("allocating device memory")(error)),
        }
    }
}

impl Device for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        let (free, _) = self
            .shared
            .context
            .mem_get_info()
            .map_err(failed("asking for memory"))?;
        Ok(free as u64)
    }

    fn alloc(&self, bytes: usize) -> Result<DeviceMemory, DeviceError> {
        let bytes = bytes.max(1);
        let allocation = self.shared.alloc(bytes)?;
        // Our streams do not wait for the default stream, so the zeros are waited for here.
        // SAFETY: just allocated, of this length.
        unsafe { result::memset_d8_sync(allocation.address, 0, bytes) }
            .and_then(|()| self.shared.context.synchronize())
            .map_err(failed("clearing device memory"))?;
        Ok(DeviceMemory {
            device: self.shared.device,
            bytes,
            backing: Arc::new(allocation),
        })
    }

    fn page_lock(&self, segment: &SegmentInfo) -> Result<PageLock, DeviceError> {
        self.shared.bind()?;
        let (base, length) = (
            segment.base().cast::<c_void>(),
            segment.length_bytes as usize,
        );
        // SAFETY: the mapping is whole, and `Locked` keeps the segment mapped until it is unregistered.
        let registered =
            unsafe { sys::cuMemHostRegister_v2(base, length, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        match registered.result() {
            Ok(()) => {}
            Err(DriverError(sys::CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)) => {
                return Err(DeviceError::AlreadyLocked {
                    segment: segment.segment,
                });
            }
            Err(error) => return Err(failed("page-locking a segment")(error)),
        }
        let lock = Locked {
            segment: segment.clone(),
            shared: Arc::clone(&self.shared),
        };
        Ok(PageLock {
            bytes: segment.length_bytes,
            _lock: Box::new(lock),
        })
    }

    fn stream(&self) -> Result<Box<dyn Stream>, DeviceError> {
        let stream = self
            .shared
            .context
            .new_stream()
            .map_err(failed("making a stream"))?;
        Ok(Box::new(Queue {
            shared: Arc::clone(&self.shared),
            stream,
            state: Mutex::new(State {
                moments: VecDeque::new(),
                tables: None,
            }),
        }))
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

struct Allocation {
    address: u64,
    owned: bool,
    shared: Arc<Shared>,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.owned && self.shared.bind().is_ok() {
            // SAFETY: ours, and no operation uses it: each keeps a handle until it is done.
            let freed = unsafe { result::free_sync(self.address) };
            self.shared.context.record_err(freed);
        }
    }
}

struct Locked {
    segment: SegmentInfo,
    shared: Arc<Shared>,
}

impl Drop for Locked {
    fn drop(&mut self) {
        if self.shared.bind().is_ok() {
            // SAFETY: registered with this address; the segment is still mapped.
            let gone = unsafe { sys::cuMemHostUnregister(self.segment.base().cast()) };
            self.shared.context.record_err(gone.result());
        }
    }
}

/// The device address of a span.
fn address(span: &DeviceSpan) -> u64 {
    let allocation: &Allocation = span
        .memory
        .backing
        .downcast_ref()
        .expect("memory of this device is an `Allocation`");
    allocation.address + span.offset as u64
}

/// What an operation uses until it is done.
type Kept = Box<dyn Any + Send>;

/// The end of one operation.
struct Moment {
    event: CudaEvent,
    kept: Mutex<Option<Kept>>,
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
    /// Device memory for the kernels' tables of layers and pages, and its length. Operations of a stream
    /// run in turn, so one is enough.
    tables: Option<(Arc<Allocation>, usize)>,
}

struct Queue {
    shared: Arc<Shared>,
    stream: Arc<CudaStream>,
    state: Mutex<State>,
}

impl Queue {
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
                .record_event(None)
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
        let bases: Vec<u64> = paged.layers.iter().map(address).collect();
        let target = address(blocks);
        let width = word_width(plan, bases.iter().copied().chain([target]));
        let shape = Shape::new(plan, WORDS[width]);
        let kernel = self.shared.kernels[width][direction];
        // Layers first: they need the alignment.
        let mut tables: Vec<u8> = bases.iter().flat_map(|base| base.to_ne_bytes()).collect();
        tables.extend(plan.pages().iter().flat_map(|page| page.to_ne_bytes()));
        let tables: Arc<[u8]> = tables.into();
        let kept = Box::new((paged.clone(), blocks.clone(), Arc::clone(&tables)));
        self.submit(kept, |state| {
            let device = match &state.tables {
                Some((device, length)) if *length >= tables.len() => Arc::clone(device),
                _ => {
                    // The old tables may be in use. This is rare: they only ever grow.
                    self.stream
                        .synchronize()
                        .map_err(failed("an operation on the GPU"))?;
                    let length = tables.len().next_power_of_two();
                    let device = Arc::new(self.shared.alloc(length)?);
                    state.tables = Some((Arc::clone(&device), length));
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

impl Shape {
    fn new(plan: &CopyPlan, word: u64) -> Self {
        let (layout, strides) = (plan.layout(), plan.layout().strides());
        Self {
            kv_stride: strides.kv,
            page_stride: strides.page,
            token_stride: strides.token,
            head_stride: strides.head,
            page_bytes: layout.page_bytes(),
            block_bytes: plan.block_bytes(),
            kv: layout.kv,
            pages_per_block: plan.pages_per_block(),
            heads: layout.heads,
            row_words: (layout.row_bytes() / word).max(1) as u32,
            page_words: (layout.page_bytes() / word) as u32,
            flat: u32::from(layout.pages_are_flat()),
        }
    }
}

/// Which of [`WORDS`] divides everything the kernel will add up.
fn word_width(plan: &CopyPlan, addresses: impl Iterator<Item = u64> + Clone) -> usize {
    let layout = plan.layout();
    let unit = if layout.pages_are_flat() {
        layout.page_bytes()
    } else {
        layout.row_bytes()
    };
    // Every stride is a multiple of the unit.
    let fits = |word: &&u64| {
        unit.is_multiple_of(**word) && addresses.clone().all(|at| at.is_multiple_of(**word))
    };
    let word = WORDS.iter().find(fits).expect("one divides everything");
    WORDS
        .iter()
        .position(|other| other == word)
        .expect("it is from there")
}

impl Stream for Queue {
    fn upload(&self, source: Bytes, target: &DeviceSpan) -> Result<Event, DeviceError> {
        target.check("target", self.shared.device, source.len() as u64)?;
        let to = address(target);
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
        let from = address(source);
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
        let (from, to) = (address(source), address(target));
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
        let completion: &dyn Any = &*event.completion;
        let moment: &Moment = completion
            .downcast_ref()
            .expect("events of this device are these");
        self.stream
            .wait(&moment.event)
            .map_err(failed("waiting for an event"))
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
