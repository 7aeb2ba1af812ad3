//! Between the wire and the domain: the only place where a wire field is judged.
//!
//! ```text
//! bytes ─prost─► v1::LookupRequest ─convert─► request::Lookup ─► server
//! bytes ◄─prost─ v1::LookupResponse ◄─convert─ answer::Lookup ◄─ server       (and the mirror in the client)
//! ```
//!
//! What comes out of here has the right widths, counts, ranges and members of closed sets, so nobody further
//! in asks again. Two things wait until the namespace is known, because they depend on its run length:
//! [`Chain::validate`] for a chain, and [`header`], which takes the namespace's rules.
//!
//! Errors: [`FieldError`] with the path of the wire field. A field of a later version is ignored, an
//! unknown member of a closed set is refused where an answer depends on it.

use std::sync::Arc;

use bytes::Bytes;

pub mod answer;
pub mod request;

pub use crate::field::FieldError;
pub use crate::hash::MAX_CHAIN_BLOCKS;

use crate::chain::{Jump, too_long};
use crate::checksum::{BlockHeader, page_count};
use crate::hash::Chain;
use crate::header::Announced;
use crate::key::{BlockKey, BootId, NamespaceId, Part, Place, RunHash, SequenceHash};
use crate::namespace::{Layout, Namespace, World};
use crate::v1;
use crate::view::{Member, MemberId, MemberState, ViewDigest};

/// Most parts one request may name.
pub const MAX_PARTS: usize = 256;

/// Most stored objects (blocks times parts) one request may name.
pub const MAX_OBJECTS: usize = 1 << 18;

/// Most invalidations that one node may say it was told of.
pub const MAX_SURVIVED: usize = 65_536;

/// Most members one answer may bring.
pub const MAX_MEMBERS: usize = 65_536;

/// Ids of exactly this many bytes, or the field's error.
fn fixed<const N: usize>(field: &'static str, bytes: &[u8]) -> Result<[u8; N], FieldError> {
    bytes.try_into().map_err(|_| {
        FieldError::new(
            field,
            format!("has {} bytes; exactly {N} are needed", bytes.len()),
        )
    })
}

/// As [`fixed`], where empty means none.
fn optional<const N: usize>(
    field: &'static str,
    bytes: &[u8],
) -> Result<Option<[u8; N]>, FieldError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let problem = || format!("has {} bytes; {N} or none are needed", bytes.len());
    bytes
        .try_into()
        .map(Some)
        .map_err(|_| FieldError::new(field, problem()))
}

/// A member of a closed set, or the field's error.
fn member_of<T>(field: &'static str, number: i32, known: Option<T>) -> Result<T, FieldError> {
    known.ok_or_else(|| FieldError::new(field, format!("{number} is not a known value")))
}

/// As [`member_of`], where 0 (unspecified) means `default`.
fn member_or<T>(
    field: &'static str,
    number: i32,
    known: Option<T>,
    default: T,
) -> Result<T, FieldError> {
    if number == 0 {
        Ok(default)
    } else {
        member_of(field, number, known)
    }
}

