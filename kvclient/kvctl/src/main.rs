//! `kvctl`: Terrace from the command line.
//!
//! ```text
//! kvctl ── status namespaces put get lookup
//!      ── invalidate ────────────────────────► a node, through kvclient
//!      ── cluster ───────────────────────────► a node of the cluster, by its Cluster service
//!      ── bench ─────────────────────────────► a node, under load
//!      ── replay ────────────────────────────► a policy alone, or a node
//!      ── simulate ──────────────────────────► a thousand nodes in this process
//!      ── doctor ────────────────────────────► this machine
//! ```
//!
//! Output is for people; `--json` prints one JSON object on standard output instead. Progress goes to
//! standard error, and only to a terminal. Errors say what to do next.
#![forbid(unsafe_code)]

mod bench;
mod cluster;
mod context;
mod doctor;
mod get;
mod invalidate;
mod key;
mod lookup;
mod namespaces;
mod put;
mod replay;
mod simulate;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::context::{Context, Global};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Terrace from the command line.
#[derive(Parser)]
#[command(name = "kvctl", version, about, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// What the node holds and has done
    Status(status::Args),
    /// The namespaces there are, and what is there of each
    Namespaces(namespaces::Args),
    /// Store a file under a key
    Put(put::Args),
    /// Fetch what is stored under a key
    Get(get::Args),
    /// Say what is present under keys, and where
    Lookup(lookup::Args),
    /// Forget a key, a prefix or a whole namespace
    Invalidate(invalidate::Args),
    /// Who is here, who owns what; weight, drain and explain
    Cluster(cluster::Args),
    /// Put a node under load and measure it
    Bench(bench::Args),
    /// Judge eviction policies on a recorded trace
    Replay(replay::Args),
    /// A cluster of a thousand nodes on a clock of its own: what changes cost
    Simulate(simulate::Args),
    /// Check this machine and say what to do
    Doctor(doctor::Args),
}

fn main() -> ExitCode {
    let Cli { global, command } = Cli::parse();
    let context = Context::new(global);
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(&context, command)));
    match outcome {
        Ok(code) => code,
        Err(error) => {
            context.fail(&error);
            ExitCode::FAILURE
        }
    }
}

async fn run(context: &Context, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Status(args) => status::run(context, args).await?,
        Command::Namespaces(args) => return namespaces::run(context, args).await,
        Command::Put(args) => put::run(context, args).await?,
        Command::Get(args) => get::run(context, args).await?,
        Command::Lookup(args) => return lookup::run(context, args).await,
        Command::Invalidate(args) => invalidate::run(context, args).await?,
        Command::Cluster(args) => cluster::run(context, args).await?,
        Command::Bench(args) => return bench::run(context, args).await,
        Command::Replay(args) => replay::run(context, args).await?,
        Command::Simulate(args) => return simulate::run(context, args).await,
        Command::Doctor(args) => return doctor::run(context, args).await,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_agrees_with_itself() {
        super::Cli::command().debug_assert();
    }
}
