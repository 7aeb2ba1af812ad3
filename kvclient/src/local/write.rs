//! Put: into the client's own shared memory, from where the node takes it.
//!
//! ```text
//! call    grant ─ say where ─ copy + sum ─ say so ─ copy + sum ─ say so ──────────► results
//!                    └► node reserves      └► copies           └► copies, checks ──┘
//!
//! call 1  grant ─ copy + sum ─ say where ──────────► node copies, checks ─► results
//! call 2          grant ─ copy + sum ─ say where ──────► …                         large puts in several calls:
//! call 3                  grant ─ …                                                 one is written while the node
//!                                                                                   copies the one before
//! ```
//!
//! The first is how a call goes that is alone, where the node knows how to (`Link::tells_what_is_written`): node and
//! client copy side by side, a piece apart.
//!
//! Units: bytes.
//! Errors: [`LocalError`]; a rejection is a result.
//! Why the node copies: what a client can write never becomes a block, so nobody can change one after its
//! sums were checked.

use bytes::Bytes;
use kvproto::{
    Announced, BlockHeader,
    checksum::{PAGE_BYTES, PageSummer, page_count},
    convert::answer::PutResult,
    v1::{self, local_reply::Answer, local_request::Call},
};

use super::{
    Local, Way,
    error::LocalError,
    staging::{Grant, Staging},
};
use crate::{
    call::Deadline,
    put::{PayloadReader, Putting},
};

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

/// A call of less is written before it is told of: the node would wake up for little.
const TOLD_FROM_BYTES: u64 = 512 << 10;

/// Bytes that the node is told of at once: what it copies while the next are written.
const PIECE_BYTES: usize = 256 << 10;

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
        let grant = granted.flatten()?;
        let is_told = !putting.is_one_of_many && lengths.iter().sum::<u64>() >= TOLD_FROM_BYTES;
        let answer = self.run(async |turn| {
            let link = &mut turn.link;
            let outcome = if is_told && link.tells_what_is_written() {
                let mut filling = Filling::new(&grant, putting);
                let put = self.call(putting, filling.announced(), true);
                grant.sent();
                link.put(put, self.left(), |sums| filling.pages(PIECE_BYTES, sums))
                    .await
            } else {
                let blocks = Filling::new(&grant, putting).whole()?;
                let put = self.call(putting, blocks, false);
                grant.sent();
                link.gives_way = putting.is_one_of_many;
                let outcome = link.call(Call::Put(put), self.left()).await;
                link.gives_way = false;
                outcome.and_then(|(answer, _)| match answer {
                    Answer::Put(answer) => Ok(answer),
                    _ => Err(LocalError::answer("no answer to a put")),
                })
            };
            // A refusal of what is still being written comes from a node that looks at none of it any more. A node that
            // has not answered in time may still look.
            let is_over = matches!(
                &outcome,
                Ok(_) | Err(LocalError::Refused { .. } | LocalError::TooLong)
            );
            if is_over {
                grant.answered();
            }
            putting.results(outcome?).map_err(LocalError::answer)
        });
        answer.await?.ok()
    }

    fn call(
        &self,
        putting: &Putting<'_>,
        blocks: Vec<v1::LocalWritten>,
        follows: bool,
    ) -> v1::LocalPut {
        v1::LocalPut {
            start: Some(v1::PutStart {
                context: Some(self.inner.view_context()),
                namespace_id: Bytes::copy_from_slice(&putting.namespace.id().0),
                ack: putting.options.ack.to_wire().into(),
                kind: putting.options.kind.to_wire().into(),
                survived: Vec::new(), // what a client gives is new
            }),
            blocks,
            follows,
        }
    }
}

/// Copies blocks to where they were granted room, summing them on the way.
struct Filling<'a> {
    grant: &'a Grant<'a>,
    putting: &'a Putting<'a>,
    /// The block that is being copied, and how far.
    block: usize,
    at: usize,
    bytes: PayloadReader<'a>,
}

impl<'a> Filling<'a> {
    fn new(grant: &'a Grant<'a>, putting: &'a Putting<'a>) -> Self {
        Self {
            grant,
            putting,
            block: 0,
            at: 0,
            bytes: PayloadReader::default(),
        }
    }

    /// The blocks as they are told of before they are written.
    fn announced(&self) -> Vec<v1::LocalWritten> {
        let blocks = self.putting.blocks.iter().enumerate();
        let announce = |(i, block)| v1::LocalWritten {
            header: Some((&self.putting.announce(block)).into()),
            offset: self.grant.offset(i),
        };
        blocks.map(announce).collect()
    }

    /// All of them, written.
    fn whole(mut self) -> Result<Vec<v1::LocalWritten>, LocalError> {
        let blocks = self.putting.blocks.iter().enumerate();
        let write = |(i, block)| {
            let Announced {
                key,
                place,
                length_bytes,
            } = self.putting.announce(block);
            let mut sums = Vec::with_capacity(page_count(length_bytes) as usize);
            while self.block == i {
                sums.extend(self.page()?);
            }
            let header = BlockHeader::with_sums(key, place, length_bytes, sums);
            Ok(v1::LocalWritten {
                header: Some((&header).into()),
                offset: self.grant.offset(i),
            })
        };
        blocks.map(write).collect()
    }

    /// Writes pages of together so many bytes, or what is left; adds their sums.
    fn pages(&mut self, bytes: usize, sums: &mut Vec<u64>) -> Result<(), LocalError> {
        for _ in 0..bytes.div_ceil(PAGE_BYTES) {
            sums.extend(self.page()?);
        }
        Ok(())
    }

    /// Writes the next page; its sum, `None` behind the last. The sums are those of the caller's bytes: what the node
    /// copies is checked against what was meant.
    fn page(&mut self) -> Result<Option<u64>, LocalError> {
        let Some(block) = self.putting.blocks.get(self.block) else {
            return Ok(None);
        };
        if self.at == 0 {
            self.bytes = block.data.reader();
        }
        let length = block.data.length_bytes();
        let end = length.min(self.at + PAGE_BYTES);
        let (whole, mut split) = (end - self.at, PageSummer::new());
        let mut sum = None;
        while self.at < end {
            let Some(slice) = self.bytes.next(end - self.at) else {
                return Err(LocalError::answer("a block is shorter than it says"));
            };
            let (block, at) = (self.block, self.at as u64);
            if slice.len() == whole {
                let page = self.grant.write_page(block, at, slice);
                sum = Some(page.map_err(LocalError::answer)?);
            } else {
                split.update(slice);
                let written = self.grant.write(block, at, slice);
                written.map_err(LocalError::answer)?;
            }
            self.at += slice.len();
        }
        if self.at == length {
            (self.block, self.at) = (self.block + 1, 0);
        }
        Ok(sum.or_else(|| split.finish().pop()))
    }
}
