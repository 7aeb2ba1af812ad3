//! `kvctl bench`: a node under load, in the spirit of redis-benchmark.
//!
//! ```text
//! for each transport × size × mix × concurrency:
//!   fill ─► warm-up ─► workers, each: pick a block, get it into a buffer (verified) or put a new one
//!                      ─► latencies, bytes, CPU seconds of both sides
//! ```
//!
//! Units: GiB/s of payload; CPU seconds per GiB of payload, user and system; microseconds per call.
//! Every get verifies its checksums. One block per call, in a namespace of its own that is forgotten after.
//! Ctrl-C ends it early: whole cells are printed, the namespace is forgotten all the same, the exit code is 130.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use bytesize::ByteSize;
use indicatif::ProgressBar;
use kvclient::{
    Chain, Client, ClientBuilder, LocalPath, NamespaceHandle, PathReport, PutBlock, PutOptions,
    Target, clock::Clock,
};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::context::{Context, Copies, Unit, size, table};

/// Where the blocks are put.
const NAMESPACE: &str = "kvctl bench";
/// What a shell expects of a program that was interrupted: 128 and SIGINT's number.
const INTERRUPTED: u8 = 130;

/// Blocks put in one call while filling.
const FILL_BYTES: usize = 16 << 20;
/// Share of a cell's time that warms up.
const WARM_UP: f64 = 0.2;
/// Latencies kept per worker; beyond, a cell is long enough.
const MAX_SAMPLES: usize = 4 << 20;

/// Flags of `bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Block sizes
    #[arg(long, value_delimiter = ',', default_value = "64KiB,256KiB,1MiB,4MiB")]
    sizes: Vec<ByteSize>,
    /// Calls at once
    #[arg(long, short = 'c', value_delimiter = ',', default_value = "1,8")]
    concurrency: Vec<usize>,
    /// Percent of calls that are gets; the rest are puts. 100 is all gets, 0 all puts
    #[arg(long, value_delimiter = ',', default_value = "100,0", value_parser = clap::value_parser!(u8).range(0..=100))]
    reads: Vec<u8>,
    /// tcp is gRPC to --endpoint; unix is gRPC to --socket; shm is shared memory with the nodes of --endpoint, on this host
    #[arg(long, value_delimiter = ',', default_value = "tcp")]
    transports: Vec<Transport>,
    /// The node's Unix socket; the default node's, if left out
    #[arg(long)]
    socket: Option<std::path::PathBuf>,
    /// Time per cell
    #[arg(long, short = 't', default_value = "3s")]
    time: humantime::Duration,
    /// Bytes that gets are spread over; more than the processor's caches hold
    #[arg(long, default_value = "256MiB")]
    working_set: ByteSize,
    #[command(flatten)]
    copies: Copies,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Transport {
    Tcp,
    Unix,
    Shm,
}

impl Transport {
    fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Shm => "shm",
        }
    }
}

#[derive(Serialize)]
struct Report {
    rows: Vec<Row>,
}

