//! What blocks on their way between nodes count.

use kvproto::Reason;
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, Registry};

use super::{make::Make, names};
use crate::blocks::motion::Kept;

/// Motion's metrics.
pub struct MotionMetrics {
    fetched: [IntCounter; 4],
    fetched_bytes: IntCounter,
    /// Time per run fetched, over all candidates.
    pub fetch_seconds: Histogram,
    /// Runs handed over to their new owner.
    pub moved_runs: IntCounter,
    /// Bytes of blocks handed over.
    pub moved_bytes: IntCounter,
    /// Time per run handed over.
    pub move_seconds: Histogram,
    waiting_runs: IntGauge,
    waiting_bytes: IntGauge,
    refused: IntCounterVec,
    /// Blocks passed on to a run's next owner.
    pub replica_blocks: IntCounter,
    /// Runs of this node that have a second owner now, because many read them.
    pub hot_runs: IntGauge,
    /// Second owners given.
    pub hot_copies: IntCounter,
    /// Calls of peers being served.
    pub peer_calls: IntGauge,
}

/// Labels of `fetched`, in the order of its counters.
const RESULTS: [&str; 4] = ["kept", "present", "refused", "corrupt"];

impl MotionMetrics {
    pub(super) fn new(r: &Make<'_>) -> Self {
        let fetched = r.counters(
            names::MOTION_FETCHED_BLOCKS,
            "Blocks that came from peers, by result.",
            &["result"],
        );
        let seconds = |name, help| r.histograms(name, help, &[]).with_label_values::<&str>(&[]);
        Self {
            fetched: RESULTS.map(|result| fetched.with_label_values(&[result])),
            fetched_bytes: r.counter(
                names::MOTION_FETCHED_BYTES,
                "Bytes of blocks that came from peers.",
            ),
            fetch_seconds: seconds(names::MOTION_FETCH_SECONDS, "Time per run fetched."),
            moved_runs: r.counter(
                names::MOTION_MOVED_RUNS,
                "Runs handed over to another owner.",
            ),
            moved_bytes: r.counter(
                names::MOTION_MOVED_BYTES,
                "Bytes handed over to another owner.",
            ),
            move_seconds: seconds(names::MOTION_MOVE_SECONDS, "Time per run handed over."),
            waiting_runs: r.gauge(names::MOTION_WAITING_RUNS, "Runs that are to move."),
            waiting_bytes: r.gauge(names::MOTION_WAITING_BYTES, "Bytes that are to move."),
            refused: r.counters(
                names::MOTION_REFUSED,
                "Blocks that could not move or be fetched.",
                &["reason"],
            ),
            replica_blocks: r.counter(
                names::MOTION_REPLICA_BLOCKS,
                "Blocks passed on to a further owner.",
            ),
            hot_runs: r.gauge(
                names::MOTION_HOT_RUNS,
                "Runs that have a second owner for a while.",
            ),
            hot_copies: r.counter(
                names::MOTION_HOT_COPIES,
                "Runs given to a second owner, because many read them.",
            ),
            peer_calls: r.gauge(names::PEER_CALLS, "Calls of other nodes being served."),
        }
    }

    /// Metrics that nobody scrapes: a node of a simulation has no registry.
    #[must_use]
    pub fn alone() -> Self {
        Self::new(&Make(&Registry::new()))
    }

    /// Counts a block that came from a peer.
    pub fn fetched(&self, kept: Kept, bytes: u64) {
        let result = match kept {
            Kept::New => 0,
            Kept::Present => 1,
            Kept::Refused(reason) => {
                self.refused(reason);
                2
            }
            Kept::Corrupt => 3,
        };
        self.fetched[result].inc();
        self.fetched_bytes.inc_by(bytes);
    }

    /// Counts a block, or a run's fetch, that was refused.
    pub fn refused(&self, reason: Reason) {
        self.refused.with_label_values(&[reason.as_str()]).inc();
    }

    /// What is to move.
    pub fn waiting(&self, runs: u64, bytes: u64) {
        let signed = |n| i64::try_from(n).unwrap_or(i64::MAX);
        self.waiting_runs.set(signed(runs));
        self.waiting_bytes.set(signed(bytes));
    }
}
