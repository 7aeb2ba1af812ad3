//! One connection to a node, kept up by a task of its own.
//!
//! ```text
//!            ┌─ a call asks, or backoff is over ─┐
//!            ▼                                   │
//!        connecting ── refused, timed out ──► down          every state change wakes who waits
//!            │ SETTINGS and a PONG came
//!            ▼
//!           up ── a call ran out of time ──► suspect ── PONG ──► up
//!            │                                  │ no PONG: the breaker is held open; a second
//!            │ the connection broke             │ connection is tried beside the first, and
//!            ▼                                  ▼ whichever answers first is `up`
//!        connecting                          up
//! ```
//!
//! Units: bytes, durations.
//! Errors: the last failure to connect is what a waiting call gets.
//! Why it exists beside the lanes (see [`crate::lane`]): a watch needs a connection that is read all the time,
//! and a PING on it tells at once whether anybody is there.
//! Why a PONG before use: a kernel accepts connections for a frozen process; only the process answers.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{Ping, PingPong, client::SendRequest};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
    sync::{Notify, Semaphore, watch},
    task::JoinHandle,
};

use crate::{
    clock::{Clock, within},
    endpoint::{self, Endpoint},
    error::Error,
    retry::{Breaker, RetryPolicy},
};

/// Sizes and patience of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Bytes one stream may have in flight towards us. Default 16 MiB: no block of usual size waits for
    /// an acknowledgement half way.
    pub stream_window_bytes: u32,
    /// Bytes one connection may have in flight towards us. Default 64 MiB: four full streams.
    pub connection_window_bytes: u32,
    /// Largest frame we accept. Default 1 MiB: HTTP/2's own 16 KiB costs half the throughput.
    pub max_frame_bytes: u32,
    /// Bytes of one stream queued for sending, by reference. Default 8 MiB: a usual block is queued in
    /// one go and its writer sleeps until the answer.
    pub send_buffer_bytes: usize,
    /// Calls at once on one connection; more wait, within their deadline. Default 64.
    pub streams: usize,
    /// How long one attempt to connect may take, handshake included. Default 1 s.
    pub connect_timeout: Duration,
    /// How long a suspect node may take to answer a PING. Default 250 ms.
    pub ping_patience: Duration,
    /// Waits between attempts to connect when nobody asks. Default 10 ms doubling to 250 ms, jittered.
    pub reconnect: RetryPolicy,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            stream_window_bytes: 16 << 20,
            connection_window_bytes: 64 << 20,
            max_frame_bytes: 1 << 20,
            send_buffer_bytes: 8 << 20,
            streams: 64,
            connect_timeout: Duration::from_secs(1),
            ping_patience: Duration::from_millis(250),
            reconnect: RetryPolicy {
                attempts: u32::MAX,
                base: Duration::from_millis(10),
                cap: Duration::from_millis(250),
            },
        }
    }
}

/// A proven connection that takes calls.
#[derive(Clone)]
pub(crate) struct Live {
    /// Behind a pointer: its own clone counts under the connection's lock.
    pub(crate) send: Arc<SendRequest<Bytes>>,
    pub(crate) permits: Arc<Semaphore>,
    number: u64,
}

#[derive(Default)]
struct State {
    live: Option<Live>,
    /// Attempts to connect begun so far.
    begun: u64,
    failed: Option<Failed>,
}

#[derive(Clone)]
struct Failed {
    source: Arc<io::Error>,
    /// Nobody answered at all; a further attempt costs the whole timeout again.
    silent: bool,
}

/// One connection and what is known of it.
pub(crate) struct Link {
    pub(crate) endpoint: Endpoint,
    pub(crate) clock: Arc<dyn Clock>,
    tuning: Tuning,
    breaker: Arc<Breaker>,
    state: Mutex<State>,
    /// Attempts to connect finished so far.
    finished: watch::Sender<u64>,
    wanted: Notify,
    suspected: Notify,
}

impl Link {
    pub(crate) fn new(
        endpoint: Endpoint,
        tuning: Tuning,
        clock: Arc<dyn Clock>,
        breaker: Arc<Breaker>,
    ) -> Arc<Self> {
        Arc::new(Self {
            endpoint,
            clock,
            tuning,
            breaker,
            state: Mutex::default(),
            finished: watch::Sender::new(0),
            wanted: Notify::new(),
            suspected: Notify::new(),
        })
    }

    /// The connection, if there is one now.
    pub(crate) fn now(&self) -> Option<Live> {
        self.state.lock().live.clone()
    }

    /// Calls it could take now, if it is up.
    pub(crate) fn room(&self) -> Option<usize> {
        let state = self.state.lock();
        state
            .live
            .as_ref()
            .map(|live| live.permits.available_permits())
    }

    /// Calls it takes at once.
    pub(crate) fn capacity(&self) -> usize {
        self.tuning.streams.max(1)
    }

    /// Whether the last attempt was answered with a refusal, so that another one is cheap.
    pub(crate) fn is_cheap_to_try(&self) -> bool {
        let state = self.state.lock();
        state.live.is_none() && state.failed.as_ref().is_none_or(|failed| !failed.silent)
    }

    /// The connection, after waiting for the attempt that makes it.
    ///
    /// # Errors
    /// [`Error::Connect`] with the outcome of an attempt that began after this call did; of the one
    /// under way, when that one met silence.
    pub(crate) async fn live(&self) -> Result<Live, Error> {
        let mut finished = self.finished.subscribe();
        let begun = self.state.lock().begun;
        loop {
            let seen = *finished.borrow_and_update();
            {
                let state = self.state.lock();
                if let Some(live) = &state.live {
                    return Ok(live.clone());
                }
                if let Some(failed) = &state.failed
                    && (seen > begun || (failed.silent && seen == begun && seen > 0))
                {
                    return Err(Error::Connect {
                        endpoint: self.endpoint.to_string(),
                        source: failed.source.clone(),
                    });
                }
            }
            self.wanted.notify_one();
            if finished.changed().await.is_err() {
                unreachable!("the link owns the sender");
            }
        }
    }

