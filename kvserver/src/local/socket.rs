//! One connection's bytes: frames in, frames and descriptors out, and waiting without losing sight of the peer.
//!
//! ```text
//! waiting for a call     blocked in the kernel, until the next hold ends
//! waiting for a disk     parked; every GLANCE it looks whether the peer is still there, or the node cuts
//! writing an answer      blocked, at most as long as a hold lasts for the whole of it; then the peer counts as gone
//! ```

use std::{
    io::{self, IoSlice, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::Duration,
};

use kvproto::{
    local::{
        Frame, Inbox, LocalFrameError, MAX_SEGMENTS_PER_MAP,
        fixed::{self, GetCall, Written},
    },
    v1,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};

use prost::Message;

use super::reply::Reply;
use crate::clock::{Clock, Tick};

/// How often a thread that waits for a disk looks whether anybody still waits for it.
const GLANCE: Duration = Duration::from_millis(50);

/// Shortest wait: the kernel takes zero for "without end".
const LEAST_WAIT: Duration = Duration::from_millis(1);

/// The most descriptors that one answer carries: two per segment.
const MAX_FDS: usize = 2 * MAX_SEGMENTS_PER_MAP;

/// What came in.
pub(super) enum Received {
    Request(v1::LocalRequest),
    Get(GetCall),
    Written(Written),
    /// Nothing, until the time was up.
    Quiet,
    Malformed(LocalFrameError),
    Closed,
}

/// Why something was not waited for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// The deadline passed.
    Late,
    /// Nobody waits for it any more.
    Gone,
}

