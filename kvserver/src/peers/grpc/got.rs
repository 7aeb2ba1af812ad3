//! The answer to a get, judged piece by piece as it comes in.
//!
//! Every block of what was asked for must come, in order, whole, under a header that names it at its place in the
//! chain; anything else is [`PeerError::Nonsense`]. One block is in memory at a time.

use kvproto::{
    BlockKey, GetOutcome,
    convert::{HeaderRules, answer},
    v1,
};

use super::{call::Call, nonsense};
use crate::peers::{Asked, Carried, Fetched, PeerError};

/// Largest block a peer may send.
const MAX_BLOCK_BYTES: u64 = 64 << 20;

/// An answer to a get as it comes in.
pub(super) struct Answer {
    call: Call,
    asked: Asked,
    message: Option<v1::GetRequest>,
    stream: Option<tonic::Streaming<v1::GetResponse>>,
    /// Number of the block that comes next.
    next: u32,
    /// The block whose pieces are coming.
    open: Option<Carried>,
}

impl Answer {
    /// Of a call that has not gone out yet.
    pub(super) fn new(call: Call, asked: Asked, message: v1::GetRequest) -> Self {
        Self {
            call,
            asked,
            message: Some(message),
            stream: None,
            next: 0,
            open: None,
        }
    }

    /// The next block; `None` behind the last.
    pub(super) async fn next(&mut self) -> Result<Option<(u32, Fetched)>, PeerError> {
        if let Some(message) = self.message.take() {
            let mut client = self.call.bulk();
            let begun = client.get(self.call.request(message));
            self.stream = Some(self.call.answer(begun).await?.into_inner());
        }
        let count = self.asked.chain.len() * self.asked.parts.len();
        let rules = HeaderRules {
            namespace: self.asked.space.id,
            run_blocks: self.asked.space.run_blocks(),
            max_block_bytes: MAX_BLOCK_BYTES,
        };
        loop {
            let Some(stream) = &mut self.stream else {
                return Ok(None);
            };
            let Some(mut wire) = self.call.answer(stream.message()).await? else {
                return match self.open.is_none() && self.next as usize == count {
                    true => Ok(None),
                    false => Err(nonsense("the answer ended early")),
                };
            };
            self.call.heard(wire.context.take());
            let data = std::mem::take(&mut wire.data);
            let piece = answer::GetPiece::from_wire(&wire, rules, count).map_err(nonsense)?;
            if piece.block != self.next {
                return Err(nonsense("blocks out of order"));
            }
            if piece.outcome != GetOutcome::Hit {
                self.next += 1;
                return Ok(Some((piece.block, Fetched::Gone(piece.outcome))));
            }
            let mut block = match (self.open.take(), piece.header) {
                (None, Some(header)) => {
                    check(&self.asked, piece.block, &header)?;
                    Carried {
                        header,
                        pieces: Vec::new(),
                    }
                }
                (Some(block), None) => block,
                _ => return Err(nonsense("a block begins twice, or not at all")),
            };
            if block.len_bytes() != piece.offset || data.is_empty() {
                return Err(nonsense("pieces of a block leave gaps"));
            }
            block.pieces.push(data);
            let (length, whole) = (block.len_bytes(), block.header.length_bytes);
            if length > whole {
                return Err(nonsense("a block is longer than its header says"));
            }
            if length < whole {
                self.open = Some(block);
                continue;
            }
            self.next += 1;
            return Ok(Some((piece.block, Fetched::Hit(block))));
        }
    }
}

/// Whether a header is that of block `number` of what was asked for.
fn check(asked: &Asked, number: u32, header: &kvproto::BlockHeader) -> Result<(), PeerError> {
    let parts = asked.parts.len();
    let (i, part) = (
        number as usize / parts,
        asked.parts[number as usize % parts],
    );
    let key = BlockKey {
        namespace: asked.space.id,
        hash: asked.chain.hashes[i],
        part,
    };
    match header.key == key && header.place == asked.chain.place(i, asked.space.run_blocks()) {
        true => Ok(()),
        false => Err(nonsense("a header of another block")),
    }
}
