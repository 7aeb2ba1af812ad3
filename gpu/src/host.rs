//! A device that is none: the same rules in ordinary memory.
//!
//! Each stream is a thread that works off its queue in order; an operation is done when its event says
//! so and not before, so that whoever forgets to wait is caught here and not first on a GPU. Gather and
//! scatter carry out [`crate::CopyPlan::runs`], which is what the kernels are judged by.
//!
//! It can be told to misbehave: [`HostDevice::hold`] lets nothing be done until [`HostDevice::release`],
//! [`HostDevice::fail_after`] makes an operation fail as a device would, and its memory is bounded.
//!
//! No `unsafe`: device memory is a table of vectors under one lock, as if there were one copy engine.

mod queue;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::arena::SegmentInfo;
use crate::device::{
    Device, DeviceError, DeviceInfo, DeviceKind, DeviceMemory, DeviceSpan, PageLock, Stream,
    next_device,
};
use queue::HostStream;

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
    locked: Mutex<HashSet<u32>>,
}

#[derive(Default)]
struct Memory {
    next: u64,
    free_bytes: u64,
    allocations: HashMap<u64, Vec<u8>>,
}

#[derive(Default)]
struct Faults {
    held: bool,
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
            memory: Mutex::new(Memory {
                free_bytes: memory_bytes,
                ..Memory::default()
            }),
            faults: Mutex::default(),
            changed: Condvar::new(),
            locked: Mutex::default(),
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

    /// Ends [`Self::hold`].
    pub fn release(&self) {
        self.shared.faults.lock().held = false;
        self.shared.changed.notify_all();
    }

    /// After `operations` more that succeed, one fails, and with it its stream.
    pub fn fail_after(&self, operations: u64) {
        self.shared.faults.lock().fail_after = Some(operations);
    }
}

impl Device for HostDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        Ok(self.shared.memory.lock().free_bytes)
    }

    fn alloc(&self, bytes: usize) -> Result<DeviceMemory, DeviceError> {
        let asked_bytes = bytes.max(1) as u64;
        let mut memory = self.shared.memory.lock();
        if asked_bytes > memory.free_bytes {
            return Err(DeviceError::OutOfMemory {
                asked_bytes,
                free_bytes: memory.free_bytes,
            });
        }
        memory.free_bytes -= asked_bytes;
        let id = memory.next;
        memory.next += 1;
        memory.allocations.insert(id, vec![0; asked_bytes as usize]);
        let backing = Arc::new(Allocation {
            id,
            shared: Arc::clone(&self.shared),
        });
        Ok(DeviceMemory {
            device: self.shared.device,
            bytes: asked_bytes as usize,
            backing,
        })
    }

    fn page_lock(&self, segment: &SegmentInfo) -> Result<PageLock, DeviceError> {
        let number = segment.segment;
        if !self.shared.locked.lock().insert(number) {
            return Err(DeviceError::AlreadyLocked { segment: number });
        }
        let lock = Locked {
            number,
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
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

struct Allocation {
    id: u64,
    shared: Arc<Shared>,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let mut memory = self.shared.memory.lock();
        if let Some(bytes) = memory.allocations.remove(&self.id) {
            memory.free_bytes += bytes.len() as u64;
        }
    }
}

struct Locked {
    number: u32,
    shared: Arc<Shared>,
    _segment: SegmentInfo,
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.shared.locked.lock().remove(&self.number);
    }
}

/// Where a span lies in the table.
#[derive(Clone, Copy)]
struct Place {
    id: u64,
    offset: usize,
}

fn place(span: &DeviceSpan, offset: u64) -> Place {
    let allocation: &Allocation = span
        .memory
        .backing
        .downcast_ref()
        .expect("memory of this device is an `Allocation`");
    Place {
        id: allocation.id,
        offset: span.offset + offset as usize,
    }
}

impl Memory {
    fn bytes(&mut self, at: Place, length: usize) -> &mut [u8] {
        let allocation = self
            .allocations
            .get_mut(&at.id)
            .expect("operations keep their memory");
        &mut allocation[at.offset..at.offset + length]
    }

    fn copy(&mut self, from: Place, to: Place, length: usize) {
        if from.id == to.id {
            let all = self
                .allocations
                .get_mut(&from.id)
                .expect("operations keep their memory");
            return all.copy_within(from.offset..from.offset + length, to.offset);
        }
        let [Some(source), Some(target)] = self.allocations.get_disjoint_mut([&from.id, &to.id])
        else {
            unreachable!("operations keep their memory");
        };
        target[to.offset..to.offset + length]
            .copy_from_slice(&source[from.offset..from.offset + length]);
    }
}

impl Shared {
    /// Waits while the device is held; fails if it was told to.
    fn admit(&self) -> Result<(), DeviceError> {
        let mut faults = self.faults.lock();
        while faults.held {
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
