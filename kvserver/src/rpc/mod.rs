//! The gRPC service: decode, one call, encode.
//!
//! ```text
//! TCP ──┐ accept   ┌── thread 0: connection ──┐  /Get /Put ──► get.rs put.rs   own frames, below tonic's codec
//! Unix ─┴──────────┼── thread 1: connection ──┼──► dispatch ─► blocks.rs       tonic's generated service
//!                  └── …                      ┘               health
//! ```
//!
//! A connection lives on one thread with a runtime of its own: its calls, its socket and its timers wake
//! nobody else, which is most of a small call's latency. Deadlines ([`deadline`]) hold for every
//! call, whether its caller names one or not; owners of leases are counted per connection
//! (`blocks::owners`); [`status`] alone makes a status.
//! Units: bytes, milliseconds. Errors: [`RpcError`] at start; afterwards every failure is a status.
//! Why hyper and not tonic's server: it lets a connection's end release leases at once and a stream be
//! cut from outside, and it has no router between the socket and the method.

mod blocks;
mod body;
mod cluster;
mod connection;
mod deadline;
mod dispatch;
mod get;
mod hello;
mod lane;
mod listen;
mod owners;
mod put;
mod status;
mod unary;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::HeaderMap;
use kvproto::{
    Reason,
    v1::{blocks_server::BlocksServer, cluster_server::ClusterServer},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic_health::{
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};

pub(crate) use self::status::{REASON_TRAILER, kind as error_kind};
use self::{blocks::BlocksRpc, cluster::ClusterRpc, deadline::DeadlineLimits, listen::Listeners};
use crate::{
    blocks::{Blocks, owners::Owners},
    clock::Clock,
    config::Config,
    engine::TenantId,
    peers::{PEER_HEADER, TENANT_HEADER},
    telemetry::{Metrics, metrics::Method},
};

/// Full name of the service.
pub(crate) const SERVICE: &str = "terrace.v1.Blocks";

/// Full name of the service of members.
pub(crate) const CLUSTER_SERVICE: &str = "terrace.v1.Cluster";

/// After the last call of a draining node: time for its last bytes to be read, before connections of
/// peers that do not say goodbye are closed.
const LINGER: Duration = Duration::from_secs(1);

/// Why the service could not start.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// The TCP address cannot be had.
    #[error(
        "cannot listen on {address}: {source}; choose another with --listen, or stop who uses it (`ss -ltnp`)"
    )]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The Unix socket cannot be had.
    #[error("cannot listen on {}: {source}; choose another path with --unix-socket, or \"off\"", path.display())]
    Unix {
        /// The path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// Sizes of the transport, each from the configuration where its reason stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transport {
    pub(crate) stream_window_bytes: u32,
    pub(crate) connection_window_bytes: u32,
    pub(crate) max_frame_bytes: u32,
    pub(crate) max_streams: u32,
    pub(crate) keepalive_interval: Duration,
    pub(crate) keepalive_timeout: Duration,
}

/// Bounds of what one call may ask.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallLimits {
    pub(crate) max_calls: usize,
    /// Of them, by other nodes.
    pub(crate) peer_calls: usize,
    pub(crate) max_watchers: usize,
    pub(crate) max_message_bytes: usize,
    pub(crate) max_block_bytes: u64,
    pub(crate) piece_bytes: u32,
    /// Of watch streams.
    pub(crate) lifetimes: DeadlineLimits,
    /// Of every other call.
    pub(crate) deadlines: DeadlineLimits,
}

/// What every call can reach.
pub(crate) struct Shared {
    pub(crate) blocks: Arc<Blocks>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) owners: Arc<Owners>,
    pub(crate) limits: CallLimits,
    pub(crate) transport: Transport,
    pub(crate) generated: BlocksServer<BlocksRpc>,
    pub(crate) cluster: ClusterServer<ClusterRpc>,
    pub(crate) health: HealthServer<HealthService>,
    /// Set first when the node stops: new calls are refused, streams without an end are ended.
    pub(crate) draining: CancellationToken,
    /// Set last: whatever still runs is dropped.
    pub(crate) abort: CancellationToken,
    calls: AtomicUsize,
    peer_calls: AtomicUsize,
    pub(crate) watchers: AtomicUsize,
    /// Told when the last call is over.
    idle: Notify,
    refusing: AtomicBool,
}

