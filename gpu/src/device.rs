//! Devices: memory of their own, and streams that move bytes to and from it.
//!
//! ```text
//!   Device ── alloc ──► DeviceMemory ── span ──► DeviceSpan
//!     │  └─── page_lock(segment) ──► PageLock     (arena memory the device can reach directly)
//!     └────── stream ──► Stream ── upload · download · copy · gather · scatter ──► Event
//! ```
//!
//! Work is enqueued and done later: an operation returns an [`Event`] and keeps what it needs (device
//! memory, source bytes) alive until it is done. A download owns its slot meanwhile and hands it back
//! through [`Pending::wait`]; whoever drops the [`Pending`] waits, so a slot never goes back to the arena
//! while a device may still write it. Operations of one stream happen in order; streams are ordered among
//! themselves by [`Stream::wait_for`] alone.
//!
//! Errors: [`DeviceError`]. Arguments are checked before anything is enqueued. A failure on the device
//! reaches the event of that operation and of every later one of its stream: open another stream.
//! Bounds: at most [`MAX_QUEUED`] operations wait in a stream; more are refused, not blocked.
//!
//! [`open`] answers a device in any case: where there is no GPU it is [`HostDevice`], which keeps the same
//! rules on a thread and in ordinary memory, and the reason why.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::arena::SegmentInfo;
use crate::host::HostDevice;
use crate::layout::{KvLayout, LayoutError};
use crate::plan::CopyPlan;
use crate::slot::SlotMut;

/// The most operations that wait in one stream.
pub const MAX_QUEUED: usize = 1024;

/// Why a device did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Not enough device memory.
    #[error("out of device memory: {asked_bytes} bytes asked for, {free_bytes} free")]
    OutOfMemory {
        /// How much was asked for.
        asked_bytes: u64,
        /// How much there was.
        free_bytes: u64,
    },
    /// A range that does not lie in its memory.
    #[error("{field}: bytes {offset}..{offset}+{length} of {limit}")]
    Bounds {
        /// Which argument.
        field: &'static str,
        /// First byte.
        offset: u64,
        /// How many bytes.
        length: u64,
        /// How long the memory is.
        limit: u64,
    },
    /// Two lengths that must agree and do not.
    #[error("{field}: {actual} bytes, must be {expected}")]
    Length {
        /// Which argument.
        field: &'static str,
        /// How long it must be.
        expected: u64,
        /// How long it is.
        actual: u64,
    },
    /// Memory or an event of another device.
    #[error("{field}: belongs to another device")]
    Foreign {
        /// Which argument.
        field: &'static str,
    },
    /// The plan cannot be carried out.
    #[error(transparent)]
    Plan(#[from] LayoutError),
    /// Too many operations wait already.
    #[error("{depth} operations wait in the stream already")]
    QueueFull {
        /// The bound.
        depth: usize,
    },
    /// The segment is page-locked already.
    #[error("segment {segment} is page-locked already")]
    AlreadyLocked {
        /// Which one.
        segment: u32,
    },
    /// The device or its driver failed.
    #[error("{step} failed: {problem}")]
    Failed {
        /// What was tried.
        step: &'static str,
        /// What the driver said.
        problem: String,
    },
}

/// A refusal that hands back what it was given.
#[derive(Debug)]
pub struct Refused<T> {
    /// What was given.
    pub value: T,
    /// Why it was refused.
    pub error: DeviceError,
}

/// What kind of device it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// Ordinary memory and a thread per stream.
    Host,
    /// An NVIDIA GPU.
    Cuda,
}

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its kind.
    pub kind: DeviceKind,
    /// Its number among its kind.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// All of its memory.
    pub total_bytes: u64,
}

/// A device; see the module.
pub trait Device: Send + Sync + fmt::Debug + 'static {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// Free device memory now.
    ///
    /// # Errors
    /// The driver failed.
    fn free_bytes(&self) -> Result<u64, DeviceError>;

    /// `bytes` zeros of device memory, at least one.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], which leaves the device as it was.
    fn alloc(&self, bytes: usize) -> Result<DeviceMemory, DeviceError>;

    /// Locks a segment's pages, so that transfers to and from its slots are direct and do not wait for
    /// a copy by the processor. Undone when the answer is dropped.
    ///
    /// # Errors
    /// [`DeviceError::AlreadyLocked`], or the driver refused (`ulimit -l` may be the reason).
    fn page_lock(&self, segment: &SegmentInfo) -> Result<PageLock, DeviceError>;

    /// A new stream.
    ///
    /// # Errors
    /// The driver failed.
    fn stream(&self) -> Result<Box<dyn Stream>, DeviceError>;
}

/// A queue of work for a device; see the module.
pub trait Stream: Send + Sync + fmt::Debug {
    /// Copies host bytes to device memory of the same length.
    ///
    /// # Errors
    /// Lengths differ, foreign memory, a full queue, or the driver failed.
    fn upload(&self, source: Bytes, target: &DeviceSpan) -> Result<Event, DeviceError>;

