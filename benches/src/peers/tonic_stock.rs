//! tonic and prost as they come: the same messages as Terrace's, through the generated codec.
//!
//! One message per value, kept in a map as it was decoded; no checksum, no eviction, no index of prefixes. Two shapes:
//! *stock* raises only the message limit (tonic refuses more than 4 MiB); *tuned* also takes Terrace's windows and frames,
//! to show what is the codec's cost and what the settings'. `bytes` fields are `Bytes`, which is already the better half of
//! what prost offers (its default is `Vec<u8>`, one more copy).

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use kvproto::v1::blocks_client::BlocksClient;
use kvproto::v1::blocks_server::{Blocks, BlocksServer};
use kvproto::v1::{
    BlockHeader, Chain, GetOutcome, GetRequest, GetResponse, InvalidateRequest, InvalidateResponse,
    ListNamespacesRequest, ListNamespacesResponse, LookupRequest, LookupResponse,
    OpenNamespaceRequest, OpenNamespaceResponse, PutOutcome, PutRequest, PutResponse, PutResult,
    PutStart, ReleaseRequest, ReleaseResponse, RenewRequest, RenewResponse, StatsRequest,
    StatsResponse, WatchRequest, WatchResponse,
};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::codegen::BoxStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use super::network::{Connection, Job};
use super::socket::Address;
use super::wire::{key, payload};
use crate::rounds::Op;

const MESSAGE_BYTES: usize = 64 << 20;
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
const FRAME_BYTES: u32 = 1 << 20;

#[derive(Clone, Default)]
struct Map(Arc<Mutex<HashMap<Bytes, Bytes>>>);

fn absent<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("this server only gets and puts"))
}

#[tonic::async_trait]
impl Blocks for Map {
    type GetStream = BoxStream<GetResponse>;
    type WatchStream = BoxStream<WatchResponse>;

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        let hash = request.into_inner().chain.unwrap_or_default().hashes;
        let data = self.0.lock().expect("no holder panics").get(&hash).cloned();
        let outcome = if data.is_some() {
            GetOutcome::Hit
        } else {
            GetOutcome::Miss
        };
        let answer = GetResponse {
            outcome: outcome.into(),
            data: data.unwrap_or_default(),
            ..Default::default()
        };
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(answer)))))
    }

    async fn put(
        &self,
        request: Request<Streaming<PutRequest>>,
    ) -> Result<Response<PutResponse>, Status> {
        let mut stream = request.into_inner();
        let mut results = Vec::new();
        while let Some(put) = stream.message().await? {
            let hash = put.header.unwrap_or_default().hash;
            self.0
                .lock()
                .expect("no holder panics")
                .insert(hash, put.data);
            results.push(PutResult {
                outcome: PutOutcome::Cached.into(),
                ..Default::default()
            });
        }
        Ok(Response::new(PutResponse {
            results,
            ..Default::default()
        }))
    }

    async fn open_namespace(
        &self,
        _: Request<OpenNamespaceRequest>,
    ) -> Result<Response<OpenNamespaceResponse>, Status> {
        absent()
    }
    async fn lookup(&self, _: Request<LookupRequest>) -> Result<Response<LookupResponse>, Status> {
        absent()
    }
    async fn renew(&self, _: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        absent()
    }
    async fn release(
        &self,
        _: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        absent()
    }
    async fn invalidate(
        &self,
        _: Request<InvalidateRequest>,
    ) -> Result<Response<InvalidateResponse>, Status> {
        absent()
    }
    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        absent()
    }
    async fn stats(&self, _: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        absent()
    }
    async fn list_namespaces(
        &self,
        _: Request<ListNamespacesRequest>,
    ) -> Result<Response<ListNamespacesResponse>, Status> {
        absent()
    }
}

/// Serves until the process ends.
///
/// # Errors
/// The addresses cannot be bound.
pub async fn serve(tcp: &str, unix: &Path, tuned: bool) -> Result<()> {
    let map = Map::default();
    let service = || {
        BlocksServer::new(map.clone())
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES)
    };
    let server = || match tuned {
        true => Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES),
        false => Server::builder(),
    };
    let tcp = TcpListenerStream::new(TcpListener::bind(tcp).await?);
    let tcp = tokio_stream::StreamExt::map(tcp, |stream| {
        stream.inspect(|s| s.set_nodelay(true).unwrap_or_default())
    });
    let unix = UnixListenerStream::new(UnixListener::bind(unix)?);
    tokio::try_join!(
        server().add_service(service()).serve_with_incoming(tcp),
        server().add_service(service()).serve_with_incoming(unix),
    )?;
    Ok(())
}

/// One channel of its own.
pub struct Stock {
    client: BlocksClient<Channel>,
    value: Bytes,
    buffer: Vec<u8>,
}

impl Connection for Stock {
    /// Where, and whether tuned.
    type Target = (Address, bool);

    async fn connect((address, tuned): &Self::Target) -> Result<Self> {
        let mut endpoint = Endpoint::from_shared(match address {
            Address::Tcp(address) => format!("http://{address}"),
            Address::Unix(path) => format!("unix:{}", path.display()),
        })?;
        if *tuned {
            endpoint = endpoint
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .max_frame_size(FRAME_BYTES);
        }
        let channel = endpoint.connect().await?;
        let client = BlocksClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES);
        Ok(Self {
            client,
            value: Bytes::new(),
            buffer: Vec::new(),
        })
    }

    async fn act(&mut self, job: &Job, index: u64) -> Result<u64> {
        let bytes = usize::try_from(job.bytes)?;
        let hash = Bytes::copy_from_slice(&key(bytes, index));
        match job.op {
            Op::Get => {
                self.buffer.resize(bytes, 0);
                let chain = Some(Chain {
                    hashes: hash,
                    ..Default::default()
                });
                let mut stream = self
                    .client
                    .get(GetRequest {
                        chain,
                        ..Default::default()
                    })
                    .await?
                    .into_inner();
                let answer = stream.message().await?.context("an empty stream")?;
                ensure!(
                    answer.data.len() == bytes,
                    "got {} bytes",
                    answer.data.len()
                );
                self.buffer.copy_from_slice(&answer.data); // into the caller's buffer, like everybody
                ensure!(stream.message().await?.is_none(), "a second message");
            }
            Op::Put => {
                if self.value.len() != bytes {
                    self.value = payload(bytes, bytes as u64).into();
                }
                let header = BlockHeader {
                    hash,
                    length_bytes: job.bytes,
                    ..Default::default()
                };
                let put = PutRequest {
                    start: Some(PutStart::default()),
                    header: Some(header),
                    sums: None,
                    data: self.value.clone(),
                };
                let answer = self.client.put(tokio_stream::once(put)).await?.into_inner();
                ensure!(
                    answer.results.len() == 1,
                    "{} results",
                    answer.results.len()
                );
            }
            other => anyhow::bail!("no {} here", other.as_str()),
        }
        Ok(job.bytes)
    }
}