pub(super) struct Socket {
    stream: Arc<UnixStream>,
    inbox: Inbox,
    out: Vec<u8>,
    /// How long the peer may take to read an answer.
    write_time: Duration,
    /// Descriptors were sent since it was last known that the peer has read everything.
    sent_fds: bool,
    /// What the kernel was told last.
    read_timeout: Option<Duration>,
    waker: Waker,
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Socket {
    /// To be made by the thread that will use it.
    pub(super) fn new(stream: Arc<UnixStream>, write_time: Duration) -> Self {
        Self {
            stream,
            inbox: Inbox::new(),
            out: Vec::new(),
            write_time,
            sent_fds: false,
            read_timeout: None,
            waker: Waker::from(Arc::new(Unpark(thread::current()))),
        }
    }

    /// The next request. `Quiet` comes within `time`, perhaps early, and after bytes that complete no request: whoever
    /// sends them one by one would otherwise keep the caller from its clock.
    pub(super) fn receive(&mut self, time: Option<Duration>) -> io::Result<Received> {
        let mut has_read = false;
        loop {
            match self.take() {
                Ok(Some(received)) => return Ok(received),
                Ok(None) if has_read => return Ok(Received::Quiet),
                Ok(None) => {}
                Err(error) => return Ok(Received::Malformed(error)),
            }
            // A wait that ends too early is only tried again, so the kernel is told anew only of a nearer end.
            if let Some(time) = time.map(|time| time.max(LEAST_WAIT))
                && self.read_timeout.is_none_or(|told| time < told)
            {
                self.stream.set_read_timeout(Some(time))?;
                self.read_timeout = Some(time);
            }
            match (&*self.stream).read(self.inbox.room()) {
                Ok(0) => return Ok(Received::Closed),
                Ok(bytes) => {
                    self.inbox.filled(bytes);
                    has_read = true;
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                        // Whoever waits longer than was told is told anew.
                        if time.is_none_or(|time| self.read_timeout.is_some_and(|told| told < time))
                        {
                            self.stream.set_read_timeout(None)?;
                            self.read_timeout = None;
                        }
                        return Ok(Received::Quiet);
                    }
                    io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                        return Ok(Received::Closed);
                    }
                    _ => return Err(error),
                },
            }
        }
    }

    /// What has come in whole.
    fn take(&mut self) -> Result<Option<Received>, LocalFrameError> {
        Ok(match self.inbox.take_frame()? {
            None => None,
            Some(Frame::Message(frame)) => Some(Received::Request(Message::decode(frame)?)),
            Some(Frame::Fixed(frame)) => Some(match fixed::decode_request(&frame)? {
                fixed::Request::Get(call) => Received::Get(call),
                fixed::Request::Written(written) => Received::Written(written),
            }),
        })
    }

    /// Makes `reply` the frame that is sent next.
    pub(super) fn put(&mut self, reply: &Reply) -> Result<(), LocalFrameError> {
        self.out.clear();
        reply.encode(&mut self.out)
    }

    /// Sends the frame, and `fds` with its first byte. The kernel is never waited in, because it would give every part
    /// of the frame a time limit of its own.
    pub(super) fn send(&mut self, fds: &[OwnedFd], clock: &dyn Clock) -> io::Result<()> {
        // Most answers leave at once: then no clock is read.
        let mut end = None;
        let mut rest = &self.out[..];
        let mut sent = 0;
        while !rest.is_empty() {
            let now = if sent == 0 { fds } else { &[] };
            match send_some(&self.stream, rest, now) {
                Ok(bytes) => {
                    rest = &rest[bytes..];
                    sent += bytes;
                    self.sent_fds |= !now.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let now = clock.now();
                    let end = *end.get_or_insert_with(|| now.after(self.write_time));
                    let left = end.since(now);
                    if left.is_zero() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    wait_for_room(&self.stream, left.max(LEAST_WAIT))?;
                }
                Err(error) => return Err(error),
            }
        }
        if self.out.capacity() > KEPT_BYTES {
            self.out = Vec::new();
        }
        Ok(())
    }

    /// Waits for `work`, but not beyond `deadline`, nor for a peer that is gone, nor when the node cuts.
    pub(super) fn wait<F: Future>(
        &self,
        work: F,
        deadline: Tick,
        clock: &dyn Clock,
        cut: &AtomicBool,
    ) -> Result<F::Output, Stopped> {
        let mut work = pin!(work);
        let mut context = Context::from_waker(&self.waker);
        loop {
            if let Poll::Ready(output) = work.as_mut().poll(&mut context) {
                return Ok(output);
            }
            let left = deadline.since(clock.now());
            if left.is_zero() {
                return Err(Stopped::Late);
            }
            thread::park_timeout(left.min(GLANCE));
            if cut.load(Ordering::Relaxed) || self.is_gone() {
                return Err(Stopped::Gone);
            }
        }
    }

    /// Whether descriptors are on their way that the peer could have taken before it sent what it sent last. The kernel
    /// counts them against the node's user, whose other connections then cannot send any.
    pub(super) fn has_unread_fds(&mut self) -> bool {
        // A kernel that does not say leaves it at the limit that it has.
        self.sent_fds = self.sent_fds && kvgpu::unread_bytes(&*self.stream).is_ok_and(|n| n > 0);
        self.sent_fds
    }

    /// Whether the peer has closed, or the node cut. Asked of the connection's state and not of its bytes: an orderly
    /// stop shuts the read side, after which there is nothing to read though the peer waits; and a peer that died may
    /// have left a request behind.
    pub(super) fn is_gone(&self) -> bool {
        let mut ends = [PollFd::new(&*self.stream, PollFlags::empty())];
        match rustix::event::poll(&mut ends, Some(&Timespec::default())) {
            Ok(_) => ends[0]
                .revents()
                .intersects(PollFlags::HUP | PollFlags::ERR),
            Err(error) => error != rustix::io::Errno::INTR,
        }
    }
}

/// An answer's buffer that is kept for the next; larger ones are rare and given back.
const KEPT_BYTES: usize = 256 << 10;

