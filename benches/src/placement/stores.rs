//! Hashing beside a store that is asked: who has these 512 keys, and are they there?
//!
//! ```text
//!   terrace       owners of all runs computed among 1000 members, then one Lookup (a probe) at a node over TCP
//!   etcd          one transaction of 512 serializable ranges
//!   redis MGET    one command         redis GET    a pipeline of 512
//! ```
//!
//! One process of each on loopback, one client runtime for all. What is not the same and cannot be: the stores answer a
//! text that somebody has to write, renew and delete with every block that comes and goes, and know nothing of the block
//! itself; the node answers what it really holds. Terrace's peers keep the index in RAM as well; etcd also logs writes to
//! disk, which look-ups do not touch.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use kvproto::RunHash;
use kvproto::placement::Placement;

use super::Members;
use crate::bars::{Bar, Figure};
use crate::peers::etcd::{self, Etcd};
use crate::peers::network::{Connection, Job, Network};
use crate::peers::node::{self, Node, RUN_BLOCKS, lookup_chain};
use crate::peers::redis;
use crate::peers::redis_index::{Mget, Pipelined};
use crate::peers::socket::{Address, Socket};
use crate::peers::terrace::{Caller, Target};
use crate::peers::{CHAIN_KEYS, CHAINS, LOOKUP_BYTES};
use crate::phases::Options;
use crate::rounds::{Cell, Group, Measured, Op, Peer, Transport};
use crate::spawn::Server;

/// Members among which owners are computed before the node is asked.
const MEMBERS: u32 = 1000;
/// Terrace's key look-ups per second over etcd's.
const BAR: f64 = 8.0;

/// What was measured, its bars, and who is missing.
#[derive(Default)]
pub struct Found {
    /// Groups of cells, one for each number of operations in flight.
    pub measured: Vec<Measured>,
    /// Terrace over etcd.
    pub bars: Vec<Bar>,
    /// Peers that could not be started, and why.
    pub skipped: Vec<String>,
}

/// Runs everything that is installed.
pub async fn run(options: &Options) -> Found {
    let mut found = Found::default();
    let mut stage = Stage::default();
    for peer in PEERS {
        let dir = options.dir.join(peer.replace(' ', "-"));
        if let Err(error) = stage.start(peer, &dir, options).await {
            found.skipped.push(format!("{peer}: {error:#}"));
        }
    }
    let cell = |peer, concurrency| Cell {
        peer,
        op: Op::Exists,
        transport: Transport::Tcp,
        bytes: LOOKUP_BYTES,
        concurrency,
        keys: CHAIN_KEYS,
    };
    let groups: Vec<Group> = [1, 8]
        .into_iter()
        .map(|concurrency| {
            let cells = stage.names.iter().enumerate();
            let cells: Vec<_> = cells
                .map(|(at, peer)| (at, cell(*peer, concurrency)))
                .collect();
            let base = stage
                .names
                .iter()
                .position(|name| *name == "etcd")
                .unwrap_or(0);
            Group { cells, base }
        })
        .collect();
    found.measured = options.measure("stores", &mut stage.peers, &groups).await;
    found.bars = bars(&found.measured);
    found
}

/// In the order of the report.
const PEERS: [&str; 4] = ["etcd", "redis MGET", "redis GET", "terrace"];

fn bars(measured: &[Measured]) -> Vec<Bar> {
    let bar = |group: &Measured| {
        let of = |peer| group.series.iter().find(|series| series.cell.peer == peer);
        let (ours, theirs) = (of("terrace")?, of("etcd")?);
        let ratio = Figure::Rate.ratio(ours, theirs);
        let path = format!(
            "lookup of 512 keys, {} in flight, over etcd",
            ours.cell.concurrency
        );
        Some(Bar::at_least(path, BAR, ratio))
    };
    measured.iter().filter_map(bar).collect()
}

#[derive(Default)]
struct Stage {
    names: Vec<&'static str>,
    peers: Vec<Box<dyn Peer>>,
    servers: Vec<Server>,
    nodes: Vec<Node>,
}

