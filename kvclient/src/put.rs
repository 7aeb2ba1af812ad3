//! Bulk put: payload sent by reference, summed just before it is sent.
//!
//! ```text
//! [start] [header] data ≤ 1 MiB │ data ≤ 1 MiB │ [sums] │ [header] data …     written from where it lies
//!                  └ 256 KiB are summed ─► sent ─► the next 256 KiB … ─┘
//! ```
//!
//! The sums stand behind the data, so the first byte leaves at once and every byte is read from memory one time:
//! what was just summed is still in the cache when the kernel copies it. A second try knows the sums already,
//! and sends them in the header.
//!
//! Units: bytes.
//! Errors: the call's; what became of each block is a [`PutResult`], a rejection included.
//! Why pieces of 1 MiB: one HTTP/2 frame each, and well below every gRPC server's message limit.

use bytes::Bytes;
use kvproto::{
    Ack, Announced, BlockHeader, BlockKey, Chain, FieldError, Kind, Part, checksum::PageSummer,
    convert::answer::PutResult, frame, http2::Outgoing, v1,
};

use crate::{
    batch,
    call::{Deadline, Inner, Tries},
    error::Error,
    lane::Sender,
    local,
    namespace::NamespaceHandle,
    wire::{self, Method, Whole},
};

const METHOD: Method = Method::PUT;

/// Largest `data` of one message: one frame of the size both ends use.
const PIECE_BYTES: usize = 1 << 20;

/// Bytes summed in one go before they are sent.
const SUM_BYTES: usize = 256 << 10;

/// Bytes of a block; every kind is sent from where it lies.
#[derive(Clone, Debug)]
pub enum Payload<'a> {
    /// Kept by the payload.
    Shared(Bytes),
    /// Kept by the caller.
    Borrowed(&'a [u8]),
    /// Kept by the caller in several places; the block is their bytes in this order.
    Pieces(Vec<&'a [u8]>),
}

impl Payload<'_> {
    /// Bytes of the block.
    #[must_use]
    pub fn length_bytes(&self) -> usize {
        match self {
            Self::Shared(bytes) => bytes.len(),
            Self::Borrowed(bytes) => bytes.len(),
            Self::Pieces(pieces) => pieces.iter().map(|piece| piece.len()).sum(),
        }
    }

    pub(crate) fn reader(&self) -> PayloadReader<'_> {
        let (first, rest): (&[u8], &[&[u8]]) = match self {
            Self::Shared(bytes) => (bytes, &[]),
            Self::Borrowed(bytes) => (bytes, &[]),
            Self::Pieces(pieces) => (&[], pieces),
        };
        PayloadReader { first, rest }
    }
}

/// Walks over a payload's bytes, slice by slice.
#[derive(Clone, Copy, Default)]
pub(crate) struct PayloadReader<'a> {
    first: &'a [u8],
    rest: &'a [&'a [u8]],
}

impl<'a> PayloadReader<'a> {
    /// The next bytes, at least one and at most `most` (which is not 0); `None` at the end.
    pub(crate) fn next(&mut self, most: usize) -> Option<&'a [u8]> {
        while self.first.is_empty() {
            let (first, rest) = self.rest.split_first()?;
            (self.first, self.rest) = (first, rest);
        }
        let (now, later) = self.first.split_at(self.first.len().min(most));
        self.first = later;
        Some(now)
    }
}

impl From<Bytes> for Payload<'_> {
    fn from(bytes: Bytes) -> Self {
        Self::Shared(bytes)
    }
}

impl From<Vec<u8>> for Payload<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Shared(bytes.into())
    }
}

impl<'a> From<&'a [u8]> for Payload<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Borrowed(bytes)
    }
}

impl<'a> From<Vec<&'a [u8]>> for Payload<'a> {
    fn from(pieces: Vec<&'a [u8]>) -> Self {
        Self::Pieces(pieces)
    }
}

impl<'a> From<&'a Vec<u8>> for Payload<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        Self::Borrowed(bytes)
    }
}

/// One block to put: which of the chain's, which part of it, and its bytes.
#[derive(Clone, Debug)]
pub struct PutBlock<'a> {
    /// Position in the chain given beside it (0 is that chain's first block).
    pub index: usize,
    /// Which part of the block.
    pub part: Part,
    /// Its bytes, at least one.
    pub data: Payload<'a>,
}

