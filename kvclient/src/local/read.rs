//! Get: from the node's memory into the caller's with one copy, and proof that it was the right one.
//!
//! ```text
//! ask ─► where each block lies ─► per block, first of the prefix first:
//!            generation as told? ─► 64 KiB: copied and summed in one pass ─► … ─► generation again
//!                 └─ no: expired                                    sums as the writer's? ── no: corrupt
//! ```
//!
//! The sums are made of what is stored at the destination, byte for byte, so they cover the copy. The generation is
//! read again behind the last byte: the node raises it before it writes a byte of the slot's next tenant. So a process
//! that was stopped in the middle and goes on after its lease is over finds out before anybody uses a byte.
//!
//! Units: bytes.
//! Errors: [`LocalError`]; a block that is gone, expired or corrupt is an outcome.

use bytes::Bytes;
use kvgpu::{ReadSegment, Toward};
use kvproto::{
    BlockHeader, GetOutcome, TierKind, ViewDigest,
    checksum::PAGE_BYTES,
    convert,
    local::fixed::{Asking, GotBlock, Hit, Spot},
    v1,
};

use super::{Local, Way, attachment::Turn, error::LocalError, link, segments::Mapped};
use crate::{
    call::{Deadline, Inner},
    error::Error,
    get::{
        Got, Wanted,
        sink::{Behind, Sink},
    },
};

/// An answer of more bytes goes past the cache: whoever looks at the last of them would find the first gone from
/// a core's share of it. Into memory that no cache holds this is a fifth quicker, into memory that one does
/// a fifth slower.
const CACHED_BYTES: u64 = 1 << 20;

/// Bytes copied in a row before the caller's other tasks, and its deadline, are looked at.
const TURN_BYTES: usize = 8 << 20;

/// Gets what can be had over the same-host path: one answer for each object asked for, `None` for those that
/// lie where they cannot be mapped. `Ok(None)`: all of it is to be had over gRPC.
///
/// # Errors
/// [`Error::Request`] when a block does not fit its buffer.
pub(crate) async fn get<S: Sink>(
    inner: &Inner,
    deadline: Deadline,
    wanted: &Wanted<'_>,
    sink: &mut S,
) -> Result<Option<Vec<Option<Got>>>, Error> {
    let parts = wanted.parts().len();
    let mut got = Vec::with_capacity(wanted.count());
    while got.len() < wanted.count() {
        let Some(way) = Local::way(inner, deadline).await else {
            break;
        };
        let mut behind = Behind {
            first: got.len(),
            sink: &mut *sink,
        };
        let blocks = got.len() / parts..wanted.chain.len();
        let pass = if blocks.start == 0 {
            way.run(async |turn| way.read(turn, wanted, &mut behind).await)
                .await
        } else {
            // What the node could not keep beside the blocks before, which are read by now.
            let chain = wanted.chain.slice(blocks, wanted.namespace.run_blocks());
            let rest = Wanted {
                chain: &chain,
                ..*wanted
            };
            way.run(async |turn| way.read(turn, &rest, &mut behind).await)
                .await
        };
        match pass {
            Some(Ok(pass)) if !pass.is_empty() => got.extend(pass),
            Some(Err(LocalError::Field(problem))) => return Err(problem.into()),
            _ => break,
        }
    }
    if got.is_empty() {
        return Ok(None);
    }
    got.resize(wanted.count(), None);
    Ok(Some(got))
}

/// What the node says of the blocks asked for.
pub(super) struct Asked {
    pub(super) said: Vec<Said>,
    pub(super) segments: Mapped<ReadSegment>,
    /// What keeps them there; 0: the lease does.
    pub(super) hold: u64,
}

/// A block that is there, by the node's word.
pub(super) struct Found {
    pub(super) header: BlockHeader,
    pub(super) tier: Option<TierKind>,
    spot: Spot,
}

/// What the node says of a block.
pub(super) enum Said {
    Found(Found),
    /// There, but not where it can be mapped.
    Elsewhere,
    Not(GetOutcome),
}

