//! Bulk messages on the wire, without I/O: a small head to decode, then payload by reference.
//!
//! ```text
//! │ 0 │ length u32 BE │ fields of the message … │ 0x7a │ varint data length │ data … │
//!  └── gRPC prefix ──┘ └── Head.message ───────┘ └── field 15, always last ──┘└ Data ┘
//!  └──────────── made by `head` ─────────────────────────────────────────────┘└ sent by reference
//! ```
//!
//! This is ordinary gRPC and protobuf, so that a stock client of any language reads and writes it; only the
//! order is ours: `data` comes last, as every encoder that writes fields by number does it. The reader cuts
//! messages from chunks that are split anywhere. Payload comes out as slices of the chunks that went in; only a
//! head that is split between chunks is copied.
//!
//! States: prefix → head → data → end → prefix …; an error is final.
//! Units: bytes. Errors: [`FrameError`], as soon as the bytes that are wrong have come in; no input panics.
//! Why not tonic's codec: it copies each payload into and out of a contiguous buffer of its own.
//! Source: gRPC over HTTP/2 (length-prefixed message), protobuf encoding (tags, wire types).

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};

mod walk;

use walk::{Walk, walk};

/// Field number of `data` in every bulk message.
pub const DATA_FIELD: u32 = 15;

/// Tag byte of `data`: field 15, length-delimited.
pub const DATA_TAG: u8 = 0x7a;

/// Bytes before each message: compressed flag, length u32 BE.
pub const PREFIX_BYTES: usize = 5;

/// Everything of a message that comes before its payload: gRPC prefix, fields, tag and length of `data`.
///
/// `message` must have an empty `data`; `data_len` bytes are to follow by reference. With `data_len` 0 the
/// message has no `data` field, as protobuf encoders write it.
///
/// # Panics
///
/// When the whole message is 4 GiB or longer, which gRPC cannot frame.
pub fn head<M: Message>(message: &M, data_len: usize) -> Bytes {
    let data_head_len = if data_len == 0 {
        0
    } else {
        1 + encoded_len_varint(data_len as u64)
    };
    let head_len = message.encoded_len() + data_head_len;
    let length = u32::try_from(head_len + data_len).expect("a message is far shorter than 4 GiB");
    let mut head = BytesMut::with_capacity(PREFIX_BYTES + head_len);
    head.put_u8(0);
    head.put_u32(length);
    message
        .encode(&mut head)
        .expect("the buffer has room for the encoded length");
    if data_len > 0 {
        head.put_u8(DATA_TAG);
        encode_varint(data_len as u64, &mut head);
    }
    head.freeze()
}

/// What a [`FrameReader`] takes at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLimits {
    /// Bytes of a message without its payload. The header of a 64 MiB block needs 8.3 KiB.
    pub max_head_bytes: usize,
    /// Bytes of payload in one message.
    pub max_data_bytes: u64,
}

impl Default for FrameLimits {
    /// 256 KiB of head, 64 MiB of payload.
    fn default() -> Self {
        Self {
            max_head_bytes: 256 << 10,
            max_data_bytes: 64 << 20,
        }
    }
}

/// A piece of a message, in order: one `Head`, its `Data` (none, one or more), one `End`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A message begins.
    Head {
        /// The protobuf bytes of every field but `data`.
        message: Bytes,
        /// Bytes of `data` that follow.
        data_len: u64,
    },
    /// The next bytes of `data`, never empty, a slice of a chunk that was pushed.
    Data(Bytes),
    /// The message is whole.
    End,
}

