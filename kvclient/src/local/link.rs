//! One connection of the same-host path: frames over a Unix socket, descriptors beside them.
//!
//! ```text
//! call ─► [length][LocalRequest] ──────────────────────────────► node
//!      ◄─ [length][LocalReply], SCM_RIGHTS with its first byte ◄─
//! get  ─► [length][fixed layout] ──────────────────────────────► node         where the node knows it
//! put  ─► [length][LocalRequest] ─► [length][written] ─► … ────► node         told of while it is written
//! ```
//!
//! One call at a time, on the caller's own task or thread ([`Waits`]). A link whose call failed, or was dropped half way, is not used
//! again: closing it lets go of everything that the node held for it.
//!
//! Units: bytes.
//! Errors: [`LocalError`]. Deadlines are the caller's.

use std::{io, os::fd::OwnedFd, path::Path, sync::Arc, time::Duration};

use kvproto::{
    Reason,
    local::{
        self, Frame, Inbox, LocalFrameError,
        fixed::{self, Asking, LAYOUT_GET, LAYOUT_WRITTEN},
    },
    v1::{self, local_reply::Answer, local_request::Call},
};

use prost::Message;

use super::{error::LocalError, stream::Stream};
use crate::{
    call::Waits,
    clock::{Clock, Tick},
    lease::millis,
};

/// A link that was used so lately is taken as it is: whether the node has closed it, the call finds out.
const FRESH: Duration = Duration::from_millis(10);

/// A connection on which one call at a time is made.
pub(super) struct Link {
    stream: Stream,
    inbox: Inbox,
    /// Came with the bytes in the inbox.
    fds: Vec<OwnedFd>,
    out: Vec<u8>,
    sequence: u64,
    clock: Arc<dyn Clock>,
    /// When the call was made that has no answer yet.
    asked: Option<Tick>,
    /// When the call was made that was answered last, or it was opened.
    used: Tick,
    /// Fixed layouts that the node knows.
    pub(super) layouts: u32,
    /// Lets other calls of its thread go on between question and answer.
    pub(super) gives_way: bool,
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
        waits: Waits,
        open: Arc<()>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, LocalError> {
        let failed = |step| move |source| LocalError::Io { step, source };
        let stream = Stream::connect(socket, waits).await;
        let stream = stream.map_err(failed("connect"))?;
        let uid = stream.peer_uid().map_err(failed("peer"))?;
        // Whoever could bind the path could take a token and hand out blocks. Told or set, a path proves nothing.
        if !is_trusted(uid, rustix::process::geteuid().as_raw()) {
            return Err(LocalError::Stranger { uid });
        }
        Ok(Self {
            stream,
            inbox: Inbox::new(),
            fds: Vec::new(),
            out: Vec::new(),
            sequence: 0,
            asked: None,
            used: clock.now(),
            layouts: 0,
            gives_way: false,
            clock,
            is_over: false,
            done: Vec::new(),
            _open: open,
        })
    }

    /// How its caller waits.
    pub(super) fn waits(&self) -> Waits {
        self.stream.waits()
    }

    /// Whether its last call ended in good order, with nothing of its answer left.
    pub(super) fn is_whole(&self) -> bool {
        !self.is_over && self.asked.is_none() && self.inbox.is_empty() && self.fds.is_empty()
    }

    /// Whether an idle link is still open, and silent, as it must be.
    pub(super) fn is_usable(&self) -> bool {
        let is_fresh = self.waits() == Waits::Thread && self.idle() < FRESH;
        self.is_whole() && (is_fresh || self.stream.is_quiet())
    }

    /// How long it has had no call.
    pub(super) fn idle(&self) -> Duration {
        self.clock.now().since(self.used)
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
        let brings_fds = matches!(call, Call::Attach(_) | Call::Map(_));
        self.begin();
        let request = v1::LocalRequest {
            sequence: self.sequence,
            timeout_ms: timeout_ms(timeout),
            done: std::mem::take(&mut self.done),
            call: Some(call),
        };
        if let Err(error) = local::encode(&request, &mut self.out) {
            // Nothing was sent: these are still to be let go.
            self.done = request.done;
            return Err(not_sent(error));
        }
        let reply = self.exchange(brings_fds, timeout).await?;
        let fds = std::mem::take(&mut self.fds);
        match reply {
            Reply::Message(reply) => Ok((answer(reply)?, fds)),
            Reply::Got(_) => Err(LocalError::answer("a get's, to another question")),
        }
    }

