//! A lane: one HTTP/2 connection that carries one call at a time, read and written by the caller's own task.
//!
//! ```text
//! caller ─► HEADERS, DATA …  ── writev from the caller's slices ──────────────► socket
//! caller ◄─ frames ◄─ inbox ◄─ readv ─┬─ heads, trailers ── 16 KiB inbox ◄──── socket
//!                                     └─ payload ────────── straight into the caller's buffer
//! ```
//!
//! On the wire this is ordinary gRPC. What is special is who does the work: no connection task, so a call costs
//! no wake-up but the one for its answer; and a reader that knows where a block belongs, so its bytes are
//! copied once, by the kernel. Many calls at once use many lanes (see [`Lanes`]), as clients of Redis and
//! memcached do.
//!
//! States: idle → exchange → idle; an exchange that is dropped, fails or ends early leaves a lane that nobody
//! uses again.
//! Units: bytes.
//! Errors: [`io::Error`]; protocol breaches are `InvalidData`. Statuses are the caller's to judge, from the
//! headers.
//! Why beside h2: h2 gathers a whole frame in a buffer of its own before it hands it over. For 1 MiB that is a
//! copy, an allocation, and no hashing until the last byte has come.
//! What stays with h2: everything that multiplexes (watch, health), see `link`.
//! Source: RFC 9113.

mod http2;
mod pool;
#[cfg(test)]
mod tests;

use std::io::{self, IoSlice, IoSliceMut};

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::net::{TcpStream, UnixStream};

use self::http2::{
    ACK, DEFAULT_FRAME_BYTES, DEFAULT_WINDOW_BYTES, END_HEADERS, END_STREAM, HEAD_BYTES, Head,
    Kind, MAX_WINDOW_BYTES, PADDED, PREFACE, PRIORITY, SETTING_ENABLE_PUSH,
    SETTING_INITIAL_WINDOW_SIZE, SETTING_MAX_FRAME_SIZE, put_field, put_frame, put_window_update,
};
pub(crate) use self::pool::Lanes;
use crate::endpoint::Endpoint;

/// Bytes read ahead of their use: heads and trailers, and at most so much payload that is copied twice.
const INBOX_BYTES: usize = 16 << 10;
/// Largest DATA payload we ask for. One frame for a usual block: its head is the only overhead.
const MAX_FRAME_BYTES: u32 = 1 << 20;
/// Largest DATA payload we send: a node's HTTP/2 gathers a frame before anyone sees it, and 256 KiB are still in
/// its core's cache when they are copied on. Measured against 32 KiB to 1 MiB: the quickest.
const SEND_FRAME_BYTES: usize = 256 << 10;
/// Received bytes after which the connection's window is filled up again: half of the largest window.
const REFILL_BYTES: u64 = 1 << 30;
/// Bytes of a call's header fields, as sent and as decoded.
const MAX_HEADERS_BYTES: usize = 64 << 10;
/// Bytes of header fields that the peer may have us remember: HTTP/2's own default.
const HEADER_TABLE_BYTES: usize = 4096;
/// Bytes of control frames that may wait to be sent.
const MAX_OUTBOX_BYTES: usize = 64 << 10;
/// Reads of one call before others have a turn.
const READS_IN_A_ROW: usize = 32;
/// Bytes handed to [`Receiver::chunk`] at a time while it looks for payload: a usual message head fits, and
/// little payload comes along with it.
const CHUNK_BYTES: usize = 512;

/// What a call sends ahead of its body.
pub(crate) struct Request<'a> {
    pub(crate) path: &'a str,
    /// As in the `grpc-timeout` header.
    pub(crate) timeout: &'a [u8],
    pub(crate) authorization: Option<&'a HeaderValue>,
}

