//! Put: from a client's staging memory into slots, summed on the way.
//!
//! ```text
//! every header and offset judged ─► block by block: reserve ─► page: copied and summed in one pass ─► publish
//! ```
//!
//! The sums are of what lies in the slot. A client that changes its bytes while they are copied, or before, is a
//! client whose block is corrupt; what it does to its memory afterwards is nothing to the block.

use kvgpu::{Toward, copy::STREAM_FROM_BYTES};
use kvproto::{
    BlockHeader, FieldError, NamespaceId,
    checksum::PAGE_BYTES,
    convert::{HeaderRules, header, request},
    v1,
};

use super::{Refused, session::Session};
use crate::clock::Tick;

impl Session {
    pub(super) fn put(
        &mut self,
        wire: v1::LocalPut,
        deadline: Tick,
    ) -> Result<v1::PutResponse, Refused> {
        let start = wire
            .start
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
        let judged = judge(&wire.blocks, rules, staging.length_bytes())?;
        for (header, offset) in judged {
            self.check(deadline)?;
            let toward = match header.length_bytes < STREAM_FROM_BYTES as u64 {
                true => Toward::Cache,
                false => Toward::Memory, // a slot is read later, and by somebody else
            };
            session.block(header)?;
            let mut at = offset;
            while let Some(room) = session.room() {
                let page = room.len().min(PAGE_BYTES);
                let sum = staging
                    .read_summed(at, &mut room[..page], toward)
                    .map_err(|error| FieldError::new("put.blocks.offset", error.to_string()))?;
                session.landed_page(page, sum)?;
                self.shared.metrics.local.put_bytes.inc_by(page as u64);
                at += page as u64;
            }
            // A block that is here already, or refused: what was to come goes nowhere.
            let wasted = session.wasted_bytes();
            if wasted > 0 {
                session.skip(wasted)?;
            }
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
    blocks: &[v1::LocalWritten],
    rules: HeaderRules,
    staging_bytes: u64,
) -> Result<Vec<(BlockHeader, u64)>, FieldError> {
    if blocks.is_empty() {
        return Err(FieldError::new("put.blocks", "are missing"));
    }
    let judge = |block: &v1::LocalWritten| {
        let wire = block
            .header
            .as_ref()
            .ok_or_else(|| FieldError::new("put.blocks.header", "is missing"))?;
        let header = header(wire, rules)?;
        let end = block.offset.checked_add(header.length_bytes);
        if end.is_none_or(|end| end > staging_bytes) {
            let problem = format!(
                "is {}; {} bytes from there on lie outside of the {staging_bytes} bytes of staging memory",
                block.offset, header.length_bytes
            );
            return Err(FieldError::new("put.blocks.offset", problem));
        }
        Ok((header, block.offset))
    };
    let judged: Vec<_> = blocks.iter().map(judge).collect::<Result<_, _>>()?;
    // Blocks that lie side by side fit; the same bytes over and over would keep the node copying for a short request.
    let together = judged.iter().fold(0_u64, |sum, (header, _)| {
        sum.saturating_add(header.length_bytes)
    });
    if together > staging_bytes {
        let problem = format!(
            "have {together} bytes together, more than the {staging_bytes} bytes of staging memory"
        );
        return Err(FieldError::new("put.blocks", problem));
    }
    Ok(judged)
}
