//! Blocks that lie on the disk, beside direct reads of the same disk.
//!
//! ```text
//!   direct-read           8 threads, O_DIRECT, one file                                     nothing verified
//!   read-summed           the same, and every 64 KiB page summed                            verified, nothing else
//!   terrace in-process    Blocks::get ─► engine ─► mover ─► disk ─► arena slot, verified    the node in this process
//!   terrace tcp           the same behind gRPC, into the caller's buffer, verified again    the node in its own
//! ```
//!
//! RAM is a small part of what is walked through, in order, so nearly every get must come from the disk; what did not is
//! told, and its bytes do not count. The bars are on the in-process row, because a direct read pays for no network either, and
//! they are to direct reads that look at nothing; the summed row says how much of the ratio is the looking.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kvclient::Ack;
use kvproto::{
    BlockKey, Chain, Kind, Namespace, NamespaceId, OwnerId, Part, PutOutcome, SequenceHash,
    TierKind, convert::request::OpenNamespace,
};
use kvserver::Node;
use kvserver::blocks::Blocks;
use kvserver::blocks::get::Found as Answer;
use kvserver::config::Config;
use kvserver::engine::{Owner, TenantId};
use tokio::task::JoinSet;

use super::{Found, Options};
use crate::clock::pause;
use crate::load::{Sample, Window, Worker, drive};
use crate::peers::disk::DirectReads;
use crate::peers::network::{Job, Network};
use crate::peers::node;
use crate::peers::terrace::{Caller, Target};
use crate::peers::wire::payload;
use crate::peers::{SIZES, values_of};
use crate::rounds::{Cell, Group, Op, Peer, Pending, Transport};

const MIB: u64 = 1 << 20;
/// Enough for eight reads of the largest block and what the mover holds beside them.
const RAM_BYTES: u64 = 96 * MIB;
const RUN_BLOCKS: u32 = 64;
const WRITERS: usize = 16;
const PUT_TRIES: usize = 1000;
const OWNER: Owner = Owner {
    tenant: TenantId(0),
    id: OwnerId([2; 16]),
};

/// Bytes of each size that lie on the disk.
fn set_bytes(options: &Options) -> u64 {
    options.working_set_bytes * 4
}

