//! What a node answers, in the words of the domain.
//!
//! `From` the domain writes the wire (the server's side); `TryFrom` the wire, or `from_wire` where a rule of
//! the namespace is needed, judges it (the client's): a client trusts a node's bytes no more than a node
//! trusts a client's. Answers that are one number or flag (renew, release, invalidate) need no twin.

use super::{
    AnswerContext, FieldError, HeaderRules, copied, copied_or_empty, fixed, header, member_of,
    namespace_id, parent, part, request::MAX_REPLICAS, spec, survived,
};
use crate::checksum::BlockHeader;
use crate::hash::NamespaceKey;
use crate::key::{BlockKey, LeaseId, NamespaceId, RunHash, SequenceHash};
use crate::namespace::Namespace;
use crate::reason::{GetOutcome, PutOutcome, Reason, TierKind};
use crate::v1;
use crate::view::MemberId;

/// A namespace that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenedNamespace {
    /// First part of every key in it.
    pub id: NamespaceId,
    /// Key of every hash in it.
    pub key: NamespaceKey,
    /// What differs from the namespace last opened under this label.
    pub difference: Option<String>,
    /// The largest block the node takes.
    pub max_block_bytes: u64,
    /// Path of the same-host path's socket, on the node's machine.
    pub local_socket: Option<String>,
    /// Members of the cluster that hold each of its runs, at least 1.
    pub replicas: u32,
}

impl TryFrom<&v1::OpenNamespaceResponse> for OpenedNamespace {
    type Error = FieldError;

    fn try_from(wire: &v1::OpenNamespaceResponse) -> Result<Self, FieldError> {
        Ok(Self {
            id: namespace_id(&wire.namespace_id)?,
            key: NamespaceKey::from_bytes(fixed("namespace_key", &wire.namespace_key)?),
            difference: (!wire.difference.is_empty()).then(|| wire.difference.clone()),
            max_block_bytes: wire.max_block_bytes,
            local_socket: (!wire.local_socket.is_empty()).then(|| wire.local_socket.clone()),
            // A promise of more than any node keeps would only make callers ask in vain.
            replicas: wire.replicas.clamp(1, MAX_REPLICAS),
        })
    }
}

impl OpenedNamespace {
    /// The wire's answer.
    pub fn into_wire(self, context: &AnswerContext) -> v1::OpenNamespaceResponse {
        v1::OpenNamespaceResponse {
            context: Some(context.into()),
            namespace_id: copied(&self.id.0),
            namespace_key: copied(self.key.as_bytes()),
            difference: self.difference.unwrap_or_default(),
            max_block_bytes: self.max_block_bytes,
            local_socket: self.local_socket.unwrap_or_default(),
            replicas: self.replicas,
        }
    }
}

/// A lease as it was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its id.
    pub id: LeaseId,
    /// How long it holds from the answer on.
    pub ttl_ms: u32,
    /// Leading blocks of the chain under it.
    pub blocks: u32,
    /// Their bytes.
    pub bytes: u64,
}

/// A member that holds a copy of a run for a while, because many read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Second {
    /// Which run.
    pub run: RunHash,
    /// Who.
    pub member: MemberId,
    /// For how long, from the answer on.
    pub ttl_ms: u32,
}

/// The longest prefix present.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lookup {
    /// Leading blocks present in every part.
    pub present_blocks: u32,
    /// So many consecutive blocks, all at best in this tier; they add up to `present_blocks`.
    pub tiers: Vec<(u32, TierKind)>,
    /// The lease on them; none for a probe and when nothing is present.
    pub lease: Option<Lease>,
    /// Who else has runs that were asked for.
    pub seconds: Vec<Second>,
    /// To a node: invalidations that these blocks have survived, by their ids.
    pub survived: Vec<u64>,
}

impl Lookup {
    /// The wire's answer.
    pub fn into_wire(self, context: &AnswerContext) -> v1::LookupResponse {
        let run = |(blocks, tier): (u32, TierKind)| v1::TierRun {
            blocks,
            tier: tier.to_wire() as i32,
        };
        v1::LookupResponse {
            context: Some(context.into()),
            present_blocks: self.present_blocks,
            tiers: self.tiers.into_iter().map(run).collect(),
            lease: self.lease.map(|lease| v1::Lease {
                id: lease.id.0,
                ttl_ms: lease.ttl_ms,
                blocks: lease.blocks,
                bytes: lease.bytes,
            }),
            seconds: self.seconds.into_iter().map(Into::into).collect(),
            survived: self.survived,
        }
    }

