//! Put: from a client's staging memory into slots, summed on the way.
//!
//! ```text
//! every header and offset judged ─► block by block: reserve ─► page: copied and summed in one pass ─► publish
//! ```
//!
//! A put that follows is copied page by page while its client writes the next: its first page is told of when the slot is
//! reserved already.
//!
//! The sums are of what lies in the slot. A client that changes its bytes while they are copied, or before, is a
//! client whose block is corrupt; what it does to its memory afterwards is nothing to the block.

use std::collections::VecDeque;

use kvgpu::{Toward, copy::STREAM_FROM_BYTES};
use kvproto::{
    Announced, BlockHeader, FieldError, NamespaceId,
    checksum::{PAGE_BYTES, page_count},
    convert::{HeaderRules, PutHeader, header, put_header, request},
    v1,
};

use super::{Refused, session::Session};
use crate::clock::Tick;

impl Session {
    pub(super) fn put(
        &mut self,
        sequence: u64,
        mut wire: v1::LocalPut,
        deadline: Tick,
    ) -> Result<v1::PutResponse, Refused> {
        let start = wire
            .start
            .take()
            .ok_or_else(|| FieldError::new("put.start", "is missing"))?;
        let start = request::PutStart::try_from(start)?;
        let owner = self.owner(&start.context)?;
        let attachment = self.attached()?.attachment.clone();
        let Some(staging) = &attachment.staging else {
            let problem = "this attachment has no staging memory; put over gRPC";
            return Err(FieldError::new("put.blocks.offset", problem).into());
        };
        let blocks = &self.shared.blocks;
        let mut session = blocks.put(owner.tenant, start.namespace, start.ack, start.kind)?;
        if !start.context.no_forward {
            session.passes_on();
        }
        let rules = rules(
            start.namespace,
            session.run_blocks(),
            blocks.limits.max_block_bytes,
        );
        let judged = judge(&wire, rules, staging.length_bytes())?;
        // Of the pages that are written and not copied yet.
        let mut written: VecDeque<u64> = VecDeque::new();
        for (header, offset) in judged {
            self.check(deadline)?;
            let announced = match &header {
                PutHeader::Summed(header) => Announced::from(header),
                PutHeader::Announced(announced) => *announced,
            };
            let length = announced.length_bytes;
            let toward = match length < STREAM_FROM_BYTES as u64 {
                true => Toward::Cache,
                false => Toward::Memory, // a slot is read later, and by somebody else
            };
            match header {
                PutHeader::Summed(header) => session.block(header)?,
                PutHeader::Announced(announced) => session.announce(announced)?,
            }
            let mut sums = Vec::new();
            for page in 0..page_count(length) {
                if wire.follows {
                    while written.is_empty() {
                        written.extend(self.written(sequence, deadline)?);
                    }
                    sums.extend(written.pop_front());
                }
                // A block that is here already, or refused: what comes of it goes nowhere.
                let Some(room) = session.room() else {
                    continue;
                };
                let bytes = room.len().min(PAGE_BYTES);
                let at = offset + page * PAGE_BYTES as u64;
                let sum = staging
                    .read_summed(at, &mut room[..bytes], toward)
                    .map_err(|error| FieldError::new("put.blocks.offset", error.to_string()))?;
                session.landed_page(bytes, sum)?;
                self.shared.metrics.local.put_bytes.inc_by(bytes as u64);
            }
            let wasted = session.wasted_bytes();
            if wasted > 0 {
                session.skip(wasted)?;
            }
            if wire.follows {
                let Announced { key, place, .. } = announced;
                let header = BlockHeader::with_sums(key, place, length, sums);
                session.sums(&v1::BlockSums {
                    page_sums: header.page_sums.to_vec(),
                    seal: header.seal,
                })?;
            }
        }
        if !written.is_empty() {
            let problem = "has more pages than the put's blocks";
            return Err(FieldError::new("written.sums", problem).into());
        }
        let results = self.wait(session.finish(), deadline)??;
        Ok(v1::PutResponse {
            context: Some((&self.answer(&start.context)).into()),
            results: results.into_iter().map(Into::into).collect(),
        })
    }
}

fn rules(namespace: NamespaceId, run_blocks: u32, max_block_bytes: u64) -> HeaderRules {
    HeaderRules {
        namespace,
        run_blocks,
        max_block_bytes,
    }
}

/// Every block's header and where its bytes are: all of them, before the first is copied.
fn judge(
    put: &v1::LocalPut,
    rules: HeaderRules,
    staging_bytes: u64,
) -> Result<Vec<(PutHeader, u64)>, FieldError> {
    if put.blocks.is_empty() {
        return Err(FieldError::new("put.blocks", "are missing"));
    }
    let mut together = 0_u64;
    let judge = |block: &v1::LocalWritten| {
        let wire = block
            .header
            .as_ref()
            .ok_or_else(|| FieldError::new("put.blocks.header", "is missing"))?;
        let header = match put.follows {
            false => PutHeader::Summed(header(wire, rules)?),
            true => put_header(wire, rules)?,
        };
        let length_bytes = match &header {
            PutHeader::Announced(announced) => announced.length_bytes,
            PutHeader::Summed(_) if put.follows => {
                let problem = "has sums, which shall follow";
                return Err(FieldError::new("put.blocks.header", problem));
            }
            PutHeader::Summed(header) => header.length_bytes,
        };
        together = together.saturating_add(length_bytes);
        let end = block.offset.checked_add(length_bytes);
        if end.is_none_or(|end| end > staging_bytes) {
            let problem = format!(
                "is {}; {length_bytes} bytes from there on lie outside of the {staging_bytes} bytes of staging memory",
                block.offset
            );
            return Err(FieldError::new("put.blocks.offset", problem));
        }
        Ok((header, block.offset))
    };
    let judged: Vec<_> = put.blocks.iter().map(judge).collect::<Result<_, _>>()?;
    // Blocks that lie side by side fit; the same bytes over and over would keep the node copying for a short request.
    if together > staging_bytes {
        let problem = format!(
            "have {together} bytes together, more than the {staging_bytes} bytes of staging memory"
        );
        return Err(FieldError::new("put.blocks", problem));
    }
    Ok(judged)
}
