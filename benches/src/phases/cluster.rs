//! Many nodes against one: what spreading a chain over owners costs, and what it brings.
//!
//! ```text
//!   cluster-1   one node                     the same client, the same blocks, the same process
//!   cluster-3   three nodes, known to each other
//!   cluster-8   eight
//! ```
//!
//! The nodes run in this process, each with its own runtimes and its own memory: a second machine would bring bandwidth that
//! is not the client's merit, and what is asked here is what routing takes. CPU is that of all nodes and of the client
//! together. Runs have 16 blocks, so that a chain of 512 has blocks at each of eight owners.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use kvclient::{Ack, Client, ClientBuilder, LocalPath, Namespace, NamespaceHandle};
use kvproto::Member;
use kvserver::Node;
use kvserver::config::{Capacity, Config, LogFormat};

use super::{Found, Options};
use crate::peers::network::Network;
use crate::peers::terrace::{Caller, Target};
use crate::peers::{CHAIN_KEYS, CHAINS, LOOKUP_BYTES, node, values_of};
use crate::rounds::{self, Cell, Group, Op, Peer, Transport};

const MIB: u64 = 1 << 20;
/// Blocks of a run.
const RUN_BLOCKS: u32 = 16;
/// The peers and their nodes; the first one is what the others are compared with.
const PEERS: [(&str, usize); 3] = [("cluster-1", 1), ("cluster-3", 3), ("cluster-8", 8)];

/// The cell that a bar or a group speaks of.
pub fn cell(peer: &'static str, op: Op, concurrency: usize) -> Cell {
    let is_lookup = matches!(op, Op::Exists | Op::LookupLease);
    Cell {
        peer,
        op,
        transport: Transport::Tcp,
        bytes: if is_lookup { LOOKUP_BYTES } else { MIB },
        concurrency,
        keys: if is_lookup { CHAIN_KEYS } else { 1 },
    }
}

/// Nodes of one cluster, and a client of it.
struct Cluster {
    nodes: Vec<Node>,
    client: Client,
    namespace: NamespaceHandle,
}

impl Cluster {
    async fn start(dir: &Path, count: usize, ram_bytes: u64) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let secret_file = dir.join("secret");
        std::fs::write(&secret_file, [7; 32])?;
        let mut nodes = Vec::new();
        for number in 0..count {
            let config = Config {
                data_dir: dir.join(format!("n{number}")),
                listen: "127.0.0.1:0".parse().context("an address")?,
                http_listen: None,
                // What one owner has by chance above its share, each must hold.
                ram_bytes: Capacity::Bytes(ram_bytes * 2 / count as u64 + 64 * MIB),
                nvme_bytes: Capacity::Bytes(0),
                durable_bytes: Capacity::Bytes(0),
                huge_pages: false,
                prefault: false,
                worker_threads: 1,
                log_format: LogFormat::Off,
                node_id: format!("n{number}"),
                weight: 1,
                secret_file: secret_file.clone(),
                ..Config::default()
            };
            nodes.push(Node::start(config).await.context("starting a node")?);
        }
        let members: Vec<Member> = nodes
            .iter()
            .filter_map(|node| {
                let cluster = node.blocks().cluster();
                cluster.roster().view.get(cluster.me()).cloned()
            })
            .collect();
        for node in &nodes {
            node.blocks().cluster().merge(members.iter().cloned());
        }
        let client = ClientBuilder::new(&nodes[0].endpoint())
            .local(LocalPath::Off)
            .connect()
            .await?;
        let spec = Namespace::opaque("bench-cluster", 16, RUN_BLOCKS);
        let namespace = client.open_namespace(&spec, false).await?;
        Ok(Self {
            nodes,
            client,
            namespace,
        })
    }

    async fn fill(&self, working_set_bytes: u64) -> Result<()> {
        let (client, namespace) = (&self.client, &self.namespace);
        let values = 0..values_of(working_set_bytes, MIB);
        node::fill(client, namespace, MIB, values, Ack::Cached).await?;
        node::fill_lookup(client, namespace).await
    }
}

/// Runs the phase.
///
/// # Errors
/// A node cannot be started or filled.
pub async fn run(options: &Options) -> Result<Found> {
    let groups = [
        (Op::Exists, 1, vec![0, 1, 2]),
        (Op::LookupLease, 1, vec![0, 1, 2]),
        (Op::Get, 1, vec![0, 1]),
        (Op::Get, 8, vec![0, 1]),
        (Op::Put, 8, vec![0, 1]),
    ];
    let groups = groups.map(|(op, concurrency, peers)| Group {
        cells: peers
            .into_iter()
            .map(|peer| (peer, cell(PEERS[peer].0, op, concurrency)))
            .filter(|(_, cell)| options.wants(&super::label(cell)))
            .collect(),
        base: 0,
    });
    let groups: Vec<Group> = groups.into_iter().filter(|g| !g.cells.is_empty()).collect();
    if groups.is_empty() {
        return Ok(Found::default());
    }
    let spinner = options.spinner("cluster");
    let set = options.working_set_bytes;
    let lookups = u64::from(CHAINS * CHAIN_KEYS) * LOOKUP_BYTES;
    let (mut peers, mut clusters): (Vec<Box<dyn Peer>>, Vec<Cluster>) = (Vec::new(), Vec::new());
    for (name, count) in PEERS {
        spinner.set_message(format!("starting and filling {name}"));
        let ram_bytes = set.max(64 * MIB) + lookups;
        let cluster = Cluster::start(&options.dir.join(name), count, ram_bytes).await?;
        cluster.fill(set).await?;
        // Puts evict: they go to nodes of their own, which are small and full.
        let writer = options.dir.join(format!("{name}-put"));
        let writer = Cluster::start(&writer, count, 64 * MIB).await?;
        let write = (writer.client.clone(), writer.namespace.clone());
        let target = Target::new(
            cluster.client.clone(),
            cluster.namespace.clone(),
            HashMap::from([(MIB, write)]),
            &[MIB],
            set,
        );
        peers.push(Box::new(Network::<Caller>::new(target, set, Vec::new())));
        clusters.extend([cluster, writer]);
    }
    spinner.finish_and_clear();
    let progress = options.bar("cluster", &groups);
    let measured = rounds::run(
        &mut peers,
        &groups,
        options.rounds,
        options.window,
        &progress,
    )
    .await;
    progress.finish_and_clear();
    drop(peers);
    for cluster in clusters {
        drop(cluster.client);
        for node in cluster.nodes {
            node.shutdown(std::time::Duration::from_secs(5)).await;
        }
    }
    Ok(Found {
        measured,
        notes: vec![
            "cluster-N: N nodes in this process, one worker thread each; CPU is theirs and the client's".into(),
        ],
        ..Found::default()
    })
}