/// Returns when the peer has read some, or is gone, or the time is up; or early.
fn wait_for_room(stream: &UnixStream, time: Duration) -> io::Result<()> {
    let time = Timespec::try_from(time).map_err(io::Error::other)?;
    let mut room = [PollFd::new(stream, PollFlags::OUT)];
    match rustix::event::poll(&mut room, Some(&time)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn send_some(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    if fds.is_empty() {
        return Ok(rustix::net::send(stream, bytes, flags)?);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    if !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("too many descriptors for one answer"));
    }
    let bytes = [IoSlice::new(bytes)];
    let sent = rustix::net::sendmsg(stream, &bytes, &mut ancillary, flags)?;
    Ok(sent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock::SystemClock, local::Refused};

    fn pair() -> (Socket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (
            Socket::new(Arc::new(ours), Duration::from_millis(50)),
            theirs,
        )
    }

    fn wait<F: Future>(socket: &Socket, work: F, time: Duration) -> Result<F::Output, Stopped> {
        let clock = SystemClock::new();
        let deadline = clock.now().after(time);
        socket.wait(work, deadline, &clock, &AtomicBool::new(false))
    }

    #[test]
    fn work_that_another_thread_ends_wakes_the_one_who_waits() {
        let (socket, _theirs) = pair();
        let (answer, answered) = tokio::sync::oneshot::channel();
        let other = thread::spawn(move || answer.send(7).unwrap());
        let waited = wait(&socket, answered, Duration::from_secs(30));
        assert_eq!(waited, Ok(Ok(7)));
        other.join().unwrap();
    }

    #[test]
    fn a_peer_that_closes_is_not_waited_for() {
        let (socket, theirs) = pair();
        drop(theirs);
        let never = std::future::pending::<()>();
        let waited = wait(&socket, never, Duration::from_secs(30));
        assert_eq!(waited, Err(Stopped::Gone));
    }

    #[test]
    fn a_peer_that_died_behind_an_unread_request_is_not_waited_for() {
        let (socket, theirs) = pair();
        rustix::net::send(&theirs, &[1, 2, 3], SendFlags::empty()).unwrap();
        drop(theirs);
        let never = std::future::pending::<()>();
        let waited = wait(&socket, never, Duration::from_secs(30));
        assert_eq!(waited, Err(Stopped::Gone));
    }

    #[test]
    fn a_peer_is_waited_for_after_its_next_calls_were_shut_out() {
        let (socket, _theirs) = pair();
        socket.stream.shutdown(std::net::Shutdown::Read).unwrap();
        let never = std::future::pending::<()>();
        let waited = wait(&socket, never, 3 * GLANCE);
        assert_eq!(waited, Err(Stopped::Late), "it waits for its answer");
        socket.stream.shutdown(std::net::Shutdown::Both).unwrap();
        let never = std::future::pending::<()>();
        let waited = wait(&socket, never, Duration::from_secs(30));
        assert_eq!(waited, Err(Stopped::Gone));
    }

    #[test]
    fn the_deadline_ends_a_wait_for_a_living_peer() {
        let (socket, _theirs) = pair();
        let never = std::future::pending::<()>();
        assert_eq!(wait(&socket, never, Duration::ZERO), Err(Stopped::Late));
    }

    #[test]
    fn an_answer_has_one_deadline_however_its_reader_takes_it() {
        use std::io::Read;
        let (mut socket, mut theirs) = pair();
        let message = "x".repeat(7 << 20);
        let refused = Refused::new(kvproto::Reason::Overloaded, message);
        socket.put(&Reply::refusal(1, refused)).unwrap();
        // Millions of reads, each of which makes progress: far longer than the answer may take.
        let reader = thread::spawn(move || while matches!(theirs.read(&mut [0]), Ok(1)) {});
        let error = socket.send(&[], &SystemClock::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(socket);
        reader.join().unwrap();
    }

    #[test]
    fn bytes_that_are_no_request_yet_leave_the_caller_its_clock() {
        let (mut socket, theirs) = pair();
        for _ in 0..3 {
            rustix::net::send(&theirs, &[1], SendFlags::empty()).unwrap();
            assert!(matches!(socket.receive(None).unwrap(), Received::Quiet));
        }
    }

    #[test]
    fn a_quiet_peer_is_told_apart_from_one_that_left() {
        let (mut socket, theirs) = pair();
        let quiet = socket.receive(Some(Duration::from_millis(5))).unwrap();
        assert!(matches!(quiet, Received::Quiet));
        drop(theirs);
        let closed = socket.receive(Some(Duration::from_secs(30))).unwrap();
        assert!(matches!(closed, Received::Closed));
    }
}