fn copied(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

fn copied_or_empty(hash: Option<SequenceHash>) -> Bytes {
    hash.map_or_else(Bytes::new, |hash| copied(&hash.0))
}

/// A namespace id.
///
/// # Errors
///
/// When it has not 16 bytes.
pub fn namespace_id(bytes: &[u8]) -> Result<NamespaceId, FieldError> {
    fixed("namespace_id", bytes).map(NamespaceId)
}

/// A chain with hashes of the right width; [`Chain::validate`] judges the rest once the run length is known.
///
/// # Errors
///
/// When it is absent, has no block or too many, or a hash has not 32 bytes.
pub fn chain(wire: Option<v1::Chain>) -> Result<Chain, FieldError> {
    let wire = wire.ok_or_else(|| FieldError::new("chain", "is missing"))?;
    let (hashes, rest) = wire.hashes.as_chunks::<{ SequenceHash::BYTES }>();
    if !rest.is_empty() {
        return Err(wrong_hashes(wire.hashes.len()));
    }
    judged_hashes(hashes)?;
    Ok(Chain {
        first_index: wire.first_index,
        run: optional("chain.run_hash", &wire.run_hash)?.map(RunHash),
        parent: optional("chain.parent_hash", &wire.parent_hash)?.map(SequenceHash),
        hashes: hashes.iter().copied().map(SequenceHash).collect(),
        jumps: jumps(&wire.jumps, hashes.len())?,
    })
}

fn wrong_hashes(bytes: usize) -> FieldError {
    let problem =
        format!("has {bytes} bytes; 32 for each of 1 to {MAX_CHAIN_BLOCKS} blocks are needed");
    FieldError::new("chain.hashes", problem)
}

/// Refuses a chain of none or too many.
pub(crate) fn judged_hashes<T>(hashes: &[T]) -> Result<(), FieldError> {
    match hashes.len() {
        0 => Err(wrong_hashes(0)),
        1..=MAX_CHAIN_BLOCKS => Ok(()),
        count => Err(too_long(count)),
    }
}

fn jumps(wire: &[v1::Jump], blocks: usize) -> Result<Vec<Jump>, FieldError> {
    if wire.len() >= blocks {
        let problem = format!("has {} entries for {blocks} blocks", wire.len());
        return Err(FieldError::new("chain.jumps", problem));
    }
    let jump = |wire: &v1::Jump| {
        Ok(Jump {
            at: wire.at,
            index: wire.index,
            run: optional("chain.jumps.run_hash", &wire.run_hash)?.map(RunHash),
            parent: fixed("chain.jumps.parent_hash", &wire.parent_hash).map(SequenceHash)?,
        })
    };
    wire.iter().map(jump).collect()
}

/// Ids of invalidations.
fn survived(field: &'static str, ids: Vec<u64>) -> Result<Vec<u64>, FieldError> {
    if ids.len() > MAX_SURVIVED {
        let problem = format!(
            "has {} entries; at most {MAX_SURVIVED} are allowed",
            ids.len()
        );
        return Err(FieldError::new(field, problem));
    }
    Ok(ids)
}

/// The wire's chain.
pub fn chain_to_wire(chain: &Chain) -> v1::Chain {
    let mut hashes = Vec::with_capacity(SequenceHash::BYTES * chain.len());
    for hash in &chain.hashes {
        hashes.extend_from_slice(&hash.0);
    }
    v1::Chain {
        hashes: hashes.into(),
        first_index: chain.first_index,
        run_hash: chain.run.map_or_else(Bytes::new, |run| copied(&run.0)),
        parent_hash: copied_or_empty(chain.parent),
        jumps: chain.jumps.iter().map(jump_to_wire).collect(),
    }
}

fn jump_to_wire(jump: &Jump) -> v1::Jump {
    v1::Jump {
        at: jump.at,
        index: jump.index,
        run_hash: jump.run.map_or_else(Bytes::new, |run| copied(&run.0)),
        parent_hash: copied(&jump.parent.0),
    }
}

/// A part.
///
/// # Errors
///
/// When a coordinate is over 65535; `field` names it.
pub fn part(field: &'static str, wire: v1::Part) -> Result<Part, FieldError> {
    let coordinate = |name: &str, number: u32| {
        let problem = || format!("has {name} {number}; at most {} is allowed", u16::MAX);
        u16::try_from(number).map_err(|_| FieldError::new(field, problem()))
    };
    Ok(Part {
        rank: coordinate("rank", wire.rank)?,
        layer_group: coordinate("layer_group", wire.layer_group)?,
    })
}

/// The parts a request names for a chain of `blocks`; none named means the single part {0, 0}.
///
/// # Errors
///
/// When there are too many, one is named twice, or a coordinate is over 65535.
pub fn parts(wire: &[v1::Part], blocks: usize) -> Result<Vec<Part>, FieldError> {
    // Before they are looked at one by one.
    judged_count(wire.len(), blocks)?;
    let parts = wire.iter().map(|&wire| part("parts", wire));
    judged_parts(parts.collect::<Result<_, _>>()?, blocks)
}

/// The same for parts with coordinates of the right width.
pub(crate) fn judged_parts(parts: Vec<Part>, blocks: usize) -> Result<Vec<Part>, FieldError> {
    match &parts[..] {
        [] => return Ok(vec![Part::default()]),
        [_] => return Ok(parts),
        _ => judged_count(parts.len(), blocks)?,
    }
    let mut sorted = parts.clone();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(FieldError::new(
            "parts",
            format!("names {} twice", twice[0]),
        ));
    }
    Ok(parts)
}

fn judged_count(parts: usize, blocks: usize) -> Result<(), FieldError> {
    if parts > MAX_PARTS {
        let problem = format!("has {parts} entries; at most {MAX_PARTS} are allowed");
        return Err(FieldError::new("parts", problem));
    }
    if parts * blocks > MAX_OBJECTS {
        let problem = format!(
            "{parts} parts of {blocks} blocks are over the limit of {MAX_OBJECTS} objects in one request"
        );
        return Err(FieldError::new("parts", problem));
    }
    Ok(())
}

impl From<Part> for v1::Part {
    fn from(part: Part) -> Self {
        Self {
            rank: part.rank.into(),
            layer_group: part.layer_group.into(),
        }
    }
}

