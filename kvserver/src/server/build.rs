//! Building a node: every part made in order, each from what stands already.
//!
//! ```text
//! data folder locked ─► entry (joined, or the first) ─► arena ─► engine ─► tiers (their blocks join the index) ─► mover ─► namespaces ─► blocks
//!                                                                     same-host path, rpc, console ◄────────┘
//! ```
//!
//! Errors: [`NodeError`]. A tier that cannot be opened, and a same-host path that the kernel cannot give, cost
//! themselves and nothing else.

use std::{path::PathBuf, sync::Arc, time::Duration};

use kvgpu::{Arena, ArenaConfig, HugePages};
use kvproto::{BootId, Kind, Member, TierKind, ViewDigest};
use tokio::runtime::Handle;

use super::{
    NodeError,
    entry::{choose_port, enter},
};
use crate::{
    blocks::{
        BlockLimits, Blocks, Tiers,
        invalidations::Invalidations,
        motion::{HotRules, Motion, MotionConfig, MotionParts, NodeHoldings},
        mover::{Mover, ReadLimits},
        namespaces::{Bounds, Namespaces},
        owners::Owners,
        tenants::Tenants,
    },
    clock::Clock,
    cluster::{Cluster, Membership},
    config::{Chosen, Config, NvmeAdmission, UnixSocket, choose},
    console::Console,
    data_dir::DataDir,
    engine::{Demotion, Engine, EngineConfig, KindBudget, policy},
    local::Local,
    peers::{Grpc, Pace, Views, grpc::GrpcConfig},
    rpc::Rpc,
    telemetry::Metrics,
    tier::{
        ReclaimGuard, Tier,
        durable::{DurableConfig, DurableTier},
        nvme::{NvmeConfig, NvmeTier},
    },
};

/// Longest path of a Unix socket on Linux, without its final zero.
const SOCKET_PATH_BYTES: usize = 107;

/// Everything that is made on the background runtime.
pub(super) struct Parts {
    pub(super) chosen: Chosen,
    pub(super) blocks: Arc<Blocks>,
    pub(super) mover: Arc<Mover>,
    pub(super) membership: Membership,
    pub(super) rpc: Rpc,
    pub(super) local: Option<Local>,
    pub(super) console: Option<Console>,
}

pub(super) async fn build(
    mut config: Config,
    clock: Arc<dyn Clock>,
    around: impl Fn(Arc<dyn Tier>, &Arc<dyn Clock>) -> Arc<dyn Tier> + Send,
) -> Result<Parts, NodeError> {
    let data_dir = DataDir::open(&config.data_dir)?;
    let chosen = choose(&config);
    chosen
        .keep(&config)
        .map_err(|source| data_dir.refuse(source))?;
    let tenants = Tenants::load(&config.tokens_file)?.with_peer_token(&config.peer_token_file)?;
    let peer_token = tenants.peer_token().map(str::to_owned);
    let boot_id = BootId(clock.random_u64().max(1));
    let place = choose_port(&mut config).await;
    let entry = enter(&config, &chosen, peer_token.as_deref(), &*clock).await?;
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
    let invalidations = Invalidations::open(&config.data_dir).map_err(NodeError::Runtime)?;
    let cluster = entry.cluster(&config, &clock);
    let blocks = Blocks::new(
        arena,
        engine,
        tiers,
        Arc::clone(&mover),
        namespaces,
        invalidations,
        tenants,
        Arc::clone(&metrics),
        Arc::clone(&clock),
        BlockLimits {
            max_blocks_per_call: config.max_blocks_per_call,
            max_block_bytes: config.max_block_bytes,
            replicas: config.replicas,
        },
        boot_id,
        Arc::clone(&cluster),
    );
    entry.catch_up(&blocks).await;
    let motion = motion(&config, &blocks, &cluster, peer_token, &clock);
    blocks.set_motion(Arc::clone(&motion));
    let owners = Arc::new(Owners::new(Arc::clone(&blocks)));
    let local = start_local(&config, &blocks, &owners, &metrics, &clock)?;
    let started = Rpc::start(
        &config,
        socket_path(&config),
        Arc::clone(&blocks),
        owners,
        metrics,
        Arc::clone(&clock),
    );
    let rpc = match started.await {
        Ok(rpc) => rpc,
        Err(error) => {
            local.inspect(Local::cut);
            return Err(error.into());
        }
    };
    let membership = entry
        .begin(&config, place, rpc.address(), boot_id, &blocks, &clock)
        .await;
    motion.start();
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
        membership,
        chosen,
        blocks,
        mover,
        rpc,
        local,
        console,
    })
}

/// Calls between nodes carry this node's view, and bring it what others know.
impl Views for Cluster {
    fn digest(&self) -> ViewDigest {
        Self::digest(self)
    }

    fn heard(&self, members: Vec<Member>) {
        self.merge(members);
    }
}

/// What goes between this node and others.
fn motion(
    config: &Config,
    blocks: &Arc<Blocks>,
    cluster: &Arc<Cluster>,
    peer_token: Option<String>,
    clock: &Arc<dyn Clock>,
) -> Arc<Motion> {
    let peers = GrpcConfig {
        me: cluster.me().clone(),
        token: peer_token,
        calls: config.peer_calls,
    };
    let holdings = NodeHoldings::new(
        Arc::clone(&blocks.engine),
        blocks.tiers.clone(),
        Arc::clone(&blocks.mover),
        blocks.spaces(),
        config.max_block_bytes,
    );
    let settings = MotionConfig {
        wait: config.motion_wait,
        hot: HotRules {
            calls: config.hot_calls,
            share_percent: config.hot_share_percent,
        },
        hot_time: config.hot_time,
        ..MotionConfig::default()
    };
    Motion::new(
        settings,
        MotionParts {
            cluster: Arc::clone(cluster),
            transport: Arc::new(Grpc::new(
                &peers,
                Arc::<Cluster>::clone(cluster),
                Arc::clone(clock),
                Handle::current(),
            )),
            holdings: Arc::new(holdings),
            clock: Arc::clone(clock),
            pace: Arc::new(Pace::new(Arc::clone(clock), config.peer_bytes_per_second)),
            metrics: Arc::clone(&blocks.metrics.motion),
            runtime: Handle::current(),
        },
    )
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