impl Way<'_> {
    /// The leading blocks that the node kept for us; all of them, as a rule.
    async fn read<S: Sink>(
        &self,
        turn: &mut Turn,
        wanted: &Wanted<'_>,
        sink: &mut S,
    ) -> Result<Vec<Option<Got>>, LocalError> {
        let Asked {
            said,
            segments,
            hold,
        } = self.ask(turn, wanted).await?;
        // Said with the link's next call, which comes after this one, however this one ends.
        if hold != 0 {
            turn.link.done.push(hold);
        }
        let toward = toward(said.iter().map(Said::length_bytes).sum());
        let mut got = Vec::with_capacity(said.len());
        let mut in_turn = 0;
        for (slot, said) in said.into_iter().enumerate() {
            let found = match said {
                Said::Found(found) => found,
                Said::Elsewhere => {
                    got.push(None);
                    continue;
                }
                Said::Not(outcome) => {
                    got.push(Some(Got::not(outcome)));
                    continue;
                }
            };
            let Some(segment) = segments.get(found.spot.segment) else {
                got.push(None);
                continue;
            };
            let length_bytes = found.header.length_bytes as usize;
            if in_turn + length_bytes > TURN_BYTES && in_turn > 0 {
                tokio::task::yield_now().await;
                in_turn = 0;
            }
            in_turn += length_bytes;
            let outcome = copy(segment, &found, slot, toward, sink)?;
            if outcome != GetOutcome::Hit {
                tracing::warn!(key = %found.header.key, %outcome, "a block changed while it was read, or lies wrong");
                sink.spoil(slot);
                got.push(Some(Got::not(outcome)));
                continue;
            }
            got.push(Some(Got {
                outcome,
                tier: found.tier,
                length_bytes,
            }));
        }
        let (hits, hit_bytes) = count(&got, wanted.parts().len());
        self.inner.local.local.got(hits, hit_bytes);
        Ok(got)
    }

    /// Where the leading blocks lie that the node kept for us, and the segments they lie in.
    pub(super) async fn ask(
        &self,
        turn: &mut Turn,
        wanted: &Wanted<'_>,
    ) -> Result<Asked, LocalError> {
        let view_digest = self.inner.views.digest();
        let asking = Asking {
            sequence: 0, // the link's
            timeout_ms: 0,
            done: &[],
            view_digest: ViewDigest(view_digest),
            namespace: wanted.namespace.id(),
            lease: wanted.lease,
            chain: wanted.chain,
            parts: wanted.parts,
        };
        let message = || v1::GetRequest {
            context: Some(self.inner.view_context()),
            namespace_id: Bytes::copy_from_slice(&wanted.namespace.id().0),
            chain: Some(convert::chain_to_wire(wanted.chain)),
            parts: convert::parts_to_wire(wanted.parts),
            lease_id: wanted.lease.map_or(0, |lease| lease.0),
            piece_bytes: 0,
        };
        let got = turn.link.get(asking, self.left(), message).await?;
        let (said, hold) = match got {
            link::Got::Message(got) => {
                self.inner.heard(got.context.as_ref());
                self.inner.heard_of(&got.seconds);
                let told = got.blocks.into_iter().map(Told::of_message);
                (judge_all(wanted, told)?, got.hold)
            }
            link::Got::Fixed(got) => {
                let context = v1::ResponseContext {
                    boot_id: got.head.boot_id.0,
                    view_digest: got.head.view_digest.0,
                    members: Vec::new(),
                    queue: got.head.queue,
                };
                self.inner.heard(Some(&context));
                let told = got.blocks.into_iter().map(Told::of_layout);
                (judge_all(wanted, told)?, got.head.hold)
            }
        };
        let named: Vec<u32> = said.iter().filter_map(Said::segment).collect();
        let mapped = self
            .attachment
            .segments(&mut turn.link, &named, self.left())
            .await;
        // Not before: the call that maps must not let go of what is to be read.
        if mapped.is_err() && hold != 0 {
            turn.link.done.push(hold);
        }
        let segments = mapped?;
        Ok(Asked {
            said,
            segments,
            hold,
        })
    }
}

/// Hits and their bytes, of the blocks of which every part was found. The others go over gRPC whole, and are
/// counted there.
fn count(got: &[Option<Got>], parts: usize) -> (u64, u64) {
    let whole = got
        .chunks(parts)
        .filter(|block| block.iter().all(Option::is_some));
    let hits = whole.flatten().flatten().filter(|got| got.is_hit());
    hits.fold((0, 0), |(n, bytes), got| {
        (n + 1, bytes + got.length_bytes as u64)
    })
}

impl Said {
    fn length_bytes(&self) -> u64 {
        match self {
            Self::Found(found) => found.header.length_bytes,
            _ => 0,
        }
    }

    pub(super) fn segment(&self) -> Option<u32> {
        match self {
            Self::Found(found) => Some(found.spot.segment),
            _ => None,
        }
    }
}

/// What the node says of a block, as it came.
struct Told {
    /// `None`: one that is not known here.
    outcome: Option<GetOutcome>,
    tier: Option<TierKind>,
    header: ToldHeader,
    spot: Option<Spot>,
}

enum ToldHeader {
    Message(Option<v1::BlockHeader>),
    Layout(Option<Hit>),
}

