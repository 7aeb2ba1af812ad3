//! The engine's memory: whose turn it is at which block, and the slices that go with it.
//!
//! ```text
//!                 ┌ ReadClaim   any number per block       pieces() -> &[u8]
//! EngineMemory ──►┤
//!                 └ WriteClaim  one per block, no readers  pieces() -> &mut [u8]
//!
//! retire(): waits until no claim is left; then the engine may unmap it
//! ```
//!
//! Units: blocks of the engine, bytes.
//! Errors: [`ClaimError`]: a block that is not there, named twice, or claimed by another job.
//! Why claims: Rust's slices promise that nobody writes what they show. Among our own jobs the claims keep that promise.
//! Against the engine itself the engine keeps it: it must not touch a block between handing it over and its return, which
//! is what `Cache`'s docstrings demand.
//!
//! Blocks on a device are claimed alike; their pieces are never slices, and copies by the device share the claim.
//!
//! Beside `device`, which hands its promise on, this is the only file here with `unsafe`.
#![allow(unsafe_code)]

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    marker::PhantomData,
    ops::Range,
    slice,
    sync::Arc,
};

use kvgpu::{DeviceError, Event};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::{
    device::OnDevice,
    layout::{Layout, LayoutError},
};

/// Why blocks were not handed over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// Not there.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Named twice by one load.
    #[error("block {block} is named twice")]
    Twice {
        /// Which.
        block: u32,
    },
    /// Another job is at it.
    #[error("block {block} is in the hands of another job")]
    Busy {
        /// Which.
        block: u32,
    },
    /// The engine has taken its memory back.
    #[error("the engine's memory is not known any more")]
    Retired,
    /// The device does not say when it is the blocks' turn.
    #[error("the engine's stream: {0}")]
    Stream(#[from] DeviceError),
}

/// Blocks of an engine, at addresses of this process.
#[derive(Debug)]
pub struct EngineMemory {
    layout: Layout,
    /// Where the addresses are those of a device.
    device: Option<OnDevice>,
    claims: Mutex<Claims>,
    idle: Condvar,
}

#[derive(Debug, Default)]
struct Claims {
    /// Readers per block; [`WRITER`] is a writer.
    blocks: HashMap<u32, u32>,
    retired: bool,
}

const WRITER: u32 = u32::MAX;

impl EngineMemory {
    /// The memory that `layout` describes.
    ///
    /// # Safety
    /// Until [`EngineMemory::retire`] has returned, every piece of every block is mapped, readable and writable, and
    /// belongs to one allocation. Nobody else writes a block while there is a [`ReadClaim`] on it, and nobody
    /// else reads or writes a block while there is a [`WriteClaim`] on it.
    pub unsafe fn new(layout: Layout) -> Arc<Self> {
        Self::with(layout, None)
    }

    /// The memory that `layout` describes, at addresses of `device`, which was made of it and keeps the promise for it.
    #[must_use]
    pub fn on_device(layout: Layout, device: OnDevice) -> Arc<Self> {
        Self::with(layout, Some(device))
    }

    fn with(layout: Layout, device: Option<OnDevice>) -> Arc<Self> {
        Arc::new(Self {
            layout,
            device,
            claims: Mutex::default(),
            idle: Condvar::new(),
        })
    }

    /// Where its blocks lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// These blocks, to be read.
    ///
    /// # Errors
    /// When one is not there or being written.
    pub fn read(self: &Arc<Self>, blocks: &[u32]) -> Result<ReadClaim, ClaimError> {
        self.claim(blocks, false)
    }

    /// These blocks, to be written; all different.
    ///
    /// # Errors
    /// When one is not there, named twice, or claimed already.
    pub fn write(self: &Arc<Self>, blocks: &[u32]) -> Result<WriteClaim, ClaimError> {
        let mut seen = HashSet::with_capacity(blocks.len());
        if let Some(&block) = blocks.iter().find(|block| !seen.insert(**block)) {
            return Err(ClaimError::Twice { block });
        }
        self.claim(blocks, true)
    }

    /// Waits until nobody has a claim, and gives no more.
    pub fn retire(&self) {
        let mut claims = self.claims.lock();
        claims.retired = true;
        while !claims.blocks.is_empty() {
            self.idle.wait(&mut claims);
        }
    }

