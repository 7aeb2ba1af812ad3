//! Bytes in memory: the shared arena, devices, streams and copies.
//!
//! ```text
//!  device memory ◄─ stream: gather · scatter · copy ─► arena (page-locked, shared, sealed) ◄─ readers
//! ```
//!
//! This crate does not know what a block is for. All `unsafe` of the workspace lives here, behind safe
//! interfaces.

mod bits;

pub mod arena;
pub mod conformance;
pub mod copy;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod host;
pub mod layout;
pub mod pinned;
pub mod plan;
pub mod ranges;
pub mod segment;
pub mod shared;
pub mod slot;
pub mod slots;
pub mod stage;
pub mod transfer;

pub use arena::{
    Arena, ArenaConfig, ArenaError, ArenaStats, Clearing, DomainId, HugePages, SegmentInfo,
};
pub use copy::copy;
#[cfg(feature = "cuda")]
pub use cuda::CudaDevice;
pub use device::{
    Device, DeviceError, DeviceInfo, DeviceKind, DeviceMemory, DevicePreference, DeviceSpan,
    EngineStream, Event, NoCuda, Opened, PageLock, PagedKv, Pending, Refused, Stream, open,
};
pub use host::HostDevice;
pub use layout::{Arrangement, KvLayout, KvOrder, KvStrides, LayoutError};
pub use pinned::PinnedArena;
pub use plan::{CopyPlan, CopyRun};
pub use ranges::Ranges;
pub use shared::{
    OutOfBounds, ReadSegment, SegmentFds, SharedError, Staging, StagingMap, Toward, unread_bytes,
};
pub use slot::{Location, Slot, SlotMut};
pub use slots::{MAX_SLOT_BYTES, PAGE_BYTES};
pub use stage::Stage;
pub use transfer::{KvPool, Moving, Staged, Transfer, TransferConfig, TransferError};