/// The parts of a request; the single part {0, 0} is left unsaid.
pub fn parts_to_wire(parts: &[Part]) -> Vec<v1::Part> {
    if parts == [Part::default()] {
        Vec::new()
    } else {
        parts.iter().map(|&part| part.into()).collect()
    }
}

/// What a namespace says about the headers of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderRules {
    /// The namespace.
    pub namespace: NamespaceId,
    /// Its run length.
    pub run_blocks: u32,
    /// The largest block the node takes.
    pub max_block_bytes: u64,
}

/// A block's header. Its seal is not judged here: a wrong one is an answer, corrupt.
///
/// # Errors
///
/// When an id has the wrong width, a place contradicts itself, the length is 0 or too large, or there are more
/// or fewer page sums than the length needs.
pub fn header(wire: &v1::BlockHeader, rules: HeaderRules) -> Result<BlockHeader, FieldError> {
    let announced = announced(wire, rules)?;
    let page_sums = page_sums("header.page_sums", &wire.page_sums, announced.length_bytes)?;
    Ok(announced.with_sums(page_sums, wire.seal))
}

/// A block's header in a put: its sums may follow behind the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PutHeader {
    /// With its sums.
    Summed(BlockHeader),
    /// They follow.
    Announced(Announced),
}

/// The header of a block that is put. Its seal is not judged here: a wrong one is an answer, corrupt.
///
/// # Errors
///
/// As [`header`], but that sums may be missing altogether: then they follow.
pub fn put_header(wire: &v1::BlockHeader, rules: HeaderRules) -> Result<PutHeader, FieldError> {
    if wire.page_sums.is_empty() && wire.seal == 0 {
        announced(wire, rules).map(PutHeader::Announced)
    } else {
        header(wire, rules).map(PutHeader::Summed)
    }
}

/// The sums behind a block of `length_bytes`.
///
/// # Errors
///
/// When there are more or fewer than the length needs.
pub fn block_sums(wire: &v1::BlockSums, length_bytes: u64) -> Result<Arc<[u64]>, FieldError> {
    page_sums("sums.page_sums", &wire.page_sums, length_bytes)
}

fn page_sums(
    field: &'static str,
    sums: &[u64],
    length_bytes: u64,
) -> Result<Arc<[u64]>, FieldError> {
    let (found, expected) = (sums.len() as u64, page_count(length_bytes));
    if found != expected {
        let problem = format!("has {found} sums; {length_bytes} bytes have {expected} pages");
        return Err(FieldError::new(field, problem));
    }
    Ok(sums.into())
}

fn announced(wire: &v1::BlockHeader, rules: HeaderRules) -> Result<Announced, FieldError> {
    let key = BlockKey {
        namespace: rules.namespace,
        hash: fixed("header.hash", &wire.hash).map(SequenceHash)?,
        part: part("header.part", wire.part.unwrap_or_default())?,
    };
    let place = Place {
        run: fixed("header.run_hash", &wire.run_hash).map(RunHash)?,
        index: wire.index,
        parent: parent("header.parent_hash", wire.index, &wire.parent_hash)?,
    };
    if wire.index.checked_rem(rules.run_blocks) == Some(0) && place.run.0 != key.hash.0 {
        let problem = format!(
            "must be the block's own hash at index {}, where a run starts",
            wire.index
        );
        return Err(FieldError::new("header.run_hash", problem));
    }
    let length_bytes = wire.length_bytes;
    if length_bytes == 0 || length_bytes > rules.max_block_bytes {
        let problem = format!(
            "is {length_bytes}; 1 to {} are allowed",
            rules.max_block_bytes
        );
        return Err(FieldError::new("header.length_bytes", problem));
    }
    Ok(Announced {
        key,
        place,
        length_bytes,
    })
}

fn parent(
    field: &'static str,
    index: u32,
    bytes: &[u8],
) -> Result<Option<SequenceHash>, FieldError> {
    match (index, optional(field, bytes)?) {
        (0, Some(_)) => Err(FieldError::new(field, "must be empty at index 0")),
        (1.., None) => Err(FieldError::new(
            field,
            "is missing; only index 0 has no parent",
        )),
        (_, parent) => Ok(parent.map(SequenceHash)),
    }
}

impl From<&Announced> for v1::BlockHeader {
    fn from(block: &Announced) -> Self {
        Self {
            hash: copied(&block.key.hash.0),
            part: Some(block.key.part.into()),
            index: block.place.index,
            run_hash: copied(&block.place.run.0),
            parent_hash: copied_or_empty(block.place.parent),
            length_bytes: block.length_bytes,
            page_sums: Vec::new(),
            seal: 0,
        }
    }
}

