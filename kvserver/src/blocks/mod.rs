//! What a node does with blocks: the rules between the engine, which knows where, and the tiers, which hold.
//!
//! ```text
//!             rpc, examples, benches
//!                     │
//!   lookup get put invalidate watch stats        one function or session each, no gRPC type
//!        │           │            │
//!   ┌────▼───┐  ┌────▼────┐  ┌────▼────┐
//!   │ engine │  │  mover  │  │  tiers  │        mover.rs: everything that runs in the background
//!   └────────┘  └─────────┘  └─────────┘
//! ```
//!
//! Everything in-process goes through [`Blocks`] too; [`Blocks::get_ref`] hands out a block in RAM
//! without copying a byte.
//! Units: bytes, milliseconds. Errors: [`BlocksError`] when the request itself is wrong; a miss, a
//! rejection and "already there" are answers.

pub(crate) mod catch_up;
pub mod get;
pub mod invalidate;
pub(crate) mod invalidations;
pub mod lookup;
pub mod motion;
pub mod mover;
pub mod namespaces;
pub(crate) mod owners;
pub mod put;
pub mod stats;
pub mod tenants;
pub mod watch;

use std::sync::{Arc, OnceLock};

use kvgpu::Arena;
use kvproto::{
    BlockKey, BootId, FieldError, LeaseId, NamespaceId, Reason, TierKind,
    convert::{AnswerContext, answer::OpenedNamespace, request::OpenNamespace},
    view::ViewDigest,
};

use self::{
    invalidations::Invalidations,
    motion::Motion,
    mover::Mover,
    namespaces::{Namespaces, Spaces},
    tenants::Tenants,
};
use crate::{
    clock::{Clock, Tick},
    cluster::{Cluster, Told, wire::GossipKey},
    engine::{Engine, Owner, TenantId, Whereabouts},
    error::ErrorKind,
    telemetry::Metrics,
    tier::{BlockRef, Tier},
};

/// Why a request as a whole was refused.
#[derive(Debug, thiserror::Error)]
pub enum BlocksError {
    /// A field is wrong.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The namespace is not this tenant's, or was never opened on this node.
    #[error("namespace_id: {0} was not opened on this node; call OpenNamespace first")]
    UnknownNamespace(NamespaceId),
    /// A strict caller's shape differs from the one known under its label.
    #[error("spec: label {label:?} is known with another fingerprint: {difference}")]
    NamespaceDiffers {
        /// The label.
        label: String,
        /// What differs.
        difference: String,
    },
    /// There are too many of something already.
    #[error("{field}: too many {what}, the limit is {limit}")]
    Overloaded {
        /// Of what.
        what: &'static str,
        /// The field of the request, or the setting, that is the limit.
        field: &'static str,
        /// How many are allowed.
        limit: usize,
    },
    /// The registry of namespaces cannot be written.
    #[error("cannot write the registry of namespaces: {0}")]
    Registry(std::io::Error),
    /// A tier could not be told to forget; blocks may come back after a restart.
    #[error(
        "the {tier} tier could not record the invalidation of {owed} blocks yet; it is tried again in the background, call again to wait for it: {source}"
    )]
    NotForgotten {
        /// Which.
        tier: TierKind,
        /// Blocks it should have forgotten for good and may still have, this call's and earlier ones'.
        owed: usize,
        /// Why.
        source: std::io::Error,
    },
}

impl BlocksError {
    /// The reason from the closed set.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Field(_) => Reason::InvalidField,
            Self::UnknownNamespace(_) => Reason::UnknownNamespace,
            Self::NamespaceDiffers { .. } => Reason::NamespaceDiffers,
            Self::Overloaded { .. } => Reason::Overloaded,
            Self::Registry(_) | Self::NotForgotten { .. } => Reason::Device,
        }
    }

    /// What the caller does about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        crate::rpc::error_kind(self.reason())
    }
}

/// The stores below RAM.
#[derive(Clone, Default)]
pub struct Tiers {
    /// The droppable one.
    pub nvme: Option<Arc<dyn Tier>>,
    /// The one that never drops.
    pub durable: Option<Arc<dyn Tier>>,
    /// Those that should be there and could not be opened, and why.
    pub absent: Vec<(TierKind, String)>,
}

impl Tiers {
    /// The store of this kind.
    #[must_use]
    pub fn get(&self, kind: TierKind) -> Option<&Arc<dyn Tier>> {
        match kind {
            TierKind::Nvme => self.nvme.as_ref(),
            TierKind::Durable => self.durable.as_ref(),
            TierKind::Gpu | TierKind::Ram | TierKind::Peer => None,
        }
    }

    /// All that are there.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Tier>> {
        self.nvme.iter().chain(&self.durable)
    }
}

/// Bounds of what one request may ask of a node.
#[derive(Clone, Copy, Debug)]
pub struct BlockLimits {
    /// Blocks, parts counted, in one get or put.
    pub max_blocks_per_call: usize,
    /// Largest block.
    pub max_block_bytes: u64,
    /// Owners of the runs of a namespace whose caller does not say.
    pub replicas: u32,
}

