//! The state of one connection that carries one stream at a time, for either end.
//!
//! ```text
//! Client  open ─► [HEADERS DATA …] ─►            Server  pump = Opened ─► [HEADERS DATA …]
//!         pump ◄─ [HEADERS DATA … END_STREAM]            put_headers, push ─► … END_STREAM
//!                     Ended                                                     idle again
//! ```
//!
//! The owner calls [`Lane::push`] and [`Lane::pump`] whenever its socket may take or have bytes, and waits for the
//! socket when both answer that there is nothing to do.
//!
//! States: idle → stream → idle. A stream that breaks off leaves a lane that must not be used again.
//! Units: bytes. Bounds: [`LaneLimits`], and those of `read`.
//! Errors: those of the socket and of the receiver as they are; [`breach`]es of the protocol.
//! Windows: the largest there are, given back in large steps; back-pressure is the socket's, as there is no
//! other stream that could be held up.

mod read;
mod write;

use std::io::{self, IoSlice, IoSliceMut};

use super::{
    frame::{
        DEFAULT_FRAME_BYTES, DEFAULT_WINDOW_BYTES, END_HEADERS, END_STREAM, HEAD_BYTES, Head, Kind,
        MAX_WINDOW_BYTES, PREFACE, SETTING_ENABLE_PUSH, SETTING_INITIAL_WINDOW_SIZE,
        SETTING_MAX_CONCURRENT_STREAMS, SETTING_MAX_FRAME_SIZE, SETTING_ONE_STREAM, put_frame,
        put_window_update,
    },
    headers::{Fields, HeaderBlocks},
};

/// Bytes read ahead of their use: heads and trailers, and at most so much payload that is copied twice.
const INBOX_BYTES: usize = DEFAULT_FRAME_BYTES + HEAD_BYTES;

/// A socket that never blocks: it answers [`io::ErrorKind::WouldBlock`] instead.
pub trait Socket {
    /// Reads into `slices`, in order; 0 when the peer has closed.
    ///
    /// # Errors
    /// The socket's.
    fn try_read_vectored(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize>;

    /// Writes from `slices`, in order.
    ///
    /// # Errors
    /// The socket's.
    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize>;
}

/// Takes a stream as it comes in. An error ends the pump; the lane has counted the bytes by then, so that
/// another receiver may go on.
pub trait Receiver {
    /// A header block as it came, where it is plain literals. True when that says all: then it is not decoded, and
    /// [`Receiver::headers`] not called. Calls and answers look alike, so that whoever has seen one may know the next.
    ///
    /// # Errors
    /// Whatever shall end the pump.
    fn knows(&mut self, _: &[u8]) -> io::Result<bool> {
        Ok(false)
    }
    /// A header block: the head of the stream, or what stands behind its body. Passed over unless taken.
    ///
    /// # Errors
    /// Whatever shall end the pump.
    fn headers(&mut self, _: Fields) -> io::Result<()> {
        Ok(())
    }
    /// Where the next bytes of the body belong, if that is known already; they are read right there.
    fn room(&mut self) -> Option<&mut [u8]> {
        None
    }
    /// So many bytes have been read into the room.
    ///
    /// # Errors
    /// Whatever shall end the pump.
    fn landed(&mut self, _: usize) -> io::Result<()> {
        Ok(())
    }
    /// Bytes whose place was not known.
    ///
    /// # Errors
    /// Whatever shall end the pump.
    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// Which end of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Opens streams.
    Client,
    /// Answers them.
    Server,
}

/// Sizes of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneLimits {
    /// Bytes of header fields of one stream, as sent and as decoded.
    pub max_headers_bytes: usize,
    /// Largest DATA payload that is asked for.
    pub max_frame_bytes: u32,
    /// Largest DATA payload that is sent, if the peer takes it.
    pub send_frame_bytes: usize,
    /// Bytes of payload that one read takes at most: what is summed right after it should still be in the
    /// core's cache.
    pub read_bytes: usize,
}

/// How far a pump came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pump {
    /// The peer has opened a stream; its body, if it has one, is still to come.
    Opened,
    /// The peer has sent the last of the stream.
    Ended,
    /// Something came in; there may be something to send now.
    Moved,
    /// There may be more, but others shall have a turn.
    Busy,
    /// The socket has nothing.
    Starved,
}

/// How far a push came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Push {
    /// The body is sent, to its end.
    Done,
    /// What was there of the body is sent.
    Hungry,
    /// The peer must open a window first.
    NoWindow,
    /// The socket takes no more.
    NoRoom,
}

/// One connection. See the module's page.
pub struct Lane {
    role: Role,
    limits: LaneLimits,
    inbox: Box<[u8]>,
    /// Unread bytes of the inbox.
    start: usize,
    end: usize,
    blocks: HeaderBlocks,
    stream: Stream,
    /// Window of a new stream, as the peer wishes.
    peer_window_bytes: i64,
    peer_frame_bytes: usize,
    connection_window_bytes: i64,
    /// Received since the connection's window was last filled up.
    received_bytes: u64,
    /// What is being sent ahead of the body's next bytes: whole frames, and the head of the current DATA frame last.
    outbox: Vec<u8>,
    /// Answers to control frames; they move to the outbox where no frame is half sent.
    mail: Vec<u8>,
    /// The last push stopped inside a frame of its body.
    is_mid_frame: bool,
    /// The frame being read; `length` counts what is left of it, without its padding.
    frame: Option<Head>,
    /// Bytes at the end of that frame that mean nothing.
    padding_bytes: usize,
    is_leaving: bool,
}

