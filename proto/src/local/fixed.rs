//! Frames in a fixed layout, of gets above all: what the calls of microseconds need, without a message around it.
//!
//! ```text
//! frame   │ length u32, its highest bit set │ as below │
//!
//! get     │ kind u16 = 1 │ flags u16 │ done u16 │ parts u16 │ sequence u64 │ timeout_ms u32 │ first_index u32 │
//!         │ view digest u64 │ lease u64 │ namespace 16 │ run 32 │ parent 32 │
//!         │ done u64 … │ parts (rank u16, layer group u16) … │ hashes 32 … up to the end │
//!           flags: 1 run is named, 2 parent is named; zeros where one is not
//!
//! got     │ kind u16 = 2 │ zero u16 │ queue u32 │ sequence u64 │ boot id u64 │ view digest u64 │ hold u64 │
//!   block │ outcome u8 │ tier u8 │ flags u8 │ zero u8 │ sums u32 │    and of a hit:
//!         │ length u64 │ seal u64 │ offset u64 │ generation u64 │ segment u32 │ index u32 │ run 32 │ parent 32 │ sums u64 … │
//!           flags: 1 a hit, 2 it lies in memory that can be mapped, 4 parent is named
//!
//! written │ kind u16 = 3 │ zero u16 │ zero u32 │ sequence u64 │ sums u64 … up to the end │
//! ```
//!
//! A put whose blocks are told of while they are written (`LocalPut.follows`) begins with their headers, without sums;
//! then each of these frames says that so many more pages are written, in the order of the blocks, and what they sum up
//! to. It is answered behind the last page. So the node copies the first pages while the client writes the next.
//!
//! All little-endian. A hit's key is not repeated: it is the one asked for, and the seal says whether it is. Whatever does
//! not fit (a chain with gaps, members of a cluster in an answer, a refusal) goes as a message, so either end may
//! send either; which layouts both ends know they say when they attach (`LocalAttach.layouts`).
//!
//! Errors: [`LocalFrameError::Misshapen`] for bytes that are no such frame; a field that is wrong in itself is
//! [`GetCall::asked`]'s error, as that of a message would be.
//! Why beside the messages: encoding, decoding and judging one cost more than all else that a get under a lease does.

use std::sync::Arc;

use bytes::BufMut;

use super::{FIXED, LocalFrameError, MAX_FRAME_BYTES, PREFIX_BYTES, prefix};
use crate::{
    checksum::page_count,
    convert::{FieldError, judged_hashes, judged_parts, request},
    hash::Chain,
    header::BlockHeader,
    key::{BlockKey, BootId, LeaseId, NamespaceId, Part, Place, RunHash, SequenceHash},
    reason::{GetOutcome, TierKind},
    view::ViewDigest,
};

/// Gets and their answers, as a bit of `LocalAttach.layouts`.
pub const LAYOUT_GET: u32 = 1;
/// Puts that are told of while they are written.
pub const LAYOUT_WRITTEN: u32 = 2;
/// Every layout of this page.
pub const LAYOUTS: u32 = LAYOUT_GET | LAYOUT_WRITTEN;

const KIND_GET: u16 = 1;
const KIND_GOT: u16 = 2;
const KIND_WRITTEN: u16 = 3;

const HAS_RUN: u16 = 1;
const HAS_PARENT: u16 = 2;

const IS_HIT: u8 = 1;
const HAS_SPOT: u8 = 2;
const HIT_HAS_PARENT: u8 = 4;

/// Bytes of a get before its lists, of an answer before its blocks, of a block, and of what a hit has more.
const GET_BYTES: usize = 120;
const GOT_BYTES: usize = 40;
const BLOCK_BYTES: usize = 8;
const PART_BYTES: usize = 4;
const WRITTEN_BYTES: usize = 16;
const HIT_BYTES: usize = 104;

