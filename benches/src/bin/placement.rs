//! `make bench-placement`: who owns what, computed in several ways, and asked of a metadata store.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use indicatif::ProgressBar;
use kvbenches::bars::{Bar, Bound};
use kvbenches::load::Window;
use kvbenches::micro::Line;
use kvbenches::phases::Options;
use kvbenches::placement::proof::{Proof, prove};
use kvbenches::placement::quality::{Quality, RUNS_PER_MEMBER, measure};
use kvbenches::placement::{Members, Way, speed, stores};
use kvbenches::spawn::{Cores, install};
use kvbenches::{procfs, report};
use serde::Serialize;

/// The allocator that `kvserver` uses.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Rendezvous hashing beside a ring, Maglev and a slot table; a node's look-ups beside etcd's and Redis'.
#[derive(Parser, Debug)]
#[command(name = "placement")]
struct Arguments {
    /// Only these parts: quality, speed, proof, stores. Repeatable.
    #[arg(long)]
    only: Vec<String>,
    /// Interleaved rounds of speed and stores; at least 15 for a figure that is meant.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Length of a sample or cell, milliseconds.
    #[arg(long, default_value_t = 200)]
    cell_ms: u64,
    /// Seeds of the proof.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// Sizes of the cluster.
    #[arg(long, value_delimiter = ',', default_value = "10,100,1000")]
    members: Vec<u32>,
    /// A smoke run of a minute: few seeds, short rounds, small clusters. Its figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// Everything that was measured, as one JSON object, to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Install nothing.
    #[arg(long)]
    no_install: bool,
}

/// What `--json` writes.
#[derive(Default, Serialize)]
struct Summary {
    machine: String,
    quality: Vec<Quality>,
    speed: Vec<Line>,
    proof: Vec<Proof>,
    stores: Vec<report::Row>,
    bars: Vec<Bar>,
    skipped: Vec<String>,
}