    fn claim<Access>(
        self: &Arc<Self>,
        blocks: &[u32],
        write: bool,
    ) -> Result<Claim<Access>, ClaimError> {
        for &block in blocks {
            self.layout.check(block)?;
        }
        // The caller is the engine's thread: what its stream has been given so far comes first.
        let turn = match &self.device {
            Some(device) => Some(device.turn()?),
            None => None,
        };
        let mut claims = self.claims.lock();
        if claims.retired {
            return Err(ClaimError::Retired);
        }
        for (done, &block) in blocks.iter().enumerate() {
            let free = match claims.blocks.entry(block) {
                Entry::Vacant(entry) => {
                    entry.insert(if write { WRITER } else { 1 });
                    true
                }
                Entry::Occupied(mut entry) if !write && *entry.get() < WRITER - 1 => {
                    *entry.get_mut() += 1;
                    true
                }
                Entry::Occupied(_) => false,
            };
            if !free {
                claims.release(&blocks[..done]);
                return Err(ClaimError::Busy { block });
            }
        }
        drop(claims);
        let held = Arc::new(Held {
            memory: self.clone(),
            blocks: blocks.into(),
            turn,
            ended: watch::Sender::default(),
        });
        let access = PhantomData;
        Ok(Claim { held, access })
    }
}

impl Claims {
    fn release(&mut self, blocks: &[u32]) {
        for &block in blocks {
            if let Entry::Occupied(mut entry) = self.blocks.entry(block) {
                match *entry.get() {
                    WRITER | 1 => drop(entry.remove()),
                    _ => *entry.get_mut() -= 1,
                }
            }
        }
    }
}

/// Blocks of a job, given back with the last share of them.
#[derive(Debug)]
struct Held {
    memory: Arc<EngineMemory>,
    blocks: Box<[u32]>,
    /// When the engine handed the blocks over, on a device.
    turn: Option<Event>,
    /// Gone with the claim: whoever listens hears that its last share was dropped.
    ended: watch::Sender<()>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut claims = self.memory.claims.lock();
        claims.release(&self.blocks);
        if claims.blocks.is_empty() {
            self.memory.idle.notify_all();
        }
    }
}

/// What a claim allows: to read.
#[derive(Debug)]
pub enum Reading {}

/// What a claim allows: to write, and nobody else does anything.
#[derive(Debug)]
pub enum Writing {}

/// Blocks that are one job's as long as this lives.
#[derive(Debug)]
pub struct Claim<Access> {
    held: Arc<Held>,
    access: PhantomData<Access>,
}

/// Blocks that nobody writes as long as this lives.
pub type ReadClaim = Claim<Reading>;

/// Blocks that nobody else reads or writes as long as this lives.
pub type WriteClaim = Claim<Writing>;

impl<Access> Claim<Access> {
    /// The engine's ids of them.
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.held.blocks
    }

    /// Bytes of each of them.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.held.memory.layout.block_bytes()
    }

    /// The device they are on, and when their turn is.
    #[must_use]
    pub fn device(&self) -> Option<(&OnDevice, &Event)> {
        self.held
            .memory
            .device
            .as_ref()
            .zip(self.held.turn.as_ref())
    }

    /// Ready once the claim and all its shares were dropped; itself none of them.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<Access> {
        let mut ended = self.held.ended.subscribe();
        // Nothing is ever sent: only the end of the sender comes.
        async move { while ended.changed().await.is_ok() {} }
    }

    /// A share of the claim, for a copy by the device that may outlast who started it.
    pub fn share(&self) -> impl Send + use<Access> {
        Arc::clone(&self.held)
    }

    /// Where the bytes of each of the blocks in `range` lie, in memory that the processor may touch.
    fn addresses(&self, range: Range<usize>) -> impl Iterator<Item = Vec<Range<usize>>> {
        let memory = &self.held.memory;
        assert!(
            memory.device.is_none(),
            "addresses of a device are not this process's"
        );
        self.held.blocks[range].iter().map(|&block| {
            let pieces = memory.layout.pieces(block);
            pieces.expect("a claimed block is one of the layout's")
        })
    }
}

impl ReadClaim {
    /// The bytes of those in `range`, each block's pieces in the order of the layers.
    ///
    /// # Panics
    /// If they are on a device.
    #[must_use]
    pub fn pieces(&self, range: Range<usize>) -> Vec<Vec<&[u8]>> {
        let piece = |piece: Range<usize>| {
            let address = std::ptr::with_exposed_provenance::<u8>(piece.start);
            // SAFETY: mapped and readable until `retire` returns, which waits for this claim; no other job writes it,
            // because a write claim excludes this one; the engine does not, by the promise of `EngineMemory::new`.
            // The length fits isize, `Layout::new` has checked. The slice lives no longer than the claim.
            unsafe { slice::from_raw_parts(address, piece.len()) }
        };
        let block = |pieces: Vec<Range<usize>>| pieces.into_iter().map(piece).collect();
        self.addresses(range).map(block).collect()
    }
}

