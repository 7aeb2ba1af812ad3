//! Ids of fixed width: what names a block, where it stands, and who speaks.
//!
//! ```text
//! BlockKey   52 bytes   namespace 16 │ hash 32 │ rank u16 │ layer group u16
//! Place      68 bytes   run hash 32 │ index u32 │ parent hash 32 (zeros at index 0)
//! ```
//!
//! Units: integers are little-endian. Text is lower-case hex; `Debug` shortens it to its first 4 bytes.
//! Errors: [`InvalidHex`] when text is not hex of the right width.
//! Why newtypes: two hashes of equal width must never be swappable by accident.

use std::fmt;
use std::str::FromStr;

use crate::hex;

/// Text that should have been an id in hex.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {digits} hex digits, got {text:?}")]
pub struct InvalidHex {
    /// Hex digits expected.
    pub digits: usize,
    /// What was there.
    pub text: String,
}

macro_rules! byte_id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $bytes]);

        impl $name {
            /// Width in bytes.
            pub const BYTES: usize = $bytes;

            /// The id, if `bytes` has exactly its width.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }

            /// The id's bytes.
            pub const fn as_bytes(&self) -> &[u8; $bytes] {
                &self.0
            }
        }

        impl AsRef<[u8]> for $name {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }

        impl From<[u8; $bytes]> for $name {
            fn from(bytes: [u8; $bytes]) -> Self {
                Self(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                hex::write(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "("))?;
                hex::write(f, &self.0[..4])?;
                f.write_str("…)")
            }
        }

        impl FromStr for $name {
            type Err = InvalidHex;

            fn from_str(text: &str) -> Result<Self, InvalidHex> {
                hex::read(text)
                    .map(Self)
                    .ok_or_else(|| InvalidHex { digits: 2 * $bytes, text: text.to_owned() })
            }
        }
    };
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:016x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:016x})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidHex;

            fn from_str(text: &str) -> Result<Self, InvalidHex> {
                hex::read(text)
                    .map(|bytes| Self(u64::from_be_bytes(bytes)))
                    .ok_or_else(|| InvalidHex { digits: 16, text: text.to_owned() })
            }
        }
    };
}

byte_id! {
    /// Names a whole prefix: a block's tokens and everything before them. See [`crate::hash`].
    SequenceHash, 32
}
byte_id! {
    /// The [`SequenceHash`] of the block at a run's start; placement looks at nothing else.
    RunHash, 32
}
byte_id! {
    /// A namespace of one tenant. See [`crate::namespace`].
    NamespaceId, 16
}
byte_id! {
    /// One request of a caller, shared by its tries.
    RequestId, 16
}
byte_id! {
    /// A caller across its connections; leases belong to it.
    OwnerId, 16
}
number_id! {
    /// One life of a node's process: a quick restart is seen as a new one.
    BootId
}
number_id! {
    /// A lease of one node in one life.
    LeaseId
}

impl From<SequenceHash> for RunHash {
    fn from(hash: SequenceHash) -> Self {
        Self(hash.0)
    }
}

/// Which part of a block: the rank that holds it and the group of layers. Most namespaces have `{0, 0}` only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Part {
    /// Rank in the world of the namespace.
    pub rank: u16,
    /// Group of layers stored together.
    pub layer_group: u16,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.rank, self.layer_group)
    }
}

/// Names one stored object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey {
    /// Namespace, which fixes tenant, model and layout.
    pub namespace: NamespaceId,
    /// The prefix that ends with this block.
    pub hash: SequenceHash,
    /// Which part of the block.
    pub part: Part,
}

impl BlockKey {
    /// Width of [`BlockKey::to_bytes`].
    pub const BYTES: usize = 52;

