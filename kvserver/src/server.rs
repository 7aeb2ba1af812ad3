//! One node: everything built, wired, and taken down in order.
//!
//! ```text
//! start     data folder locked ─► arena ─► engine ─► tiers (their blocks join the index) ─► mover ─► local, rpc, console
//! shutdown  calls refused, running ones finish ─► mover's work finishes ─► RAM-only blocks saved ─► tiers close ─► console
//! ```
//!
//! Background work has a runtime of its own and calls have threads of their own, so a node can be started
//! inside any tokio program, a test's single thread included.
//! Errors: [`NodeError`], each with what to do next. A tier that cannot be opened does not stop the node:
//! it is reported and the node works without it.

mod build;
mod entry;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kvgpu::ArenaError;
use kvproto::Reason;
use tokio::runtime::{Handle, Runtime};

use self::build::build;
use crate::{
    blocks::{
        Blocks,
        mover::{Mover, Saved},
        tenants::TenantsError,
    },
    clock::{Clock, SystemClock},
    cluster::{Cluster, JoinError, KeptError, Membership},
    config::{Chosen, Config, ConfigError, fits_memory},
    console::{Console, ConsoleError},
    data_dir::DataDirError,
    engine::EngineConfigError,
    local::{Local, LocalError},
    rpc::{Rpc, RpcError},
    tier::Tier,
};

/// Threads for the mover, the tiers and the console; the disk's own threads come on top.
const BACKGROUND_THREADS: usize = 2;

