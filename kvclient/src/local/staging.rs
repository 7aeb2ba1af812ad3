//! The client's own shared memory, from which the node copies what is put.
//!
//! ```text
//! free ─grant─► granted ─ written ─ sent ─┬─ answered ──────────► free
//!                  └─ dropped unsent ────►│ no answer: the node may still read it
//!                                         └────────────────────► quarantined, until the attachment ends
//! ```
//!
//! Units: bytes.
//! Errors: none; "it does not fit, ever" is an answer.
//! Why all of a call's blocks at once: two calls that each hold a half and wait for the other's would wait for
//! ever. Why a quarantine: bytes that change while the node copies them would cost that put its checksum, and
//! nobody can say when a frozen node goes on.

use std::sync::atomic::{AtomicBool, Ordering};

use kvgpu::{OutOfBounds, Ranges, StagingMap};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// The staging memory of one attachment.
pub(super) struct Staging {
    map: StagingMap,
    book: Mutex<Book>,
    freed: Notify,
}

struct Book {
    ranges: Ranges,
    granted: u64,
    quarantined_bytes: u64,
}

/// Ranges of one call, the caller's alone until they are given back.
pub(super) struct Grant<'a> {
    staging: &'a Staging,
    ranges: Vec<Range>,
    is_sent: AtomicBool,
}

#[derive(Clone, Copy)]
struct Range {
    offset: u64,
    bytes: u64,
}

impl Staging {
    pub(super) fn new(map: StagingMap) -> Self {
        let book = Book {
            ranges: Ranges::new(map.length_bytes()),
            granted: 0,
            quarantined_bytes: 0,
        };
        Self {
            map,
            book: Mutex::new(book),
            freed: Notify::new(),
        }
    }

    pub(super) fn length_bytes(&self) -> u64 {
        self.map.length_bytes()
    }

    /// Whether so much is quarantined that a new attachment is the better one.
    pub(super) fn is_worn_out(&self) -> bool {
        self.book.lock().quarantined_bytes > self.length_bytes() / 2
    }

    /// A range for each length, waiting for others to be given back; `None` when they do not fit even alone.
    pub(super) async fn grant(&self, lengths: &[u64]) -> Option<Grant<'_>> {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            // From here on a range that comes back is not missed.
            freed.as_mut().enable();
            {
                let mut book = self.book.lock();
                if let Some(ranges) = book.take(lengths) {
                    book.granted += 1;
                    return Some(Grant {
                        staging: self,
                        ranges,
                        is_sent: AtomicBool::new(false),
                    });
                }
                if book.granted == 0 {
                    return None;
                }
            }
            freed.await;
        }
    }
}

impl Book {
    /// All of them or none.
    fn take(&mut self, lengths: &[u64]) -> Option<Vec<Range>> {
        let mut taken = Vec::with_capacity(lengths.len());
        for &bytes in lengths {
            match self.ranges.alloc(bytes) {
                Some(offset) => taken.push(Range { offset, bytes }),
                None => {
                    for range in taken {
                        self.ranges.free(range.offset);
                    }
                    return None;
                }
            }
        }
        Some(taken)
    }
}

impl Grant<'_> {
    /// Where the range of block `i` begins.
    pub(super) fn offset(&self, i: usize) -> u64 {
        self.ranges[i].offset
    }

    /// Copies `bytes` to `at` of the range of block `i`.
    pub(super) fn write(&self, i: usize, at: u64, bytes: &[u8]) -> Result<(), OutOfBounds> {
        let to = self.place(i, at, bytes.len())?;
        self.staging.map.write(to, bytes)
    }

    /// The same for a whole page, and answers its sum.
    pub(super) fn write_page(&self, i: usize, at: u64, page: &[u8]) -> Result<u64, OutOfBounds> {
        let to = self.place(i, at, page.len())?;
        self.staging.map.write_summed(to, page)
    }

    fn place(&self, i: usize, at: u64, bytes: usize) -> Result<u64, OutOfBounds> {
        let range = self.ranges[i];
        if at + bytes as u64 > range.bytes {
            return Err(OutOfBounds {
                offset: at,
                length_bytes: bytes as u64,
                mapped_bytes: range.bytes,
            });
        }
        Ok(range.offset + at)
    }

    /// The node is about to be told: without an answer the ranges are not used again.
    pub(super) fn sent(&self) {
        self.is_sent.store(true, Ordering::Relaxed);
    }

    /// The node is done with them.
    pub(super) fn answered(&self) {
        self.is_sent.store(false, Ordering::Relaxed);
    }
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        let is_sent = *self.is_sent.get_mut();
        let mut book = self.staging.book.lock();
        book.granted -= 1;
        for range in &self.ranges {
            if is_sent {
                book.quarantined_bytes += range.bytes;
            } else {
                book.ranges.free(range.offset);
            }
        }
        drop(book);
        self.staging.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use super::*;

    const BYTES: u64 = 1 << 20;

    fn staging() -> Staging {
        let memory = kvgpu::Staging::create(BYTES).expect("memory");
        let fd = memory.fd().try_clone_to_owned().expect("a descriptor");
        Staging::new(StagingMap::map(fd).expect("a mapping"))
    }

    #[tokio::test]
    async fn a_call_waits_for_room_and_gets_all_of_it_at_once() {
        let staging = staging();
        let first = staging.grant(&[BYTES / 2, BYTES / 4]).await.expect("room");
        let mut second = Box::pin(staging.grant(&[BYTES / 4, BYTES / 2]));
        let mut context = Context::from_waker(Waker::noop());
        assert!(second.as_mut().poll(&mut context).is_pending());
        // What the second could have had meanwhile is free for a third.
        let third = staging.grant(&[BYTES / 4]).await.expect("room");
        drop((first, third));
        assert!(second.await.is_some());
    }

    #[tokio::test]
    async fn what_was_sent_and_not_answered_is_not_given_out_again() {
        let staging = staging();
        let grant = staging.grant(&[BYTES / 2]).await.expect("room");
        grant.sent();
        let offset = grant.offset(0);
        drop(grant);
        assert!(!staging.is_worn_out());
        let other = staging.grant(&[BYTES / 2]).await.expect("the other half");
        assert_ne!(other.offset(0), offset);
        // No wait for what never comes back.
        other.sent();
        other.answered();
        drop(other);
        assert!(staging.grant(&[BYTES]).await.is_none());
        let other = staging.grant(&[4096]).await.expect("the other half");
        other.sent();
        drop(other);
        assert!(staging.is_worn_out());
    }

    #[tokio::test]
    async fn a_block_larger_than_the_memory_never_fits() {
        let staging = staging();
        assert!(staging.grant(&[BYTES + 1]).await.is_none());
        assert!(staging.grant(&[BYTES, 1]).await.is_none());
    }

    #[tokio::test]
    async fn nobody_writes_outside_of_the_own_range() {
        let staging = staging();
        let grant = staging.grant(&[10, 10]).await.expect("room");
        assert!(grant.write(0, 3, &[1; 7]).is_ok());
        assert!(grant.write(0, 4, &[1; 7]).is_err());
    }
}
