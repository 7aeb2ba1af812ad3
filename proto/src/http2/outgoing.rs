//! A body on its way out: slices by reference, cut into DATA frames as windows and sockets take them.
//!
//! ```text
//! push(piece) … ─► │ in a frame, unsent │ ready │      close() / close_with(trailers) ─► tail
//!                  └──── frame_left ────┘
//! ```
//!
//! Units: bytes. Nothing is copied; an owned piece is dropped as soon as its last byte is sent.

use std::{collections::VecDeque, io::IoSlice};

use bytes::Bytes;

/// Some bytes of a body.
#[derive(Debug)]
pub enum Piece<'a> {
    /// Kept by the piece.
    Shared(Bytes),
    /// Kept by the caller.
    Borrowed(&'a [u8]),
}

impl Piece<'_> {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Borrowed(bytes) => bytes,
        }
    }
}

impl From<Bytes> for Piece<'_> {
    fn from(bytes: Bytes) -> Self {
        Self::Shared(bytes)
    }
}

impl<'a> From<&'a [u8]> for Piece<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Borrowed(bytes)
    }
}

/// A body and how much of it is cut into frames and sent.
#[derive(Debug, Default)]
pub struct Outgoing<'a> {
    pieces: VecDeque<Piece<'a>>,
    /// Sent bytes of the first piece.
    at: usize,
    /// Bytes of the current frame not yet sent.
    pub(super) frame_left: usize,
    /// Bytes not yet in a frame.
    pub(super) ready_bytes: usize,
    pub(super) is_closed: bool,
    /// Nothing of the body is left to be framed: the frame that ends it has been begun, or the tail ends it.
    pub(super) is_framed: bool,
    /// Frames that go out behind the body, and end the stream.
    pub(super) tail: Vec<u8>,
    pub(super) tail_at: usize,
}

impl<'a> Outgoing<'a> {
    /// A body that is whole already.
    pub fn whole(pieces: impl IntoIterator<Item = Piece<'a>>) -> Self {
        let mut out = Self::default();
        for piece in pieces {
            out.push(piece);
        }
        out.close();
        out
    }

    /// The next bytes.
    ///
    /// # Panics
    ///
    /// When the body was closed.
    pub fn push(&mut self, piece: impl Into<Piece<'a>>) {
        assert!(!self.is_closed, "a closed body takes no more");
        let piece = piece.into();
        if !piece.as_slice().is_empty() {
            self.ready_bytes += piece.as_slice().len();
            self.pieces.push_back(piece);
        }
    }

    /// Nothing follows.
    pub fn close(&mut self) {
        self.is_closed = true;
    }

    /// Nothing follows but `tail`: whole frames, the last of which ends the stream.
    pub fn close_with(&mut self, tail: Vec<u8>) {
        self.is_closed = true;
        self.tail = tail;
    }

    /// Whether [`Outgoing::close`] was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Bytes pushed and not yet cut into a frame.
    #[must_use]
    pub fn ready_bytes(&self) -> usize {
        self.ready_bytes
    }

    /// Whether every byte was handed to the socket, the end of the stream included.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        self.is_framed && self.frame_left == 0 && self.tail_at == self.tail.len()
    }

    /// Whether no frame of it is half sent: others may go in between.
    pub(super) fn is_at_boundary(&self) -> bool {
        self.frame_left == 0 && (self.tail_at == 0 || self.tail_at == self.tail.len())
    }

    /// What of the current frame goes into the next write: how many slices, how many bytes.
    pub(super) fn slices<'s>(&'s self, out: &mut [IoSlice<'s>]) -> (usize, usize) {
        let (mut left, mut at, mut count) = (self.frame_left, self.at, 0);
        for piece in self.pieces.iter().take(out.len()) {
            if left == 0 {
                break;
            }
            let bytes = &piece.as_slice()[at..];
            let bytes = &bytes[..bytes.len().min(left)];
            out[count] = IoSlice::new(bytes);
            left -= bytes.len();
            at = 0;
            count += 1;
        }
        (count, self.frame_left - left)
    }

    /// So many bytes of the current frame were sent.
    pub(super) fn advance(&mut self, mut bytes: usize) {
        self.frame_left -= bytes;
        while let Some(first) = self.pieces.front() {
            let length = first.as_slice().len();
            let of_first = bytes.min(length - self.at);
            self.at += of_first;
            bytes -= of_first;
            if self.at < length {
                break;
            }
            self.pieces.pop_front();
            self.at = 0;
        }
    }
}