/// Everything that a node does with blocks.
pub struct Blocks {
    pub(crate) arena: Arc<Arena>,
    pub(crate) engine: Arc<Engine>,
    pub(crate) tiers: Tiers,
    /// Before the mover, which keeps the folder locked: the writers of these two end first.
    pub(crate) namespaces: Namespaces,
    invalidations: Invalidations,
    pub(crate) mover: Arc<Mover>,
    tenants: Tenants,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) limits: BlockLimits,
    pub(crate) started: Tick,
    boot_id: BootId,
    cluster: Arc<Cluster>,
    /// Where the same-host path is, once it is there.
    local_socket: OnceLock<String>,
    /// Reads, moves and copies between nodes, once they are there.
    motion: OnceLock<Arc<Motion>>,
}

impl Blocks {
    /// Puts the parts together; the node does it once.
    #[expect(
        clippy::too_many_arguments,
        reason = "called once, by the node that made the parts"
    )]
    pub(crate) fn new(
        arena: Arc<Arena>,
        engine: Arc<Engine>,
        tiers: Tiers,
        mover: Arc<Mover>,
        namespaces: Namespaces,
        invalidations: Invalidations,
        tenants: Tenants,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
        limits: BlockLimits,
        boot_id: BootId,
        cluster: Arc<Cluster>,
    ) -> Arc<Self> {
        let started = clock.now();
        Arc::new(Self {
            arena,
            engine,
            tiers,
            mover,
            namespaces,
            invalidations,
            tenants,
            metrics,
            clock,
            limits,
            started,
            boot_id,
            cluster,
            local_socket: OnceLock::new(),
            motion: OnceLock::new(),
        })
    }

    /// Who may call.
    #[must_use]
    pub fn tenants(&self) -> &Tenants {
        &self.tenants
    }

    /// The index, for tools and benches.
    #[must_use]
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// All bytes in RAM.
    #[must_use]
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// All metrics.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// This life of the node.
    #[must_use]
    pub fn boot_id(&self) -> BootId {
        self.boot_id
    }

    /// The cluster this node is of.
    #[must_use]
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// What all hashing keys are derived from; for nodes of the same cluster.
    pub(crate) fn secret(&self) -> &[u8] {
        self.namespaces.secret()
    }

    /// Name of the cluster, which all nodes with its secret derive alike.
    #[must_use]
    pub fn cluster_id(&self) -> String {
        GossipKey::new(self.secret()).cluster_id
    }

    /// What every answer says of who gave it, to a caller with this view over this connection: the members too when
    /// its view is another and it was not told already.
    #[must_use]
    pub fn answer_context(&self, callers: Option<ViewDigest>, told: &Told) -> AnswerContext {
        let callers = callers.unwrap_or_default();
        let view_digest = self.cluster.digest();
        let (view_digest, members) = match told.again(callers, view_digest) {
            true => (view_digest, Vec::new()),
            false => self.cluster.answer(callers),
        };
        AnswerContext {
            boot_id: self.boot_id,
            view_digest,
            members,
            queue: self.queue(),
        }
    }

    /// Calls being served, whichever way they came, watches aside. What a caller on this host copies after its answer is
    /// not among them.
    #[must_use]
    pub fn queue(&self) -> u32 {
        let calls = self.metrics.calls_in_flight.get() - self.metrics.watchers.get();
        let calls = calls + self.metrics.local.calls_in_flight.get();
        u32::try_from(calls).unwrap_or(0)
    }

    /// From now on, what is missing here may come from other nodes.
    pub(crate) fn set_motion(&self, motion: Arc<Motion>) {
        let _ = self.motion.set(motion); // made once, by the node that made this
    }

    /// Reads, moves and copies between nodes.
    #[must_use]
    pub fn motion(&self) -> Option<&Arc<Motion>> {
        self.motion.get()
    }

    /// What was invalidated, for peers.
    pub(crate) fn invalidations(&self) -> &Invalidations {
        &self.invalidations
    }

    /// Every namespace, for peers.
    pub(crate) fn spaces(&self) -> Spaces {
        self.namespaces.spaces()
    }

    /// From now on, callers are told where the same-host path is.
    pub(crate) fn set_local_socket(&self, path: String) {
        // A second path would be a second node.
        let _ = self.local_socket.set(path);
    }

    /// Opens a namespace for a tenant.
    ///
    /// # Errors
    /// A wrong field, a strict caller's difference, too many namespaces.
    pub async fn open_namespace(
        &self,
        tenant: TenantId,
        asked: &OpenNamespace,
    ) -> Result<OpenedNamespace, BlocksError> {
        let name = self.tenants.name(tenant);
        let opened = self
            .namespaces
            .open_namespace(tenant, name, asked, self.limits.replicas)
            .await?;
        Ok(OpenedNamespace {
            id: opened.id,
            key: opened.key,
            difference: opened.difference,
            max_block_bytes: self.limits.max_block_bytes,
            local_socket: self.local_socket.get().cloned(),
            replicas: opened.replicas,
        })
    }

    /// A block in RAM, by reference: no byte is read or copied, whatever its size. `None` when it is not
    /// in RAM; [`Blocks::get`] also brings it up from below.
    #[must_use]
    pub fn get_ref(&self, key: &BlockKey, lease: Option<(LeaseId, Owner)>) -> Option<BlockRef> {
        match self.engine.locate(key, lease) {
            Whereabouts::Ram(block) => Some(block),
            Whereabouts::Below(_) | Whereabouts::Gone(_) => None,
        }
    }

    /// Gives up all leases of an owner whose last connection is gone.
    pub fn release_owner(&self, owner: Owner) {
        self.engine.release_owner(owner);
    }
}
