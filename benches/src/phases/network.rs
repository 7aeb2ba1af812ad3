//! Gets, puts and lookups against every peer.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use kvclient::Ack;

use super::{Found, Options};
use crate::peers::memcached::Meta;
use crate::peers::memory::Memcpy;
use crate::peers::network::Network;
use crate::peers::node::{self, Node};
use crate::peers::redis::Resp;
use crate::peers::socket::{Address, Socket, Threads};
use crate::peers::tcp::Framed;
use crate::peers::terrace::{Caller, Target};
use crate::peers::tonic_stock::Stock;
use crate::peers::{LOOKUP_BYTES, SIZES, memcached, redis};
use crate::rounds::{Cell, Group, Op, Peer, Transport};
use crate::spawn::{Server, free_port};

const MIB: u64 = 1 << 20;
/// RAM of a node that only takes puts, as a multiple of the largest value.
const PUT_NODE_VALUES: u64 = 64;

/// Peers by name and transport, and the servers behind them.
#[derive(Default)]
struct Stage {
    peers: Vec<Box<dyn Peer>>,
    at: HashMap<(&'static str, Transport), usize>,
    servers: Vec<Server>,
    nodes: Vec<Node>,
    skipped: Vec<String>,
}

impl Stage {
    fn add(&mut self, name: &'static str, transport: Transport, peer: impl Peer + 'static) {
        self.at.insert((name, transport), self.peers.len());
        self.peers.push(Box::new(peer));
    }

    /// The number of the peer that runs `cell`, if it is there.
    fn of(&self, cell: &Cell) -> Option<usize> {
        let transport = if cell.peer == "memcpy" {
            Transport::InProcess
        } else {
            cell.transport
        };
        self.at.get(&(cell.peer, transport)).copied()
    }