/// One cell.
#[derive(Serialize)]
struct Row {
    peer: &'static str,
    op: String,
    transport: &'static str,
    bytes: u64,
    concurrency: usize,
    /// Members that keep each block.
    replicas: usize,
    calls: u64,
    calls_s: f64,
    gib_s: f64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    max_us: f64,
    client_cpu_s_per_gib: f64,
    server_cpu_s_per_gib: Option<f64>,
    cpu_s_per_gib: Option<f64>,
    misses: u64,
    rejected: u64,
    errors: u64,
    verified: bool,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<ExitCode> {
    ensure!(
        args.concurrency
            .iter()
            .all(|c| (1..=kvclient::MAX_LANES).contains(c)),
        "--concurrency takes 1 to {}",
        kvclient::MAX_LANES
    );
    let cells =
        args.transports.len() * args.sizes.len() * args.reads.len() * args.concurrency.len();
    let bar = context.progress(cells as u64, "measuring", Unit::Count);
    bar.tick();
    let mut rows = Vec::with_capacity(cells);
    let code = tokio::select! {
        measured = measure(context, &args, &bar, &mut rows) => {
            measured?;
            ExitCode::SUCCESS
        }
        asked = tokio::signal::ctrl_c() => {
            asked.context("cannot listen for Ctrl-C")?;
            forget(context, &args).await;
            ExitCode::from(INTERRUPTED)
        }
    };
    bar.finish_and_clear();
    context.print(&Report { rows }, |report| text(&report.rows))?;
    Ok(code)
}

async fn measure(
    context: &Context,
    args: &Args,
    bar: &ProgressBar,
    rows: &mut Vec<Row>,
) -> Result<()> {
    for &transport in &args.transports {
        let most = args.concurrency.iter().copied().max().unwrap_or(1);
        let builder = builder(context, args, transport).lanes(most);
        let client = builder.connect().await?;
        let namespace = context.open_with(&client, NAMESPACE, args.copies).await?;
        for &bytes in &args.sizes {
            let load = Arc::new(Load::fill(&client, &namespace, bytes, args.working_set).await?);
            for &reads in &args.reads {
                for &concurrency in &args.concurrency {
                    bar.set_message(format!(
                        "{} {bytes} {} c{concurrency}",
                        transport.as_str(),
                        op(reads)
                    ));
                    let cell = Cell {
                        transport,
                        reads,
                        concurrency,
                        time: args.time.into(),
                    };
                    rows.push(cell.run(context, &load).await?);
                    bar.inc(1);
                }
            }
            client.invalidate(&namespace, Target::All).await?;
        }
    }
    Ok(())
}

/// Gives the node its memory back after an interrupted run. What it cannot is not worth an error: the node
/// evicts what nobody asks for.
async fn forget(context: &Context, args: &Args) {
    for &transport in &args.transports {
        if let Ok(client) = builder(context, args, transport).connect().await
            && let Ok(namespace) = context.open(&client, NAMESPACE).await
        {
            let _ = client.invalidate(&namespace, Target::All).await;
        }
    }
}

/// A client that goes this way and no other, so that a row is what its name says.
fn builder(context: &Context, args: &Args, transport: Transport) -> ClientBuilder {
    match transport {
        Transport::Tcp => context.builder(context.endpoint()).local(LocalPath::Off),
        Transport::Shm => context.builder(context.endpoint()),
        Transport::Unix => {
            let socket = args.socket.clone().unwrap_or_else(|| {
                kvserver::config::Config::default()
                    .data_dir
                    .join("terrace.sock")
            });
            let endpoint = format!("unix:{}", socket.display());
            context.builder(&endpoint).local(LocalPath::Off)
        }
    }
}

/// Why calls between these reports that were to use shared memory went over gRPC, if some did.
fn stray(before: &PathReport, after: &PathReport) -> Option<String> {
    let strays = after.grpc.calls - before.grpc.calls;
    if strays == 0 {
        return None;
    }
    let mut members = after.members.iter();
    let why = members.find_map(|member| member.why_grpc.clone());
    let why = why.or_else(|| after.why_grpc.clone());
    let why = why.unwrap_or_else(|| "it failed in between".to_owned());
    let all = strays + after.local.calls - before.local.calls;
    Some(format!("{strays} of {all} calls: {why}"))
}

fn op(reads: u8) -> String {
    match reads {
        100 => "get".to_owned(),
        0 => "put".to_owned(),
        n => format!("{n}% get"),
    }
}

/// What the workers work on.
struct Load {
    client: Client,
    namespace: NamespaceHandle,
    /// One chain of one block each, so that calls do not depend on each other.
    chains: Vec<Chain>,
    payload: Bytes,
    /// Names for blocks never put before.
    fresh: AtomicU64,
}

impl Load {
    async fn fill(
        client: &Client,
        namespace: &NamespaceHandle,
        bytes: ByteSize,
        working_set: ByteSize,
    ) -> Result<Self> {
        let length = bytes.as_u64();
        ensure!(
            (1..=namespace.max_block_bytes()).contains(&length),
            "--sizes: {bytes} is not possible; 1 B to {} are",
            size(namespace.max_block_bytes())
        );
        let blocks = (working_set.as_u64() / length).clamp(1, 65_536) as usize;
        // Not all alike, so that nothing on the way can cheat.
        let payload: Bytes = (0..length)
            .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
            .collect::<Vec<u8>>()
            .into();
        let chains: Vec<Chain> = (0..blocks as u64).map(|n| chain(namespace, n)).collect();
        let mut kept = 0;
        let at_once = (FILL_BYTES / length as usize).clamp(1, 64);
        for some in chains.chunks(at_once) {
            let block = [PutBlock::new(0, payload.clone())];
            let puts = some
                .iter()
                .map(|chain| client.put(namespace, chain, &block, PutOptions::default()));
            for put in puts {
                kept += put.await?.iter().filter(|result| result.is_kept()).count();
            }
        }
        ensure!(
            kept > 0,
            "the node took none of {blocks} blocks; see `kvctl status`"
        );
        Ok(Self {
            client: client.clone(),
            namespace: namespace.clone(),
            chains,
            payload,
            fresh: AtomicU64::new(1 << 32),
        })
    }
}

fn chain(namespace: &NamespaceHandle, name: u64) -> Chain {
    namespace.engine_chain(&[name.to_le_bytes()])
}

struct Cell {
    transport: Transport,
    reads: u8,
    concurrency: usize,
    time: Duration,
}

#[derive(Default)]
struct Tally {
    nanos: Vec<u64>,
    calls: u64,
    misses: u64,
    rejected: u64,
    errors: u64,
}

impl Cell {
    async fn run(&self, context: &Context, load: &Arc<Load>) -> Result<Row> {
        self.work(context, load, self.time.mul_f64(WARM_UP)).await?;
        let (server, paths) = (server_cpu(&load.client).await, load.client.path());
        let (client_cpu, start) = (own_cpu()?, context.clock.now());
        let tally = self.work(context, load, self.time).await?;
        let seconds = context.clock.now().since(start).as_secs_f64();
        let client_cpu = own_cpu()? - client_cpu;
        let server_cpu = match (server, server_cpu(&load.client).await) {
            (Some(before), Some(after)) => Some(after - before),
            _ => None,
        };
        if self.transport == Transport::Shm
            && let Some(strays) = stray(&paths, &load.client.path())
        {
            bail!(
                "shared memory was to be measured, and gRPC was used by {strays}; leave shm out of --transports, or see \
                 `kvctl doctor`"
            );
        }
        Ok(self.row(load, tally, seconds, client_cpu, server_cpu))
    }

