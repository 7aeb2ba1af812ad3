//! A lane: a connection whose client has promised one call at a time, served by one task without hyper.
//!
//! ```text
//! idle ─HEADERS─► admit ─► body ─┬─ Put: payload read right into its slot ──┐
//!   ▲                            └─ any other: one small message            ├─► answer ─► send ─► idle
//!   │     while an answer is awaited the socket is watched: a peer that     │   writev from the arena
//!   └──── goes away ends its call                                           ┘
//! ```
//!
//! Calls, deadlines, tenants and answers are those of [`super::connection`]; only the way of the bytes differs.
//! A lane costs no task and no wake-up per call, and a block that is put is copied once, by the kernel.
//!
//! Units: bytes.
//! Errors: the socket's, and breaches of the protocol, after a GOAWAY. Either ends the connection, and what its
//! call held is given back.
//! Bounds: a call's time plus [`GRACE`]; those of [`kvproto::http2`]. An idle lane is kept; the kernel's
//! keep-alive finds out when its host is gone.

mod head;
mod socket;

use std::{io, pin::Pin, sync::Arc, task::Poll};

use bytes::{Bytes, BytesMut};
use http::{Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use kvproto::{
    frame::PREFIX_BYTES,
    http2::{
        Lane, LaneLimits, Outgoing, Pump, Push, Receiver, Role, breach, frame::put_field,
        put_fields,
    },
};
use tokio::io::Interest;
use tonic::Status;

pub(crate) use self::socket::LaneSocket;
use self::{head::Head, socket::Io};
use super::{
    Shared,
    body::{RpcBody, failed_trailers, unframe},
    connection::MAX_HEADER_BYTES,
    deadline::GRACE,
    dispatch::{Call, Caller, admit, generated, new_connection, refused},
    get,
    owners::Connection,
    put, status, unary,
};
use crate::telemetry::metrics::Method;

const LIMITS: LaneLimits = LaneLimits {
    max_headers_bytes: MAX_HEADER_BYTES as usize,
    // A piece of 1 MiB and its head, in one frame.
    max_frame_bytes: (1 << 20) + (64 << 10),
    send_frame_bytes: (1 << 20) + (64 << 10),
    read_bytes: 256 << 10,
};

/// Bytes of an answer taken from its body before they are written: one piece.
const AHEAD_BYTES: usize = 1 << 20;

/// Pieces of an answer that are sent in a row before other connections of the thread have a turn.
const TURN_PIECES: u32 = 4;

/// HTTP/2's codes for a friendly end and for a breach.
const NO_ERROR: u32 = 0;
const PROTOCOL_ERROR: u32 = 1;

/// Serves a lane until it ends, or drains, or is cut. `first` is what was read of it behind the preface.
pub(crate) async fn serve<S: LaneSocket>(
    socket: S,
    first: &[u8],
    shared: &Arc<Shared>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let connection = new_connection(shared);
    let mut serving = Serving {
        lane: Lane::new(Role::Server, LIMITS),
        io: Io(socket),
        head: Head::default(),
        shared,
        connection: &connection,
    };
    let over = tokio::select! {
        over = serving.run(first) => over,
        () = shared.abort.cancelled() => Ok(()),
    };
    connection.close(&shared.owners);
    over.map_err(Into::into)
}

struct Serving<'a, S> {
    lane: Lane,
    io: Io<S>,
    head: Head,
    shared: &'a Arc<Shared>,
    connection: &'a Arc<Connection>,
}