fn settings(options: &Options) -> [(&'static str, String); 4] {
    let stored = set_bytes(options) * SIZES.len() as u64;
    [
        ("ram_bytes", format!("{}MiB", RAM_BYTES / MIB)),
        // Room to spare, so that reclaim does not run while reads are measured.
        ("nvme_bytes", format!("{}MiB", stored * 3 / 2 / MIB + 512)),
        ("nvme_admission", "open".to_owned()),
        ("nvme_wear_bytes_per_day", "0".to_owned()),
    ]
}

/// Runs the phase.
///
/// # Errors
/// The disk has no room or no direct I/O, or a node cannot be started.
pub async fn run(options: &Options) -> Result<Found> {
    let cell = |peer, transport, bytes| Cell {
        peer,
        op: Op::NvmeGet,
        transport,
        bytes,
        concurrency: 8,
        keys: 1,
    };
    let rows = |bytes| {
        let rows = [
            (0, cell("direct-read", Transport::InProcess, bytes)),
            (1, cell("terrace", Transport::InProcess, bytes)),
            (2, cell("terrace", Transport::Tcp, bytes)),
            (3, cell("read-summed", Transport::InProcess, bytes)),
        ];
        let wanted = rows
            .into_iter()
            .filter(|(_, c)| options.wants(&super::label(c)));
        Group {
            cells: wanted.collect(),
            base: 0,
        }
    };
    let groups: Vec<_> = SIZES
        .into_iter()
        .map(rows)
        .filter(|g| !g.cells.is_empty())
        .collect();
    if groups.is_empty() {
        return Ok(Found::default());
    }
    let spinner = options.spinner("nvme");
    let set = set_bytes(options);
    spinner.set_message("writing the file for direct reads");
    let disk = DirectReads::create(&options.dir.join("direct"), set)?;
    spinner.set_message("filling the node in this process");
    let inside = Inside::start(&options.dir.join("nvme-inside"), options).await?;
    spinner.set_message("filling the node behind gRPC");
    let node =
        node::Node::start(options.cores, &options.dir.join("nvme"), &settings(options)).await?;
    let client = node.client(false, options.connections).await?;
    let namespace = node::namespace(&client).await?;
    for bytes in SIZES {
        node::fill(
            &client,
            &namespace,
            bytes,
            0..values_of(set, bytes),
            Ack::Stored,
        )
        .await?;
    }
    let target = Target::new(client, namespace, HashMap::new(), &SIZES, set);
    spinner.finish_and_clear();

    let (served, counted) = (inside.served.clone(), target.clone());
    let summed = disk.summed();
    let mut peers: Vec<Box<dyn Peer>> = vec![
        Box::new(disk),
        Box::new(inside),
        Box::new(Network::<Caller>::new(target, set, vec![node.pid()])),
        Box::new(summed),
    ];
    let measured = options.measure("nvme", &mut peers, &groups).await;
    let (inside_disk, inside_ram) = served.hits();
    let (tcp_disk, tcp_ram) = counted.hits();
    let share = |ram: u64, disk: u64| 100.0 * ram as f64 / (ram + disk).max(1) as f64;
    let note = format!(
        "NVMe gets answered from RAM after all: {:.1} % in process, {:.1} % over gRPC",
        share(inside_ram, inside_disk),
        share(tcp_ram, tcp_disk)
    );
    Ok(Found {
        measured,
        notes: vec![note],
        ..Found::default()
    })
}

/// Where gets were answered from.
#[derive(Default)]
struct Served {
    disk: AtomicU64,
    ram: AtomicU64,
}

impl Served {
    fn hits(&self) -> (u64, u64) {
        (
            self.disk.load(Ordering::Relaxed),
            self.ram.load(Ordering::Relaxed),
        )
    }
}

/// A node in this process and what lies on its disk.
struct Inside {
    node: Node,
    namespace: NamespaceId,
    chains: Arc<HashMap<u64, Vec<Chain>>>,
    served: Arc<Served>,
    set_bytes: u64,
}

impl Inside {
    async fn start(dir: &Path, options: &Options) -> Result<Self> {
        let set_bytes = set_bytes(options);
        let mut config = Config {
            data_dir: dir.to_owned(),
            ..Config::default()
        };
        let fixed = [
            ("listen", "127.0.0.1:0"),
            ("unix_socket", "off"),
            ("http_listen", "off"),
            ("durable_bytes", "0"),
        ];
        let fixed = fixed.map(|(name, value)| (name, value.to_owned()));
        for (name, value) in fixed.into_iter().chain(settings(options)) {
            config.set(name, &value, "the bench")?;
        }
        let node = Node::start(config).await?;
        let blocks = node.blocks();
        let opened = blocks
            .open_namespace(
                OWNER.tenant,
                &OpenNamespace::of(Namespace::opaque("bench", 16, RUN_BLOCKS)),
            )
            .await?;
        let mut chains = HashMap::new();
        for bytes in SIZES {
            let name = |i| Chain::from_root(vec![super::inside::hash(bytes, i)]);
            let of_size: Vec<_> = (0..values_of(set_bytes, bytes)).map(name).collect();
            fill(blocks, opened.id, bytes, &of_size)
                .await
                .context("filling the node in this process")?;
            chains.insert(bytes, of_size);
        }
        Ok(Self {
            node,
            namespace: opened.id,
            chains: Arc::new(chains),
            served: Arc::default(),
            set_bytes,
        })
    }
}

async fn fill(
    blocks: &Arc<Blocks>,
    namespace: NamespaceId,
    bytes: u64,
    chains: &[Chain],
) -> Result<()> {
    let (value, next) = (
        Arc::new(payload(bytes as usize, bytes)),
        Arc::new(AtomicU64::new(0)),
    );
    let chains: Arc<[Chain]> = chains.into();
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let (blocks, chains, value, next) =
            (blocks.clone(), chains.clone(), value.clone(), next.clone());
        writers.spawn(async move {
            while let Some(chain) = chains.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                stored(&blocks, namespace, chain, &value).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(writer) = writers.join_next().await {
        writer??;
    }
    Ok(())
}

async fn stored(
    blocks: &Arc<Blocks>,
    namespace: NamespaceId,
    chain: &Chain,
    value: &[u8],
) -> Result<()> {
    let hash: SequenceHash = chain.hashes[0];
    let (key, place) = (
        BlockKey {
            namespace,
            hash,
            part: Part::default(),
        },
        chain.place(0, RUN_BLOCKS),
    );
    for _ in 0..PUT_TRIES {
        let put = blocks
            .put_bytes(
                OWNER.tenant,
                key,
                place,
                value,
                kvproto::Ack::Stored,
                Kind::Kv,
            )
            .await?;
        match put.outcome {
            // Present: an earlier try was refused its ack, and demotion has stored the block since.
            PutOutcome::Stored | PutOutcome::Present => return Ok(()),
            PutOutcome::Rejected => {
                pause(Duration::from_millis(u64::from(
                    put.retry_after_ms.clamp(1, 1000),
                )))
                .await
            }
            other => bail!("{other:?} instead of stored"),
        }
    }
    bail!("rejected {PUT_TRIES} times")
}

struct Reader {
    blocks: Arc<Blocks>,
    namespace: NamespaceId,
    chains: Arc<HashMap<u64, Vec<Chain>>>,
    served: Arc<Served>,
    job: Job,
}

impl Worker for Reader {
    async fn step(&mut self) -> Result<u64> {
        let chain = self.chains[&self.job.bytes][self.job.next_value() as usize].clone();
        let mut plan =
            self.blocks
                .get(OWNER, self.namespace, chain, vec![Part::default()], None)?;
        match plan.next().await {
            Some((0, Answer::Hit { bytes, tier })) => {
                ensure!(
                    bytes.len_bytes() == self.job.bytes,
                    "{} bytes",
                    bytes.len_bytes()
                );
                std::hint::black_box(bytes.bytes().as_ptr());
                let from_ram = tier == TierKind::Ram;
                let counter = if from_ram {
                    &self.served.ram
                } else {
                    &self.served.disk
                };
                counter.fetch_add(1, Ordering::Relaxed);
                Ok(if from_ram { 0 } else { self.job.bytes })
            }
            Some((_, Answer::Gone(outcome))) => bail!("{outcome:?}"),
            _ => bail!("no answer"),
        }
    }
}

impl Peer for Inside {
    fn run<'a>(&'a mut self, cell: &'a Cell, window: Window) -> Pending<'a, Result<Sample>> {
        Box::pin(async move {
            let reader = |nth| Reader {
                blocks: self.node.blocks().clone(),
                namespace: self.namespace,
                chains: self.chains.clone(),
                served: self.served.clone(),
                job: Job::of(cell, nth, self.set_bytes),
            };
            let readers = (0..cell.concurrency).map(reader).collect();
            Ok(drive(readers, window, &[]).await?.1)
        })
    }
}
