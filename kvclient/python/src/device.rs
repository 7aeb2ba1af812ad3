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

use std::{collections::VecDeque, mem::ManuallyDrop, sync::Arc, time::Duration};

use kvgpu::{
    Device, DeviceError, DevicePreference, EngineStream, Event, KvLayout, KvPool, Moving, NoCuda,
    Opened, PagedKv, Staged, Transfer, TransferConfig, TransferError,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::layout::{Layer, Layout};

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

/// Why blocks cannot be on this device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceProblem {
    /// No such name.
    #[error("device {name:?} is none; cuda:0, cuda:1, … and host are")]
    Name {
        /// What was asked for.
        name: String,
    },
    /// No such GPU.
    #[error("device {name}: {source}")]
    Absent {
        /// What was asked for.
        name: String,
        /// Why it is not there.
        source: NoCuda,
    },
    /// Memory that is not the device's, or a layout that it cannot have.
    #[error("device {name}: {source}")]
    Device {
        /// On which.
        name: String,
        /// What is wrong.
        source: DeviceError,
    },
    /// No memory or threads for the transfer.
    #[error("device {name}: {source}")]
    Transfer {
        /// On which.
        name: String,
        /// What is wrong.
        source: TransferError,
    },
}

/// Opens a device by its name: `cuda:N` or `host`.
///
/// # Errors
/// A name that is none, or a GPU that is not there; never the host instead.
pub fn open(name: &str) -> Result<Arc<dyn Device>, DeviceProblem> {
    let preference = match (name, name.strip_prefix("cuda:").map(str::parse)) {
        ("host", _) => DevicePreference::Host,
        ("cuda", _) => DevicePreference::Cuda { ordinal: 0 },
        (_, Some(Ok(ordinal))) => DevicePreference::Cuda { ordinal },
        _ => return Err(DeviceProblem::Name { name: name.into() }),
    };
    match kvgpu::open(preference) {
        (device, Opened::AsAsked) => Ok(device),
        (_, Opened::HostInstead(source)) => Err(DeviceProblem::Absent {
            name: name.into(),
            source,
        }),
    }
}

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

impl OnDevice {
    /// Saves one batch after the other, with as many on their way as there are slots, and shows each; blocks the thread.
    ///
    /// # Errors
    /// The first that failed.
    pub fn save_each(
        &self,
        batches: &[Vec<u32>],
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), String> {
        let turn = self.turn().map_err(|error| error.to_string())?;
        let mut moving: VecDeque<Gathering> = VecDeque::new();
        for batch in batches {
            let slot = loop {
                match self.try_slot(Use::Save, batch.len()) {
                    Some(slot) => break slot,
                    None => each(moving.pop_front().ok_or(NO_SLOT)?.wait()?.bytes()),
                }
            };
            moving.push_back(self.gather(slot, batch, &turn, ())?);
        }
        for gathering in moving {
            each(gathering.wait()?.bytes());
        }
        Ok(())
    }

    /// Loads one batch after the other in the same way, each filled first; blocks the thread until all are written.
    ///
    /// # Errors
    /// The first that failed.
    pub fn load_each(
        &self,
        batches: &[Vec<u32>],
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), String> {
        let turn = self.turn().map_err(|error| error.to_string())?;
        let mut moving: VecDeque<Moving<()>> = VecDeque::new();
        let wait = |moving: Moving<()>| moving.wait().map_err(|error| error.to_string());
        for (number, batch) in batches.iter().enumerate() {
            let mut slot = loop {
                match self.try_slot(Use::Load, batch.len()) {
                    Some(slot) => break slot,
                    None => wait(moving.pop_front().ok_or(NO_SLOT)?)?,
                }
            };
            fill(number, slot.bytes_mut());
            moving.push_back(self.scatter(slot, batch, &turn, ())?);
        }
        moving.into_iter().try_for_each(wait)
    }
}

const NO_SLOT: &str = "a batch is longer than a slot, or all slots are in other hands";

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