fn main() -> Result<()> {
    let mut arguments = Arguments::parse();
    if arguments.quick {
        arguments.rounds = arguments.rounds.min(2);
        arguments.cell_ms = arguments.cell_ms.min(20);
        arguments.seeds = arguments.seeds.min(2);
        arguments.members = vec![10, 100];
    }
    let wants =
        |part: &str| arguments.only.is_empty() || arguments.only.iter().any(|only| only == part);
    let mut summary = Summary {
        machine: procfs::machine(),
        ..Summary::default()
    };
    tell(format!("{}\n", summary.machine))?;
    if wants("quality") {
        summary.quality = quality(&arguments.members);
        tell(quality_table(&summary.quality))?;
    }
    if wants("speed") {
        summary.speed = nanoseconds(&arguments);
        tell(speed_table(&summary.speed))?;
    }
    if wants("proof") {
        summary.proof = proof(&arguments);
        summary
            .bars
            .extend(summary.proof.iter().flat_map(proof_bars));
        tell(proof_table(&summary.proof))?;
    }
    if wants("stores") {
        let found = metadata(&arguments)?;
        tell(report::tables(&found.measured))?;
        summary.stores = report::rows(&found.measured);
        summary.bars.extend(found.bars);
        summary.skipped.extend(found.skipped);
    }
    let mut end = report::bars(&summary.bars);
    for line in &summary.skipped {
        let _ = writeln!(end, "  skipped: {line}");
    }
    tell(end)?;
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&summary)? + "\n")
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// One part at a time: a run takes a while, and what is known is worth seeing.
fn tell(text: String) -> Result<()> {
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

fn quality(sizes: &[u32]) -> Vec<Quality> {
    let progress = ProgressBar::new(6 * sizes.len() as u64);
    let mut found = Vec::new();
    for &size in sizes {
        let members = Members::mixed(size);
        for way in Way::all(size) {
            progress.set_message(way.name());
            found.push(measure(way, &members, RUNS_PER_MEMBER * size as usize));
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    found
}

fn quality_table(found: &[Quality]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "\nShares and moves: weights 1 and 2 in turn, 10,000 runs per member, one of weight 2 joins, one leaves"
    );
    let _ = writeln!(
        text,
        "{:<24} {:>7} {:>8} {:>8} {:>11} {:>11} {:>12} {:>12} {:>11} {:>10}",
        "",
        "members",
        "max",
        "min",
        "join/ideal",
        "leave/ideal",
        "stray join",
        "stray leave",
        "bytes",
        "prepare ms"
    );
    for q in found {
        let _ = writeln!(
            text,
            "{:<24} {:>7} {:>8.3} {:>8.3} {:>11.3} {:>11.3} {:>9.0} ppm {:>9.0} ppm {:>10} {:>10.2}",
            q.way,
            q.members,
            q.max_share,
            q.min_share,
            q.join.over_ideal,
            q.leave.over_ideal,
            q.join.stray_per_million,
            q.leave.stray_per_million,
            q.bytes,
            q.prepare_ms
        );
    }
    text
}

fn nanoseconds(arguments: &Arguments) -> Vec<Line> {
    let prices = (arguments.members.len() * 9 * arguments.rounds) as u64;
    let progress = ProgressBar::new(prices);
    let length = Duration::from_millis(arguments.cell_ms / 4);
    let lines = speed::measure(&arguments.members, arguments.rounds, length, |_| {
        progress.inc(1)
    });
    progress.finish_and_clear();
    lines
}

fn speed_table(lines: &[Line]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "\n{:<44} {:>10}  {:<12} p10–p90",
        "Cost", "median", ""
    );
    for line in lines {
        if let Some(v) = line.value {
            let _ = writeln!(
                text,
                "{:<44} {:>10.2}  {:<12} {:.2}–{:.2}",
                line.name, v.median, line.unit, v.p10, v.p90
            );
        }
    }
    text
}

fn proof(arguments: &Arguments) -> Vec<Proof> {
    let progress = ProgressBar::new(arguments.seeds * arguments.members.len() as u64);
    let found = arguments
        .members
        .iter()
        .map(|&members| prove(members, arguments.seeds, || progress.inc(1)));
    let found = found.collect();
    progress.finish_and_clear();
    found
}

fn proof_table(found: &[Proof]) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "\nShares over seeds, 10,000 runs per member");
    let _ = writeln!(
        text,
        "{:>8} {:>6} {:>12} {:>11} {:>11} {:>12} {:>18} {:>12} {:>10} {:>7}",
        "members",
        "seeds",
        "mean off",
        "max median",
        "max worst",
        "seeds >1.05",
        "spread over fair",
        "compared",
        "moved",
        "stray"
    );
    for p in found {
        let _ = writeln!(
            text,
            "{:>8} {:>6} {:>11.3}% {:>11.4} {:>11.4} {:>12} {:>18.3} {:>12} {:>10} {:>7}",
            p.members,
            p.seeds,
            100.0 * p.mean_share_off,
            p.max_share,
            p.worst_share,
            p.seeds_above,
            p.spread_over_fair,
            p.compared,
            p.moved,
            p.strays
        );
    }
    text
}

fn proof_bars(proof: &Proof) -> [Bar; 3] {
    let of = |what: &str| format!("{what}, {} members", proof.members);
    let note = format!("{} seeds", proof.seeds);
    let (off, share) = (Some(proof.mean_share_off), Some(proof.max_share));
    let worst = format!(
        "worst seed {:.4}, {} of {} seeds above",
        proof.worst_share, proof.seeds_above, proof.seeds
    );
    [
        Bar::fact(
            &of("mean share off its weight"),
            Bound::AtMost(0.005),
            off,
            note,
        ),
        Bar::fact(
            &of("greatest share over its weight"),
            Bound::AtMost(1.05),
            share,
            worst,
        ),
        Bar::fact(
            &of("runs that moved between two that stayed"),
            Bound::AtMost(0.0),
            Some(proof.strays as f64),
            format!("{} moved of {} compared", proof.moved, proof.compared),
        ),
    ]
}

fn metadata(arguments: &Arguments) -> Result<stores::Found> {
    let scratch = tempfile::tempdir()?;
    let programs = [("redis-server", "redis-server"), ("etcd", "etcd-server")];
    let skipped = install(&programs, !arguments.no_install);
    let options = Options {
        rounds: arguments.rounds,
        window: Window {
            warm: Duration::from_millis(arguments.cell_ms / 4),
            measure: Duration::from_millis(arguments.cell_ms),
        },
        working_set_bytes: 0,
        cores: Cores::Any,
        connections: None,
        only: Vec::new(),
        trace: None,
        dir: scratch.path().to_owned(),
        progress: true,
        installs: !arguments.no_install,
    };
    // One thread for the client of every peer.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut found = runtime.block_on(stores::run(&options));
    found.skipped.extend(skipped);
    Ok(found)
}