    fn note<T>(&mut self, peer: &str, result: Result<T>) -> Option<T> {
        result
            .map_err(|error| self.skipped.push(format!("{peer}: {error:#}")))
            .ok()
    }
}

/// Every cell of the phase.
fn cells() -> Vec<Vec<Cell>> {
    let mut groups = Vec::new();
    for transport in [Transport::Tcp, Transport::Unix] {
        for op in [Op::Get, Op::Put] {
            // All sizes over TCP; over a Unix socket one tells the difference.
            for bytes in SIZES
                .into_iter()
                .filter(|b| transport == Transport::Tcp || *b == MIB)
            {
                for concurrency in [1, 8] {
                    let wanted = |peer: &&str| match *peer {
                        "redis-threads" | "tonic-tuned" => {
                            transport == Transport::Tcp && bytes == MIB
                        }
                        "tonic" => bytes == MIB,
                        "memcpy" => transport == Transport::Tcp && op == Op::Get,
                        _ => true,
                    };
                    let peers = PEERS.into_iter().filter(wanted);
                    groups.push(
                        peers
                            .map(|peer| Cell {
                                peer,
                                op,
                                transport,
                                bytes,
                                concurrency,
                                keys: 1,
                            })
                            .collect(),
                    );
                }
            }
        }
    }
    for (keys, concurrency) in [(128, 1), (128, 8), (512, 1)] {
        let exists = |peer, op| Cell {
            peer,
            op,
            transport: Transport::Tcp,
            bytes: LOOKUP_BYTES,
            concurrency,
            keys,
        };
        let terrace = [Op::Exists, Op::LookupLease].map(|op| exists("terrace", op));
        groups.push(
            [exists("redis", Op::Exists), exists("memcached", Op::Exists)]
                .into_iter()
                .chain(terrace)
                .collect(),
        );
    }
    groups
}

/// In the order of the report; the first one of a group that is there is what ratios refer to.
const PEERS: [&str; 8] = [
    "redis",
    "redis-threads",
    "memcached",
    "plain",
    "tonic",
    "tonic-tuned",
    "terrace",
    "memcpy",
];

/// Runs the phase. A peer that cannot be started is skipped, and said so.
///
/// # Errors
/// No memory for the source of memcpy.
pub async fn run(options: &Options) -> Result<Found> {
    let mut cells = cells();
    for group in &mut cells {
        group.retain(|cell| options.wants(&super::label(cell)));
    }
    let spinner = options.spinner("network");
    let mut stage = Stage::default();
    for peer in PEERS {
        // A peer's threads use the server of the peer.
        let wanted = |c: &Cell| c.peer == peer || (peer == "redis" && c.peer == "redis-threads");
        if cells.iter().flatten().any(wanted) {
            spinner.set_message(format!("starting and filling {peer}"));
            let started = match peer {
                "terrace" => start_terrace(&mut stage, options).await,
                "memcpy" => Memcpy::new(options.working_set_bytes)
                    .map(|m| stage.add(peer, Transport::InProcess, m)),
                "redis-threads" => Ok(()),
                _ => start_peer(&mut stage, options, peer).await,
            };
            stage.note(peer, started);
        }
    }
    let there = |group: Vec<Cell>| {
        group
            .into_iter()
            .filter_map(|cell| Some((stage.of(&cell)?, cell)))
            .collect()
    };
    let groups = cells.into_iter().map(|group| Group {
        cells: there(group),
        base: 0,
    });
    let groups: Vec<_> = groups.filter(|g| !g.cells.is_empty()).collect();
    spinner.finish_and_clear();
    let measured = options.measure("network", &mut stage.peers, &groups).await;
    Ok(Found {
        measured,
        skipped: stage.skipped,
        ..Found::default()
    })
}

/// Sizes that a peer is filled with.
const FILLED: [u64; 5] = [SIZES[0], SIZES[1], SIZES[2], SIZES[3], LOOKUP_BYTES];

async fn start_peer(stage: &mut Stage, options: &Options, peer: &'static str) -> Result<()> {
    let (dir, cores, set) = (
        options.dir.join(peer),
        options.cores,
        options.working_set_bytes,
    );
    std::fs::create_dir_all(&dir)?;
    match peer {
        "redis" => {
            let (mut server, tcp, unix) = redis::start(cores, &dir)?;
            let (tcp, unix) = (Address::Tcp(tcp), Address::Unix(unix));
            listening(&mut server, &unix, &dir.join("redis.log")).await?;
            let pids = vec![server.pid()];
            stage.servers.push(server);
            let mut network = Network::<Socket<Resp>>::new(tcp.clone(), set, pids.clone());
            network.fill(peer, Transport::Tcp, &FILLED).await?;
            stage.add(peer, Transport::Tcp, network);
            stage.add(
                peer,
                Transport::Unix,
                Network::<Socket<Resp>>::new(unix, set, pids.clone()),
            );
            stage.add(
                "redis-threads",
                Transport::Tcp,
                Threads::<Resp>::new(tcp, set, pids),
            );
        }
        "memcached" => {
            let memory_mib = set * SIZES.len() as u64 * 2 / MIB + 512; // chunked items waste up to a half
            let ([mut server, mut local], tcp, unix) = memcached::start(cores, &dir, memory_mib)?;
            for (transport, server, address, log) in [
                (
                    Transport::Tcp,
                    &mut server,
                    Address::Tcp(tcp),
                    "memcached.log",
                ),
                (
                    Transport::Unix,
                    &mut local,
                    Address::Unix(unix),
                    "memcached-unix.log",
                ),
            ] {
                listening(server, &address, &dir.join(log)).await?;
                let mut network = Network::<Socket<Meta>>::new(address, set, vec![server.pid()]);
                let sizes = if transport == Transport::Tcp {
                    &FILLED[..]
                } else {
                    &[MIB]
                };
                network.fill(peer, transport, sizes).await?;
                stage.add(peer, transport, network);
            }
            stage.servers.extend([server, local]);
        }
        _ => {
            let (mut server, tcp, unix) = serve(options, peer, &dir, 0)?;
            let (tcp, unix) = (Address::Tcp(tcp), Address::Unix(unix));
            listening(&mut server, &unix, &dir.join("log")).await?;
            let pids = vec![server.pid()];
            stage.servers.push(server);
            if peer == "plain" {
                let mut network = Network::<Socket<Framed>>::new(tcp, set, pids.clone());
                network.fill(peer, Transport::Tcp, &SIZES).await?;
                stage.add(peer, Transport::Tcp, network);
                stage.add(
                    peer,
                    Transport::Unix,
                    Network::<Socket<Framed>>::new(unix, set, pids),
                );
            } else {
                let tuned = peer == "tonic-tuned";
                let mut network = Network::<Stock>::new((tcp, tuned), set, pids.clone());
                network.fill(peer, Transport::Tcp, &[MIB]).await?;
                stage.add(peer, Transport::Tcp, network);
                stage.add(
                    peer,
                    Transport::Unix,
                    Network::<Stock>::new((unix, tuned), set, pids),
                );
            }
        }
    }
    Ok(())
}

/// Starts one of this program's own servers, with so many threads (0: one per core).
pub(super) fn serve(
    options: &Options,
    what: &str,
    dir: &Path,
    threads: usize,
) -> Result<(Server, String, std::path::PathBuf)> {
    let (tcp, unix) = (format!("127.0.0.1:{}", free_port()?), dir.join("socket"));
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["serve", what, "--tcp", &tcp, "--unix"])
        .arg(&unix)
        .args(["--threads", &threads.to_string()]);
    Ok((
        options.cores.start(&mut command, &dir.join("log"))?,
        tcp,
        unix,
    ))
}