/// A call that was let in; dropping it makes room for another.
pub(crate) struct Admitted {
    shared: Arc<Shared>,
    /// Who calls.
    pub(crate) tenant: TenantId,
    /// How long it may take.
    pub(crate) time: Duration,
    peer: Option<PeerSeat>,
}

impl Shared {
    /// Ends when no call is being served.
    async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            // Listens before it looks, so that the last call cannot end unheard in between.
            idle.as_mut().enable();
            if self.calls.load(Ordering::Acquire) == 0 {
                return;
            }
            idle.await;
        }
    }

    /// Lets a call in, or says why not.
    pub(crate) fn admit(
        self: &Arc<Self>,
        method: Method,
        headers: &HeaderMap,
    ) -> Result<Admitted, Status> {
        if self.refusing.load(Ordering::Relaxed) {
            return Err(status::refuse(
                Reason::Draining,
                "this node is stopping; ask another, or try again later",
            ));
        }
        let limits = if matches!(method, Method::Watch | Method::Drain) {
            self.limits.lifetimes
        } else {
            self.limits.deadlines
        };
        let time = limits.of(headers).map_err(|e| status::field(&e))?;
        let credential = headers
            .get(http::header::AUTHORIZATION)
            .map(http::HeaderValue::as_bytes);
        let acts_for = headers.get(TENANT_HEADER).map(http::HeaderValue::as_bytes);
        let tenants = self.blocks.tenants();
        // Of a cluster's own calls none touches a tenant's blocks.
        let of_cluster = || method.is_of_cluster() && tenants.is_peer(credential);
        let tenant = tenants.authenticate_for(credential, acts_for);
        let Some(tenant) = tenant.or_else(|| of_cluster().then_some(TenantId(0))) else {
            let problem = "authorization: expected \"Bearer <token>\" with a token this node knows";
            return Err(status::refuse(Reason::Unauthenticated, problem));
        };
        // A node has a bound of its own, so that no move keeps a client out; and nobody but a node draws on it, so
        // that no client keeps moves out.
        let is_peer = headers.contains_key(PEER_HEADER) && tenants.is_peer(credential);
        let peer = match is_peer {
            true => Some(PeerSeat::take(self)?),
            false => None,
        };
        if self.calls.fetch_add(1, Ordering::Relaxed) >= self.limits.max_calls {
            self.calls.fetch_sub(1, Ordering::Relaxed);
            let problem = format!(
                "{} calls are being served already (max_calls)",
                self.limits.max_calls
            );
            return Err(status::refuse(Reason::Overloaded, problem));
        }
        self.metrics.calls_in_flight.inc();
        Ok(Admitted {
            shared: Arc::clone(self),
            tenant,
            time,
            peer,
        })
    }
}

/// One of `peer_calls`.
struct PeerSeat(Arc<Shared>);

impl PeerSeat {
    fn take(shared: &Arc<Shared>) -> Result<Self, Status> {
        let most = shared.limits.peer_calls;
        if shared.peer_calls.fetch_add(1, Ordering::Relaxed) >= most {
            shared.peer_calls.fetch_sub(1, Ordering::Relaxed);
            let problem = format!("{most} calls of nodes are being served already (peer_calls)");
            return Err(status::refuse(Reason::Overloaded, problem));
        }
        shared.metrics.motion.peer_calls.inc();
        Ok(Self(Arc::clone(shared)))
    }
}

impl Drop for PeerSeat {
    fn drop(&mut self) {
        self.0.peer_calls.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.motion.peer_calls.dec();
    }
}

impl Admitted {
    /// Whether another node calls.
    fn is_peer(&self) -> bool {
        self.peer.is_some()
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if self.shared.calls.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.idle.notify_waiters();
        }
        self.shared.metrics.calls_in_flight.dec();
    }
}