impl Stage {
    async fn start(
        &mut self,
        name: &'static str,
        dir: &std::path::Path,
        options: &Options,
    ) -> Result<()> {
        std::fs::create_dir_all(dir)?;
        let peer: Box<dyn Peer> = match name {
            "etcd" => {
                let (mut server, address) = etcd::start(options.cores, dir)?;
                let answers = async || Etcd::connect(&address).await.is_ok();
                server.ready(answers, &dir.join("etcd.log")).await?;
                let mut first = Etcd::connect(&address).await?;
                first.fill().await?;
                let pids = vec![server.pid()];
                self.servers.push(server);
                Box::new(Network::<Etcd>::new(address, 0, pids))
            }
            "terrace" => {
                let settings = [
                    ("ram_bytes", "256MiB".to_owned()),
                    ("nvme_bytes", "0".to_owned()),
                ];
                let node = Node::start(options.cores, dir, &settings).await?;
                let client = node.client(false, options.connections).await?;
                let namespace = node::namespace(&client).await?;
                node::fill_lookup(&client, &namespace).await?;
                let runs = |nth| {
                    lookup_chain(&namespace, nth)
                        .runs(RUN_BLOCKS)
                        .map(|(run, _)| run)
                        .collect()
                };
                let chains = (0..CHAINS).map(runs).collect();
                let target = Routed {
                    placement: Arc::new(Placement::new(&Members::mixed(MEMBERS).view())),
                    runs: Arc::new(chains),
                    target: Target::new(client, namespace, HashMap::new(), &[], 0),
                };
                let pids = vec![node.pid()];
                self.nodes.push(node);
                Box::new(Network::<RoutedCaller>::new(target, 0, pids))
            }
            _ => {
                let (mut server, tcp, _) = redis::start(options.cores, dir)?;
                let answers = async || tokio::net::TcpStream::connect(&tcp).await.is_ok();
                server.ready(answers, &dir.join("redis.log")).await?;
                let (address, pids) = (Address::Tcp(tcp.clone()), vec![server.pid()]);
                self.servers.push(server);
                let filled = &[LOOKUP_BYTES];
                if name == "redis GET" {
                    let mut network = Network::<Socket<Pipelined>>::new(address, 0, pids);
                    network.fill(name, Transport::Tcp, filled).await?;
                    Box::new(network)
                } else {
                    let mut network = Network::<Socket<Mget>>::new(address, 0, pids);
                    network.fill(name, Transport::Tcp, filled).await?;
                    Box::new(network)
                }
            }
        };
        self.names.push(name);
        self.peers.push(peer);
        Ok(())
    }
}

/// What a routed caller needs.
#[derive(Clone)]
struct Routed {
    placement: Arc<Placement>,
    runs: Arc<Vec<Vec<RunHash>>>,
    target: Target,
}

/// Computes owners, then asks a node.
struct RoutedCaller {
    routed: Routed,
    caller: Caller,
}

impl Connection for RoutedCaller {
    type Target = Routed;

    async fn connect(target: &Routed) -> Result<Self> {
        Ok(Self {
            caller: Caller::connect(&target.target).await?,
            routed: target.clone(),
        })
    }

    async fn act(&mut self, job: &Job, index: u64) -> Result<u64> {
        let chain = &self.routed.runs[index as usize / CHAIN_KEYS as usize];
        for run in chain {
            std::hint::black_box(self.routed.placement.first(run).context("no owner")?);
        }
        self.caller.act(job, index).await
    }
}

#[cfg(test)]
mod tests {
    use crate::bars::Verdict;
    use crate::load::Sample;
    use crate::rounds::Series;

    use super::*;

    #[test]
    fn the_bar_is_met_when_the_interval_clears_it() {
        let series = |peer, ops: u64| Series {
            cell: Cell {
                peer,
                op: Op::Exists,
                transport: Transport::Tcp,
                bytes: LOOKUP_BYTES,
                concurrency: 1,
                keys: CHAIN_KEYS,
            },
            samples: vec![
                Some(Sample {
                    ops,
                    wall_s: 1.0,
                    ..Sample::default()
                });
                15
            ],
            failure: None,
        };
        let verdict = |ours| {
            let group = Measured {
                series: vec![series("etcd", 100), series("terrace", ours)],
                base: 0,
            };
            bars(&[group])[0].verdict
        };
        assert_eq!(
            (verdict(900), verdict(700)),
            (Verdict::Met, Verdict::NotMet)
        );
        // Without etcd there is no bar.
        assert!(
            bars(&[Measured {
                series: vec![series("terrace", 1)],
                base: 0
            }])
            .is_empty()
        );
    }
}
