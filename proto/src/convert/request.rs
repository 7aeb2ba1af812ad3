//! What callers ask, in the words of the domain.
//!
//! `TryFrom` the wire judges every field (the server's side); `From` the domain writes it (the client's).
//! A limit that a node's configuration decides, such as the longest lease, is the node's to apply.

use bytes::Bytes;

use super::{
    FieldError, chain, chain_to_wire, copied, fixed, member_or, namespace_id, optional, parts,
    parts_to_wire, spec, survived,
};
use crate::hash::Chain;
use crate::key::{BootId, LeaseId, NamespaceId, OwnerId, Part, RequestId, SequenceHash};
use crate::namespace::{MAX_LABEL_BYTES, Namespace};
use crate::reason::{Ack, Kind};
use crate::v1;
use crate::view::ViewDigest;

/// Smallest piece a get may ask for; smaller ones would cost more than they carry.
pub const MIN_PIECE_BYTES: u32 = 4096;

/// Most members that hold one run.
pub const MAX_REPLICAS: u32 = 8;

/// Sent with every request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// The caller's view; `None` when it has none.
    pub view_digest: Option<ViewDigest>,
    /// The node's life the caller believes in.
    pub boot_id: Option<BootId>,
    /// One id for all tries of this request.
    pub request_id: Option<RequestId>,
    /// Answer from what is here and ask nobody else.
    pub no_forward: bool,
    /// Who holds the leases; `None`: the connection.
    pub owner_id: Option<OwnerId>,
}

impl Context {
    /// Judges the wire's context; an absent one says nothing.
    ///
    /// # Errors
    ///
    /// When an id has the wrong width.
    pub fn from_wire(wire: Option<v1::RequestContext>) -> Result<Self, FieldError> {
        let wire = wire.unwrap_or_default();
        Ok(Self {
            view_digest: (wire.view_digest != 0).then_some(ViewDigest(wire.view_digest)),
            boot_id: (wire.boot_id != 0).then_some(BootId(wire.boot_id)),
            request_id: optional("context.request_id", &wire.request_id)?.map(RequestId),
            no_forward: wire.no_forward,
            owner_id: optional("context.owner_id", &wire.owner_id)?.map(OwnerId),
        })
    }

    /// The wire's context.
    pub fn to_wire(self) -> Option<v1::RequestContext> {
        Some(v1::RequestContext {
            view_digest: self.view_digest.map_or(0, |digest| digest.0),
            boot_id: self.boot_id.map_or(0, |boot_id| boot_id.0),
            request_id: self.request_id.map_or_else(Bytes::new, |id| copied(&id.0)),
            no_forward: self.no_forward,
            owner_id: self.owner_id.map_or_else(Bytes::new, |id| copied(&id.0)),
        })
    }
}

/// Asks for the id and key of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenNamespace {
    /// Who asks.
    pub context: Context,
    /// Its shape.
    pub namespace: Namespace,
    /// Refuse a known label with another fingerprint.
    pub strict: bool,
    /// Members that hold each of its runs; 0: as it is, or the node's setting.
    pub replicas: u32,
    /// Another of its label stays the one that was opened last, where there is one.
    pub aside: bool,
}

impl OpenNamespace {
    /// Asks for it as it is.
    #[must_use]
    pub fn of(namespace: Namespace) -> Self {
        Self {
            context: Context::default(),
            namespace,
            strict: false,
            replicas: 0,
            aside: false,
        }
    }
}

impl TryFrom<v1::OpenNamespaceRequest> for OpenNamespace {
    type Error = FieldError;

    fn try_from(wire: v1::OpenNamespaceRequest) -> Result<Self, FieldError> {
        if wire.replicas > MAX_REPLICAS {
            let problem = format!("is {}; at most {MAX_REPLICAS} are kept", wire.replicas);
            return Err(FieldError::new("replicas", problem));
        }
        Ok(Self {
            context: Context::from_wire(wire.context)?,
            namespace: spec(wire.spec)?,
            strict: wire.strict,
            replicas: wire.replicas,
            aside: wire.aside,
        })
    }
}

