//! A `kvserver` of its own, and what is put into it before anything is measured.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use kvclient::{
    Ack, Chain, Client, ClientBuilder, LocalPath, Namespace, NamespaceHandle, PutBlock, PutOptions,
    PutOutcome, SequenceHash, blocking,
};
use tokio::task::JoinSet;

use super::wire::{key, payload};
use super::{CHAIN_KEYS, CHAINS, LOOKUP_BYTES};
use crate::spawn::{Cores, Server, free_port};

/// Blocks of one run of the bench's namespace.
pub const RUN_BLOCKS: u32 = 64;
/// Of every call.
const DEADLINE: Duration = Duration::from_secs(30);
/// Blocks per call when a node is filled.
const FILL_BATCH: usize = 16;

/// A running node.
pub struct Node {
    server: Server,
    tcp: String,
    unix: PathBuf,
}

impl Node {
    /// Starts a node in `dir` with these settings (names of `kvserver --print-config`) and waits until it answers.
    ///
    /// # Errors
    /// The program is missing, refuses its settings, or does not answer.
    pub async fn start(cores: Cores, dir: &Path, settings: &[(&str, String)]) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let (tcp, unix) = (
            format!("127.0.0.1:{}", free_port()?),
            dir.join("terrace.sock"),
        );
        let mut command = Command::new(program()?);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TERRACE_") {
                command.env_remove(name); // what the caller set for another node is not meant for this one
            }
        }
        let fixed = [
            ("data_dir", dir.display().to_string()),
            ("listen", tcp.clone()),
            ("unix_socket", unix.display().to_string()),
            ("http_listen", "off".into()),
            ("durable_bytes", "0".into()),
            ("log", "warn".into()),
        ];
        for (name, value) in fixed.iter().chain(settings) {
            command.env(format!("TERRACE_{}", name.to_uppercase()), value);
        }
        let log = dir.join("kvserver.log");
        let mut server = cores.start(&mut command, &log)?;
        let probe = tcp.clone();
        let answers = async || match client(&format!("http://{probe}"), None).await {
            Ok(client) => client.stats().await.is_ok(),
            Err(_) => false,
        };
        server.ready(answers, &log).await?;
        Ok(Self { server, tcp, unix })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// Where it listens, host and port.
    pub fn tcp(&self) -> &str {
        &self.tcp
    }

    /// A client over TCP, or over the node's Unix socket.
    ///
    /// # Errors
    /// The node does not answer.
    pub async fn client(&self, unix: bool, connections: Option<usize>) -> Result<Client> {
        let endpoint = if unix {
            format!("unix:{}", self.unix.display())
        } else {
            format!("http://{}", self.tcp)
        };
        client(&endpoint, connections).await
    }

    /// A client that reaches it through shared memory.
    ///
    /// # Errors
    /// The node does not answer.
    pub async fn attached(&self) -> Result<Client> {
        Ok(self.near().connect().await?)
    }

    /// One for threads that wait.
    ///
    /// # Errors
    /// As [`Node::attached`].
    pub async fn attached_blocking(&self) -> Result<blocking::Client> {
        let builder = self.near();
        Ok(tokio::task::spawn_blocking(move || builder.connect_blocking()).await??)
    }

    fn near(&self) -> ClientBuilder {
        ClientBuilder::new(&format!("http://{}", self.tcp)).deadline(DEADLINE)
    }
}

async fn client(endpoint: &str, connections: Option<usize>) -> Result<Client> {
    // Rows are named by their transport: no shared memory behind their back.
    let builder = ClientBuilder::new(endpoint)
        .deadline(DEADLINE)
        .local(LocalPath::Off);
    let builder = connections
        .into_iter()
        .fold(builder, ClientBuilder::connections);
    Ok(builder.connect().await?)
}

/// The server that was built beside this program.
fn program() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("kvserver"))
        .find(|p| p.is_file());
    beside.with_context(|| {
        format!(
            "kvserver is not beside {}: build it with the same profile (`make bench` does)",
            own.display()
        )
    })
}

