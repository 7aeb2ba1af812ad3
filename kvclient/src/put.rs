//! Bulk put: headers made once, payload sent by reference.
//!
//! ```text
//! block ─► page sums, seal ─► BlockHeader ─┐ once per put, just before its first bytes leave, so that
//!                                          │ hashing one block overlaps sending the one before
//!   [start] [header] data ≤ 1 MiB │ data ≤ 1 MiB │ [header] data ...     as the window allows
//! ```
//!
//! Units: bytes.
//! Errors: the call's; what became of each block is a [`PutResult`], a rejection included.
//! Why pieces of 1 MiB: one HTTP/2 frame each; and a borrowed slice is copied piece by piece, never whole.

use std::future::poll_fn;

use bytes::Bytes;
use h2::SendStream;
use kvproto::{
    Ack, BlockHeader, BlockKey, Chain, FieldError, Kind, Part, PutOutcome, Reason, frame, v1,
};

use crate::{
    batch,
    call::{Deadline, Inner, Tries},
    convert,
    error::Error,
    namespace::NamespaceHandle,
    pool::Checkout,
    wire::{self, Method},
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

    fn piece(&self, from: usize, to: usize) -> Bytes {
        match self {
            Self::Shared(bytes) => bytes.slice(from..to),
            Self::Borrowed(bytes) => Bytes::copy_from_slice(&bytes[from..to]),
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

/// What became of one block of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutResult {
    /// What it is now.
    pub outcome: PutOutcome,
    /// When a rejected one may be put again.
    pub retry_after_ms: u32,
    /// Why it was rejected.
    pub reason: Option<Reason>,
}

impl PutResult {
    /// True when the block is there.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.outcome.is_kept()
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
                .run(|checkout, left| async move {
                    let authorization = self.inner.authorization.as_ref();
                    let stream =
                        wire::start(&checkout.live.send, METHOD, left, authorization).await?;
                    self.exchange(&checkout, stream, headers, &request).await
                })
                .await?;
            if let Ok(answer) = answer {
                return self.results(answer);
            }
        }
    }

    /// Sends, and listens at the same time: a node that refuses says so before it has read everything.
    async fn exchange(
        &self,
        _checkout: &Checkout,
        (mut response, mut stream): (h2::client::ResponseFuture, SendStream<Bytes>),
        headers: &mut [Option<v1::BlockHeader>],
        request: &[u8; 16],
    ) -> Result<v1::PutResponse, Error> {
        let broken = |source| Error::Broken {
            method: METHOD.name,
            source,
        };
        let mut early = None;
        let sent = {
            let sending = self.send(&mut stream, headers, request);
            tokio::pin!(sending);
            loop {
                tokio::select! {
                    biased;
                    sent = &mut sending => break sent,
                    head = &mut response, if early.is_none() => {
                        early = Some(wire::body(METHOD, head.map_err(broken)?)?);
                    }
                }
            }
        };
        // A stream that was closed under us usually has a status that says why.
        let answer = async {
            let mut body = match early {
                Some(body) => body,
                None => wire::body(METHOD, response.await.map_err(broken)?)?,
            };
            wire::one(METHOD, &mut body).await
        };
        match (answer.await, sent) {
            (Ok(answer), _) => Ok(answer),
            (Err(error @ Error::Refused { .. }), _) | (Err(error), Ok(())) => Err(error),
            (Err(_), Err(error)) => Err(error),
        }
    }

    async fn send(
        &self,
        stream: &mut SendStream<Bytes>,
        headers: &mut [Option<v1::BlockHeader>],
        request: &[u8; 16],
    ) -> Result<(), Error> {
        let mut start = Some(v1::PutStart {
            context: Some(self.inner.context(request)),
            namespace_id: Bytes::copy_from_slice(&self.namespace.id().0),
            ack: self.options.ack.to_wire().into(),
            kind: self.options.kind.to_wire().into(),
        });
        let last = self.blocks.len().saturating_sub(1);
        for (i, (block, header)) in self.blocks.iter().zip(headers).enumerate() {
            let length = block.data.as_slice().len();
            let mut message = v1::PutRequest {
                start: start.take(),
                header: Some(header.take().unwrap_or_else(|| self.describe(block))),
                data: Bytes::new(),
            };
            let mut at = 0;
            while at < length {
                let end = (at + PIECE_BYTES).min(length);
                let head = frame::head(&message, end - at);
                if let Some(used) = message.header.take() {
                    *header = Some(used);
                    message.start = None;
                }
                send(stream, head, false)?;
                send_payload(stream, &block.data, at, end, i == last && end == length).await?;
                at = end;
            }
        }
        Ok(())
    }

    fn describe(&self, block: &PutBlock<'_>) -> v1::BlockHeader {
        let key = BlockKey {
            namespace: self.namespace.id(),
            hash: self.chain.hashes[block.index],
            part: block.part,
        };
        let place = self.chain.place(block.index, self.namespace.run_blocks());
        convert::header(&BlockHeader::describe(key, place, block.data.as_slice()))
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
        let results = answer.results.iter().map(|result| {
            Ok(PutResult {
                outcome: PutOutcome::from_wire(result.outcome).ok_or_else(|| {
                    wire::answer(METHOD, format!("outcome {} is not known", result.outcome))
                })?,
                retry_after_ms: result.retry_after_ms,
                reason: Reason::from_wire(result.reason),
            })
        });
        results.collect()
    }
}

/// Sends `from..to` of a payload as the window allows.
async fn send_payload(
    stream: &mut SendStream<Bytes>,
    payload: &Payload<'_>,
    mut from: usize,
    to: usize,
    end_of_stream: bool,
) -> Result<(), Error> {
    while from < to {
        let room = capacity(stream, to - from).await?;
        let until = (from + room).min(to);
        let bytes = payload.piece(from, until);
        send(stream, bytes, end_of_stream && until == to)?;
        from = until;
    }
    Ok(())
}

/// Queues bytes; a message's head may go ahead of the window, its payload never does.
fn send(stream: &mut SendStream<Bytes>, bytes: Bytes, end_of_stream: bool) -> Result<(), Error> {
    stream
        .send_data(bytes, end_of_stream)
        .map_err(|source| Error::Broken {
            method: METHOD.name,
            source,
        })
}

/// Waits until the peer and the send buffer take some of `wanted` bytes.
async fn capacity(stream: &mut SendStream<Bytes>, wanted: usize) -> Result<usize, Error> {
    stream.reserve_capacity(wanted);
    match poll_fn(|cx| stream.poll_capacity(cx)).await {
        Some(Ok(room)) => Ok(room),
        Some(Err(source)) => Err(Error::Broken {
            method: METHOD.name,
            source,
        }),
        None => Err(Error::Truncated {
            method: METHOD.name,
        }),
    }
}
