//! The same-host path: words over a Unix socket, bytes through shared memory.
//!
//! ```text
//! call ─► Local::way ─┬─ attached ──► Way ─► link ─┬─ answer ──────────────► caller
//!                     │                            └─ lost ─► down ─┐
//!                     └─ off, down, nobody told a socket ───────────┴─────► gRPC
//!
//!          idle ── a call comes ──► attaching ──► attached
//!            ▲                          │ refused, silent      │ lost: socket closed, no answer, nonsense
//!            └── back-off is over ──── down ◄──────────────────┘
//! ```
//!
//! A call tries this path once, within a share of its deadline ([`share`]), and goes over gRPC with what is
//! left. So a node that is killed, frozen or restarted costs what it costs over gRPC alone, and the path is
//! taken again when the node is back: at once when its boot id changes, otherwise after the back-off.
//!
//! Who calls from a thread of its own ([`crate::blocking`]) has links of its own, on which it waits in the kernel
//! ([`stream`]); everything else is the same for both.
//!
//! Units: durations, calls.
//! Errors: none reach the caller but those about its own buffers; see [`error`].
//! What stays on gRPC: namespaces, invalidation, watches, statistics, and blocks that lie in memory that cannot
//! be shared.

mod attachment;
mod error;
mod hold;
mod link;
mod read;
mod segments;
mod staging;
mod stream;
mod unary;
mod write;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use kvproto::OwnerId;
use parking_lot::Mutex;

pub use self::hold::Held;
pub(crate) use self::hold::Here;
use self::{
    attachment::{Attachment, Caller, Turn},
    error::LocalError,
};
pub(crate) use self::{hold::hold, read::get, unary::unary, write::put};
use crate::{
    call::{Deadline, Inner, Waits},
    clock::{Tick, within},
    path::{LocalPath, Path, PathReport, Tally},
    retry::BreakerState,
};

/// The first pause after a failure; doubles with each that follows, up to the cap. A new boot id ends it early.
const BACKOFF: Duration = Duration::from_millis(50);
const BACKOFF_CAP: Duration = Duration::from_secs(5);

/// Longest wait for an attach, which a living node answers in a millisecond.
const ATTACH_PATIENCE: Duration = Duration::from_secs(1);

/// A call with less time on this path goes over gRPC right away: it would end in the middle.
const LEAST_SHARE: Duration = Duration::from_millis(5);

/// The same-host side of a client.
pub(crate) struct Local {
    setting: LocalPath,
    token: String,
    owner: Bytes,
    /// Most links of an attachment.
    links: usize,
    state: Mutex<State>,
    failures: AtomicU64,
    pub(crate) local: Tally,
    pub(crate) grpc: Tally,
}

struct State {
    /// Where to attach.
    socket: Option<PathBuf>,
    attachment: Option<Arc<Attachment>>,
    is_attaching: bool,
    /// Not before then; and why.
    down: Option<(Tick, String)>,
    /// Failures since a call succeeded.
    rounds: u32,
}

/// The same-host path for one call.
pub(crate) struct Way<'a> {
    inner: &'a Inner,
    attachment: Arc<Attachment>,
    /// When the call has used up its share.
    until: Tick,
    /// How its caller waits.
    waits: Waits,
}

impl Local {
    pub(crate) fn new(
        setting: LocalPath,
        token: Option<String>,
        owner: OwnerId,
        links: usize,
    ) -> Self {
        let socket = match &setting {
            LocalPath::At(socket) => Some(socket.clone()),
            LocalPath::Auto | LocalPath::Off => None,
        };
        Self {
            setting,
            token: token.unwrap_or_default(),
            owner: Bytes::copy_from_slice(&owner.0),
            links,
            state: Mutex::new(State {
                socket,
                attachment: None,
                is_attaching: false,
                down: None,
                rounds: 0,
            }),
            failures: AtomicU64::new(0),
            local: Tally::default(),
            grpc: Tally::default(),
        }
    }

    /// The node says where its socket is.
    pub(crate) fn told(&self, socket: Option<&str>) {
        if self.setting == LocalPath::Auto {
            let socket = socket.map(PathBuf::from);
            let mut state = self.state.lock();
            if state.socket != socket {
                state.socket = socket;
                state.down = None;
            }
        }
    }

    /// The node lives another life: there is somebody new to attach to.
    pub(crate) fn rebooted(&self) {
        let mut state = self.state.lock();
        (state.attachment, state.down, state.rounds) = (None, None, 0);
    }

