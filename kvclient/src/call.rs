//! One call from its first try to its verdict: deadline, repeats, breaker.
//!
//! ```text
//! Tries::new ─► try ─► answer ─────────────────────────────► caller
//!                │└── error ─► worth repeating? budget? ─► backoff ─┐
//!                └◄──────────────────────────────────────────────────┘   all of it within one deadline
//! ```
//!
//! Units: durations.
//! Errors: the last try's; [`Error::Deadline`] when time ran out in the middle of one.
//! Why a loop with a body and not a closure: a try borrows the caller's buffers, and each needs them anew.

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::HeaderValue;
use kvproto::{BootId, LeaseId, OwnerId, convert::answer::Second, v1};
use prost::Message;
use tokio::sync::mpsc;

use crate::{
    clock::{Clock, Tick, within_pinned},
    endpoint::Endpoint,
    error::Error,
    fleet::Views,
    lane::Lanes,
    local::Local,
    open::Opened,
    pool::{Checkout, Pool},
    queue::Queue,
    retry::{BreakerState, RetryBudget, RetryPolicy},
    wire::{self, Method},
};

/// The way to one node; all clones of a client share it.
pub(crate) struct Inner {
    pub(crate) endpoint: Endpoint,
    pub(crate) pool: Pool,
    pub(crate) lanes: Lanes,
    pub(crate) local: Local,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) retry: RetryPolicy,
    /// Shared by all nodes of a client.
    pub(crate) budget: Arc<RetryBudget>,
    pub(crate) owner: OwnerId,
    pub(crate) authorization: Option<HeaderValue>,
    /// Boot id of the node as last heard; 0 before the first answer.
    pub(crate) boot: AtomicU64,
    /// How often it has changed.
    pub(crate) reboots: AtomicU64,
    /// Leases to give back in the background.
    pub(crate) releases: mpsc::Sender<LeaseId>,
    /// Calls that one large request is cut into and that run at once.
    pub(crate) parallel: usize,
    /// What all nodes' answers say of the cluster.
    pub(crate) views: Arc<Views>,
    /// Namespaces that this client has opened here.
    pub(crate) opened: Opened,
    /// What it has to do.
    pub(crate) queue: Queue,
}

impl Inner {
    /// What travels with every request; `request` names the call across its tries.
    pub(crate) fn context(&self, request: &[u8; 16]) -> v1::RequestContext {
        v1::RequestContext {
            view_digest: self.views.digest(),
            boot_id: self.boot.load(Ordering::Relaxed),
            request_id: Bytes::copy_from_slice(request),
            no_forward: false,
            owner_id: Bytes::copy_from_slice(&self.owner.0),
        }
    }

    /// The context of a call over a connection that has said who asks.
    pub(crate) fn view_context(&self) -> v1::RequestContext {
        v1::RequestContext {
            view_digest: self.views.digest(),
            ..v1::RequestContext::default()
        }
    }

    /// 16 bytes that no other call has.
    pub(crate) fn unique(&self) -> [u8; 16] {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.clock.random_u64().to_le_bytes());
        id[8..].copy_from_slice(&self.clock.random_u64().to_le_bytes());
        id
    }

    /// Whether it has answered, and not failed since.
    pub(crate) fn is_well(&self) -> bool {
        self.boot.load(Ordering::Relaxed) != 0 && self.pool.breaker.state() == BreakerState::Closed
    }

    /// Gives a lease back in the background; one that finds the queue full ends by its own time.
    pub(crate) fn let_go(&self, lease: LeaseId) {
        if self.releases.try_send(lease).is_err() {
            tracing::debug!(?lease, "release queue is full; the lease ends by its time");
        }
    }

    /// Takes note of who answered.
    pub(crate) fn heard(&self, context: Option<&v1::ResponseContext>) -> BootId {
        if let Some(context) = context {
            self.views.heard(context, &*self.clock);
            if self.views.is_cluster() {
                self.queue.heard(context.queue, self.clock.now());
            }
        }
        let Some(boot) = context.map(|context| context.boot_id).filter(|id| *id != 0) else {
            return BootId(self.boot.load(Ordering::Relaxed));
        };
        let before = self.boot.swap(boot, Ordering::Relaxed);
        if before != boot && before != 0 {
            self.reboots.fetch_add(1, Ordering::Relaxed);
            self.local.rebooted();
            tracing::info!(
                boot_id = boot,
                "the node was restarted; its leases are void"
            );
        }
        BootId(boot)
    }
}

impl Inner {
    /// Takes note of who else has runs that were got.
    pub(crate) fn heard_of(&self, seconds: &[v1::SecondOwner]) {
        if seconds.is_empty() {
            return;
        }
        let seconds: Result<Vec<Second>, _> = seconds.iter().map(Second::try_from).collect();
        match seconds {
            Ok(seconds) => self.views.heard_of(seconds, self.clock.now()),
            Err(error) => tracing::debug!(%error, "second owners that make no sense"),
        }
    }
}

