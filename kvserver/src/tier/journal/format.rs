//! The bytes of a journal, as [`super`] draws them: records, the head, and what a file that ends anyhow says.

use kvproto::{BlockKey, NamespaceId, Place};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::tier::{Resident, record::cut};

const MAGIC: [u8; 8] = *b"TKVJRNL1";
/// Bytes of the file's head.
pub const HEAD_BYTES: usize = 32;
const MARK: u8 = 0xA5;
const FRAME_BYTES: usize = 4;
const SUM_BYTES: usize = 8;

/// One thing that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The block is on the medium.
    Stored(Resident),
    /// It made room for others, or was found lost.
    Gone(BlockKey),
    /// It was removed for good.
    Invalidated(BlockKey),
    /// All of a namespace was removed for good.
    InvalidatedNamespace(NamespaceId),
    /// Bytes written on a day so far.
    Wear {
        /// Days since 1970.
        day: u32,
        /// Bytes.
        bytes: u64,
    },
}

impl Entry {
    /// Appends the record, as it reads at `offset` of the file.
    pub(super) fn encode(&self, offset: u64, into: &mut Vec<u8>) {
        let start = into.len();
        into.extend_from_slice(&[MARK, self.kind(), 0, 0]);
        match self {
            Self::Stored(resident) => {
                into.extend_from_slice(&resident.key.to_bytes());
                into.extend_from_slice(&resident.place.to_bytes());
                into.extend_from_slice(&resident.length_bytes.to_le_bytes());
                into.extend_from_slice(&resident.seal.to_le_bytes());
            }
            Self::Gone(key) | Self::Invalidated(key) => into.extend_from_slice(&key.to_bytes()),
            Self::InvalidatedNamespace(namespace) => into.extend_from_slice(namespace.as_bytes()),
            Self::Wear { day, bytes } => {
                into.extend_from_slice(&day.to_le_bytes());
                into.extend_from_slice(&bytes.to_le_bytes());
            }
        }
        let length = (into.len() - start - FRAME_BYTES) as u16;
        into[start + 2..start + 4].copy_from_slice(&length.to_le_bytes());
        let sum = xxh3_64_with_seed(&into[start..], offset);
        into.extend_from_slice(&sum.to_le_bytes());
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Stored(_) => 1,
            Self::Gone(_) => 2,
            Self::Invalidated(_) => 3,
            Self::InvalidatedNamespace(_) => 4,
            Self::Wear { .. } => 5,
        }
    }

    /// The record at `offset`, and where the next one begins.
    fn decode(bytes: &[u8], offset: usize) -> Option<(Self, usize)> {
        let frame = bytes.get(offset..offset + FRAME_BYTES)?;
        let length = usize::from(u16::from_le_bytes([frame[2], frame[3]]));
        if frame[0] != MARK || payload_bytes(frame[1]) != Some(length) {
            return None;
        }
        let end = offset + FRAME_BYTES + length;
        let sum = bytes.get(end..end + SUM_BYTES)?;
        if xxh3_64_with_seed(&bytes[offset..end], offset as u64) != u64::from_le_bytes(cut(sum, 0))
        {
            return None;
        }
        let payload = &bytes[offset + FRAME_BYTES..end];
        let entry = match frame[1] {
            1 => Self::Stored(Resident {
                key: BlockKey::from_bytes(&cut(payload, 0)),
                place: Place::from_bytes(&cut(payload, 52))?,
                length_bytes: u64::from_le_bytes(cut(payload, 120)),
                seal: u64::from_le_bytes(cut(payload, 128)),
            }),
            2 => Self::Gone(BlockKey::from_bytes(&cut(payload, 0))),
            3 => Self::Invalidated(BlockKey::from_bytes(&cut(payload, 0))),
            4 => Self::InvalidatedNamespace(NamespaceId(cut(payload, 0))),
            _ => Self::Wear {
                day: u32::from_le_bytes(cut(payload, 0)),
                bytes: u64::from_le_bytes(cut(payload, 4)),
            },
        };
        Some((entry, end + SUM_BYTES))
    }
}

/// Payload length of a kind; `None` for kinds that do not exist.
fn payload_bytes(kind: u8) -> Option<usize> {
    match kind {
        1 => Some(BlockKey::BYTES + Place::BYTES + 16),
        2 | 3 => Some(BlockKey::BYTES),
        4 => Some(NamespaceId::BYTES),
        5 => Some(12),
        _ => None,
    }
}

/// How a journal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// With a whole record.
    Clean,
    /// In the middle of its last record: a process died while it wrote.
    Torn,
    /// Whole records follow a broken one, or the head is not ours: nothing here may be believed.
    Damaged,
}

/// What a journal's bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scan {
    /// The extent size it was written for; 0 when the head is broken.
    pub extent_bytes: u64,
    /// Whole records before the end or the first broken one.
    pub records: u64,
    /// Bytes up to there, head included.
    pub good_bytes: u64,
    /// How it ended.
    pub tail: Tail,
}

/// Reads a journal's bytes, giving every whole record to `visit` in order. Never panics (fuzzed).
pub fn scan(bytes: &[u8], mut visit: impl FnMut(Entry)) -> Scan {
    let Some(extent_bytes) = read_head(bytes) else {
        // A head that is not there yet is a file that was being made; anything else is not ours.
        let tail = if bytes.len() < HEAD_BYTES {
            Tail::Torn
        } else {
            Tail::Damaged
        };
        return Scan {
            extent_bytes: 0,
            records: 0,
            good_bytes: 0,
            tail,
        };
    };
    let (mut at, mut records) = (HEAD_BYTES, 0);
    while let Some((entry, next)) = Entry::decode(bytes, at) {
        visit(entry);
        records += 1;
        at = next;
    }
    let tail = if at == bytes.len() {
        Tail::Clean
    } else if (at + 1..bytes.len()).any(|later| Entry::decode(bytes, later).is_some()) {
        Tail::Damaged
    } else {
        Tail::Torn
    };
    Scan {
        extent_bytes,
        records,
        good_bytes: at as u64,
        tail,
    }
}

/// As [`scan`], collecting the records: for tests and fuzzing.
#[must_use]
pub fn parse(bytes: &[u8]) -> (Vec<Entry>, Scan) {
    let mut entries = Vec::new();
    let summary = scan(bytes, |entry| entries.push(entry));
    (entries, summary)
}

/// The bytes of a journal that holds exactly these records.
#[must_use]
pub fn encode(extent_bytes: u64, entries: &[Entry]) -> Vec<u8> {
    let mut bytes = encode_head(extent_bytes);
    for entry in entries {
        entry.encode(bytes.len() as u64, &mut bytes);
    }
    bytes
}

pub(super) fn encode_head(extent_bytes: u64) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    head.extend_from_slice(&MAGIC);
    head.extend_from_slice(&extent_bytes.to_le_bytes());
    head.extend_from_slice(&[0; 8]);
    let sum = xxh3_64(&head);
    head.extend_from_slice(&sum.to_le_bytes());
    head
}

fn read_head(bytes: &[u8]) -> Option<u64> {
    let head = bytes.get(..HEAD_BYTES)?;
    let whole = head[..8] == MAGIC && xxh3_64(&head[..24]) == u64::from_le_bytes(cut(head, 24));
    whole.then(|| u64::from_le_bytes(cut(head, 8)))
}
