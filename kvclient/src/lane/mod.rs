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
//! memcached do. The protocol itself is [`kvproto::http2`]; here are its socket and its waiting.
//!
//! States: idle → exchange → idle; an exchange that is dropped, fails or ends early leaves a lane that nobody
//! uses again.
//! Units: bytes.
//! Errors: [`io::Error`]; protocol breaches are `InvalidData`. Statuses are the caller's to judge, from the
//! headers.
//! What stays with h2: everything that multiplexes (watch, health), see `link`.

mod pool;
#[cfg(test)]
mod tests;

use std::io::{self, IoSlice, IoSliceMut};

use http::{HeaderMap, HeaderName, HeaderValue};
use kvproto::http2::{
    self, Fields, LaneLimits, Outgoing, Pump, Push, Role, Socket, breach, frame::put_field,
};
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
};

pub(crate) use self::pool::Lanes;
use crate::endpoint::{self, Endpoint};

const LIMITS: LaneLimits = LaneLimits {
    max_headers_bytes: 64 << 10,
    // A piece of 1 MiB and its head, in one frame.
    max_frame_bytes: (1 << 20) + (64 << 10),
    send_frame_bytes: SEND_FRAME_BYTES,
    read_bytes: 256 << 10,
};

/// Largest DATA payload we send: a block leaves while its next bytes are summed, and what was just summed is
/// still in the core's cache when the kernel copies it.
const SEND_FRAME_BYTES: usize = 256 << 10;

/// What a node's answer begins and ends with, to the byte, when all is well.
const OK_HEAD: &[u8] = b"\0\x07:status\x03200\0\x0ccontent-type\x10application/grpc";
const OK_TRAILERS: &[u8] = b"\0\x0bgrpc-status\x010";

/// Frames sent in a row before the caller's deadline, and its other calls, are looked at.
const TURN_FRAMES: u32 = 16;

/// What a call sends ahead of its body.
pub(crate) struct Request<'a> {
    pub(crate) path: &'a str,
    /// As in the `grpc-timeout` header.
    pub(crate) timeout: &'a [u8],
    pub(crate) authorization: Option<&'a HeaderValue>,
}

/// Makes a request's body as it can be sent.
pub(crate) trait Sender<'a> {
    /// Adds the next bytes, and closes `out` behind the last of them. Asked again and again while the
    /// socket may take more; what is not yet sent of `out` is bounded by one answer's worth.
    fn more(&mut self, out: &mut Outgoing<'a>);
}

/// A body that is there already.
pub(crate) struct Question<'a>(pub(crate) &'a [u8]);

impl<'a> Sender<'a> for Question<'a> {
    fn more(&mut self, out: &mut Outgoing<'a>) {
        out.push(self.0);
        out.close();
    }
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
    /// It ended as an answer does that is well; nothing of that is in the map.
    pub(crate) is_ok: bool,
    pub(crate) headers: HeaderMap,
    /// The node answered before it had read everything; the rest was not sent.
    pub(crate) is_early: bool,
}

/// One connection.
pub(crate) struct Lane {
    protocol: http2::Lane,
    io: Io,
    /// Calls before the present one.
    calls: u64,
    /// Something of the present call's answer has come.
    is_answered: bool,
}

impl Lane {
    /// Connects and says hello; the node's own settings are read as they come.
    pub(crate) async fn open(endpoint: &Endpoint) -> io::Result<Self> {
        let io = match endpoint {
            Endpoint::Tcp { host, port } => Io::Tcp(endpoint::connect_tcp(host, *port).await?),
            Endpoint::Unix(path) => Io::Unix(UnixStream::connect(path).await?),
        };
        Ok(Self {
            protocol: http2::Lane::new(Role::Client, LIMITS),
            io,
            calls: 0,
            is_answered: false,
        })
    }

    /// Whether a call that broke did so before its answer began, on a lane that had served others: its peer may
    /// have closed it for being idle in the moment in which it was used again.
    pub(crate) fn was_given_up(&self) -> bool {
        self.calls > 0 && !self.is_answered
    }

    /// Reads what came while the lane was idle; false when it is of no more use.
    pub(crate) fn is_usable(&mut self) -> bool {
        let pumped = self.protocol.pump(&self.io, &mut Nobody);
        if self.protocol.has_mail() && self.protocol.flush(&self.io).is_err() {
            return false;
        }
        matches!(pumped, Ok(Pump::Starved | Pump::Moved)) && self.protocol.is_idle()
    }