/// Why a node could not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data folder.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// No memory for blocks.
    #[error("cannot get memory for blocks: {0}; ask for less with --ram-bytes")]
    Arena(#[from] ArenaError),
    /// The engine's settings do not fit together.
    #[error("engine setting {0}")]
    Engine(#[from] EngineConfigError),
    /// There is no such policy.
    #[error("policy = {name:?}: expected one of {known}")]
    Policy {
        /// The name.
        name: String,
        /// Those there are.
        known: String,
    },
    /// The file of tenants.
    #[error(transparent)]
    Tenants(#[from] TenantsError),
    /// The registry of namespaces or the secret.
    #[error("namespaces: {0}")]
    Namespaces(io::Error),
    /// The gRPC service.
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// The cluster.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// What is kept of it.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// The same-host path.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The background runtime.
    #[error("cannot start background threads: {0}")]
    Runtime(io::Error),
}

/// A running node. Dropping it stops it without draining.
pub struct Node {
    config: Config,
    chosen: Chosen,
    blocks: Arc<Blocks>,
    mover: Arc<Mover>,
    /// Its tasks end with the node.
    membership: Option<Membership>,
    rpc: Option<Rpc>,
    local: Option<Local>,
    console: Option<Console>,
    grpc_address: SocketAddr,
    unix_socket: Option<PathBuf>,
    local_socket: Option<PathBuf>,
    http_address: Option<SocketAddr>,
    clock: Arc<dyn Clock>,
    background: Background,
}

impl Node {
    /// Builds and starts a node; it takes calls when this returns.
    ///
    /// # Errors
    /// [`NodeError`] says what is wrong and what to do next.
    pub async fn start(config: Config) -> Result<Self, NodeError> {
        Self::start_around(config, |tier, _| tier).await
    }

    /// As [`Node::start`], with every tier handed through `around` once it is open: how a node is tested against
    /// disks that fail ([`FaultyTier`](crate::tier::FaultyTier)).
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn start_around(
        config: Config,
        around: impl Fn(Arc<dyn Tier>, &Arc<dyn Clock>) -> Arc<dyn Tier> + Send + 'static,
    ) -> Result<Self, NodeError> {
        config.validate()?;
        fits_memory(&config)?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let background = Background::new().map_err(NodeError::Runtime)?;
        let building = background
            .handle()
            .spawn(build(config.clone(), Arc::clone(&clock), around));
        let parts = match building.await {
            Ok(parts) => parts?,
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        };
        Ok(Self {
            grpc_address: parts.rpc.address(),
            unix_socket: parts.rpc.unix_socket().map(Path::to_owned),
            local_socket: parts.local.as_ref().map(|local| local.path().to_owned()),
            http_address: parts.console.as_ref().map(Console::address),
            config,
            chosen: parts.chosen,
            blocks: parts.blocks,
            mover: parts.mover,
            membership: Some(parts.membership),
            rpc: Some(parts.rpc),
            local: parts.local,
            console: parts.console,
            clock,
            background,
        })
    }

    /// The node's work, without a network in between.
    #[must_use]
    pub fn blocks(&self) -> &Arc<Blocks> {
        &self.blocks
    }

    /// Who is here, as this node sees it.
    #[must_use]
    pub fn cluster(&self) -> &Arc<Cluster> {
        self.blocks.cluster()
    }

    /// The settings it runs with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The sizes that were chosen, and why.
    #[must_use]
    pub fn chosen(&self) -> &Chosen {
        &self.chosen
    }

    /// Address of the gRPC service over TCP.
    #[must_use]
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc_address
    }

    /// The gRPC service as a URL.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.grpc_address)
    }

    /// Path of the Unix socket.
    #[must_use]
    pub fn uds_path(&self) -> Option<&Path> {
        self.unix_socket.as_deref()
    }

    /// Path of the same-host path's socket.
    #[must_use]
    pub fn local_path(&self) -> Option<&Path> {
        self.local_socket.as_deref()
    }

    /// Address of the console.
    #[must_use]
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http_address
    }

    /// Refuses new calls, lets the running ones and queued writes finish, writes what is only in RAM to NVMe as far
    /// as time and wear allow, closes the tiers. What is not done after `deadline` is cut. Answers what was kept.
    pub async fn shutdown(mut self, deadline: Duration) -> Saved {
        let (rpc, local, console) = (self.rpc.take(), self.local.take(), self.console.take());
        let membership = self.membership.take();
        let (mover, clock, blocks) = (
            Arc::clone(&self.mover),
            Arc::clone(&self.clock),
            Arc::clone(&self.blocks),
        );
        let tiers = blocks.tiers.clone();
        let saves = self.config.shutdown_save && tiers.nvme.is_some();
        let draining = self.background.handle().spawn(async move {
            let started = clock.now();
            if let Some(console) = &console {
                console.draining();
            }
            let local = tokio::task::spawn_blocking(move || {
                if let Some(local) = local {
                    local.shutdown(deadline);
                }
            });
            if let Some(rpc) = rpc {
                rpc.shutdown(deadline).await;
            }
            let _ = local.await; // a panic there was logged there
            if let Some(motion) = blocks.motion() {
                motion.stop().await;
            }
            let left = deadline
                .saturating_sub(clock.now().since(started))
                .max(LAST_MOMENT);
            let until = clock.now().after(left.saturating_sub(LAST_MOMENT));
            let closing = async {
                mover.stop().await;
                let saved = match saves {
                    true => mover.save(until).await,
                    false => Saved::default(),
                };
                for tier in tiers.iter() {
                    tier.close().await;
                }
                saved
            };
            let saved = tokio::select! {
                saved = closing => saved,
                () = clock.sleep(left) => {
                    tracing::warn!("tiers were not closed in time; what was queued is lost");
                    Saved::default()
                }
            };
            if saves {
                let Saved {
                    kept_blocks,
                    kept_bytes,
                    left_blocks,
                    left_bytes,
                    why,
                } = saved;
                let why = why.map_or("", Reason::as_str);
                tracing::info!(
                    kept_blocks,
                    kept_bytes,
                    left_blocks,
                    left_bytes,
                    why,
                    "what was only in RAM is on NVMe, or left behind"
                );
            }
            if let Some(console) = console {
                console.stop().await;
            }
            if let Some(membership) = membership {
                tokio::select! {
                    () = membership.stop() => {}
                    () = clock.sleep(LAST_MOMENT) => {
                        tracing::warn!("the view of the cluster is still being written; its disk hangs");
                    }
                }
            }
            saved
        });
        draining.await.unwrap_or_else(|_| {
            tracing::error!("draining failed");
            Saved::default()
        })
    }
}

impl Drop for Node {
    /// What was not drained is cut: connections close, and their threads end.
    fn drop(&mut self) {
        if let Some(rpc) = &self.rpc {
            rpc.cut();
        }
        if let Some(local) = &self.local {
            local.cut();
        }
    }
}

/// Tiers get this long to close even when the calls have used up the deadline.
const LAST_MOMENT: Duration = Duration::from_millis(500);

/// A runtime that may be dropped anywhere: tokio's own must not be dropped by a task.
struct Background(Option<Runtime>);

impl Background {
    fn new() -> io::Result<Self> {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(BACKGROUND_THREADS)
            .thread_name("terrace-background")
            .enable_all()
            .build()
            .map(|runtime| Self(Some(runtime)))
    }

    fn handle(&self) -> &Handle {
        self.0.as_ref().expect("taken only by drop").handle()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