/// Waits until a server takes connections.
pub(super) async fn listening(server: &mut Server, address: &Address, log: &Path) -> Result<()> {
    let answers = async || match address {
        Address::Tcp(address) => tokio::net::TcpStream::connect(address).await.is_ok(),
        Address::Unix(path) => tokio::net::UnixStream::connect(path).await.is_ok(),
    };
    server.ready(answers, log).await
}

async fn start_terrace(stage: &mut Stage, options: &Options) -> Result<()> {
    let set = options.working_set_bytes;
    let lookups = u64::from(crate::peers::CHAINS * crate::peers::CHAIN_KEYS) * LOOKUP_BYTES;
    let ram = |bytes: u64| {
        [
            ("ram_bytes", format!("{}MiB", bytes / MIB)),
            ("nvme_bytes", "0".to_owned()),
        ]
    };
    // A fifth more than is stored: nothing may be evicted between the fill and the last round.
    let held = (set.max(8 * SIZES[3]) * SIZES.len() as u64 + lookups) * 6 / 5;
    let node = Node::start(options.cores, &options.dir.join("terrace"), &ram(held)).await?;
    let mut pids = vec![node.pid()];
    let client = node.client(false, options.connections).await?;
    let namespace = node::namespace(&client).await?;
    for bytes in SIZES {
        node::fill(
            &client,
            &namespace,
            bytes,
            0..crate::peers::values_of(set, bytes),
            Ack::Cached,
        )
        .await?;
    }
    node::fill_lookup(&client, &namespace).await?;

    let (mut tcp, mut unix) = (HashMap::new(), HashMap::new());
    let mut writers = Vec::new();
    for bytes in SIZES {
        let dir = options.dir.join(format!("terrace-put-{bytes}"));
        // Blocks of one size and of at least 4 MiB in all in flight; full after the fill, so that every put evicts.
        let room = (PUT_NODE_VALUES * bytes).max(64 * MIB);
        let writer = Node::start(options.cores, &dir, &ram(room)).await?;
        pids.push(writer.pid());
        for (map, local) in [(&mut tcp, false), (&mut unix, true)] {
            let client = writer.client(local, options.connections).await?;
            let namespace = node::namespace(&client).await?;
            if !local {
                node::fill(&client, &namespace, bytes, 0..room / bytes, Ack::Cached).await?;
            }
            map.insert(bytes, (client, namespace));
        }
        writers.push(writer);
    }
    let local = node.client(true, options.connections).await?;
    stage.add(
        "terrace",
        Transport::Tcp,
        Network::<Caller>::new(
            Target::new(client, namespace.clone(), tcp, &SIZES, set),
            set,
            pids.clone(),
        ),
    );
    stage.add(
        "terrace",
        Transport::Unix,
        Network::<Caller>::new(Target::new(local, namespace, unix, &SIZES, set), set, pids),
    );
    stage.nodes.push(node);
    stage.nodes.extend(writers);
    Ok(())
}