/// Why bytes are not a stream of bulk messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The compressed flag is set; bulk messages are never compressed.
    #[error("message is compressed (flag {flag}), which was not negotiated")]
    Compressed {
        /// The flag byte.
        flag: u8,
    },
    /// The message announces more bytes than head and payload may have together.
    #[error("message of {length_bytes} bytes is over the limit of {limit_bytes}")]
    MessageTooLong {
        /// Bytes announced.
        length_bytes: u64,
        /// Bytes allowed.
        limit_bytes: u64,
    },
    /// The fields before `data` are too long.
    #[error("message has over {limit_bytes} bytes before its data")]
    HeadTooLong {
        /// Bytes allowed.
        limit_bytes: u64,
    },
    /// The payload is too long.
    #[error("data of {length_bytes} bytes is over the limit of {limit_bytes}")]
    DataTooLong {
        /// Bytes announced.
        length_bytes: u64,
        /// Bytes allowed.
        limit_bytes: u64,
    },
    /// `data` is followed by another field, or by another `data`.
    #[error("data is not the last field: {trailing_bytes} bytes follow it in its message")]
    DataNotLast {
        /// Bytes after it.
        trailing_bytes: u64,
    },
    /// Field 15 is not length-delimited.
    #[error("field 15 (data) has wire type {wire_type}, expected 2")]
    DataType {
        /// Its wire type.
        wire_type: u8,
    },
    /// A tag has field number 0, a number over 2^29 - 1, or a wire type that proto3 does not have.
    #[error("{tag:#x} is not a field tag")]
    BadTag {
        /// The tag.
        tag: u64,
    },
    /// A variable-length integer does not end within ten bytes, or is over 64 bits.
    #[error("varint is longer than 64 bits")]
    BadVarint,
    /// A field reaches over the end of its message.
    #[error("a field reaches {over_bytes} bytes over the end of its message")]
    Overrun {
        /// Bytes over the end.
        over_bytes: u64,
    },
    /// The stream ended inside a message.
    #[error("stream ended inside a message, at least {missing_bytes} bytes early")]
    Truncated {
        /// Bytes missing, as far as known.
        missing_bytes: u64,
    },
}

/// Cuts a stream of chunks into messages. See the module's page.
///
/// Push a chunk, then call [`FrameReader::next`] until it answers `None`; what is held back then is less than a head.
#[derive(Debug)]
pub struct FrameReader {
    limits: FrameLimits,
    unread: VecDeque<Bytes>,
    state: State,
}

#[derive(Debug)]
enum State {
    Prefix {
        bytes: [u8; PREFIX_BYTES],
        have: usize,
    },
    Head(Head),
    Data {
        left: u64,
    },
    End,
    Failed(FrameError),
}

const START: State = State::Prefix {
    bytes: [0; PREFIX_BYTES],
    have: 0,
};

impl FrameReader {
    /// A reader at the start of a stream.
    pub fn new(limits: FrameLimits) -> Self {
        Self {
            limits,
            unread: VecDeque::with_capacity(2),
            state: START,
        }
    }

    /// The next bytes of the stream.
    pub fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.unread.push_back(chunk);
        }
    }

    /// The next piece, or `None` when more bytes are needed.
    ///
    /// # Errors
    ///
    /// Where the stream breaks the framing or a limit; the same error again on every later call.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would end for good where this one waits for bytes"
    )]
    pub fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let step = self.step();
        if let Err(error) = step {
            self.unread.clear();
            self.state = State::Failed(error);
        }
        step
    }

    /// Bytes of payload that come next and have not been pushed: whoever knows their place may read them right
    /// there, and says so with [`FrameReader::skip_data`]. 0 while pushed bytes are unread, and outside payload.
    pub fn data_left(&self) -> u64 {
        match self.state {
            State::Data { left } if self.unread.is_empty() => left,
            _ => 0,
        }
    }

    /// So many bytes of payload went elsewhere. [`FrameReader::next`] goes on behind them.
    ///
    /// # Panics
    ///
    /// When they are more than [`FrameReader::data_left`].
    pub fn skip_data(&mut self, bytes: u64) {
        assert!(
            bytes <= self.data_left(),
            "only payload that has not been pushed can be skipped"
        );
        if let State::Data { left } = &mut self.state {
            *left -= bytes;
            if *left == 0 {
                self.state = State::End;
            }
        }
    }

    /// Checks that the stream ended where a message ended; to be called when [`FrameReader::next`] has answered `None`.
    ///
    /// # Errors
    ///
    /// [`FrameError::Truncated`] inside a message, and the error that was met before, if there was one.
    pub fn finish(&self) -> Result<(), FrameError> {
        let missing_bytes = match &self.state {
            State::Prefix { have: 0, .. } | State::End => 0,
            State::Prefix { have, .. } => (PREFIX_BYTES - have) as u64,
            State::Head(head) => (head.message_len - head.held.len()) as u64,
            State::Data { left } => *left,
            State::Failed(error) => return Err(*error),
        };
        if missing_bytes > 0 {
            Err(FrameError::Truncated { missing_bytes })
        } else {
            Ok(())
        }
    }

    fn step(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            match &mut self.state {
                State::Prefix { bytes, have } => {
                    while *have < PREFIX_BYTES {
                        let Some(chunk) = self.unread.front_mut() else {
                            return Ok(None);
                        };
                        let take = chunk.len().min(PREFIX_BYTES - *have);
                        chunk.copy_to_slice(&mut bytes[*have..*have + take]);
                        *have += take;
                        pop_read(&mut self.unread);
                    }
                    self.state = State::Head(Head::new(*bytes, &self.limits)?);
                }
                State::Head(head) => match head.read(&mut self.unread, &self.limits)? {
                    None => return Ok(None),
                    Some((message, data_len)) => {
                        self.state = if data_len == 0 {
                            State::End
                        } else {
                            State::Data { left: data_len }
                        };
                        return Ok(Some(Frame::Head { message, data_len }));
                    }
                },
                State::Data { left } => {
                    let Some(chunk) = self.unread.front_mut() else {
                        return Ok(None);
                    };
                    let take =
                        usize::try_from(*left).map_or(chunk.len(), |left| left.min(chunk.len()));
                    let data = chunk.split_to(take);
                    pop_read(&mut self.unread);
                    *left -= take as u64;
                    if *left == 0 {
                        self.state = State::End;
                    }
                    return Ok(Some(Frame::Data(data)));
                }
                State::End => {
                    self.state = START;
                    return Ok(Some(Frame::End));
                }
                State::Failed(error) => return Err(*error),
            }
        }
    }
}

