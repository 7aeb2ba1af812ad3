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
pub mod copy;
pub mod segment;
pub mod slot;
pub mod slots;

pub use arena::{
    Arena, ArenaConfig, ArenaError, ArenaStats, Clearing, DomainId, HugePages, SegmentInfo,
};
pub use copy::copy;
pub use slot::{Location, Slot, SlotMut};
pub use slots::{MAX_SLOT_BYTES, PAGE_BYTES};