/// How a caller waits for the node on its own host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Waits {
    /// As a task: the runtime watches the socket.
    #[default]
    Task,
    /// On a thread of its own, which may sleep in the kernel.
    Thread,
}

/// When a call must be over, how long that was when it began, and how it is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    budget: Duration,
    at: Tick,
    waits: Waits,
}

impl Deadline {
    /// `budget` from now on.
    pub(crate) fn after(clock: &dyn Clock, budget: Duration) -> Self {
        Self {
            budget,
            at: clock.now().after(budget),
            waits: Waits::Task,
        }
    }

    /// The same, for a caller that waits so.
    pub(crate) fn waited_for(self, waits: Waits) -> Self {
        Self { waits, ..self }
    }

    /// How the caller waits.
    pub(crate) fn waits(&self) -> Waits {
        self.waits
    }

    /// Time that is left of it at `now`.
    pub(crate) fn left(&self, now: Tick) -> Duration {
        self.at.since(now)
    }
}

/// The tries of one call.
pub(crate) struct Tries<'a> {
    inner: &'a Inner,
    method: Method,
    deadline: Deadline,
    done: u32,
    /// Same for every try: the node and its traces see one call.
    pub(crate) request: [u8; 16],
}

impl<'a> Tries<'a> {
    /// A call that has not been tried yet.
    pub(crate) fn new(inner: &'a Inner, method: Method, deadline: Deadline) -> Self {
        Self {
            inner,
            method,
            deadline,
            done: 0,
            request: inner.unique(),
        }
    }

    /// One try: `work` with a connection, within what is left of the deadline. `Ok(Err(_))` is a failed
    /// try that may be repeated, after its backoff.
    ///
    /// # Errors
    /// The call's verdict.
    pub(crate) async fn run<T, F, W>(&mut self, work: F) -> Result<Result<T, ()>, Error>
    where
        F: FnOnce(Checkout, Duration) -> W,
        W: Future<Output = Result<T, Error>>,
    {
        let inner = self.inner;
        let admitted = inner.pool.admit()?;
        let clock = &*inner.clock;
        let deadline = self.deadline.at;
        let mut used = None;
        let outcome = {
            let attempt = pin!(async {
                let checkout = inner.pool.checkout().await?;
                used = Some((checkout.link.clone(), checkout.live.clone()));
                work(checkout, deadline.since(clock.now())).await
            });
            within_pinned(clock, deadline, attempt).await
        };
        let error = match outcome {
            Some(Ok(answer)) => {
                admitted.success();
                inner.budget.earn();
                return Ok(Ok(answer));
            }
            Some(Err(error)) => error,
            None => Error::Deadline {
                method: self.method.name,
                deadline_ms: u64::try_from(self.deadline.budget.as_millis()).unwrap_or(u64::MAX),
            },
        };
        match &error {
            error if error.is_endpoint_failure() => admitted.failure(clock),
            // Nobody answered, and nobody has failed to: the next try knows more.
            Error::Stale { .. } => drop(admitted),
            _ => admitted.success(),
        }
        if let Some((link, live)) = used {
            match &error {
                // One lane or stream: the rest may be well, and if it is not, its silence says so. Idle lanes may
                // be as dead as this one, and cost little to open again.
                Error::Deadline { .. } | Error::Broken { .. } | Error::Stale { .. } => {
                    inner.lanes.clear();
                    link.suspect(&live);
                }
                _ => {}
            }
        }
        if error.is_endpoint_failure() {
            // Whichever connection is up by now: a pong there ends the hurt, or its absence proves it.
            inner.pool.suspect();
        }
        self.after(error).await.map(Err)
    }

    /// Waits before the next try, or gives the call up.
    async fn after(&mut self, error: Error) -> Result<(), Error> {
        let inner = self.inner;
        let repeat = self.done;
        self.done += 1;
        let may_ask = matches!(error, Error::Stale { .. })
            || inner.pool.breaker.state() == BreakerState::Closed;
        if !error.is_worth_repeating() || self.done >= inner.retry.attempts || !may_ask {
            return Err(error);
        }
        let wait = inner.retry.backoff(repeat, inner.clock.random_u64());
        if inner.clock.now().after(wait) >= self.deadline.at || !inner.budget.spend() {
            return Err(error);
        }
        tracing::debug!(method = self.method.name, %error, ?wait, "trying again");
        inner.clock.sleep(wait).await;
        Ok(())
    }
}

/// A call with one message each way.
pub(crate) async fn unary<Q, A>(
    inner: &Inner,
    method: Method,
    deadline: Deadline,
    mut question: impl FnMut(v1::RequestContext) -> Q,
) -> Result<A, Error>
where
    Q: Message,
    A: Message + Default,
{
    let mut tries = Tries::new(inner, method, deadline);
    loop {
        let question = wire::encode(&question(inner.context(&tries.request)));
        let answer = tries
            .run(|checkout, left| async move {
                let authorization = inner.authorization.as_ref();
                let _checkout = checkout;
                wire::unary(&inner.lanes, method, left, authorization, &question).await
            })
            .await?;
        if let Ok(answer) = answer {
            return Ok(answer);
        }
    }
}