impl From<OpenNamespace> for v1::OpenNamespaceRequest {
    fn from(request: OpenNamespace) -> Self {
        Self {
            context: request.context.to_wire(),
            spec: Some((&request.namespace).into()),
            strict: request.strict,
            replicas: request.replicas,
            aside: request.aside,
        }
    }
}

/// Asks for the longest prefix present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Who asks.
    pub context: Context,
    /// Where.
    pub namespace: NamespaceId,
    /// What; to be judged by [`Chain::validate`] when the namespace is known.
    pub chain: Chain,
    /// Which parts, at least one, each once.
    pub parts: Vec<Part>,
    /// Only look.
    pub probe: bool,
    /// How long the lease shall hold; `None`: the node's default.
    pub lease_ttl_ms: Option<u32>,
    /// The same lease for the same key.
    pub idempotency_key: Option<[u8; 16]>,
    /// The lease's id, if nobody has it yet.
    pub lease: Option<LeaseId>,
}

impl TryFrom<v1::LookupRequest> for Lookup {
    type Error = FieldError;

    fn try_from(wire: v1::LookupRequest) -> Result<Self, FieldError> {
        let context = Context::from_wire(wire.context)?;
        let namespace = namespace_id(&wire.namespace_id)?;
        let chain = chain(wire.chain)?;
        Ok(Self {
            context,
            namespace,
            parts: parts(&wire.parts, chain.len())?,
            chain,
            probe: wire.probe,
            lease_ttl_ms: (wire.lease_ttl_ms != 0).then_some(wire.lease_ttl_ms),
            idempotency_key: optional("idempotency_key", &wire.idempotency_key)?,
            lease: (wire.lease_id != 0).then_some(LeaseId(wire.lease_id)),
        })
    }
}

impl From<Lookup> for v1::LookupRequest {
    fn from(request: Lookup) -> Self {
        Self {
            context: request.context.to_wire(),
            namespace_id: copied(&request.namespace.0),
            chain: Some(chain_to_wire(&request.chain)),
            parts: parts_to_wire(&request.parts),
            probe: request.probe,
            lease_ttl_ms: request.lease_ttl_ms.unwrap_or(0),
            idempotency_key: request
                .idempotency_key
                .map_or_else(Bytes::new, |key| copied(&key)),
            lease_id: request.lease.map_or(0, |lease| lease.0),
        }
    }
}

/// Asks for blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Get {
    /// Who asks.
    pub context: Context,
    /// Where.
    pub namespace: NamespaceId,
    /// What; to be judged by [`Chain::validate`] when the namespace is known.
    pub chain: Chain,
    /// Which parts, at least one, each once.
    pub parts: Vec<Part>,
    /// Under which lease, if any.
    pub lease: Option<LeaseId>,
    /// Largest `data` of one message; `None`: the node's default.
    pub piece_bytes: Option<u32>,
}

impl TryFrom<v1::GetRequest> for Get {
    type Error = FieldError;

    fn try_from(wire: v1::GetRequest) -> Result<Self, FieldError> {
        let context = Context::from_wire(wire.context)?;
        let namespace = namespace_id(&wire.namespace_id)?;
        let chain = chain(wire.chain)?;
        if (1..MIN_PIECE_BYTES).contains(&wire.piece_bytes) {
            let problem = format!(
                "is {}; 0 or at least {MIN_PIECE_BYTES} is needed",
                wire.piece_bytes
            );
            return Err(FieldError::new("piece_bytes", problem));
        }
        Ok(Self {
            context,
            namespace,
            parts: parts(&wire.parts, chain.len())?,
            chain,
            lease: (wire.lease_id != 0).then_some(LeaseId(wire.lease_id)),
            piece_bytes: (wire.piece_bytes != 0).then_some(wire.piece_bytes),
        })
    }
}

