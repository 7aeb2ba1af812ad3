//! Nodes that come and go, and what they say of themselves.
//!
//! ```text
//! add ─► NodeProcess (--join the first that runs)      tally ─► /metrics of every node that runs, added up
//! kill ─► SIGKILL                                     agrees ─► whether every node sees exactly those that run
//! ```
//!
//! Errors: a node that cannot be started, or does not answer its console.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use kvexamples::node::{NodeOptions, NodeProcess};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{interval, timeout};

const RAM_BYTES: u64 = 256 << 20;
/// How long a console may take to answer, and a view to become what is waited for.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const SETTLED_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A dead node keeps its place for so long, in case it comes back. The default is longer; nobody wants to watch it.
const GRACE: &str = "2s";
const RAMP: &str = "2s";

/// The nodes that run, by name.
pub(crate) struct Fleet {
    binary: PathBuf,
    folder: TempDir,
    nodes: BTreeMap<String, NodeProcess>,
}

/// Counters that the nodes keep, added up over those that run.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    /// Blocks that a node fetched from another because it owns them now.
    pub(crate) fetched_blocks: u64,
    /// Runs that were handed over to a new owner.
    pub(crate) moved_runs: u64,
    /// Runs that are still to go.
    pub(crate) waiting_runs: u64,
}

impl Fleet {
    /// No node yet.
    pub(crate) fn new(binary: PathBuf) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("terrace-cluster-")
            .tempdir()
            .context("cannot make a folder for the nodes")?;
        Ok(Self {
            binary,
            folder,
            nodes: BTreeMap::new(),
        })
    }

    /// Starts a node of this name, which joins those that run.
    pub(crate) async fn add(&mut self, name: &str) -> anyhow::Result<u32> {
        let listen = free_port().context("no free port")?;
        let mut flags = vec![
            format!("--node-id={name}"),
            format!("--suspect-grace={GRACE}"),
            format!("--join-ramp={RAMP}"),
        ];
        if let Some(first) = self.nodes.values().next() {
            flags.push(format!("--join={}", first.options().listen));
        }
        let node = NodeProcess::start(NodeOptions {
            binary: self.binary.clone(),
            data_dir: self.folder.path().join(name),
            socket: self.folder.path().join(format!("{name}.sock")),
            ram_bytes: RAM_BYTES,
            nvme_bytes: 0,
            listen,
            http_listen: free_port().context("no free port")?,
            flags,
        })
        .await?;
        let pid = node.pid();
        self.nodes.insert(name.to_owned(), node);
        Ok(pid)
    }

    /// Kills a node with SIGKILL.
    pub(crate) fn kill(&mut self, name: &str) -> anyhow::Result<u32> {
        let node = self.nodes.remove(name).context("no such node")?;
        let pid = node.pid();
        node.kill()?;
        Ok(pid)
    }

    /// How many run.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Where a client reaches all of them.
    pub(crate) fn endpoints(&self) -> String {
        let addresses = self
            .nodes
            .values()
            .map(|node| node.options().listen.to_string());
        addresses.collect::<Vec<_>>().join(",")
    }

    /// Waits until every node that runs counts exactly them as members, all of them well and none still joining.
    pub(crate) async fn settled(&self) -> anyhow::Result<()> {
        let all_agree = async {
            let mut look = interval(LOOK_EVERY);
            loop {
                look.tick().await;
                if self.agrees().await? {
                    return Ok(());
                }
            }
        };
        match timeout(SETTLED_WITHIN, all_agree).await {
            Ok(outcome) => outcome,
            Err(_) => bail!("the nodes do not agree on who is here after {SETTLED_WITHIN:?}"),
        }
    }

    /// Whether every node that runs sees exactly them.
    pub(crate) async fn agrees(&self) -> anyhow::Result<bool> {
        for node in self.nodes.values() {
            let metrics = Metrics::read(node.options().http_listen).await?;
            let active = metrics.sum("terrace_cluster_members{state=\"active\"}");
            let others = metrics.sum("terrace_cluster_members{state=\"joining\"}")
                + metrics.sum("terrace_cluster_members{state=\"draining\"}")
                + metrics.sum("terrace_cluster_suspects");
            if active != self.nodes.len() as u64 || others != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the nodes have counted, those that run.
    pub(crate) async fn tally(&self) -> anyhow::Result<Tally> {
        let mut tally = Tally::default();
        for node in self.nodes.values() {
            let metrics = Metrics::read(node.options().http_listen).await?;
            tally.fetched_blocks +=
                metrics.sum("terrace_motion_fetched_blocks_total{result=\"kept\"}");
            tally.moved_runs += metrics.sum("terrace_motion_moved_runs_total");
            tally.waiting_runs += metrics.sum("terrace_motion_waiting_runs");
        }
        Ok(tally)
    }
}

/// A page of metrics.
struct Metrics(String);

impl Metrics {
    async fn read(console: SocketAddr) -> anyhow::Result<Self> {
        let asking = async {
            let mut socket = TcpStream::connect(console).await?;
            socket
                .write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
                .await?;
            let mut page = String::new();
            socket.read_to_string(&mut page).await?;
            std::io::Result::Ok(page)
        };
        let page = timeout(ANSWER_WITHIN, asking)
            .await
            .context("a node's console does not answer")?
            .context("cannot read a node's metrics")?;
        Ok(Self(page))
    }

    /// Sum of the samples whose name, with labels, begins like this.
    fn sum(&self, name: &str) -> u64 {
        let samples = self.0.lines().filter(|line| line.starts_with(name));
        let values = samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        values.sum::<f64>() as u64
    }
}

/// A port that is free for TCP and for UDP at this moment.
fn free_port() -> std::io::Result<SocketAddr> {
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = tcp.local_addr()?;
    UdpSocket::bind(address)?;
    Ok(address)
}
