//! The socket of a link, and the two ways to wait for it.
//!
//! ```text
//! Task     the runtime watches it: other tasks run meanwhile            epoll, a wake-up of the runtime, a timer
//! Thread   the caller's own thread sleeps in the kernel, in one call    nothing else: as a bare request and reply
//! ```
//!
//! Both are the same bytes. What waits in the kernel has a deadline there too, so a node that is silent costs no more
//! than the call's time.
//!
//! Units: bytes, durations.
//! Errors: the socket's; [`io::ErrorKind::TimedOut`] for a thread whose time is up. A task's deadline is the caller's.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream as ThreadStream,
    },
    path::Path,
    time::Duration,
};

use kvproto::local::{Inbox, MAX_SEGMENTS_PER_MAP};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg,
    },
};
use tokio::{io::Interest, net::UnixStream as TaskStream};

use crate::{
    call::Waits,
    clock::{Clock, Tick},
};

/// Descriptors of the longest answer: two for each segment of a map.
const MAX_FDS: usize = 2 * MAX_SEGMENTS_PER_MAP;

/// Shortest wait in the kernel, which takes zero for "without end".
const LEAST_WAIT: Duration = Duration::from_millis(1);

/// A connected socket.
pub(super) enum Stream {
    Task(TaskStream),
    Thread(Thread),
}

/// One whose caller waits in the kernel.
pub(super) struct Thread {
    stream: ThreadStream,
    /// How long the kernel was told to wait for an answer.
    told: Option<Duration>,
}

impl Stream {
    pub(super) async fn connect(path: &Path, waits: Waits) -> io::Result<Self> {
        Ok(match waits {
            Waits::Task => Self::Task(TaskStream::connect(path).await?),
            Waits::Thread => Self::Thread(Thread::connect(path)?),
        })
    }

    pub(super) fn waits(&self) -> Waits {
        match self {
            Self::Task(_) => Waits::Task,
            Self::Thread(_) => Waits::Thread,
        }
    }

    /// Whose process listens.
    pub(super) fn peer_uid(&self) -> io::Result<u32> {
        Ok(rustix::net::sockopt::socket_peercred(self)?.uid.as_raw())
    }

    /// Whether it is open and nothing has come. What has come is gone by then.
    pub(super) fn is_quiet(&self) -> bool {
        let peeked = match self {
            Self::Task(stream) => stream.try_read(&mut [0]).map(drop),
            Self::Thread(thread) => thread.receive_now(&mut [0]).map(drop),
        };
        matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Sends all of it.
    pub(super) async fn send(
        &self,
        bytes: &[u8],
        clock: &dyn Clock,
        until: Tick,
    ) -> io::Result<()> {
        let mut sent = 0;
        while sent < bytes.len() {
            let room = match self {
                Self::Task(stream) => stream.try_write(&bytes[sent..]),
                Self::Thread(thread) => thread.send_now(&bytes[sent..]),
            };
            match room {
                Ok(bytes) => sent += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self {
                    Self::Task(stream) => stream.writable().await?,
                    Self::Thread(thread) => thread.wait_for_room(time_left(clock, until)?)?,
                },
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what is there, once something is; with the descriptors that come along where they are expected. Those that
    /// are not are closed unseen.
    pub(super) async fn receive(
        &mut self,
        inbox: &mut Inbox,
        fds: Option<&mut Vec<OwnedFd>>,
        clock: &dyn Clock,
        until: Tick,
    ) -> io::Result<()> {
        let mut fds = fds;
        let mut fill = |stream: BorrowedFd<'_>, flags: RecvFlags| match &mut fds {
            Some(fds) => fill_with_fds(stream, inbox, fds, flags),
            None => fill(stream, inbox, flags),
        };
        match self {
            Self::Task(stream) => {
                let now = || fill(stream.as_fd(), RecvFlags::DONTWAIT);
                stream.async_io(Interest::READABLE, now).await
            }
            Self::Thread(thread) => loop {
                thread.tell(time_left(clock, until)?)?;
                match fill(thread.stream.as_fd(), RecvFlags::empty()) {
                    // Told to wait less than there is time for, or stopped by a signal.
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                        ) => {}
                    done => return done,
                }
            },
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Task(stream) => stream.as_fd(),
            Self::Thread(thread) => thread.stream.as_fd(),
        }
    }
}

impl Thread {
    /// Waits for nobody: a node that is stopped takes no connections in, and the kernel keeps only so many for it.
    fn connect(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        let stream = ThreadStream::from(socket);
        stream.set_nonblocking(false)?;
        Ok(Self { stream, told: None })
    }

    fn receive_now(&self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::net::recv(&self.stream, into, RecvFlags::DONTWAIT)?.0)
    }

    fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        Ok(rustix::net::send(&self.stream, bytes, flags)?)
    }

