//! Calls to peers over gRPC: tonic's generated client, two connections a peer.
//!
//! ```text
//! peer ─► quick connection   lookup, release, open          never behind a block
//!      └► bulk connection    get, put                       messages of at most 1 MiB of payload
//! every call: breaker? ─► one of `peer_calls`? ─► deadline on the wire, and here by the clock
//!      with the digest of this node's view; members that an answer brings go to [`Views`]
//! ```
//!
//! A connection is made by the first call that needs it, and made anew when it breaks; HTTP/2 pings find out about
//! peers that are frozen. Lines to members that are gone are dropped ([`Transport::keep`]).
//!
//! What comes in is judged as a client judges it (`kvproto::convert`): the header must name the block asked for, at
//! its place in the chain. Bytes are compared with the header's sums by whoever keeps them, in the slot.
//! Units: bytes, durations. Errors: [`PeerError`].
//! Why tonic's client for bulk: it copies payload once more than a lane of ours does (`kvproto::http2`), at a gigabyte
//! a second, which is what moves may use by default; the lane's client end lives in `kvclient`, which a node must not
//! know.

mod call;
mod got;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream};
use kvproto::{
    LeaseId, OwnerId,
    convert::{self, answer, request},
    v1,
    view::MemberId,
};
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::Semaphore};
use tonic::{
    metadata::{Ascii, MetadataValue},
    transport::Endpoint,
};

use self::{
    call::{Call, Line},
    got::Answer,
};
use super::{
    Asked, Breaker, Carried, Fetching, Given, Peer, PeerError, Seen, Space, Transport, Views,
};
use crate::clock::Clock;

/// Payload of one message; with its head it stays below what any node takes.
const PIECE_BYTES: usize = 1 << 20;

/// Lines held at once; a cluster of more members opens and drops them.
const MAX_LINES: usize = 4096;

/// How long a connection may take to be made; a call's own deadline may be shorter.
const CONNECT: Duration = Duration::from_secs(1);

/// A silent connection is asked after this time whether it is still there, and has as long to answer.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// What the calls of a node share.
#[derive(Clone)]
pub struct GrpcConfig {
    /// The calling node.
    pub me: MemberId,
    /// The peers' token, if they ask for one.
    pub token: Option<String>,
    /// Calls at once, over all peers.
    pub calls: usize,
}

/// The transport of a real node.
pub struct Grpc {
    clock: Arc<dyn Clock>,
    views: Arc<dyn Views>,
    runtime: Handle,
    me: MetadataValue<Ascii>,
    authorization: Option<MetadataValue<Ascii>>,
    /// The owner of the leases that this node takes at its peers.
    owner: OwnerId,
    calls: usize,
    permits: Arc<Semaphore>,
    lines: Mutex<BTreeMap<MemberId, Arc<Line>>>,
}

impl Grpc {
    /// A transport whose connections live on `runtime`.
    #[must_use]
    pub fn new(
        config: &GrpcConfig,
        views: Arc<dyn Views>,
        clock: Arc<dyn Clock>,
        runtime: Handle,
    ) -> Self {
        // Names and tokens are words; what no header takes is left out, and refused there as unauthenticated.
        let header = |text: &str| MetadataValue::try_from(text).ok();
        let authorization = config.token.as_ref().and_then(|token| {
            let mut value = header(&format!("Bearer {token}"))?;
            value.set_sensitive(true);
            Some(value)
        });
        let mut owner = [0; OwnerId::BYTES];
        owner[..8].copy_from_slice(&clock.random_u64().to_le_bytes());
        owner[8..].copy_from_slice(&clock.random_u64().to_le_bytes());
        Self {
            me: header(&config.me.0).unwrap_or_else(|| MetadataValue::from_static("node")),
            authorization,
            owner: OwnerId(owner),
            calls: config.calls,
            permits: Arc::new(Semaphore::new(config.calls)),
            lines: Mutex::default(),
            views,
            clock,
            runtime,
        }
    }