/// Takes an answer's body as it comes in.
pub(crate) trait Receiver {
    /// Where the next bytes of the body belong, if that is known already; they are read right there.
    fn room(&mut self) -> Option<&mut [u8]>;
    /// So many bytes have been read into the room.
    fn landed(&mut self, bytes: usize) -> io::Result<()>;
    /// Bytes whose place was not known.
    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// The headers of an answer, and those behind its body, in one map: gRPC reads its status from either.
pub(crate) struct Answer {
    /// HTTP status of the first headers.
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    /// The node answered before it had read everything; the rest was not sent.
    pub(crate) is_early: bool,
}

/// One connection.
pub(crate) struct Lane {
    io: Io,
    inbox: Box<[u8]>,
    /// Unread bytes of the inbox.
    start: usize,
    end: usize,
    hpack: loona_hpack::Decoder<'static>,
    next_stream: u32,
    /// What the peer allows.
    peer_window_bytes: i64,
    peer_frame_bytes: usize,
    connection_window_bytes: i64,
    received_bytes: u64,
    /// Control frames to be sent with or before anything else.
    outbox: Vec<u8>,
    /// The frame being read; `length` counts what is left of it.
    frame: Option<Head>,
    is_leaving: bool,
}

impl Lane {
    /// Connects and says hello; the node's own settings are read as they come.
    pub(crate) async fn open(endpoint: &Endpoint) -> io::Result<Self> {
        let io = match endpoint {
            Endpoint::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                Io::Tcp(stream)
            }
            Endpoint::Unix(path) => Io::Unix(UnixStream::connect(path).await?),
        };
        let mut hpack = loona_hpack::Decoder::new();
        hpack.set_max_allowed_table_size(HEADER_TABLE_BYTES);
        let mut outbox = PREFACE.to_vec();
        let mut settings = Vec::new();
        for (name, value) in [
            (SETTING_ENABLE_PUSH, 0),
            (SETTING_INITIAL_WINDOW_SIZE, MAX_WINDOW_BYTES),
            (SETTING_MAX_FRAME_SIZE, MAX_FRAME_BYTES),
        ] {
            settings.extend_from_slice(&name.to_be_bytes());
            settings.extend_from_slice(&value.to_be_bytes());
        }
        put_frame(&mut outbox, Kind::Settings, 0, 0, &settings);
        put_window_update(
            &mut outbox,
            0,
            MAX_WINDOW_BYTES - DEFAULT_WINDOW_BYTES as u32,
        );
        Ok(Self {
            io,
            inbox: vec![0; INBOX_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            hpack,
            next_stream: 1,
            peer_window_bytes: DEFAULT_WINDOW_BYTES,
            peer_frame_bytes: DEFAULT_FRAME_BYTES,
            connection_window_bytes: DEFAULT_WINDOW_BYTES,
            received_bytes: 0,
            outbox,
            frame: None,
            is_leaving: false,
        })
    }

    /// Reads what came while the lane was idle; false when it is of no more use.
    pub(crate) fn is_usable(&mut self) -> bool {
        let mut idle = Exchange::new(0, 0);
        matches!(
            self.pump(&mut idle, &mut Nobody),
            Ok(Pump::Starved | Pump::Moved)
        ) && self.frame.is_none()
            && idle.open_block.is_none()
            && !self.is_leaving
            && self.next_stream < MAX_WINDOW_BYTES
    }

    /// One call: sends `body` (slices of one message stream), feeds the answer's body to `receiver`.
    ///
    /// The lane must not be used again when this fails, is dropped, or answers early.
    pub(crate) async fn exchange<R: Receiver>(
        &mut self,
        request: &Request<'_>,
        body: &[&[u8]],
        receiver: &mut R,
    ) -> io::Result<Answer> {
        let mut exchange = Exchange::new(self.next_stream, self.peer_window_bytes);
        self.next_stream += 2;
        self.put_request(exchange.stream, request);
        let mut body = Body::new(body);
        loop {
            let is_blocked = match self.push(&mut exchange, &mut body)? {
                Push::Done | Push::NoWindow => false,
                Push::NoRoom => true,
            };
            match self.pump(&mut exchange, receiver)? {
                Pump::Ended => break,
                Pump::Moved => continue,
                Pump::Busy => {
                    // A peer that never pauses must not keep the deadline from being looked at.
                    tokio::task::yield_now().await;
                    continue;
                }
                Pump::Starved => {}
            }
            if is_blocked {
                self.io.readable_or_writable().await?;
            } else {
                self.io.readable().await?;
            }
        }
        Ok(Answer {
            status: exchange.status,
            headers: exchange.map,
            is_early: !body.is_done(),
        })
    }

