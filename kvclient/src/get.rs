//! Bulk get: from the socket into the caller's memory, checked on the way.
//!
//! ```text
//! lane ─chunk──► FrameReader ─► head ──► header: key asked for? seal right?
//!      ◄─room──  └─► data ──► read right into the buffer, each page summed while it is in the cache
//!                └─► end ───► sums equal the header's? ── no ──► Corrupt, buffer zeroed
//! ```
//!
//! Units: bytes.
//! Errors: [`Error::Truncated`], [`Error::Answer`] when the stream is not what was asked for; a block
//! that is missing, expired or corrupt is an outcome.
//! Why below the codec: tonic would gather a message before anyone sees it, and copy it twice.

use std::io;

use bytes::Bytes;
use kvproto::{
    BlockHeader, BlockKey, Chain, FieldError, GetOutcome, Part, TierKind,
    checksum::Landing,
    convert,
    frame::{Frame, FrameLimits, FrameReader},
    v1,
};
use prost::Message;

use crate::{
    batch,
    call::{Deadline, Inner, Tries},
    error::Error,
    lane::{Question, Receiver},
    lease::Lease,
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
pub(crate) struct Wanted<'a> {
    pub(crate) namespace: &'a NamespaceHandle,
    pub(crate) chain: &'a Chain,
    pub(crate) options: GetOptions<'a>,
}

impl Wanted<'_> {
    fn parts(&self) -> &[Part] {
        match self.options.parts {
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

    fn key(&self, slot: usize) -> BlockKey {
        let parts = self.parts();
        BlockKey {
            namespace: self.namespace.id(),
            hash: self.chain.hashes[slot / parts.len()],
            part: parts[slot % parts.len()],
        }
    }
}

/// Gets blocks into buffers, one each.
pub(crate) async fn into_buffers(
    inner: &Inner,
    deadline: Deadline,
    wanted: &Wanted<'_>,
    buffers: &mut [&mut [u8]],
) -> Result<Vec<Got>, Error> {
    let (count, parts) = (wanted.count(), wanted.parts().len());
    if buffers.len() != count {
        return Err(FieldError::new(
            "buffers",
            format!("{} given for {count} blocks; give one each", buffers.len()),
        )
        .into());
    }
    let sizes = buffers
        .chunks(parts)
        .map(|block| block.iter().map(|b| b.len() as u64).sum());
    let ranges = batch::cut(sizes, (batch::MAX_CALL_BLOCKS / parts).max(1));
    if ranges.len() == 1 {
        return one_call(inner, deadline, wanted, &mut Buffers::new(buffers)).await;
    }
    let mut rest = buffers;
    let mut calls = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (mine, others) = rest.split_at_mut(range.len() * parts);
        rest = others;
        let chain = wanted.chain.slice(range, wanted.namespace.run_blocks());
        calls.push(async move {
            let wanted = Wanted {
                namespace: wanted.namespace,
                chain: &chain,
                options: wanted.options,
            };
            one_call(inner, deadline, &wanted, &mut Buffers::new(mine)).await
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
    );
    let calls = ranges.into_iter().map(|range| async move {
        let chain = wanted.chain.slice(range, wanted.namespace.run_blocks());
        let wanted = Wanted {
            namespace: wanted.namespace,
            chain: &chain,
            options: wanted.options,
        };
        let mut kept = Kept::default();
        kept.blocks.resize(wanted.count(), None);
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

async fn one_call<S: Sink>(
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
            parts: convert::parts_to_wire(wanted.options.parts),
            lease_id: wanted.options.lease.map_or(0, |lease| lease.id().0),
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
            return Ok(answer);
        }
    }
}

/// Where the bytes of an answer go. `slot` counts the objects asked for.
trait Sink {
    /// A block begins; refused when it does not fit.
    fn open(&mut self, slot: usize, length_bytes: usize) -> Result<(), FieldError>;
    /// Where its next bytes belong; up to the end of the block.
    fn room(&mut self, slot: usize) -> &mut [u8];
    /// So many bytes have been put there.
    fn landed(&mut self, slot: usize, bytes: usize);
    /// It is whole: the sums of its pages.
    fn close(&mut self, slot: usize) -> Vec<u64>;
    /// What lies there is not the block: nobody shall take it for one.
    fn spoil(&mut self, slot: usize);
}

/// The caller's buffers.
struct Buffers<'a, 'b> {
    buffers: &'a mut [&'b mut [u8]],
    landing: Landing,
}

impl<'a, 'b> Buffers<'a, 'b> {
    fn new(buffers: &'a mut [&'b mut [u8]]) -> Self {
        Self {
            buffers,
            landing: Landing::default(),
        }
    }
}

impl Sink for Buffers<'_, '_> {
    fn open(&mut self, slot: usize, length_bytes: usize) -> Result<(), FieldError> {
        let room = self.buffers[slot].len();
        if room < length_bytes {
            return Err(FieldError::new(
                "buffers",
                format!("buffer {slot} holds {room} bytes, the block has {length_bytes}"),
            ));
        }
        self.landing = Landing::new(length_bytes as u64);
        Ok(())
    }

    fn room(&mut self, slot: usize) -> &mut [u8] {
        &mut self.buffers[slot][self.landing.landed_bytes()..]
    }

    fn landed(&mut self, slot: usize, bytes: usize) {
        self.landing.landed(bytes, self.buffers[slot]);
    }

    fn close(&mut self, slot: usize) -> Vec<u64> {
        std::mem::take(&mut self.landing).finish(self.buffers[slot])
    }

    fn spoil(&mut self, slot: usize) {
        self.buffers[slot].fill(0);
    }
}

/// Buffers made for blocks whose length nobody knew.
#[derive(Default)]
struct Kept {
    blocks: Vec<Option<Bytes>>,
    block: Vec<u8>,
    landing: Landing,
}

impl Sink for Kept {
    fn open(&mut self, _: usize, length_bytes: usize) -> Result<(), FieldError> {
        self.block = vec![0; length_bytes];
        self.landing = Landing::new(length_bytes as u64);
        Ok(())
    }

    fn room(&mut self, _: usize) -> &mut [u8] {
        &mut self.block[self.landing.landed_bytes()..]
    }

    fn landed(&mut self, _: usize, bytes: usize) {
        self.landing.landed(bytes, &self.block);
    }

    fn close(&mut self, slot: usize) -> Vec<u64> {
        let sums = std::mem::take(&mut self.landing).finish(&self.block);
        self.blocks[slot] = Some(std::mem::take(&mut self.block).into());
        sums
    }

    fn spoil(&mut self, slot: usize) {
        self.blocks[slot] = None;
    }
}

/// How far an answer has come.
struct Reading<'a, S> {
    inner: &'a Inner,
    wanted: &'a Wanted<'a>,
    sink: &'a mut S,
    got: Vec<Option<Got>>,
    open: Option<Open>,
    /// A block whose header made no sense or names another: its pieces go nowhere.
    skipped: Option<usize>,
    frames: FrameReader,
    /// Why reading stopped.
    failed: Option<Error>,
}

