//! Bulk put: headers made once, payload sent by reference.
//!
//! ```text
//! block ─► page sums, seal ─► BlockHeader      once per put, whatever the number of tries
//!                                  │
//!   [start] [header] data ≤ 1 MiB │ data ≤ 1 MiB │ [header] data ...     written from where it lies
//! ```
//!
//! Units: bytes.
//! Errors: the call's; what became of each block is a [`PutResult`], a rejection included.
//! Why pieces of 1 MiB: one HTTP/2 frame each, and well below every gRPC server's message limit.

use bytes::Bytes;
use kvproto::{
    Ack, BlockHeader, BlockKey, Chain, FieldError, Kind, Part, convert::answer::PutResult, frame,
    v1,
};

use crate::{
    batch,
    call::{Deadline, Inner, Tries},
    error::Error,
    namespace::NamespaceHandle,
    wire::{self, Method, Whole},
};

const METHOD: Method = Method::PUT;

/// Largest `data` of one message: one frame of the size both ends use.
const PIECE_BYTES: usize = 1 << 20;

/// Bytes of a block: shared ones are sent as they lie, borrowed ones are copied on their way out.
#[derive(Clone, Debug)]
pub enum Payload<'a> {
    /// Sent by reference.
    Shared(Bytes),
    /// Copied piece by piece as they are sent.
    Borrowed(&'a [u8]),
}

impl Payload<'_> {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Borrowed(bytes) => bytes,
        }
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
    let sizes = blocks
        .iter()
        .map(|block| block.data.as_slice().len() as u64);
    let ranges = batch::cut(sizes, batch::MAX_CALL_BLOCKS);
    let calls = ranges.into_iter().map(|range| {
        let call = Putting {
            inner,
            namespace,
            chain,
            blocks: &blocks[range],
            options,
        };
        async move { call.run(deadline).await }
    });
    batch::join(calls.collect(), inner.parallel).await
}

fn check(
    namespace: &NamespaceHandle,
    chain: &Chain,
    i: usize,
    block: &PutBlock<'_>,
) -> Result<(), FieldError> {
    let (length, most) = (
        block.data.as_slice().len() as u64,
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
struct Putting<'a> {
    inner: &'a Inner,
    namespace: &'a NamespaceHandle,
    chain: &'a Chain,
    blocks: &'a [PutBlock<'a>],
    options: PutOptions,
}

impl Putting<'_> {
    async fn run(&self, deadline: Deadline) -> Result<Vec<PutResult>, Error> {
        let mut tries = Tries::new(self.inner, METHOD, deadline);
        // Made on the first try that comes to a block, kept for the next.
        let mut headers = vec![None; self.blocks.len()];
        loop {
            let request = tries.request;
            let headers = &mut headers[..];
            let answer = tries
                .run(|_checkout, left| async move {
                    let authorization = self.inner.authorization.as_ref();
                    let heads = self.heads(headers, &request);
                    let body = self.slices(&heads);
                    let mut whole = Whole::default();
                    let lanes = &self.inner.lanes;
                    wire::exchange(lanes, METHOD, left, authorization, &body, &mut whole).await?;
                    whole.decode(METHOD)
                })
                .await?;
            if let Ok(answer) = answer {
                return self.results(answer);
            }
        }
    }

    /// The head of every message, in order; `headers` are made on the first try.
    fn heads(&self, headers: &mut [Option<v1::BlockHeader>], request: &[u8; 16]) -> Vec<Bytes> {
        let mut start = Some(v1::PutStart {
            context: Some(self.inner.context(request)),
            namespace_id: Bytes::copy_from_slice(&self.namespace.id().0),
            ack: self.options.ack.to_wire().into(),
            kind: self.options.kind.to_wire().into(),
        });
        let mut heads = Vec::with_capacity(self.blocks.len());
        for (block, header) in self.blocks.iter().zip(headers) {
            let header = header.get_or_insert_with(|| self.describe(block));
            let mut header = Some(header.clone());
            for piece in block.data.as_slice().chunks(PIECE_BYTES) {
                let message = v1::PutRequest {
                    start: start.take(),
                    header: header.take(),
                    data: Bytes::new(),
                };
                heads.push(frame::head(&message, piece.len()));
            }
        }
        heads
    }

    /// Heads and payload, alternating, as they go out.
    fn slices<'s>(&'s self, heads: &'s [Bytes]) -> Vec<&'s [u8]> {
        let pieces = self
            .blocks
            .iter()
            .flat_map(|block| block.data.as_slice().chunks(PIECE_BYTES));
        heads
            .iter()
            .zip(pieces)
            .flat_map(|(head, piece)| [&head[..], piece])
            .collect()
    }

    fn describe(&self, block: &PutBlock<'_>) -> v1::BlockHeader {
        let key = BlockKey {
            namespace: self.namespace.id(),
            hash: self.chain.hashes[block.index],
            part: block.part,
        };
        let place = self.chain.place(block.index, self.namespace.run_blocks());
        (&BlockHeader::describe(key, place, block.data.as_slice())).into()
    }

    fn results(&self, answer: v1::PutResponse) -> Result<Vec<PutResult>, Error> {
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