    /// Runs the workers for `time` and adds up what they did.
    async fn work(&self, context: &Context, load: &Arc<Load>, time: Duration) -> Result<Tally> {
        let stop = Arc::new(AtomicBool::new(false));
        // A set, so that they end with a cell that is interrupted.
        let mut workers = JoinSet::new();
        for number in 0..self.concurrency as u64 {
            let (load, stop, clock) = (load.clone(), stop.clone(), context.clock.clone());
            workers.spawn(worker(load, stop, clock, self.reads, number));
        }
        context.sleep(time).await;
        stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        while let Some(tally) = workers.join_next().await {
            let tally = tally?;
            all.nanos.extend(tally.nanos);
            all.calls += tally.calls;
            all.misses += tally.misses;
            all.rejected += tally.rejected;
            all.errors += tally.errors;
        }
        Ok(all)
    }

    fn row(
        &self,
        load: &Load,
        mut tally: Tally,
        seconds: f64,
        client_cpu: f64,
        server_cpu: Option<f64>,
    ) -> Row {
        tally.nanos.sort_unstable();
        let micros = |share: f64| percentile(&tally.nanos, share) / 1e3;
        let moved = tally.calls - tally.misses - tally.rejected - tally.errors;
        let gib = (moved * load.payload.len() as u64) as f64 / (1_u64 << 30) as f64;
        let per_gib = |cpu: f64| if gib > 0.0 { cpu / gib } else { 0.0 };
        Row {
            peer: "terrace",
            op: op(self.reads),
            transport: self.transport.as_str(),
            bytes: load.payload.len() as u64,
            concurrency: self.concurrency,
            replicas: load.namespace.replicas(),
            calls: tally.calls,
            calls_s: tally.calls as f64 / seconds,
            gib_s: gib / seconds,
            p50_us: micros(0.5),
            p99_us: micros(0.99),
            p999_us: micros(0.999),
            max_us: micros(1.0),
            client_cpu_s_per_gib: per_gib(client_cpu),
            server_cpu_s_per_gib: server_cpu.map(per_gib),
            cpu_s_per_gib: server_cpu.map(|server| per_gib(server + client_cpu)),
            misses: tally.misses,
            rejected: tally.rejected,
            errors: tally.errors,
            verified: true,
        }
    }
}

async fn worker(
    load: Arc<Load>,
    stop: Arc<AtomicBool>,
    clock: Arc<dyn Clock>,
    reads: u8,
    number: u64,
) -> Tally {
    let mut tally = Tally::default();
    let mut buffer = vec![0; load.payload.len()];
    // A walk with a large odd stride visits all blocks in no order that a cache could guess.
    let mut at = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    while !stop.load(Ordering::Relaxed) {
        at = at
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let is_read = ((at >> 33) % 100) < u64::from(reads);
        let start = clock.now();
        if is_read {
            let chain = &load.chains[(at >> 40) as usize % load.chains.len()];
            match load
                .client
                .get_into(&load.namespace, chain, None, &mut [&mut buffer])
                .await
            {
                Ok(got) if got[0].is_hit() => {}
                Ok(_) => tally.misses += 1,
                Err(_) => tally.errors += 1,
            }
        } else {
            let chain = chain(&load.namespace, load.fresh.fetch_add(1, Ordering::Relaxed));
            let block = [PutBlock::new(0, load.payload.clone())];
            match load
                .client
                .put(&load.namespace, &chain, &block, PutOptions::default())
                .await
            {
                Ok(put) if put[0].is_kept() => {}
                Ok(_) => tally.rejected += 1,
                Err(_) => tally.errors += 1,
            }
        }
        tally.calls += 1;
        if tally.nanos.len() < MAX_SAMPLES {
            let nanos = clock.now().since(start).as_nanos();
            tally.nanos.push(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
    }
    tally
}

/// The value below which `share` of the sorted values lie.
fn percentile(sorted: &[u64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last as f64 * share).round() as usize)
        .map_or(0.0, |value| *value as f64)
}

/// CPU seconds of the node, or of all nodes of the cluster, user and system, by their own metrics. `None` when one of
/// them does not say.
async fn server_cpu(client: &Client) -> Option<f64> {
    let all = client.stats_of_all().await;
    let seconds = all.into_iter().map(|(_, answer)| {
        let counters = answer.ok()?.counters;
        let cpu = counters
            .iter()
            .find(|counter| counter.name == "process_cpu_seconds_total");
        cpu.map(|cpu| cpu.value)
    });
    seconds.sum()
}

/// CPU seconds of this process, user and system.
fn own_cpu() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").context("cannot read /proc/self/stat")?;
    // The second field is the name in brackets and may hold anything; fields 14 and 15 are the times.
    let fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace();
    let ticks: u64 = fields
        .skip(11)
        .take(2)
        .filter_map(|ticks| ticks.parse::<u64>().ok())
        .sum();
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

fn text(rows: &[Row]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let trouble = row.misses + row.rejected + row.errors;
            vec![
                row.op.clone(),
                row.transport.to_owned(),
                size(row.bytes),
                row.concurrency.to_string(),
                format!("{:.2}", row.gib_s),
                format!("{:.0}", row.calls_s),
                format!("{:.0}", row.p50_us),
                format!("{:.0}", row.p99_us),
                format!("{:.0}", row.p999_us),
                format!("{:.2}", row.client_cpu_s_per_gib),
                row.server_cpu_s_per_gib
                    .map_or("-".to_owned(), |cpu| format!("{cpu:.2}")),
                if trouble == 0 {
                    String::new()
                } else {
                    format!(
                        "{} missed, {} rejected, {} failed",
                        row.misses, row.rejected, row.errors
                    )
                },
            ]
        })
        .collect();
    let head = [
        "op",
        "over",
        "size",
        "c",
        "GiB/s",
        "calls/s",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "client CPU s/GiB",
        "server CPU s/GiB",
        "",
    ];
    table(&head, &cells) + "\ngets verify their checksums; one block per call\n"
}

#[cfg(test)]
mod tests {
    use super::{own_cpu, percentile};

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let sorted: Vec<u64> = (1..=1000).collect();
        assert_eq!(percentile(&sorted, 0.0), 1.0);
        assert_eq!(percentile(&sorted, 0.99), 990.0);
        assert_eq!(percentile(&sorted, 1.0), 1000.0);
        assert_eq!(percentile(&[], 0.5), 0.0);
    }

    #[test]
    fn own_cpu_grows_with_work() {
        let before = own_cpu().unwrap();
        let mut x = 1_u64;
        while own_cpu().unwrap() < before + 0.05 {
            for _ in 0..1_000_000 {
                x = std::hint::black_box(x.wrapping_mul(3));
            }
        }
    }
}
