//! Bulk get: from the socket into the caller's memory, checked on the way.
//!
//! ```text
//! request ─cut─► calls ─┬─ lane ──────── frames ─► reading ─┐
//!                       └─ same host ─── copies ────────────┴─► sink: the caller's memory, summed
//! ```
//!
//! Units: bytes.
//! Errors: [`Error::Truncated`], [`Error::Answer`] when the stream is not what was asked for; a block
//! that is missing, expired or corrupt is an outcome.
//! Why below the codec: tonic would gather a message before anyone sees it, and copy it twice.

mod reading;
pub(crate) mod sink;

use bytes::Bytes;
use kvproto::{BlockKey, Chain, FieldError, GetOutcome, LeaseId, Part, TierKind, convert, v1};

use self::{
    reading::Reading,
    sink::{Behind, Destination, Destinations, Kept, Sink},
};
use crate::{
    batch,
    call::{Deadline, Inner, Tries},
    error::Error,
    lane::Question,
    lease::Lease,
    local,
    namespace::NamespaceHandle,
    wire::{self, Method},
};

const METHOD: Method = Method::GET;

/// How a get is made. `From<Option<&Lease>>` and `From<&Lease>` are the usual ways to have one.
#[derive(Clone, Copy, Debug, Default)]
pub struct GetOptions<'a> {
    /// Under a lease a get never fails by eviction; without one it takes what it finds.
    pub lease: Option<&'a Lease>,
    /// Parts of each block, in order; empty means the part {0, 0}.
    pub parts: &'a [Part],
}

impl<'a> From<Option<&'a Lease>> for GetOptions<'a> {
    fn from(lease: Option<&'a Lease>) -> Self {
        Self { lease, parts: &[] }
    }
}

impl<'a> From<&'a Lease> for GetOptions<'a> {
    fn from(lease: &'a Lease) -> Self {
        Some(lease).into()
    }
}

/// What became of one block (of one part of it) of a get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Got {
    /// Hit, or why not.
    pub outcome: GetOutcome,
    /// Where a hit came from, if the node says.
    pub tier: Option<TierKind>,
    /// Bytes of a hit; its buffer may be longer.
    pub length_bytes: usize,
}

impl Got {
    /// No bytes, and why.
    pub(crate) fn not(outcome: GetOutcome) -> Self {
        Self {
            outcome,
            tier: None,
            length_bytes: 0,
        }
    }

    /// True when the buffer holds the block.
    #[must_use]
    pub fn is_hit(&self) -> bool {
        self.outcome == GetOutcome::Hit
    }
}

/// A block handed over by [`crate::Client::get`].
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Hit, or why not.
    pub outcome: GetOutcome,
    /// Where a hit came from, if the node says.
    pub tier: Option<TierKind>,
    /// The bytes of a hit, verified.
    pub bytes: Option<Bytes>,
}

/// One call's worth of a get.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) namespace: &'a NamespaceHandle,
    pub(crate) chain: &'a Chain,
    /// As in [`GetOptions`].
    pub(crate) parts: &'a [Part],
    /// Under which lease, by its id at the node.
    pub(crate) lease: Option<LeaseId>,
}

impl Wanted<'_> {
    pub(crate) fn parts(&self) -> &[Part] {
        match self.parts {
            [] => &[Part {
                rank: 0,
                layer_group: 0,
            }],
            parts => parts,
        }
    }

    /// Objects asked for: blocks times parts.
    pub(crate) fn count(&self) -> usize {
        self.chain.hashes.len() * self.parts().len()
    }

    pub(crate) fn key(&self, slot: usize) -> BlockKey {
        let parts = self.parts();
        BlockKey {
            namespace: self.namespace.id(),
            hash: self.chain.hashes[slot / parts.len()],
            part: parts[slot % parts.len()],
        }
    }
}

/// Gets blocks into the caller's memory, one destination each.
pub(crate) async fn into_destinations<T: Destination>(
    inner: &Inner,
    deadline: Deadline,
    wanted: &Wanted<'_>,
    destinations: &mut [T],
) -> Result<Vec<Got>, Error> {
    let (count, parts) = (wanted.count(), wanted.parts().len());
    if destinations.len() != count {
        return Err(FieldError::new(
            "buffers",
            format!(
                "{} given for {count} blocks; give one each",
                destinations.len()
            ),
        )
        .into());
    }
    let sizes = destinations.chunks(parts).map(|block| {
        block
            .iter()
            .map(|destination| destination.room_bytes() as u64)
            .sum()
    });
    let ranges = batch::cut(
        sizes,
        (batch::MAX_CALL_BLOCKS / parts).max(1),
        batch::MAX_CALL_BYTES,
    );
    if ranges.len() == 1 {
        return one_call(
            inner,
            deadline,
            wanted,
            &mut Destinations::new(destinations),
        )
        .await;
    }
    let mut rest = destinations;
    let mut calls = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (mine, others) = rest.split_at_mut(range.len() * parts);
        rest = others;
        let chain = wanted.chain.slice(range, wanted.namespace.run_blocks());
        calls.push(async move {
            let wanted = Wanted {
                chain: &chain,
                ..*wanted
            };
            one_call(inner, deadline, &wanted, &mut Destinations::new(mine)).await
        });
    }
    batch::join(calls, inner.parallel).await
}

