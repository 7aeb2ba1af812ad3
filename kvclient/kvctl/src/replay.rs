//! `kvctl replay FILE`: a recorded trace against a policy alone, or against a node.
//!
//! ```text
//! alone:   trace ─► policy ─► prefix hits, beside LRU and the offline optimum
//! --against: request ─► lookup ─► get what is present (verified) ─► put what is missing
//! ```
//!
//! Units: shares of all block references of the trace.
//! Errors: the line of the trace that is no request; a block that came back wrong ends the replay.

use std::{fs::File, io::BufReader, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use bytesize::ByteSize;
use kvclient::{Client, LookupOptions, NamespaceHandle, PutBlock, PutOptions, Target};
use kvserver::engine::{
    policy,
    replay::{self, Capacity, ReplayReport, Trace},
};
use serde::Serialize;

use crate::context::{Context, Unit, table};

/// Flags of `replay`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Trace: one JSON object per line, with `hash_ids`
    file: PathBuf,
    /// Policy to judge; `all` compares them
    #[arg(long, default_value = "best")]
    policy: String,
    /// Room, as a share of the trace's distinct blocks; above 1, in blocks
    #[arg(long, default_value_t = 0.05)]
    capacity: f64,
    /// Replay against this node instead, with small blocks
    #[arg(long, value_name = "ENDPOINT")]
    against: Option<String>,
    /// Size of the blocks put with --against
    #[arg(long, default_value = "4KiB")]
    block_size: ByteSize,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<()> {
    let file = File::open(&args.file)
        .with_context(|| format!("cannot open the trace {}", args.file.display()))?;
    let trace = Trace::read(BufReader::new(file))
        .with_context(|| format!("{} is not a trace", args.file.display()))?;
    if let Some(endpoint) = &args.against {
        let report = against(context, &args, endpoint, &trace).await?;
        return context.print(&report, node_text);
    }
    let capacity = if args.capacity > 1.0 {
        Capacity::Blocks(args.capacity as u64)
    } else {
        Capacity::Share(args.capacity)
    };
    if args.policy == "all" {
        let names = policy::NAMES.iter().filter(|name| **name != "best");
        let reports: Vec<Report> = names
            .map(|name| judge(&trace, name, capacity))
            .collect::<Result<_>>()?;
        return context.print(&reports, |reports| text(reports));
    }
    let report = judge(&trace, &args.policy, capacity)?;
    context.print(&report, |report| text(std::slice::from_ref(report)))
}

#[derive(Serialize)]
struct Report {
    policy: &'static str,
    capacity_blocks: u64,
    requests: u64,
    block_refs: u64,
    unique_blocks: u64,
    input_tokens: u64,
    prefix_hits: u64,
    prefix_hit_share: f64,
    lru_share: f64,
    ratio_to_lru: f64,
    optimum_share: f64,
    share_of_optimum: f64,
    unbounded_share: f64,
    evictions: u64,
    seconds: f64,
}

fn judge(trace: &Trace, name: &str, capacity: Capacity) -> Result<Report> {
    let clock = kvserver::clock::SystemClock::new();
    let report: ReplayReport = replay::report(trace, name, capacity, &clock)?;
    Ok(Report {
        policy: report.policy,
        capacity_blocks: report.capacity_blocks,
        requests: report.requests,
        block_refs: report.block_refs,
        unique_blocks: report.unique_blocks,
        input_tokens: report.input_tokens,
        prefix_hits: report.prefix_hits,
        prefix_hit_share: report.prefix_hit_share,
        lru_share: report.lru_share,
        ratio_to_lru: report.ratio_to_lru(),
        optimum_share: report.optimum_share,
        share_of_optimum: report.share_of_optimum(),
        unbounded_share: report.unbounded_share,
        evictions: report.evictions,
        seconds: report.elapsed.as_secs_f64(),
    })
}

fn text(reports: &[Report]) -> String {
    let Some(first) = reports.first() else {
        return String::new();
    };
    let rows: Vec<Vec<String>> = reports
        .iter()
        .map(|report| {
            vec![
                report.policy.to_owned(),
                format!("{:.4}", report.prefix_hit_share),
                format!("{:.3}", report.ratio_to_lru),
                format!("{:.3}", report.share_of_optimum),
                report.evictions.to_string(),
                format!("{:.2}", report.seconds),
            ]
        })
        .collect();
    format!(
        "{} requests, {} block references, {} distinct blocks; room for {} ({:.1}%)\n\n{}\n\
         LRU {:.4}, offline optimum {:.4}, without any eviction {:.4}\n",
        first.requests,
        first.block_refs,
        first.unique_blocks,
        first.capacity_blocks,
        100.0 * first.capacity_blocks as f64 / first.unique_blocks.max(1) as f64,
        table(
            &[
                "policy",
                "prefix hit share",
                "of LRU",
                "of optimum",
                "evictions",
                "s"
            ],
            &rows
        ),
        first.lru_share,
        first.optimum_share,
        first.unbounded_share,
    )
}

#[derive(Default, Serialize)]
struct NodeReport {
    endpoint: String,
    requests: u64,
    block_refs: u64,
    unique_blocks: u64,
    block_bytes: u64,
    prefix_hits: u64,
    prefix_hit_share: f64,
    /// Hits fetched and found right, byte for byte.
    verified_blocks: u64,
    /// Promised by a lookup, gone at the get; only where a lease did not cover them.
    lost_blocks: u64,
    rejected_blocks: u64,
    seconds: f64,
}

async fn against(
    context: &Context,
    args: &Args,
    endpoint: &str,
    trace: &Trace,
) -> Result<NodeReport> {
    let client = context.connect_to(endpoint).await?;
    let namespace = context.open(&client, "kvctl replay").await?;
    ensure!(
        (4..=namespace.max_block_bytes()).contains(&args.block_size.as_u64()),
        "--block-size must be 4 B to {} B",
        namespace.max_block_bytes()
    );
    client.invalidate(&namespace, Target::All).await?;
    let mut report = NodeReport {
        endpoint: endpoint.to_owned(),
        requests: trace.len() as u64,
        block_refs: trace.block_refs(),
        unique_blocks: trace.unique_blocks(),
        block_bytes: args.block_size.as_u64(),
        ..NodeReport::default()
    };
    let bar = context.progress(trace.len() as u64, "replaying", Unit::Count);
    let start = context.clock.now();
    for request in trace.requests() {
        replay_one(&client, &namespace, request, &mut report).await?;
        bar.inc(1);
    }
    report.seconds = context.clock.now().since(start).as_secs_f64();
    report.prefix_hit_share = report.prefix_hits as f64 / report.block_refs.max(1) as f64;
    bar.finish_and_clear();
    client.invalidate(&namespace, Target::All).await?;
    Ok(report)
}

async fn replay_one(
    client: &Client,
    namespace: &NamespaceHandle,
    request: &[u32],
    report: &mut NodeReport,
) -> Result<()> {
    if request.is_empty() {
        return Ok(());
    }
    let names: Vec<[u8; 4]> = request.iter().map(|id| id.to_le_bytes()).collect();
    let chain = namespace.engine_chain(&names);
    let found = client
        .lookup(namespace, &chain, &LookupOptions::default())
        .await?;
    let present = found.present_blocks as usize;
    report.prefix_hits += present as u64;
    if present > 0 {
        let part = chain.slice(0..present, namespace.run_blocks());
        let fetched = client.get(namespace, &part, found.lease.as_ref()).await?;
        for (id, block) in request.iter().zip(fetched) {
            match block.bytes {
                Some(bytes) => {
                    ensure!(
                        bytes == content(*id, report.block_bytes),
                        "block {id} came back with other bytes than were put: this is a defect, report it"
                    );
                    report.verified_blocks += 1;
                }
                None => report.lost_blocks += 1,
            }
        }
    }
    let missing: Vec<PutBlock<'_>> = (present..request.len())
        .map(|i| PutBlock::new(i, content(request[i], report.block_bytes)))
        .collect();
    if !missing.is_empty() {
        let put = client
            .put(namespace, &chain, &missing, PutOptions::default())
            .await?;
        report.rejected_blocks += put.iter().filter(|result| !result.is_kept()).count() as u64;
    }
    Ok(())
}

/// Bytes that only this block has.
fn content(id: u32, length_bytes: u64) -> Vec<u8> {
    id.to_le_bytes()
        .into_iter()
        .cycle()
        .take(length_bytes as usize)
        .collect()
}

fn node_text(report: &NodeReport) -> String {
    format!(
        "{} requests, {} block references, {} distinct blocks of {} B against {}\n\
         prefix hit share {:.4}: {} hits, {} fetched and right, {} lost before they were fetched, \
         {} puts rejected, {:.1} s\n",
        report.requests,
        report.block_refs,
        report.unique_blocks,
        report.block_bytes,
        report.endpoint,
        report.prefix_hit_share,
        report.prefix_hits,
        report.verified_blocks,
        report.lost_blocks,
        report.rejected_blocks,
        report.seconds,
    )
}