impl Default for FrameReader {
    fn default() -> Self {
        Self::new(FrameLimits::default())
    }
}

/// Drops the front chunk when it is read.
fn pop_read(unread: &mut VecDeque<Bytes>) {
    if unread.front().is_some_and(Bytes::is_empty) {
        unread.pop_front();
    }
}

/// Finds where the fields before `data` end, without decoding them.
#[derive(Debug)]
struct Head {
    message_len: usize,
    /// Where the next field starts; may lie beyond the bytes at hand. The walk never goes back, so that a
    /// head of n bytes costs O(n) however it is split.
    field_at: usize,
    /// The head so far, when it does not lie in one chunk; never a byte of `data`.
    held: BytesMut,
}

impl Head {
    fn new(prefix: [u8; PREFIX_BYTES], limits: &FrameLimits) -> Result<Self, FrameError> {
        let [flag, length @ ..] = prefix;
        if flag != 0 {
            return Err(FrameError::Compressed { flag });
        }
        let length_bytes = u64::from(u32::from_be_bytes(length));
        // 11: the tag of `data` and its length, at most.
        let limit_bytes = limits
            .max_data_bytes
            .saturating_add(limits.max_head_bytes as u64 + 11);
        if length_bytes > limit_bytes {
            return Err(FrameError::MessageTooLong {
                length_bytes,
                limit_bytes,
            });
        }
        Ok(Self {
            message_len: length_bytes as usize,
            field_at: 0,
            held: BytesMut::new(),
        })
    }

    /// The message without `data`, and the length of `data`; `None` when more bytes are needed.
    fn read(
        &mut self,
        unread: &mut VecDeque<Bytes>,
        limits: &FrameLimits,
    ) -> Result<Option<(Bytes, u64)>, FrameError> {
        if self.held.is_empty() {
            // The common case: the whole head lies in one chunk and is taken by reference.
            let mut nothing = Bytes::new();
            let chunk = unread.front_mut().unwrap_or(&mut nothing);
            let at_hand = &chunk[..chunk.len().min(self.message_len)];
            match walk(at_hand, self.message_len, &mut self.field_at, limits)? {
                Walk::Found {
                    head_len,
                    data_at,
                    data_len,
                } => {
                    let message = chunk.split_to(head_len);
                    chunk.advance(data_at - head_len);
                    pop_read(unread);
                    return Ok(Some((message, data_len)));
                }
                Walk::Needs(_) => {
                    self.held.extend_from_slice(chunk);
                    unread.pop_front();
                }
            }
        }
        loop {
            match walk(&self.held, self.message_len, &mut self.field_at, limits)? {
                Walk::Found {
                    head_len, data_len, ..
                } => {
                    self.held.truncate(head_len);
                    return Ok(Some((std::mem::take(&mut self.held).freeze(), data_len)));
                }
                Walk::Needs(bytes) => {
                    let Some(chunk) = unread.front_mut() else {
                        return Ok(None);
                    };
                    let take = chunk.len().min(bytes - self.held.len());
                    self.held.extend_from_slice(&chunk[..take]);
                    chunk.advance(take);
                    pop_read(unread);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
