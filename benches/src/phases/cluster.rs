//! Many nodes against one: what spreading a chain over owners costs, and what it brings.
//!
//! ```text
//!   cluster-1   one node                     the same client, the same blocks, the same machine
//!   cluster-3   three nodes, known to each other
//!   cluster-8   eight
//! ```
//!
//! Each node is a process of its own with one worker thread and its share of the memory, all on this machine: other
//! machines would bring cores and bandwidth that are not the client's merit, and what is asked here is what routing
//! takes. CPU is that of all nodes and of the client together. Runs have 16 blocks, so that a chain of 512 has blocks at
//! each of eight owners. What as many processes cost with nothing of ours in them is measured beside it (`floor`).

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use kvclient::{Ack, Client, ClientBuilder, LocalPath, Namespace, NamespaceHandle};
use kvproto::v1::{self, cluster_client::ClusterClient};

use super::{Found, Options, floor};
use crate::peers::network::Network;
use crate::peers::terrace::{Caller, Target};
use crate::peers::{CHAIN_KEYS, CHAINS, LOOKUP_BYTES, node, values_of};
use crate::rounds::{Cell, Group, Op, Peer, Transport};

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
    nodes: Vec<node::Node>,
    client: Client,
    namespace: NamespaceHandle,
}

impl Cluster {
    async fn start(options: &Options, dir: &Path, count: usize, ram_bytes: u64) -> Result<Self> {
        let mut nodes: Vec<node::Node> = Vec::new();
        for number in 0..count {
            // What one owner has by chance above its share, each must hold.
            let ram_bytes = ram_bytes * 2 / count as u64 + 64 * MIB;
            let mut settings = vec![
                ("ram_bytes", ram_bytes.to_string()),
                ("nvme_bytes", "0".to_owned()),
                ("huge_pages", "false".to_owned()),
                ("prefault", "false".to_owned()),
                ("worker_threads", "1".to_owned()),
                ("node_id", format!("n{number}")),
                ("weight", "1".to_owned()),
                ("join_ramp", "0s".to_owned()),
            ];
            settings.extend(nodes.first().map(|first| ("join", first.tcp().to_owned())));
            let dir = dir.join(format!("n{number}"));
            nodes.push(node::Node::start(options.cores, &dir, &settings).await?);
        }
        for node in &nodes {
            acquainted(node, count).await?;
        }
        let client = ClientBuilder::new(&format!("http://{}", nodes[0].tcp()))
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

    fn pids(&self) -> impl Iterator<Item = u32> {
        self.nodes.iter().map(node::Node::pid)
    }

    async fn fill(&self, working_set_bytes: u64) -> Result<()> {
        let (client, namespace) = (&self.client, &self.namespace);
        let values = 0..values_of(working_set_bytes, MIB);
        node::fill(client, namespace, MIB, values, Ack::Cached).await?;
        node::fill_lookup(client, namespace).await
    }
}

/// Waits until a node knows so many members that take runs.
async fn acquainted(node: &node::Node, count: usize) -> Result<()> {
    let mut service = ClusterClient::connect(format!("http://{}", node.tcp())).await?;
    for _ in 0..VIEW_POLLS {
        let view = service.view(v1::ViewRequest::default()).await?.into_inner();
        let members = view.members.iter().filter_map(|seen| seen.member.as_ref());
        let active = members.filter(|member| member.state() == v1::MemberState::Active);
        if active.count() == count {
            return Ok(());
        }
        crate::clock::pause(VIEW_POLL).await;
    }
    bail!(
        "{} does not know {count} members after half a minute",
        node.tcp()
    )
}

const VIEW_POLL: Duration = Duration::from_millis(50);
const VIEW_POLLS: u32 = 600;

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
    let groups = groups.map(|(op, concurrency, peers)| {
        let ours = peers
            .into_iter()
            .map(|peer| (peer, cell(PEERS[peer].0, op, concurrency)))
            .filter(|(_, cell)| options.wants(&super::label(cell)));
        Group {
            cells: ours.collect(),
            base: 0,
        }
    });
    let mut groups: Vec<Group> = groups.into_iter().filter(|g| !g.cells.is_empty()).collect();
    if groups.is_empty() {
        return Ok(Found::default());
    }
    let spinner = options.spinner("cluster");
    let set = options.working_set_bytes;
    let lookups = u64::from(CHAINS * CHAIN_KEYS) * LOOKUP_BYTES;
    let (mut peers, mut clusters): (Vec<Box<dyn Peer>>, Vec<Cluster>) = (Vec::new(), Vec::new());
    for (at, (name, count)) in PEERS.into_iter().enumerate() {
        let is_asked = |op: Op| {
            let mut cells = groups.iter().flat_map(|group| &group.cells);
            cells.any(|(peer, cell)| *peer == at && cell.op == op)
        };
        spinner.set_message(format!("starting and filling {name}"));
        let ram_bytes = set.max(64 * MIB) + lookups;
        let cluster = Cluster::start(options, &options.dir.join(name), count, ram_bytes).await?;
        cluster.fill(set).await?;
        let (mut pids, mut write) = (cluster.pids().collect::<Vec<_>>(), HashMap::new());
        let (client, namespace) = (cluster.client.clone(), cluster.namespace.clone());
        clusters.push(cluster);
        // Puts evict: they go to nodes of their own, which are small and full.
        if is_asked(Op::Put) {
            let dir = options.dir.join(format!("{name}-put"));
            let writer = Cluster::start(options, &dir, count, 64 * MIB).await?;
            write.insert(MIB, (writer.client.clone(), writer.namespace.clone()));
            pids.extend(writer.pids());
            clusters.push(writer);
        }
        let target = Target::new(client, namespace, write, &[MIB], set);
        peers.push(Box::new(Network::<Caller>::new(target, set, pids)));
    }
    let floors = beside(options, &mut groups, &mut peers).await;
    spinner.finish_and_clear();
    let measured = options.measure("cluster", &mut peers, &groups).await;
    drop(peers);
    drop(clusters);
    let mut found = Found {
        measured,
        notes: vec![
            "cluster-N: N nodes on this machine, a process and one worker thread each; CPU is theirs and the client's".into(),
        ],
        skipped: floors.skipped,
        ..Found::default()
    };
    found.notes.extend(floor::notes(&found));
    Ok(found)
}

/// Puts each group's floors behind its own cells, and starts their servers.
async fn beside(
    options: &Options,
    groups: &mut [Group],
    peers: &mut Vec<Box<dyn Peer>>,
) -> floor::Stage {
    let of_group = |group: &Group| -> Vec<Cell> {
        let cell = &group.cells[0].1;
        floor::cells(cell.op, cell.concurrency).collect()
    };
    let asked: Vec<Cell> = groups.iter().flat_map(of_group).collect();
    let is_asked = |name: &str| asked.iter().any(|cell| cell.peer == name);
    let mut floors = floor::start(options, is_asked).await;
    let mut numbers = HashMap::new();
    for (name, peer) in std::mem::take(&mut floors.peers) {
        numbers.insert(name, peers.len());
        peers.push(peer);
    }
    for group in groups {
        let cells = of_group(group).into_iter();
        let there = cells.filter_map(|cell| Some((*numbers.get(cell.peer)?, cell)));
        group.cells.extend(there);
    }
    floors
}