/// A get that is to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Asking<'a> {
    /// As in a `LocalRequest`.
    pub sequence: u64,
    /// As there.
    pub timeout_ms: u32,
    /// As there.
    pub done: &'a [u64],
    /// The caller's view; 0: none.
    pub view_digest: ViewDigest,
    /// Where.
    pub namespace: NamespaceId,
    /// Under which lease, if any.
    pub lease: Option<LeaseId>,
    /// What.
    pub chain: &'a Chain,
    /// Which parts; none, or {0, 0} alone, is the same.
    pub parts: &'a [Part],
}

/// A get that came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GetCall {
    /// As in a `LocalRequest`.
    pub sequence: u64,
    /// As there.
    pub timeout_ms: u32,
    /// As there.
    pub done: Vec<u64>,
    /// What is asked, or which field of it is wrong.
    pub asked: Result<request::Get, FieldError>,
}

/// Where a block's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    /// In which segment.
    pub segment: u32,
    /// Of the first byte, in the segment.
    pub offset: u64,
    /// What the segment's table says there as long as the slot lives.
    pub generation: u64,
}

/// One block of an answer that is to be sent.
#[derive(Clone, Copy, Debug)]
pub enum Telling<'a> {
    /// It is there.
    Hit {
        /// Which, and how its bytes sum up.
        header: &'a BlockHeader,
        /// Where it was.
        tier: TierKind,
        /// `None`: not in memory that can be mapped.
        spot: Option<Spot>,
    },
    /// It is not, and why.
    Not(GetOutcome),
}

/// What goes before the blocks of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GotHead {
    /// The call's.
    pub sequence: u64,
    /// The node's life.
    pub boot_id: BootId,
    /// The node's view.
    pub view_digest: ViewDigest,
    /// Calls that it serves.
    pub queue: u32,
    /// As in `LocalGot`.
    pub hold: u64,
}

/// An answer that came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Got {
    /// Who says so, to which call.
    pub head: GotHead,
    /// Block by block.
    pub blocks: Vec<GotBlock>,
}

/// One block of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GotBlock {
    /// What became of it; `None`: an outcome of a later version.
    pub outcome: Option<GetOutcome>,
    /// Where it was.
    pub tier: Option<TierKind>,
    /// Of a hit.
    pub hit: Option<Hit>,
}

/// A block that is there, by the node's word; nothing of it is judged yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    place: Place,
    /// Its length.
    pub length_bytes: u64,
    page_sums: Arc<[u64]>,
    seal: u64,
    /// Where it lies; `None`: not in memory that can be mapped.
    pub spot: Option<Spot>,
}

impl Hit {
    /// The header of the block with this key; its seal tells whether it is that block's.
    pub fn header(self, key: BlockKey) -> BlockHeader {
        BlockHeader {
            key,
            place: self.place,
            length_bytes: self.length_bytes,
            page_sums: self.page_sums,
            seal: self.seal,
        }
    }
}

/// Appends a get to `out` as one frame; false, and nothing appended, when it has no fixed layout.
///
/// # Errors
///
/// [`LocalFrameError::TooLong`]; `out` is as it was.
pub fn encode_get(asking: &Asking<'_>, out: &mut Vec<u8>) -> Result<bool, LocalFrameError> {
    let Asking { chain, parts, .. } = asking;
    let parts = if *parts == [Part::default()] {
        &[]
    } else {
        *parts
    };
    let (Ok(done), Ok(count)) = (u16::try_from(asking.done.len()), u16::try_from(parts.len()))
    else {
        return Ok(false);
    };
    if !chain.jumps.is_empty() {
        return Ok(false);
    }
    let lists_bytes =
        8 * asking.done.len() + PART_BYTES * parts.len() + SequenceHash::BYTES * chain.len();
    begin(GET_BYTES + lists_bytes, out)?;
    let flag = |is: bool, flag| if is { flag } else { 0 };
    out.put_u16_le(KIND_GET);
    out.put_u16_le(flag(chain.run.is_some(), HAS_RUN) | flag(chain.parent.is_some(), HAS_PARENT));
    out.put_u16_le(done);
    out.put_u16_le(count);
    out.put_u64_le(asking.sequence);
    out.put_u32_le(asking.timeout_ms);
    out.put_u32_le(chain.first_index);
    out.put_u64_le(asking.view_digest.0);
    out.put_u64_le(asking.lease.map_or(0, |lease| lease.0));
    out.put_slice(&asking.namespace.0);
    out.put_slice(&chain.run.map_or([0; RunHash::BYTES], |run| run.0));
    out.put_slice(&chain.parent.map_or([0; SequenceHash::BYTES], |hash| hash.0));
    for id in asking.done {
        out.put_u64_le(*id);
    }
    for part in parts {
        out.put_u16_le(part.rank);
        out.put_u16_le(part.layer_group);
    }
    for hash in &chain.hashes {
        out.put_slice(&hash.0);
    }
    Ok(true)
}