    /// Returns when the node has read some, or is gone, or the time is up; or early.
    fn wait_for_room(&self, time: Duration) -> io::Result<()> {
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        let mut room = [PollFd::new(&self.stream, PollFlags::OUT)];
        match rustix::event::poll(&mut room, Some(&time)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Tells the kernel how long a wait may be: no longer than `left`, and not anew for every call.
    fn tell(&mut self, left: Duration) -> io::Result<()> {
        let wait = wait(left);
        if self.told != Some(wait) {
            self.stream.set_read_timeout(Some(wait))?;
            self.told = Some(wait);
        }
        Ok(())
    }
}

/// The wait to tell the kernel of when so much time is left: calls of about the same time have the same one, and what is
/// left after it is waited for again.
fn wait(left: Duration) -> Duration {
    let ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
    let ms = 1_u64.checked_shl(ms.max(1).ilog2()).unwrap_or(1);
    Duration::from_millis(ms).max(LEAST_WAIT)
}

fn time_left(clock: &dyn Clock, until: Tick) -> io::Result<Duration> {
    match until.since(clock.now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left.max(LEAST_WAIT)),
    }
}

fn fill(stream: BorrowedFd<'_>, inbox: &mut Inbox, flags: RecvFlags) -> io::Result<()> {
    let (bytes, _) = rustix::net::recv(stream, inbox.room(), flags)?;
    if bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    inbox.filled(bytes);
    Ok(())
}

fn fill_with_fds(
    stream: BorrowedFd<'_>,
    inbox: &mut Inbox,
    fds: &mut Vec<OwnedFd>,
    flags: RecvFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let room = IoSliceMut::new(inbox.room());
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let read = recvmsg(stream, &mut [room], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if read.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if read.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "more descriptors than were asked for, or than this process may open",
        ));
    }
    inbox.filled(read.bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    fn pair() -> (Stream, ThreadStream) {
        let (ours, theirs) = ThreadStream::pair().expect("two ends");
        let thread = Thread {
            stream: ours,
            told: None,
        };
        (Stream::Thread(thread), theirs)
    }

    #[test]
    fn a_wait_is_no_longer_than_what_is_left_and_half_of_it_at_least() {
        for ms in [1_u64, 2, 3, 5, 1000, 2_499, 86_400_000] {
            let left = Duration::from_millis(ms);
            let wait = wait(left);
            assert!(wait <= left && 2 * wait > left, "{left:?}: {wait:?}");
        }
        assert_eq!(wait(Duration::from_micros(7)), LEAST_WAIT);
        assert!(wait(Duration::MAX) > Duration::from_secs(1 << 20));
    }

    #[tokio::test]
    async fn a_thread_waits_for_a_silent_peer_until_its_time_is_up() {
        let (mut stream, theirs) = pair();
        let clock = SystemClock::new();
        let until = clock.now().after(Duration::from_millis(37));
        let (mut inbox, mut fds) = (Inbox::new(), Vec::new());
        for fds in [None, Some(&mut fds)] {
            let error = stream.receive(&mut inbox, fds, &clock, until).await;
            let error = error.expect_err("nothing came");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(clock.now() >= until);
        }
        // Neither does it send to one that does not read, once the kernel holds all it will.
        let until = clock.now().after(Duration::from_millis(37));
        let error = stream.send(&vec![0; 64 << 20], &clock, until).await;
        assert_eq!(
            error.expect_err("nobody reads").kind(),
            io::ErrorKind::TimedOut
        );
        drop(theirs);
        let until = clock.now().after(Duration::from_secs(30));
        let error = stream.send(&[0], &clock, until).await;
        assert_eq!(
            error.expect_err("nobody is there").kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[tokio::test]
    async fn descriptors_that_nobody_expects_are_closed_unseen() {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
        let (mut stream, theirs) = pair();
        let clock = SystemClock::new();
        let (kept, given) = ThreadStream::pair().expect("two ends");
        let rights = [given.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
        let bytes = [io::IoSlice::new(b"x")];
        rustix::net::sendmsg(&theirs, &bytes, &mut control, SendFlags::empty()).expect("sent");
        drop(given);
        let mut inbox = Inbox::new();
        let until = clock.now().after(Duration::from_secs(30));
        let read = stream.receive(&mut inbox, None, &clock, until).await;
        read.expect("a byte");
        let end = rustix::net::recv(&kept, &mut [0; 1][..], RecvFlags::DONTWAIT);
        assert_eq!(end.map(|(bytes, _)| bytes), Ok(0), "it is closed");
    }
}
