//! `make bench`: Terrace beside Redis, memcached, plain TCP, stock tonic, memcpy and the disk.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use kvbenches::bars::{self, Bar, Verdict};
use kvbenches::load::Window;
use kvbenches::peers::{echo, fan, tcp, tonic_stock};
use kvbenches::phases::{Found, Options, cluster, facts, inside, network, nvme, same_host};
use kvbenches::spawn::{Cores, end_with_parent, install};
use kvbenches::{procfs, report};
use serde::Serialize;

/// The server and the client of every peer of ours use the allocator that `kvserver` uses.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Terrace beside what a user would pick instead: interleaved rounds, medians, ratios with their 95 % interval, and the
/// bars of this release.
#[derive(Parser, Debug)]
#[command(name = "side_by_side")]
struct Arguments {
    #[command(subcommand)]
    serve: Option<Serve>,
    /// Interleaved rounds; at least 15 for a figure that is meant.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Measured length of a cell, milliseconds.
    #[arg(long, default_value_t = 300)]
    cell_ms: u64,
    /// A smoke run: two short rounds over small working sets. Its figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// Only what contains this: a phase (network, cluster, nvme, lease, memory, trace, overcommit) or part of a cell's name such as
    /// "get tcp 1MiB c8", "redis" or "cluster". Repeatable.
    #[arg(long)]
    only: Vec<String>,
    /// One JSON object per cell, as an array, to this file ("-": standard output, and the tables to standard error).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Machine, settings, bars and facts as one JSON object to this file.
    #[arg(long, value_name = "FILE")]
    bars_json: Option<PathBuf>,
    /// Servers on the first core, the client on the second.
    #[arg(long)]
    pin: bool,
    /// Threads of the client's runtime, the same for every peer.
    #[arg(long, default_value_t = 1)]
    client_threads: usize,
    /// Connections of Terrace's client (its own default otherwise).
    #[arg(long)]
    connections: Option<usize>,
    /// MiB of values per size and server; well above the last cache.
    #[arg(long, default_value_t = 128)]
    working_set_mib: u64,
    /// Replays this trace (JSON lines with hash_ids) for the hit share row.
    #[arg(long, env = "TERRACE_TRACE")]
    trace: Option<PathBuf>,
    /// Scratch folder, on the disk to measure; several GiB for a while.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Install nothing.
    #[arg(long)]
    no_install: bool,
}

#[derive(Subcommand, Debug)]
enum Serve {
    /// Runs one of the comparison servers (started by the bench itself).
    #[command(hide = true)]
    Serve {
        what: What,
        #[arg(long)]
        tcp: String,
        #[arg(long)]
        unix: PathBuf,
        /// Threads that serve; 0: one per core.
        #[arg(long, default_value_t = 0)]
        threads: usize,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    Echo,
    Fan,
    Plain,
    Tonic,
    TonicTuned,
}

/// What `--bars-json` writes.
#[derive(Serialize)]
struct Summary {
    machine: String,
    rounds: usize,
    cell_ms: u64,
    pinned: bool,
    client_threads: usize,
    skipped: Vec<String>,
    notes: Vec<String>,
    bars: Vec<Bar>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(Serve::Serve {
        what,
        tcp,
        unix,
        threads,
    }) = arguments.serve
    {
        end_with_parent();
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        if threads > 0 {
            runtime.worker_threads(threads);
        }
        let runtime = runtime.enable_all().build()?;
        return runtime.block_on(async {
            match what {
                What::Echo => echo::serve(&unix),
                What::Fan => fan::serve(&tcp),
                What::Plain => tcp::serve(&tcp, &unix).await,
                What::Tonic => tonic_stock::serve(&tcp, &unix, false).await,
                What::TonicTuned => tonic_stock::serve(&tcp, &unix, true).await,
            }
        });
    }
    compare(&arguments)
}

fn compare(arguments: &Arguments) -> Result<()> {
    let scratch = match &arguments.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir)?;
            tempfile::tempdir_in(dir)?
        }
        None => tempfile::tempdir()?,
    };
    let (rounds, cell_ms, working_set_mib) = match arguments.quick {
        true => (
            arguments.rounds.min(2),
            arguments.cell_ms.min(60),
            arguments.working_set_mib.min(32),
        ),
        false => (
            arguments.rounds,
            arguments.cell_ms,
            arguments.working_set_mib,
        ),
    };
    let options = Options {
        rounds: rounds.max(1),
        window: Window {
            warm: Duration::from_millis(cell_ms / 8),
            measure: Duration::from_millis(cell_ms),
        },
        working_set_bytes: working_set_mib << 20,
        cores: if arguments.pin {
            Cores::Split
        } else {
            Cores::Any
        },
        connections: arguments.connections,
        only: arguments.only.clone(),
        trace: arguments.trace.clone(),
        dir: scratch.path().to_owned(),
        progress: true,
        installs: !arguments.no_install,
    };
    let programs = [("redis-server", "redis-server"), ("memcached", "memcached")];
    let mut found = Found {
        skipped: install(&programs, !arguments.no_install),
        ..Found::default()
    };
    options.cores.client()?;

    // The client of every networked peer runs on this runtime; one thread unless asked otherwise.
    let client = match arguments.client_threads {
        0 | 1 => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?,
        n => tokio::runtime::Builder::new_multi_thread()
            .worker_threads(n)
            .enable_all()
            .build()?,
    };
    let stopped = client.block_on(async {
        let all = async {
            if wants_cells(&options) {
                found.add(
                    network::run(&options)
                        .await
                        .unwrap_or_else(|e| Found::failed("network", &e)),
                );
            }
            found.add(
                same_host::run(&options)
                    .await
                    .unwrap_or_else(|e| Found::failed("same host", &e)),
            );
            found.add(
                cluster::run(&options)
                    .await
                    .unwrap_or_else(|e| Found::failed("cluster", &e)),
            );
            found.add(
                nvme::run(&options)
                    .await
                    .unwrap_or_else(|e| Found::failed("nvme", &e)),
            );
            found.add(
                inside::run(&options)
                    .await
                    .unwrap_or_else(|e| Found::failed("lease", &e)),
            );
            found.add(facts::run(&options).await);
        };
        tokio::select! {
            () = all => false,
            _ = tokio::signal::ctrl_c() => true,
        }
    });
    drop(client);
    publish(arguments, &options, found, stopped)
}

