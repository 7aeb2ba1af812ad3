//! One connection: its calls, one at a time, from its Attach to its end.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use kvproto::{
    FieldError, Reason,
    convert::{
        AnswerContext,
        request::{self, Context},
    },
    local::{LocalFrameError, fixed::GetCall},
    v1::{self, local_reply::Answer, local_request::Call},
};
use rustix::io::Errno;

use super::{
    Refused, Shared,
    attach::{Attached, attach},
    holds::Holds,
    map::map,
    reply::{Got, Reply},
    socket::{Received, Socket, Stopped},
};
use crate::{
    clock::Tick,
    cluster::Told,
    engine::Owner,
    telemetry::metrics::{GetTally, LocalCall, LocalMetrics},
};

/// A connection that does not attach within this time is closed: it holds a thread.
const ATTACH_TIME: Duration = Duration::from_secs(5);

/// A connection's state; dropping it gives back all that the connection held.
pub(super) struct Session {
    pub(super) shared: Arc<Shared>,
    stream: Arc<UnixStream>,
    socket: Option<Socket>,
    /// What was found of the peer's user.
    admitted: Option<Refused>,
    pub(super) holds: Holds,
    attached: Option<Attached>,
    told: Told,
}

/// A call as it came in.
struct Asked {
    sequence: u64,
    timeout_ms: u32,
    done: Vec<u64>,
    call: Asking,
}

enum Asking {
    Message(Option<Call>),
    /// In the fixed layout, and answered in it.
    Get(Result<request::Get, FieldError>),
    /// More of a put that is not there.
    Stray,
}

enum Answering {
    Message(Answer),
    Got(Got),
}

/// What a call comes to, unless it is refused.
struct Answered {
    answer: Answering,
    /// Descriptors that go with it.
    fds: Vec<OwnedFd>,
    /// Of a get: counted once it is certain that its answer goes out.
    tally: Option<GetTally>,
}

impl From<Answer> for Answered {
    fn from(answer: Answer) -> Self {
        Self {
            answer: Answering::Message(answer),
            fds: Vec::new(),
            tally: None,
        }
    }
}

impl From<v1::LocalRequest> for Asked {
    fn from(request: v1::LocalRequest) -> Self {
        Self {
            sequence: request.sequence,
            timeout_ms: request.timeout_ms,
            done: request.done,
            call: Asking::Message(request.call),
        }
    }
}

impl From<GetCall> for Asked {
    fn from(call: GetCall) -> Self {
        Self {
            sequence: call.sequence,
            timeout_ms: call.timeout_ms,
            done: call.done,
            call: Asking::Get(call.asked),
        }
    }
}

impl Session {
    pub(super) fn new(
        shared: Arc<Shared>,
        stream: Arc<UnixStream>,
        admitted: Result<(), Refused>,
    ) -> Self {
        Self {
            holds: Holds::new(Arc::clone(&shared.metrics), shared.limits.hold),
            shared,
            stream,
            socket: None,
            admitted: admitted.err(),
            attached: None,
            told: Told::default(),
        }
    }

