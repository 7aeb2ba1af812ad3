//! A same-host client with no more manners than the wire asks for: blocking, one call at a time, nothing of `kvclient`.
//!
//! ```text
//! Raw ── frames, descriptors ──► local.sock      Space: a tenant's namespace, its chains, headers and requests
//! ```

use std::{
    io::{self, IoSliceMut, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use bytes::Bytes;
use kvgpu::{ReadSegment, StagingMap};
use kvproto::{
    BlockHeader, Chain, Namespace, NamespaceId, NamespaceKey,
    convert::{self, request::OpenNamespace},
    local::{Frame, Inbox, VERSION, encode, fixed},
    v1::{self, local_reply::Answer, local_request::Call},
};
use kvserver::Node;
use prost::Message;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::{
    node::{self, BLOCK_TOKENS, RUN_BLOCKS},
    patience::HANG,
};

/// A connection of the same-host path.
pub struct Raw {
    stream: UnixStream,
    inbox: Inbox,
    sequence: u64,
    /// Descriptors that came with answers and were not taken yet.
    pub fds: Vec<OwnedFd>,
}

impl Raw {
    /// Connects; nothing is said yet.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(HANG))?;
        Ok(Self {
            stream,
            inbox: Inbox::new(),
            sequence: 0,
            fds: Vec::new(),
        })
    }

    /// Connects to a node and attaches for `owner`, with staging memory.
    ///
    /// # Panics
    /// When the node refuses.
    #[must_use]
    pub fn attached(
        node: &Node,
        token: &str,
        owner: u8,
        staging_bytes: u64,
    ) -> (Self, v1::LocalAttached) {
        let path = node.local_path().expect("the same-host path is on");
        let mut raw = Self::connect(path).expect("a connection");
        let asked = v1::LocalAttach {
            token: token.to_owned(),
            staging_bytes,
            ..attach(owner)
        };
        match raw.call(Call::Attach(asked)).expect("a welcome") {
            Answer::Attached(attached) => (raw, attached),
            other => panic!("attach was answered {other:?}"),
        }
    }

    /// One call and its answer.
    ///
    /// # Errors
    /// The refusal.
    ///
    /// # Panics
    /// When the connection breaks, or the answer is another call's.
    pub fn call(&mut self, call: Call) -> Result<Answer, v1::LocalRefusal> {
        self.call_with(&[], 0, call)
    }

    /// One call that also lets go of holds and names a time.
    ///
    /// # Errors
    /// The refusal.
    ///
    /// # Panics
    /// When the connection breaks, or the answer is another call's.
    pub fn call_with(
        &mut self,
        done: &[u64],
        timeout_ms: u32,
        call: Call,
    ) -> Result<Answer, v1::LocalRefusal> {
        self.ask(done, timeout_ms, call);
        let reply = self.reply().expect("a connection").expect("an answer");
        assert_eq!(
            reply.sequence, self.sequence,
            "the answer is another call's"
        );
        match reply.answer.expect("an answer") {
            Answer::Refused(refusal) => Err(refusal),
            answer => Ok(answer),
        }
    }

    /// Sends a call, and leaves its answer where it is; its sequence.
    ///
    /// # Panics
    /// When the connection breaks.
    pub fn begin(&mut self, call: Call) -> u64 {
        self.begin_within(0, call)
    }

    /// The same with a time for the node.
    ///
    /// # Panics
    /// When the connection breaks.
    pub fn begin_within(&mut self, timeout_ms: u32, call: Call) -> u64 {
        self.ask(&[], timeout_ms, call);
        self.sequence
    }

    fn ask(&mut self, done: &[u64], timeout_ms: u32, call: Call) {
        self.sequence += 1;
        let request = v1::LocalRequest {
            sequence: self.sequence,
            timeout_ms,
            done: done.to_vec(),
            call: Some(call),
        };
        let mut frame = Vec::new();
        encode(&request, &mut frame).expect("a short request");
        self.send(&frame).expect("the node reads");
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The node closed.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next answer; `None` when the node closed.
    ///
    /// # Errors
    /// What the socket says.
    ///
    /// # Panics
    /// When the node sends what is no frame.
    pub fn reply(&mut self) -> io::Result<Option<v1::LocalReply>> {
        match self.frame()? {
            None => Ok(None),
            Some(Frame::Message(bytes)) => Ok(Some(v1::LocalReply::decode(bytes)?)),
            Some(Frame::Fixed(_)) => panic!("a message was expected"),
        }
    }

    /// A get in the fixed layout, and its answer in it.
    ///
    /// # Panics
    /// When the connection breaks, or the answer is a message.
    pub fn get_fixed(&mut self, asking: fixed::Asking<'_>) -> fixed::Got {
        self.sequence += 1;
        let asking = fixed::Asking {
            sequence: self.sequence,
            ..asking
        };
        let mut frame = Vec::new();
        let has_layout = fixed::encode_get(&asking, &mut frame).expect("a short request");
        assert!(has_layout);
        self.send(&frame).expect("the node reads");
        let Some(Frame::Fixed(bytes)) = self.frame().expect("a connection") else {
            panic!("an answer in the fixed layout was expected");
        };
        let got = fixed::decode_got(&bytes).expect("the node's frames are whole");
        assert_eq!(got.head.sequence, self.sequence);
        got
    }

    fn frame(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.inbox.take_frame().expect("a frame") {
                return Ok(Some(frame));
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(128))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut room = [IoSliceMut::new(self.inbox.room())];
            let received = rustix::net::recvmsg(
                &self.stream,
                &mut room,
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            );
            let received = match received {
                Ok(received) => received,
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                }
            }
            if received.bytes == 0 {
                return Ok(None);
            }
            self.inbox.filled(received.bytes);
        }
    }

    /// Maps the staging memory whose descriptor came with the attachment.
    ///
    /// # Panics
    /// When none came.
    pub fn staging(&mut self) -> StagingMap {
        let fd = self.fds.pop().expect("a descriptor came");
        assert!(self.fds.is_empty(), "one descriptor came");
        StagingMap::map(fd).expect("staging memory")
    }

    /// Asks for segments; those that were given, mapped, in the order asked for.
    ///
    /// # Panics
    /// When the node refuses, or descriptors and segments do not match.
    pub fn map(&mut self, segments: &[u32]) -> Vec<(v1::LocalSegment, ReadSegment)> {
        let asked = v1::LocalMap {
            segments: segments.to_vec(),
        };
        let Ok(Answer::Mapped(mapped)) = self.call(Call::Map(asked)) else {
            panic!("map is answered");
        };
        let mut fds = std::mem::take(&mut self.fds).into_iter();
        let pair = |segment: v1::LocalSegment| {
            let (data, generations) = (fds.next().expect("bytes"), fds.next().expect("a table"));
            let mapped = ReadSegment::map(data, generations).expect("a mapping");
            assert_eq!(mapped.length_bytes(), segment.length_bytes);
            (segment, mapped)
        };
        mapped.segments.into_iter().map(pair).collect()
    }

    /// A get that must be answered.
    ///
    /// # Panics
    /// When it is refused.
    pub fn get(&mut self, asked: v1::GetRequest) -> v1::LocalGot {
        match self.call(Call::Get(asked)) {
            Ok(Answer::Got(got)) => got,
            other => panic!("get was answered {other:?}"),
        }
    }

    /// A lookup that must be answered.
    ///
    /// # Panics
    /// When it is refused.
    pub fn lookup(&mut self, asked: v1::LookupRequest) -> v1::LookupResponse {
        match self.call(Call::Lookup(asked)) {
            Ok(Answer::Lookup(found)) => found,
            other => panic!("lookup was answered {other:?}"),
        }
    }

    /// A put.
    ///
    /// # Errors
    /// The refusal.
    ///
    /// # Panics
    /// When it is answered as another call.
    pub fn put(&mut self, asked: v1::LocalPut) -> Result<Vec<v1::PutResult>, v1::LocalRefusal> {
        match self.call(Call::Put(asked))? {
            Answer::Put(put) => Ok(put.results),
            other => panic!("put was answered {other:?}"),
        }
    }

    /// The socket, to be misused.
    #[must_use]
    pub fn stream(&self) -> impl AsFd + '_ {
        &self.stream
    }
}

