//! Batches of blocks between an engine's pages and page-locked memory, several on their way at once.
//!
//! ```text
//!  save   engine's stream ─event─► gather ─► staging ─one DMA─► Staged ─► network, shared memory
//!  load   Staged ─one DMA─► staging ─► (engine's event) scatter ─event─► engine's stream
//!
//!  lane 0   │ gather 0 │ DMA 0 │            │ gather 2 │ DMA 2 │
//!  lane 1              │ gather 1 │ DMA 1 │            │ gather 3 │ DMA 3 │
//!  caller                      │ sends 0    │ sends 1    │ sends 2   …
//! ```
//!
//! A [`Transfer`] has a bounded pool of page-locked [`Staged`] slots and a few lanes, each a stream with its own
//! staging memory on the device and a thread that waits for its events. Whoever saves takes a slot, hands it in, and
//! gets it back full; whoever loads fills a slot and hands it in. Two lanes and two slots more than lanes keep the
//! kernels, the DMA engine and the caller's own copying busy together; no slot free is the back-pressure.
//!
//! The engine's memory is a [`KvPool`]: groups of layers of one shape each, whose pages make up a block in turn.
//!
//! Units: bytes; pages and blocks are counted.
//! Errors: [`TransferError`] before anything is enqueued; what fails on the device is in the answer of its
//! [`Moving`], and its lane goes on with a new stream. After a load that failed the pages named hold a mixture.
//! Why threads and not polling: an event that nobody waits for tells nobody, and the caller's thread is the
//! engine's. Why staging on the device: one DMA of megabytes runs at the link's speed, thousands of rows do not.

mod moving;
mod pool;
mod slots;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use crate::arena::ArenaError;
use crate::device::{Device, DeviceError, DeviceSpan, Event, Stream};
use crate::slots::MAX_SLOT_BYTES;

pub use moving::Moving;
pub use pool::{KvPool, MAX_GROUPS};
pub use slots::Staged;

use moving::Fate;
use pool::Part;
use slots::SlotPool;

/// The most slots of one transfer.
pub const MAX_SLOTS: usize = 64;
/// The most lanes of one transfer.
pub const MAX_LANES: usize = 8;

/// How much memory a transfer takes, and how much it does at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferConfig {
    /// Bytes of the longest batch, 4 KiB to 64 MiB: of each slot, and of each lane's staging memory on the device.
    pub slot_bytes: usize,
    /// Page-locked slots on the host, 1 to [`MAX_SLOTS`].
    pub slots: usize,
    /// Batches that the device works on at once, 1 to [`MAX_LANES`].
    pub lanes: usize,
}

impl Default for TransferConfig {
    /// 64 MiB of host memory and 32 MiB of the device's. 16 MiB is 0.6 ms of a PCIe 4 link: long beside a
    /// kernel's start, short beside a request.
    fn default() -> Self {
        Self {
            slot_bytes: 16 << 20,
            slots: 4,
            lanes: 2,
        }
    }
}