    /// Serves the connection until it ends; on the thread that will serve it.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let clock = Arc::clone(&self.shared.clock);
        let born = clock.now();
        self.socket = Some(Socket::new(
            Arc::clone(&self.stream),
            self.shared.limits.hold,
        ));
        loop {
            let now = clock.now();
            self.holds.expire(now);
            let time = match self.attached {
                Some(_) => self.holds.time_left(now),
                None => match ATTACH_TIME.saturating_sub(now.since(born)) {
                    Duration::ZERO => return Ok(()),
                    left => Some(left),
                },
            };
            let Some(socket) = &mut self.socket else {
                return Ok(());
            };
            let asked = match socket.receive(time)? {
                Received::Request(request) => request.into(),
                Received::Get(call) => call.into(),
                Received::Written(written) => Asked {
                    sequence: written.sequence,
                    timeout_ms: 0,
                    done: Vec::new(),
                    call: Asking::Stray,
                },
                Received::Quiet => continue,
                Received::Closed => return Ok(()),
                Received::Malformed(error) => return self.malformed(&error),
            };
            if !self.serve(asked)? {
                return Ok(());
            }
        }
    }

    /// Answers one request; false when the connection is over with it.
    fn serve(&mut self, asked: Asked) -> io::Result<bool> {
        let _serving = LocalMetrics::serving(&self.shared.metrics);
        let started = self.shared.clock.now();
        let Asked {
            sequence,
            timeout_ms,
            done,
            call,
        } = asked;
        self.holds.done(&done);
        self.holds.expire(started);
        let name = name(&call);
        let deadline = started.after(self.time(timeout_ms));
        let (mut refused, mut closes) = (None, false);
        let (mut fds, mut tally) = (Vec::new(), None);
        let answered = match self.socket.as_mut().is_some_and(Socket::has_unread_fds) {
            true => Err(pipelined()),
            false => self.call(sequence, call, deadline),
        };
        let mut reply = match answered {
            Ok(answered) => {
                (fds, tally) = (answered.fds, answered.tally);
                match answered.answer {
                    Answering::Message(answer) => Reply::message(sequence, answer),
                    Answering::Got(got) => Reply::Got { sequence, got },
                }
            }
            Err(why) => {
                (refused, closes) = (Some(why.reason), why.closes);
                Reply::refusal(sequence, why)
            }
        };
        let Some(socket) = &mut self.socket else {
            return Ok(false);
        };
        if let Err(error) = socket.put(&reply) {
            self.holds.done(&[reply.hold()]);
            let why = Refused::new(
                Reason::TooLarge,
                format!("the answer would be {error}; ask for less"),
            );
            refused = Some(why.reason);
            fds.clear();
            tally = None;
            reply = Reply::refusal(sequence, why);
            socket.put(&reply).map_err(io::Error::other)?;
        }
        // And with it the blocks that a lease keeps: who has the answer may invalidate them and look for their memory.
        drop(reply);
        // Before the answer, so that who has it finds it counted.
        if let Some(tally) = tally {
            tally.given();
        }
        match socket.send(&fds, &*self.shared.clock) {
            // Nothing was sent: more descriptors of this user are on their way to whoever does not read them than
            // the kernel allows, which is no fault of this peer. An attachment without its memory is none.
            Err(error) if error.raw_os_error() == Some(Errno::TOOMANYREFS.raw_os_error()) => {
                let problem = "too many descriptors are on their way to other clients; try again";
                let why = Refused::new(Reason::Overloaded, problem);
                (refused, closes) = (Some(why.reason), matches!(name, LocalCall::Attach));
                let reply = Reply::refusal(sequence, why);
                socket.put(&reply).map_err(io::Error::other)?;
                socket.send(&[], &*self.shared.clock)?;
            }
            sent => sent?,
        }
        let seconds = self.shared.clock.now().since(started).as_secs_f64();
        self.shared.metrics.local.call(name, refused, seconds);
        Ok(!closes)
    }

    fn malformed(&mut self, error: &LocalFrameError) -> io::Result<()> {
        let reason = match error {
            LocalFrameError::TooLong { .. } => Reason::TooLarge,
            LocalFrameError::Undecodable(_) | LocalFrameError::Misshapen(_) => Reason::InvalidField,
        };
        self.shared
            .metrics
            .local
            .call(LocalCall::Malformed, Some(reason), 0.0);
        let Some(socket) = &mut self.socket else {
            return Ok(());
        };
        let reply = Reply::refusal(0, Refused::new(reason, error.to_string()));
        socket.put(&reply).map_err(io::Error::other)?;
        socket.send(&[], &*self.shared.clock)
    }

    fn call(&mut self, sequence: u64, call: Asking, deadline: Tick) -> Result<Answered, Refused> {
        if self.shared.draining.load(Ordering::Relaxed) {
            let problem = "this node is stopping; try again later";
            return Err(Refused::new(Reason::Draining, problem).closing());
        }
        let call = match call {
            Asking::Message(Some(call)) => call,
            Asking::Message(None) => {
                return Err(FieldError::new("call", "is missing, or of a later version").into());
            }
            Asking::Stray => {
                let problem = "says what is written where no put is told of so";
                return Err(Refused::from(FieldError::new("written", problem)).closing());
            }
            Asking::Get(asked) => {
                self.attached()?;
                let (got, tally) = self.get(asked?, deadline)?;
                return Ok(Answered {
                    answer: Answering::Got(got),
                    fds: Vec::new(),
                    tally: Some(tally),
                });
            }
        };
        if let Call::Attach(asked) = &call {
            return self.attach(asked).map_err(Refused::closing);
        }
        let domain = self.attached()?.domain();
        let answer = match call {
            Call::Attach(_) => unreachable!("answered above"),
            Call::Map(asked) => {
                let (mapped, fds) = map(&self.shared, domain, &asked)?;
                let answer = Answer::Mapped(mapped);
                return Ok(Answered {
                    fds,
                    ..answer.into()
                });
            }
            Call::Get(asked) => {
                let (got, tally) = self.get(request::Get::try_from(asked)?, deadline)?;
                let (answer, tally) = (Answer::Got(got.to_wire()), Some(tally));
                return Ok(Answered {
                    tally,
                    ..answer.into()
                });
            }
            Call::Lookup(asked) => Answer::Lookup(self.lookup(asked, deadline)?),
            Call::Put(asked) => {
                let follows = asked.follows;
                let _following = follows.then(|| self.shared.follow(&self.stream));
                let put = self.put(sequence, asked, deadline);
                // What is still to come of it would be taken for something else.
                let put = put.map_err(|why| if follows { why.closing() } else { why });
                Answer::Put(put?)
            }
            Call::Renew(asked) => Answer::Renew(self.renew(asked)?),
            Call::Release(asked) => Answer::Release(self.release(asked)?),
            Call::Nothing(nothing) => Answer::Nothing(nothing),
        };
        Ok(answer.into())
    }

    fn attach(&mut self, asked: &v1::LocalAttach) -> Result<Answered, Refused> {
        if let Some(refused) = self.admitted.take() {
            return Err(refused);
        }
        if self.attached.is_some() {
            return Err(FieldError::new("attach", "came a second time on one connection").into());
        }
        let (attached, answer, fds) = attach(&self.shared, asked)?;
        self.attached = Some(attached);
        let answer = Answer::Attached(answer);
        Ok(Answered {
            fds,
            ..answer.into()
        })
    }

    fn lookup(
        &self,
        wire: v1::LookupRequest,
        deadline: Tick,
    ) -> Result<v1::LookupResponse, Refused> {
        let asked = request::Lookup::try_from(wire)?;
        let owner = self.owner(&asked.context)?;
        let blocks = &self.shared.blocks;
        let time_left = deadline.since(self.shared.clock.now());
        let found = blocks.lookup_in_motion(owner, &asked, time_left);
        let found = self.wait(found, deadline)??;
        Ok(found.into_wire(&self.answer(&asked.context)))
    }

    fn renew(&self, wire: v1::RenewRequest) -> Result<v1::RenewResponse, Refused> {
        let asked = request::Renew::try_from(wire)?;
        let owner = self.owner(&asked.context)?;
        let blocks = &self.shared.blocks;
        let ttl_ms = blocks.renew(owner, asked.lease, asked.ttl_ms);
        Ok(v1::RenewResponse {
            context: Some((&self.answer(&asked.context)).into()),
            renewed: ttl_ms.is_some(),
            ttl_ms: ttl_ms.unwrap_or(0),
        })
    }

    fn release(&self, wire: v1::ReleaseRequest) -> Result<v1::ReleaseResponse, Refused> {
        let asked = request::Release::try_from(wire)?;
        let owner = self.owner(&asked.context)?;
        let blocks = &self.shared.blocks;
        let released = blocks.release(owner, asked.lease);
        Ok(v1::ReleaseResponse {
            context: Some((&self.answer(&asked.context)).into()),
            released,
        })
    }

    /// Whom the connection speaks for.
    pub(super) fn attached(&self) -> Result<&Attached, Refused> {
        self.attached.as_ref().ok_or_else(|| {
            let problem = "attach: has to be a connection's first call";
            Refused::new(Reason::Unauthenticated, problem).closing()
        })
    }

    /// The owner that a call acts for: the attachment's, and no other.
    pub(super) fn owner(&self, context: &Context) -> Result<Owner, Refused> {
        let owner = self.attached()?.owner;
        match context.owner_id {
            Some(named) if named != owner.id => {
                let problem = "is another than this connection's owner";
                Err(FieldError::new("context.owner_id", problem).into())
            }
            _ => Ok(owner),
        }
    }

    /// What the answer to a request with this context says of this node and its view.
    pub(super) fn answer(&self, asked: &Context) -> AnswerContext {
        let blocks = &self.shared.blocks;
        blocks.answer_context(asked.view_digest, &self.told)
    }

    /// How long a call may take.
    fn time(&self, timeout_ms: u32) -> Duration {
        let limits = &self.shared.limits;
        match timeout_ms {
            0 => limits.call_deadline,
            asked => Duration::from_millis(asked.into()).min(limits.call_max_deadline),
        }
    }

    /// Refuses what is past its deadline, and what nobody waits for any more.
    pub(super) fn check(&self, deadline: Tick) -> Result<(), Refused> {
        if deadline <= self.shared.clock.now() {
            return Err(too_late());
        }
        let is_cut = self.shared.cut.load(Ordering::Relaxed);
        match is_cut || self.socket.as_ref().is_none_or(Socket::is_gone) {
            true => Err(gone()),
            false => Ok(()),
        }
    }

    /// The sums of the next pages that are written of a put.
    pub(super) fn written(&mut self, sequence: u64, deadline: Tick) -> Result<Vec<u64>, Refused> {
        loop {
            let now = self.shared.clock.now();
            let left = deadline.since(now);
            if left.is_zero() {
                return Err(too_late());
            }
            // What a get of this connection holds goes in its time all the same.
            self.holds.expire(now);
            let time = self
                .holds
                .time_left(now)
                .map_or(left, |hold| hold.min(left));
            let is_cut = self.shared.cut.load(Ordering::Relaxed);
            let Some(socket) = self.socket.as_mut().filter(|_| !is_cut) else {
                return Err(gone());
            };
            let problem = match socket.receive(Some(time)) {
                Ok(Received::Written(written)) if written.sequence == sequence => {
                    return Ok(written.sums);
                }
                Ok(Received::Quiet) => continue,
                Ok(Received::Closed) | Err(_) => return Err(gone()),
                Ok(Received::Malformed(error)) => error.to_string(),
                Ok(Received::Written(_) | Received::Request(_) | Received::Get(_)) => {
                    "came before all of the put was written".to_owned()
                }
            };
            return Err(FieldError::new("written", problem).into());
        }
    }

    /// Waits for what is not here at once.
    pub(super) fn wait<F: Future>(&self, work: F, deadline: Tick) -> Result<F::Output, Refused> {
        let Some(socket) = &self.socket else {
            return Err(gone());
        };
        let Shared { clock, cut, .. } = &*self.shared;
        socket
            .wait(work, deadline, &**clock, cut)
            .map_err(|stopped| match stopped {
                Stopped::Late => too_late(),
                Stopped::Gone => gone(),
            })
    }
}

