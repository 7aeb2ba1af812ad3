//! Frames of the same-host path, without I/O, for both ends.
//!
//! ```text
//! │ length u32, little-endian │ that many bytes of LocalRequest or LocalReply │ next frame …
//! │ length, its highest bit set │ that many bytes in a fixed layout            │ next frame …      see [`fixed`]
//! ```
//!
//! What the messages mean is said in `v1/local.proto`. File descriptors travel beside the bytes; whoever
//! reads the socket collects them.
//!
//! Units: bytes; a frame's message has at most [`MAX_FRAME_BYTES`].
//! Errors: [`LocalFrameError`]; after one the connection's bytes mean nothing any more, so it is closed.
//! Why an [`Inbox`] of its own: it takes memory as bytes come in, never on a length's word, and messages share
//! its memory, so that a decoded hash is a slice and not an allocation.

pub mod fixed;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

/// The version of the path that both ends must speak; goes with `LocalAttach`.
pub const VERSION: u32 = 1;

/// Longest message of a frame.
pub const MAX_FRAME_BYTES: usize = 8 << 20;

/// Bytes of a frame before its message.
pub const PREFIX_BYTES: usize = 4;

/// Set in the length of a frame of a fixed layout.
const FIXED: u32 = 1 << 31;

/// The most segments that one `LocalMap` may name.
pub const MAX_SEGMENTS_PER_MAP: usize = 64;

/// An [`Inbox`] has at least so much room,
const MIN_ROOM_BYTES: usize = 2 << 10;
/// and makes at least so much at once.
const MORE_ROOM_BYTES: usize = 64 << 10;

/// Bytes that are no frame of the same-host path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocalFrameError {
    /// A message longer than any may be.
    #[error("a frame of {length_bytes} bytes, at most {MAX_FRAME_BYTES} are allowed")]
    TooLong {
        /// How long it is, or says it is.
        length_bytes: usize,
    },
    /// A message that protobuf cannot decode.
    #[error("a frame that is no message: {0}")]
    Undecodable(#[from] prost::DecodeError),
    /// Bytes that are none of the fixed layouts.
    #[error("a frame of no known layout: {0}")]
    Misshapen(&'static str),
}

/// A whole frame that has come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A message.
    Message(Bytes),
    /// In a fixed layout.
    Fixed(Bytes),
}

/// Appends `message` to `out` as one frame.
///
/// # Errors
///
/// [`LocalFrameError::TooLong`]; `out` is as it was.
pub fn encode<M: Message>(message: &M, out: &mut Vec<u8>) -> Result<(), LocalFrameError> {
    let length_bytes = message.encoded_len();
    let prefix = prefix(length_bytes)?;
    out.reserve(PREFIX_BYTES + length_bytes);
    out.put_u32_le(prefix);
    message.encode_raw(out);
    Ok(())
}

fn prefix(length_bytes: usize) -> Result<u32, LocalFrameError> {
    match u32::try_from(length_bytes) {
        Ok(prefix) if length_bytes <= MAX_FRAME_BYTES => Ok(prefix),
        _ => Err(LocalFrameError::TooLong { length_bytes }),
    }
}

/// What has come in and is not a whole message yet.
///
/// ```
/// use kvproto::{local::{Inbox, encode}, v1};
///
/// let mut wire = Vec::new();
/// encode(&v1::LocalReply { sequence: 7, answer: None }, &mut wire)?;
/// let mut inbox = Inbox::new();
/// for byte in wire {
///     inbox.room()[0] = byte; // a socket would be asked to fill it
///     inbox.filled(1);
/// }
/// let reply: v1::LocalReply = inbox.take()?.expect("a whole frame");
/// assert_eq!(reply.sequence, 7);
/// # Ok::<(), kvproto::local::LocalFrameError>(())
/// ```
#[derive(Debug, Default)]
pub struct Inbox {
    /// What has come in, then room; the room's bytes are arbitrary.
    buffer: BytesMut,
    filled: usize,
}

impl Inbox {
    /// An empty inbox.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where the next bytes go; never empty. Grows with what has come in, not with what was announced.
    pub fn room(&mut self) -> &mut [u8] {
        if self.buffer.len() - self.filled < MIN_ROOM_BYTES {
            let more = MORE_ROOM_BYTES.max(self.filled);
            self.buffer.truncate(self.filled);
            self.buffer.resize(self.filled + more, 0);
        }
        &mut self.buffer[self.filled..]
    }

    /// So many bytes have been written to the room.
    ///
    /// # Panics
    ///
    /// When there was not so much room.
    pub fn filled(&mut self, bytes: usize) {
        assert!(
            bytes <= self.buffer.len() - self.filled,
            "more bytes were read than there was room for"
        );
        self.filled += bytes;
    }

    /// Whether nothing is there that was not handed out.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// The next whole message; `None` until it has come in.
    ///
    /// # Errors
    ///
    /// [`LocalFrameError`], as soon as it is certain.
    pub fn take<M: Message + Default>(&mut self) -> Result<Option<M>, LocalFrameError> {
        match self.take_frame()? {
            Some(Frame::Message(frame)) => Ok(Some(M::decode(frame)?)),
            Some(Frame::Fixed(_)) => Err(LocalFrameError::Misshapen("a message was expected")),
            None => Ok(None),
        }
    }

