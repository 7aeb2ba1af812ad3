//! Bulk get: from the socket into the caller's memory, checked on the way.
//!
//! ```text
//! DATA ─Bytes─► FrameReader ─► head ──► header: key asked for? seal right?
//!                          └─► data ──► copied once into the buffer, pages summed while in cache
//!                          └─► end ───► sums equal the header's? ── no ──► Corrupt, buffer zeroed
//! ```
//!
//! Units: bytes.
//! Errors: [`Error::Truncated`], [`Error::Answer`] when the stream is not what was asked for; a block
//! that is missing, expired or corrupt is an outcome.
//! Why below the codec: tonic would gather a message before anyone sees it, and copy it twice.

use bytes::Bytes;
use kvproto::{
    BlockHeader, BlockKey, Chain, FieldError, GetOutcome, Part, TierKind,
    checksum::{Landing, PageSummer},
    frame::{Frame, FrameLimits, FrameReader},
    v1,
};
use prost::Message;

use crate::{
    batch,
    call::{Deadline, Inner, Tries},
    convert,
    error::Error,
    lease::Lease,
    namespace::NamespaceHandle,
    pool::Checkout,
    wire::{self, Method},
};

const METHOD: Method = Method::GET;

/// Bytes below which a kept block is copied out of the buffer it was read into, so that it does not
/// hold a whole frame's memory.
const COPY_BELOW_BYTES: usize = 64 << 10;

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
            chain: Some(convert::chain(wanted.chain)),
            parts: wanted
                .options
                .parts
                .iter()
                .map(|part| convert::part(*part))
                .collect(),
            lease_id: wanted.options.lease.map_or(0, |lease| lease.id().0),
            piece_bytes: 0,
        });
        let sink = &mut *sink;
        let answer = tries
            .run(|checkout, left| async move {
                let authorization = inner.authorization.as_ref();
                let stream = wire::start(&checkout.live.send, METHOD, left, authorization).await?;
                read(inner, &checkout, stream, question, wanted, sink).await
            })
            .await?;
        if let Ok(answer) = answer {
            return Ok(answer);
        }
    }
}

/// Reads one answer to its end.
async fn read<S: Sink>(
    inner: &Inner,
    _checkout: &Checkout,
    (response, mut stream): (h2::client::ResponseFuture, h2::SendStream<Bytes>),
    question: Bytes,
    wanted: &Wanted<'_>,
    sink: &mut S,
) -> Result<Vec<Got>, Error> {
    let broken = |source| Error::Broken {
        method: METHOD.name,
        source,
    };
    stream.send_data(question, true).map_err(broken)?;
    let mut body = wire::body(METHOD, response.await.map_err(broken)?)?;
    let limits = FrameLimits {
        max_data_bytes: wanted.namespace.max_block_bytes(),
        ..FrameLimits::default()
    };
    let mut frames = FrameReader::new(limits);
    let mut reading = Reading::new(inner, wanted, sink);
    while let Some(bytes) = wire::chunk(METHOD, &mut body).await? {
        frames.push(bytes);
        while let Some(frame) = frames.next().map_err(|error| wire::answer(METHOD, error))? {
            reading.take(frame)?;
        }
    }
    wire::finish(METHOD, &mut body).await?;
    frames.finish().map_err(|_| Error::Truncated {
        method: METHOD.name,
    })?;
    reading.finish()
}

/// Where the bytes of an answer go. `slot` counts the objects asked for.
trait Sink {
    /// A block begins; refused when it does not fit.
    fn open(&mut self, slot: usize, length_bytes: usize) -> Result<(), FieldError>;
    /// Its next bytes.
    fn piece(&mut self, slot: usize, bytes: Bytes);
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

    fn piece(&mut self, slot: usize, bytes: Bytes) {
        self.landing.land(&bytes, self.buffers[slot]);
    }

    fn close(&mut self, slot: usize) -> Vec<u64> {
        std::mem::take(&mut self.landing).finish(self.buffers[slot])
    }

    fn spoil(&mut self, slot: usize) {
        self.buffers[slot].fill(0);
    }
}

/// Blocks kept as they arrived.
#[derive(Default)]
struct Kept {
    blocks: Vec<Option<Bytes>>,
    pieces: Vec<Bytes>,
    summer: PageSummer,
}