    /// Judges the answer to a lookup of `asked_blocks`.
    ///
    /// # Errors
    ///
    /// When it promises more than was asked, its tiers do not add up, or one is unknown; when more runs have a second
    /// owner than blocks were asked for.
    pub fn from_wire(wire: &v1::LookupResponse, asked_blocks: usize) -> Result<Self, FieldError> {
        if wire.present_blocks as usize > asked_blocks {
            let problem = format!(
                "is {}; only {asked_blocks} were asked for",
                wire.present_blocks
            );
            return Err(FieldError::new("present_blocks", problem));
        }
        let tier = |run: &v1::TierRun| {
            let tier = member_of("tiers.tier", run.tier, TierKind::from_wire(run.tier))?;
            Ok((run.blocks, tier))
        };
        let tiers: Vec<(u32, TierKind)> = wire.tiers.iter().map(tier).collect::<Result<_, _>>()?;
        let total: u64 = tiers.iter().map(|(blocks, _)| u64::from(*blocks)).sum();
        if total != u64::from(wire.present_blocks) {
            let problem = format!(
                "add up to {total} blocks; {} are present",
                wire.present_blocks
            );
            return Err(FieldError::new("tiers", problem));
        }
        let lease = wire.lease.as_ref().map(|lease| Lease {
            id: LeaseId(lease.id),
            ttl_ms: lease.ttl_ms,
            blocks: lease.blocks,
            bytes: lease.bytes,
        });
        if let Some(lease) =
            lease.filter(|lease| lease.blocks > wire.present_blocks || lease.id.0 == 0)
        {
            let problem = format!(
                "{} holds {} blocks of {}",
                lease.id, lease.blocks, wire.present_blocks
            );
            return Err(FieldError::new("lease", problem));
        }
        if wire.seconds.len() > asked_blocks {
            let problem = format!("has {} for {asked_blocks} blocks", wire.seconds.len());
            return Err(FieldError::new("seconds", problem));
        }
        Ok(Self {
            present_blocks: wire.present_blocks,
            tiers,
            lease,
            seconds: wire
                .seconds
                .iter()
                .map(Second::try_from)
                .collect::<Result<_, _>>()?,
            survived: survived("survived", wire.survived.clone())?,
        })
    }
}

impl TryFrom<&v1::SecondOwner> for Second {
    type Error = FieldError;

    fn try_from(wire: &v1::SecondOwner) -> Result<Self, FieldError> {
        Ok(Self {
            run: fixed("seconds.run_hash", &wire.run_hash).map(RunHash)?,
            member: MemberId(wire.member.clone()),
            ttl_ms: wire.ttl_ms,
        })
    }
}

impl From<Second> for v1::SecondOwner {
    fn from(second: Second) -> Self {
        Self {
            run_hash: copied(&second.run.0),
            member: second.member.0,
            ttl_ms: second.ttl_ms,
        }
    }
}

/// One message of a get, without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GetPiece {
    /// Which block: `i * parts + p`.
    pub block: u32,
    /// What became of it.
    pub outcome: GetOutcome,
    /// With the first piece of a hit.
    pub header: Option<BlockHeader>,
    /// With the first piece of a hit: where it was.
    pub tier: Option<TierKind>,
    /// Where in the block the payload goes.
    pub offset: u64,
}

impl GetPiece {
    /// The wire's message without `data`, to be framed by [`crate::frame::head`]; `context` goes with the first.
    pub fn to_wire(&self, context: Option<&AnswerContext>) -> v1::GetResponse {
        v1::GetResponse {
            context: context.map(Into::into),
            block: self.block,
            outcome: self.outcome.to_wire() as i32,
            header: self.header.as_ref().map(Into::into),
            tier: self.tier.map_or(0, |tier| tier.to_wire() as i32),
            offset: self.offset,
            seconds: Vec::new(),
            data: bytes::Bytes::new(),
        }
    }