    fn put_request(&mut self, stream: u32, request: &Request<'_>) {
        let mut block = Vec::with_capacity(256);
        put_field(&mut block, b":method", b"POST");
        put_field(&mut block, b":scheme", b"http");
        put_field(&mut block, b":path", request.path.as_bytes());
        put_field(&mut block, b":authority", b"terrace");
        put_field(&mut block, b"content-type", b"application/grpc");
        put_field(&mut block, b"te", b"trailers");
        put_field(&mut block, b"grpc-timeout", request.timeout);
        if let Some(token) = request.authorization {
            put_field(&mut block, b"authorization", token.as_bytes());
        }
        put_frame(&mut self.outbox, Kind::Headers, END_HEADERS, stream, &block);
    }

    /// Writes as much as socket and windows take.
    fn push(&mut self, exchange: &mut Exchange, body: &mut Body<'_>) -> io::Result<Push> {
        loop {
            if body.frame_left == 0 && !body.has_ended {
                let window = exchange.window_bytes.min(self.connection_window_bytes);
                let room = usize::try_from(window).unwrap_or(0);
                let length = body.left_bytes.min(self.peer_frame_bytes).min(room);
                if length == 0 && body.left_bytes > 0 {
                    // Nothing may follow until the peer opens a window; what is queued still goes out.
                    if self.outbox.is_empty() {
                        return Ok(Push::NoWindow);
                    }
                } else {
                    let is_last = length == body.left_bytes;
                    let flags = if is_last { END_STREAM } else { 0 };
                    let head = Head {
                        length,
                        kind: Kind::Data,
                        flags,
                        stream: exchange.stream,
                    };
                    self.outbox.extend_from_slice(&head.bytes());
                    body.frame_left = length;
                    body.left_bytes -= length;
                    body.has_ended = is_last;
                    exchange.window_bytes -= length as i64;
                    self.connection_window_bytes -= length as i64;
                }
            }
            if self.outbox.is_empty() && body.frame_left == 0 {
                if body.has_ended {
                    return Ok(Push::Done);
                }
                continue;
            }
            let written = {
                let mut slices = [IoSlice::new(&[]); BODY_SLICES + 1];
                slices[0] = IoSlice::new(&self.outbox);
                let count = 1 + body.slices(&mut slices[1..]);
                match self.io.try_write_vectored(&slices[..count]) {
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
            body.advance(written - of_outbox);
        }
    }

    /// Reads what is there and acts on it.
    fn pump<R: Receiver>(&mut self, exchange: &mut Exchange, receiver: &mut R) -> io::Result<Pump> {
        let mut moved = Pump::Starved;
        for _ in 0..READS_IN_A_ROW {
            while self.step(exchange, receiver)? {
                moved = Pump::Moved;
                if exchange.has_ended {
                    return Ok(Pump::Ended);
                }
            }
            match self.fill(receiver) {
                Ok(()) => moved = Pump::Moved,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(moved),
                Err(error) => return Err(error),
            }
        }
        Ok(Pump::Busy)
    }

    /// One read: payload straight to its place, anything behind it into the inbox.
    fn fill<R: Receiver>(&mut self, receiver: &mut R) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.inbox.len() {
            self.inbox.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let is_payload = self.start == self.end
            && self
                .frame
                .is_some_and(|frame| frame.kind == Kind::Data && frame.length > 0);
        if let Some(frame) = self.frame.as_mut().filter(|_| is_payload)
            && let Some(room) = receiver.room()
        {
            let direct = room.len().min(frame.length);
            let mut slices = [
                IoSliceMut::new(&mut room[..direct]),
                IoSliceMut::new(&mut self.inbox),
            ];
            let read = alive(self.io.try_read_vectored(&mut slices)?)?;
            let landed = read.min(direct);
            self.end = read - landed;
            frame.length -= landed;
            self.received_bytes += landed as u64;
            return receiver.landed(landed);
        }
        self.end += alive(self.io.try_read(&mut self.inbox[self.end..])?)?;
        Ok(())
    }

    /// Acts on what the inbox holds; false when it needs more bytes.
    fn step<R: Receiver>(&mut self, exchange: &mut Exchange, receiver: &mut R) -> io::Result<bool> {
        let Some(frame) = self.frame else {
            let Some(head) = self.inbox[self.start..self.end].first_chunk() else {
                return Ok(false);
            };
            let head = Head::read(head);
            self.start += HEAD_BYTES;
            if head.kind == Kind::Data && head.stream == exchange.stream {
                if head.has(PADDED) {
                    return Err(breach("padded DATA, which a Terrace node never sends"));
                }
                exchange.received_bytes += head.length as u64;
            } else if head.length > INBOX_BYTES - HEAD_BYTES {
                return Err(breach(format!(
                    "{:?} frame of {} bytes",
                    head.kind, head.length
                )));
            }
            self.frame = Some(head);
            return Ok(true);
        };
        if frame.kind == Kind::Data && frame.stream == exchange.stream {
            return self.data(exchange, receiver, frame);
        }
        if self.end - self.start < frame.length {
            return Ok(false);
        }
        let payload = self.start..self.start + frame.length;
        self.start = payload.end;
        self.frame = None;
        let payload = self.inbox[payload].to_vec();
        self.control(exchange, frame, &payload)?;
        Ok(true)
    }

    fn data<R: Receiver>(
        &mut self,
        exchange: &mut Exchange,
        receiver: &mut R,
        frame: Head,
    ) -> io::Result<bool> {
        let at_hand = frame.length.min(self.end - self.start);
        if at_hand == 0 && frame.length > 0 {
            return Ok(false);
        }
        let bytes = &self.inbox[self.start..self.start + at_hand];
        let taken = match receiver.room() {
            Some(room) => {
                let landed = at_hand.min(room.len());
                room[..landed].copy_from_slice(&bytes[..landed]);
                receiver.landed(landed)?;
                landed
            }
            None => {
                let piece = &bytes[..at_hand.min(CHUNK_BYTES)];
                receiver.chunk(piece)?;
                piece.len()
            }
        };
        self.start += taken;
        self.received_bytes += taken as u64;
        let left = frame.length - taken;
        self.frame = Some(Head {
            length: left,
            ..frame
        });
        if left == 0 {
            self.frame = None;
            exchange.has_ended = frame.has(END_STREAM);
            if exchange.received_bytes >= REFILL_BYTES && !exchange.has_ended {
                let more = exchange.received_bytes as u32;
                put_window_update(&mut self.outbox, exchange.stream, more);
                exchange.received_bytes = 0;
            }
            self.refill();
        }
        Ok(true)
    }

    fn control(&mut self, exchange: &mut Exchange, frame: Head, payload: &[u8]) -> io::Result<()> {
        if self.outbox.len() > MAX_OUTBOX_BYTES {
            return Err(breach("control frames without end"));
        }
        match frame.kind {
            Kind::Headers | Kind::Continuation => self.headers(exchange, frame, payload),
            Kind::Settings if frame.has(ACK) => Ok(()),
            Kind::Settings => {
                for setting in payload.chunks_exact(6) {
                    let name = u16::from_be_bytes([setting[0], setting[1]]);
                    let value =
                        u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
                    if name == SETTING_INITIAL_WINDOW_SIZE {
                        let value = i64::from(value);
                        exchange.window_bytes += value - self.peer_window_bytes;
                        self.peer_window_bytes = value;
                    } else if name == SETTING_MAX_FRAME_SIZE {
                        self.peer_frame_bytes =
                            (value as usize).clamp(DEFAULT_FRAME_BYTES, SEND_FRAME_BYTES);
                    }
                }
                put_frame(&mut self.outbox, Kind::Settings, ACK, 0, &[]);
                Ok(())
            }
            Kind::WindowUpdate => {
                let more: [u8; 4] = payload
                    .try_into()
                    .map_err(|_| breach("WINDOW_UPDATE of the wrong length"))?;
                let more = i64::from(u32::from_be_bytes(more) & MAX_WINDOW_BYTES);
                if frame.stream == 0 {
                    self.connection_window_bytes += more;
                } else if frame.stream == exchange.stream {
                    exchange.window_bytes += more;
                }
                Ok(())
            }
            Kind::Ping if !frame.has(ACK) => {
                put_frame(&mut self.outbox, Kind::Ping, ACK, 0, payload);
                Ok(())
            }
            Kind::GoAway => {
                self.is_leaving = true;
                Ok(())
            }
            Kind::Reset if frame.stream == exchange.stream => Err(io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the node reset the call",
            )),
            Kind::PushPromise => Err(breach("PUSH_PROMISE, which was switched off")),
            Kind::Data => Err(breach("DATA of another stream")),
            Kind::Ping | Kind::Reset | Kind::Other(_) => Ok(()),
        }
    }

    fn headers(&mut self, exchange: &mut Exchange, frame: Head, payload: &[u8]) -> io::Result<()> {
        let follows = frame.kind == Kind::Continuation;
        if exchange.open_block != follows.then_some(frame.stream) {
            return Err(breach("header block out of order"));
        }
        exchange.open_block = (!frame.has(END_HEADERS)).then_some(frame.stream);
        let mut block = payload;
        if !follows {
            if frame.has(PADDED | PRIORITY) {
                let padding = if frame.has(PADDED) {
                    let (&padding, rest) = block
                        .split_first()
                        .ok_or_else(|| breach("empty padded HEADERS"))?;
                    block = rest;
                    usize::from(padding)
                } else {
                    0
                };
                let ahead = if frame.has(PRIORITY) { 5 } else { 0 };
                block = block
                    .get(ahead..block.len().saturating_sub(padding))
                    .ok_or_else(|| breach("HEADERS shorter than their padding"))?;
            }
            exchange.headers.clear();
            exchange.ends_with_headers = frame.has(END_STREAM);
        }
        if exchange.headers.len() + block.len() > MAX_HEADERS_BYTES {
            return Err(breach("header block over 64 KiB"));
        }
        exchange.headers.extend_from_slice(block);
        if !frame.has(END_HEADERS) {
            return Ok(());
        }
        let (mut fields, mut bytes) = (Vec::new(), exchange.header_bytes);
        self.hpack
            .decode_with_cb(&exchange.headers, |name, value| {
                bytes += name.len() + value.len() + 32;
                if bytes <= MAX_HEADERS_BYTES {
                    fields.push((name.into_owned(), value.into_owned()));
                }
            })
            .map_err(|error| breach(format!("header block: {error:?}")))?;
        exchange.header_bytes = bytes;
        if bytes > MAX_HEADERS_BYTES {
            return Err(breach("header fields over 64 KiB"));
        }
        if frame.stream != exchange.stream {
            return Ok(());
        }
        for (name, value) in fields {
            if name == b":status" {
                exchange.status = std::str::from_utf8(&value)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .ok_or_else(|| breach("a status that is no number"))?;
            } else if let (Ok(name), Ok(value)) = (
                HeaderName::from_bytes(&name),
                HeaderValue::from_bytes(&value),
            ) {
                exchange
                    .map
                    .try_insert(name, value)
                    .map_err(|_| breach("too many header fields"))?;
            }
        }
        exchange.has_ended = exchange.ends_with_headers;
        Ok(())
    }

    /// Gives the connection's window back in large steps.
    fn refill(&mut self) {
        if self.received_bytes >= REFILL_BYTES {
            put_window_update(&mut self.outbox, 0, self.received_bytes as u32);
            self.received_bytes = 0;
        }
    }
}

/// How far one call has come.
struct Exchange {
    stream: u32,
    window_bytes: i64,
    /// A header block, until it is whole.
    headers: Vec<u8>,
    ends_with_headers: bool,
    status: u16,
    map: HeaderMap,
    /// Decoded bytes of all header fields.
    header_bytes: usize,
    /// The stream whose header block goes on in CONTINUATION.
    open_block: Option<u32>,
    /// Bytes received since this stream's window was last filled up.
    received_bytes: u64,
    has_ended: bool,
}

enum Push {
    Done,
    NoWindow,
    NoRoom,
}

#[derive(PartialEq, Eq)]
enum Pump {
    Ended,
    Moved,
    /// There may be more, but others shall have a turn.
    Busy,
    Starved,
}

impl Exchange {
    fn new(stream: u32, window_bytes: i64) -> Self {
        Self {
            stream,
            window_bytes,
            headers: Vec::new(),
            ends_with_headers: false,
            status: 0,
            map: HeaderMap::new(),
            header_bytes: 0,
            open_block: None,
            received_bytes: 0,
            has_ended: false,
        }
    }
}

/// Slices of a body that go into one write at most.
const BODY_SLICES: usize = 8;

/// A request's body and how much of it is cut into frames and sent.
struct Body<'a> {
    slices: &'a [&'a [u8]],
    /// Sent bytes of the first slice.
    at: usize,
    /// Bytes not yet in a frame.
    left_bytes: usize,
    /// Bytes of the current frame not yet sent.
    frame_left: usize,
    /// The frame that ends the stream has been begun.
    has_ended: bool,
}