impl Told {
    fn of_message(block: v1::LocalBlock) -> Self {
        Self {
            outcome: GetOutcome::from_wire(block.outcome),
            tier: TierKind::from_wire(block.tier),
            header: ToldHeader::Message(block.header),
            spot: block.place.map(|place| Spot {
                segment: place.segment,
                offset: place.offset,
                generation: place.generation,
            }),
        }
    }

    fn of_layout(block: GotBlock) -> Self {
        Self {
            outcome: block.outcome,
            tier: block.tier,
            spot: block.hit.as_ref().and_then(|hit| hit.spot),
            header: ToldHeader::Layout(block.hit),
        }
    }
}

/// The leading blocks that the node kept.
fn judge_all(
    wanted: &Wanted<'_>,
    told: impl ExactSizeIterator<Item = Told>,
) -> Result<Vec<Said>, LocalError> {
    let (count, parts) = (wanted.count(), wanted.parts().len());
    if told.len() != count {
        let problem = format!("{} blocks, asked for {count}", told.len());
        return Err(LocalError::answer(problem));
    }
    // Without a lease the node keeps only so much at once for a reader.
    let kept = told.take_while(|told| told.outcome != Some(GetOutcome::Overloaded));
    let judged = kept
        .enumerate()
        .map(|(slot, told)| judge(wanted, slot, told));
    let mut said: Vec<Said> = judged.collect::<Result<_, _>>()?;
    said.truncate(said.len() / parts * parts);
    Ok(said)
}

fn judge(wanted: &Wanted<'_>, slot: usize, told: Told) -> Result<Said, LocalError> {
    let outcome = told
        .outcome
        .ok_or_else(|| LocalError::answer("an outcome that is not known"))?;
    if outcome != GetOutcome::Hit {
        return Ok(Said::Not(outcome));
    }
    let Some(spot) = told.spot else {
        return Ok(Said::Elsewhere);
    };
    let (key, rules) = (wanted.key(slot), wanted.namespace.header_rules());
    let header = match told.header {
        ToldHeader::Message(header) => {
            header.and_then(|header| convert::header(&header, rules).ok())
        }
        ToldHeader::Layout(hit) => hit
            .map(|hit| hit.header(key))
            .filter(|header| (1..=rules.max_block_bytes).contains(&header.length_bytes)),
    };
    let header = header.filter(|header| header.key == key && header.check_seal());
    let Some(header) = header else {
        tracing::warn!(%key, "block does not match its checksums and was dropped");
        return Ok(Said::Not(GetOutcome::Corrupt));
    };
    Ok(Said::Found(Found {
        header,
        tier: told.tier,
        spot,
    }))
}

/// Where the bytes of an answer are on their way to, by how many they are.
pub(super) fn toward(bytes: u64) -> Toward {
    match bytes <= CACHED_BYTES {
        true => Toward::Cache,
        false => Toward::Memory,
    }
}

/// Copies a block to where it belongs. Anything but a hit: what lies there now is not the block.
pub(super) fn copy<S: Sink>(
    segment: &ReadSegment,
    found: &Found,
    slot: usize,
    toward: Toward,
    sink: &mut S,
) -> Result<GetOutcome, LocalError> {
    let Found { header, spot, .. } = found;
    let is_there = || segment.generation(spot.offset) == Some(spot.generation);
    if !is_there() {
        return Ok(GetOutcome::Expired);
    }
    let length = usize::try_from(header.length_bytes).unwrap_or(usize::MAX);
    sink.open(slot, length)?;
    let mut at = 0;
    while at < length {
        let room = sink.room(slot);
        let page = (length - at).min(PAGE_BYTES - at % PAGE_BYTES);
        let take = room.len().min(page);
        let (from, to) = (spot.offset.saturating_add(at as u64), &mut room[..take]);
        if take == page && at.is_multiple_of(PAGE_BYTES) {
            let sum = segment.copy_summed(from, to, toward);
            sink.landed_page(slot, take, sum.map_err(LocalError::answer)?);
        } else {
            segment.copy(from, to).map_err(LocalError::answer)?;
            sink.landed(slot, take);
        }
        at += take;
    }
    let sums = sink.close(slot);
    Ok(if !is_there() {
        GetOutcome::Expired
    } else if header.check(&sums).is_err() {
        GetOutcome::Corrupt
    } else {
        GetOutcome::Hit
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_which_a_part_goes_over_grpc_is_not_counted_here() {
        let hit = Some(Got {
            outcome: GetOutcome::Hit,
            tier: None,
            length_bytes: 10,
        });
        let miss = Some(Got::not(GetOutcome::Miss));
        assert_eq!(count(&[hit, hit, hit, None, hit, miss], 2), (3, 30));
        assert_eq!(count(&[hit, None, hit], 1), (2, 20));
    }
}