    /// The next whole frame; `None` until it has come in.
    ///
    /// # Errors
    ///
    /// [`LocalFrameError::TooLong`], as soon as it is certain.
    pub fn take_frame(&mut self) -> Result<Option<Frame>, LocalFrameError> {
        let Some((prefix, _)) = self.buffer[..self.filled].split_first_chunk() else {
            return Ok(None);
        };
        let prefix = u32::from_le_bytes(*prefix);
        let length_bytes = (prefix & !FIXED) as usize;
        if length_bytes > MAX_FRAME_BYTES {
            return Err(LocalFrameError::TooLong { length_bytes });
        }
        if self.filled < PREFIX_BYTES + length_bytes {
            return Ok(None);
        }
        self.filled -= PREFIX_BYTES + length_bytes;
        let mut frame = self.buffer.split_to(PREFIX_BYTES + length_bytes).freeze();
        let frame = frame.split_off(PREFIX_BYTES);
        Ok(Some(match prefix & FIXED {
            0 => Frame::Message(frame),
            _ => Frame::Fixed(frame),
        }))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::{Inbox, LocalFrameError, MAX_FRAME_BYTES, PREFIX_BYTES, encode};
    use crate::v1::{self, local_request::Call};

    fn put(inbox: &mut Inbox, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = inbox.room();
            let count = room.len().min(bytes.len());
            room[..count].copy_from_slice(&bytes[..count]);
            inbox.filled(count);
            bytes = &bytes[count..];
        }
    }

    fn request(sequence: u64, token: usize) -> v1::LocalRequest {
        v1::LocalRequest {
            sequence,
            timeout_ms: 5,
            done: vec![sequence, 3],
            call: Some(Call::Attach(v1::LocalAttach {
                version: super::VERSION,
                token: "t".repeat(token),
                owner_id: Bytes::from_static(&[7; 16]),
                ..v1::LocalAttach::default()
            })),
        }
    }

    proptest! {
        #[test]
        fn frames_cut_anywhere_come_out_whole_and_in_order(
            tokens in vec(0usize..60_000, 1..6),
            cuts in vec(1usize..40_000, 1..12),
        ) {
            let sent: Vec<_> = tokens.iter().enumerate().map(|(i, &token)| request(i as u64, token)).collect();
            let mut wire = Vec::new();
            for message in &sent {
                encode(message, &mut wire).unwrap();
            }
            let (mut inbox, mut received, mut rest) = (Inbox::new(), Vec::new(), &wire[..]);
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at(rest.len().min(*cut));
                put(&mut inbox, now);
                while let Some(message) = inbox.take::<v1::LocalRequest>().unwrap() {
                    received.push(message);
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(received, sent);
            prop_assert!(inbox.is_empty());
        }

        #[test]
        fn any_bytes_are_messages_or_refused(bytes in vec(any::<u8>(), 0..300)) {
            let mut inbox = Inbox::new();
            put(&mut inbox, &bytes);
            while let Ok(Some(_)) = inbox.take::<v1::LocalRequest>() {}
        }
    }

    #[test]
    fn a_length_alone_takes_no_memory() {
        let mut inbox = Inbox::new();
        put(&mut inbox, &(MAX_FRAME_BYTES as u32).to_le_bytes());
        assert_eq!(inbox.take::<v1::LocalReply>(), Ok(None));
        assert!(inbox.room().len() < 1 << 20);
    }

    #[test]
    fn what_is_too_long_is_refused_at_its_prefix_and_before_it_is_written() {
        let mut inbox = Inbox::new();
        put(&mut inbox, &(MAX_FRAME_BYTES as u32 + 1).to_le_bytes());
        let refused = inbox.take::<v1::LocalReply>();
        assert_eq!(
            refused,
            Err(LocalFrameError::TooLong {
                length_bytes: MAX_FRAME_BYTES + 1
            })
        );

        let mut out = vec![1];
        let long = request(1, MAX_FRAME_BYTES);
        assert!(matches!(
            encode(&long, &mut out),
            Err(LocalFrameError::TooLong { .. })
        ));
        assert_eq!(out, [1]);
    }

    #[test]
    fn the_longest_frame_comes_through() {
        let longest = request(
            1,
            MAX_FRAME_BYTES - prost::Message::encoded_len(&request(1, 0)) - 100,
        );
        let mut wire = Vec::new();
        encode(&longest, &mut wire).unwrap();
        assert!(wire.len() > MAX_FRAME_BYTES - 200 + PREFIX_BYTES);
        let mut inbox = Inbox::new();
        put(&mut inbox, &wire);
        assert_eq!(inbox.take(), Ok(Some(longest)));
    }

    #[test]
    fn a_message_of_another_kind_is_refused() {
        let mut inbox = Inbox::new();
        put(&mut inbox, &[2, 0, 0, 0, 0xff, 0xff]);
        assert!(matches!(
            inbox.take::<v1::LocalRequest>(),
            Err(LocalFrameError::Undecodable(_))
        ));
    }
}