impl<'a> Body<'a> {
    fn new(slices: &'a [&'a [u8]]) -> Self {
        Self {
            slices,
            at: 0,
            left_bytes: slices.iter().map(|slice| slice.len()).sum(),
            frame_left: 0,
            has_ended: false,
        }
    }

    fn is_done(&self) -> bool {
        self.has_ended && self.frame_left == 0
    }

    /// What of the current frame goes into the next write.
    fn slices(&self, out: &mut [IoSlice<'a>]) -> usize {
        let (mut left, mut at, mut count) = (self.frame_left, self.at, 0);
        for slice in self.slices.iter().take(out.len()) {
            if left == 0 {
                break;
            }
            let bytes = &slice[at..];
            let bytes = &bytes[..bytes.len().min(left)];
            out[count] = IoSlice::new(bytes);
            left -= bytes.len();
            at = 0;
            count += 1;
        }
        count
    }

    fn advance(&mut self, mut bytes: usize) {
        self.frame_left -= bytes;
        while let Some(first) = self.slices.first() {
            let of_first = bytes.min(first.len() - self.at);
            self.at += of_first;
            bytes -= of_first;
            if self.at < first.len() {
                break;
            }
            self.slices = &self.slices[1..];
            self.at = 0;
        }
    }
}

/// The receiver of a lane that nobody calls on.
struct Nobody;

impl Receiver for Nobody {
    fn room(&mut self) -> Option<&mut [u8]> {
        None
    }

    fn landed(&mut self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn chunk(&mut self, _: &[u8]) -> io::Result<()> {
        Err(breach("data that nobody asked for"))
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

fn breach(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// The two kinds of sockets.
enum Io {
    Tcp(TcpStream),
    Unix(UnixStream),
}

macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self {
            Io::Tcp($stream) => $call,
            Io::Unix($stream) => $call,
        }
    };
}

impl Io {
    fn try_read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        either!(self, stream => stream.try_read(bytes))
    }

    fn try_read_vectored(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        either!(self, stream => stream.try_read_vectored(slices))
    }

    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, stream => stream.try_write_vectored(slices))
    }

    async fn readable(&self) -> io::Result<()> {
        either!(self, stream => stream.readable().await)
    }

    async fn readable_or_writable(&self) -> io::Result<()> {
        let either = tokio::io::Interest::READABLE | tokio::io::Interest::WRITABLE;
        either!(self, stream => stream.ready(either).await).map(drop)
    }
}
