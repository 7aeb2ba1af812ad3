//! `kvctl cluster`: who is here, who owns what, and what people do about it.
//!
//! ```text
//! members (what is meant when nothing is said) ─► View
//! weight, drain, resume ─► View, to find the node by its name ─► that node
//! explain ─► Explain, and every member whether it has the block
//! ```

mod change;
mod explain;
mod members;
mod service;

use anyhow::Result;
use clap::Subcommand;

use crate::context::Context;

/// Flags of `cluster`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Members, how they stand, and their shares against their weights
    Members,
    /// Give a node another share of the blocks
    Weight(change::Weight),
    /// Have a node hand over what it has, and leave
    Drain(change::Drain),
    /// Have a drained node take blocks again
    Resume(change::Resume),
    /// Who owns a key, who did until lately, and where its first block is
    Explain(explain::Explain),
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<()> {
    match args.command.unwrap_or(Command::Members) {
        Command::Members => members::run(context).await,
        Command::Weight(args) => change::weight(context, args).await,
        Command::Drain(args) => change::drain(context, args).await,
        Command::Resume(args) => change::resume(context, args).await,
        Command::Explain(args) => explain::run(context, args).await,
    }
}