    /// Copies device memory into a slot of the same length, which comes back when that is done.
    ///
    /// # Errors
    /// As [`Self::upload`]; the slot is handed back.
    fn download(
        &self,
        source: &DeviceSpan,
        target: SlotMut,
    ) -> Result<Pending<SlotMut>, Refused<SlotMut>>;

    /// Copies within the device; the spans must not overlap.
    ///
    /// # Errors
    /// As [`Self::upload`], and [`DeviceError::Bounds`] for spans that overlap.
    fn copy(&self, source: &DeviceSpan, target: &DeviceSpan) -> Result<Event, DeviceError>;

    /// Collects the plan's pages into `blocks`, which is [`CopyPlan::total_bytes`] long.
    ///
    /// # Errors
    /// As [`Self::upload`], and a plan for another layout than `paged` has.
    fn gather(
        &self,
        plan: &CopyPlan,
        paged: &PagedKv,
        blocks: &DeviceSpan,
    ) -> Result<Event, DeviceError>;

    /// Spreads `blocks` over the plan's pages.
    ///
    /// # Errors
    /// As [`Self::gather`], and a plan that names a page twice.
    fn scatter(
        &self,
        plan: &CopyPlan,
        blocks: &DeviceSpan,
        paged: &PagedKv,
    ) -> Result<Event, DeviceError>;

    /// Lets nothing that is enqueued later start before `event` is done.
    ///
    /// # Errors
    /// An event of another device, or the driver failed.
    fn wait_for(&self, event: &Event) -> Result<(), DeviceError>;

    /// Waits until nothing is left to do.
    ///
    /// # Errors
    /// What any operation failed with.
    fn synchronize(&self) -> Result<(), DeviceError>;

    /// Pages to a slot: one gather into `staging`, then one transfer.
    ///
    /// # Errors
    /// As [`Self::gather`] and [`Self::download`]; the slot is handed back.
    fn save(
        &self,
        plan: &CopyPlan,
        paged: &PagedKv,
        staging: &DeviceSpan,
        target: SlotMut,
    ) -> Result<Pending<SlotMut>, Refused<SlotMut>> {
        match self.gather(plan, paged, staging) {
            Ok(_) => self.download(staging, target),
            Err(error) => Err(Refused {
                value: target,
                error,
            }),
        }
    }

    /// Host bytes to pages: one transfer into `staging`, then one scatter.
    ///
    /// # Errors
    /// As [`Self::upload`] and [`Self::scatter`].
    fn load(
        &self,
        plan: &CopyPlan,
        source: Bytes,
        staging: &DeviceSpan,
        paged: &PagedKv,
    ) -> Result<Event, DeviceError> {
        self.upload(source, staging)?;
        self.scatter(plan, staging, paged)
    }
}

/// Device memory; freed when the last handle goes, those of enqueued operations included.
#[derive(Clone)]
pub struct DeviceMemory {
    pub(crate) device: u64,
    pub(crate) bytes: usize,
    pub(crate) backing: Arc<dyn Any + Send + Sync>,
}

impl DeviceMemory {
    /// How long it is.
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// All of it.
    pub fn whole(&self) -> DeviceSpan {
        DeviceSpan {
            memory: self.clone(),
            offset: 0,
            length: self.bytes,
        }
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`DeviceError::Bounds`].
    pub fn span(&self, offset: usize, length: usize) -> Result<DeviceSpan, DeviceError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.bytes => Ok(DeviceSpan {
                memory: self.clone(),
                offset,
                length,
            }),
            _ => Err(DeviceError::Bounds {
                field: "span",
                offset: offset as u64,
                length: length as u64,
                limit: self.bytes as u64,
            }),
        }
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

/// A part of some device memory, which it keeps alive.
#[derive(Debug, Clone)]
pub struct DeviceSpan {
    pub(crate) memory: DeviceMemory,
    pub(crate) offset: usize,
    pub(crate) length: usize,
}

impl DeviceSpan {
    /// How long it is.
    pub fn len_bytes(&self) -> usize {
        self.length
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`DeviceError::Bounds`].
    pub fn span(&self, offset: usize, length: usize) -> Result<Self, DeviceError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length => self.memory.span(self.offset + offset, length),
            _ => Err(DeviceError::Bounds {
                field: "span",
                offset: offset as u64,
                length: length as u64,
                limit: self.length as u64,
            }),
        }
    }

    pub(crate) fn check(
        &self,
        field: &'static str,
        device: u64,
        expected: u64,
    ) -> Result<(), DeviceError> {
        if self.memory.device != device {
            return Err(DeviceError::Foreign { field });
        }
        check_length(field, expected, self.length as u64)
    }

    pub(crate) fn check_apart(&self, other: &Self) -> Result<(), DeviceError> {
        let apart = !Arc::ptr_eq(&self.memory.backing, &other.memory.backing)
            || self.offset + self.length <= other.offset
            || other.offset + other.length <= self.offset;
        if apart {
            return Ok(());
        }
        Err(DeviceError::Bounds {
            field: "target",
            offset: other.offset as u64,
            length: other.length as u64,
            limit: self.offset as u64,
        })
    }
}

