//! Who listens to one member, for as long as the watch lasts.
//!
//! ```text
//!   ┌─► opening ── first message ─► Listening ─► Event …       told in this order, through a bounded queue
//!   │      │                            │ broken, or nobody there by a ping every PULSE
//!   │      └──────── failed ────────────┴─► Lost ─► pause ─┐   Lost is told once, until it listens again
//!   └──────────────────────────────────────────────────────┘
//! ```
//!
//! Units: events, durations.
//! Errors: told as [`Heard::Lost`]; one that speaks against the watch itself is the last word.

use std::{io, sync::Arc, time::Duration};

use kvproto::{BootId, NamespaceId};
use tokio::sync::mpsc;

use super::{
    Heard,
    stream::{self, METHOD, Stream},
};
use crate::{
    call::{Deadline, Inner},
    clock::{Tick, within},
    error::Error,
    namespace::NamespaceHandle,
    open::{self, Reopening},
    retry::RetryPolicy,
};

/// How long a stream may say nothing before it is asked whether anybody is there.
const PULSE: Duration = Duration::from_secs(1);

/// How often it is looked whether the answer to that has failed to come.
const CHECK: Duration = Duration::from_millis(250);

/// Pauses before listening again: short at first, as a node that is started again is soon back.
const PAUSES: RetryPolicy = RetryPolicy {
    attempts: u32::MAX,
    base: Duration::from_millis(50),
    cap: Duration::from_secs(2),
};

/// A node gives a stream no more time than it was asked for; this much longer, the watch itself ends first.
const MARGIN: Duration = Duration::from_secs(1);

/// What an ear hears goes to its watch, under its number.
pub(super) type Told = (u64, Heard);

/// Listens to one member.
pub(super) struct Ear {
    pub(super) number: u64,
    pub(super) inner: Arc<Inner>,
    pub(super) namespace: Option<NamespaceHandle>,
    /// Time of one call.
    pub(super) budget: Duration,
    /// When the watch is over.
    pub(super) until: Tick,
    pub(super) told: mpsc::Sender<Told>,
}

/// The watch is gone: nobody listens to what is heard.
struct Unheard;

/// Why a stream is over.
enum End {
    Unheard,
    /// In good order.
    Closed,
    Broken(Error),
}

impl From<Unheard> for End {
    fn from(_: Unheard) -> Self {
        Self::Unheard
    }
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Broken(error)
    }
}

impl Ear {
    /// Until the watch is dropped or the node ends the stream in good order.
    pub(super) async fn listen(self) {
        let clock = &*self.inner.clock;
        // The last event heard, and in which life of the node.
        let mut last: Option<(BootId, u64)> = None;
        let (mut failures, mut is_lost) = (0, false);
        loop {
            let (before, begun, mut is_heard) = (last, clock.now(), false);
            let Err(end) = self.once(&mut last, &mut is_heard).await;
            let error = match end {
                End::Unheard | End::Closed => return,
                End::Broken(error) => error,
            };
            if is_heard {
                is_lost = false;
            }
            // One that ends as soon as it was opened is not opened again at once.
            if last != before || is_heard && clock.now().since(begun) >= PAUSES.cap {
                failures = 0;
            }
            let is_final = error.is_final();
            tracing::debug!(endpoint = %self.inner.endpoint, %error, "a watch hears a node no more");
            if (!is_lost || is_final) && self.tell(Heard::Lost(error)).await.is_err() {
                return;
            }
            if is_final {
                return;
            }
            is_lost = true;
            clock
                .sleep(PAUSES.backoff(failures, clock.random_u64()))
                .await;
            failures += 1;
        }
    }

    /// One stream, from its opening to its end; `is_heard` once it was told that it is listened to.
    async fn once(
        &self,
        last: &mut Option<(BootId, u64)>,
        is_heard: &mut bool,
    ) -> Result<std::convert::Infallible, End> {
        let mut stream = self.open().await?;
        let (boot, begun) = self.attend(stream.began(&self.inner)).await?;
        let known = last.filter(|(of, _)| *of == boot);
        self.tell(Heard::Listening {
            boot,
            sequence: begun,
            missed: known.map(|(_, heard)| begun.saturating_sub(heard)),
        })
        .await?;
        *is_heard = true;
        *last = Some((boot, begun));
        loop {
            let next = self.attend(stream.next(&self.inner)).await?;
            let Some((sequence, event)) = next else {
                return Err(End::Closed);
            };
            *last = Some((boot, sequence));
            self.tell(Heard::Event { sequence, event }).await?;
        }
    }

    async fn open(&self) -> Result<Stream, Error> {
        let inner = &*self.inner;
        let clock = &*inner.clock;
        let left = self.until.since(clock.now());
        let deadline = Deadline::after(clock, self.budget.min(left));
        let id: Option<NamespaceId> = self.namespace.as_ref().map(NamespaceHandle::id);
        let opening = async {
            if let Some(namespace) = &self.namespace {
                open::ensure(inner, namespace, deadline).await?;
            }
            let mut reopening = Reopening::default();
            loop {
                match (
                    stream::open(inner, deadline, left.saturating_add(MARGIN), id).await,
                    &self.namespace,
                ) {
                    (Err(error), Some(namespace)) => {
                        reopening.after(inner, namespace, error, deadline).await?;
                    }
                    (opened, _) => return opened,
                }
            }
        };
        self.attend(opening).await
    }

    /// Waits for what may take its time, as long as somebody is there.
    async fn attend<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let inner = &*self.inner;
        let clock = &*inner.clock;
        let mut work = std::pin::pin!(work);
        let mut wait = PULSE;
        loop {
            let answer = within(clock, clock.now().after(wait), &mut work).await;
            if let Some(answer) = answer {
                return answer;
            }
            if inner.pool.breaker.is_silent() {
                let source = io::Error::new(io::ErrorKind::TimedOut, "nobody is there");
                return Err(Error::Broken {
                    method: METHOD.name,
                    source,
                });
            }
            // A ping, and a look at what became of it; then again after a pulse.
            wait = match wait == PULSE {
                true => {
                    inner.pool.suspect();
                    CHECK + CHECK / 2
                }
                false => PULSE,
            };
        }
    }

    async fn tell(&self, heard: Heard) -> Result<(), Unheard> {
        let told = self.told.send((self.number, heard)).await;
        told.map_err(|_| Unheard)
    }
}