impl WriteClaim {
    /// The memory of those in `range`, each block's pieces in the order of the layers.
    ///
    /// # Panics
    /// If they are on a device.
    #[must_use]
    pub fn pieces(&mut self, range: Range<usize>) -> Vec<Vec<&mut [u8]>> {
        let piece = |piece: Range<usize>| {
            let address = std::ptr::with_exposed_provenance_mut::<u8>(piece.start);
            // SAFETY: as in `ReadClaim::pieces`, and writable. No two of these slices overlap: the claim's blocks are
            // all different (`EngineMemory::write`) and no byte of a layout is in two blocks or layers (`Layout::new`).
            // `&mut self` keeps a second set of them from being made meanwhile.
            unsafe { slice::from_raw_parts_mut(address, piece.len()) }
        };
        let block = |pieces: Vec<Range<usize>>| pieces.into_iter().map(piece).collect();
        self.addresses(range).map(block).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layer;

    /// Two layers of four blocks of 8 bytes, in one buffer.
    fn memory(buffer: &mut [u8; 64]) -> Arc<EngineMemory> {
        let address = buffer.as_mut_ptr().expose_provenance();
        let layer = |address| Layer {
            address,
            blocks: 4,
            stride_bytes: 8,
            block_bytes: 8,
        };
        let layout = Layout::new(vec![layer(address), layer(address + 32)]).unwrap();
        // SAFETY: the tests keep the buffer, and look at it only when no claim is left.
        unsafe { EngineMemory::new(layout) }
    }

    #[test]
    fn what_is_written_to_a_block_is_read_from_it() {
        let mut buffer = [0; 64];
        let memory = memory(&mut buffer);
        let mut claim = memory.write(&[2, 0]).unwrap();
        for (i, piece) in claim.pieces(0..2).into_iter().flatten().enumerate() {
            piece.fill(i as u8 + 1);
        }
        drop(claim);
        let claim = memory.read(&[0]).unwrap();
        assert_eq!(claim.pieces(0..1), [[[3; 8], [4; 8]]]);
        drop(claim);
        memory.retire();
        assert_eq!((buffer[16], buffer[48], buffer[8]), (1, 2, 0));
    }

    #[test]
    fn a_block_has_readers_or_one_writer() {
        let mut buffer = [0; 64];
        let memory = memory(&mut buffer);
        let (a, b) = (memory.read(&[1, 2, 2]).unwrap(), memory.read(&[2]).unwrap());
        let busy = memory.write(&[0, 2]).unwrap_err();
        assert_eq!(busy, ClaimError::Busy { block: 2 });
        drop(a);
        assert!(memory.write(&[2]).is_err());
        drop(b);
        // Block 0 was given back when 2 could not be had.
        let writer = memory.write(&[0, 2]).unwrap();
        assert!(memory.read(&[0]).is_err());
        drop(writer);
        assert_eq!(
            memory.write(&[3, 3]).unwrap_err(),
            ClaimError::Twice { block: 3 }
        );
        assert!(matches!(memory.read(&[4]), Err(ClaimError::Layout(_))));
    }

    #[tokio::test]
    async fn a_claim_has_ended_when_its_last_share_is_dropped() {
        let mut buffer = [0; 64];
        let memory = memory(&mut buffer);
        let claim = memory.write(&[1]).unwrap();
        let (share, ended) = (claim.share(), tokio::spawn(claim.ended()));
        drop(claim);
        tokio::task::yield_now().await;
        assert!(!ended.is_finished());
        drop(share);
        ended.await.unwrap();
        assert!(memory.write(&[1]).is_ok());
    }

    #[test]
    fn retired_memory_is_given_to_nobody() {
        let mut buffer = [0; 64];
        let memory = memory(&mut buffer);
        let claim = memory.read(&[1]).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| memory.retire());
            while memory.read(&[0]).is_ok() {
                std::thread::yield_now();
            }
            assert!(!waiting.is_finished());
            drop(claim);
        });
        assert_eq!(memory.read(&[1]).unwrap_err(), ClaimError::Retired);
    }
}
