//! A node's calls to other nodes: the same service that clients call, under credentials and a budget of its own.
//!
//! ```text
//! blocks::motion ──► Transport ◄── Grpc   the ordinary Blocks service: connections, breaker, bounds   grpc.rs
//!                              ◄── Net    nodes of one process, with faults by hand                   net.rs
//!                    Views     the digest that goes with every call, the members that answers bring
//!                    Pace      bytes per second that moves may use                                    pace.rs
//! ```
//!
//! Every call names a [`Peer`], has a deadline, and says no-forward: whoever is asked answers from what it holds, so
//! that two nodes that disagree about an owner can never send a read back and forth. (The one exception is a block
//! that is put through a chain of replicas, which each node passes on only if it is new there.)
//!
//! Units: bytes, durations. Errors: [`PeerError`]; nobody but the caller decides what a failed call costs, and for a
//! read it costs the miss that it was.
//! Bounds: `peer_calls` calls at once, over all peers; two connections a peer; one block in memory per get.
//! Why a trait: a thousand nodes in one process have no sockets.

mod breaker;
pub mod grpc;
pub mod net;
mod pace;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{future::BoxFuture, stream::BoxStream};
use kvproto::{
    Ack, BlockHeader, Chain, GetOutcome, Kind, LeaseId, Namespace, NamespaceId, Part, Reason,
    convert::answer::PutResult,
    view::{Member, MemberId, ViewDigest},
};

pub use self::{breaker::Breaker, grpc::Grpc, pace::Pace};

/// Header that names the calling node: its calls have a bound of their own. Believed only beside the peers' token, where
/// there is one.
pub const PEER_HEADER: &str = "terrace-peer";

/// Header that names the tenant a peer acts for; believed only beside the peers' token.
pub const TENANT_HEADER: &str = "terrace-tenant";

/// Who is here, as far as calls have to know it: two nodes whose views differ learn so from any call between them.
pub trait Views: Send + Sync + 'static {
    /// Of the view, for the next request.
    fn digest(&self) -> ViewDigest;

    /// Members that came with an answer, because its node has another view.
    fn heard(&self, members: Vec<Member>);
}

/// Whom to call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its stable name.
    pub id: MemberId,
    /// Where it is, as a URL.
    pub address: String,
}

/// A namespace as nodes speak of it among themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// First part of every key in it.
    pub id: NamespaceId,
    /// Whose it is.
    pub tenant: Arc<str>,
    /// Its shape, with which a peer that does not know it can open it.
    pub shape: Arc<Namespace>,
    /// Owners of each of its runs.
    pub replicas: usize,
}

impl Space {
    /// Blocks per run.
    #[must_use]
    pub fn run_blocks(&self) -> u32 {
        self.shape.run_blocks
    }
}

/// Blocks of one chain, in some parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Where.
    pub space: Arc<Space>,
    /// Which.
    pub chain: Chain,
    /// In which parts, at least one.
    pub parts: Vec<Part>,
}

/// What a peer has of a chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Leading blocks present in all parts.
    pub blocks: u32,
    /// The lease on the first so many of them; none for a probe.
    pub lease: Option<(LeaseId, u32)>,
    /// Invalidations that they have survived there.
    pub survived: Vec<u64>,
}

/// A block on its way between nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Who it is, and the sums of who wrote it first.
    pub header: BlockHeader,
    /// Its bytes in order; nobody has compared them with the sums yet.
    pub pieces: Vec<Bytes>,
}

impl Carried {
    /// Bytes that really came.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len() as u64).sum()
    }
}

/// What a get answers for one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// Here it is.
    Hit(Carried),
    /// It cannot be had there.
    Gone(GetOutcome),
}

/// Blocks to be put.
#[derive(Clone, Debug)]
pub struct Given {
    /// Where.
    pub space: Arc<Space>,
    /// How safe they must be before it is answered.
    pub ack: Ack,
    /// Whose budget they draw on.
    pub kind: Kind,
    /// Whether who takes them passes them on to the next owner.
    pub passes_on: bool,
    /// Invalidations that they have survived here.
    pub survived: Vec<u64>,
    /// The blocks.
    pub blocks: Vec<Carried>,
}

/// Why a peer did not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// Nobody answers there.
    #[error("cannot be reached: {0}")]
    Dead(String),
    /// It did not answer in time.
    #[error("did not answer in time")]
    Late,
    /// It failed so often lately that it is left alone for a while.
    #[error("is left alone after failures")]
    LeftAlone,
    /// Too many calls to peers are under way.
    #[error("too many calls to peers are under way, the limit is {0} (peer_calls)")]
    Busy(usize),
    /// It does not know the namespace.
    #[error("does not know the namespace")]
    UnknownNamespace,
    /// It answered that it will not.
    #[error("refused: {message}")]
    Refused {
        /// Why, if it said so.
        reason: Option<Reason>,
        /// In its words.
        message: String,
    },
    /// Its answer breaks the contract.
    #[error("answered nonsense: {0}")]
    Nonsense(String),
}

impl PeerError {
    /// Whether it says that the peer may be gone, rather than that it would not.
    #[must_use]
    pub fn hurts(&self) -> bool {
        matches!(self, Self::Dead(_) | Self::Late)
    }
}

/// A peer's answers, in the order asked for: block `i` in part `p` is number `i * parts + p`.
pub type Fetching = BoxStream<'static, Result<(u32, Fetched), PeerError>>;

/// How nodes call each other. Every call ends within its deadline.
pub trait Transport: Send + Sync + 'static {
    /// What is there of a chain; with `lease`, held for that long.
    fn lookup(
        &self,
        peer: &Peer,
        asked: &Asked,
        lease: Option<Duration>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Seen, PeerError>>;

    /// Blocks, under a lease where there is one. The deadline is that of the whole answer.
    fn get(
        &self,
        peer: &Peer,
        asked: &Asked,
        lease: Option<LeaseId>,
        deadline: Duration,
    ) -> Fetching;

    /// Hands blocks over; one answer per block.
    fn put(
        &self,
        peer: &Peer,
        given: Given,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<PutResult>, PeerError>>;

    /// Makes a namespace known there.
    fn open(
        &self,
        peer: &Peer,
        space: &Arc<Space>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<(), PeerError>>;

    /// Who is here: what is kept for anybody else may go.
    fn keep(&self, _members: &[MemberId]) {}

    /// Gives a lease back; nothing depends on whether it arrives.
    fn release(
        &self,
        peer: &Peer,
        space: &Arc<Space>,
        lease: LeaseId,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<(), PeerError>>;
}