fn gone() -> Refused {
    Refused::new(Reason::Draining, "the connection is over").closing()
}

/// One call at a time is the rule, and where descriptors are on their way it is kept.
fn pipelined() -> Refused {
    let problem = "came before the last answer was read, and the descriptors that came with it";
    Refused::from(FieldError::new("sequence", problem)).closing()
}

fn too_late() -> Refused {
    let problem = "the deadline passed before the answer was whole";
    Refused::new(Reason::Deadline, problem)
}

fn name(asked: &Asking) -> LocalCall {
    let call = match asked {
        Asking::Message(call) => call.as_ref(),
        Asking::Get(_) => return LocalCall::Get,
        Asking::Stray => return LocalCall::Malformed,
    };
    match call {
        Some(Call::Attach(_)) => LocalCall::Attach,
        Some(Call::Map(_)) => LocalCall::Map,
        Some(Call::Lookup(_)) => LocalCall::Lookup,
        Some(Call::Get(_)) => LocalCall::Get,
        Some(Call::Put(_)) => LocalCall::Put,
        Some(Call::Renew(_)) => LocalCall::Renew,
        Some(Call::Release(_)) => LocalCall::Release,
        Some(Call::Nothing(_)) => LocalCall::Nothing,
        None => LocalCall::Malformed,
    }
}
