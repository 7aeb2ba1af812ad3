//! A node in this process, and a stock client to hold it against.
//!
//! ```text
//! TestNode { real node on 127.0.0.1:0, data in a folder that goes with it }
//!    ▲ TCP or Unix socket
//! Stock { tonic's generated client, tonic's own codec, nothing of ours but kvproto's rules }
//! ```

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use kvproto::{
    BlockHeader, BlockKey, Chain, Namespace, NamespaceId, NamespaceKey, Part, convert, hash,
    v1::{self, blocks_client::BlocksClient},
};
use kvserver::{
    Node,
    config::{Capacity, Config, LogFormat, MIB},
    tier::{FaultyTier, Tier},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::patience::HANG;

/// Messages of a stock client: larger than any piece that the tests ask for.
const MESSAGE_BYTES: usize = 16 << 20;

/// Tokens per block and blocks per run of the tests' namespace.
pub const BLOCK_TOKENS: u32 = 16;
/// Blocks per run of the tests' namespace.
pub const RUN_BLOCKS: u32 = 4;

/// One figure of a node's scrape; several samples of one name add up.
#[must_use]
pub fn figure(node: &Node, name: &str) -> f64 {
    let text = node.blocks().metrics_text();
    let samples = kvserver::telemetry::metrics::samples(&text);
    let of_name = samples.filter(|(sample, _)| sample.starts_with(name));
    of_name.map(|(_, value)| value).sum()
}

/// Settings of a small node: 64 MiB of RAM, nothing on disk, no console.
#[must_use]
pub fn small(data_dir: &Path) -> Config {
    Config {
        data_dir: data_dir.to_owned(),
        listen: "127.0.0.1:0".parse().expect("an address"),
        http_listen: None,
        ram_bytes: Capacity::Bytes(64 * MIB),
        nvme_bytes: Capacity::Bytes(0),
        durable_bytes: Capacity::Bytes(0),
        nvme_wear_bytes_per_day: Capacity::Bytes(0),
        huge_pages: false,
        prefault: false,
        worker_threads: 2,
        log_format: LogFormat::Off,
        ..Config::default()
    }
}

/// A node and its folder.
pub struct TestNode {
    /// The node.
    pub node: Node,
    /// Where its data is.
    pub dir: TempDir,
}

impl TestNode {
    /// A small node with some settings changed.
    pub async fn start(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_in(TempDir::new().expect("a temporary folder"), change).await
    }

    /// The same over a folder that may hold data already.
    pub async fn start_in(dir: TempDir, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = small(dir.path());
        change(&mut config);
        let node = Node::start(config).await.expect("a small node starts");
        Self { node, dir }
    }

    /// Drains the node and hands back its folder.
    pub async fn stop(self) -> TempDir {
        self.node.shutdown(HANG).await;
        self.dir
    }

    /// A stock client over TCP, in the tests' namespace.
    pub async fn client(&self) -> Stock {
        Stock::open(&self.node.endpoint()).await
    }

    /// Bytes of the arena that slots hold.
    #[must_use]
    pub fn arena_bytes(&self) -> u64 {
        self.node.blocks().arena().stats().used_bytes
    }
}

/// A node around a disk that fails on demand.
///
/// # Panics
/// When it does not start, or `config` gives it no disk.
pub async fn start_frail(config: Config) -> (Node, Arc<FaultyTier>) {
    let made = Arc::new(OnceLock::new());
    let kept = Arc::clone(&made);
    let node = Node::start_around(config, move |tier, clock| {
        let faulty = Arc::new(FaultyTier::new(tier, Arc::clone(clock)));
        kept.set(Arc::clone(&faulty)).expect("one tier");
        faulty as Arc<dyn Tier>
    });
    let node = node.await.expect("it starts");
    let nvme = Arc::clone(made.get().expect("it has a disk"));
    (node, nvme)
}

/// A page of a node's console, its HTTP head included.
///
/// # Panics
/// When the node has no console, or it does not answer.
pub async fn page(node: &Node, path: &str) -> String {
    let address = node.http_addr().expect("a console");
    let mut socket = TcpStream::connect(address).await.expect("a console");
    let asked = format!("GET {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n");
    socket
        .write_all(asked.as_bytes())
        .await
        .expect("it listens");
    let mut answer = String::new();
    let read = socket.read_to_string(&mut answer).await;
    read.expect("a page of text");
    answer
}

/// Whether what a get answered is these blocks, all of them, byte for byte.
#[must_use]
pub fn are_hits(got: &[(v1::GetOutcome, Bytes)], sent: &[Bytes]) -> bool {
    let is_hit = |(got, sent): (&(v1::GetOutcome, Bytes), &Bytes)| {
        got.0 == v1::GetOutcome::Hit && got.1 == *sent
    };
    got.len() == sent.len() && got.iter().zip(sent).all(is_hit)
}

/// A chain of `blocks` blocks of the tests' namespace; another seed, another chain.
#[must_use]
pub fn chain(key: &NamespaceKey, seed: u32, blocks: u32) -> Chain {
    let tokens: Vec<u32> = (0..blocks * BLOCK_TOKENS)
        .map(|i| seed * 1_000_003 + i)
        .collect();
    Chain::from_root(hash::chain(key, BLOCK_TOKENS, &tokens))
}

/// The header of block `i` of a chain with these bytes.
#[must_use]
pub fn header(namespace: NamespaceId, chain: &Chain, i: usize, bytes: &[u8]) -> BlockHeader {
    let key = BlockKey {
        namespace,
        hash: chain.hashes[i],
        part: Part::default(),
    };
    BlockHeader::describe(key, chain.place(i, RUN_BLOCKS), bytes)
}

/// tonic's generated client and the namespace it works in.
#[derive(Clone)]
pub struct Stock {
    /// The client.
    pub client: BlocksClient<Channel>,
    /// Id of the namespace.
    pub namespace: NamespaceId,
    /// Key of its hashes.
    pub key: NamespaceKey,
}

impl Stock {
    /// Connects to `http://…` or `unix:…` and opens the tests' namespace.
    pub async fn open(endpoint: &str) -> Self {
        let endpoint = Endpoint::from_shared(endpoint.to_owned()).expect("an endpoint");
        let channel = endpoint.connect().await.expect("a connection");
        let mut client = BlocksClient::new(channel).max_decoding_message_size(MESSAGE_BYTES);
        let asked = v1::OpenNamespaceRequest {
            context: None,
            spec: Some((&Namespace::opaque("test", BLOCK_TOKENS, RUN_BLOCKS)).into()),
            ..v1::OpenNamespaceRequest::default()
        };
        let opened = client
            .open_namespace(asked)
            .await
            .expect("a namespace")
            .into_inner();
        Self {
            client,
            namespace: NamespaceId::from_slice(&opened.namespace_id).expect("16 bytes"),
            key: NamespaceKey::from_bytes(opened.namespace_key[..].try_into().expect("32 bytes")),
        }
    }

    /// A chain of `blocks` blocks; another seed, another chain.
    #[must_use]
    pub fn chain(&self, seed: u32, blocks: u32) -> Chain {
        chain(&self.key, seed, blocks)
    }

    /// The header of block `i` of a chain with these bytes.
    #[must_use]
    pub fn header(&self, chain: &Chain, i: usize, bytes: &[u8]) -> BlockHeader {
        header(self.namespace, chain, i, bytes)
    }

    /// The first message of a put.
    #[must_use]
    pub fn start(&self, ack: v1::Ack) -> v1::PutRequest {
        v1::PutRequest {
            start: Some(v1::PutStart {
                namespace_id: Bytes::copy_from_slice(&self.namespace.0),
                ack: ack as i32,
                ..v1::PutStart::default()
            }),
            ..v1::PutRequest::default()
        }
    }

    /// The messages of one block, cut into pieces.
    #[must_use]
    pub fn pieces(
        &self,
        chain: &Chain,
        i: usize,
        bytes: &Bytes,
        piece: usize,
    ) -> Vec<v1::PutRequest> {
        let header = self.header(chain, i, bytes);
        let starts = (0..bytes.len()).step_by(piece);
        starts
            .map(|at| v1::PutRequest {
                start: None,
                header: (at == 0).then(|| (&header).into()),
                data: bytes.slice(at..bytes.len().min(at + piece)),
                ..v1::PutRequest::default()
            })
            .collect()
    }

    /// Puts whole blocks, from the chain's first on.
    ///
    /// # Errors
    /// The status, when the call fails as a whole.
    pub async fn put(
        &mut self,
        chain: &Chain,
        blocks: &[Bytes],
        ack: v1::Ack,
    ) -> Result<Vec<v1::PutResult>, Status> {
        let mut messages = vec![self.start(ack)];
        for (i, bytes) in blocks.iter().enumerate() {
            messages.extend(self.pieces(chain, i, bytes, 1 << 20));
        }
        self.send(messages).await
    }

    /// Puts what these messages say.
    ///
    /// # Errors
    /// The status, when the call fails as a whole.
    pub async fn send(
        &mut self,
        messages: Vec<v1::PutRequest>,
    ) -> Result<Vec<v1::PutResult>, Status> {
        let answer = self.client.put(tokio_stream::iter(messages)).await?;
        Ok(answer.into_inner().results)
    }

    /// Puts blocks of which each must end like this.
    ///
    /// # Panics
    /// When one does not, or the call fails.
    pub async fn put_as(
        &mut self,
        chain: &Chain,
        blocks: &[Bytes],
        ack: v1::Ack,
        outcome: v1::PutOutcome,
    ) {
        let put = self
            .put(chain, blocks, ack)
            .await
            .expect("a put is answered");
        let ended = |result: &v1::PutResult| result.outcome() == outcome;
        assert!(
            put.len() == blocks.len() && put.iter().all(ended),
            "{put:?}"
        );
    }

    /// Looks a chain up; `ttl_ms` `None` is a probe.
    ///
    /// # Errors
    /// The status, when the call fails.
    pub async fn lookup(
        &mut self,
        chain: &Chain,
        ttl_ms: Option<u32>,
    ) -> Result<v1::LookupResponse, Status> {
        let asked = v1::LookupRequest {
            namespace_id: Bytes::copy_from_slice(&self.namespace.0),
            chain: Some(convert::chain_to_wire(chain)),
            probe: ttl_ms.is_none(),
            lease_ttl_ms: ttl_ms.unwrap_or(0),
            ..v1::LookupRequest::default()
        };
        Ok(self.client.lookup(asked).await?.into_inner())
    }

    /// How many blocks of a chain are present, from its first on.
    ///
    /// # Panics
    /// When the call fails.
    pub async fn present(&mut self, chain: &Chain) -> u32 {
        let found = self.lookup(chain, None).await.expect("a probe is answered");
        found.present_blocks
    }

    /// Leases what is present of a chain for a minute.
    ///
    /// # Panics
    /// When the call fails, or nothing is present.
    pub async fn lease(&mut self, chain: &Chain) -> v1::Lease {
        let found = self.lookup(chain, Some(60_000)).await;
        let lease = found.expect("a lookup is answered").lease;
        lease.expect("a lease on what is present")
    }

    /// Prolongs a lease.
    ///
    /// # Panics
    /// When the call fails.
    pub async fn renew(&mut self, lease_id: u64, ttl_ms: u32) -> v1::RenewResponse {
        let asked = v1::RenewRequest {
            context: None,
            lease_id,
            ttl_ms,
        };
        let renewed = self.client.renew(asked).await;
        renewed.expect("a renewal is answered").into_inner()
    }

    /// Gives a lease back; whether there was one.
    ///
    /// # Panics
    /// When the call fails.
    pub async fn release(&mut self, lease_id: u64) -> bool {
        let asked = v1::ReleaseRequest {
            context: None,
            lease_id,
        };
        let released = self.client.release(asked).await;
        released
            .expect("a release is answered")
            .into_inner()
            .released
    }

    /// Gets a chain: per block its outcome and, for a hit, its bytes, verified against the header.
    ///
    /// # Errors
    /// The status that the stream ended with.
    pub async fn get(
        &mut self,
        chain: &Chain,
        lease_id: u64,
        piece_bytes: u32,
    ) -> Result<Vec<(v1::GetOutcome, Bytes)>, Status> {
        let asked = v1::GetRequest {
            namespace_id: Bytes::copy_from_slice(&self.namespace.0),
            chain: Some(convert::chain_to_wire(chain)),
            lease_id,
            piece_bytes,
            ..v1::GetRequest::default()
        };
        let mut stream = self.client.get(asked).await?.into_inner();
        let mut blocks: Vec<(v1::GetOutcome, Vec<u8>)> = Vec::new();
        let mut headers = Vec::new();
        while let Some(piece) = stream.message().await? {
            if piece.offset == 0 {
                assert_eq!(piece.block as usize, blocks.len(), "blocks come in order");
                blocks.push((piece.outcome(), Vec::new()));
                headers.push(piece.header.clone());
            }
            let (_, bytes) = &mut blocks[piece.block as usize];
            assert_eq!(
                piece.offset as usize,
                bytes.len(),
                "pieces come without gaps"
            );
            bytes.extend_from_slice(&piece.data);
        }
        for (i, (header, (_, bytes))) in headers.iter().zip(&blocks).enumerate() {
            let Some(header) = header else { continue };
            let rules = convert::HeaderRules {
                namespace: self.namespace,
                run_blocks: RUN_BLOCKS,
                max_block_bytes: 64 << 20,
            };
            let header = convert::header(header, rules).expect("a header by the rules");
            header.verify(bytes).expect("bytes that match their header");
            assert_eq!(
                header.key.hash, chain.hashes[i],
                "the block that was asked for"
            );
        }
        Ok(blocks
            .into_iter()
            .map(|(outcome, bytes)| (outcome, bytes.into()))
            .collect())
    }

    /// Forgets something.
    ///
    /// # Errors
    /// The status, when the call fails.
    pub async fn invalidate(
        &mut self,
        target: v1::invalidate_request::Target,
    ) -> Result<u64, Status> {
        let asked = v1::InvalidateRequest {
            context: None,
            namespace_id: Bytes::copy_from_slice(&self.namespace.0),
            target: Some(target),
        };
        Ok(self.client.invalidate(asked).await?.into_inner().blocks)
    }

    /// The namespaces of a label, or all.
    ///
    /// # Errors
    /// The status, when the call fails.
    pub async fn namespaces(
        &mut self,
        label: &str,
        page_token: &[u8],
    ) -> Result<v1::ListNamespacesResponse, Status> {
        let asked = v1::ListNamespacesRequest {
            context: None,
            label: label.to_owned(),
            page_token: Bytes::copy_from_slice(page_token),
            names_only: false,
        };
        Ok(self.client.list_namespaces(asked).await?.into_inner())
    }

    /// What the node says of itself.
    ///
    /// # Errors
    /// The status, when the call fails.
    pub async fn stats(&mut self) -> Result<v1::StatsResponse, Status> {
        Ok(self
            .client
            .stats(v1::StatsRequest::default())
            .await?
            .into_inner())
    }
}

/// Bytes that differ from block to block and from page to page.
#[must_use]
pub fn filled(seed: u32, len: usize) -> Bytes {
    let mut state = u64::from(seed) ^ 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes.into()
}