impl<S: LaneSocket> Serving<'_, S> {
    async fn run(&mut self, first: &[u8]) -> io::Result<()> {
        let over = async {
            self.lane.feed(first)?;
            while self.next_call().await? {
                self.head.judge()?;
                self.call().await?;
            }
            Ok(())
        };
        let over: io::Result<()> = over.await;
        let code = match &over {
            Ok(()) => NO_ERROR,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => PROTOCOL_ERROR,
            Err(_) => return over,
        };
        if !self.lane.is_mid_frame() {
            self.lane.put_goaway(code);
            self.lane.flush(&self.io)?;
        }
        over
    }

    /// Waits for a call, whose head it leaves in `head`; false when the node drains.
    async fn next_call(&mut self) -> io::Result<bool> {
        loop {
            let is_flushed = self.lane.flush(&self.io)?;
            match self.lane.pump(&self.io, &mut self.head)? {
                Pump::Opened => return Ok(true),
                Pump::Moved | Pump::Ended => continue,
                Pump::Busy if self.shared.draining.is_cancelled() => return Ok(false),
                Pump::Busy => {
                    tokio::task::yield_now().await;
                    continue;
                }
                Pump::Starved => {}
            }
            tokio::select! {
                ready = self.io.0.wait(interest(is_flushed)) => ready?,
                () = self.shared.draining.cancelled() => return Ok(false),
            }
        }
    }

    /// One call, from its head to the last byte of its answer; cut when its time is over.
    async fn call(&mut self) -> io::Result<()> {
        let clock = &self.shared.clock;
        let Head { path, headers, .. } = &self.head;
        match admit(self.shared, self.connection, path, headers) {
            Ok((caller, call)) => {
                // Timers are made on the first wait: a small call is over before that.
                let time = call.time().saturating_add(GRACE);
                let late = async { clock.sleep(time).await };
                tokio::select! {
                    biased;
                    over = self.answer(caller, call) => over,
                    () = late => Err(io::ErrorKind::TimedOut.into()),
                }
            }
            Err(status) => {
                let late = async { clock.sleep(GRACE).await };
                tokio::select! {
                    biased;
                    over = self.send(refused(&status)) => over,
                    () = late => Err(io::ErrorKind::TimedOut.into()),
                }
            }
        }
    }

    async fn answer(&mut self, caller: Caller, call: Call) -> io::Result<()> {
        let response = if call.method() == Method::Put {
            self.put(caller, call).await?
        } else {
            match self.message(&call).await? {
                Err(status) => {
                    call.over(status.code());
                    refused(&status)
                }
                Ok(message) if call.method() == Method::Get || unary::is_here(call.method()) => {
                    match unframe(message) {
                        Ok(message) if call.method() == Method::Get => {
                            get::answer(caller, call, message)
                        }
                        Ok(message) => {
                            let answer = unary::answer(caller, call, message);
                            watched(&mut self.lane, &self.io, answer).await?
                        }
                        Err(status) => {
                            call.over(status.code());
                            refused(&status)
                        }
                    }
                }
                Ok(message) => {
                    let mut request = Request::new(Full::new(message));
                    *request.method_mut() = http::Method::POST;
                    let uri = self.head.path.parse();
                    *request.uri_mut() = uri.map_err(|_| breach("a path that is no URI"))?;
                    *request.headers_mut() = self.head.headers.clone();
                    let answer = generated(caller, call, request);
                    watched(&mut self.lane, &self.io, answer).await?
                }
            }
        };
        self.send(response).await
    }

    /// The request's body, of at most one message, its prefix included; or why it is refused.
    async fn message(&mut self, call: &Call) -> io::Result<Result<Bytes, Status>> {
        let limit = self.shared.limits.max_message_bytes + PREFIX_BYTES;
        let mut gathered = Gathered {
            bytes: BytesMut::new(),
            limit,
            is_too_long: false,
        };
        match self.body(&mut gathered, call).await {
            Ok(true) => Ok(Ok(gathered.bytes.freeze())),
            Ok(false) => Ok(Err(status::too_late())),
            Err(_) if gathered.is_too_long => {
                let limit = self.shared.limits.max_message_bytes;
                Ok(Err(status::message_too_long(limit)))
            }
            Err(error) => Err(error),
        }
    }

    async fn put(&mut self, caller: Caller, call: Call) -> io::Result<Response<RpcBody>> {
        let mut receiving = put::Receiving::new(&caller);
        let answer = match self.body(&mut receiving, &call).await {
            Ok(true) => {
                let clock = &self.shared.clock;
                let late = async { clock.sleep(call.time_left()).await };
                let answer = async {
                    tokio::select! {
                        biased;
                        answer = receiving.finish() => answer,
                        () = late => Err(status::too_late()),
                    }
                };
                watched(&mut self.lane, &self.io, answer).await?
            }
            Ok(false) => Err(status::too_late()),
            Err(error) => Err(receiving.refused().ok_or(error)?),
        };
        Ok(put::response(answer, call))
    }

    /// Reads the request's body to its end; `false` when the call's time is over before that.
    async fn body<R: Receiver>(&mut self, receiver: &mut R, call: &Call) -> io::Result<bool> {
        let clock = &self.shared.clock;
        let late = async { clock.sleep(call.time_left()).await };
        let (lane, io) = (&mut self.lane, &self.io);
        let reading = async {
            while !lane.peer_has_ended() {
                match lane.pump(io, receiver)? {
                    Pump::Busy => tokio::task::yield_now().await,
                    Pump::Starved => {
                        let is_flushed = lane.flush(io)?;
                        io.0.wait(interest(is_flushed)).await?;
                    }
                    Pump::Opened | Pump::Ended | Pump::Moved => {}
                }
            }
            Ok(())
        };
        tokio::select! {
            biased;
            read = reading => read.map(|()| true),
            () = late => Ok(false),
        }
    }

    /// Sends an answer. A request that was answered before its end is read to its end, for nobody.
    async fn send(&mut self, response: Response<RpcBody>) -> io::Result<()> {
        let (lane, io) = (&mut self.lane, &self.io);
        let (head, mut body) = response.into_parts();
        let mut block = Vec::with_capacity(64);
        put_field(&mut block, b":status", head.status.as_str().as_bytes());
        put_fields(&mut block, &head.headers);
        let is_end = body.is_end_stream();
        lane.put_headers(&block, is_end);
        if is_end {
            while !lane.flush(io)? {
                io.0.wait(Interest::WRITABLE).await?;
            }
        } else {
            send_body(lane, io, &mut body).await?;
        }
        while !lane.peer_has_ended() {
            match discard(lane, io)? {
                Pump::Starved => {
                    let is_flushed = lane.flush(io)?;
                    io.0.wait(interest(is_flushed)).await?;
                }
                // Not `consume_budget`: with the budget spent, the deadline beside this could not be looked at.
                Pump::Busy => tokio::task::yield_now().await,
                Pump::Opened | Pump::Ended | Pump::Moved => {}
            }
        }
        Ok(())
    }
}