impl<S: Sink> Receiver for Reading<'_, S> {
    fn room(&mut self) -> Option<&mut [u8]> {
        let left = self.frames.data_left();
        let open = self.open.as_ref().filter(|_| left > 0)?;
        // What the message announces beyond the block's end is refused when it comes, see `data`.
        let left = left.min(open.header.length_bytes - open.at) as usize;
        if left == 0 {
            return None;
        }
        Some(&mut self.sink.room(open.slot)[..left])
    }

    fn landed(&mut self, bytes: usize) -> io::Result<()> {
        self.frames.skip_data(bytes as u64);
        if let Some(open) = &self.open {
            self.sink.landed(open.slot, bytes);
        }
        let outcome = self.data(bytes).and_then(|()| self.advance());
        self.stop_at(outcome)
    }

    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.frames.push(Bytes::copy_from_slice(bytes));
        let outcome = self.advance();
        self.stop_at(outcome)
    }
}

/// The block whose bytes are coming in.
struct Open {
    slot: usize,
    header: BlockHeader,
    tier: Option<TierKind>,
    /// Bytes landed.
    at: u64,
}

impl<'a, S: Sink> Reading<'a, S> {
    fn new(inner: &'a Inner, wanted: &'a Wanted<'a>, sink: &'a mut S) -> Self {
        Self {
            inner,
            wanted,
            sink,
            got: vec![None; wanted.count()],
            open: None,
            skipped: None,
            frames: FrameReader::new(FrameLimits {
                max_data_bytes: wanted.namespace.max_block_bytes(),
                ..FrameLimits::default()
            }),
            failed: None,
        }
    }

    /// Takes what the pushed bytes have made whole.
    fn advance(&mut self) -> Result<(), Error> {
        while let Some(frame) = self.frames.next().map_err(|e| wire::answer(METHOD, e))? {
            self.take(frame)?;
        }
        Ok(())
    }

    /// Keeps the error that ends the exchange.
    fn stop_at(&mut self, outcome: Result<(), Error>) -> io::Result<()> {
        outcome.map_err(|error| {
            self.failed = Some(error);
            io::Error::new(io::ErrorKind::InvalidData, "the answer cannot be used")
        })
    }

