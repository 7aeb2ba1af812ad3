//! The node as one engine process sees it: two clients, one open namespace each, kept up in the background.
//!
//! ```text
//!              ┌ asking   lookups, leases; one thread of its own, so that no copy delays an answer
//! NodeLink ───►┤
//!              └ moving   loads and saves; a few threads
//!
//! connecting ──opened──► ready ──a call found nobody──► down ──opened again──► ready …
//!                          └──────── the keeper tries: at once, then ever more seldom, up to RETRY_CAP ─┘
//! ```
//!
//! Units: durations.
//! Errors: none come out: a node that is not ready is an answer. [`NodeLink::problem`] says why, in one line.
//! Why "down" after a single call: while the keeper asks whether anybody is there, engines compute instead of waiting for a
//! deadline each; a false alarm costs the few lookups of one round trip.
//! Why both clients open the namespace: each learns from the answer where the node's local socket is.

use std::{sync::Arc, time::Duration};

use kvclient::{
    Client, ClientBuilder, Error, ErrorKind, Namespace, NamespaceHandle, OwnerId, Path, PathReport,
    clock::{Clock, SystemClock},
};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::counters::Counters;

/// First pause between two tries to open the namespace; doubles.
const RETRY_FIRST: Duration = Duration::from_millis(50);

/// Longest pause between two tries.
const RETRY_CAP: Duration = Duration::from_secs(2);

/// How long one try may take.
const TRY_DEADLINE: Duration = Duration::from_secs(2);

/// How a node is reached.
#[derive(Clone, Debug)]
pub struct NodeSettings {
    /// `host:port`, `http://host:port` or `unix:/path`.
    pub endpoint: String,
    /// To whom leases belong.
    pub owner: Option<OwnerId>,
    /// Credential.
    pub token: Option<String>,
    /// "auto", "off", or the path of the node's local socket.
    pub local: String,
    /// Refuse a label that is known with another fingerprint.
    pub strict: bool,
}

/// Whether the node is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Not opened yet.
    Connecting,
    /// Open.
    Ready,
    /// Was open, and is away now; or it refused the namespace.
    Down,
}

impl NodeState {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Ready => "ready",
            Self::Down => "down",
        }
    }
}

/// A client and the namespace that it opened.
#[derive(Clone, Debug)]
pub struct Way {
    /// Whom to call.
    pub client: Client,
    /// In which namespace.
    pub namespace: NamespaceHandle,
}

impl Way {
    /// Whether blocks go through shared memory.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.client.path().path == Path::Local
    }
}

/// The node as one engine process sees it.
#[derive(Debug)]
pub struct NodeLink {
    spec: Namespace,
    strict: bool,
    /// Time of this process; `kvclient` alone reads the machine's.
    pub clock: Arc<SystemClock>,
    /// What has been done.
    pub counters: Counters,
    state: Mutex<State>,
    lost: Notify,
}

#[derive(Debug)]
struct State {
    state: NodeState,
    /// The one that asks, and the one that moves, until it was hung up.
    clients: Result<[Client; 2], Box<PathReport>>,
    /// Of the client that asks, and of the one that moves.
    handles: Option<[NamespaceHandle; 2]>,
    problem: Option<String>,
}

impl NodeSettings {
    /// A client with these settings, which connects with its first call.
    ///
    /// # Errors
    /// When the endpoint, the token or `local` cannot be used.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn client(&self) -> Result<Client, Error> {
        self.builder().connect_lazily()
    }

    /// These settings.
    pub fn builder(&self) -> ClientBuilder {
        let Ok(local) = self.local.parse();
        let mut builder = Client::builder(&self.endpoint).local(local);
        if let Some(owner) = self.owner {
            builder = builder.owner(owner);
        }
        if let Some(token) = &self.token {
            builder = builder.token(token.clone());
        }
        builder
    }
}

impl NodeLink {
    /// Of two clients that need not have connected yet.
    #[must_use]
    pub fn new(asking: Client, moving: Client, spec: Namespace, strict: bool) -> Self {
        Self {
            spec,
            strict,
            clock: Arc::default(),
            counters: Counters::default(),
            state: Mutex::new(State {
                state: NodeState::Connecting,
                clients: Ok([asking, moving]),
                handles: None,
                problem: None,
            }),
            lost: Notify::new(),
        }
    }

