//! Interleaved rounds: what is compared runs within a second or two of each other, in an order that turns every round.
//!
//! ```text
//!   round 0   group 1: A B C   group 2: A B   ...
//!   round 1   group 1: B C A   group 2: B A   ...
//!   round 2   group 1: C A B   ...
//! ```
//!
//! A group holds the cells that are compared with each other; the first cell is what the ratios refer to unless the group
//! says otherwise. A cell that fails keeps its reason, and the run goes on without it.

use std::pin::Pin;

use anyhow::Result;
use indicatif::ProgressBar;

use crate::load::{Sample, Window};

/// A future on the thread of the run.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What is measured: one row of the report.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cell {
    /// Whose.
    pub peer: &'static str,
    /// What it does.
    pub op: Op,
    /// Over what.
    pub transport: Transport,
    /// Payload of one operation.
    pub bytes: u64,
    /// Operations in flight.
    pub concurrency: usize,
    /// Keys of one operation; 1 for a get or put.
    pub keys: u32,
}

/// What one operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// One value into the caller's buffer.
    Get,
    /// One value from the caller's buffer.
    Put,
    /// Which of a list of keys are there; promises nothing.
    Exists,
    /// The same with a lease that is given back: what is there stays there meanwhile.
    LookupLease,
    /// A reference to the bytes under a lease; no byte is copied or verified.
    Lease,
    /// One value that lies on the disk.
    NvmeGet,
    /// A copy in memory.
    Copy,
}

impl Op {
    /// As it is written in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put => "put",
            Self::Exists => "exists",
            Self::LookupLease => "lookup_lease",
            Self::Lease => "lease",
            Self::NvmeGet => "nvme_get",
            Self::Copy => "copy",
        }
    }
}

/// What lies between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Loopback TCP.
    Tcp,
    /// A Unix socket.
    Unix,
    /// Shared memory, and a Unix socket for words.
    Shared,
    /// A function call.
    InProcess,
}

impl Transport {
    /// As it is written in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Shared => "shm",
            Self::InProcess => "in-process",
        }
    }
}

/// Something that can run cells.
pub trait Peer {
    /// Runs one cell for one window.
    ///
    /// # Errors
    /// The cell's figure would be worthless: a miss, a refusal, a broken connection.
    fn run<'a>(&'a mut self, cell: &'a Cell, window: Window) -> Pending<'a, Result<Sample>>;
}

/// Cells that are compared with each other.
#[derive(Clone, Debug)]
pub struct Group {
    /// Each with the number of its peer.
    pub cells: Vec<(usize, Cell)>,
    /// Which of them the reported ratios refer to.
    pub base: usize,
}

/// A cell and what became of it in each round.
#[derive(Clone, Debug)]
pub struct Series {
    /// The cell.
    pub cell: Cell,
    /// One sample per round; None where it failed or was not run.
    pub samples: Vec<Option<Sample>>,
    /// The first failure.
    pub failure: Option<String>,
}

impl Series {
    /// One figure of every round.
    pub fn values(&self, figure: impl Fn(&Sample) -> Option<f64>) -> Vec<Option<f64>> {
        self.samples
            .iter()
            .map(|s| s.as_ref().and_then(&figure))
            .collect()
    }
}

/// A measured group.
#[derive(Clone, Debug)]
pub struct Measured {
    /// In the order of the group.
    pub series: Vec<Series>,
    /// Which of them the reported ratios refer to.
    pub base: usize,
}

/// Runs all groups, `rounds` times.
pub async fn run(
    peers: &mut [Box<dyn Peer>],
    groups: &[Group],
    rounds: usize,
    window: Window,
    progress: &ProgressBar,
) -> Vec<Measured> {
    let mut measured: Vec<Measured> = groups
        .iter()
        .map(|g| Measured {
            base: g.base,
            series: g
                .cells
                .iter()
                .map(|(_, cell)| Series {
                    cell: cell.clone(),
                    samples: Vec::with_capacity(rounds),
                    failure: None,
                })
                .collect(),
        })
        .collect();
    for round in 0..rounds {
        for (group, measured) in groups.iter().zip(&mut measured) {
            for turn in 0..group.cells.len() {
                let at = (round + turn) % group.cells.len();
                let ((peer, cell), series) = (&group.cells[at], &mut measured.series[at]);
                progress.set_message(format!(
                    "round {}/{rounds}: {} {} {} {} c{}",
                    round + 1,
                    cell.peer,
                    cell.op.as_str(),
                    cell.transport.as_str(),
                    crate::report::size(cell.bytes),
                    cell.concurrency
                ));
                let sample = peers[*peer].run(cell, window).await;
                if let Err(error) = &sample {
                    series
                        .failure
                        .get_or_insert_with(|| format!("round {}: {error:#}", round + 1));
                }
                series.samples.push(sample.ok());
                progress.inc(1);
            }
        }
    }
    measured
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;
    use std::time::Duration;

    use super::*;

    struct Recorder(Rc<RefCell<Vec<&'static str>>>);
    impl Peer for Recorder {
        fn run<'a>(&'a mut self, cell: &'a Cell, _: Window) -> Pending<'a, Result<Sample>> {
            self.0.borrow_mut().push(cell.peer);
            Box::pin(async move {
                anyhow::ensure!(cell.peer != "broken", "out of order");
                Ok(Sample {
                    ops: 1,
                    ..Sample::default()
                })
            })
        }
    }

    #[tokio::test]
    async fn order_turns_and_a_failure_stops_nobody_else() {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let cell = |peer| Cell {
            peer,
            op: Op::Get,
            transport: Transport::Tcp,
            bytes: 1,
            concurrency: 1,
            keys: 1,
        };
        let group = Group {
            cells: vec![(0, cell("a")), (0, cell("broken")), (0, cell("c"))],
            base: 0,
        };
        let window = Window {
            warm: Duration::ZERO,
            measure: Duration::ZERO,
        };
        let mut peers: Vec<Box<dyn Peer>> = vec![Box::new(Recorder(seen.clone()))];
        let measured = run(&mut peers, &[group], 3, window, &ProgressBar::hidden()).await;
        assert_eq!(
            *seen.borrow(),
            ["a", "broken", "c", "broken", "c", "a", "c", "a", "broken"]
        );
        let series = &measured[0].series;
        assert!(
            series[0].samples.iter().all(Option::is_some)
                && series[1].samples.iter().all(Option::is_none)
        );
        assert_eq!(series[1].failure.as_deref(), Some("round 1: out of order"));
    }
}