    /// A get: in its fixed layout where that goes, otherwise the message that `message` makes.
    pub(super) async fn get(
        &mut self,
        asking: Asking<'_>,
        timeout: Duration,
        message: impl FnOnce() -> v1::GetRequest,
    ) -> Result<Got, LocalError> {
        if self.layouts & LAYOUT_GET == 0 || !self.lay_out(asking, timeout)? {
            return match self.call(Call::Get(message()), timeout).await?.0 {
                Answer::Got(got) => Ok(Got::Message(got)),
                _ => Err(LocalError::answer("no answer to a get")),
            };
        }
        match self.exchange(false, timeout).await? {
            Reply::Got(got) => Ok(Got::Fixed(got)),
            Reply::Message(reply) => match answer(reply)? {
                Answer::Got(got) => Ok(Got::Message(got)),
                _ => Err(LocalError::answer("no answer to a get")),
            },
        }
    }

    /// Whether a put may be told of while it is written.
    pub(super) fn tells_what_is_written(&self) -> bool {
        self.layouts & LAYOUT_WRITTEN != 0
    }

    /// A put that is told of while it is written: `write` writes some pages more and answers their sums, none when all
    /// is written.
    pub(super) async fn put(
        &mut self,
        put: v1::LocalPut,
        timeout: Duration,
        mut write: impl FnMut(&mut Vec<u64>) -> Result<(), LocalError>,
    ) -> Result<v1::PutResponse, LocalError> {
        self.begin();
        let request = v1::LocalRequest {
            sequence: self.sequence,
            timeout_ms: timeout_ms(timeout),
            done: std::mem::take(&mut self.done),
            call: Some(Call::Put(put)),
        };
        if let Err(error) = local::encode(&request, &mut self.out) {
            self.done = request.done;
            return Err(not_sent(error));
        }
        let asked = self.clock.now();
        let until = asked.after(timeout);
        self.asked = Some(asked);
        let mut sums = Vec::new();
        let sent = loop {
            let sent = self.stream.send(&self.out, &*self.clock, until).await;
            if sent.is_err() {
                break sent;
            }
            sums.clear();
            write(&mut sums)?;
            if sums.is_empty() {
                break sent;
            }
            self.out.clear();
            fixed::encode_written(self.sequence, &sums, &mut self.out).map_err(not_sent)?;
        };
        let reply = self.answered(sent, false, until).await?;
        let reply = self.judge(reply, asked)?;
        // The node has not read what came behind a put that it refuses.
        let Reply::Message(reply) = reply else {
            return Err(LocalError::answer("a get's, to a put"));
        };
        self.is_over |= matches!(reply.answer, Some(Answer::Refused(_)));
        match answer(reply)? {
            Answer::Put(answer) => Ok(answer),
            _ => Err(LocalError::answer("no answer to a put")),
        }
    }

    /// Makes a get the frame that is sent next; false when it has no fixed layout.
    fn lay_out(&mut self, asking: Asking<'_>, timeout: Duration) -> Result<bool, LocalError> {
        self.begin();
        let asking = Asking {
            sequence: self.sequence,
            timeout_ms: timeout_ms(timeout),
            done: &self.done,
            ..asking
        };
        let put = fixed::encode_get(&asking, &mut self.out).map_err(not_sent)?;
        match put {
            true => self.done.clear(),
            false => self.sequence -= 1,
        }
        Ok(put)
    }

    fn begin(&mut self) {
        self.sequence += 1;
        self.out.clear();
    }

    /// Sends the frame, and waits for what it is answered.
    async fn exchange(&mut self, brings_fds: bool, timeout: Duration) -> Result<Reply, LocalError> {
        let asked = self.clock.now();
        self.asked = Some(asked);
        let until = asked.after(timeout);
        let sent = self.stream.send(&self.out, &*self.clock, until).await;
        let reply = self.answered(sent, brings_fds, until).await?;
        self.judge(reply, asked)
    }