impl From<&BlockHeader> for v1::BlockHeader {
    fn from(header: &BlockHeader) -> Self {
        Self {
            hash: copied(&header.key.hash.0),
            part: Some(header.key.part.into()),
            index: header.place.index,
            run_hash: copied(&header.place.run.0),
            parent_hash: copied_or_empty(header.place.parent),
            length_bytes: header.length_bytes,
            page_sums: header.page_sums.to_vec(),
            seal: header.seal,
        }
    }
}

/// The namespace a caller asks for.
///
/// # Errors
///
/// When it is absent or [`Namespace::validate`] refuses it.
pub fn spec(wire: Option<v1::NamespaceSpec>) -> Result<Namespace, FieldError> {
    let wire = wire.ok_or_else(|| FieldError::new("spec", "is missing"))?;
    let namespace = Namespace {
        label: wire.label,
        model: wire.model,
        weights: wire.weights,
        tokenizer: wire.tokenizer,
        kv_dtype: wire.kv_dtype,
        layout: Layout {
            layers: wire.layers,
            kv_heads: wire.kv_heads,
            head_size: wire.head_size,
            packing: wire.packing,
        },
        block_tokens: wire.block_tokens,
        run_blocks: wire.run_blocks,
        world: World {
            tensor: wire.tensor_parallel,
            pipeline: wire.pipeline_parallel,
            context: wire.context_parallel,
        },
        engine_class: wire.engine_class,
    };
    namespace.validate()?;
    Ok(namespace)
}

impl From<&Namespace> for v1::NamespaceSpec {
    fn from(namespace: &Namespace) -> Self {
        Self {
            label: namespace.label.clone(),
            model: namespace.model.clone(),
            weights: namespace.weights.clone(),
            tokenizer: namespace.tokenizer.clone(),
            kv_dtype: namespace.kv_dtype.clone(),
            layers: namespace.layout.layers,
            kv_heads: namespace.layout.kv_heads,
            head_size: namespace.layout.head_size,
            packing: namespace.layout.packing.clone(),
            block_tokens: namespace.block_tokens,
            run_blocks: namespace.run_blocks,
            tensor_parallel: namespace.world.tensor,
            pipeline_parallel: namespace.world.pipeline,
            context_parallel: namespace.world.context,
            engine_class: namespace.engine_class.clone(),
        }
    }
}

impl TryFrom<v1::Member> for Member {
    type Error = FieldError;

    fn try_from(wire: v1::Member) -> Result<Self, FieldError> {
        for (field, text) in [("members.id", &wire.id), ("members.zone", &wire.zone)] {
            if text.len() > crate::namespace::MAX_TEXT_BYTES {
                return Err(FieldError::new(
                    field,
                    format!("has {} bytes; at most 256", text.len()),
                ));
            }
        }
        if wire.id.is_empty() {
            return Err(FieldError::new("members.id", "is empty"));
        }
        let state = member_of(
            "members.state",
            wire.state,
            MemberState::from_wire(wire.state),
        )?;
        Ok(Self {
            id: MemberId(wire.id),
            generation: wire.generation,
            version: wire.version,
            weight: wire.weight,
            zone: wire.zone,
            state,
            address: wire.address,
        })
    }
}

impl From<&Member> for v1::Member {
    fn from(member: &Member) -> Self {
        Self {
            id: member.id.0.clone(),
            generation: member.generation,
            version: member.version,
            weight: member.weight,
            zone: member.zone.clone(),
            state: member.state as i32,
            address: member.address.clone(),
        }
    }
}

/// What every answer says of who gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerContext {
    /// The node's life.
    pub boot_id: BootId,
    /// The node's view.
    pub view_digest: ViewDigest,
    /// Its members, if the caller's digest was another.
    pub members: Vec<Member>,
    /// Calls that it serves now; 0: it does not say.
    pub queue: u32,
}

impl TryFrom<v1::ResponseContext> for AnswerContext {
    type Error = FieldError;

    fn try_from(wire: v1::ResponseContext) -> Result<Self, FieldError> {
        if wire.members.len() > MAX_MEMBERS {
            let problem = format!("has {} entries; at most {MAX_MEMBERS}", wire.members.len());
            return Err(FieldError::new("context.members", problem));
        }
        Ok(Self {
            boot_id: BootId(wire.boot_id),
            view_digest: ViewDigest(wire.view_digest),
            members: wire
                .members
                .into_iter()
                .map(Member::try_from)
                .collect::<Result<_, _>>()?,
            queue: wire.queue,
        })
    }
}

impl From<&AnswerContext> for v1::ResponseContext {
    fn from(context: &AnswerContext) -> Self {
        Self {
            boot_id: context.boot_id.0,
            view_digest: context.view_digest.0,
            members: context.members.iter().map(v1::Member::from).collect(),
            queue: context.queue,
        }
    }
}

#[cfg(test)]
mod tests;
