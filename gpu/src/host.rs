//! A device that is none: the same rules in ordinary memory.
//!
//! Each stream is a thread that works off its queue in order; an operation is done when its event says
//! so and not before, so that whoever forgets to wait is caught here and not first on a GPU. Gather and
//! scatter carry out [`crate::CopyPlan::runs`], which is what the kernels are judged by.
//!
//! It can be told to misbehave: [`HostDevice::hold`] lets nothing be done until [`HostDevice::release`],
//! [`HostDevice::fail_after`] makes an operation fail as a device would, and its memory is bounded.
//!
//! Device memory is a table under one lock, as if there were one copy engine. It holds vectors, and what was
//! adopted from others (an engine's tensors in ordinary memory), which those may change while it is copied:
//! that is done as between two processes, by `shared::foreign`.

mod memory;
mod queue;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex};

use crate::arena::SegmentInfo;
use crate::device::{
    Device, DeviceError, DeviceInfo, DeviceKind, DeviceMemory, EngineStream, PageLock, Stream,
    next_device,
};
use memory::{Allocation, Memory};
use queue::{Borrowed, HostStream, Queue};

/// Device memory of [`HostDevice::default`].
pub const HOST_DEVICE_BYTES: u64 = 1 << 30;

/// The host device; see the module.
#[derive(Debug)]
pub struct HostDevice {
    info: DeviceInfo,
    shared: Arc<Shared>,
}

struct Shared {
    device: u64,
    memory: Mutex<Memory>,
    faults: Mutex<Faults>,
    changed: Condvar,
    /// By address: segments of two arenas may have one number.
    locked: Mutex<HashSet<usize>>,
    streams: Mutex<Streams>,
}

/// Streams by their handles, which begin at 1: 0 is the calling thread.
#[derive(Default)]
struct Streams {
    last: u64,
    by_handle: HashMap<u64, Weak<Queue>>,
}

#[derive(Default)]
struct Faults {
    held: bool,
    /// By handle; streams of which alone nothing is done.
    held_streams: HashSet<u64>,
    /// Operations that still succeed before one fails.
    fail_after: Option<u64>,
}

impl Default for HostDevice {
    fn default() -> Self {
        Self::new(HOST_DEVICE_BYTES)
    }
}

impl HostDevice {
    /// A device with this much memory, which is taken from the host's as it is allocated.
    pub fn new(memory_bytes: u64) -> Self {
        let info = DeviceInfo {
            kind: DeviceKind::Host,
            ordinal: 0,
            name: "host memory".into(),
            total_bytes: memory_bytes,
        };
        let shared = Shared {
            device: next_device(),
            memory: Mutex::new(Memory::new(memory_bytes)),
            faults: Mutex::default(),
            changed: Condvar::new(),
            locked: Mutex::default(),
            streams: Mutex::default(),
        };
        Self {
            info,
            shared: Arc::new(shared),
        }
    }

    /// From now on nothing is done.
    pub fn hold(&self) {
        self.shared.faults.lock().held = true;
    }

    /// From now on nothing is done of the stream with this handle.
    pub fn hold_stream(&self, handle: u64) {
        self.shared.faults.lock().held_streams.insert(handle);
    }

    /// Ends [`Self::hold`] and [`Self::hold_stream`].
    pub fn release(&self) {
        let mut faults = self.shared.faults.lock();
        faults.held = false;
        faults.held_streams.clear();
        drop(faults);
        self.shared.changed.notify_all();
    }

    /// After `operations` more that succeed, one fails, and with it its stream.
    pub fn fail_after(&self, operations: u64) {
        self.shared.faults.lock().fail_after = Some(operations);
    }

    fn memory(&self, id: u64, address: u64, bytes: usize) -> DeviceMemory {
        DeviceMemory {
            device: self.shared.device,
            address,
            bytes,
            backing: Arc::new(Allocation::new(id, Arc::clone(&self.shared))),
        }
    }
}

impl Device for HostDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        Ok(self.shared.memory.lock().free_bytes())
    }

    fn alloc(&self, bytes: usize) -> Result<DeviceMemory, DeviceError> {
        let bytes = bytes.max(1);
        let (id, address) = self.shared.memory.lock().alloc(bytes)?;
        Ok(self.memory(id, address, bytes))
    }

    unsafe fn adopt(&self, address: u64, bytes: usize) -> Result<DeviceMemory, DeviceError> {
        // SAFETY: the caller promises what is asked for; the handle made below is what keeps it in the table.
        let id = unsafe { self.shared.memory.lock().adopt(address, bytes) }?;
        Ok(self.memory(id, address, bytes))
    }

    fn page_lock(&self, segment: &SegmentInfo) -> Result<PageLock, DeviceError> {
        let base = segment.base().addr();
        if !self.shared.locked.lock().insert(base) {
            return Err(DeviceError::AlreadyLocked {
                segment: segment.segment,
            });
        }
        let lock = Locked {
            base,
            shared: Arc::clone(&self.shared),
            _segment: segment.clone(),
        };
        Ok(PageLock {
            bytes: segment.length_bytes,
            _lock: Box::new(lock),
        })
    }

    fn stream(&self) -> Result<Box<dyn Stream>, DeviceError> {
        HostStream::start(&self.shared).map(|stream| Box::new(stream) as Box<dyn Stream>)
    }

    unsafe fn adopt_stream(&self, handle: u64) -> Result<Box<dyn EngineStream>, DeviceError> {
        let queue = match handle {
            0 => None,
            _ => {
                let streams = self.shared.streams.lock();
                let queue = streams.by_handle.get(&handle).and_then(Weak::upgrade);
                Some(queue.ok_or(DeviceError::Foreign { field: "handle" })?)
            }
        };
        Ok(Box::new(Borrowed::new(self.shared.device, queue)))
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

struct Locked {
    base: usize,
    shared: Arc<Shared>,
    _segment: SegmentInfo,
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.shared.locked.lock().remove(&self.base);
    }
}

impl Shared {
    /// Waits while the device is held; fails if it was told to.
    fn admit(&self, handle: u64) -> Result<(), DeviceError> {
        let mut faults = self.faults.lock();
        while faults.held || faults.held_streams.contains(&handle) {
            self.changed.wait(&mut faults);
        }
        match faults.fail_after {
            Some(0) => {
                faults.fail_after = None;
                let problem = "the device was told to fail".to_owned();
                Err(DeviceError::Failed {
                    step: "an operation",
                    problem,
                })
            }
            Some(left) => {
                faults.fail_after = Some(left - 1);
                Ok(())
            }
            None => Ok(()),
        }
    }
}
