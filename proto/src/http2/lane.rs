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
//! Units: bytes. Bounds: [`LaneLimits`], [`MAX_OUTBOX_BYTES`], [`READS_IN_A_ROW`].
//! Errors: those of the socket and of the receiver as they are; [`breach`]es of the protocol.
//! Windows: the largest there are, given back in large steps; back-pressure is the socket's, as there is no
//! other stream that could be held up.

use std::io::{self, IoSlice, IoSliceMut};

use super::{
    frame::{
        ACK, DEFAULT_FRAME_BYTES, DEFAULT_WINDOW_BYTES, END_HEADERS, END_STREAM, HEAD_BYTES, Head,
        Kind, MAX_WINDOW_BYTES, PADDED, PREFACE, SETTING_ENABLE_PUSH, SETTING_INITIAL_WINDOW_SIZE,
        SETTING_MAX_CONCURRENT_STREAMS, SETTING_MAX_FRAME_SIZE, SETTING_ONE_STREAM, put_frame,
        put_window_update,
    },
    headers::{Fields, HeaderBlocks},
    outgoing::Outgoing,
};

/// Bytes read ahead of their use: heads and trailers, and at most so much payload that is copied twice.
const INBOX_BYTES: usize = DEFAULT_FRAME_BYTES + HEAD_BYTES;
/// Received bytes after which a window is filled up again: half of the largest window.
const REFILL_BYTES: u64 = 1 << 30;
/// Bytes of control frames that may wait to be sent.
const MAX_OUTBOX_BYTES: usize = 64 << 10;
/// Reads of one pump before others have a turn.
const READS_IN_A_ROW: usize = 32;
/// Bytes handed to [`Receiver::chunk`] at a time while it looks for payload: a usual message head fits, and
/// little payload comes along with it.
const CHUNK_BYTES: usize = 512;
/// Slices of a body that go into one write at most.
const BODY_SLICES: usize = 16;

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
    /// A header block: the head of the stream, or what stands behind its body.
    ///
    /// # Errors
    /// Whatever shall end the pump.
    fn headers(&mut self, fields: Fields) -> io::Result<()>;
    /// Where the next bytes of the body belong, if that is known already; they are read right there.
    fn room(&mut self) -> Option<&mut [u8]>;
    /// So many bytes have been read into the room.
    ///
    /// # Errors
    /// Whatever shall end the pump.
    fn landed(&mut self, bytes: usize) -> io::Result<()>;
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
    /// The frame being read; `length` counts what is left of it.
    frame: Option<Head>,
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

    /// The frame that ends the stream's body with this header block, for [`Outgoing::close_with`].
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

    fn begin(&mut self, id: u32) {
        self.stream = Stream {
            id,
            window_bytes: self.peer_window_bytes,
            ..Stream::default()
        };
    }

    /// Writes as much as there is, and as socket and windows take.
    ///
    /// # Errors
    /// The socket's.
    pub fn push<S: Socket>(&mut self, socket: &S, body: &mut Outgoing<'_>) -> io::Result<Push> {
        let pushed = self.write(socket, body);
        self.is_mid_frame = !body.is_at_boundary();
        if matches!(pushed, Ok(Push::Done)) {
            self.stream.is_answered = true;
        }
        pushed
    }

    fn write<S: Socket>(&mut self, socket: &S, body: &mut Outgoing<'_>) -> io::Result<Push> {
        loop {
            if self.outbox.is_empty() && body.is_at_boundary() {
                std::mem::swap(&mut self.outbox, &mut self.mail);
            }
            if body.frame_left == 0 && !body.is_framed {
                let starved = self.frame_next(body);
                if starved.is_some() && self.outbox.is_empty() {
                    return Ok(starved.unwrap_or(Push::Hungry));
                }
            }
            if self.outbox.is_empty() && body.is_sent() {
                return Ok(Push::Done);
            }
            let written = {
                let mut slices = [IoSlice::new(&[]); BODY_SLICES + 2];
                slices[0] = IoSlice::new(&self.outbox);
                let (count, bytes) = body.slices(&mut slices[1..=BODY_SLICES]);
                let mut count = 1 + count;
                if body.is_framed && bytes == body.frame_left {
                    slices[count] = IoSlice::new(&body.tail[body.tail_at..]);
                    count += 1;
                }
                match socket.try_write_vectored(&slices[..count]) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(written) => written,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(Push::NoRoom);
                    }
                    Err(error) => return Err(error),
                }
            };
            let of_outbox = written.min(self.outbox.len());
            self.outbox.drain(..of_outbox);
            let of_body = (written - of_outbox).min(body.frame_left);
            body.advance(of_body);
            body.tail_at += written - of_outbox - of_body;
        }
    }

    /// Sends what waits in the outbox and nothing else; answers whether all of it went.
    ///
    /// # Errors
    /// The socket's.
    pub fn flush<S: Socket>(&mut self, socket: &S) -> io::Result<bool> {
        Ok(self.push(socket, &mut Outgoing::default())? != Push::NoRoom)
    }

    /// Puts the head of the next DATA frame into the outbox, or says what it lacks.
    fn frame_next(&mut self, body: &mut Outgoing<'_>) -> Option<Push> {
        if body.ready_bytes == 0 {
            if !body.is_closed {
                return Some(Push::Hungry);
            }
            if !body.tail.is_empty() {
                body.is_framed = true;
                return None;
            }
        }
        let window = self.stream.window_bytes.min(self.connection_window_bytes);
        let room = usize::try_from(window).unwrap_or(0);
        let length = body.ready_bytes.min(self.peer_frame_bytes).min(room);
        if length == 0 && body.ready_bytes > 0 {
            return Some(Push::NoWindow);
        }
        let is_last = body.is_closed && length == body.ready_bytes;
        let ends_stream = is_last && body.tail.is_empty();
        let head = Head {
            length,
            kind: Kind::Data,
            flags: if ends_stream { END_STREAM } else { 0 },
            stream: self.stream.id,
        };
        self.outbox.extend_from_slice(&head.bytes());
        body.frame_left = length;
        body.ready_bytes -= length;
        body.is_framed = is_last;
        self.stream.window_bytes -= length as i64;
        self.connection_window_bytes -= length as i64;
        None
    }

    /// Reads what is there and acts on it.
    ///
    /// # Errors
    /// The socket's, the receiver's, [`io::ErrorKind::ConnectionReset`] when the peer broke the stream off, and
    /// breaches of the protocol.
    pub fn pump<S: Socket, R: Receiver>(
        &mut self,
        socket: &S,
        receiver: &mut R,
    ) -> io::Result<Pump> {
        let mut moved = Pump::Starved;
        for _ in 0..READS_IN_A_ROW {
            loop {
                let (stream, has_ended) = (self.stream.id, self.stream.has_ended);
                if !self.step(receiver)? {
                    break;
                }
                moved = Pump::Moved;
                if self.stream.id != stream {
                    return Ok(Pump::Opened);
                }
                if self.stream.has_ended && !has_ended {
                    return Ok(Pump::Ended);
                }
            }
            match self.fill(socket, receiver) {
                Ok(()) => moved = Pump::Moved,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(moved),
                Err(error) => return Err(error),
            }
        }
        Ok(Pump::Busy)
    }

    /// One read: payload straight to its place, anything behind it into the inbox.
    fn fill<S: Socket, R: Receiver>(&mut self, socket: &S, receiver: &mut R) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.inbox.len() {
            self.inbox.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let is_payload = self.start == self.end;
        if let Some(frame) = self
            .frame
            .as_mut()
            .filter(|frame| is_payload && frame.kind == Kind::Data && frame.length > 0)
            && let Some(room) = receiver.room().filter(|room| !room.is_empty())
        {
            let direct = room.len().min(frame.length).min(self.limits.read_bytes);
            // Behind the end of a frame comes a head: it costs no further read.
            let ahead = if direct == frame.length {
                &mut self.inbox[..]
            } else {
                &mut []
            };
            let mut slices = [IoSliceMut::new(&mut room[..direct]), IoSliceMut::new(ahead)];
            let read = alive(socket.try_read_vectored(&mut slices)?)?;
            let landed = read.min(direct);
            self.end = read - landed;
            frame.length -= landed;
            self.received_bytes += landed as u64;
            return receiver.landed(landed);
        }
        let mut slices = [IoSliceMut::new(&mut self.inbox[self.end..])];
        self.end += alive(socket.try_read_vectored(&mut slices)?)?;
        Ok(())
    }

    /// Acts on what the inbox holds; false when it needs more bytes.
    fn step<R: Receiver>(&mut self, receiver: &mut R) -> io::Result<bool> {
        let Some(frame) = self.frame else {
            let Some(head) = self.inbox[self.start..self.end].first_chunk() else {
                return Ok(false);
            };
            let head = Head::read(head);
            self.start += HEAD_BYTES;
            self.judge_head(head)?;
            self.frame = Some(head);
            return Ok(true);
        };
        if frame.kind == Kind::Data {
            return self.data(receiver, frame);
        }
        if self.end - self.start < frame.length {
            return Ok(false);
        }
        let payload = self.start..self.start + frame.length;
        self.start = payload.end;
        self.frame = None;
        if matches!(frame.kind, Kind::Headers | Kind::Continuation) {
            let whole = self.blocks.take(frame, &self.inbox[payload])?;
            if let Some(whole) = whole {
                self.headers(receiver, frame.stream, whole)?;
            }
            return Ok(true);
        }
        if self.mail.len() > MAX_OUTBOX_BYTES {
            return Err(breach("control frames without end"));
        }
        self.control(frame, payload)?;
        Ok(true)
    }

    /// What can be wrong with a frame before its payload is there.
    fn judge_head(&mut self, head: Head) -> io::Result<()> {
        if self.blocks.is_open() && head.kind != Kind::Continuation {
            return Err(breach("a header block was interrupted"));
        }
        if head.kind != Kind::Data {
            let longest = INBOX_BYTES - HEAD_BYTES;
            if head.length > longest {
                let Head { kind, length, .. } = head;
                return Err(breach(format!("{kind:?} frame of {length} bytes")));
            }
            return Ok(());
        }
        if head.stream != self.stream.id || self.stream.has_ended {
            return Err(breach("DATA of another stream"));
        }
        if head.has(PADDED) {
            return Err(breach("padded DATA, which a lane never sends"));
        }
        if head.length > self.limits.max_frame_bytes as usize {
            return Err(breach(format!("DATA frame of {} bytes", head.length)));
        }
        self.stream.received_bytes += head.length as u64;
        Ok(())
    }

    fn data<R: Receiver>(&mut self, receiver: &mut R, frame: Head) -> io::Result<bool> {
        let at_hand = frame.length.min(self.end - self.start);
        if at_hand == 0 && frame.length > 0 {
            return Ok(false);
        }
        let bytes = &self.inbox[self.start..self.start + at_hand];
        let (taken, outcome) = match receiver.room().filter(|room| !room.is_empty()) {
            _ if at_hand == 0 => (0, Ok(())),
            Some(room) => {
                let landed = at_hand.min(room.len());
                room[..landed].copy_from_slice(&bytes[..landed]);
                (landed, receiver.landed(landed))
            }
            None => {
                let piece = &bytes[..at_hand.min(CHUNK_BYTES)];
                (piece.len(), receiver.chunk(piece))
            }
        };
        self.start += taken;
        self.received_bytes += taken as u64;
        let left = frame.length - taken;
        self.frame = (left > 0).then_some(Head {
            length: left,
            ..frame
        });
        if left == 0 {
            self.stream.has_ended = frame.has(END_STREAM);
            if self.stream.received_bytes >= REFILL_BYTES && !self.stream.has_ended {
                let more = self.stream.received_bytes as u32;
                put_window_update(&mut self.mail, self.stream.id, more);
                self.stream.received_bytes = 0;
            }
            if self.received_bytes >= REFILL_BYTES {
                put_window_update(&mut self.mail, 0, self.received_bytes as u32);
                self.received_bytes = 0;
            }
        }
        outcome.map(|()| true)
    }

    fn headers<R: Receiver>(
        &mut self,
        receiver: &mut R,
        id: u32,
        whole: super::headers::Whole,
    ) -> io::Result<()> {
        if self.role == Role::Server && id != self.stream.id {
            if id.is_multiple_of(2) || id < self.stream.id {
                return Err(breach(format!("stream {id} cannot be opened")));
            }
            if !self.stream.has_ended || !self.stream.is_answered {
                return Err(breach("a second stream on a connection that promised one"));
            }
            self.begin(id);
        } else if id != self.stream.id || self.stream.has_ended {
            return Err(breach("HEADERS of another stream"));
        }
        self.stream.header_bytes += whole.bytes;
        if self.stream.header_bytes > self.limits.max_headers_bytes {
            return Err(breach("header fields without end"));
        }
        self.stream.has_ended = whole.ends_stream;
        receiver.headers(whole.fields)
    }

    fn control(&mut self, frame: Head, payload: std::ops::Range<usize>) -> io::Result<()> {
        let payload = &self.inbox[payload];
        let word = |what: &str| -> io::Result<u32> {
            let bytes: [u8; 4] = payload
                .try_into()
                .map_err(|_| breach(format!("{what} of the wrong length")))?;
            Ok(u32::from_be_bytes(bytes))
        };
        match frame.kind {
            Kind::Settings if frame.has(ACK) => Ok(()),
            Kind::Settings => {
                if !payload.len().is_multiple_of(6) || frame.stream != 0 {
                    return Err(breach("SETTINGS of the wrong length or on a stream"));
                }
                for setting in payload.chunks_exact(6) {
                    let name = u16::from_be_bytes([setting[0], setting[1]]);
                    let value =
                        u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
                    if name == SETTING_INITIAL_WINDOW_SIZE {
                        if value > MAX_WINDOW_BYTES {
                            return Err(breach("a window over 2^31 - 1"));
                        }
                        let value = i64::from(value);
                        self.stream.window_bytes += value - self.peer_window_bytes;
                        self.peer_window_bytes = value;
                    } else if name == SETTING_MAX_FRAME_SIZE {
                        self.peer_frame_bytes = (value as usize)
                            .max(DEFAULT_FRAME_BYTES)
                            .min(self.limits.send_frame_bytes);
                    }
                }
                put_frame(&mut self.mail, Kind::Settings, ACK, 0, &[]);
                Ok(())
            }
            Kind::WindowUpdate => {
                let more = i64::from(word("WINDOW_UPDATE")? & MAX_WINDOW_BYTES);
                let window = if frame.stream == 0 {
                    &mut self.connection_window_bytes
                } else if frame.stream == self.stream.id {
                    &mut self.stream.window_bytes
                } else {
                    return Ok(()); // of a stream that is over
                };
                *window += more;
                if more == 0 || *window > i64::from(MAX_WINDOW_BYTES) {
                    return Err(breach("a window over 2^31 - 1, or opened by nothing"));
                }
                Ok(())
            }
            Kind::Ping if frame.has(ACK) => Ok(()),
            Kind::Ping => {
                if payload.len() != 8 {
                    return Err(breach("PING of the wrong length"));
                }
                put_frame(&mut self.mail, Kind::Ping, ACK, 0, payload);
                Ok(())
            }
            Kind::GoAway => {
                self.is_leaving = true;
                let last = payload.first_chunk().map(|id| u32::from_be_bytes(*id));
                let is_served = last.is_none_or(|last| last >= self.stream.id);
                if self.role == Role::Client && !self.stream.has_ended && !is_served {
                    let problem = "the peer leaves without having taken the call";
                    return Err(io::Error::new(io::ErrorKind::ConnectionReset, problem));
                }
                Ok(())
            }
            Kind::Reset if frame.stream == self.stream.id => Err(io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the peer reset the call",
            )),
            Kind::PushPromise => Err(breach("PUSH_PROMISE, which was switched off")),
            _ => Ok(()),
        }
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

/// Zero bytes read mean that the peer has closed.
fn alive(read: usize) -> io::Result<usize> {
    if read == 0 {
        Err(io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok(read)
    }
}

/// What the protocol does not allow.
pub fn breach(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}