/// An attach that is in order, for an owner whose id is this byte sixteen times; 0 is nobody by name.
#[must_use]
pub fn attach(owner: u8) -> v1::LocalAttach {
    v1::LocalAttach {
        version: VERSION,
        owner_id: match owner {
            0 => Bytes::new(),
            _ => Bytes::copy_from_slice(&[owner; 16]),
        },
        ..v1::LocalAttach::default()
    }
}

/// One tenant's namespace.
pub struct Space {
    /// Its id.
    pub id: NamespaceId,
    key: NamespaceKey,
}

impl Space {
    /// Opens the tests' namespace for a tenant.
    ///
    /// # Panics
    /// When the node does not know the tenant.
    pub async fn open(node: &Node, tenant: &str) -> Self {
        let blocks = node.blocks();
        let tenant = blocks.tenants().find(tenant).expect("a tenant of the node");
        let shape = Namespace::opaque("test", BLOCK_TOKENS, RUN_BLOCKS);
        let opened = blocks
            .open_namespace(tenant, &OpenNamespace::of(shape))
            .await
            .expect("a namespace");
        Self {
            id: opened.id,
            key: opened.key,
        }
    }

    /// A chain of `blocks` blocks; another seed, another chain.
    #[must_use]
    pub fn chain(&self, seed: u32, blocks: u32) -> Chain {
        node::chain(&self.key, seed, blocks)
    }