    /// A call on `live` ran out of time: find out whether anybody is there.
    pub(crate) fn suspect(&self, live: &Live) {
        if self.is_current(live) {
            self.suspected.notify_one();
        }
    }

    fn is_current(&self, live: &Live) -> bool {
        let state = self.state.lock();
        state.live.as_ref().is_some_and(|l| l.number == live.number)
    }

    /// Keeps the connection up, for ever; whoever spawns it aborts it.
    pub(crate) async fn keep(self: Arc<Self>) {
        let mut failures = 0;
        loop {
            match self.connect().await {
                Ok(up) => {
                    failures = 0;
                    self.watch_over(up).await;
                    self.state.lock().live = None;
                }
                Err(_) => {
                    let wait = self
                        .tuning
                        .reconnect
                        .backoff(failures, self.clock.random_u64());
                    failures = failures.saturating_add(1);
                    tokio::select! {
                        () = self.wanted.notified() => {}
                        () = self.clock.sleep(wait) => {}
                    }
                }
            }
        }
    }

    /// Returns when the connection is of no more use.
    async fn watch_over(&self, mut up: Up) {
        loop {
            tokio::select! {
                _ = &mut up.driver.0 => return,
                () = self.suspected.notified() => {}
            }
            let fresh = {
                let Up { ping, driver, .. } = &mut up;
                let pong = ping.ping(Ping::opaque());
                tokio::pin!(pong);
                let patience = self.clock.sleep(self.tuning.ping_patience);
                tokio::select! {
                    _ = &mut driver.0 => return,
                    answer = &mut pong => match answer {
                        Ok(_) => { self.breaker.alive(); continue }
                        Err(_) => return,
                    },
                    () = patience => {}
                }
                // Silence. Calls are refused until somebody answers, here or on a second connection.
                tracing::warn!(endpoint = %self.endpoint, "node does not answer; calls are refused until it does");
                self.breaker.hold_open();
                tokio::select! {
                    _ = &mut driver.0 => return,
                    answer = &mut pong => match answer {
                        Ok(_) => None,
                        Err(_) => return,
                    },
                    fresh = self.connect_at_last() => Some(fresh),
                }
            };
            self.breaker.alive();
            if let Some(fresh) = fresh {
                up = fresh;
            }
        }
    }

    /// Attempts until one succeeds.
    async fn connect_at_last(&self) -> Up {
        let mut attempt = 0;
        loop {
            if let Ok(up) = self.connect().await {
                return up;
            }
            let wait = self
                .tuning
                .reconnect
                .backoff(attempt, self.clock.random_u64());
            attempt = attempt.saturating_add(1);
            self.clock.sleep(wait).await;
        }
    }

    /// One attempt, on record from its beginning to its end.
    async fn connect(&self) -> Result<Up, ()> {
        let number = {
            let mut state = self.state.lock();
            state.begun += 1;
            state.begun
        };
        let deadline = self.clock.now().after(self.tuning.connect_timeout);
        let outcome = within(&*self.clock, deadline, self.dial(number)).await;
        let outcome = {
            let mut state = self.state.lock();
            match outcome {
                Some(Ok(up)) => {
                    state.live = Some(up.live.clone());
                    state.failed = None;
                    Ok(up)
                }
                Some(Err(error)) => {
                    state.failed = Some(Failed {
                        source: Arc::new(error),
                        silent: false,
                    });
                    Err(())
                }
                None => {
                    state.failed = Some(Failed {
                        source: Arc::new(io::ErrorKind::TimedOut.into()),
                        silent: true,
                    });
                    Err(())
                }
            }
        };
        if outcome.is_ok() {
            self.breaker.success();
        }
        self.finished.send_modify(|finished| *finished = number);
        outcome
    }

    async fn dial(&self, number: u64) -> io::Result<Up> {
        match &self.endpoint {
            Endpoint::Tcp { host, port } => {
                let io = endpoint::connect_tcp(host, *port).await?;
                self.handshake(io, number).await
            }
            Endpoint::Unix(path) => {
                let io = UnixStream::connect(path).await?;
                self.handshake(io, number).await
            }
        }
    }

    async fn handshake<T>(&self, io: T, number: u64) -> io::Result<Up>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (send, mut connection) = h2::client::Builder::new()
            .initial_window_size(self.tuning.stream_window_bytes)
            .initial_connection_window_size(self.tuning.connection_window_bytes)
            .max_frame_size(self.tuning.max_frame_bytes)
            .max_send_buffer_size(self.tuning.send_buffer_bytes)
            .enable_push(false)
            .handshake(io)
            .await
            .map_err(io::Error::other)?;
        let mut ping = connection
            .ping_pong()
            .expect("a new connection has its ping handle");
        let driver = Driver(tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
        }));
        ping.ping(Ping::opaque()).await.map_err(io::Error::other)?;
        Ok(Up {
            live: Live {
                send: Arc::new(send),
                permits: Arc::new(Semaphore::new(self.tuning.streams.max(1))),
                number,
            },
            ping,
            driver,
        })
    }
}

/// A connection with the two handles that only its keeper uses.
struct Up {
    live: Live,
    ping: PingPong,
    driver: Driver,
}

/// The task that moves a connection's bytes; it ends with its owner.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}