impl From<Get> for v1::GetRequest {
    fn from(request: Get) -> Self {
        Self {
            context: request.context.to_wire(),
            namespace_id: copied(&request.namespace.0),
            chain: Some(chain_to_wire(&request.chain)),
            parts: parts_to_wire(&request.parts),
            lease_id: request.lease.map_or(0, |lease| lease.0),
            piece_bytes: request.piece_bytes.unwrap_or(0),
        }
    }
}

/// Begins a put; blocks follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutStart {
    /// Who asks.
    pub context: Context,
    /// Where.
    pub namespace: NamespaceId,
    /// How safe each block must be before it is answered.
    pub ack: Ack,
    /// Whose budget the blocks draw on.
    pub kind: Kind,
    /// Of a node: invalidations that what it gives has survived, by their ids.
    pub survived: Vec<u64>,
}

impl TryFrom<v1::PutStart> for PutStart {
    type Error = FieldError;

    fn try_from(wire: v1::PutStart) -> Result<Self, FieldError> {
        Ok(Self {
            context: Context::from_wire(wire.context)?,
            namespace: namespace_id(&wire.namespace_id)?,
            ack: member_or("start.ack", wire.ack, Ack::from_wire(wire.ack), Ack::Cached)?,
            kind: member_or(
                "start.kind",
                wire.kind,
                Kind::from_wire(wire.kind),
                Kind::Kv,
            )?,
            survived: survived("start.survived", wire.survived)?,
        })
    }
}

impl From<PutStart> for v1::PutStart {
    fn from(start: PutStart) -> Self {
        Self {
            context: start.context.to_wire(),
            namespace_id: copied(&start.namespace.0),
            ack: start.ack.to_wire() as i32,
            kind: start.kind.to_wire() as i32,
            survived: start.survived,
        }
    }
}

/// Prolongs a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renew {
    /// Who asks.
    pub context: Context,
    /// Which lease.
    pub lease: LeaseId,
    /// For how long; `None`: the node's default.
    pub ttl_ms: Option<u32>,
}

impl TryFrom<v1::RenewRequest> for Renew {
    type Error = FieldError;

    fn try_from(wire: v1::RenewRequest) -> Result<Self, FieldError> {
        Ok(Self {
            context: Context::from_wire(wire.context)?,
            lease: lease(wire.lease_id)?,
            ttl_ms: (wire.ttl_ms != 0).then_some(wire.ttl_ms),
        })
    }
}

impl From<Renew> for v1::RenewRequest {
    fn from(request: Renew) -> Self {
        Self {
            context: request.context.to_wire(),
            lease_id: request.lease.0,
            ttl_ms: request.ttl_ms.unwrap_or(0),
        }
    }
}

/// Gives a lease back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// Who asks.
    pub context: Context,
    /// Which lease.
    pub lease: LeaseId,
}

impl TryFrom<v1::ReleaseRequest> for Release {
    type Error = FieldError;

    fn try_from(wire: v1::ReleaseRequest) -> Result<Self, FieldError> {
        Ok(Self {
            context: Context::from_wire(wire.context)?,
            lease: lease(wire.lease_id)?,
        })
    }
}

impl From<Release> for v1::ReleaseRequest {
    fn from(request: Release) -> Self {
        Self {
            context: request.context.to_wire(),
            lease_id: request.lease.0,
        }
    }
}

fn lease(id: u64) -> Result<LeaseId, FieldError> {
    if id == 0 {
        Err(FieldError::new("lease_id", "is missing"))
    } else {
        Ok(LeaseId(id))
    }
}

/// What an invalidation forgets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// This block, in all its parts.
    Block(SequenceHash),
    /// This block and every block after it, in any chain.
    Prefix(SequenceHash),
    /// The whole namespace.
    All,
}