    /// Whether a call would try this way.
    pub(crate) fn is_near(&self, now: Tick) -> bool {
        let state = self.state.lock();
        let is_down = state.down.as_ref().is_some_and(|(until, _)| now < *until);
        self.setting != LocalPath::Off && state.socket.is_some() && !is_down
    }

    pub(crate) fn report(&self) -> PathReport {
        let state = self.state.lock();
        let why_grpc = match (&self.setting, &state.attachment, &state.down, &state.socket) {
            (LocalPath::Off, ..) => Some("switched off".to_owned()),
            (_, Some(_), ..) => None,
            (_, _, Some((_, why)), _) => Some(why.clone()),
            (_, _, _, None) => Some("the node has told no socket".to_owned()),
            (_, _, _, Some(_)) => Some("not attached yet".to_owned()),
        };
        PathReport {
            path: match why_grpc {
                None => Path::Local,
                Some(_) => Path::Grpc,
            },
            why_grpc,
            failures: self.failures.load(Ordering::Relaxed),
            local: self.local.traffic(),
            grpc: self.grpc.traffic(),
            members: Vec::new(),
        }
    }

    /// The way for a call that must be over at `deadline`, attaching first where that is due. `None`: over gRPC.
    pub(crate) async fn way<'a>(inner: &'a Inner, deadline: Deadline) -> Option<Way<'a>> {
        let local = &inner.local;
        // What is wrong with the node is found out, and got over, by calls over gRPC.
        if local.setting == LocalPath::Off || inner.pool.breaker.state() != BreakerState::Closed {
            return None;
        }
        let now = inner.clock.now();
        let share = share(deadline.left(now));
        if share < LEAST_SHARE {
            return None;
        }
        let until = now.after(share);
        let attachment = match local.standing(inner, now) {
            Standing::Attached(attachment) => attachment,
            Standing::Attach(attaching) => {
                let patience = share.min(ATTACH_PATIENCE);
                attaching.attach(inner, patience, deadline.waits()).await?
            }
            Standing::Elsewhere => return None,
        };
        Some(Way {
            inner,
            attachment,
            until,
            waits: deadline.waits(),
        })
    }

    fn standing<'a>(&'a self, inner: &Inner, now: Tick) -> Standing<'a> {
        let boot = inner.boot.load(Ordering::Relaxed);
        let mut state = self.state.lock();
        match &state.attachment {
            Some(attachment) if attachment.boot != boot && boot != 0 => state.attachment = None,
            Some(attachment) if attachment.is_over() => state.attachment = None,
            Some(attachment) => return Standing::Attached(attachment.clone()),
            None => {}
        }
        let is_down = state.down.as_ref().is_some_and(|(until, _)| now < *until);
        let Some(socket) = state.socket.clone().filter(|_| !is_down) else {
            return Standing::Elsewhere;
        };
        if std::mem::replace(&mut state.is_attaching, true) {
            return Standing::Elsewhere;
        }
        Standing::Attach(Attaching {
            local: self,
            caller: Caller {
                socket,
                token: self.token.clone(),
                owner: self.owner.clone(),
                boot,
            },
        })
    }

    /// The path did not work.
    fn failed(&self, inner: &Inner, error: &LocalError) {
        let mut state = self.state.lock();
        let backoff = BACKOFF.saturating_mul(1_u32.checked_shl(state.rounds).unwrap_or(u32::MAX));
        let backoff = backoff.min(BACKOFF_CAP);
        // A caller in a hurry proves little: the next one tries again soon.
        let is_proof = !matches!(error, LocalError::NoTime);
        state.rounds += u32::from(is_proof);
        state.attachment = None;
        tracing::info!(%error, ?backoff, "the same-host path does not work; gRPC does its work");
        state.down = Some((inner.clock.now().after(backoff), error.to_string()));
    }

    fn works(&self) {
        let mut state = self.state.lock();
        if state.rounds > 0 {
            (state.rounds, state.down) = (0, None);
        }
    }
}

impl std::fmt::Debug for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Local")
            .field("setting", &self.setting)
            .finish_non_exhaustive()
    }
}

enum Standing<'a> {
    Attached(Arc<Attachment>),
    /// The caller is the one to attach.
    Attach(Attaching<'a>),
    Elsewhere,
}

/// The right to attach, which one call at a time has.
struct Attaching<'a> {
    local: &'a Local,
    caller: Caller,
}