impl<'a> PutBlock<'a> {
    /// Block `index` of the chain, part {0, 0}.
    pub fn new(index: usize, data: impl Into<Payload<'a>>) -> Self {
        Self {
            index,
            part: Part::default(),
            data: data.into(),
        }
    }
}

/// How a put is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutOptions {
    /// How safe a block must be before it is answered. Default [`Ack::Cached`].
    pub ack: Ack,
    /// Whose budget it draws on. Default [`Kind::Kv`].
    pub kind: Kind,
}

impl Default for PutOptions {
    fn default() -> Self {
        Self {
            ack: Ack::Cached,
            kind: Kind::Kv,
        }
    }
}

/// Puts blocks, in calls of bounded size.
pub(crate) async fn put(
    inner: &Inner,
    deadline: Deadline,
    namespace: &NamespaceHandle,
    chain: &Chain,
    blocks: &[PutBlock<'_>],
    options: PutOptions,
) -> Result<Vec<PutResult>, Error> {
    for (i, block) in blocks.iter().enumerate() {
        check(namespace, chain, i, block)?;
    }
    let sizes = blocks.iter().map(|block| block.data.length_bytes() as u64);
    let most = local::put_bytes(inner, deadline)
        .await
        .unwrap_or(batch::MAX_CALL_BYTES);
    let ranges = batch::cut(sizes, batch::MAX_CALL_BLOCKS, most);
    let is_one_of_many = ranges.len() > 1;
    let calls = ranges.into_iter().map(|range| {
        let call = Putting {
            inner,
            is_one_of_many,
            namespace,
            chain,
            blocks: &blocks[range],
            options,
        };
        async move { call.run(deadline).await }
    });
    batch::join(calls.collect(), inner.parallel).await
}

pub(crate) fn check(
    namespace: &NamespaceHandle,
    chain: &Chain,
    i: usize,
    block: &PutBlock<'_>,
) -> Result<(), FieldError> {
    let (length, most) = (
        block.data.length_bytes() as u64,
        namespace.max_block_bytes(),
    );
    let problem = if block.index >= chain.hashes.len() {
        format!(
            "block {i} has index {}, the chain has {} blocks",
            block.index,
            chain.hashes.len()
        )
    } else if length == 0 {
        format!("block {i} is empty")
    } else if length > most {
        format!("block {i} has {length} bytes, the node takes up to {most}")
    } else {
        return Ok(());
    };
    Err(FieldError::new("blocks", problem))
}

/// One call's worth of a put.
pub(crate) struct Putting<'a> {
    pub(crate) inner: &'a Inner,
    pub(crate) namespace: &'a NamespaceHandle,
    chain: &'a Chain,
    pub(crate) blocks: &'a [PutBlock<'a>],
    pub(crate) options: PutOptions,
    /// Others of the same put are on their way.
    pub(crate) is_one_of_many: bool,
}

impl Putting<'_> {
    async fn run(&self, deadline: Deadline) -> Result<Vec<PutResult>, Error> {
        if let Some(results) = local::put(self, deadline).await {
            return Ok(results);
        }
        let mut tries = Tries::new(self.inner, METHOD, deadline);
        // Made on the first try that comes to a block's end, kept for the next.
        let mut headers = vec![None; self.blocks.len()];
        loop {
            let request = tries.request;
            let headers = &mut headers[..];
            let answer = tries
                .run(|_checkout, left| async move {
                    let authorization = self.inner.authorization.as_ref();
                    let mut sending = Sending::new(self, headers, &request);
                    let mut whole = Whole::default();
                    let lanes = &self.inner.lanes;
                    wire::exchange(lanes, METHOD, left, authorization, &mut sending, &mut whole)
                        .await?;
                    whole.decode(METHOD)
                })
                .await?;
            if let Ok(answer) = answer {
                let lengths = self.blocks.iter().map(|b| b.data.length_bytes() as u64);
                let tally = &self.inner.local.grpc;
                tally.put(self.blocks.len() as u64, lengths.sum());
                return self.results(answer);
            }
        }
    }

    pub(crate) fn announce(&self, block: &PutBlock<'_>) -> Announced {
        Announced {
            key: BlockKey {
                namespace: self.namespace.id(),
                hash: self.chain.hashes[block.index],
                part: block.part,
            },
            place: self.chain.place(block.index, self.namespace.run_blocks()),
            length_bytes: block.data.length_bytes() as u64,
        }
    }

    pub(crate) fn results(&self, answer: v1::PutResponse) -> Result<Vec<PutResult>, Error> {
        self.inner.heard(answer.context.as_ref());
        if answer.results.len() != self.blocks.len() {
            return Err(wire::answer(
                METHOD,
                format!(
                    "{} results for {} blocks",
                    answer.results.len(),
                    self.blocks.len()
                ),
            ));
        }
        let results = answer.results.iter().map(PutResult::try_from);
        results
            .collect::<Result<_, _>>()
            .map_err(|problem| wire::answer(METHOD, problem))
    }
}