fn decode_get(frame: &[u8]) -> Result<GetCall, LocalFrameError> {
    let mut bytes = Rest(frame);
    bytes.kind(KIND_GET)?;
    let flags = u16::from_le_bytes(bytes.take()?);
    let done = u16::from_le_bytes(bytes.take()?);
    let parts = u16::from_le_bytes(bytes.take()?);
    let sequence = bytes.u64()?;
    let timeout_ms = bytes.u32()?;
    let first_index = bytes.u32()?;
    let view_digest = bytes.u64()?;
    let lease = bytes.u64()?;
    let namespace = NamespaceId(bytes.take()?);
    let run = named(flags & HAS_RUN != 0, bytes.take()?)?;
    let parent = named(flags & HAS_PARENT != 0, bytes.take()?)?;
    if flags & !(HAS_RUN | HAS_PARENT) != 0 {
        return Err(LocalFrameError::Misshapen("a get with unknown flags"));
    }
    let done = (0..done).map(|_| bytes.u64()).collect::<Result<_, _>>()?;
    let parts = (0..parts).map(|_| {
        Ok(Part {
            rank: u16::from_le_bytes(bytes.take()?),
            layer_group: u16::from_le_bytes(bytes.take()?),
        })
    });
    let parts: Vec<Part> = parts.collect::<Result<_, LocalFrameError>>()?;
    let (hashes, rest) = bytes.0.as_chunks::<{ SequenceHash::BYTES }>();
    if !rest.is_empty() {
        return Err(LocalFrameError::Misshapen("a get with a part of a hash"));
    }
    let judged = || {
        judged_hashes(hashes)?;
        Ok(request::Get {
            context: request::Context {
                view_digest: (view_digest != 0).then_some(ViewDigest(view_digest)),
                ..request::Context::default()
            },
            namespace,
            parts: judged_parts(parts, hashes.len())?,
            chain: Chain {
                first_index,
                run: run.map(RunHash),
                parent: parent.map(SequenceHash),
                hashes: hashes.iter().copied().map(SequenceHash).collect(),
                jumps: Vec::new(),
            },
            lease: (lease != 0).then_some(LeaseId(lease)),
            piece_bytes: None,
        })
    };
    Ok(GetCall {
        sequence,
        timeout_ms,
        done,
        asked: judged(),
    })
}

/// Appends the answer to a get to `out` as one frame.
///
/// # Errors
///
/// [`LocalFrameError::TooLong`]; `out` is as it was.
pub fn encode_got<'a>(
    head: &GotHead,
    blocks: impl Iterator<Item = Telling<'a>> + Clone,
    out: &mut Vec<u8>,
) -> Result<(), LocalFrameError> {
    let bytes = |block| match block {
        Telling::Hit { header, .. } => BLOCK_BYTES + HIT_BYTES + 8 * header.page_sums.len(),
        Telling::Not(_) => BLOCK_BYTES,
    };
    begin(GOT_BYTES + blocks.clone().map(bytes).sum::<usize>(), out)?;
    out.put_u16_le(KIND_GOT);
    out.put_u16_le(0);
    out.put_u32_le(head.queue);
    out.put_u64_le(head.sequence);
    out.put_u64_le(head.boot_id.0);
    out.put_u64_le(head.view_digest.0);
    out.put_u64_le(head.hold);
    for block in blocks {
        put_block(&block, out);
    }
    Ok(())
}

