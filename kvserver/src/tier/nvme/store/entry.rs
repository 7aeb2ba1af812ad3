//! What foyer is given for an entry: a key, a value, and where a value that is read shall land.
//!
//! foyer's `Code::decode` is told nothing but where the bytes are. Where they shall *go* it finds in a
//! task-local [`Landing`] that is set around the very future in which foyer decodes: no registry, no copy,
//! and two readers of one key cannot be mixed up.
//!
//! When foyer has let go of a written value, its [`StoredValue`] is dropped, and that is the signal that
//! the write is over, one way or the other.

use std::{
    hash::{BuildHasher, Hash, Hasher},
    io,
    sync::Arc,
};

use foyer::{Code, DefaultHasher};
use kvgpu::SlotMut;
use kvproto::BlockKey;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::tier::{
    Resident,
    block::{BlockRef, SealedBlock},
    land::{Landed, land},
    record,
};

/// A key, hashed by bytes that no compiler version changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StoredKey(pub(super) BlockKey);

impl Hash for StoredKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0.to_bytes());
    }
}

impl Code for StoredKey {
    fn encode(&self, writer: &mut impl io::Write) -> foyer::Result<()> {
        writer
            .write_all(&self.0.to_bytes())
            .map_err(foyer::Error::io_error)
    }

    fn decode(reader: &mut impl io::Read) -> foyer::Result<Self> {
        let mut bytes = [0; BlockKey::BYTES];
        reader
            .read_exact(&mut bytes)
            .map_err(foyer::Error::io_error)?;
        Ok(Self(BlockKey::from_bytes(&bytes)))
    }

    fn estimated_size(&self) -> usize {
        BlockKey::BYTES
    }
}

/// The hash by which foyer, and so the tier, knows a key.
pub(in crate::tier::nvme) fn hash_of(key: &BlockKey) -> u64 {
    DefaultHasher::default().hash_one(StoredKey(*key))
}

/// What foyer is given to write; dropped when it has finished with it.
pub(super) struct StoredValue {
    /// `None` for a value that was decoded: its bytes are in the landing.
    pub(super) block: Option<BlockRef>,
    /// Held so that they end with foyer's work, whoever waits for it.
    _permits: Vec<OwnedSemaphorePermit>,
    _done: Option<oneshot::Sender<()>>,
}

impl StoredValue {
    /// A block to be written; `done` is dropped, as the permits are, when foyer has finished with it.
    pub(super) fn new(
        block: BlockRef,
        permits: Vec<OwnedSemaphorePermit>,
        done: oneshot::Sender<()>,
    ) -> Self {
        Self {
            block: Some(block),
            _permits: permits,
            _done: Some(done),
        }
    }
}

impl Code for StoredValue {
    fn encode(&self, writer: &mut impl io::Write) -> foyer::Result<()> {
        let Some(block) = &self.block else {
            return Err(foyer::Error::new(
                foyer::ErrorKind::Unsupported,
                "a value that was read is not written",
            ));
        };
        writer
            .write_all(&record::encode_head(block.header()))
            .map_err(foyer::Error::io_error)?;
        writer
            .write_all(block.bytes())
            .map_err(foyer::Error::io_error)
    }

    fn decode(reader: &mut impl io::Read) -> foyer::Result<Self> {
        let landed = LANDING
            .try_with(|landing| landing.lock().land(reader))
            .unwrap_or(false);
        if !landed {
            // The landing knows why.
            return Err(foyer::Error::new(foyer::ErrorKind::Parse, "record refused"));
        }
        Ok(Self {
            block: None,
            _permits: Vec::new(),
            _done: None,
        })
    }

    fn estimated_size(&self) -> usize {
        self.block
            .as_ref()
            .map_or(0, |block| record::record_bytes(block.len_bytes()) as usize)
    }
}

tokio::task_local! {
    /// Where the value that is decoded in this task shall land.
    pub(super) static LANDING: Arc<Mutex<Landing>>;
}

/// A reader's slot, what should come into it, and what came.
pub(super) struct Landing {
    resident: Resident,
    slot: Option<SlotMut>,
    pub(super) landed: Option<Loaded>,
}

/// What a load came to.
#[allow(
    clippy::large_enum_variant,
    reason = "a block is the rule, and moving it beats boxing it"
)]
pub(in crate::tier::nvme) enum Loaded {
    /// Verified, in the reader's slot.
    Block(SealedBlock),
    /// The bytes are not those that were written.
    Corrupt,
    /// Another block, or another version of this one, lies where this one was.
    Other,
    /// foyer does not have it.
    Missing,
    /// The disk failed.
    Failed(String),
}

impl Landing {
    /// For this resident.
    pub(super) fn new(resident: Resident, slot: SlotMut) -> Self {
        Self {
            resident,
            slot: Some(slot),
            landed: None,
        }
    }

    /// Reads a record into the slot and verifies it. Answers whether it landed.
    pub(super) fn land(&mut self, reader: &mut impl io::Read) -> bool {
        let Some(slot) = self.slot.take() else {
            return false;
        };
        let landed = match land(reader, &self.resident, slot) {
            Landed::Block(block) => Loaded::Block(block),
            Landed::Corrupt => Loaded::Corrupt,
            Landed::Other => Loaded::Other,
            Landed::Failed(error) => Loaded::Failed(error.to_string()),
        };
        let good = matches!(landed, Loaded::Block(_));
        self.landed = Some(landed);
        good
    }
}
