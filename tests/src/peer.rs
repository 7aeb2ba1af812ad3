//! A node made of stock tonic parts that does as a test tells it: a peer to hold the client against.
//!
//! ```text
//! test ─ script(faults) ─► Peer ◄─ gRPC by tonic's own codec ─ client under test
//!      ◄─ what was asked ─
//! ```
//!
//! Why not the real node: it never lies, never forgets half an answer, and is silent only when frozen.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use kvproto::{Namespace, v1};
use parking_lot::Mutex;
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{
    Code, Request, Response, Status, Streaming,
    codegen::tokio_stream::{self, Stream, StreamExt},
    metadata::MetadataMap,
    transport::{Server, server::TcpIncoming},
};

/// What goes wrong with the next call (but for `OpenNamespace`, which always works).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This status, with this reason in its trailer.
    Refuse(Code, &'static str),
    /// No answer at all.
    Silence,
    /// Get: the byte at this offset of the first block is another.
    FlipByte(usize),
    /// Get: the first block's header names another block, and is sealed for it.
    WrongBlock,
    /// Get: the stream ends in good order, in the middle of the first block.
    EndEarly,
    /// Nothing: a place holder between faults.
    None,
}

/// One request as the peer saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Method name.
    pub method: &'static str,
    /// `grpc-timeout` as sent.
    pub timeout: Option<String>,
    /// Context of the request.
    pub context: v1::RequestContext,
    /// Lookup: its idempotency key. Release: the lease id's bytes.
    pub detail: Bytes,
}

/// A scripted node.
pub struct Peer {
    /// Where it listens.
    pub address: SocketAddr,
    state: Arc<State>,
    serving: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    boot: AtomicU64,
    secret: AtomicU64,
    script: Mutex<VecDeque<Fault>>,
    seen: Mutex<Vec<Seen>>,
    blocks: Mutex<HashMap<Name, Stored>>,
}

/// Hash, rank, layer group.
type Name = (Bytes, u32, u32);
type Stored = (v1::BlockHeader, Bytes);

