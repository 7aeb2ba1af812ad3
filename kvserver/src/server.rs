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

use std::{
    fs,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kvgpu::{Arena, ArenaConfig, ArenaError, HugePages};
use kvproto::{BootId, Kind, Reason, TierKind};
use tokio::runtime::{Handle, Runtime};

use crate::{
    blocks::{
        BlockLimits, Blocks, Tiers,
        mover::{Mover, ReadLimits, Saved},
        namespaces::{Bounds, Namespaces},
        owners::Owners,
        tenants::{Tenants, TenantsError},
    },
    clock::{Clock, SystemClock},
    config::{Chosen, Config, ConfigError, NvmeAdmission, UnixSocket, choose},
    console::{Console, ConsoleError},
    engine::{Demotion, Engine, EngineConfig, EngineConfigError, KindBudget, policy},
    local::{Local, LocalError},
    rpc::{Rpc, RpcError},
    telemetry::Metrics,
    tier::{
        ReclaimGuard, Tier,
        durable::{DurableConfig, DurableTier},
        nvme::{NvmeConfig, NvmeTier},
    },
};

/// Threads for the mover, the tiers and the console; the disk's own threads come on top.
const BACKGROUND_THREADS: usize = 2;

/// Longest path of a Unix socket on Linux, without its final zero.
const SOCKET_PATH_BYTES: usize = 107;

/// Why a node could not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data folder cannot be made or written.
    #[error("cannot write in the data folder {}: {source}; make it writable for this user, or choose another with --data-dir", path.display())]
    DataDir {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another node uses the data folder.
    #[error("the data folder {} is in use by another node{holder}; stop that one, or choose another with --data-dir", path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
        /// Who, as far as known.
        holder: String,
    },
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
    #[error("cannot use the registry of namespaces: {0}")]
    Namespaces(io::Error),
    /// The gRPC service.
    #[error(transparent)]
    Rpc(#[from] RpcError),
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

/// Everything that is made on the background runtime.
struct Parts {
    chosen: Chosen,
    blocks: Arc<Blocks>,
    mover: Arc<Mover>,
    rpc: Rpc,
    local: Option<Local>,
    console: Option<Console>,
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
        let (mover, clock, tiers) = (
            Arc::clone(&self.mover),
            Arc::clone(&self.clock),
            self.blocks.tiers.clone(),
        );
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

async fn build(
    config: Config,
    clock: Arc<dyn Clock>,
    around: impl Fn(Arc<dyn Tier>, &Arc<dyn Clock>) -> Arc<dyn Tier> + Send,
) -> Result<Parts, NodeError> {
    let data_dir = DataDir::open(&config.data_dir)?;
    let chosen = choose(&config);
    chosen
        .keep(&config)
        .map_err(|source| data_dir.refuse(source))?;
    let tenants = Tenants::load(&config.tokens_file)?;
    let boot_id = BootId(clock.random_u64().max(1));
    let arena = Arena::new(ArenaConfig {
        capacity_bytes: chosen.ram_bytes,
        segment_bytes: segment_bytes(&config, &chosen, tenants.count()),
        huge_pages: if config.huge_pages {
            HugePages::Auto
        } else {
            HugePages::Off
        },
        prefault: config.prefault,
        boot_id: boot_id.0,
    })?;
    let policy = policy::by_name(&config.policy).ok_or_else(|| NodeError::Policy {
        name: config.policy.clone(),
        known: policy::NAMES.join(", "),
    })?;
    let engine = Engine::new(
        engine_config(&config, &chosen),
        Arc::clone(&arena),
        policy,
        Arc::clone(&clock),
    )?;
    let metrics = Metrics::new();
    let mut tiers = open_tiers(&config, &chosen, &engine, &clock).await;
    tiers.nvme = tiers.nvme.map(|tier| around(tier, &clock));
    tiers.durable = tiers.durable.map(|tier| around(tier, &clock));
    let mover = Mover::start(
        Arc::clone(&engine),
        tiers.clone(),
        Arc::clone(&clock),
        Arc::clone(&metrics),
        Handle::current(),
        ReadLimits {
            reads: config.nvme_reads,
            waiting: config.nvme_waiting_reads,
        },
        data_dir,
    );
    let namespaces = Namespaces::open(
        &config.data_dir,
        &config.secret_file,
        Bounds {
            per_tenant: config.max_namespaces,
            total: config.max_namespaces_total,
        },
        &tenants,
        Arc::clone(engine.domains()),
        &*clock,
    )
    .map_err(NodeError::Namespaces)?;
    let blocks = Blocks::new(
        arena,
        engine,
        tiers,
        Arc::clone(&mover),
        namespaces,
        tenants,
        Arc::clone(&metrics),
        Arc::clone(&clock),
        BlockLimits {
            max_blocks_per_call: config.max_blocks_per_call,
            max_block_bytes: config.max_block_bytes,
        },
        boot_id,
    );
    let owners = Arc::new(Owners::new(Arc::clone(&blocks)));
    let local = start_local(&config, &blocks, &owners, &metrics, &clock)?;
    let started = Rpc::start(
        &config,
        socket_path(&config),
        Arc::clone(&blocks),
        owners,
        metrics,
        clock,
    );
    let rpc = match started.await {
        Ok(rpc) => rpc,
        Err(error) => {
            local.inspect(Local::cut);
            return Err(error.into());
        }
    };
    let console = match config.http_listen {
        Some(address) => match Console::start(address, rpc.address(), Arc::clone(&blocks)).await {
            Ok(console) => Some(console),
            Err(error) => {
                local.inspect(Local::cut);
                rpc.shutdown(Duration::ZERO).await;
                return Err(error.into());
            }
        },
        None => None,
    };
    Ok(Parts {
        chosen,
        blocks,
        mover,
        rpc,
        local,
        console,
    })
}

/// Length of a segment. A segment is one tenant's, so with several there have to be several for each.
fn segment_bytes(config: &Config, chosen: &Chosen, tenants: usize) -> u64 {
    const SEGMENTS_PER_TENANT: u64 = 4;
    let length = match tenants as u64 {
        0 | 1 => config.segment_bytes,
        many => {
            let share = chosen.ram_bytes / many.saturating_mul(SEGMENTS_PER_TENANT);
            share.max(config.max_block_bytes).min(config.segment_bytes)
        }
    };
    // An arena has so many segments at most.
    length
        .max(chosen.ram_bytes / kvgpu::arena::MAX_SEGMENTS)
        .min(chosen.ram_bytes)
        .next_multiple_of(kvgpu::PAGE_BYTES as u64)
}

fn engine_config(config: &Config, chosen: &Chosen) -> EngineConfig {
    let share = |percent: u32| {
        chosen.ram_bytes / 100 * u64::from(percent)
            + chosen.ram_bytes % 100 * u64::from(percent) / 100
    };
    let budget = |reserve, ceiling| KindBudget {
        reserve_bytes: share(reserve),
        ceiling_bytes: share(ceiling),
    };
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    EngineConfig {
        shards: config.shards,
        kv: budget(config.kv_reserve_percent, config.kv_ceiling_percent),
        checkpoint: budget(
            config.checkpoint_reserve_percent,
            config.checkpoint_ceiling_percent,
        ),
        lease_default_ttl_ms: millis(config.lease_ttl),
        lease_max_ttl_ms: millis(config.lease_max_ttl),
        lease_bytes_total: share(config.lease_percent),
        lease_bytes_per_owner: share(config.lease_owner_percent),
        overflow_bytes: config.lease_overflow_bytes,
        max_leases: config.max_leases,
        event_ring: config.watch_queue_events,
        demotion: match config.nvme_admission {
            NvmeAdmission::Open => Demotion::Open,
            NvmeAdmission::Reuse => Demotion::Reuse,
        },
        ..EngineConfig::for_capacity(chosen.ram_bytes)
    }
}

/// Opens what the sizes ask for. A disk that fails costs its tier and nothing else.
async fn open_tiers(
    config: &Config,
    chosen: &Chosen,
    engine: &Arc<Engine>,
    clock: &Arc<dyn Clock>,
) -> Tiers {
    let mut tiers = Tiers::default();
    if chosen.nvme_bytes > 0 {
        let guard: Arc<dyn ReclaimGuard> = Arc::<Engine>::clone(engine);
        let settings = NvmeConfig {
            queue_bytes: config.nvme_queue_bytes,
            reads: config.nvme_reads,
            wear_bytes_per_day: chosen.nvme_wear_bytes_per_day,
            ..NvmeConfig::new(config.data_dir.join("nvme"), chosen.nvme_bytes)
        };
        match NvmeTier::open(settings, Arc::clone(clock), guard).await {
            Ok(tier) => {
                engine.recover(TierKind::Nvme, tier.residents(), Kind::Kv);
                let found = tier.recovered();
                tracing::info!(
                    blocks = found.blocks,
                    dropped = found.dropped,
                    cold = found.started_cold,
                    "nvme tier open"
                );
                tiers.nvme = Some(Arc::new(tier));
            }
            Err(error) => {
                tracing::error!(%error, "the nvme tier cannot be opened; the node works without it");
                tiers.absent.push((TierKind::Nvme, error.to_string()));
            }
        }
    }
    if chosen.durable_bytes > 0 {
        let settings = DurableConfig::new(config.data_dir.join("durable"), chosen.durable_bytes);
        match DurableTier::open(settings, Arc::clone(clock)).await {
            Ok(tier) => {
                let residents = tier.residents();
                tracing::info!(blocks = residents.len(), "durable tier open");
                engine.recover(TierKind::Durable, residents, Kind::Kv);
                tiers.durable = Some(Arc::new(tier));
            }
            Err(error) => {
                tracing::error!(%error, "the durable tier cannot be opened; the node works without it");
                tiers.absent.push((TierKind::Durable, error.to_string()));
            }
        }
    }
    tiers
}

/// Opens the same-host path and has callers told of it. A kernel without what it needs costs the path and nothing else.
fn start_local(
    config: &Config,
    blocks: &Arc<Blocks>,
    owners: &Arc<Owners>,
    metrics: &Arc<Metrics>,
    clock: &Arc<dyn Clock>,
) -> Result<Option<Local>, NodeError> {
    let path = config.local_socket_path();
    let Some(path) = fitting(path, &config.local_socket, "--local-socket") else {
        return Ok(None);
    };
    if !blocks.arena().stats().write_sealed {
        tracing::warn!("no same-host path: this kernel cannot seal memory against new writers");
        return Ok(None);
    }
    let path = std::path::absolute(&path).unwrap_or(path);
    let Some(told) = path.to_str().map(str::to_owned) else {
        tracing::warn!(path = %path.display(), "no same-host path: its name is no UTF-8; choose another with --local-socket");
        return Ok(None);
    };
    let local = Local::start(
        config,
        path,
        Arc::clone(blocks),
        Arc::clone(owners),
        Arc::clone(metrics),
        Arc::clone(clock),
    )?;
    blocks.set_local_socket(told);
    Ok(Some(local))
}

/// The Unix socket's path, if it is to be one.
fn socket_path(config: &Config) -> Option<PathBuf> {
    fitting(
        config.unix_socket_path(),
        &config.unix_socket,
        "--unix-socket",
    )
}

/// None when an automatic path is longer than the system allows.
fn fitting(path: Option<PathBuf>, setting: &UnixSocket, flag: &str) -> Option<PathBuf> {
    // The same-host path's socket is made under a name one byte longer.
    const MOST_BYTES: usize = SOCKET_PATH_BYTES - 1;
    let path = path?;
    if *setting == UnixSocket::Auto && path.as_os_str().len() > MOST_BYTES {
        tracing::warn!(path = %path.display(), "no such socket: its path is too long; choose one with {flag}");
        return None;
    }
    Some(path)
}

/// The data folder, locked for as long as this lives.
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: fs::File,
}

impl DataDir {
    pub(crate) fn open(path: &Path) -> Result<Self, NodeError> {
        let refuse = |source| NodeError::DataDir {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(path).map_err(refuse)?;
        let file = path.join("lock");
        let mut lock = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&file)
            .map_err(refuse)?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let pid = fs::read_to_string(&file).unwrap_or_default();
                let holder = match pid.trim() {
                    "" => String::new(),
                    pid => format!(" (process {pid})"),
                };
                return Err(NodeError::Locked {
                    path: path.to_owned(),
                    holder,
                });
            }
            Err(error) => return Err(refuse(error.into())),
        }
        let pid = std::process::id().to_string();
        lock.set_len(0)
            .and_then(|()| lock.write_all(pid.as_bytes()))
            .map_err(refuse)?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    fn refuse(&self, source: io::Error) -> NodeError {
        NodeError::DataDir {
            path: self.path.clone(),
            source,
        }
    }
}

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