    /// Whether the node is asked.
    #[must_use]
    pub fn state(&self) -> NodeState {
        self.state.lock().state
    }

    /// One line: what differs from the namespace last opened under this label, or why it could not be opened.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let state = self.state.lock();
        let differs = || Some(state.handles.as_ref()?[0].difference()?.to_owned());
        state.problem.clone().or_else(differs)
    }

    /// For lookups; `None` while the node is not ready.
    #[must_use]
    pub fn asking(&self) -> Option<Way> {
        self.way(0)
    }

    /// For loads and saves; `None` while the node is not ready.
    #[must_use]
    pub fn moving(&self) -> Option<Way> {
        self.way(1)
    }

    /// Which way loads and saves go, and what went.
    #[must_use]
    pub fn path(&self) -> PathReport {
        match &self.state.lock().clients {
            Ok([_, moving]) => moving.path(),
            Err(last) => PathReport::clone(last),
        }
    }

    /// A call failed: its reason in one line. Takes the node for lost if that says so.
    pub fn failed(&self, error: &Error) -> String {
        let reason = line(error);
        if !matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Refresh) {
            tracing::debug!(reason, "a call failed");
            return reason;
        }
        let mut state = self.state.lock();
        if state.state == NodeState::Ready {
            state.state = NodeState::Down;
            state.problem = Some(reason.clone());
            drop(state);
            self.counters.lost.add(1);
            tracing::warn!(reason, "the node is away; going on without it");
            self.lost.notify_one();
        }
        reason
    }

    /// Asks nobody any more.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.state = NodeState::Down;
        state.handles = None;
        state.problem = Some("the cache was closed".to_owned());
    }

    /// Ends the connections, and with them every lease and all staging that the node has granted through them.
    pub fn hang_up(&self) {
        let last = Box::new(self.path());
        // Without the lock: what a connection does when it goes is its own affair.
        let clients = std::mem::replace(&mut self.state.lock().clients, Err(last));
        drop(clients);
    }

    /// Keeps the namespace open until dropped.
    pub async fn keep(&self) {
        loop {
            let mut pause = RETRY_FIRST;
            while let Err(error) = self.open().await {
                self.refused(&error);
                self.clock.sleep(pause).await;
                pause = (2 * pause).min(RETRY_CAP);
            }
            self.lost.notified().await;
        }
    }

    async fn open(&self) -> Result<(), Error> {
        // Strict with the first: had it been refused, the second would not be asked.
        let Ok([asking, moving]) = self.state.lock().clients.clone() else {
            // Hung up: the one task that opens is gone then.
            return Ok(());
        };
        let asking = self.open_with(asking, self.strict).await?;
        let moving = self.open_with(moving, false).await?;
        let mut state = self.state.lock();
        if state.handles.is_none()
            && let Some(difference) = asking.difference()
        {
            tracing::warn!(
                label = asking.label(),
                difference,
                "other bytes are kept under this label: not shared"
            );
        }
        state.handles = Some([asking, moving]);
        state.state = NodeState::Ready;
        state.problem = None;
        drop(state);
        self.counters.opened.add(1);
        Ok(())
    }

    async fn open_with(&self, client: Client, strict: bool) -> Result<NamespaceHandle, Error> {
        let client = client.with_deadline(TRY_DEADLINE);
        client.open_namespace(&self.spec, strict).await
    }

    fn refused(&self, error: &Error) {
        let mut state = self.state.lock();
        state.problem = Some(line(error));
        if error.kind() != ErrorKind::Unavailable {
            // Somebody answered, and said no.
            state.state = NodeState::Down;
        }
    }

    fn way(&self, which: usize) -> Option<Way> {
        let state = self.state.lock();
        let handles = state
            .handles
            .as_ref()
            .filter(|_| state.state == NodeState::Ready)?;
        Some(Way {
            client: state.clients.as_ref().ok()?[which].clone(),
            namespace: handles[which].clone(),
        })
    }
}

/// An error and its causes, in one line.
fn line(error: &Error) -> String {
    use std::error::Error as _;
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