    fn line(&self, peer: &Peer) -> Result<Arc<Line>, PeerError> {
        let mut lines = self.lines.lock();
        if let Some(line) = lines
            .get(&peer.id)
            .filter(|line| line.address == peer.address)
        {
            return Ok(Arc::clone(line));
        }
        let endpoint = Endpoint::from_shared(peer.address.clone())
            .map_err(|e| PeerError::Dead(format!("{:?} is no address: {e}", peer.address)))?
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .initial_stream_window_size(8 << 20)
            .initial_connection_window_size(32 << 20)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        // Whichever thread asks first: the connection lives on the node's own runtime.
        let _guard = self.runtime.enter();
        let line = Arc::new(Line {
            address: peer.address.clone(),
            quick: endpoint.connect_lazy(),
            bulk: endpoint.connect_lazy(),
            breaker: Breaker::default(),
        });
        if lines.len() >= MAX_LINES {
            lines.pop_first();
        }
        lines.insert(peer.id.clone(), Arc::clone(&line));
        Ok(line)
    }

    /// Everything a call needs, or why it does not go out.
    fn call(&self, peer: &Peer, space: &Space, deadline: Duration) -> Result<Call, PeerError> {
        let line = self.line(peer)?;
        let now = self.clock.now();
        let permit = Arc::clone(&self.permits)
            .try_acquire_owned()
            .map_err(|_| PeerError::Busy(self.calls))?;
        if !line.breaker.admits(now) {
            return Err(PeerError::LeftAlone);
        }
        let tenant = MetadataValue::try_from(&*space.tenant)
            .map_err(|_| PeerError::Nonsense("a tenant whose name no header takes".to_owned()))?;
        Ok(Call {
            line,
            clock: Arc::clone(&self.clock),
            views: Arc::clone(&self.views),
            due: now.after(deadline),
            deadline,
            me: self.me.clone(),
            tenant,
            authorization: self.authorization.clone(),
            _permit: permit,
        })
    }

    fn context(&self, no_forward: bool) -> request::Context {
        request::Context {
            view_digest: Some(self.views.digest()),
            no_forward,
            owner_id: Some(self.owner),
            ..request::Context::default()
        }
    }
}

