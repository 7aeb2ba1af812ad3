//! One connection of the same-host path: frames over a Unix socket, descriptors beside them.
//!
//! ```text
//! call ─► [length][LocalRequest] ──────────────────────────────► node
//!      ◄─ [length][LocalReply], SCM_RIGHTS with its first byte ◄─
//! ```
//!
//! One call at a time, on the caller's own task. A link whose call failed, or was dropped half way, is not used
//! again: closing it lets go of everything that the node held for it.
//!
//! Units: bytes.
//! Errors: [`LocalError`]. Deadlines are the caller's.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::Duration,
};

use kvproto::{
    Reason,
    local::{self, Inbox, LocalFrameError, MAX_SEGMENTS_PER_MAP},
    v1::{self, local_reply::Answer, local_request::Call},
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use tokio::{io::Interest, net::UnixStream};

use super::error::LocalError;
use crate::{
    clock::{Clock, Tick},
    lease::millis,
};

/// Descriptors of the longest answer: two for each segment of a map.
const MAX_FDS: usize = 2 * MAX_SEGMENTS_PER_MAP;

/// A connection on which one call at a time is made.
pub(super) struct Link {
    stream: UnixStream,
    inbox: Inbox,
    /// Came with the bytes in the inbox.
    fds: Vec<OwnedFd>,
    out: Vec<u8>,
    sequence: u64,
    clock: Arc<dyn Clock>,
    /// When the call was made that has no answer yet.
    asked: Option<Tick>,
    /// The node has turned this connection away, and closes it.
    is_over: bool,
    /// Holds to be let go with the next call.
    pub(super) done: Vec<u64>,
    /// Counts the open links of an attachment.
    _open: Arc<()>,
}

impl Link {
    /// Connects; nobody is attached yet.
    pub(super) async fn open(
        socket: &Path,
        open: Arc<()>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, LocalError> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|source| LocalError::Io {
                step: "connect",
                source,
            })?;
        let peer = stream.peer_cred().map_err(|source| LocalError::Io {
            step: "peer",
            source,
        })?;
        // Whoever could bind the path could take a token and hand out blocks. Told or set, a path proves nothing.
        if !is_trusted(peer.uid(), rustix::process::geteuid().as_raw()) {
            return Err(LocalError::Stranger { uid: peer.uid() });
        }
        Ok(Self {
            stream,
            inbox: Inbox::new(),
            fds: Vec::new(),
            out: Vec::new(),
            sequence: 0,
            clock,
            asked: None,
            is_over: false,
            done: Vec::new(),
            _open: open,
        })
    }

    /// Whether an idle link is still open, and silent, as it must be.
    pub(super) fn is_usable(&self) -> bool {
        if self.is_over || self.asked.is_some() {
            return false;
        }
        let peeked = self.stream.try_read(&mut [0]);
        matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// How long the call that has no answer yet has waited for it; nothing when there is none.
    pub(super) fn silence(&self) -> Duration {
        let now = self.clock.now();
        self.asked.map_or(Duration::ZERO, |asked| now.since(asked))
    }

    /// One call, and the descriptors that came with its answer.
    pub(super) async fn call(
        &mut self,
        call: Call,
        timeout: Duration,
    ) -> Result<(Answer, Vec<OwnedFd>), LocalError> {
        self.sequence += 1;
        let request = v1::LocalRequest {
            sequence: self.sequence,
            timeout_ms: millis(told(timeout)).max(1),
            done: std::mem::take(&mut self.done),
            call: Some(call),
        };
        self.out.clear();
        if let Err(error) = local::encode(&request, &mut self.out) {
            // Nothing was sent: these are still to be let go.
            self.done = request.done;
            return Err(match error {
                LocalFrameError::TooLong { .. } => LocalError::TooLong,
                other => LocalError::Frame(other),
            });
        }
        self.asked = Some(self.clock.now());
        let reply = self.exchange().await?;
        self.asked = None;
        let is_refused = matches!(reply.answer, Some(Answer::Refused(_)));
        // A node that turns a connection away has read no call of it.
        self.is_over = reply.sequence == 0 && is_refused;
        if reply.sequence != self.sequence && !self.is_over {
            return Err(LocalError::answer(format!(
                "answer {} to call {}",
                reply.sequence, self.sequence
            )));
        }
        let fds = std::mem::take(&mut self.fds);
        match reply.answer {
            Some(Answer::Refused(refusal)) => Err(LocalError::Refused {
                reason: Reason::from_wire(refusal.reason),
                message: refusal.message,
            }),
            Some(answer) => Ok((answer, fds)),
            None => Err(LocalError::answer("it is empty")),
        }
    }

    async fn exchange(&mut self) -> Result<v1::LocalReply, LocalError> {
        let Err(source) = self.send().await else {
            return self.receive().await;
        };
        let is_closed = matches!(
            source.kind(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
        );
        // Whoever closes a connection may have said why, before it was asked anything.
        if is_closed && let Ok(reply) = self.receive().await {
            return Ok(reply);
        }
        Err(LocalError::Io {
            step: "send",
            source,
        })
    }

    async fn send(&mut self) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.out.len() {
            match self.stream.try_write(&self.out[sent..]) {
                Ok(bytes) => sent += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stream.writable().await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn receive(&mut self) -> Result<v1::LocalReply, LocalError> {
        loop {
            if let Some(reply) = self.inbox.take().map_err(LocalError::Frame)? {
                return Ok(reply);
            }
            let Self {
                stream, inbox, fds, ..
            } = self;
            let read = stream
                .async_io(Interest::READABLE, || fill(stream, inbox, fds))
                .await;
            if let Err(source) = read {
                return Err(LocalError::Io {
                    step: "receive",
                    source,
                });
            }
        }
    }
}

/// The time that the node is told: a bit less than there is, so that its word about it still arrives.
fn told(left: Duration) -> Duration {
    left - (left / 8).min(Duration::from_millis(20))
}

/// Whether a process of this user may be the node: who can read this process's memory anyway.
fn is_trusted(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == own_uid || peer_uid == 0
}

/// Reads what is there, with the descriptors that came along.
fn fill(stream: &UnixStream, inbox: &mut Inbox, fds: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let room = IoSliceMut::new(inbox.room());
    let read = recvmsg(
        stream,
        &mut [room],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
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
    use std::os::unix::net::UnixListener;

    use std::io::Write;

    use super::*;
    use crate::clock::SystemClock;

    fn nothing() -> Call {
        Call::Nothing(v1::LocalNothing {})
    }

    #[tokio::test]
    async fn a_connection_turned_away_before_it_asked_tells_why_and_is_over() {
        let dir = tempfile::TempDir::new().expect("a folder");
        let path = dir.path().join("busy.sock");
        let listener = UnixListener::bind(&path).expect("a socket");
        let clock = Arc::new(SystemClock::new());
        let mut link = Link::open(&path, Arc::default(), clock)
            .await
            .expect("open");
        let reply = v1::LocalReply {
            sequence: 0,
            answer: Some(Answer::Refused(v1::LocalRefusal {
                reason: Reason::Overloaded.to_wire().into(),
                message: "full".to_owned(),
            })),
        };
        let mut frame = Vec::new();
        local::encode(&reply, &mut frame).expect("a frame");
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.write_all(&frame).expect("room");
        // From now on a call meets a closed pipe.
        drop(stream);
        let answer = link.call(nothing(), Duration::from_secs(1)).await;
        let Err(LocalError::Refused { reason, message }) = answer else {
            panic!("{answer:?}");
        };
        assert_eq!((reason, &*message), (Some(Reason::Overloaded), "full"));
        assert!(!link.is_usable());
    }

    #[tokio::test]
    async fn what_is_done_with_is_kept_when_the_request_is_too_long_to_be_sent() {
        let dir = tempfile::TempDir::new().expect("a folder");
        let path = dir.path().join("long.sock");
        let _listener = UnixListener::bind(&path).expect("a socket");
        let clock = Arc::new(SystemClock::new());
        let mut link = Link::open(&path, Arc::default(), clock)
            .await
            .expect("open");
        link.done.push(7);
        let call = Call::Attach(v1::LocalAttach {
            token: "t".repeat(64 << 20),
            ..v1::LocalAttach::default()
        });
        let answer = link.call(call, Duration::from_secs(1)).await;
        assert!(matches!(answer, Err(LocalError::TooLong)), "{answer:?}");
        assert_eq!(link.done, [7]);
        assert!(link.is_usable());
    }

    #[test]
    fn the_node_is_told_a_bit_less_time_than_there_is() {
        let ms = Duration::from_millis;
        assert_eq!(told(ms(8)), ms(7));
        assert_eq!(told(ms(1000)), ms(980));
        assert_eq!(told(Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn only_the_own_user_and_root_are_taken_for_the_node() {
        assert!(is_trusted(1000, 1000));
        assert!(is_trusted(0, 1000));
        assert!(!is_trusted(1001, 1000));
        assert!(!is_trusted(1001, 0));
    }
}
