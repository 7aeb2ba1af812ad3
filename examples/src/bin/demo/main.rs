//! `make demo`: a real decoder gets faster because of a real node.
//!
//! ```text
//! 1  start kvserver as a child            4  SIGKILL it
//! 2  ask about a long document: cold      5  start it again on the same folder
//! 3  ask again: warm from RAM             6  ask again: warm from NVMe
//! ```
//!
//! Each prompt is also run without Terrace, from the first token on and in the same chunks, and the
//! logits of the first token and of the next ones are compared bit for bit.
//! Ctrl-C, SIGTERM and a closed terminal end the child as well.

#![allow(clippy::print_stdout, reason = "a program for people prints")]

mod report;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use kvexamples::program;

/// The same allocator as the server's: freed chunks of the model's activations go back at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Ask several questions about one long document, and see what is computed only once.
#[derive(Debug, Parser)]
#[command(name = "demo", version)]
struct Arguments {
    /// A text file to ask about; without it, the Terrace handbook.
    #[arg(long, value_name = "FILE")]
    document: Option<PathBuf>,
    /// A question; give it several times. At least three are asked: cold, warm, after the restart.
    #[arg(long = "question", value_name = "TEXT")]
    questions: Vec<String>,
    /// Tokens of the document to read at most.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..=12_288))]
    tokens: u32,
    /// The kvserver to run; without it, the one built next to this program.
    #[arg(long, value_name = "PATH")]
    kvserver: Option<PathBuf>,
    /// Where the node keeps its blocks; without it, a folder that is removed at the end.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Print one JSON object on standard output and nothing else.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    program::run("demo", async { show::run(&arguments).await })
}