    /// The header of block `i` of a chain with these bytes.
    #[must_use]
    pub fn header(&self, chain: &Chain, i: usize, bytes: &[u8]) -> BlockHeader {
        node::header(self.id, chain, i, bytes)
    }

    /// The header of a hit, judged as a client must.
    ///
    /// # Panics
    /// When the node sent one that breaks the rules.
    #[must_use]
    pub fn judge(&self, wire: &v1::BlockHeader) -> BlockHeader {
        let rules = convert::HeaderRules {
            namespace: self.id,
            run_blocks: RUN_BLOCKS,
            max_block_bytes: 64 << 20,
        };
        convert::header(wire, rules).expect("the node's header is in order")
    }

    /// A get of a whole chain; lease 0 is none.
    #[must_use]
    pub fn get(&self, chain: &Chain, lease_id: u64) -> v1::GetRequest {
        v1::GetRequest {
            namespace_id: Bytes::copy_from_slice(&self.id.0),
            chain: Some(convert::chain_to_wire(chain)),
            lease_id,
            ..v1::GetRequest::default()
        }
    }

    /// A lookup with a lease of so many milliseconds.
    #[must_use]
    pub fn lookup(&self, chain: &Chain, lease_ttl_ms: u32) -> v1::LookupRequest {
        v1::LookupRequest {
            namespace_id: Bytes::copy_from_slice(&self.id.0),
            chain: Some(convert::chain_to_wire(chain)),
            lease_ttl_ms,
            ..v1::LookupRequest::default()
        }
    }

    /// A put of blocks that lie in staging memory already: header and offset of each.
    #[must_use]
    pub fn put(&self, blocks: &[(BlockHeader, u64)]) -> v1::LocalPut {
        v1::LocalPut {
            start: Some(v1::PutStart {
                namespace_id: Bytes::copy_from_slice(&self.id.0),
                ..v1::PutStart::default()
            }),
            blocks: blocks
                .iter()
                .map(|(header, offset)| v1::LocalWritten {
                    header: Some(header.into()),
                    offset: *offset,
                })
                .collect(),
            follows: false,
        }
    }
}

/// Bytes that are no others'.
#[must_use]
pub fn pattern(seed: u32, length: usize) -> Vec<u8> {
    (0..length as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 77) >> 13) as u8)
        .collect()
}