/// The messages of one try, made as they are sent.
struct Sending<'a, 'h> {
    putting: &'a Putting<'a>,
    /// Of each block, once it is known.
    headers: &'h mut [Option<BlockHeader>],
    start: Option<v1::PutStart>,
    /// The block being sent.
    block: usize,
    /// Its length, and how much of it is pushed.
    length: usize,
    at: usize,
    bytes: PayloadReader<'a>,
    /// Its pages summed so far, where its header has no sums.
    sums: PageSummer,
}

impl<'a, 'h> Sending<'a, 'h> {
    fn new(
        putting: &'a Putting<'a>,
        headers: &'h mut [Option<BlockHeader>],
        request: &[u8; 16],
    ) -> Self {
        Self {
            putting,
            headers,
            start: Some(v1::PutStart {
                context: Some(putting.inner.context(request)),
                namespace_id: Bytes::copy_from_slice(&putting.namespace.id().0),
                ack: putting.options.ack.to_wire().into(),
                kind: putting.options.kind.to_wire().into(),
                survived: Vec::new(), // what a client gives is new
            }),
            block: 0,
            length: 0,
            at: 0,
            bytes: PayloadReader::default(),
            sums: PageSummer::default(),
        }
    }

    /// The sums of the current block, all of whose bytes are pushed.
    fn put_sums(&mut self, announced: Announced, out: &mut Outgoing<'a>) {
        let sums = std::mem::take(&mut self.sums).finish();
        let Announced {
            key,
            place,
            length_bytes,
        } = announced;
        let header = BlockHeader::with_sums(key, place, length_bytes, sums);
        let message = v1::PutRequest {
            sums: Some(v1::BlockSums {
                page_sums: header.page_sums.to_vec(),
                seal: header.seal,
            }),
            ..v1::PutRequest::default()
        };
        out.push(frame::head(&message, 0));
        self.headers[self.block] = Some(header);
    }
}

impl<'a> Sender<'a> for Sending<'a, '_> {
    fn more(&mut self, out: &mut Outgoing<'a>) {
        let putting = self.putting;
        let Some(block) = putting.blocks.get(self.block) else {
            return out.close();
        };
        let known = self.headers[self.block].as_ref();
        let is_known = known.is_some();
        if self.at == 0 {
            (self.length, self.bytes) = (block.data.length_bytes(), block.data.reader());
        }
        if self.at.is_multiple_of(PIECE_BYTES) {
            let header = (self.at == 0).then(|| match known {
                Some(header) => header.into(),
                None => (&putting.announce(block)).into(),
            });
            let message = v1::PutRequest {
                start: self.start.take(),
                header,
                ..v1::PutRequest::default()
            };
            let piece_bytes = PIECE_BYTES.min(self.length - self.at);
            out.push(frame::head(&message, piece_bytes));
        }
        let piece_end = self.at - self.at % PIECE_BYTES + PIECE_BYTES;
        let end = self.length.min(piece_end).min(self.at + SUM_BYTES);
        // Whole pages are summed in one go where they lie in one piece.
        while self.at < end {
            let Some(slice) = self.bytes.next(end - self.at) else {
                break; // a payload is as long as it says
            };
            if !is_known {
                self.sums.update(slice);
            }
            out.push(slice);
            self.at += slice.len();
        }
        if self.at == self.length {
            if !is_known {
                self.put_sums(putting.announce(block), out);
            }
            (self.block, self.at) = (self.block + 1, 0);
        }
        if self.block == putting.blocks.len() {
            out.close();
        }
    }
}
