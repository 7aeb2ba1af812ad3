//! What a durable tier is told, and why it may not open.
//!
//! Units: bytes, milliseconds.

use std::{io, path::PathBuf};

/// Settings of a [`DurableTier`](super::DurableTier).
#[derive(Clone, Debug)]
pub struct DurableConfig {
    /// Folder that belongs to this tier alone; made if missing.
    pub dir: PathBuf,
    /// Bytes of records that it may hold; more is answered `tier_full`.
    pub capacity_bytes: u64,
    /// Blocks that it may hold. Default 4 Mi; each costs about 250 bytes of memory.
    pub max_blocks: u64,
    /// Bytes that may be on their way at once; more is answered `queue_full`. Default 256 MiB.
    pub queue_bytes: u64,
    /// Reads, and writes, at once. Default 8.
    pub depth: usize,
    /// A read that takes longer is given up as a device failure. Default 10 000.
    pub read_deadline_ms: u64,
    /// A write that takes longer is given up as a device failure. Default 60 000.
    pub write_deadline_ms: u64,
    /// How long it stays out of service after an error, doubling up to sixty times as long. Default
    /// 1 000.
    pub cooldown_ms: u64,
}

impl DurableConfig {
    /// Defaults for a tier of `capacity_bytes` in `dir`.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, capacity_bytes: u64) -> Self {
        Self {
            dir: dir.into(),
            capacity_bytes,
            max_blocks: 4 << 20,
            queue_bytes: 256 << 20,
            depth: 8,
            read_deadline_ms: 10_000,
            write_deadline_ms: 60_000,
            cooldown_ms: 1_000,
        }
    }
}

/// Why a durable tier could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    /// Another process (or another tier of this one) has the folder.
    #[error("{} is in use by another process", dir.display())]
    InUse {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder holds more than the settings allow.
    #[error("{} holds more than max_blocks = {max_blocks} blocks", dir.display())]
    TooManyBlocks {
        /// The folder.
        dir: PathBuf,
        /// The limit.
        max_blocks: u64,
    },
    /// The disk answered with an error.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
}