    /// namespace │ hash │ rank u16 LE │ layer group u16 LE.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(&self.namespace.0);
        bytes[16..48].copy_from_slice(&self.hash.0);
        bytes[48..50].copy_from_slice(&self.part.rank.to_le_bytes());
        bytes[50..].copy_from_slice(&self.part.layer_group.to_le_bytes());
        bytes
    }

    /// The inverse of [`BlockKey::to_bytes`]; every input is a key.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        Self {
            namespace: NamespaceId(array(&bytes[..16])),
            hash: SequenceHash(array(&bytes[16..48])),
            part: Part {
                rank: u16::from_le_bytes(array(&bytes[48..50])),
                layer_group: u16::from_le_bytes(array(&bytes[50..])),
            },
        }
    }
}

impl fmt::Display for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.namespace, self.hash, self.part)
    }
}

/// Where a block stands: the run that decides its owner, its index in the chain and its parent.
///
/// It travels with every request, index entry and stored record, so that an owner can be found and heads be
/// told from tails even when the hash is an engine's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Hash at the start of the block's run.
    pub run: RunHash,
    /// Position in the chain, 0 for the first block of a prompt.
    pub index: u32,
    /// The block before it; `None` exactly at index 0.
    pub parent: Option<SequenceHash>,
}

impl Place {
    /// Width of [`Place::to_bytes`].
    pub const BYTES: usize = 68;

    /// run │ index u32 LE │ parent, or zeros at index 0.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..32].copy_from_slice(&self.run.0);
        bytes[32..36].copy_from_slice(&self.index.to_le_bytes());
        if let Some(parent) = self.parent {
            bytes[36..].copy_from_slice(&parent.0);
        }
        bytes
    }

    /// The inverse of [`Place::to_bytes`]; `None` when index 0 names a parent.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let index = u32::from_le_bytes(array(&bytes[32..36]));
        let parent: [u8; 32] = array(&bytes[36..]);
        if index == 0 && parent != [0; 32] {
            return None;
        }
        Some(Self {
            run: RunHash(array(&bytes[..32])),
            index,
            parent: (index != 0).then_some(SequenceHash(parent)),
        })
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller cuts exactly N bytes")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::{BlockKey, BootId, NamespaceId, Part, Place, RunHash, SequenceHash};

    proptest! {
        #[test]
        fn key_bytes_round_trip(namespace: [u8; 16], hash: [u8; 32], rank: u16, layer_group: u16) {
            let key = BlockKey {
                namespace: NamespaceId(namespace),
                hash: SequenceHash(hash),
                part: Part { rank, layer_group },
            };
            prop_assert_eq!(BlockKey::from_bytes(&key.to_bytes()), key);
        }

        #[test]
        fn place_bytes_round_trip(run: [u8; 32], index: u32, parent: [u8; 32]) {
            let parent = (index != 0).then_some(SequenceHash(parent));
            let place = Place { run: RunHash(run), index, parent };
            prop_assert_eq!(Place::from_bytes(&place.to_bytes()), Some(place));
        }

        #[test]
        fn hex_round_trips(hash: [u8; 32], boot in any::<u64>()) {
            prop_assert_eq!(SequenceHash(hash).to_string().parse(), Ok(SequenceHash(hash)));
            prop_assert_eq!(BootId(boot).to_string().parse(), Ok(BootId(boot)));
        }

        #[test]
        fn any_text_is_an_id_or_an_error(text: String) {
            let _ = text.parse::<SequenceHash>();
        }
    }

    #[test]
    fn first_block_with_a_parent_is_no_place() {
        let mut bytes = Place {
            run: RunHash([7; 32]),
            index: 0,
            parent: None,
        }
        .to_bytes();
        bytes[67] = 1;
        assert_eq!(Place::from_bytes(&bytes), None);
    }

    #[test]
    fn debug_is_short_and_display_is_whole() {
        let hash = SequenceHash([0xab; 32]);
        assert_eq!(format!("{hash:?}"), "SequenceHash(abababab…)");
        assert_eq!(hash.to_string(), "ab".repeat(32));
    }
}