/// The running service.
pub(crate) struct Rpc {
    shared: Arc<Shared>,
    listeners: Listeners,
    health: HealthReporter,
}

impl Rpc {
    /// Binds the addresses and serves.
    pub(crate) async fn start(
        config: &Config,
        unix_socket: Option<PathBuf>,
        blocks: Arc<Blocks>,
        owners: Arc<Owners>,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, RpcError> {
        let health = HealthReporter::new();
        health
            .set_service_status("", tonic_health::ServingStatus::Serving)
            .await;
        health
            .set_service_status(SERVICE, tonic_health::ServingStatus::Serving)
            .await;
        let limits = CallLimits {
            max_calls: config.max_calls,
            peer_calls: config.peer_calls,
            max_watchers: config.max_watchers,
            max_message_bytes: narrow(config.max_message_bytes) as usize,
            max_block_bytes: config.max_block_bytes,
            piece_bytes: narrow(config.piece_bytes),
            lifetimes: DeadlineLimits {
                default: config.watch_max_lifetime,
                most: config.watch_max_lifetime,
            },
            deadlines: DeadlineLimits {
                default: config.call_deadline,
                most: config.call_max_deadline,
            },
        };
        let shared = Arc::new(Shared {
            generated: BlocksServer::new(BlocksRpc)
                .max_decoding_message_size(limits.max_message_bytes),
            cluster: ClusterServer::new(ClusterRpc)
                .max_decoding_message_size(limits.max_message_bytes),
            health: HealthServer::new(HealthService::from_health_reporter(health.clone())),
            owners,
            blocks,
            metrics,
            clock,
            limits,
            transport: Transport {
                stream_window_bytes: narrow(config.stream_window_bytes),
                connection_window_bytes: narrow(config.connection_window_bytes),
                max_frame_bytes: narrow(config.max_frame_bytes),
                max_streams: config.max_streams_per_connection,
                keepalive_interval: config.keepalive_interval,
                keepalive_timeout: config.keepalive_timeout,
            },
            draining: CancellationToken::new(),
            abort: CancellationToken::new(),
            calls: AtomicUsize::new(0),
            peer_calls: AtomicUsize::new(0),
            watchers: AtomicUsize::new(0),
            idle: Notify::new(),
            refusing: AtomicBool::new(false),
        });
        let listeners = Listeners::start(config, unix_socket, Arc::clone(&shared)).await?;
        Ok(Self {
            shared,
            listeners,
            health,
        })
    }

    /// Address of the TCP listener, with the port that was chosen.
    pub(crate) fn address(&self) -> SocketAddr {
        self.listeners.address()
    }

    /// Path of the Unix socket.
    pub(crate) fn unix_socket(&self) -> Option<&Path> {
        self.listeners.unix_socket()
    }

    /// Ends everything at once, without waiting for it.
    pub(crate) fn cut(&self) {
        self.shared.refusing.store(true, Ordering::Relaxed);
        self.shared.abort.cancel();
        self.shared.draining.cancel();
    }

    /// Refuses new calls, waits for the running ones until `deadline` has passed, then drops them.
    pub(crate) async fn shutdown(self, deadline: Duration) {
        self.shared.refusing.store(true, Ordering::Relaxed);
        self.health
            .set_service_status("", tonic_health::ServingStatus::NotServing)
            .await;
        self.health
            .set_service_status(SERVICE, tonic_health::ServingStatus::NotServing)
            .await;
        self.shared.draining.cancel();
        let shared = self.shared;
        let late = shared.clock.sleep(deadline);
        let quiet = async {
            shared.idle().await;
            shared.clock.sleep(LINGER).await;
        };
        let stopped = self.listeners.stopped();
        tokio::pin!(stopped);
        tokio::select! {
            () = &mut stopped => return,
            () = quiet => tracing::debug!("closing connections whose peers do not answer"),
            () = late => tracing::warn!("calls are still running at the deadline; cutting them"),
        }
        shared.abort.cancel();
        stopped.await;
    }
}

/// Sizes that the configuration bounds far below 4 GiB.
fn narrow(bytes: u64) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