pub(crate) fn check_length(
    field: &'static str,
    expected: u64,
    actual: u64,
) -> Result<(), DeviceError> {
    if expected == actual {
        Ok(())
    } else {
        Err(DeviceError::Length {
            field,
            expected,
            actual,
        })
    }
}

/// An engine's paged KV memory: one span per layer.
#[derive(Debug, Clone)]
pub struct PagedKv {
    pub(crate) layout: KvLayout,
    pub(crate) layers: Vec<DeviceSpan>,
}

impl PagedKv {
    /// Layers that lie anywhere, as an engine allocates one tensor per layer.
    ///
    /// # Errors
    /// A wrong layout, or spans that are not as many and as long as it says.
    pub fn per_layer(layout: KvLayout, layers: Vec<DeviceSpan>) -> Result<Self, DeviceError> {
        layout.validate()?;
        if layers.len() != layout.layers as usize {
            let problem = format!("{} spans for {} layers", layers.len(), layout.layers);
            return Err(LayoutError::new("layers", problem).into());
        }
        for layer in &layers {
            layer.check("layers", layers[0].memory.device, layout.layer_bytes())?;
        }
        Ok(Self { layout, layers })
    }

    /// Layers that lie one behind the other.
    ///
    /// # Errors
    /// A wrong layout, or memory that is not as long as it says.
    pub fn contiguous(layout: KvLayout, memory: &DeviceSpan) -> Result<Self, DeviceError> {
        layout.validate()?;
        let layer_bytes = layout.layer_bytes();
        check_length(
            "memory",
            layer_bytes * u64::from(layout.layers),
            memory.length as u64,
        )?;
        let length = layer_bytes as usize;
        let layer = |i: usize| DeviceSpan {
            memory: memory.memory.clone(),
            offset: memory.offset + i * length,
            length,
        };
        Ok(Self {
            layout,
            layers: (0..layout.layers as usize).map(layer).collect(),
        })
    }

    /// The layout.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// What gather and scatter must find before they enqueue anything.
    pub(crate) fn check(
        &self,
        plan: &CopyPlan,
        blocks: &DeviceSpan,
        device: u64,
    ) -> Result<(), DeviceError> {
        if *plan.layout() != self.layout {
            return Err(LayoutError::new("layout", "the plan is for another layout").into());
        }
        blocks.check("blocks", device, plan.total_bytes())?;
        for layer in &self.layers {
            layer.check("layers", device, self.layout.layer_bytes())?;
            layer.check_apart(blocks)?;
        }
        Ok(())
    }
}

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

/// Which device to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DevicePreference {
    /// The first GPU, or the host device.
    #[default]
    Auto,
    /// The host device.
    Host,
    /// This GPU, or the host device.
    Cuda {
        /// Its number.
        ordinal: u32,
    },
}

/// Why there is no GPU to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoCuda {
    /// Built without the feature `cuda`.
    #[error("built without the feature cuda")]
    NotBuilt,
    /// No driver on this machine.
    #[error("libcuda is not installed")]
    NoDriver,
    /// A driver that lacks something this crate calls.
    #[error("the CUDA driver lacks {symbol}: it is too old")]
    MissingSymbol {
        /// What it lacks.
        symbol: &'static str,
    },
    /// A driver, but no device, or not this one.
    #[error("GPU {ordinal} is not there: {count} found")]
    NoDevice {
        /// Which was asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// The driver refused.
    #[error("{0}")]
    Driver(DeviceError),
}

/// How [`open`] came to its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// It is what was asked for.
    AsAsked,
    /// It is the host device, because there is no GPU to use.
    HostInstead(NoCuda),
}

impl fmt::Display for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AsAsked => f.write_str("as asked"),
            Self::HostInstead(why) => write!(f, "host memory instead of a GPU: {why}"),
        }
    }
}

/// Opens the device preferred, or the host device and says why. Never panics and needs no CUDA.
pub fn open(preference: DevicePreference) -> (Arc<dyn Device>, Opened) {
    let ordinal = match preference {
        DevicePreference::Host => return (Arc::new(HostDevice::default()), Opened::AsAsked),
        DevicePreference::Auto => 0,
        DevicePreference::Cuda { ordinal } => ordinal,
    };
    match open_cuda(ordinal) {
        Ok(device) => (device, Opened::AsAsked),
        Err(why) => (Arc::new(HostDevice::default()), Opened::HostInstead(why)),
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(ordinal: u32) -> Result<Arc<dyn Device>, NoCuda> {
    Ok(Arc::new(crate::cuda::CudaDevice::open(ordinal)?))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_ordinal: u32) -> Result<Arc<dyn Device>, NoCuda> {
    Err(NoCuda::NotBuilt)
}

/// Numbers devices, so that memory of one is not handed to another.
pub(crate) fn next_device() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
