//! The same-host path beside memcpy, a bare request and reply, and Mooncake's daemon with shared memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use kvclient::LookupOptions;

use super::{Found, Options};
use crate::peers::SIZES;
use crate::peers::echo::Echo;
use crate::peers::memory::Memcpy;
use crate::peers::mooncake::{self, Mooncake};
use crate::peers::node::{self, Node};
use crate::peers::same_host::{self, BATCH, SameHost, Side};
use crate::rounds::{Cell, Group, Op, Peer, Transport};
use crate::spawn::{self, Server};

const MIB: u64 = 1 << 20;

/// Blocks, in batches, that a node holds which only takes puts.
const PUT_NODE_BATCHES: u64 = 4;

/// Every cell of the phase.
fn cells() -> Vec<Vec<Cell>> {
    let cell = |peer, op, bytes, concurrency, keys| Cell {
        peer,
        op,
        transport: Transport::Shared,
        bytes,
        concurrency,
        keys,
    };
    let mut groups = Vec::new();
    for bytes in SIZES {
        groups.push(vec![
            cell("memcpy", Op::Get, bytes, 1, 1),
            cell("mooncake", Op::Get, bytes, 1, 1),
            cell("terrace", Op::Get, bytes, 1, 1),
        ]);
        groups.push(vec![
            cell("mooncake", Op::Put, bytes, 1, 1),
            cell("terrace", Op::Put, bytes, 1, 1),
        ]);
    }
    groups.push(vec![
        cell("memcpy", Op::Get, MIB, 8, 1),
        cell("terrace", Op::Get, MIB, 8, 1),
    ]);
    groups.push(vec![cell("terrace", Op::Put, MIB, 8, 1)]);
    for op in [Op::Get, Op::Put] {
        groups.push(vec![
            cell("mooncake", op, MIB, 1, BATCH),
            cell("terrace", op, MIB, 1, BATCH),
        ]);
    }
    for bytes in SIZES {
        groups.push(vec![
            cell("echo", Op::Lease, bytes, 1, 1),
            cell("terrace", Op::Lease, bytes, 1, 1),
        ]);
    }
    groups
}

/// Runs the phase. A peer that cannot be started is skipped, and said so.
///
/// # Errors
/// None of its own.
pub async fn run(options: &Options) -> Result<Found> {
    let mut wanted = cells();
    for group in &mut wanted {
        group.retain(|cell| options.wants(&super::label(cell)));
    }
    if wanted.iter().all(Vec::is_empty) {
        return Ok(Found::default());
    }
    let (mut found, mut peers, mut at) = (Found::default(), Vec::new(), HashMap::new());
    let mut servers: Vec<Server> = Vec::new();
    let mut nodes = Vec::new();
    let spinner = options.spinner("same host");
    for peer in ["memcpy", "echo", "mooncake", "terrace"] {
        if !wanted.iter().flatten().any(|cell| cell.peer == peer) {
            continue;
        }
        spinner.set_message(format!("starting and filling {peer}"));
        let started: Result<Box<dyn Peer>> = match peer {
            "memcpy" => Memcpy::new(options.working_set_bytes).map(|m| Box::new(m) as _),
            "echo" => start_echo(options, &mut servers)
                .await
                .map(|e| Box::new(e) as _),
            "mooncake" => start_mooncake(options).await.map(|m| Box::new(m) as _),
            _ => start_terrace(options, &mut nodes)
                .await
                .map(|t| Box::new(t) as _),
        };
        match started {
            Ok(started) => {
                at.insert(peer, peers.len());
                peers.push(started);
            }
            Err(error) => found.skipped.push(format!("{peer}: {error:#}")),
        }
    }
    spinner.finish_and_clear();
    let groups = wanted.into_iter().map(|cells| Group {
        cells: cells
            .into_iter()
            .filter_map(|cell| Some((*at.get(cell.peer)?, cell)))
            .collect(),
        base: 0,
    });
    let groups: Vec<_> = groups.filter(|group| !group.cells.is_empty()).collect();
    found.measured = options.measure("same host", &mut peers, &groups).await;
    Ok(found)
}