    fn take(&mut self, frame: Frame) -> Result<(), Error> {
        match frame {
            Frame::Head { message, data_len } => self.head(message, data_len),
            Frame::Data(bytes) => {
                self.data(bytes.len())?;
                if let Some(open) = &self.open {
                    self.sink.room(open.slot)[..bytes.len()].copy_from_slice(&bytes);
                    self.sink.landed(open.slot, bytes.len());
                }
                Ok(())
            }
            Frame::End => {
                self.end();
                Ok(())
            }
        }
    }

    fn head(&mut self, message: Bytes, data_len: u64) -> Result<(), Error> {
        let head = v1::GetResponse::decode(message).map_err(|e| wire::answer(METHOD, e))?;
        if head.context.is_some() {
            self.inner.heard(head.context.as_ref());
        }
        let slot = head.block as usize;
        if self.skipped == Some(slot) {
            return Ok(());
        }
        self.skipped = None;
        if slot >= self.got.len() || self.got[slot].is_some() {
            return Err(unexpected(format!(
                "block {slot} was not asked for, or came twice"
            )));
        }
        let outcome = GetOutcome::from_wire(head.outcome)
            .ok_or_else(|| unexpected(format!("outcome {} is not known", head.outcome)))?;
        if outcome != GetOutcome::Hit {
            if data_len > 0 {
                return Err(unexpected(format!(
                    "block {slot} is {outcome} and has data"
                )));
            }
            if self.open.take_if(|open| open.slot == slot).is_some() {
                self.sink.spoil(slot);
            }
            self.got[slot] = Some(Got {
                outcome,
                tier: None,
                length_bytes: 0,
            });
            return Ok(());
        }
        if let Some(header) = head.header {
            self.begin(slot, &header, head.tier)?;
            if self.skipped == Some(slot) {
                return Ok(());
            }
        }
        match &self.open {
            Some(open) if open.slot == slot && open.at == head.offset => Ok(()),
            _ => Err(unexpected(format!(
                "block {slot} goes on where it did not stop"
            ))),
        }
    }

    fn begin(&mut self, slot: usize, header: &v1::BlockHeader, tier: i32) -> Result<(), Error> {
        if self.open.is_some() {
            return Err(unexpected(format!("block {slot} begins inside another")));
        }
        let key = self.wanted.key(slot);
        let header = convert::header(header, self.wanted.namespace.header_rules())
            .ok()
            .filter(|header| header.key == key && header.check_seal());
        let Some(header) = header else {
            self.corrupt(slot, &key);
            self.skipped = Some(slot);
            return Ok(());
        };
        let length = usize::try_from(header.length_bytes).unwrap_or(usize::MAX);
        self.sink.open(slot, length)?;
        self.open = Some(Open {
            slot,
            header,
            tier: TierKind::from_wire(tier),
            at: 0,
        });
        Ok(())
    }

    fn corrupt(&mut self, slot: usize, key: &BlockKey) {
        tracing::warn!(%key, "block does not match its checksums and was dropped");
        self.sink.spoil(slot);
        self.got[slot] = Some(Got {
            outcome: GetOutcome::Corrupt,
            tier: None,
            length_bytes: 0,
        });
    }

    /// `length` bytes of payload have come; refused when the block has no room for them.
    fn data(&mut self, length: usize) -> Result<(), Error> {
        if self.skipped.is_some() {
            return Ok(());
        }
        let open = self
            .open
            .as_mut()
            .ok_or_else(|| unexpected("data without a block"))?;
        open.at += length as u64;
        if open.at > open.header.length_bytes {
            return Err(unexpected(format!(
                "block {} is longer than its header says",
                open.slot
            )));
        }
        Ok(())
    }

    fn end(&mut self) {
        let whole = |open: &mut Open| open.at == open.header.length_bytes;
        let Some(open) = self.open.take_if(whole) else {
            return;
        };
        let sums = self.sink.close(open.slot);
        if open.header.check(&sums).is_err() {
            return self.corrupt(open.slot, &open.header.key);
        }
        self.got[open.slot] = Some(Got {
            outcome: GetOutcome::Hit,
            tier: open.tier,
            length_bytes: open.header.length_bytes as usize,
        });
    }

    fn finish(self) -> Result<Vec<Got>, Error> {
        let got: Option<Vec<Got>> = self.got.into_iter().collect();
        match (got, self.open) {
            (Some(got), None) => Ok(got),
            _ => Err(Error::Truncated {
                method: METHOD.name,
            }),
        }
    }
}

fn unexpected(problem: impl ToString) -> Error {
    wire::answer(METHOD, problem)
}