    /// Judges a message of the answer to a get of `asked` objects, but for its context and its payload.
    ///
    /// # Errors
    ///
    /// When it names an object that was not asked for, an unknown outcome, or a header that breaks `rules`.
    pub fn from_wire(
        wire: &v1::GetResponse,
        rules: HeaderRules,
        asked: usize,
    ) -> Result<Self, FieldError> {
        if wire.block as usize >= asked {
            let problem = format!("is {}; only {asked} were asked for", wire.block);
            return Err(FieldError::new("block", problem));
        }
        let outcome = member_of("outcome", wire.outcome, GetOutcome::from_wire(wire.outcome))?;
        Ok(Self {
            block: wire.block,
            outcome,
            header: wire
                .header
                .as_ref()
                .map(|wire| header(wire, rules))
                .transpose()?,
            tier: TierKind::from_wire(wire.tier),
            offset: wire.offset,
        })
    }
}

/// What became of one block of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutResult {
    /// What.
    pub outcome: PutOutcome,
    /// When it was rejected: try again after this long; 0: it would not help.
    pub retry_after_ms: u32,
    /// When it was rejected or is less safe than asked for: why.
    pub reason: Option<Reason>,
}

impl PutResult {
    /// A block that is kept.
    pub const fn kept(outcome: PutOutcome) -> Self {
        Self {
            outcome,
            retry_after_ms: 0,
            reason: None,
        }
    }

    /// True when the block is there.
    pub const fn is_kept(&self) -> bool {
        self.outcome.is_kept()
    }

    /// A block that was refused.
    pub const fn rejected(reason: Reason, retry_after_ms: u32) -> Self {
        Self {
            outcome: PutOutcome::Rejected,
            retry_after_ms,
            reason: Some(reason),
        }
    }
}

impl TryFrom<&v1::PutResult> for PutResult {
    type Error = FieldError;

    fn try_from(wire: &v1::PutResult) -> Result<Self, FieldError> {
        let outcome = member_of(
            "results.outcome",
            wire.outcome,
            PutOutcome::from_wire(wire.outcome),
        )?;
        // A reason of a later version is worth less than the outcome it explains.
        let reason = Reason::from_wire(wire.reason);
        Ok(Self {
            outcome,
            retry_after_ms: wire.retry_after_ms,
            reason,
        })
    }
}

impl From<PutResult> for v1::PutResult {
    fn from(result: PutResult) -> Self {
        Self {
            outcome: result.outcome.to_wire() as i32,
            retry_after_ms: result.retry_after_ms,
            reason: result.reason.map_or(0, |reason| reason.to_wire() as i32),
        }
    }
}

/// A block that came or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockEvent {
    /// Which.
    pub key: BlockKey,
    /// Its index in the chain.
    pub index: u32,
    /// The block before it; `None` exactly at index 0.
    pub parent: Option<SequenceHash>,
    /// Where it came to, or was last.
    pub tier: TierKind,
    /// Why it went; `None` when it came.
    pub reason: Option<Reason>,
    /// Its length.
    pub length_bytes: u64,
}

impl TryFrom<&v1::BlockEvent> for BlockEvent {
    type Error = FieldError;

    fn try_from(wire: &v1::BlockEvent) -> Result<Self, FieldError> {
        let key = BlockKey {
            namespace: NamespaceId(fixed("event.namespace_id", &wire.namespace_id)?),
            hash: SequenceHash(fixed("event.hash", &wire.hash)?),
            part: part("event.part", wire.part.unwrap_or_default())?,
        };
        Ok(Self {
            key,
            index: wire.index,
            parent: parent("event.parent_hash", wire.index, &wire.parent_hash)?,
            tier: member_of("event.tier", wire.tier, TierKind::from_wire(wire.tier))?,
            reason: Reason::from_wire(wire.reason),
            length_bytes: wire.length_bytes,
        })
    }
}

impl From<&BlockEvent> for v1::BlockEvent {
    fn from(event: &BlockEvent) -> Self {
        Self {
            namespace_id: copied(&event.key.namespace.0),
            hash: copied(&event.key.hash.0),
            part: Some(event.key.part.into()),
            index: event.index,
            parent_hash: copied_or_empty(event.parent),
            tier: event.tier.to_wire() as i32,
            reason: event.reason.map_or(0, |reason| reason.to_wire() as i32),
            length_bytes: event.length_bytes,
        }
    }
}