impl Peer {
    /// A peer on a free loopback port.
    ///
    /// # Panics
    /// When there is none.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let state = Arc::new(State::default());
        state.boot.store(1, Ordering::Relaxed);
        let service = v1::blocks_server::BlocksServer::new(Handler(state.clone()))
            .max_decoding_message_size(64 << 20)
            .max_encoding_message_size(64 << 20);
        let serving = tokio::spawn(async move {
            Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener))
                .await
                .expect("the peer serves until it is dropped");
        });
        Self {
            address,
            state,
            serving,
        }
    }

    /// Where it listens, as a client takes it.
    #[must_use]
    pub fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// Faults of the next calls, in order.
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.script.lock().extend(faults);
    }

    /// Every request so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().clone()
    }

    /// Requests of one method so far.
    #[must_use]
    pub fn count(&self, method: &str) -> usize {
        self.state
            .seen
            .lock()
            .iter()
            .filter(|seen| seen.method == method)
            .count()
    }

    /// Another life: a new boot id, blocks forgotten.
    pub fn reboot(&self) {
        self.state.boot.fetch_add(1, Ordering::Relaxed);
        self.state.blocks.lock().clear();
    }

    /// Another secret: the same namespace has another key from now on.
    pub fn change_secret(&self) {
        self.state.secret.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

struct Handler(Arc<State>);

impl Handler {
    fn context(&self) -> Option<v1::ResponseContext> {
        Some(v1::ResponseContext {
            boot_id: self.0.boot.load(Ordering::Relaxed),
            ..Default::default()
        })
    }

    /// Takes note of a request and plays the next fault.
    async fn enter(
        &self,
        method: &'static str,
        metadata: &MetadataMap,
        context: Option<v1::RequestContext>,
        detail: Bytes,
    ) -> Result<Fault, Status> {
        self.0.seen.lock().push(Seen {
            method,
            timeout: metadata
                .get("grpc-timeout")
                .map(|value| value.to_str().expect("ASCII").to_owned()),
            context: context.unwrap_or_default(),
            detail,
        });
        let fault = self.0.script.lock().pop_front().unwrap_or(Fault::None);
        match fault {
            Fault::Silence => std::future::pending().await,
            Fault::Refuse(code, reason) => {
                let mut status = Status::new(code, "as the script says: 100%");
                if !reason.is_empty() {
                    let reason = reason.parse().expect("a reason is ASCII");
                    status.metadata_mut().insert("terrace-reason", reason);
                }
                Err(status)
            }
            other => Ok(other),
        }
    }

    fn find(&self, hash: &[u8], part: v1::Part) -> Option<Stored> {
        let key = (Bytes::copy_from_slice(hash), part.rank, part.layer_group);
        self.0.blocks.lock().get(&key).cloned()
    }
}

fn parts(parts: &[v1::Part]) -> Vec<v1::Part> {
    if parts.is_empty() {
        vec![v1::Part::default()]
    } else {
        parts.to_vec()
    }
}

type Stream1<T> = std::pin::Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl v1::blocks_server::Blocks for Handler {
    async fn open_namespace(
        &self,
        request: Request<v1::OpenNamespaceRequest>,
    ) -> Result<Response<v1::OpenNamespaceResponse>, Status> {
        let spec = request.into_inner().spec.unwrap_or_default();
        let shape = Namespace::opaque(&spec.label, spec.block_tokens, spec.run_blocks);
        let secret = self.0.secret.load(Ordering::Relaxed).to_le_bytes();
        Ok(Response::new(v1::OpenNamespaceResponse {
            context: self.context(),
            namespace_id: Bytes::copy_from_slice(&shape.id("test").0),
            namespace_key: Bytes::copy_from_slice(shape.key("test", &secret).as_bytes()),
            difference: String::new(),
            max_block_bytes: 64 << 20,
            local_socket: String::new(),
            replicas: 0,
        }))
    }

    async fn lookup(
        &self,
        request: Request<v1::LookupRequest>,
    ) -> Result<Response<v1::LookupResponse>, Status> {
        let (metadata, _, asked) = request.into_parts();
        self.enter("Lookup", &metadata, asked.context, asked.idempotency_key)
            .await?;
        let parts = parts(&asked.parts);
        let hashes = asked.chain.unwrap_or_default().hashes;
        let present = hashes
            .chunks(32)
            .take_while(|hash| parts.iter().all(|part| self.find(hash, *part).is_some()))
            .count() as u32;
        Ok(Response::new(v1::LookupResponse {
            context: self.context(),
            present_blocks: present,
            tiers: (present > 0)
                .then_some(v1::TierRun {
                    blocks: present,
                    tier: v1::Tier::Ram.into(),
                })
                .into_iter()
                .collect(),
            lease: (!asked.probe && present > 0).then_some(v1::Lease {
                id: 77,
                ttl_ms: 10_000,
                blocks: present,
                bytes: 0,
            }),
            ..v1::LookupResponse::default()
        }))
    }

    type GetStream = Stream1<v1::GetResponse>;

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<Self::GetStream>, Status> {
        let (metadata, _, asked) = request.into_parts();
        let mut fault = self
            .enter("Get", &metadata, asked.context, Bytes::new())
            .await?;
        let parts = parts(&asked.parts);
        let hashes = asked.chain.unwrap_or_default().hashes;
        let mut messages = Vec::new();
        let asked = hashes
            .chunks(32)
            .flat_map(|hash| parts.iter().map(move |part| (hash, *part)));
        'blocks: for (block, (hash, part)) in asked.enumerate() {
            let block = block as u32;
            let Some((mut header, data)) = self.find(hash, part) else {
                let outcome = v1::GetOutcome::Miss.into();
                messages.push(v1::GetResponse {
                    block,
                    outcome,
                    ..Default::default()
                });
                continue;
            };
            let mut data = data.to_vec();
            match std::mem::replace(&mut fault, Fault::None) {
                Fault::FlipByte(at) => data[at] ^= 1,
                Fault::WrongBlock => header.hash = Bytes::from_static(&[9; 32]),
                other => fault = other,
            }
            // Pieces that fit no page: the reader must not care.
            for (i, piece) in data.chunks(700_001).enumerate() {
                messages.push(v1::GetResponse {
                    context: None,
                    block,
                    outcome: v1::GetOutcome::Hit.into(),
                    header: (i == 0).then(|| header.clone()),
                    tier: v1::Tier::Ram.into(),
                    offset: i as u64 * 700_001,
                    seconds: Vec::new(),
                    data: Bytes::copy_from_slice(piece),
                });
                if fault == Fault::EndEarly {
                    break 'blocks;
                }
            }
        }
        if let Some(first) = messages.first_mut() {
            first.context = self.context();
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(
            messages.into_iter().map(Ok),
        ))))
    }

    async fn put(
        &self,
        request: Request<Streaming<v1::PutRequest>>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        let (metadata, _, mut stream) = request.into_parts();
        let mut blocks: Vec<(v1::BlockHeader, Vec<u8>)> = Vec::new();
        let mut entered = false;
        while let Some(message) = stream.next().await {
            let message = message?;
            if let Some(start) = message.start {
                entered = true;
                self.enter("Put", &metadata, start.context, Bytes::new())
                    .await?;
            }
            if let Some(sums) = message.sums {
                let (header, _) = blocks.last_mut().ok_or(Status::invalid_argument("sums"))?;
                (header.page_sums, header.seal) = (sums.page_sums, sums.seal);
            }
            if let Some(header) = message.header {
                blocks.push((header, Vec::new()));
            }
            let (_, data) = blocks
                .last_mut()
                .ok_or(Status::invalid_argument("header"))?;
            data.extend_from_slice(&message.data);
        }
        if !entered {
            return Err(Status::invalid_argument("start: is missing"));
        }
        let results = blocks.into_iter().map(|(header, data)| {
            let whole = header.length_bytes == data.len() as u64
                && header.page_sums == kvproto::checksum::page_sums(&data);
            let outcome = if whole {
                let part = header.part.unwrap_or_default();
                let key = (header.hash.clone(), part.rank, part.layer_group);
                self.0.blocks.lock().insert(key, (header, data.into()));
                v1::PutOutcome::Cached
            } else {
                v1::PutOutcome::Corrupt
            };
            v1::PutResult {
                outcome: outcome.into(),
                ..Default::default()
            }
        });
        Ok(Response::new(v1::PutResponse {
            context: self.context(),
            results: results.collect(),
        }))
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::RenewResponse>, Status> {
        let (metadata, _, asked) = request.into_parts();
        self.enter("Renew", &metadata, asked.context, Bytes::new())
            .await?;
        Ok(Response::new(v1::RenewResponse {
            context: self.context(),
            renewed: asked.lease_id == 77,
            ttl_ms: asked.ttl_ms,
        }))
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let (metadata, _, asked) = request.into_parts();
        let detail = Bytes::copy_from_slice(&asked.lease_id.to_le_bytes());
        self.enter("Release", &metadata, asked.context, detail)
            .await?;
        Ok(Response::new(v1::ReleaseResponse {
            context: self.context(),
            released: true,
        }))
    }

    async fn invalidate(
        &self,
        request: Request<v1::InvalidateRequest>,
    ) -> Result<Response<v1::InvalidateResponse>, Status> {
        let (metadata, _, asked) = request.into_parts();
        self.enter("Invalidate", &metadata, asked.context, Bytes::new())
            .await?;
        let mut held = self.0.blocks.lock();
        let before = held.len();
        match asked.target {
            Some(v1::invalidate_request::Target::Hash(hash)) => held.retain(|key, _| key.0 != hash),
            _ => held.clear(),
        }
        Ok(Response::new(v1::InvalidateResponse {
            context: self.context(),
            blocks: (before - held.len()) as u64,
        }))
    }

    type WatchStream = Stream1<v1::WatchResponse>;

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (metadata, _, asked) = request.into_parts();
        self.enter("Watch", &metadata, asked.context, Bytes::new())
            .await?;
        let event = |sequence, event| v1::WatchResponse {
            sequence,
            event,
            ..Default::default()
        };
        let block = v1::BlockEvent {
            namespace_id: Bytes::from_static(&[1; 16]),
            hash: Bytes::from_static(&[2; 32]),
            tier: v1::Tier::Ram.into(),
            ..Default::default()
        };
        let events = [
            v1::WatchResponse {
                context: self.context(),
                ..Default::default()
            },
            event(1, Some(v1::watch_response::Event::Stored(block))),
            event(5, Some(v1::watch_response::Event::Lagged(3))),
        ];
        Ok(Response::new(Box::pin(tokio_stream::iter(events.map(Ok)))))
    }

    async fn stats(
        &self,
        request: Request<v1::StatsRequest>,
    ) -> Result<Response<v1::StatsResponse>, Status> {
        let (metadata, _, asked) = request.into_parts();
        self.enter("Stats", &metadata, asked.context, Bytes::new())
            .await?;
        Ok(Response::new(v1::StatsResponse {
            context: self.context(),
            ..Default::default()
        }))
    }

    async fn list_namespaces(
        &self,
        request: Request<v1::ListNamespacesRequest>,
    ) -> Result<Response<v1::ListNamespacesResponse>, Status> {
        let (metadata, _, asked) = request.into_parts();
        self.enter("ListNamespaces", &metadata, asked.context, Bytes::new())
            .await?;
        Ok(Response::new(v1::ListNamespacesResponse {
            context: self.context(),
            ..Default::default()
        }))
    }
}
