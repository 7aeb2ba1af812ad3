//! An engine's blocks in a device's memory: how they get to the node's end of it and back.
//!
//! ```text
//! save   engine's stream ─turn─► gather ─► one DMA ─► page-locked slot ─► put
//! load   get ─► page-locked slot ─► one DMA ─► scatter (after the engine's turn) ─► reported
//! ```
//!
//! The turn is the moment at which the engine handed its blocks over: everything its stream was given before is done
//! first, and the engine's thread waits for none of it. Several batches are on their way at once (`kvgpu::Transfer`);
//! slots are what bounds them.
//!
//! Units: blocks, bytes.
//! Errors: [`DeviceProblem`] for a device that is not there or a layout it cannot have; what fails later is the reason of its
//! job, and all blocks of its batch have failed.
//! Why a device named "host": the same path in ordinary memory, so that it is tested where there is no GPU.
//!
//! The `unsafe` here hands two promises on: that the engine's memory stays, and that its stream does.
#![allow(unsafe_code)]

mod batches;
mod opening;
#[cfg(test)]
mod tests;

use std::{mem::ManuallyDrop, sync::Arc, time::Duration};

use kvgpu::{
    Device, DeviceError, EngineStream, Event, KvLayout, KvPool, Moving, PagedKv, Staged, Transfer,
    TransferConfig,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use self::opening::pool;
pub use self::opening::{DeviceProblem, open};
use crate::layout::Layout;

/// Bytes of a batch, unless one block is longer.
pub const BATCH_BYTES: usize = 16 << 20;

/// Page-locked slots, each a batch long: for saves, which hold theirs until the node has taken them, and for loads, which
/// shall not wait for that.
pub const SLOTS: [usize; 2] = [5, 3];

/// What a slot is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// From the device.
    Save,
    /// To it.
    Load,
}

/// Batches that the device works on at once.
pub const LANES: usize = 2;

/// How long a slot may be on its way home after its permit: a few instructions of a lane's thread.
const HOMEWARD: Duration = Duration::from_secs(1);

/// An engine's blocks on a device.
#[derive(Debug)]
pub struct OnDevice {
    transfer: ManuallyDrop<Transfer>,
    pool: ManuallyDrop<KvPool>,
    engine: ManuallyDrop<Box<dyn EngineStream>>,
    /// Of the process that made it: a forked child has neither the threads nor the device.
    process: u32,
    /// One permit per slot, by use, so that tasks wait where the transfer would only say that none is free.
    slots: [Arc<Semaphore>; 2],
}

/// A page-locked slot for one batch.
#[derive(Debug)]
pub struct Slot {
    /// Before the permit: free when the next may come.
    staged: Staged,
    /// Shared with the device while that has the slot.
    permit: Arc<OwnedSemaphorePermit>,
}

impl Drop for OnDevice {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // Dropping would wait for threads that are not here, and for a device that is the parent's.
            return;
        }
        // SAFETY: each once, here, and nothing looks at them after a drop.
        unsafe {
            ManuallyDrop::drop(&mut self.transfer);
            ManuallyDrop::drop(&mut self.pool);
            ManuallyDrop::drop(&mut self.engine);
        }
    }
}

impl OnDevice {
    /// The blocks of `layout`, whose addresses are the device's own. `stream` is the number of the engine's stream there
    /// (`torch.cuda.current_stream().cuda_stream`); 0 is the default stream, on the host the calling thread.
    ///
    /// # Errors
    /// No such device, memory that is not its own, or no memory for the slots.
    ///
    /// # Safety
    /// Until this is dropped, and all that is on its way then has ended (dropping waits for it), the layers are memory of
    /// the device and the stream exists.
    pub unsafe fn new(layout: &Layout, name: &str, stream: u64) -> Result<Self, DeviceProblem> {
        // SAFETY: handed on.
        unsafe { Self::with(name, stream, |device| pool(layout, device)) }
    }

    /// Tensors of one shape, one per layer, each of `kv.layer_bytes()` at its address; a block of the engine is a page, and
    /// becomes `[layer][K, V][token][head]` whatever the tensors' own order is.
    ///
    /// # Errors
    /// As [`OnDevice::new`].
    ///
    /// # Safety
    /// As [`OnDevice::new`].
    pub unsafe fn strided(
        kv: KvLayout,
        addresses: &[u64],
        name: &str,
        stream: u64,
    ) -> Result<Self, DeviceProblem> {
        let pool = |device: &dyn Device| {
            kv.validate()?;
            let adopt = |address: &u64| {
                // SAFETY: handed on.
                let memory = unsafe { device.adopt(*address, kv.layer_bytes() as usize) }?;
                Ok(memory.whole())
            };
            let spans = addresses
                .iter()
                .map(adopt)
                .collect::<Result<_, DeviceError>>()?;
            KvPool::new(vec![PagedKv::per_layer(kv, spans)?], 1)
        };
        // SAFETY: handed on.
        unsafe { Self::with(name, stream, pool) }
    }