fn put_block(block: &Telling<'_>, out: &mut Vec<u8>) {
    let (header, tier, spot) = match block {
        Telling::Hit { header, tier, spot } => (*header, *tier, *spot),
        Telling::Not(outcome) => {
            out.put_slice(&[*outcome as u8, 0, 0, 0, 0, 0, 0, 0]);
            return;
        }
    };
    let has_spot = spot.map_or(0, |_| HAS_SPOT);
    let has_parent = header.place.parent.map_or(0, |_| HIT_HAS_PARENT);
    let spot = spot.unwrap_or(Spot {
        segment: 0,
        offset: 0,
        generation: 0,
    });
    out.put_u8(GetOutcome::Hit as u8);
    out.put_u8(tier as u8);
    out.put_u8(IS_HIT | has_spot | has_parent);
    out.put_u8(0);
    out.put_u32_le(header.page_sums.len() as u32); // the frame's length was found to be allowed
    out.put_u64_le(header.length_bytes);
    out.put_u64_le(header.seal);
    out.put_u64_le(spot.offset);
    out.put_u64_le(spot.generation);
    out.put_u32_le(spot.segment);
    out.put_u32_le(header.place.index);
    out.put_slice(&header.place.run.0);
    out.put_slice(
        &header
            .place
            .parent
            .map_or([0; SequenceHash::BYTES], |hash| hash.0),
    );
    for sum in &*header.page_sums {
        out.put_u64_le(*sum);
    }
}

/// An answer out of a frame of this layout.
///
/// # Errors
///
/// [`LocalFrameError::Misshapen`].
pub fn decode_got(frame: &[u8]) -> Result<Got, LocalFrameError> {
    let mut bytes = Rest(frame);
    bytes.kind(KIND_GOT)?;
    bytes.zeros::<2>()?;
    let head = GotHead {
        queue: bytes.u32()?,
        sequence: bytes.u64()?,
        boot_id: BootId(bytes.u64()?),
        view_digest: ViewDigest(bytes.u64()?),
        hold: bytes.u64()?,
    };
    let mut blocks = Vec::with_capacity(bytes.0.len() / (BLOCK_BYTES + HIT_BYTES));
    while !bytes.0.is_empty() {
        blocks.push(take_block(&mut bytes)?);
    }
    Ok(Got { head, blocks })
}

fn take_block(bytes: &mut Rest<'_>) -> Result<GotBlock, LocalFrameError> {
    let [outcome, tier, flags] = bytes.take()?;
    bytes.zeros::<1>()?;
    let sums = bytes.u32()? as usize;
    let outcome = GetOutcome::from_wire(outcome.into());
    let tier = TierKind::from_wire(tier.into());
    if flags & IS_HIT == 0 {
        if flags != 0 || sums != 0 || outcome == Some(GetOutcome::Hit) {
            return Err(LocalFrameError::Misshapen("a block that is half a hit"));
        }
        return Ok(GotBlock {
            outcome,
            tier,
            hit: None,
        });
    }
    if flags & !(IS_HIT | HAS_SPOT | HIT_HAS_PARENT) != 0 || outcome != Some(GetOutcome::Hit) {
        return Err(LocalFrameError::Misshapen("a hit with unknown flags"));
    }
    let (length_bytes, seal) = (bytes.u64()?, bytes.u64()?);
    let (offset, generation, segment) = (bytes.u64()?, bytes.u64()?, bytes.u32()?);
    let spot = Spot {
        segment,
        offset,
        generation,
    };
    let index = bytes.u32()?;
    let run = RunHash(bytes.take()?);
    let parent = named(flags & HIT_HAS_PARENT != 0, bytes.take()?)?.map(SequenceHash);
    if sums as u64 != page_count(length_bytes) || bytes.0.len() / 8 < sums {
        return Err(LocalFrameError::Misshapen(
            "a hit with more or fewer sums than it has pages",
        ));
    }
    let (words, rest) = bytes.0.split_at(8 * sums);
    bytes.0 = rest;
    let (words, _) = words.as_chunks::<8>();
    Ok(GotBlock {
        outcome,
        tier,
        hit: Some(Hit {
            place: Place { run, index, parent },
            length_bytes,
            page_sums: words.iter().map(|word| u64::from_le_bytes(*word)).collect(),
            seal,
            spot: (flags & HAS_SPOT != 0).then_some(spot),
        }),
    })
}