impl Sink for Kept {
    fn open(&mut self, _: usize, _: usize) -> Result<(), FieldError> {
        self.pieces.clear();
        self.summer = PageSummer::default();
        Ok(())
    }

    fn piece(&mut self, _: usize, bytes: Bytes) {
        self.summer.update(&bytes);
        self.pieces.push(bytes);
    }

    fn close(&mut self, slot: usize) -> Vec<u64> {
        let block = match &mut self.pieces[..] {
            [whole] if whole.len() >= COPY_BELOW_BYTES => std::mem::take(whole),
            pieces => pieces.concat().into(),
        };
        self.pieces.clear();
        self.blocks[slot] = Some(block);
        std::mem::take(&mut self.summer).finish()
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
}

/// The block whose bytes are coming in.
struct Open {
    slot: usize,
    header: BlockHeader,
    tier: Option<TierKind>,
    /// Bytes landed.
    at: u64,
    /// The header itself is wrong: its bytes go nowhere.
    spoiled: bool,
}

impl<'a, S: Sink> Reading<'a, S> {
    fn new(inner: &'a Inner, wanted: &'a Wanted<'a>, sink: &'a mut S) -> Self {
        Self {
            inner,
            wanted,
            sink,
            got: vec![None; wanted.count()],
            open: None,
        }
    }

    fn take(&mut self, frame: Frame) -> Result<(), Error> {
        match frame {
            Frame::Head { message, data_len } => self.head(message, data_len),
            Frame::Data(bytes) => self.data(bytes),
            Frame::End => self.end(),
        }
    }

    fn head(&mut self, message: Bytes, data_len: u64) -> Result<(), Error> {
        let head = v1::GetResponse::decode(message).map_err(|e| wire::answer(METHOD, e))?;
        if head.context.is_some() {
            self.inner.heard(head.context.as_ref());
        }
        let slot = head.block as usize;
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
            self.begin(slot, header, head.tier)?;
        }
        match &self.open {
            Some(open) if open.slot == slot && open.at == head.offset => Ok(()),
            _ => Err(unexpected(format!(
                "block {slot} goes on where it did not stop"
            ))),
        }
    }

    fn begin(&mut self, slot: usize, header: v1::BlockHeader, tier: i32) -> Result<(), Error> {
        if self.open.is_some() {
            return Err(unexpected(format!("block {slot} begins inside another")));
        }
        let key = self.wanted.key(slot);
        let header = convert::block_header(key.namespace, &header).map_err(unexpected)?;
        let spoiled = header.key != key || !header.check_seal();
        let length = usize::try_from(header.length_bytes).unwrap_or(usize::MAX);
        if !spoiled {
            self.sink.open(slot, length)?;
        }
        self.open = Some(Open {
            slot,
            header,
            tier: TierKind::from_wire(tier),
            at: 0,
            spoiled,
        });
        Ok(())
    }

    fn data(&mut self, bytes: Bytes) -> Result<(), Error> {
        let open = self
            .open
            .as_mut()
            .ok_or_else(|| unexpected("data without a block"))?;
        open.at += bytes.len() as u64;
        if open.at > open.header.length_bytes {
            return Err(unexpected(format!(
                "block {} is longer than its header says",
                open.slot
            )));
        }
        if !open.spoiled {
            self.sink.piece(open.slot, bytes);
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), Error> {
        let Some(open) = self
            .open
            .take_if(|open| open.at == open.header.length_bytes)
        else {
            return Ok(());
        };
        let slot = open.slot;
        let whole = !open.spoiled && {
            let sums = self.sink.close(slot);
            open.header.check(&sums).is_ok()
        };
        self.got[slot] = Some(if whole {
            Got {
                outcome: GetOutcome::Hit,
                tier: open.tier,
                length_bytes: open.header.length_bytes as usize,
            }
        } else {
            self.sink.spoil(slot);
            tracing::warn!(key = %open.header.key, "block does not match its checksums and was dropped");
            Got {
                outcome: GetOutcome::Corrupt,
                tier: open.tier,
                length_bytes: 0,
            }
        });
        Ok(())
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