    /// Whether what came in is the answer to the call made at `asked`.
    fn judge(&mut self, reply: Reply, asked: Tick) -> Result<Reply, LocalError> {
        (self.asked, self.used) = (None, asked);
        let (sequence, is_refused) = match &reply {
            Reply::Message(reply) => (
                reply.sequence,
                matches!(reply.answer, Some(Answer::Refused(_))),
            ),
            Reply::Got(got) => (got.head.sequence, false),
        };
        // A node that turns a connection away has read no call of it.
        self.is_over = sequence == 0 && is_refused;
        if sequence != self.sequence && !self.is_over {
            return Err(LocalError::answer(format!(
                "answer {sequence} to call {}",
                self.sequence
            )));
        }
        Ok(reply)
    }

    /// What comes in for what was sent.
    async fn answered(
        &mut self,
        sent: io::Result<()>,
        brings_fds: bool,
        until: Tick,
    ) -> Result<Reply, LocalError> {
        let Err(source) = sent else {
            if self.gives_way && self.waits() == Waits::Thread {
                tokio::task::yield_now().await;
            }
            return self.receive(brings_fds, until).await;
        };
        let is_closed = matches!(
            source.kind(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
        );
        // Whoever closes a connection may have said why, before it was asked anything.
        if is_closed && let Ok(reply) = self.receive(brings_fds, until).await {
            return Ok(reply);
        }
        Err(self.failed("send", source))
    }

    async fn receive(&mut self, brings_fds: bool, until: Tick) -> Result<Reply, LocalError> {
        loop {
            if let Some(reply) = self.take().map_err(LocalError::Frame)? {
                return Ok(reply);
            }
            let fds = brings_fds.then_some(&mut self.fds);
            let read = self
                .stream
                .receive(&mut self.inbox, fds, &*self.clock, until);
            if let Err(source) = read.await {
                return Err(self.failed("receive", source));
            }
        }
    }

    fn take(&mut self) -> Result<Option<Reply>, LocalFrameError> {
        Ok(match self.inbox.take_frame()? {
            None => None,
            Some(Frame::Message(frame)) => Some(Reply::Message(Message::decode(frame)?)),
            Some(Frame::Fixed(frame)) => Some(Reply::Got(fixed::decode_got(&frame)?)),
        })
    }

    fn failed(&self, step: &'static str, source: io::Error) -> LocalError {
        match source.kind() {
            io::ErrorKind::TimedOut => LocalError::ran_out(self.silence()),
            _ => LocalError::Io { step, source },
        }
    }
}

/// What came in.
enum Reply {
    Message(v1::LocalReply),
    Got(fixed::Got),
}

/// The answer to a get.
pub(super) enum Got {
    Message(v1::LocalGot),
    Fixed(fixed::Got),
}

fn answer(reply: v1::LocalReply) -> Result<Answer, LocalError> {
    match reply.answer {
        Some(Answer::Refused(refusal)) => Err(LocalError::Refused {
            reason: Reason::from_wire(refusal.reason),
            message: refusal.message,
        }),
        Some(answer) => Ok(answer),
        None => Err(LocalError::answer("it is empty")),
    }
}

fn not_sent(error: LocalFrameError) -> LocalError {
    match error {
        LocalFrameError::TooLong { .. } => LocalError::TooLong,
        other => LocalError::Frame(other),
    }
}

fn timeout_ms(timeout: Duration) -> u32 {
    millis(told(timeout)).max(1)
}

/// The time that the node is told: a bit less than there is, so that its word about it still arrives.
fn told(left: Duration) -> Duration {
    left - (left / 8).min(Duration::from_millis(20))
}

/// Whether a process of this user may be the node: who can read this process's memory anyway.
fn is_trusted(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == own_uid || peer_uid == 0
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
        let mut link = Link::open(&path, Waits::Task, Arc::default(), clock)
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
        let mut link = Link::open(&path, Waits::Task, Arc::default(), clock)
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
