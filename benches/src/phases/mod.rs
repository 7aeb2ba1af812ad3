//! What is run, phase after phase; servers of one phase do not outlive it.
//!
//! ```text
//!   network   gets, puts and lookups against every peer, TCP and Unix sockets     client on its own runtime
//!   same host shared memory, beside memcpy, a bare request and reply, and Mooncake's daemon
//!   cluster   three and eight nodes beside one, and what as many processes cost alone   a process each
//!   nvme      blocks that lie on the disk, beside direct reads of the same disk   node in this process, and by gRPC
//!   lease     a reference without a copy                                          node in this process
//!   memory    resident bytes per stored byte            ┐
//!   trace     hit share on a recorded trace             ├ facts: no rounds
//!   overcommit  four times RAM, every stored block read ┘
//! ```

pub mod cluster;
pub mod facts;
pub mod floor;
pub mod inside;
pub mod memory;
pub mod network;
pub mod nvme;
pub mod overcommit;
pub mod same_host;
pub mod trace;

use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};

use crate::bars::Bar;
use crate::load::Window;
use crate::rounds::{self, Cell, Group, Measured, Op, Peer};
use crate::spawn::Cores;

/// How everything is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Interleaved rounds.
    pub rounds: usize,
    /// Warm-up and length of a cell.
    pub window: Window,
    /// Bytes of values per size and server.
    pub working_set_bytes: u64,
    /// Where servers and clients run.
    pub cores: Cores,
    /// Connections of Terrace's client; None: its own default.
    pub connections: Option<usize>,
    /// Parts of names; empty means everything.
    pub only: Vec<String>,
    /// A recorded trace to replay.
    pub trace: Option<PathBuf>,
    /// Scratch folder, on the disk that is measured.
    pub dir: PathBuf,
    /// Whether a bar of progress is wanted.
    pub progress: bool,
    /// Whether what is missing may be installed.
    pub installs: bool,
}

impl Options {
    /// Whether something of this name is wanted.
    pub fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }

    /// A bar of progress for these groups.
    fn bar(&self, phase: &'static str, groups: &[Group]) -> ProgressBar {
        if !self.progress {
            return ProgressBar::hidden();
        }
        let cells: usize = groups.iter().map(|g| g.cells.len()).sum();
        let bar = ProgressBar::new((cells * self.rounds) as u64).with_prefix(phase);
        let style = ProgressStyle::with_template(
            "{prefix:10} {bar:30} {pos}/{len} {elapsed_precise} left {eta_precise}  {wide_msg}",
        );
        bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    }

    /// Runs these groups over these peers, showing how far it is.
    pub async fn measure(
        &self,
        phase: &'static str,
        peers: &mut [Box<dyn Peer>],
        groups: &[Group],
    ) -> Vec<Measured> {
        let progress = self.bar(phase, groups);
        let measured = rounds::run(peers, groups, self.rounds, self.window, &progress).await;
        progress.finish_and_clear();
        measured
    }

    fn spinner(&self, phase: &'static str) -> ProgressBar {
        if !self.progress {
            return ProgressBar::hidden();
        }
        let style =
            ProgressStyle::with_template("{prefix:10} {spinner} {elapsed_precise}  {wide_msg}");
        let bar = ProgressBar::new_spinner().with_prefix(phase);
        let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        bar
    }
}

/// What `--only` is matched against: `get tcp 1MiB c8 redis`.
pub fn label(cell: &Cell) -> String {
    let size = crate::report::size(cell.bytes).replace(' ', "");
    let batch = match (cell.op, cell.keys) {
        (Op::Get | Op::Put, 2..) => " batch",
        _ => "",
    };
    format!(
        "{}{batch} {} {size} c{} {}",
        cell.op.as_str(),
        cell.transport.as_str(),
        cell.concurrency,
        cell.peer
    )
}

/// What a phase found.
#[derive(Debug, Default)]
pub struct Found {
    /// Cells.
    pub measured: Vec<Measured>,
    /// Bars of facts; those of ratios are derived from the cells.
    pub facts: Vec<Bar>,
    /// What was left out, and why.
    pub skipped: Vec<String>,
    /// What a reader must know of the cells.
    pub notes: Vec<String>,
}

impl Found {
    /// Adds what another phase found.
    pub fn add(&mut self, other: Found) {
        self.measured.extend(other.measured);
        self.facts.extend(other.facts);
        self.skipped.extend(other.skipped);
        self.notes.extend(other.notes);
    }

    /// Notes a phase that failed as a whole.
    pub fn failed(phase: &str, error: &anyhow::Error) -> Self {
        Self {
            skipped: vec![format!("{phase}: {error:#}")],
            ..Self::default()
        }
    }
}
