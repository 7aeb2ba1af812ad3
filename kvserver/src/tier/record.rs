//! The stored form of one block, the same in every store.
//!
//! ```text
//!   0    4   magic "TKVB"
//!   4    2   version, 1
//!   6    2   zero
//!   8   52   key:   namespace 16 │ hash 32 │ rank 2 │ layer group 2
//!  60   68   place: run 32 │ index 4 │ parent 32
//! 128    8   length of the block in bytes
//! 136    8   seal: XXH3-64 over key, place, length and page sums
//! 144    4   n, the number of page sums: ceil(length / 64 KiB)
//! 148    4   zero
//! 152   8n   page sums, XXH3-64 of each 64 KiB page
//!  +0    8   header sum: XXH3-64 of every byte above
//!  +8        the block's bytes
//! ```
//!
//! Units: bytes; integers are little-endian. Errors: [`RecordError`], a fact about the bytes; no input
//! makes the parser panic or allocate more than the input is long (fuzzed).
//!
//! Why a header sum beside the seal: the seal covers what the block *is* and is also known outside the
//! record; the header sum says that this record's own header is whole before its fields are believed.
//! Why place is in it: whoever finds a record alone can tell its owner and its position in the chain.

use std::io::{self, Read};

use kvproto::{BlockHeader, BlockKey, Place, checksum::page_count};
use xxhash_rust::xxh3::xxh3_64;

/// First bytes of a record.
pub const MAGIC: [u8; 4] = *b"TKVB";
/// The version this code writes and reads.
pub const VERSION: u16 = 1;
/// Bytes before the page sums.
pub const FIXED_BYTES: usize = 152;
/// Longest block that a record may hold: 4 GiB, far above what a node takes.
pub const MAX_LENGTH_BYTES: u64 = 4 << 30;

/// What is wrong with bytes that should be a record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It does not begin as a record does.
    #[error("no record begins here")]
    Magic,
    /// A version this code does not know.
    #[error("record version {found}, this build reads {VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// The header's bytes are not those that were written.
    #[error("record header is damaged")]
    HeaderSum,
    /// Fields that do not fit each other.
    #[error("record field {field} is out of range")]
    Field {
        /// Which.
        field: &'static str,
    },
    /// It ends too early.
    #[error("record is cut short")]
    Short,
    /// Reading failed.
    #[error("record cannot be read")]
    Io(#[source] io::Error),
}

/// Bytes of the header of a record that holds `length_bytes`.
#[must_use]
pub fn head_bytes(length_bytes: u64) -> usize {
    FIXED_BYTES + 8 * page_count(length_bytes) as usize + 8
}

/// Bytes of the whole record.
#[must_use]
pub fn record_bytes(length_bytes: u64) -> u64 {
    head_bytes(length_bytes) as u64 + length_bytes
}

/// The header of the record of this block.
#[must_use]
pub fn encode_head(header: &BlockHeader) -> Vec<u8> {
    let mut head = Vec::with_capacity(head_bytes(header.length_bytes));
    head.extend_from_slice(&MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&[0; 2]);
    head.extend_from_slice(&header.key.to_bytes());
    head.extend_from_slice(&header.place.to_bytes());
    head.extend_from_slice(&header.length_bytes.to_le_bytes());
    head.extend_from_slice(&header.seal.to_le_bytes());
    head.extend_from_slice(&(header.page_sums.len() as u32).to_le_bytes());
    head.extend_from_slice(&[0; 4]);
    for sum in header.page_sums.iter() {
        head.extend_from_slice(&sum.to_le_bytes());
    }
    let sum = xxh3_64(&head);
    head.extend_from_slice(&sum.to_le_bytes());
    head
}

