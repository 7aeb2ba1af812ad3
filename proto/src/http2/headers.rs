//! Header blocks: gathered from HEADERS and CONTINUATION, decoded once whole.
//!
//! ```text
//! HEADERS ─┬─ CONTINUATION … ─► block ─HPACK─► (name, value) …
//!          └─ padding and priority are cut off
//! ```
//!
//! Bounds: a block and what it decodes to, by the same limit; the decoder's table at HTTP/2's own default.

use std::io;

use http::HeaderMap;

use super::{
    breach,
    frame::{END_HEADERS, END_STREAM, Head, Kind, PADDED, PRIORITY, put_field},
};

/// Bytes of header fields that the peer may have us remember: HTTP/2's own default.
const HEADER_TABLE_BYTES: usize = 4096;

/// What the RFC counts for a field besides its name and value.
const FIELD_OVERHEAD_BYTES: usize = 32;

/// Decoded header fields, in order, pseudo-headers included.
pub type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// Appends all fields of `map` to a header block, as literals that no table remembers.
pub fn put_fields(block: &mut Vec<u8>, map: &HeaderMap) {
    for (name, value) in map {
        put_field(block, name.as_str().as_bytes(), value.as_bytes());
    }
}

/// The decoder of one direction of a connection, and the block it is gathering.
pub(super) struct HeaderBlocks {
    hpack: loona_hpack::Decoder<'static>,
    limit_bytes: usize,
    block: Vec<u8>,
    /// The stream whose block goes on in CONTINUATION.
    open: Option<u32>,
    ends_stream: bool,
}

/// A block that has become whole.
pub(super) struct Whole {
    pub(super) fields: Fields,
    /// Bytes it decoded to, as the RFC counts them.
    pub(super) bytes: usize,
    pub(super) ends_stream: bool,
}

impl HeaderBlocks {
    pub(super) fn new(limit_bytes: usize) -> Self {
        let mut hpack = loona_hpack::Decoder::new();
        hpack.set_max_allowed_table_size(HEADER_TABLE_BYTES);
        Self {
            hpack,
            limit_bytes,
            block: Vec::new(),
            open: None,
            ends_stream: false,
        }
    }

    /// Whether a block has begun and is not whole: nothing but its continuation may come.
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Takes a HEADERS or CONTINUATION frame; `Some` when the block is whole with it.
    pub(super) fn take(&mut self, frame: Head, payload: &[u8]) -> io::Result<Option<Whole>> {
        let follows = frame.kind == Kind::Continuation;
        if self.open != follows.then_some(frame.stream) {
            return Err(breach("header block out of order"));
        }
        self.open = (!frame.has(END_HEADERS)).then_some(frame.stream);
        let piece = if follows {
            payload
        } else {
            self.block.clear();
            self.ends_stream = frame.has(END_STREAM);
            unpadded(frame, payload)?
        };
        if self.block.len() + piece.len() > self.limit_bytes {
            return Err(self.too_long());
        }
        self.block.extend_from_slice(piece);
        if self.open.is_some() {
            return Ok(None);
        }
        let (mut fields, mut bytes) = (Fields::new(), 0);
        let limit = self.limit_bytes;
        self.hpack
            .decode_with_cb(&self.block, |name, value| {
                bytes += name.len() + value.len() + FIELD_OVERHEAD_BYTES;
                if bytes <= limit {
                    fields.push((name.into_owned(), value.into_owned()));
                }
            })
            .map_err(|error| breach(format!("header block: {error:?}")))?;
        if bytes > limit {
            return Err(self.too_long());
        }
        Ok(Some(Whole {
            fields,
            bytes,
            ends_stream: self.ends_stream,
        }))
    }

    fn too_long(&self) -> io::Error {
        breach(format!("header block over {} bytes", self.limit_bytes))
    }
}

/// A HEADERS payload without its padding and priority.
fn unpadded(frame: Head, payload: &[u8]) -> io::Result<&[u8]> {
    let mut block = payload;
    let mut padding = 0;
    if frame.has(PADDED) {
        let (&length, rest) = block
            .split_first()
            .ok_or_else(|| breach("empty padded HEADERS"))?;
        (padding, block) = (usize::from(length), rest);
    }
    let ahead = if frame.has(PRIORITY) { 5 } else { 0 };
    block
        .len()
        .checked_sub(padding)
        .and_then(|end| block.get(ahead..end))
        .ok_or_else(|| breach("HEADERS shorter than their padding"))
}