impl Transport for Grpc {
    fn lookup(
        &self,
        peer: &Peer,
        asked: &Asked,
        lease: Option<Duration>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Seen, PeerError>> {
        let call = match self.call(peer, &asked.space, deadline) {
            Ok(call) => call,
            Err(error) => return std::future::ready(Err(error)).boxed(),
        };
        let blocks = asked.chain.len();
        let message = v1::LookupRequest {
            context: self.context(true).to_wire(),
            namespace_id: Bytes::copy_from_slice(&asked.space.id.0),
            chain: Some(convert::chain_to_wire(&asked.chain)),
            parts: asked.parts.iter().map(|part| (*part).into()).collect(),
            probe: lease.is_none(),
            lease_ttl_ms: lease.map_or(0, millis),
            ..v1::LookupRequest::default()
        };
        async move {
            let mut client = call.quick();
            let found = call.answer(client.lookup(call.request(message))).await?;
            let mut found = found.into_inner();
            call.heard(found.context.take());
            let found = answer::Lookup::from_wire(&found, blocks).map_err(nonsense)?;
            Ok(Seen {
                blocks: found.present_blocks,
                lease: found.lease.map(|lease| (lease.id, lease.blocks)),
                survived: found.survived,
            })
        }
        .boxed()
    }

    fn get(
        &self,
        peer: &Peer,
        asked: &Asked,
        lease: Option<LeaseId>,
        deadline: Duration,
    ) -> Fetching {
        let call = match self.call(peer, &asked.space, deadline) {
            Ok(call) => call,
            Err(error) => return stream::once(std::future::ready(Err(error))).boxed(),
        };
        let message = v1::GetRequest {
            context: self.context(true).to_wire(),
            namespace_id: Bytes::copy_from_slice(&asked.space.id.0),
            chain: Some(convert::chain_to_wire(&asked.chain)),
            parts: asked.parts.iter().map(|part| (*part).into()).collect(),
            lease_id: lease.map_or(0, |lease| lease.0),
            piece_bytes: PIECE_BYTES as u32,
        };
        let answer = Answer::new(call, asked.clone(), message);
        stream::unfold(Some(answer), |answer| async {
            let mut answer = answer?;
            match answer.next().await {
                Ok(Some(fetched)) => Some((Ok(fetched), Some(answer))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }

    fn put(
        &self,
        peer: &Peer,
        given: Given,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<answer::PutResult>, PeerError>> {
        let call = match self.call(peer, &given.space, deadline) {
            Ok(call) => call,
            Err(error) => return std::future::ready(Err(error)).boxed(),
        };
        let start = request::PutStart {
            context: self.context(!given.passes_on),
            namespace: given.space.id,
            ack: given.ack,
            kind: given.kind,
            survived: given.survived,
        };
        async move {
            let count = given.blocks.len();
            let first = v1::PutRequest {
                start: Some(start.into()),
                ..v1::PutRequest::default()
            };
            let messages = std::iter::once(first).chain(given.blocks.into_iter().flat_map(cut));
            let mut client = call.bulk();
            let put = client.put(call.request(tokio_stream::iter(messages)));
            let put = call.answer(put).await?.into_inner();
            call.heard(put.context);
            let results = put.results;
            if results.len() != count {
                return Err(nonsense(format!(
                    "{} results for {count} blocks",
                    results.len()
                )));
            }
            let results: Result<Vec<_>, _> =
                results.iter().map(answer::PutResult::try_from).collect();
            results.map_err(nonsense)
        }
        .boxed()
    }

    fn open(
        &self,
        peer: &Peer,
        space: &Arc<Space>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<(), PeerError>> {
        let call = match self.call(peer, space, deadline) {
            Ok(call) => call,
            Err(error) => return std::future::ready(Err(error)).boxed(),
        };
        let message = v1::OpenNamespaceRequest {
            context: self.context(true).to_wire(),
            spec: Some((&*space.shape).into()),
            strict: false,
            replicas: u32::try_from(space.replicas).unwrap_or(0),
            aside: true,
        };
        let id = space.id;
        async move {
            let mut client = call.quick();
            let opened = client.open_namespace(call.request(message));
            let opened = call.answer(opened).await?.into_inner();
            call.heard(opened.context);
            match opened.namespace_id == id.0[..] {
                true => Ok(()),
                // It took us for another tenant.
                false => Err(nonsense("the namespace has another id there")),
            }
        }
        .boxed()
    }

    fn keep(&self, members: &[MemberId]) {
        self.lines.lock().retain(|id, _| members.contains(id));
    }

    fn release(
        &self,
        peer: &Peer,
        space: &Arc<Space>,
        lease: LeaseId,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<(), PeerError>> {
        let call = match self.call(peer, space, deadline) {
            Ok(call) => call,
            Err(error) => return std::future::ready(Err(error)).boxed(),
        };
        let message = v1::ReleaseRequest {
            context: self.context(true).to_wire(),
            lease_id: lease.0,
        };
        async move {
            let mut client = call.quick();
            let released = call.answer(client.release(call.request(message))).await?;
            call.heard(released.into_inner().context);
            Ok(())
        }
        .boxed()
    }
}

/// A block as messages of a put.
fn cut(block: Carried) -> impl Iterator<Item = v1::PutRequest> {
    let header = v1::PutRequest {
        header: Some((&block.header).into()),
        ..v1::PutRequest::default()
    };
    let pieces = block.pieces.into_iter().flat_map(|piece| {
        (0..piece.len()).step_by(PIECE_BYTES).map(move |at| {
            let end = piece.len().min(at + PIECE_BYTES);
            v1::PutRequest {
                data: piece.slice(at..end),
                ..v1::PutRequest::default()
            }
        })
    });
    std::iter::once(header).chain(pieces)
}

fn nonsense(problem: impl ToString) -> PeerError {
    PeerError::Nonsense(problem.to_string())
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX).max(1)
}