/// The namespace of all cells.
///
/// # Errors
/// The node refuses it.
pub async fn namespace(client: &Client) -> Result<NamespaceHandle> {
    Ok(client
        .open_namespace(&Namespace::opaque("bench", 16, RUN_BLOCKS), false)
        .await?)
}

/// The name of value `index` of a size.
pub fn name(namespace: &NamespaceHandle, bytes: u64, index: u64) -> SequenceHash {
    namespace.engine_hash(&key(bytes as usize, index))
}

/// Chain number `nth` of the lookup cells.
pub fn lookup_chain(namespace: &NamespaceHandle, nth: u32) -> Chain {
    let first = u64::from(nth * CHAIN_KEYS);
    Chain::from_root(
        (first..first + u64::from(CHAIN_KEYS))
            .map(|i| name(namespace, LOOKUP_BYTES, i))
            .collect(),
    )
}

/// Puts blocks of `bytes` named by their number, each a chain of its own, until all of `indexes` are there.
///
/// # Errors
/// The node refuses one for good.
pub async fn fill(
    client: &Client,
    namespace: &NamespaceHandle,
    bytes: u64,
    indexes: std::ops::Range<u64>,
    ack: Ack,
) -> Result<()> {
    let value = Bytes::from(payload(bytes as usize, bytes));
    let next = Arc::new(AtomicU64::new(indexes.start));
    let mut writers = JoinSet::new();
    for _ in 0..FILL_WRITERS {
        let (client, namespace, value, next) = (
            client.clone(),
            namespace.clone(),
            value.clone(),
            next.clone(),
        );
        writers.spawn(async move {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= indexes.end {
                    return anyhow::Ok(());
                }
                let chain = Chain::from_root(vec![name(&namespace, bytes, index)]);
                put_kept(
                    &client,
                    &namespace,
                    &chain,
                    &[PutBlock::new(0, value.clone())],
                    ack,
                )
                .await?;
            }
        });
    }
    while let Some(writer) = writers.join_next().await {
        writer??;
    }
    Ok(())
}

/// Writers of a fill: an ack `stored` waits for the disk, and so must not wait alone.
const FILL_WRITERS: usize = 16;

/// Puts until every block is kept; a rejection waits as long as it says.
///
/// # Errors
/// A block is refused a hundred times, or found corrupt.
pub async fn put_kept(
    client: &Client,
    namespace: &NamespaceHandle,
    chain: &Chain,
    blocks: &[PutBlock<'_>],
    ack: Ack,
) -> Result<u64> {
    let options = PutOptions {
        ack,
        ..PutOptions::default()
    };
    let mut left = blocks.to_vec();
    let mut rejected = 0;
    for _ in 0..PUT_TRIES {
        let results = client.put(namespace, chain, &left, options).await?;
        let wait_ms = results.iter().map(|r| r.retry_after_ms).max().unwrap_or(0);
        ensure!(
            results.iter().all(|r| r.outcome != PutOutcome::Corrupt),
            "the node found corrupt what was not"
        );
        let mut kept = results.iter().map(kvclient::PutResult::is_kept);
        left.retain(|_| !kept.next().unwrap_or(false));
        if left.is_empty() {
            return Ok(rejected);
        }
        rejected += left.len() as u64;
        crate::clock::pause(Duration::from_millis(u64::from(wait_ms.clamp(1, 1000)))).await;
    }
    bail!(
        "{} of {} blocks rejected {PUT_TRIES} times",
        left.len(),
        blocks.len()
    )
}

const PUT_TRIES: usize = 1000;

/// Fills the chains of the lookup cells.
///
/// # Errors
/// As [`fill`].
pub async fn fill_lookup(client: &Client, namespace: &NamespaceHandle) -> Result<()> {
    let value = Bytes::from(payload(LOOKUP_BYTES as usize, LOOKUP_BYTES));
    for nth in 0..CHAINS {
        let chain = lookup_chain(namespace, nth);
        for start in (0..CHAIN_KEYS as usize).step_by(FILL_BATCH) {
            let blocks: Vec<_> = (start..start + FILL_BATCH)
                .map(|i| PutBlock::new(i, value.clone()))
                .collect();
            put_kept(client, namespace, &chain, &blocks, Ack::Cached).await?;
        }
    }
    Ok(())
}