/// Sends a body as it is drawn, and watches the peer meanwhile.
async fn send_body<S: LaneSocket>(
    lane: &mut Lane,
    io: &Io<S>,
    body: &mut RpcBody,
) -> io::Result<()> {
    let mut out = Outgoing::default();
    for turn in 1.. {
        if turn % TURN_PIECES == 0 {
            tokio::task::yield_now().await;
        }
        let mut is_waiting = false;
        while !out.is_closed() && out.ready_bytes() < AHEAD_BYTES {
            // Its waker is this task's: whatever comes first, body or socket, goes on from here.
            let next = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *body).poll_frame(cx)));
            match next.await {
                Poll::Ready(frame) => take_frame(lane, &mut out, frame),
                Poll::Pending => {
                    is_waiting = true;
                    break;
                }
            }
        }
        let pushed = lane.push(io, &mut out)?;
        if pushed == Push::Done {
            return Ok(());
        }
        match discard(lane, io)? {
            Pump::Starved => {}
            Pump::Busy => {
                tokio::task::yield_now().await;
                continue;
            }
            // What came in may have opened a window.
            Pump::Opened | Pump::Ended | Pump::Moved => continue,
        }
        match pushed {
            Push::Done => return Ok(()),
            Push::Hungry if !is_waiting => {}
            Push::Hungry => tokio::select! {
                frame = body.frame() => take_frame(lane, &mut out, frame),
                ready = io.0.wait(Interest::READABLE) => ready?,
            },
            Push::NoWindow => io.0.wait(Interest::READABLE).await?,
            Push::NoRoom => io.0.wait(Interest::READABLE | Interest::WRITABLE).await?,
        }
    }
    Ok(())
}

/// What to wait for besides bytes.
fn interest(is_flushed: bool) -> Interest {
    if is_flushed {
        Interest::READABLE
    } else {
        Interest::READABLE | Interest::WRITABLE
    }
}

/// The next of an answer's body.
fn take_frame(
    lane: &Lane,
    out: &mut Outgoing<'_>,
    frame: Option<Result<http_body::Frame<Bytes>, Status>>,
) {
    let trailers = match frame {
        None => return out.close(),
        Some(Err(status)) => failed_trailers(&status),
        Some(Ok(frame)) => match frame.into_data() {
            Ok(data) => return out.push(data),
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) => trailers,
                Err(_) => return,
            },
        },
    };
    let mut block = Vec::with_capacity(64);
    put_fields(&mut block, &trailers);
    out.close_with(lane.trailers(&block));
}

/// Waits for `work` and watches the peer meanwhile: it may ask for a sign of life, or be gone.
async fn watched<S: LaneSocket, F: Future>(
    lane: &mut Lane,
    io: &Io<S>,
    work: F,
) -> io::Result<F::Output> {
    tokio::pin!(work);
    loop {
        let is_flushed = lane.flush(io)?;
        tokio::select! {
            biased;
            output = work.as_mut() => return Ok(output),
            ready = io.0.wait(interest(is_flushed)) => ready?,
        }
        if discard(lane, io)? == Pump::Busy {
            tokio::task::yield_now().await;
        }
    }
}

/// Reads for nobody.
fn discard<S: LaneSocket>(lane: &mut Lane, io: &Io<S>) -> io::Result<Pump> {
    lane.pump(io, &mut Nobody)
}

struct Nobody;

impl Receiver for Nobody {
    fn chunk(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// A small body.
struct Gathered {
    bytes: BytesMut,
    limit: usize,
    is_too_long: bool,
}

impl Receiver for Gathered {
    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.bytes.len() + bytes.len() > self.limit {
            self.is_too_long = true;
            return Err(breach("a request that is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

impl Receiver for put::Receiving<'_> {
    fn room(&mut self) -> Option<&mut [u8]> {
        self.room()
    }

    fn landed(&mut self, bytes: usize) -> io::Result<()> {
        self.landed(bytes).map_err(|()| breach("refused"))
    }

    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.chunk(Bytes::copy_from_slice(bytes))
            .map_err(|()| breach("refused"))
    }
}
