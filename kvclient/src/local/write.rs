//! Put: into the client's own shared memory, from where the node takes it.
//!
//! ```text
//! call 1  grant ─ copy + sum ─ say where ──────────► node copies, checks ─► results
//! call 2          grant ─ copy + sum ─ say where ──────► …                         large puts in several calls:
//! call 3                  grant ─ …                                                 one is written while the node
//!                                                                                   copies the one before
//! ```
//!
//! Units: bytes.
//! Errors: [`LocalError`]; a rejection is a result.
//! Why the node copies: what a client can write never becomes a block, so nobody can change one after its
//! sums were checked.

use bytes::Bytes;
use kvproto::{
    BlockHeader,
    checksum::{PAGE_BYTES, PageSummer},
    convert::answer::PutResult,
    v1::{self, local_reply::Answer, local_request::Call},
};

use super::{
    Local, Way,
    error::LocalError,
    staging::{Grant, Staging},
};
use crate::{call::Deadline, put::Putting};

/// Most payload of one call: the node copies the first while the second is written.
pub(crate) const CALL_BYTES: u64 = 4 << 20;

/// Puts over the same-host path. `None`: over gRPC.
pub(crate) async fn put(putting: &Putting<'_>, deadline: Deadline) -> Option<Vec<PutResult>> {
    let inner = putting.inner;
    let way = Local::way(inner, deadline).await?;
    let staging = way.attachment.staging.as_ref()?;
    let outcome = way.write(staging, putting).await?;
    let lengths = putting.blocks.iter().map(|b| b.data.length_bytes() as u64);
    let tally = &inner.local.local;
    tally.put(putting.blocks.len() as u64, lengths.sum());
    Some(outcome)
}

impl Way<'_> {
    async fn write(&self, staging: &Staging, putting: &Putting<'_>) -> Option<Vec<PutResult>> {
        let inner = self.inner;
        let lengths: Vec<u64> = putting
            .blocks
            .iter()
            .map(|block| block.data.length_bytes() as u64)
            .collect();
        let clock = &*inner.clock;
        // No room in time speaks neither against the node nor against the path.
        let granted = crate::clock::within(clock, self.until, staging.grant(&lengths)).await;
        let mut grant = granted.flatten()?;
        let blocks = fill(&grant, putting)
            .inspect_err(|error| tracing::warn!(%error, "staging memory"))
            .ok()?;
        let call = Call::Put(v1::LocalPut {
            start: Some(v1::PutStart {
                context: Some(inner.view_context()),
                namespace_id: Bytes::copy_from_slice(&putting.namespace.id().0),
                ack: putting.options.ack.to_wire().into(),
                kind: putting.options.kind.to_wire().into(),
                survived: Vec::new(), // what a client gives is new
            }),
            blocks,
        });
        let answer = self.run(async |turn| {
            grant.sent();
            let outcome = turn.link.call(call, self.left()).await;
            if outcome
                .as_ref()
                .map_or_else(LocalError::is_harmless, |_| true)
            {
                grant.answered();
            }
            let Answer::Put(answer) = outcome?.0 else {
                return Err(LocalError::answer("no answer to a put"));
            };
            putting.results(answer).map_err(LocalError::answer)
        });
        answer.await?.ok()
    }
}

/// Copies the blocks to where they were granted room, summing them on the way.
fn fill(grant: &Grant<'_>, putting: &Putting<'_>) -> Result<Vec<v1::LocalWritten>, LocalError> {
    let mut written = Vec::with_capacity(putting.blocks.len());
    for (i, block) in putting.blocks.iter().enumerate() {
        let length = block.data.length_bytes();
        let (mut bytes, mut at, mut sums) = (block.data.reader(), 0, PageSummer::new());
        while let Some(slice) = bytes.next(PAGE_BYTES - at % PAGE_BYTES) {
            let page = (length - at).min(PAGE_BYTES);
            // The sums are those of the caller's bytes: what the node copies is checked against what was meant.
            let put = if slice.len() == page && at.is_multiple_of(PAGE_BYTES) {
                let sum = grant.write_page(i, at as u64, slice);
                sum.map(|sum| sums.page(sum))
            } else {
                sums.update(slice);
                grant.write(i, at as u64, slice)
            };
            put.map_err(LocalError::answer)?;
            at += slice.len();
        }
        let announced = putting.announce(block);
        let header = BlockHeader::with_sums(
            announced.key,
            announced.place,
            announced.length_bytes,
            sums.finish(),
        );
        written.push(v1::LocalWritten {
            header: Some((&header).into()),
            offset: grant.offset(i),
        });
    }
    Ok(written)
}