/// Whether any networked cell may be wanted: a phase named alone excludes them.
fn wants_cells(options: &Options) -> bool {
    let phases = ["nvme", "lease", "memory", "trace", "overcommit"];
    options.only.is_empty() || options.only.iter().any(|o| !phases.contains(&o.as_str()))
}

fn publish(arguments: &Arguments, options: &Options, found: Found, stopped: bool) -> Result<()> {
    let mut bars = bars::ratios(&found.measured);
    bars.extend(found.facts);
    if !options.only.is_empty() {
        bars.retain(|bar| bar.verdict != Verdict::NotRun);
    }
    let mut text = format!(
        "{}\n{} rounds of {} ms per cell, client on {} thread(s), {}\nTerrace verifies every byte it gets and puts; no peer does. CPU is client and servers together.\n",
        procfs::machine(),
        options.rounds,
        options.window.measure.as_millis(),
        arguments.client_threads,
        if arguments.pin {
            "servers on core 0, client on core 1"
        } else {
            "nothing pinned"
        },
    );
    text.push_str(&report::tables(&found.measured));
    text.push_str(&report::bars(&bars));
    for line in &found.notes {
        text.push_str(&format!("  note: {line}\n"));
    }
    for line in &found.skipped {
        text.push_str(&format!("  skipped: {line}\n"));
    }
    if stopped {
        text.push_str("  stopped before the end\n");
    }
    let to_stdout = arguments
        .json
        .as_deref()
        .is_some_and(|p| p.as_os_str() == "-");
    match to_stdout {
        true => std::io::stderr().write_all(text.as_bytes())?,
        false => std::io::stdout().write_all(text.as_bytes())?,
    }
    if let Some(path) = &arguments.json {
        let rows = serde_json::to_string_pretty(&report::rows(&found.measured))? + "\n";
        match to_stdout {
            true => std::io::stdout().write_all(rows.as_bytes())?,
            false => {
                std::fs::write(path, rows).with_context(|| format!("writing {}", path.display()))?
            }
        }
    }
    if let Some(path) = &arguments.bars_json {
        let summary = Summary {
            machine: procfs::machine(),
            rounds: options.rounds,
            cell_ms: options.window.measure.as_millis() as u64,
            pinned: arguments.pin,
            client_threads: arguments.client_threads,
            skipped: found.skipped,
            notes: found.notes,
            bars,
        };
        std::fs::write(path, serde_json::to_string_pretty(&summary)? + "\n")
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