/// What a watcher hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// A block came.
    Stored(BlockEvent),
    /// A block went.
    Removed(BlockEvent),
    /// The watcher fell behind; so many events were dropped here.
    Lagged(u64),
}

impl WatchEvent {
    /// The wire's message; `context` goes with the first.
    pub fn to_wire(&self, sequence: u64, context: Option<&AnswerContext>) -> v1::WatchResponse {
        use v1::watch_response::Event;
        v1::WatchResponse {
            context: context.map(Into::into),
            sequence,
            event: Some(match self {
                Self::Stored(event) => Event::Stored(event.into()),
                Self::Removed(event) => Event::Removed(event.into()),
                Self::Lagged(events) => Event::Lagged(*events),
            }),
        }
    }

    /// Judges a message; `None` for one that brings no event, such as the first of a quiet stream.
    ///
    /// # Errors
    ///
    /// When the event's fields are wrong.
    pub fn from_wire(wire: &v1::WatchResponse) -> Result<Option<Self>, FieldError> {
        use v1::watch_response::Event;
        Ok(match &wire.event {
            None => None,
            Some(Event::Stored(event)) => Some(Self::Stored(event.try_into()?)),
            Some(Event::Removed(event)) => Some(Self::Removed(event.try_into()?)),
            Some(Event::Lagged(events)) => Some(Self::Lagged(*events)),
        })
    }
}

/// What one tier holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierStats {
    /// Which.
    pub tier: TierKind,
    /// What it may hold.
    pub capacity_bytes: u64,
    /// What it holds.
    pub used_bytes: u64,
    /// How many blocks that is.
    pub blocks: u64,
    /// False when it is out of service.
    pub in_service: bool,
    /// Why it is, or what limits it; may be empty.
    pub note: String,
}

impl From<TierStats> for v1::TierStats {
    fn from(stats: TierStats) -> Self {
        Self {
            tier: stats.tier.to_wire() as i32,
            capacity_bytes: stats.capacity_bytes,
            used_bytes: stats.used_bytes,
            blocks: stats.blocks,
            in_service: stats.in_service,
            note: stats.note,
        }
    }
}

impl TryFrom<v1::TierStats> for TierStats {
    type Error = FieldError;

    fn try_from(wire: v1::TierStats) -> Result<Self, FieldError> {
        Ok(Self {
            tier: member_of("tiers.tier", wire.tier, TierKind::from_wire(wire.tier))?,
            capacity_bytes: wire.capacity_bytes,
            used_bytes: wire.used_bytes,
            blocks: wire.blocks,
            in_service: wire.in_service,
            note: wire.note,
        })
    }
}

/// A namespace that a node knows, and what it holds of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceStats {
    /// First part of every key in it.
    pub id: NamespaceId,
    /// Its label and shape.
    pub namespace: Namespace,
    /// Members of the cluster that hold each of its runs, at least 1.
    pub replicas: u32,
    /// The one that was opened last under its label.
    pub is_latest: bool,
    /// Stored parts.
    pub blocks: u64,
    /// Their sizes added up, each once however many tiers hold it.
    pub bytes: u64,
}

impl From<NamespaceStats> for v1::NamespaceStats {
    fn from(stats: NamespaceStats) -> Self {
        Self {
            namespace_id: copied(&stats.id.0),
            spec: Some((&stats.namespace).into()),
            replicas: stats.replicas,
            is_latest: stats.is_latest,
            blocks: stats.blocks,
            bytes: stats.bytes,
        }
    }
}

impl TryFrom<v1::NamespaceStats> for NamespaceStats {
    type Error = FieldError;

    fn try_from(wire: v1::NamespaceStats) -> Result<Self, FieldError> {
        Ok(Self {
            id: namespace_id(&wire.namespace_id)?,
            namespace: spec(wire.spec)?,
            replicas: wire.replicas.clamp(1, MAX_REPLICAS),
            is_latest: wire.is_latest,
            blocks: wire.blocks,
            bytes: wire.bytes,
        })
    }
}
