//! Ordinary memory for leased blocks that find no slot: counted, and bounded in bytes.
//!
//! ```text
//! landing under a lease ──no slot──► overflow ──► SlotMut on the heap ──► read ──► its readers ──► given back
//!                                       └─ too much is out: wait until readers let go
//! ```
//!
//! The bytes are out for as long as anybody holds the block, however long ago it landed. One block larger than
//! the limit passes alone, because a leased get may wait and may not fail.
//! Units: bytes of slots. Errors: none.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// The account.
#[derive(Debug)]
pub(super) struct Overflow {
    limit_bytes: u64,
    out_bytes: Arc<AtomicU64>,
}

/// Bytes that are out, until it is dropped.
#[derive(Debug)]
pub(super) struct Outside {
    out_bytes: Arc<AtomicU64>,
    bytes: u64,
}

impl Overflow {
    pub(super) fn new(limit_bytes: u64) -> Self {
        Self {
            limit_bytes,
            out_bytes: Arc::default(),
        }
    }

    /// Lets so many bytes out, unless that were too many.
    pub(super) fn take(&self, bytes: u64) -> Option<Outside> {
        let fits = |out: u64| (out == 0 || out + bytes <= self.limit_bytes).then_some(out + bytes);
        self.out_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .ok()?;
        Some(Outside {
            out_bytes: Arc::clone(&self.out_bytes),
            bytes,
        })
    }

    pub(super) fn out_bytes(&self) -> u64 {
        self.out_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.out_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
