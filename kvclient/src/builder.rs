//! Settings of a client.

use std::{sync::Arc, time::Duration};

use http::HeaderValue;
use kvproto::OwnerId;

use crate::{
    blocking,
    call::Waits,
    client::Client,
    clock::{Clock, SystemClock},
    endpoint::Endpoint,
    error::Error,
    fleet::{Fleet, Recipe},
    link::Tuning,
    path::LocalPath,
    retry::{BreakerPolicy, RetryBudget, RetryPolicy},
};

/// Most multiplexed connections to one node.
pub const MAX_CONNECTIONS: usize = 64;

/// Most calls at once to one node.
pub const MAX_LANES: usize = 256;

/// Calls that one large request is cut into and that run at once.
const PARALLEL: usize = 4;

/// Makes a [`Client`]. Every setting has a default that serves one engine beside one node. Numbers of connections and calls
/// are those to one node; in a cluster each member has as many.
#[derive(Clone, Debug)]
#[must_use]
pub struct ClientBuilder {
    endpoints: Result<Vec<Endpoint>, String>,
    deadline: Duration,
    connections: usize,
    lanes: usize,
    local: LocalPath,
    tuning: Tuning,
    retry: RetryPolicy,
    breaker: BreakerPolicy,
    token: Option<String>,
    owner: Option<OwnerId>,
    clock: Arc<dyn Clock>,
}

impl ClientBuilder {
    /// A client of the node at `endpoint`: `host:port`, `http://host:port` or `unix:/path`. Several, with commas between
    /// them, are nodes of one cluster, of which any may be away: the rest of the cluster is learned from whoever answers.
    pub fn new(endpoint: &str) -> Self {
        let endpoints = endpoint
            .split(',')
            .map(str::trim)
            .map(|one| one.parse().map_err(|_: Error| one.to_owned()));
        Self {
            endpoints: endpoints.collect(),
            deadline: Duration::from_secs(5),
            connections: 1,
            lanes: 16,
            local: LocalPath::Auto,
            tuning: Tuning::default(),
            retry: RetryPolicy::default(),
            breaker: BreakerPolicy::default(),
            token: None,
            owner: None,
            clock: Arc::new(SystemClock::new()),
        }
    }

    /// How long one call may take, its repeats included. Default 5 s.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Most multiplexed connections, 1 to 64, which carry watches and tell whether the node is well. Default 1.
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections.clamp(1, MAX_CONNECTIONS);
        self
    }

    /// Calls that run at once, 1 to 256; each has a connection of its own, kept for the next call. More calls
    /// wait, within their deadline. Default 16.
    pub fn lanes(mut self, lanes: usize) -> Self {
        self.lanes = lanes.clamp(1, MAX_LANES);
        self
    }

    /// Whether blocks go through shared memory when client and node share a host. Default [`LocalPath::Auto`].
    pub fn local(mut self, local: LocalPath) -> Self {
        self.local = local;
        self
    }

    /// Windows, frames and patience of each connection.
    pub fn tuning(mut self, tuning: Tuning) -> Self {
        self.tuning = tuning;
        self
    }

    /// How often and how patiently a call is repeated.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// When the node is left alone.
    pub fn breaker(mut self, breaker: BreakerPolicy) -> Self {
        self.breaker = breaker;
        self
    }

    /// Credential, sent as `authorization: Bearer <token>`. The node derives the tenant from it.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// To whom its leases belong: clients of one owner, in whatever processes, share them, and the node takes them
    /// back when the last of their connections has closed. Default: an owner of its own.
    pub fn owner(mut self, owner: OwnerId) -> Self {
        self.owner = Some(owner);
        self
    }

    /// Time and chance; tests give their own.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// A client whose connection stands.
    ///
    /// # Errors
    /// [`Error::Endpoint`]; [`Error::Connect`] or [`Error::Deadline`] when nobody answers in time.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn connect(self) -> Result<Client, Error> {
        let budget = self.deadline;
        let client = self.connect_lazily()?;
        client.prove(budget).await?;
        Ok(client)
    }

    /// The same for callers on threads of their own.
    ///
    /// # Errors
    /// As [`ClientBuilder::connect`]; [`Error::Connect`] when the machine gives no thread.
    ///
    /// # Panics
    /// Within a task of a tokio runtime.
    pub fn connect_blocking(self) -> Result<blocking::Client, Error> {
        blocking::Client::make(self, false)
    }

    /// As [`ClientBuilder::connect_lazily`], for callers on threads of their own.
    ///
    /// # Errors
    /// As there; [`Error::Connect`] when the machine gives no thread.
    ///
    /// # Panics
    /// Within a task of a tokio runtime.
    pub fn connect_lazily_blocking(self) -> Result<blocking::Client, Error> {
        blocking::Client::make(self, true)
    }

    /// The endpoints as they were told.
    pub(crate) fn told(&self) -> String {
        match &self.endpoints {
            Ok(endpoints) => {
                let endpoints: Vec<_> = endpoints.iter().map(ToString::to_string).collect();
                endpoints.join(",")
            }
            Err(text) => text.clone(),
        }
    }

    /// A client that connects with its first call: for an engine that may start before the node does.
    ///
    /// # Errors
    /// [`Error::Endpoint`] when the endpoint or the token cannot be used.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn connect_lazily(self) -> Result<Client, Error> {
        let endpoints = match self.endpoints {
            Ok(endpoints) => endpoints,
            // Reading it again gives the error again.
            Err(text) => vec![text.parse()?],
        };
        let token = self.token;
        let authorization = token.as_ref().map(|token| {
            let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| {
                kvproto::FieldError::new("token", "has characters that no header may hold")
            })?;
            value.set_sensitive(true);
            Ok::<_, kvproto::FieldError>(value)
        });
        let owner = self.owner.unwrap_or_else(|| {
            let mut owner = [0; 16];
            owner[..8].copy_from_slice(&self.clock.random_u64().to_le_bytes());
            owner[8..].copy_from_slice(&self.clock.random_u64().to_le_bytes());
            OwnerId(owner)
        });
        let recipe = Recipe {
            connections: self.connections,
            lanes: self.lanes,
            parallel: PARALLEL.min(self.lanes),
            local: self.local,
            tuning: self.tuning,
            retry: self.retry,
            breaker: self.breaker,
            budget: Arc::new(RetryBudget::new()),
            token,
            authorization: authorization.transpose()?,
            owner,
            clock: self.clock,
            views: Arc::default(),
            runtime: tokio::runtime::Handle::current(),
        };
        Ok(Client {
            fleet: Arc::new(Fleet::new(recipe, endpoints)),
            deadline: self.deadline,
            waits: Waits::Task,
        })
    }
}
