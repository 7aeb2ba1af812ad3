//! `make demo-cluster`: three nodes are one service; one is killed, another joins, and requests never stop.
//!
//! ```text
//! 1  three nodes, two of them started with --join        4  SIGKILL one: its blocks are computed again
//! 2  ask about several documents: cold                   5  start another with --join: runs move to it
//! 3  ask again: warm, from whichever node owns a run     6  ask again: warm
//! ```
//!
//! Every prompt is also run once without Terrace, and the logits of every answer are compared with it bit for bit,
//! those included that were given while a node died.
//! Ctrl-C, SIGTERM and a closed terminal end the nodes as well.

#![allow(clippy::print_stdout, reason = "a program for people prints")]

mod fleet;
mod report;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use kvexamples::program;

/// The same allocator as the server's: freed chunks of the model's activations go back at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Ask about several documents while nodes come and go, and see what it costs.
#[derive(Debug, Parser)]
#[command(name = "demo_cluster", version)]
struct Arguments {
    /// Documents, each of 768 tokens
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(2..=5))]
    documents: u32,
    /// A model of a few thousand weights: the same scenes in seconds, without much to gain
    #[arg(long)]
    tiny: bool,
    /// The kvserver to run; without it, the one built next to this program
    #[arg(long, value_name = "PATH")]
    kvserver: Option<PathBuf>,
    /// Print one JSON object on standard output and nothing else
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    program::run("demo_cluster", async { show::run(&arguments).await })
}
