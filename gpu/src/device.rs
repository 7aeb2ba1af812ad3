//! Devices: memory of their own, and streams that move bytes to and from it.
//!
//! ```text
//!   Device ── alloc, adopt ──► DeviceMemory ── span ──► DeviceSpan
//!     │  └─── page_lock(segment) ──► PageLock     (arena memory the device can reach directly)
//!     ├────── stream ──► Stream ── upload · download · copy · gather · scatter ──► Event
//!     └────── adopt_stream ──► EngineStream ── record · wait_for ──► Event
//! ```
//!
//! An engine has memory and a stream of its own, which other libraries made. Both are adopted by their numbers:
//! [`Device::adopt`] and [`Device::adopt_stream`]. Our streams then wait for what the engine has enqueued
//! ([`EngineStream::record`]) and the engine's for ours ([`EngineStream::wait_for`]), without a thread waiting.
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
//! [`open`] answers a device in any case: where there is no GPU it is [`crate::HostDevice`], which keeps the same
//! rules on a thread and in ordinary memory, and the reason why.

mod error;
mod event;
mod memory;
mod open;

use std::fmt;

use bytes::Bytes;

use crate::arena::SegmentInfo;
use crate::plan::CopyPlan;
use crate::slot::SlotMut;

pub use error::{DeviceError, Refused};
pub(crate) use event::Completion;
pub use event::{Event, PageLock, Pending};
pub use memory::{DeviceMemory, DeviceSpan, PagedKv};
pub use open::{DevicePreference, NoCuda, Opened, open};

/// The most operations that wait in one stream.
pub const MAX_QUEUED: usize = 1024;

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

    /// Takes memory of this device that another library owns, such as a tensor of an engine's KV cache, by its
    /// address. It is neither freed nor counted here.
    ///
    /// # Safety
    /// `address..address + bytes` is memory of this device and stays allocated, at this address, until the last
    /// handle of it is gone, those of enqueued operations included. The owner may use it meanwhile; what it does
    /// at the same time as an operation here makes the bytes of either a mixture, and is no other harm.
    ///
    /// # Errors
    /// [`DeviceError::Foreign`] where the device knows that the address is not its own; the driver failed.
    unsafe fn adopt(&self, address: u64, bytes: usize) -> Result<DeviceMemory, DeviceError>;

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

    /// A stream that another library made, by the number under which it is known: for CUDA a `CUstream`, 0 for
    /// the default stream (PyTorch: `torch.cuda.current_stream().cuda_stream`). On the host device 0 is the
    /// calling thread, which is what an engine on the processor computes on, and others are [`Stream::handle`].
    ///
    /// # Safety
    /// The stream is one of this device and exists until the answer is dropped.
    ///
    /// # Errors
    /// [`DeviceError::Foreign`] where the device knows that there is no such stream.
    unsafe fn adopt_stream(&self, handle: u64) -> Result<Box<dyn EngineStream>, DeviceError>;
}

/// A stream of somebody else, which can be waited for and made to wait.
pub trait EngineStream: Send + Sync + fmt::Debug {
    /// The moment at which everything is done that the stream has been given so far.
    ///
    /// # Errors
    /// The driver failed.
    fn record(&self) -> Result<Event, DeviceError>;

    /// Lets nothing that is given to the stream later start before `event` is done. The host device's stream 0
    /// is a thread, so there this waits.
    ///
    /// # Errors
    /// An event of another device, or the driver failed.
    fn wait_for(&self, event: &Event) -> Result<(), DeviceError>;
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

    /// The number by which other libraries know this stream; see [`Device::adopt_stream`].
    fn handle(&self) -> u64;

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

/// Numbers devices, so that memory of one is not handed to another.
pub(crate) fn next_device() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
