//! Memory that two processes of one machine have mapped at once.
//!
//! ```text
//!           node                                            client
//!  Arena segment ── SegmentInfo::read_only_fds ─ 2 fds ──► ReadSegment   maps for reading, copies out
//!  Staging       ── Staging::fd ──────────────── 1 fd ───► StagingMap    maps for writing, copies in
//!  maps for reading, copies out
//! ```
//!
//! Whoever maps checks first that the file cannot shrink under it (`SHRINK | GROW` are sealed), because
//! touching what was cut off would be SIGBUS. What a client gets of a segment it can neither write, map for
//! writing, cut, nor punch holes into, and opening the descriptor anew changes none of it: the seals are the
//! file's, not the descriptor's.
//!
//! Bytes here may change while they are read: a client's staging memory by that client, a segment's slot by its
//! next tenant. So they are never a `&[u8]`; they are copied by code that expects it (`foreign`), and judged
//! after the copy: by sums, and by the slot's generation.
//!
//! Units: bytes. Errors: [`SharedError`] while mapping, [`OutOfBounds`] afterwards; nothing here panics on
//! numbers that came from another process.

pub(crate) mod foreign;
mod mapped;
mod read;
mod staging;
mod summed;
mod unread;

use std::io;

pub use read::{ReadSegment, SegmentFds};
pub use staging::{Staging, StagingMap};
pub use summed::Toward;
pub use unread::unread_bytes;

/// Why memory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The kernel refused a step.
    #[error("{step}: {source}")]
    System {
        /// Which step.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody could still cut the file under its readers, or (a segment) write it.
    #[error("the descriptor of the {what} is not sealed as it must be")]
    NotSealed {
        /// Of what.
        what: &'static str,
    },
    /// The file has a length that it cannot have.
    #[error("the {what} is {length_bytes} bytes long, {problem}")]
    Length {
        /// Of what.
        what: &'static str,
        /// How long it is.
        length_bytes: u64,
        /// What would be right.
        problem: &'static str,
    },
}

/// A range that is not all inside shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length_bytes} bytes at {offset} lie outside of {mapped_bytes} shared bytes")]
pub struct OutOfBounds {
    /// First byte.
    pub offset: u64,
    /// How many.
    pub length_bytes: u64,
    /// How many there are.
    pub mapped_bytes: u64,
}