/// The stream there is, or was last.
#[derive(Default)]
struct Stream {
    id: u32,
    window_bytes: i64,
    /// Received since its window was last filled up.
    received_bytes: u64,
    /// Decoded bytes of all its header fields.
    header_bytes: usize,
    /// The peer will send no more on it.
    has_ended: bool,
    /// A server has sent the last of its answer.
    is_answered: bool,
}

impl Lane {
    /// A connection at its start: the client's greeting, or the server's, waits to be pushed.
    ///
    /// The preface of a client must have been taken off before a server sees its bytes.
    #[must_use]
    pub fn new(role: Role, limits: LaneLimits) -> Self {
        let mut outbox = Vec::with_capacity(128);
        let mut settings = vec![
            (SETTING_INITIAL_WINDOW_SIZE, MAX_WINDOW_BYTES),
            (SETTING_MAX_FRAME_SIZE, limits.max_frame_bytes),
        ];
        match role {
            Role::Client => {
                outbox.extend_from_slice(PREFACE);
                settings.push((SETTING_ENABLE_PUSH, 0));
                settings.push((SETTING_ONE_STREAM, 1));
            }
            Role::Server => settings.push((SETTING_MAX_CONCURRENT_STREAMS, 1)),
        }
        let mut payload = Vec::with_capacity(6 * settings.len());
        for (name, value) in settings {
            payload.extend_from_slice(&name.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        put_frame(&mut outbox, Kind::Settings, 0, 0, &payload);
        put_window_update(
            &mut outbox,
            0,
            MAX_WINDOW_BYTES - DEFAULT_WINDOW_BYTES as u32,
        );
        Self {
            role,
            limits,
            inbox: vec![0; INBOX_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            blocks: HeaderBlocks::new(role, limits.max_headers_bytes),
            stream: Stream {
                has_ended: true,
                is_answered: true,
                ..Stream::default()
            },
            peer_window_bytes: DEFAULT_WINDOW_BYTES,
            peer_frame_bytes: DEFAULT_FRAME_BYTES.min(limits.send_frame_bytes),
            connection_window_bytes: DEFAULT_WINDOW_BYTES,
            received_bytes: 0,
            outbox,
            mail: Vec::new(),
            is_mid_frame: false,
            frame: None,
            padding_bytes: 0,
            is_leaving: false,
        }
    }

    /// Bytes that were read before the lane was made.
    ///
    /// # Errors
    /// When they are more than a lane reads ahead.
    pub fn feed(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = self.inbox[self.end..]
            .get_mut(..bytes.len())
            .ok_or_else(|| breach("too many bytes before the first frame"))?;
        room.copy_from_slice(bytes);
        self.end += bytes.len();
        Ok(())
    }

    /// Begins a stream with this header block.
    pub fn open(&mut self, block: &[u8]) {
        let id = if self.stream.id == 0 {
            1
        } else {
            self.stream.id + 2
        };
        self.begin(id);
        put_frame(&mut self.outbox, Kind::Headers, END_HEADERS, id, block);
    }

    /// Answers the stream with this header block; a body and its end follow unless `is_end`.
    pub fn put_headers(&mut self, block: &[u8], is_end: bool) {
        let flags = END_HEADERS | if is_end { END_STREAM } else { 0 };
        self.stream.is_answered = is_end;
        put_frame(
            &mut self.outbox,
            Kind::Headers,
            flags,
            self.stream.id,
            block,
        );
    }

    /// The frame that ends the stream's body with this header block, for [`super::Outgoing::close_with`].
    #[must_use]
    pub fn trailers(&self, block: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD_BYTES + block.len());
        let flags = END_HEADERS | END_STREAM;
        put_frame(&mut out, Kind::Headers, flags, self.stream.id, block);
        out
    }

    /// Says that no further stream will be served; `code` is the RFC's, 0 for a friendly end.
    pub fn put_goaway(&mut self, code: u32) {
        let mut payload = [0; 8];
        payload[..4].copy_from_slice(&self.stream.id.to_be_bytes());
        payload[4..].copy_from_slice(&code.to_be_bytes());
        put_frame(&mut self.outbox, Kind::GoAway, 0, 0, &payload);
    }

    /// Whether the peer has sent the last of the stream, or there is no stream.
    #[must_use]
    pub fn peer_has_ended(&self) -> bool {
        self.stream.has_ended
    }

    /// Whether a new stream may be opened: nothing is half read, and the peer is not leaving.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.frame.is_none()
            && !self.blocks.is_open()
            && !self.is_leaving
            && self.stream.has_ended
            && self.stream.id < MAX_WINDOW_BYTES - 2
    }

    /// Whether frames wait to be sent.
    #[must_use]
    pub fn has_mail(&self) -> bool {
        !self.outbox.is_empty() || !self.mail.is_empty()
    }

    /// Whether the last push stopped inside a frame: only the rest of that body may follow it.
    #[must_use]
    pub fn is_mid_frame(&self) -> bool {
        self.is_mid_frame
    }

    /// Bytes by which the peer's windows have shrunk: of the stream, of the connection.
    #[cfg(test)]
    pub(super) fn received_bytes(&self) -> (u64, u64) {
        (self.stream.received_bytes, self.received_bytes)
    }

    fn begin(&mut self, id: u32) {
        self.stream = Stream {
            id,
            window_bytes: self.peer_window_bytes,
            ..Stream::default()
        };
    }
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane")
            .field("role", &self.role)
            .field("stream", &self.stream.id)
            .finish_non_exhaustive()
    }
}

/// What the protocol does not allow.
pub fn breach(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}