/// Pages of a put that have been written since the last of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The put's.
    pub sequence: u64,
    /// One per page.
    pub sums: Vec<u64>,
}

/// Appends one more piece of news of a put to `out` as one frame.
///
/// # Errors
///
/// [`LocalFrameError::TooLong`]; `out` is as it was.
pub fn encode_written(
    sequence: u64,
    sums: &[u64],
    out: &mut Vec<u8>,
) -> Result<(), LocalFrameError> {
    begin(WRITTEN_BYTES + 8 * sums.len(), out)?;
    out.put_u16_le(KIND_WRITTEN);
    out.put_slice(&[0; 6]);
    out.put_u64_le(sequence);
    for sum in sums {
        out.put_u64_le(*sum);
    }
    Ok(())
}

/// What came in on a node's side in a frame of these layouts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "moved once, and the large one is the one that must be quick"
)]
pub enum Request {
    /// A call.
    Get(GetCall),
    /// More of a put.
    Written(Written),
}

/// A client's frame of these layouts.
///
/// # Errors
///
/// [`LocalFrameError::Misshapen`].
pub fn decode_request(frame: &[u8]) -> Result<Request, LocalFrameError> {
    let mut bytes = Rest(frame);
    if u16::from_le_bytes(bytes.take()?) != KIND_WRITTEN {
        return decode_get(frame).map(Request::Get);
    }
    bytes.zeros::<6>()?;
    let sequence = bytes.u64()?;
    let (words, rest) = bytes.0.as_chunks::<8>();
    if !rest.is_empty() || words.is_empty() {
        return Err(LocalFrameError::Misshapen("no sum, or a part of one"));
    }
    Ok(Request::Written(Written {
        sequence,
        sums: words.iter().map(|word| u64::from_le_bytes(*word)).collect(),
    }))
}

fn begin(length_bytes: usize, out: &mut Vec<u8>) -> Result<(), LocalFrameError> {
    let prefix = prefix(length_bytes)?;
    debug_assert!(length_bytes <= MAX_FRAME_BYTES, "judged by the prefix");
    out.reserve(PREFIX_BYTES + length_bytes);
    out.put_u32_le(prefix | FIXED);
    Ok(())
}

/// A hash where one is named, and zeros where none is.
fn named<const N: usize>(is: bool, bytes: [u8; N]) -> Result<Option<[u8; N]>, LocalFrameError> {
    match is {
        true => Ok(Some(bytes)),
        false if bytes == [0; N] => Ok(None),
        false => Err(LocalFrameError::Misshapen("a hash that is not named")),
    }
}

/// What is left of a frame.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], LocalFrameError> {
        let Some((now, later)) = self.0.split_first_chunk() else {
            return Err(LocalFrameError::Misshapen("it ends too early"));
        };
        self.0 = later;
        Ok(*now)
    }

    fn u32(&mut self) -> Result<u32, LocalFrameError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, LocalFrameError> {
        self.take().map(u64::from_le_bytes)
    }

    fn kind(&mut self, kind: u16) -> Result<(), LocalFrameError> {
        match u16::from_le_bytes(self.take()?) == kind {
            true => Ok(()),
            false => Err(LocalFrameError::Misshapen("a frame of another kind")),
        }
    }

    fn zeros<const N: usize>(&mut self) -> Result<(), LocalFrameError> {
        match self.take::<N>()? == [0; N] {
            true => Ok(()),
            false => Err(LocalFrameError::Misshapen("no zeros where they belong")),
        }
    }
}

#[cfg(test)]
mod tests;