/// Reads a header; afterwards `from` stands at the block's first byte.
///
/// # Errors
/// [`RecordError`]; what was read of `from` is then undefined.
pub fn read_head(from: &mut impl Read) -> Result<BlockHeader, RecordError> {
    let mut fixed = [0; FIXED_BYTES];
    read_exact(from, &mut fixed)?;
    if fixed[..4] != MAGIC {
        return Err(RecordError::Magic);
    }
    let version = u16::from_le_bytes(cut(&fixed, 4));
    if version != VERSION {
        return Err(RecordError::Version { found: version });
    }
    let length_bytes = u64::from_le_bytes(cut(&fixed, 128));
    if length_bytes > MAX_LENGTH_BYTES {
        return Err(RecordError::Field { field: "length" });
    }
    let pages = u64::from(u32::from_le_bytes(cut(&fixed, 144)));
    if pages != page_count(length_bytes) {
        return Err(RecordError::Field { field: "page sums" });
    }
    // At most 512 KiB, and grown only as bytes really arrive: a hostile length costs nothing.
    let rest_bytes = 8 * pages as usize + 8;
    let mut head = Vec::with_capacity(FIXED_BYTES + rest_bytes.min(16 * 1024));
    head.extend_from_slice(&fixed);
    let got = from
        .take(rest_bytes as u64)
        .read_to_end(&mut head)
        .map_err(RecordError::Io)?;
    if got != rest_bytes {
        return Err(RecordError::Short);
    }
    let (covered, sum) = head.split_at(head.len() - 8);
    if xxh3_64(covered) != u64::from_le_bytes(cut(sum, 0)) {
        return Err(RecordError::HeaderSum);
    }
    let key = BlockKey::from_bytes(&cut(covered, 8));
    let place =
        Place::from_bytes(&cut(covered, 60)).ok_or(RecordError::Field { field: "place" })?;
    let page_sums = covered[FIXED_BYTES..]
        .chunks_exact(8)
        .map(|sum| u64::from_le_bytes(cut(sum, 0)));
    let header = BlockHeader {
        key,
        place,
        length_bytes,
        page_sums: page_sums.collect(),
        seal: u64::from_le_bytes(cut(covered, 136)),
    };
    if !header.check_seal() {
        return Err(RecordError::Field { field: "seal" });
    }
    Ok(header)
}

/// Splits a whole record into its header and the block's bytes (which are not checked here).
///
/// # Errors
/// [`RecordError`]; bytes behind the record are none.
pub fn parse(bytes: &[u8]) -> Result<(BlockHeader, &[u8]), RecordError> {
    let mut rest = bytes;
    let header = read_head(&mut rest)?;
    match usize::try_from(header.length_bytes)
        .ok()
        .and_then(|length| rest.get(..length))
    {
        Some(block) => Ok((header, block)),
        None => Err(RecordError::Short),
    }
}

fn read_exact(from: &mut impl Read, to: &mut [u8]) -> Result<(), RecordError> {
    from.read_exact(to).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => RecordError::Short,
        _ => RecordError::Io(error),
    })
}

/// `N` bytes from `at`; the callers have checked that they are there.
pub(super) fn cut<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N]
        .try_into()
        .expect("a slice of N bytes is an array of N bytes")
}

#[cfg(test)]
mod tests {
    use kvproto::{NamespaceId, Part, RunHash, SequenceHash};
    use proptest::prelude::*;

    use super::*;

    fn record(seed: u8, length_bytes: usize, index: u32) -> (BlockHeader, Vec<u8>) {
        let bytes: Vec<u8> = (0..length_bytes)
            .map(|i| (i as u8).wrapping_mul(31) ^ seed)
            .collect();
        let key = BlockKey {
            namespace: NamespaceId([seed; 16]),
            hash: SequenceHash([seed ^ 0x5a; 32]),
            part: Part {
                rank: 3,
                layer_group: 1,
            },
        };
        let parent = (index > 0).then_some(SequenceHash([9; 32]));
        let place = Place {
            run: RunHash([seed; 32]),
            index,
            parent,
        };
        let header = BlockHeader::describe(key, place, &bytes);
        let mut record = encode_head(&header);
        assert_eq!(record.len(), head_bytes(length_bytes as u64));
        record.extend_from_slice(&bytes);
        assert_eq!(record.len() as u64, record_bytes(length_bytes as u64));
        (header, record)
    }

    proptest! {
        #[test]
        fn what_is_encoded_parses_back(seed: u8, length in 0usize..300_000, index in 0u32..5) {
            let (header, record) = record(seed, length, index);
            let (parsed, bytes) = parse(&record).expect("a whole record");
            prop_assert_eq!(&parsed, &header);
            prop_assert!(parsed.verify(bytes).is_ok());
        }

        #[test]
        fn a_flipped_bit_is_refused_or_found_by_the_sums(length in 1usize..200_000, at: prop::sample::Index, bit in 0u8..8) {
            let (header, mut record) = record(1, length, 1);
            let at = at.index(record.len());
            record[at] ^= 1 << bit;
            // Bytes 6, 7 and 148..152 are zero fields; they too are under the header sum.
            let wrong = match parse(&record) {
                Ok((parsed, bytes)) => parsed == header && parsed.verify(bytes).is_ok(),
                Err(_) => false,
            };
            prop_assert!(!wrong, "flip at {} went unseen", at);
        }

        #[test]
        fn a_prefix_is_never_a_record(length in 0usize..100_000, keep: prop::sample::Index) {
            let (_, record) = record(1, length, 0);
            let kept = keep.index(record.len());
            prop_assert!(parse(&record[..kept]).is_err());
        }

        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn any_fields_behind_the_magic_are_answered(mut bytes in prop::collection::vec(any::<u8>(), 152..400)) {
            bytes[..8].copy_from_slice(b"TKVB\x01\0\0\0");
            let _ = parse(&bytes);
        }
    }
}