async fn start_echo(options: &Options, servers: &mut Vec<Server>) -> Result<Echo> {
    let dir = options.dir.join("echo");
    std::fs::create_dir_all(&dir)?;
    let (socket, log) = (dir.join("socket"), dir.join("log"));
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["serve", "echo", "--tcp", "none", "--unix"])
        .arg(&socket);
    let mut server = options.cores.start(&mut command, &log)?;
    let answers = async || tokio::net::UnixStream::connect(&socket).await.is_ok();
    server.ready(answers, &log).await?;
    let echo = Echo::new(socket, server.pid());
    servers.push(server);
    Ok(echo)
}

/// Where the bench keeps what it installs from PyPI.
fn venv() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(".venv-bench")
}

async fn start_mooncake(options: &Options) -> Result<Mooncake> {
    let venv = venv();
    spawn::libraries(&mooncake::LIBRARIES, options.installs)?;
    spawn::python(&venv, &[mooncake::PACKAGE], options.installs)?;
    let set = options.working_set_bytes;
    // Twice what is stored: its puts evict, too, and none may evict what is read.
    let segment = (set.max(8 * SIZES[3]) * SIZES.len() as u64 * 2).next_multiple_of(16 * MIB);
    let dir = options.dir.join("mooncake");
    let mut mooncake = Mooncake::start(options.cores, &venv, &dir, set, segment).await?;
    for bytes in SIZES {
        mooncake.fill(bytes)?;
    }
    Ok(mooncake)
}

async fn start_terrace(options: &Options, nodes: &mut Vec<Node>) -> Result<SameHost> {
    let set = options.working_set_bytes;
    let ram = |bytes: u64| {
        [
            ("ram_bytes", format!("{}MiB", bytes / MIB)),
            ("nvme_bytes", "0".to_owned()),
            ("local_staging_bytes", format!("{}MiB", STAGING_BYTES / MIB)),
        ]
    };
    let held = set.max(u64::from(BATCH) * SIZES[3]) * SIZES.len() as u64 * 6 / 5;
    let node = Node::start(options.cores, &options.dir.join("same-host"), &ram(held)).await?;
    let mut pids = vec![node.pid()];
    let read = attached(&node).await?;
    nodes.push(node);
    let mut write = HashMap::new();
    for bytes in SIZES {
        let dir = options.dir.join(format!("same-host-put-{bytes}"));
        let batch = u64::from(BATCH) * bytes;
        let room = (PUT_NODE_BATCHES * batch).max(64 * MIB);
        let node = Node::start(options.cores, &dir, &ram(room)).await?;
        pids.push(node.pid());
        let side = attached(&node).await?;
        same_host::fill(&side, bytes, 0..room / batch).await?;
        nodes.push(node);
        write.insert(bytes, side);
    }
    SameHost::start(read, write, &SIZES, set, pids).await
}

/// Staging of one client: room for two batches of 1 MiB.
const STAGING_BYTES: u64 = 64 * MIB;

async fn attached(node: &Node) -> Result<Side> {
    let client = node.attached().await?;
    let blocking = node.attached_blocking().await?;
    let namespace = node::namespace(&client).await?;
    // The second opens it as well, for the answer says where the node's socket is, and attaches with a first call.
    let (attaching, space) = (blocking.clone(), namespace.clone());
    let attach = move || {
        attaching.open_namespace(space.spec(), false)?;
        let nothing = space.chain(&[0; 16]);
        attaching.lookup(&space, &nothing, &LookupOptions::probe())
    };
    tokio::task::spawn_blocking(attach).await??;
    Ok(Side {
        client,
        blocking,
        namespace,
    })
}