/// Forgets blocks for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalidate {
    /// Who asks.
    pub context: Context,
    /// Where.
    pub namespace: NamespaceId,
    /// What.
    pub target: Target,
}

impl TryFrom<v1::InvalidateRequest> for Invalidate {
    type Error = FieldError;

    fn try_from(wire: v1::InvalidateRequest) -> Result<Self, FieldError> {
        use v1::invalidate_request::Target as Wire;
        let target = match wire.target {
            Some(Wire::Hash(hash)) => Target::Block(SequenceHash(fixed("hash", &hash)?)),
            Some(Wire::PrefixHash(hash)) => {
                Target::Prefix(SequenceHash(fixed("prefix_hash", &hash)?))
            }
            Some(Wire::All(true)) => Target::All,
            // A client that sets `all` to false has most likely made a mistake that must not cost a namespace.
            Some(Wire::All(false)) => {
                return Err(FieldError::new("all", "must be true when it is set"));
            }
            None => {
                return Err(FieldError::new(
                    "target",
                    "is missing; set hash, prefix_hash or all",
                ));
            }
        };
        Ok(Self {
            context: Context::from_wire(wire.context)?,
            namespace: namespace_id(&wire.namespace_id)?,
            target,
        })
    }
}

impl From<Invalidate> for v1::InvalidateRequest {
    fn from(request: Invalidate) -> Self {
        use v1::invalidate_request::Target as Wire;
        Self {
            context: request.context.to_wire(),
            namespace_id: copied(&request.namespace.0),
            target: Some(match request.target {
                Target::Block(hash) => Wire::Hash(copied(&hash.0)),
                Target::Prefix(hash) => Wire::PrefixHash(copied(&hash.0)),
                Target::All => Wire::All(true),
            }),
        }
    }
}

/// Asks for blocks stored and removed, as they happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Who asks.
    pub context: Context,
    /// In which namespace; `None`: every one of the caller's tenant.
    pub namespace: Option<NamespaceId>,
}

impl TryFrom<v1::WatchRequest> for Watch {
    type Error = FieldError;

    fn try_from(wire: v1::WatchRequest) -> Result<Self, FieldError> {
        Ok(Self {
            context: Context::from_wire(wire.context)?,
            namespace: optional("namespace_id", &wire.namespace_id)?.map(NamespaceId),
        })
    }
}

impl From<Watch> for v1::WatchRequest {
    fn from(request: Watch) -> Self {
        Self {
            context: request.context.to_wire(),
            namespace_id: request
                .namespace
                .map_or_else(Bytes::new, |id| copied(&id.0)),
        }
    }
}

/// Asks which namespaces there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListNamespaces {
    /// Who asks.
    pub context: Context,
    /// Those of this label; `None`: all.
    pub label: Option<String>,
    /// Those after this one; `None`: from the first on.
    pub after: Option<NamespaceId>,
    /// Without what is there of each.
    pub names_only: bool,
}

impl TryFrom<v1::ListNamespacesRequest> for ListNamespaces {
    type Error = FieldError;

    fn try_from(wire: v1::ListNamespacesRequest) -> Result<Self, FieldError> {
        if wire.label.len() > MAX_LABEL_BYTES {
            let problem = format!(
                "has {} bytes; at most {MAX_LABEL_BYTES} are allowed",
                wire.label.len()
            );
            return Err(FieldError::new("label", problem));
        }
        Ok(Self {
            context: Context::from_wire(wire.context)?,
            after: optional("page_token", &wire.page_token)?.map(NamespaceId),
            label: (!wire.label.is_empty()).then_some(wire.label),
            names_only: wire.names_only,
        })
    }
}

impl From<ListNamespaces> for v1::ListNamespacesRequest {
    fn from(request: ListNamespaces) -> Self {
        Self {
            context: request.context.to_wire(),
            label: request.label.unwrap_or_default(),
            page_token: request.after.map_or_else(Bytes::new, |id| copied(&id.0)),
            names_only: request.names_only,
        }
    }
}