    /// One call: sends what `sender` makes, feeds the answer's body to `receiver`.
    ///
    /// The lane must not be used again when this fails, is dropped, or answers early.
    pub(crate) async fn exchange<'b, S: Sender<'b>, R: Receiver>(
        &mut self,
        request: &Request<'_>,
        sender: &mut S,
        receiver: &mut R,
    ) -> io::Result<Answer> {
        let Self {
            protocol,
            io,
            calls,
            is_answered,
        } = self;
        *is_answered = false;
        protocol.open(&request.block());
        let mut incoming = Incoming {
            receiver,
            is_answered,
            status: 0,
            is_ok: false,
            map: HeaderMap::new(),
        };
        let mut body = Outgoing::default();
        for turn in 1_u32.. {
            if turn.is_multiple_of(TURN_FRAMES) {
                tokio::task::yield_now().await;
            }
            if !body.is_closed() && body.ready_bytes() < SEND_FRAME_BYTES {
                sender.more(&mut body);
            }
            let pushed = protocol.push(io, &mut body)?;
            match protocol.pump(io, &mut incoming)? {
                Pump::Ended => break,
                Pump::Moved | Pump::Opened => continue,
                Pump::Busy => {
                    // A peer that never pauses must not keep the deadline from being looked at.
                    tokio::task::yield_now().await;
                    continue;
                }
                Pump::Starved => {}
            }
            match pushed {
                Push::Hungry if !body.is_closed() => {}
                Push::NoRoom => io.readable_or_writable().await?,
                Push::Done | Push::Hungry | Push::NoWindow => io.readable().await?,
            }
        }
        *calls += 1;
        if protocol.has_mail() {
            let _ = protocol.flush(io); // the next call finds out if this lane is of no more use
        }
        Ok(Answer {
            status: incoming.status,
            is_ok: incoming.is_ok,
            headers: incoming.map,
            is_early: !body.is_sent(),
        })
    }
}

impl Request<'_> {
    fn block(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(256);
        put_field(&mut block, b":method", b"POST");
        put_field(&mut block, b":scheme", b"http");
        put_field(&mut block, b":path", self.path.as_bytes());
        put_field(&mut block, b":authority", b"terrace");
        put_field(&mut block, b"content-type", b"application/grpc");
        put_field(&mut block, b"te", b"trailers");
        put_field(&mut block, b"grpc-timeout", self.timeout);
        if let Some(token) = self.authorization {
            put_field(&mut block, b"authorization", token.as_bytes());
        }
        block
    }
}

/// An answer as it comes in.
struct Incoming<'r, R> {
    receiver: &'r mut R,
    is_answered: &'r mut bool,
    status: u16,
    is_ok: bool,
    map: HeaderMap,
}

impl<R: Receiver> http2::Receiver for Incoming<'_, R> {
    fn knows(&mut self, block: &[u8]) -> io::Result<bool> {
        match block {
            OK_HEAD => {
                *self.is_answered = true;
                self.status = 200;
            }
            OK_TRAILERS => self.is_ok = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn headers(&mut self, fields: Fields) -> io::Result<()> {
        *self.is_answered = true;
        for (name, value) in fields {
            if name == b":status" {
                self.status = std::str::from_utf8(&value)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .ok_or_else(|| breach("a status that is no number"))?;
            } else if let (Ok(name), Ok(value)) =
                (HeaderName::from_bytes(&name), HeaderValue::try_from(value))
            {
                self.map
                    .try_insert(name, value)
                    .map_err(|_| breach("too many header fields"))?;
            }
        }
        Ok(())
    }

    fn room(&mut self) -> Option<&mut [u8]> {
        self.receiver.room()
    }

    fn landed(&mut self, bytes: usize) -> io::Result<()> {
        self.receiver.landed(bytes)
    }

    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.receiver.chunk(bytes)
    }
}

/// The receiver of a lane that nobody calls on.
struct Nobody;

impl http2::Receiver for Nobody {
    fn headers(&mut self, _: Fields) -> io::Result<()> {
        Err(breach("headers that nobody asked for"))
    }

    fn chunk(&mut self, _: &[u8]) -> io::Result<()> {
        Err(breach("data that nobody asked for"))
    }
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

impl Socket for Io {
    fn try_read_vectored(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let room: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut read = Err(io::ErrorKind::WouldBlock.into());
        let _ = either!(self, stream => stream.try_io(Interest::READABLE, || {
            read = rustix::io::readv(stream, slices).map_err(io::Error::from);
            match &read {
                // Less than there is room for: the socket is empty now. Saying so here, where no news can come in
                // between, spares the read that would find it out.
                Ok(bytes) if (1..room).contains(bytes) => Err(io::ErrorKind::WouldBlock.into()),
                Ok(_) => Ok(()),
                Err(error) => Err(error.kind().into()),
            }
        }));
        read
    }

    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, stream => stream.try_write_vectored(slices))
    }
}

impl Io {
    async fn readable(&self) -> io::Result<()> {
        either!(self, stream => stream.readable().await)
    }

    async fn readable_or_writable(&self) -> io::Result<()> {
        let either = Interest::READABLE | Interest::WRITABLE;
        either!(self, stream => stream.ready(either).await).map(drop)
    }
}