/// Gets blocks as the bytes they were read into, copied only where they arrived in several pieces.
pub(crate) async fn fetch(
    inner: &Inner,
    deadline: Deadline,
    wanted: &Wanted<'_>,
) -> Result<Vec<Fetched>, Error> {
    let parts = wanted.parts().len();
    // Sizes are not known beforehand; the number of blocks alone bounds a call.
    let blocks = wanted.chain.hashes.len();
    let ranges = batch::cut(
        std::iter::repeat_n(0, blocks),
        (batch::MAX_CALL_BLOCKS / parts).max(1),
        batch::MAX_CALL_BYTES,
    );
    let calls = ranges.into_iter().map(|range| async move {
        let chain = wanted.chain.slice(range, wanted.namespace.run_blocks());
        let wanted = Wanted {
            chain: &chain,
            ..*wanted
        };
        let mut kept = Kept::new(wanted.count());
        let got = one_call(inner, deadline, &wanted, &mut kept).await?;
        let fetched = got.iter().zip(kept.blocks).map(|(got, bytes)| Fetched {
            outcome: got.outcome,
            tier: got.tier,
            bytes: bytes.filter(|_| got.is_hit()),
        });
        Ok(fetched.collect())
    });
    batch::join(calls.collect(), inner.parallel).await
}

/// One call: over the same-host path what can be had there, the rest over gRPC.
async fn one_call<S: Sink>(
    inner: &Inner,
    deadline: Deadline,
    wanted: &Wanted<'_>,
    sink: &mut S,
) -> Result<Vec<Got>, Error> {
    let Some(got) = local::get(inner, deadline, wanted, sink).await? else {
        return over_grpc(inner, deadline, wanted, sink).await;
    };
    let parts = wanted.parts().len();
    let mut whole = Vec::with_capacity(got.len());
    // Neighbours that must go over gRPC go in one call.
    for run in got
        .chunks(parts)
        .collect::<Vec<_>>()
        .chunk_by(|a, b| is_whole(a) == is_whole(b))
    {
        if run.iter().all(|block| is_whole(block)) {
            whole.extend(run.iter().flat_map(|block| block.iter().flatten()));
            continue;
        }
        let first = whole.len() / parts;
        let blocks = first..first + run.len();
        let chain = wanted.chain.slice(blocks, wanted.namespace.run_blocks());
        let wanted = Wanted {
            chain: &chain,
            ..*wanted
        };
        let mut behind = Behind {
            sink: &mut *sink,
            first: whole.len(),
        };
        whole.extend(over_grpc(inner, deadline, &wanted, &mut behind).await?);
    }
    Ok(whole)
}

/// Whether all parts of a block have their answer.
fn is_whole(block: &[Option<Got>]) -> bool {
    block.iter().all(Option::is_some)
}

async fn over_grpc<S: Sink>(
    inner: &Inner,
    deadline: Deadline,
    wanted: &Wanted<'_>,
    sink: &mut S,
) -> Result<Vec<Got>, Error> {
    let mut tries = Tries::new(inner, METHOD, deadline);
    loop {
        let question = wire::encode(&v1::GetRequest {
            context: Some(inner.context(&tries.request)),
            namespace_id: Bytes::copy_from_slice(&wanted.namespace.id().0),
            chain: Some(convert::chain_to_wire(wanted.chain)),
            parts: convert::parts_to_wire(wanted.parts),
            lease_id: wanted.lease.map_or(0, |lease| lease.0),
            piece_bytes: 0,
        });
        let sink = &mut *sink;
        let answer = tries
            .run(|_checkout, left| async move {
                let authorization = inner.authorization.as_ref();
                let mut reading = Reading::new(inner, wanted, sink);
                let mut asked = Question(&question);
                let exchange = wire::exchange(
                    &inner.lanes,
                    METHOD,
                    left,
                    authorization,
                    &mut asked,
                    &mut reading,
                );
                let outcome = exchange.await;
                reading.failed.take().map_or(outcome, Err)?;
                reading.finish()
            })
            .await?;
        if let Ok(answer) = answer {
            let hits = answer.iter().filter(|got| got.is_hit());
            let (blocks, bytes) = hits.fold((0, 0), |(n, bytes), got| {
                (n + 1, bytes + got.length_bytes as u64)
            });
            inner.local.grpc.got(blocks, bytes);
            return Ok(answer);
        }
    }
}