/// The layers as groups of equal stride and length, in their order.
///
/// # Safety
/// As [`OnDevice::new`].
unsafe fn pool(layout: &Layout, device: &dyn Device) -> Result<KvPool, DeviceError> {
    let alike = |one: &Layer, other: &Layer| {
        (one.stride_bytes, one.block_bytes) == (other.stride_bytes, other.block_bytes)
    };
    let mut groups = Vec::new();
    for layers in layout.layers().chunk_by(alike) {
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let kv = KvLayout::pieces(
            count(layers.len()),
            count(layout.blocks()),
            layers[0].stride_bytes as u64,
            count(layers[0].block_bytes),
        );
        kv.validate()?;
        let mut spans = Vec::with_capacity(layers.len());
        for layer in layers {
            // SAFETY: the promise of `OnDevice::new`, which keeps the transfer, and so the memory, in hand.
            let memory = unsafe { device.adopt(layer.address as u64, kv.layer_bytes() as usize) }?;
            spans.push(memory.whole());
        }
        groups.push(PagedKv::per_layer(kv, spans)?);
    }
    KvPool::new(groups, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: usize = 6;

    fn layer(memory: &mut [u8], at: usize, stride_bytes: usize, block_bytes: usize) -> Layer {
        Layer {
            address: memory.as_mut_ptr().expose_provenance() + at,
            blocks: BLOCKS,
            stride_bytes,
            block_bytes,
        }
    }

    fn pattern(length: usize, seed: usize) -> Vec<u8> {
        (0..length)
            .map(|i| ((i + seed).wrapping_mul(0x9e37_79b1) >> 11) as u8)
            .collect()
    }

    /// Two interleaved layers, and one of another shape in an allocation of its own.
    fn layers(one: &mut [u8], two: &mut [u8]) -> Vec<Layer> {
        vec![
            layer(one, 0, 200, 96),
            layer(one, 100, 200, 96),
            layer(two, 3, 50, 33),
        ]
    }

    #[tokio::test]
    async fn blocks_go_to_slots_and_back_on_the_host_device() {
        let (mut one, mut two) = (pattern(BLOCKS * 200, 1), pattern(BLOCKS * 50 + 3, 2));
        let before = (one.clone(), two.clone());
        let layout = Layout::new(layers(&mut one, &mut two)).unwrap();
        // SAFETY: both vectors outlive `device`, and nobody else uses them before it is dropped.
        let device = unsafe { OnDevice::new(&layout, "host", 0) }.unwrap();
        let (turn, ids) = (device.turn().unwrap(), [4, 0, 5]);
        let slot = device.slot(Use::Save, 3).await.unwrap();
        let saved = device.gather(slot, &ids, &turn, ()).unwrap();
        let saved = saved.done().await.unwrap();
        let mut expected = Vec::new();
        for id in ids.map(|id| id as usize) {
            expected.extend_from_slice(&before.0[id * 200..][..96]);
            expected.extend_from_slice(&before.0[id * 200 + 100..][..96]);
            expected.extend_from_slice(&before.1[id * 50 + 3..][..33]);
        }
        assert_eq!(saved.bytes(), expected);
        // Block 4 becomes block 1; nothing else changes.
        let mut slot = device.slot(Use::Load, 1).await.unwrap();
        slot.bytes_mut()
            .copy_from_slice(&saved.bytes()[..device.block_bytes()]);
        let loading = device.scatter(slot, &[1], &turn, ()).unwrap();
        loading.await.unwrap();
        drop((saved, device));
        let mut after = before.clone();
        after.0.copy_within(800..896, 200);
        after.0.copy_within(900..996, 300);
        after.1.copy_within(203..236, 53);
        assert!((one, two) == after);
    }

    #[tokio::test]
    async fn slots_are_bounded_and_come_back() {
        let (mut one, mut two) = (pattern(BLOCKS * 200, 1), pattern(BLOCKS * 50 + 3, 2));
        let layout = Layout::new(layers(&mut one, &mut two)).unwrap();
        // SAFETY: as above.
        let device = unsafe { OnDevice::new(&layout, "host", 0) }.unwrap();
        let load = |_| device.try_slot(Use::Load, 2);
        let mut slots: Vec<Slot> = (0..SLOTS[1]).filter_map(load).collect();
        assert_eq!(slots.len(), SLOTS[1]);
        assert!(load(0).is_none() && device.try_slot(Use::Save, 1).is_some());
        let turn = device.turn().unwrap();
        let refused = device.scatter(slots.pop().unwrap(), &[2, 2], &turn, ());
        assert!(refused.unwrap_err().contains("written twice"));
        let refused = device.gather(slots.pop().unwrap(), &[0, 99], &turn, ());
        assert!(refused.unwrap_err().contains("page 99"));
        slots.push(device.slot(Use::Load, 2).await.unwrap());
        let loading = device.scatter(slots.pop().unwrap(), &[0, 1], &turn, ());
        loading.unwrap().await.unwrap();
        drop(slots);
        let all: Vec<Slot> = (0..SLOTS[1]).filter_map(load).collect();
        assert_eq!(all.len(), SLOTS[1]);
        let too_many = device.blocks_per_batch() + 1;
        assert!(device.slot(Use::Save, too_many).await.is_err());
    }

    #[tokio::test]
    async fn a_save_that_nobody_waits_for_keeps_its_permit_until_the_device_is_done() {
        struct Held(std::sync::mpsc::Receiver<()>);
        impl Drop for Held {
            fn drop(&mut self) {
                // Until the test lets the lane's thread go on.
                let _ = self.0.recv();
            }
        }
        let (mut one, mut two) = (pattern(BLOCKS * 200, 1), pattern(BLOCKS * 50 + 3, 2));
        let layout = Layout::new(layers(&mut one, &mut two)).unwrap();
        // SAFETY: as above.
        let device = unsafe { OnDevice::new(&layout, "host", 0) }.unwrap();
        let turn = device.turn().unwrap();
        let (go_on, held) = std::sync::mpsc::channel();
        let slot = device.slot(Use::Save, 1).await.unwrap();
        drop(device.gather(slot, &[0], &turn, Held(held)).unwrap());
        let take = || device.try_slot(Use::Save, 1);
        let slots: Vec<Slot> = std::iter::from_fn(take).collect();
        assert_eq!(slots.len(), SLOTS[0] - 1);
        go_on.send(()).unwrap();
        let _last = device.slot(Use::Save, 1).await.unwrap();
    }

    #[test]
    fn more_batches_than_slots_go_one_after_the_other() {
        let (mut one, mut two) = (pattern(BLOCKS * 200, 1), pattern(BLOCKS * 50 + 3, 2));
        let before = (one.clone(), two.clone());
        let layout = Layout::new(layers(&mut one, &mut two)).unwrap();
        // SAFETY: as above.
        let device = unsafe { OnDevice::new(&layout, "host", 0) }.unwrap();
        let batches: Vec<Vec<u32>> = (0..3 * SLOTS[0])
            .map(|i| vec![(i % BLOCKS) as u32])
            .collect();
        let mut saved = Vec::new();
        device
            .save_each(&batches, |bytes| saved.push(bytes.to_vec()))
            .unwrap();
        assert_eq!(saved.len(), batches.len());
        // Each block's bytes go to the block after it.
        let next: Vec<Vec<u32>> = batches
            .iter()
            .map(|batch| vec![(batch[0] + 1) % BLOCKS as u32])
            .collect();
        device
            .load_each(&next, |number, bytes| bytes.copy_from_slice(&saved[number]))
            .unwrap();
        drop(device);
        for id in 0..BLOCKS {
            let next = (id + 1) % BLOCKS;
            assert_eq!(one[next * 200..][..96], before.0[id * 200..][..96]);
            assert_eq!(
                one[next * 200 + 100..][..96],
                before.0[id * 200 + 100..][..96]
            );
            assert_eq!(two[next * 50 + 3..][..33], before.1[id * 50 + 3..][..33]);
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_and_never_the_host() {
        let name = |name| open(name).unwrap_err();
        assert!(matches!(name("cuda:4000"), DeviceProblem::Absent { .. }));
        for none in ["", "gpu", "cuda:", "cuda:x", "Host"] {
            assert!(matches!(name(none), DeviceProblem::Name { .. }), "{none}");
        }
        assert!(open("host").is_ok());
    }
}
