//! Why a device refused or failed.

use crate::layout::LayoutError;

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
