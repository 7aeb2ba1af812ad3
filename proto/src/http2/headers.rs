//! Header blocks: gathered from HEADERS and CONTINUATION, decoded once whole.
//!
//! ```text
//! HEADERS ─┬─ CONTINUATION … ─► block ─HPACK─► (name, value) …
//!          └─ padding and priority are cut off
//! ```
//!
//! A server's lane reads only what a client's lane writes: literals that no table remembers, without Huffman coding.
//! So it keeps no table, and no block costs more than a walk over its bytes, before anyone is known to be allowed in.
//! A client's lane walks likewise over what a Terrace node answers, and decodes what anybody else does.
//!
//! Bounds: a block and what it decodes to, by the same limit; a client's table at HTTP/2's own default.

use std::io;

use http::HeaderMap;

use super::{
    Role, breach,
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
    /// A client's: servers of any make answer it.
    hpack: Option<loona_hpack::Decoder<'static>>,
    limit_bytes: usize,
    block: Vec<u8>,
    /// The stream whose block goes on in CONTINUATION.
    open: Option<u32>,
    ends_stream: bool,
}

/// A block that has become whole.
pub(super) struct Whole {
    /// None: it is plain, and [`HeaderBlocks::plain`] has it.
    pub(super) fields: Option<Fields>,
    /// Bytes it decoded to, as the RFC counts them.
    pub(super) bytes: usize,
    pub(super) ends_stream: bool,
}

impl HeaderBlocks {
    pub(super) fn new(role: Role, limit_bytes: usize) -> Self {
        let hpack = (role == Role::Client).then(|| {
            let mut hpack = loona_hpack::Decoder::new();
            hpack.set_max_allowed_table_size(HEADER_TABLE_BYTES);
            hpack
        });
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
        let (fields, bytes) = match (plain_bytes(&self.block), &mut self.hpack) {
            (Ok(bytes), _) => (None, bytes),
            // Other makes' servers use the table, which plain literals leave as it is.
            (Err(_), Some(hpack)) => {
                let (fields, bytes) = decode(hpack, &self.block, self.limit_bytes)?;
                (Some(fields), bytes)
            }
            (Err(problem), None) => return Err(problem),
        };
        if bytes > self.limit_bytes {
            return Err(self.too_long());
        }
        Ok(Some(Whole {
            fields,
            bytes,
            ends_stream: self.ends_stream,
        }))
    }

    /// The block that was last found whole and plain, as it came.
    pub(super) fn plain(&self) -> &[u8] {
        &self.block
    }

    fn too_long(&self) -> io::Error {
        breach(format!("header block over {} bytes", self.limit_bytes))
    }
}

/// Any header block; of fields over the limit only the bytes are counted.
fn decode(
    hpack: &mut loona_hpack::Decoder<'static>,
    block: &[u8],
    limit: usize,
) -> io::Result<(Fields, usize)> {
    let (mut fields, mut bytes) = (Fields::new(), 0);
    hpack
        .decode_with_cb(block, |name, value| {
            bytes += name.len() + value.len() + FIELD_OVERHEAD_BYTES;
            if bytes <= limit {
                fields.push((name.into_owned(), value.into_owned()));
            }
        })
        .map_err(|error| breach(format!("header block: {error:?}")))?;
    Ok((fields, bytes))
}

/// The fields of a header block as [`put_field`] writes it.
pub(super) fn literals(block: &[u8]) -> io::Result<Fields> {
    let mut fields = Fields::new();
    walk(block, |name, value| {
        fields.push((name.to_vec(), value.to_vec()));
    })?;
    Ok(fields)
}

/// What such a block decodes to, in bytes as the RFC counts them; nothing is kept of it.
fn plain_bytes(block: &[u8]) -> io::Result<usize> {
    let mut bytes = 0;
    walk(block, |name, value| {
        bytes += name.len() + value.len() + FIELD_OVERHEAD_BYTES;
    })?;
    Ok(bytes)
}

fn walk(mut block: &[u8], mut field: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
    while let Some((&kind, rest)) = block.split_first() {
        if kind != 0 {
            return Err(breach("a header field that is no plain literal"));
        }
        block = rest;
        let name = text(&mut block)?;
        field(name, text(&mut block)?);
    }
    Ok(())
}

/// A string without Huffman coding, taken off the block.
fn text<'b>(block: &mut &'b [u8]) -> io::Result<&'b [u8]> {
    const PREFIX_MAX: u8 = 127;
    let ends = || breach("a header field ends early");
    let (&first, mut rest) = block.split_first().ok_or_else(ends)?;
    if first > PREFIX_MAX {
        return Err(breach("a header field in Huffman coding"));
    }
    let mut length = usize::from(first);
    if first == PREFIX_MAX {
        let mut shift = 0;
        loop {
            let (&byte, later) = rest.split_first().ok_or_else(ends)?;
            rest = later;
            length += usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                break;
            }
            if shift > 21 {
                return Err(breach("a header field without end"));
            }
        }
    }
    let text = rest.get(..length).ok_or_else(ends)?;
    *block = &rest[length..];
    Ok(text)
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

#[cfg(test)]
mod tests {
    use super::{Fields, literals, put_field};

    #[test]
    fn literals_of_any_length_are_read_as_written() {
        let mut block = Vec::new();
        let mut fields = Fields::new();
        for length in [0, 1, 126, 127, 128, 254, 255, 400, 20_000] {
            let (name, value) = (vec![b'n'; length.min(300)], vec![b'v'; length]);
            put_field(&mut block, &name, &value);
            fields.push((name, value));
        }
        assert_eq!(literals(&block).expect("a block"), fields);
        // Cut anywhere inside a field, it is refused and nothing panics.
        for end in 1..500 {
            let _ = literals(&block[..end]);
        }
        for wrong in [
            &[0x82][..],
            &[0, 0x81, 0xff],
            &[0, 127, 255, 255, 255, 255, 255],
            &[0],
        ] {
            assert!(literals(wrong).is_err(), "{wrong:?}");
        }
    }
}