impl Attaching<'_> {
    async fn attach(
        self,
        inner: &Inner,
        patience: Duration,
        waits: Waits,
    ) -> Option<Arc<Attachment>> {
        let clock = &inner.clock;
        let opening = Attachment::open(
            self.caller.clone(),
            waits,
            self.local.links,
            patience,
            clock.clone(),
            inner.pool.runtime().clone(),
        );
        let opened = within(&**clock, clock.now().after(patience), opening).await;
        let opened = opened.unwrap_or_else(|| Err(LocalError::ran_out(patience)));
        match opened {
            Ok(attachment) => {
                let attachment = Arc::new(attachment);
                let mut state = self.local.state.lock();
                (state.attachment, state.down) = (Some(attachment.clone()), None);
                tracing::info!(socket = %attachment.socket().display(), "attached on the same host");
                Some(attachment)
            }
            Err(error) => {
                self.local.failed(inner, &error);
                None
            }
        }
    }
}

impl Drop for Attaching<'_> {
    fn drop(&mut self) {
        self.local.state.lock().is_attaching = false;
    }
}

/// Most bytes of one put, when puts go this way.
pub(crate) async fn put_bytes(inner: &Inner, deadline: Deadline) -> Option<u64> {
    let way = Local::way(inner, deadline).await?;
    let staging = way.attachment.staging.as_ref()?;
    Some(write::CALL_BYTES.min(staging.length_bytes() / 4))
}

impl Way<'_> {
    /// Time that the call may still take on this path.
    fn left(&self) -> Duration {
        self.until.since(self.inner.clock.now())
    }

    /// `work` with a link, within the call's share of time. `None`: over gRPC.
    async fn run<T>(
        &self,
        work: impl AsyncFnOnce(&mut Turn) -> Result<T, LocalError>,
    ) -> Option<Result<T, LocalError>> {
        let outcome = self.take(work).await?;
        Some(outcome.map(|(answer, turn)| {
            self.attachment.keep(turn);
            answer
        }))
    }

    /// As [`Way::run`], and the link with it.
    async fn take<T>(
        &self,
        work: impl AsyncFnOnce(&mut Turn) -> Result<T, LocalError>,
    ) -> Option<Result<(T, Turn), LocalError>> {
        let inner = self.inner;
        match self.attempt(work).await {
            Ok(answer) => {
                inner.local.works();
                Some(Ok(answer))
            }
            Err(error @ LocalError::Field(_)) => Some(Err(error)),
            Err(error) if error.is_harmless() => {
                tracing::debug!(%error, "a call goes over gRPC");
                None
            }
            Err(error) => {
                inner.local.lost(inner, &self.attachment, &error);
                None
            }
        }
    }

    async fn attempt<T>(
        &self,
        work: impl AsyncFnOnce(&mut Turn) -> Result<T, LocalError>,
    ) -> Result<(T, Turn), LocalError> {
        let (clock, attachment) = (&*self.inner.clock, &self.attachment);
        // Other calls have the links: nobody was asked.
        let permit = within(clock, self.until, attachment.permit()).await;
        let permit = permit.ok_or(LocalError::NoTime)?;
        let began = clock.now();
        let turn = within(
            clock,
            self.until,
            attachment.turn(permit, self.waits, self.left()),
        )
        .await;
        let mut turn = turn.unwrap_or_else(|| {
            let waited = clock.now().since(began);
            Err(attachment.not_joined(LocalError::ran_out(waited)))
        })?;
        match within(clock, self.until, work(&mut turn)).await {
            Some(Ok(answer)) => Ok((answer, turn)),
            Some(Err(error)) => {
                if error.is_harmless() {
                    attachment.keep(turn);
                }
                Err(error)
            }
            // The link goes: its answer may still come.
            None => Err(LocalError::ran_out(turn.link.silence())),
        }
    }
}

impl Local {
    /// `attachment` is of no more use.
    fn lost(&self, inner: &Inner, attachment: &Arc<Attachment>, error: &LocalError) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let is_current = {
            let state = self.state.lock();
            let current = state.attachment.as_ref();
            current.is_some_and(|current| Arc::ptr_eq(current, attachment))
        };
        // Of several calls that it was lost to, one says so.
        if is_current {
            self.failed(inner, error);
        }
    }
}

/// What of a call's time this path may use up: half of it, so that gRPC has as much.
fn share(left: Duration) -> Duration {
    left / 2
}