    /// # Safety
    /// As [`OnDevice::new`], for the memory of the pool.
    unsafe fn with(
        name: &str,
        stream: u64,
        pool: impl FnOnce(&dyn Device) -> Result<KvPool, DeviceError>,
    ) -> Result<Self, DeviceProblem> {
        let device = open(name)?;
        let failed = |source| DeviceProblem::Device {
            name: name.into(),
            source,
        };
        let pool = pool(&*device).map_err(failed)?;
        // SAFETY: handed on.
        let engine = unsafe { device.adopt_stream(stream) }.map_err(failed)?;
        let config = TransferConfig {
            slot_bytes: BATCH_BYTES.max(pool.block_bytes() as usize),
            slots: SLOTS.iter().sum(),
            lanes: LANES,
        };
        let transfer = Transfer::new(device, config).map_err(|source| DeviceProblem::Transfer {
            name: name.into(),
            source,
        })?;
        Ok(Self {
            transfer: ManuallyDrop::new(transfer),
            pool: ManuallyDrop::new(pool),
            engine: ManuallyDrop::new(engine),
            process: std::process::id(),
            slots: SLOTS.map(|count| Arc::new(Semaphore::new(count))),
        })
    }

    /// The device's own name.
    #[must_use]
    pub fn device_name(&self) -> &str {
        &self.transfer.device().info().name
    }

    /// How many blocks fit in a slot.
    #[must_use]
    pub fn blocks_per_batch(&self) -> usize {
        self.transfer.slot_bytes() / self.pool.block_bytes().max(1) as usize
    }

    /// Bytes of one block.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.pool.block_bytes() as usize
    }

    /// The engine's turn: what its stream has been given so far.
    ///
    /// # Errors
    /// The driver failed.
    pub fn turn(&self) -> Result<Event, DeviceError> {
        self.engine.record()
    }

    /// A slot for `blocks` blocks, if one is free.
    #[must_use]
    pub fn try_slot(&self, what_for: Use, blocks: usize) -> Option<Slot> {
        let slots = Arc::clone(&self.slots[what_for as usize]);
        let permit = slots.try_acquire_owned().ok()?;
        self.staged(permit, blocks).ok()
    }

    /// A slot for `blocks` blocks, once one is free.
    ///
    /// # Errors
    /// More blocks than a slot holds.
    pub async fn slot(&self, what_for: Use, blocks: usize) -> Result<Slot, String> {
        let slots = Arc::clone(&self.slots[what_for as usize]);
        let permit = slots.acquire_owned().await;
        self.staged(permit.expect("the semaphore is never closed"), blocks)
    }

    fn staged(&self, permit: OwnedSemaphorePermit, blocks: usize) -> Result<Slot, String> {
        let bytes = blocks * self.block_bytes();
        // The device lets go of a save's permit just before it lets go of a slot that nobody waits for any more.
        match self.transfer.wait_slot(bytes, HOMEWARD) {
            Ok(Some(staged)) => Ok(Slot {
                staged,
                permit: Arc::new(permit),
            }),
            Ok(None) => Err("no slot is free, against its permit".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Starts to copy these blocks of the engine into `slot`, after its `turn`. `kept` is held until that is done, also when
    /// nobody waits for the answer.
    ///
    /// # Errors
    /// Why the device refused.
    pub fn gather(
        &self,
        slot: Slot,
        block_ids: &[u32],
        turn: &Event,
        kept: impl Send + 'static,
    ) -> Result<Gathering, String> {
        let Slot { staged, permit } = slot;
        // Whoever drops the answer leaves the slot with the device, and so the permit.
        let kept = (kept, Arc::clone(&permit));
        let moving = self
            .transfer
            .save(&self.pool, block_ids, staged, Some(turn), kept)
            .map_err(|error| error.to_string())?;
        Ok(Gathering { moving, permit })
    }

    /// Starts to copy `slot` into these blocks of the engine, after its `turn`. `kept` is held until that is done.
    ///
    /// # Errors
    /// Why the device refused; nothing was written.
    pub fn scatter(
        &self,
        slot: Slot,
        block_ids: &[u32],
        turn: &Event,
        kept: impl Send + 'static,
    ) -> Result<Moving<()>, String> {
        let Slot { staged, permit } = slot;
        self.transfer
            .load(&self.pool, block_ids, staged, Some(turn), (kept, permit))
            .map_err(|error| error.to_string())
    }
}

/// Blocks on their way into a slot.
#[derive(Debug)]
pub struct Gathering {
    moving: Moving<Staged>,
    permit: Arc<OwnedSemaphorePermit>,
}

impl Gathering {
    /// The slot, full; blocks the thread.
    fn wait(self) -> Result<Slot, String> {
        let Self { moving, permit } = self;
        let staged = moving.wait().map_err(|error| error.to_string())?;
        Ok(Slot { staged, permit })
    }

    /// The slot, full.
    ///
    /// # Errors
    /// What the device failed with.
    pub async fn done(self) -> Result<Slot, String> {
        let Self { moving, permit } = self;
        match moving.await {
            Ok(staged) => Ok(Slot { staged, permit }),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Slot {
    /// Its blocks, one after the other.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.staged
    }

    /// Its blocks, one after the other, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.staged
    }
}