/// Why a batch was not taken, or a transfer not set up.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// A setting that cannot be.
    #[error("{field} is {value}, must be {problem}")]
    Config {
        /// Which.
        field: &'static str,
        /// What it is.
        value: usize,
        /// What it must be.
        problem: &'static str,
    },
    /// No memory for the slots.
    #[error("no memory for {slots} slots")]
    Slots {
        /// How many.
        slots: usize,
        /// Why.
        source: ArenaError,
    },
    /// No thread to wait for events.
    #[error("no thread")]
    Thread(#[source] std::io::Error),
    /// More than a slot holds, or nothing.
    #[error("a batch of {bytes} bytes, must be 1 to {slot_bytes}")]
    Batch {
        /// How long it is.
        bytes: u64,
        /// How long it may be.
        slot_bytes: usize,
    },
    /// A slot of another length than the batch.
    #[error("a slot of {actual} bytes for a batch of {expected}")]
    Length {
        /// What the batch needs.
        expected: u64,
        /// What the slot has.
        actual: usize,
    },
    /// The device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Takes batches to and from a device; see the module.
pub struct Transfer {
    device: Arc<dyn Device>,
    slots: Arc<SlotPool>,
    lanes: Vec<Lane>,
    next: AtomicUsize,
}

/// A stream, what it gathers into, and who waits for it.
struct Lane {
    /// Held while a batch is enqueued, so that batches stay whole.
    stream: Mutex<Box<dyn Stream>>,
    staging: DeviceSpan,
    /// The stream has failed and does nothing any more.
    failed: Arc<AtomicBool>,
    /// `None` once it is closing.
    ends: Option<SyncSender<End>>,
    waiter: Option<JoinHandle<()>>,
}

/// Waits for one batch and tells its caller.
type End = Box<dyn FnOnce() + Send>;

impl Transfer {
    /// Takes the memory, locks its pages and starts a thread per lane.
    ///
    /// # Errors
    /// [`TransferError::Config`] names the field; otherwise there is no memory, no thread or no stream.
    pub fn new(device: Arc<dyn Device>, config: TransferConfig) -> Result<Self, TransferError> {
        let refuse = |field, value, problem| {
            Err(TransferError::Config {
                field,
                value,
                problem,
            })
        };
        let TransferConfig {
            slot_bytes,
            slots,
            lanes,
        } = config;
        if !(4096..=MAX_SLOT_BYTES).contains(&slot_bytes) {
            return refuse("slot_bytes", slot_bytes, "4 KiB to 64 MiB");
        }
        if !(1..=MAX_SLOTS).contains(&slots) {
            return refuse("slots", slots, "1 to 64");
        }
        if !(1..=MAX_LANES).contains(&lanes) {
            return refuse("lanes", lanes, "1 to 8");
        }
        let pool = SlotPool::new(&device, slot_bytes, slots)?;
        let lanes = (0..lanes).map(|number| Lane::new(&*device, number, slot_bytes, slots));
        Ok(Self {
            lanes: lanes.collect::<Result<_, _>>()?,
            slots: pool,
            device,
            next: AtomicUsize::new(0),
        })
    }

    /// The device it moves to and from.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Bytes of the longest batch.
    pub fn slot_bytes(&self) -> usize {
        self.slots.slot_bytes()
    }

    /// Slots that are with callers or on their way.
    pub fn slots_in_use(&self) -> usize {
        self.slots.in_use()
    }

    /// What is page-locked, in bytes.
    pub fn locked_bytes(&self) -> u64 {
        self.slots.locked_bytes()
    }

    /// A slot for a batch of `bytes`, if one is free. What it holds is whatever was there before.
    ///
    /// # Errors
    /// [`TransferError::Batch`] for a length that no slot has.
    pub fn slot(&self, bytes: usize) -> Result<Option<Staged>, TransferError> {
        self.slots.take(bytes, Duration::ZERO)
    }

    /// As [`Self::slot`], and waits this long for one, blocking the thread.
    ///
    /// # Errors
    /// As [`Self::slot`].
    pub fn wait_slot(
        &self,
        bytes: usize,
        timeout: Duration,
    ) -> Result<Option<Staged>, TransferError> {
        self.slots.take(bytes, timeout)
    }

    /// Starts to copy `pages` of the engine into `slot`, block after block; not before `after` is done.
    /// The answer's event is the moment from which the engine may change the pages again. `kept` is held
    /// until the batch is done or has failed, also when the answer is dropped.
    ///
    /// # Errors
    /// A batch that is not as long as the slot, pages that are not there, or the device refused; the slot goes
    /// back to the pool.
    pub fn save(
        &self,
        pool: &KvPool,
        pages: &[u32],
        mut slot: Staged,
        after: Option<&Event>,
        kept: impl Send + 'static,
    ) -> Result<Moving<Staged>, TransferError> {
        let plans = pool.plans(pages)?;
        let bytes = self.check(pool, pages, &slot)?;
        let lane = self.lane();
        let stream = lane.stream(&*self.device)?;
        if let Some(event) = after {
            stream.wait_for(event)?;
        }
        let read = each(
            &plans,
            |part, span| stream.gather(&part.plan, part.paged, span),
            &lane.staging,
        )?;
        let staging = lane.staging.span(0, bytes)?;
        let target = slot.take();
        let pending = match stream.download(&staging, target) {
            Ok(pending) => pending,
            Err(refused) => {
                slot.put_back(refused.value);
                // Gathers are under way, and `kept` must outlast them.
                let _ = read.wait();
                return Err(refused.error.into());
            }
        };
        let (fate, failed) = (Fate::new(), Arc::clone(&lane.failed));
        let moving = Moving::new(Arc::clone(&fate), read);
        lane.end(move || {
            let outcome = match pending.wait() {
                Ok(full) => {
                    slot.put_back(full);
                    Ok(slot)
                }
                Err(refused) => {
                    failed.store(true, Ordering::Release);
                    slot.put_back(refused.value);
                    drop(slot);
                    Err(refused.error)
                }
            };
            drop(kept);
            fate.settle(outcome);
        });
        Ok(moving)
    }

    /// Starts to copy `slot` into `pages` of the engine, block after block. The transfer begins at once, the pages are
    /// written after `after`. The answer's event is the moment from which the engine may use them; `kept` is
    /// held until then, also when the answer is dropped.
    ///
    /// # Errors
    /// As [`Self::save`], and a page that is named twice.
    pub fn load(
        &self,
        pool: &KvPool,
        pages: &[u32],
        slot: Staged,
        after: Option<&Event>,
        kept: impl Send + 'static,
    ) -> Result<Moving<()>, TransferError> {
        let plans = pool.plans(pages)?;
        for plan in &plans {
            plan.plan.check_scatter().map_err(DeviceError::from)?;
        }
        let bytes = self.check(pool, pages, &slot)?;
        let lane = self.lane();
        let stream = lane.stream(&*self.device)?;
        let staging = lane.staging.span(0, bytes)?;
        let source = slot.freeze();
        let uploaded = stream.upload(source.clone(), &staging)?;
        if let Some(event) = after {
            stream.wait_for(event)?;
        }
        let written = each(
            &plans,
            |part, span| stream.scatter(&part.plan, span, part.paged),
            &lane.staging,
        )
        .inspect_err(|_| {
            // The slot is in its hands.
            let _ = uploaded.wait();
        })?;
        let (fate, failed) = (Fate::new(), Arc::clone(&lane.failed));
        let moving = Moving::new(Arc::clone(&fate), written.clone());
        lane.end(move || {
            // Each operation lets go of what it used when it is itself waited for; the slot is the upload's.
            let outcome = uploaded.wait().and(written.wait());
            if outcome.is_err() {
                failed.store(true, Ordering::Release);
            }
            // The slot is free again, and then the caller hears of it.
            drop(source);
            drop(kept);
            fate.settle(outcome);
        });
        Ok(moving)
    }

    /// The lanes in turn.
    fn lane(&self) -> &Lane {
        &self.lanes[self.next.fetch_add(1, Ordering::Relaxed) % self.lanes.len()]
    }

    fn check(&self, pool: &KvPool, pages: &[u32], slot: &Staged) -> Result<usize, TransferError> {
        let bytes = pool.batch_bytes(pages.len());
        if bytes > self.slot_bytes() as u64 {
            return Err(TransferError::Batch {
                bytes,
                slot_bytes: self.slot_bytes(),
            });
        }
        if slot.len() as u64 != bytes {
            return Err(TransferError::Length {
                expected: bytes,
                actual: slot.len(),
            });
        }
        Ok(slot.len())
    }
}

/// Enqueues every part of a batch: the event of the last. When one is refused, those before it are waited for,
/// because the engine's pages are in their hands.
fn each(
    parts: &[Part<'_>],
    enqueue: impl Fn(&Part<'_>, &DeviceSpan) -> Result<Event, DeviceError>,
    staging: &DeviceSpan,
) -> Result<Event, DeviceError> {
    let mut last: Option<Event> = None;
    for part in parts {
        let span = staging.span(part.offset, part.bytes());
        match span.and_then(|span| enqueue(part, &span)) {
            Ok(event) => last = Some(event),
            Err(error) => {
                if let Some(before) = last {
                    let _ = before.wait();
                }
                return Err(error);
            }
        }
    }
    Ok(last.expect("a pool has a group"))
}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transfer")
            .field("device", &self.device)
            .field("lanes", &self.lanes.len())
            .field("slots_in_use", &self.slots_in_use())
            .finish_non_exhaustive()
    }
}

impl Lane {
    fn new(
        device: &dyn Device,
        number: usize,
        slot_bytes: usize,
        slots: usize,
    ) -> Result<Self, TransferError> {
        let (stream, staging) = (device.stream()?, device.alloc(slot_bytes)?.whole());
        // Each batch on its way holds a slot, so no more than that ever wait here.
        let (ends, waiting) = sync_channel::<End>(slots);
        let waiter = std::thread::Builder::new()
            .name(format!("terrace-lane-{number}"))
            .spawn(move || waiting.into_iter().for_each(|end| end()))
            .map_err(TransferError::Thread)?;
        Ok(Self {
            stream: Mutex::new(stream),
            staging,
            failed: Arc::default(),
            ends: Some(ends),
            waiter: Some(waiter),
        })
    }

    /// The stream, a new one if it has failed.
    fn stream(&self, device: &dyn Device) -> Result<MutexGuard<'_, Box<dyn Stream>>, DeviceError> {
        let mut stream = self.stream.lock();
        if self.failed.load(Ordering::Acquire) {
            // The old one waits for what it has when it goes.
            *stream = device.stream()?;
            self.failed.store(false, Ordering::Release);
        }
        Ok(stream)
    }

    fn end(&self, end: impl FnOnce() + Send + 'static) {
        let ends = self.ends.as_ref().expect("only a drop takes it");
        if let Err(refused) = ends.send(Box::new(end)) {
            // The thread is gone, which only a panic in an end can bring about: wait here.
            (refused.0)();
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.ends = None;
        let Some(waiter) = self.waiter.take() else {
            return;
        };
        if waiter.thread().id() == std::thread::current().id() {
            // What a batch kept was the last handle of this transfer: the thread is here, and ends after it.
            return;
        }
        // A waiter that panicked has said so already.
        let _ = waiter.join();
    }
}
