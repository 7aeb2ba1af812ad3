//! What a simulation found, for people and as JSON.

use std::{
    num::NonZeroUsize,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use kvproto::{MemberState, RunHash, View, placement::Placement};
use kvserver::clock::Clock;
use serde::Serialize;

use super::{
    Args, Watched,
    client::Tally,
    town::{SETTLE, TIMES, Town},
};
use crate::context::{size, table};

/// Bytes moved over those that had to, at most.
const MOST_MOVED: f64 = 1.02;

/// From the last change, or the end of a cut, until all agree: a tombstone of somebody who lives goes to him, and his
/// answer to all.
const LONGEST_CONVERGENCE: Duration = Duration::from_secs(6);

/// Of the reads of runs that many read: half at each of two that have one, and all at its owner where the one behind it is as
/// busy itself, or was not named yet.
const ELSEWHERE: std::ops::Range<f64> = 0.1..0.6;

/// In less than this what many read has not spread yet.
const SPREAD: Duration = Duration::from_secs(10);

/// What a run is held to.
struct Bars {
    /// See [`Setting`](super::feed::Setting).
    is_bill_judged: bool,
    /// All could agree.
    was_quiet: bool,
    /// Many read a few prompts for long enough.
    is_spread_judged: bool,
    /// They have stopped for long enough.
    has_cooled: bool,
}

/// The outcome of a run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) nodes: u32,
    pub(super) scenario: String,
    pub(super) seed: u64,
    pub(super) replicas: usize,
    pub(super) simulated_s: u64,
    pub(super) wall_s: f64,
    /// Promises that were broken, in words; how to see it again.
    pub(super) broken: Vec<String>,
    pub(super) again: String,
    /// Things that befell members, changes of the true view that came of them, different views that anybody had.
    pub(super) events: u64,
    pub(super) view_changes: u64,
    pub(super) views: u64,
    /// Bytes that moved between nodes (pushed and fetched), and those that had to.
    pub(super) moved_bytes: u64,
    pub(super) pushed_bytes: u64,
    pub(super) fetched_bytes: u64,
    pub(super) changed_owner_bytes: u64,
    /// Of the moved ones, those that a node had given up for want of room and got again.
    pub(super) came_again_bytes: u64,
    /// Moved, without what came again, over what had to; 0 when nothing moved.
    pub(super) moved_over_ideal: f64,
    /// Bytes of new blocks that went on to further owners.
    pub(super) copied_bytes: u64,
    /// Where many read a few prompts: how often a run got a second owner, bytes that went there, reads of these runs and
    /// those of them at another than their owner, the longest queue of gets at a node.
    pub(super) hot_copies: u64,
    pub(super) hot_bytes: u64,
    pub(super) hot_reads: u64,
    pub(super) hot_reads_elsewhere: u64,
    pub(super) longest_queue: u64,
    /// Blocks missed for a silent member although somebody else was known to have them, and had.
    pub(super) unsaved_blocks: u64,
    /// Runs of which a second owner is named at the end.
    pub(super) named_runs: u64,
    /// The greatest share of runs, relative to its weight's, in the last view.
    pub(super) max_share: f64,
    pub(super) lookups: u64,
    pub(super) asked_blocks: u64,
    pub(super) hit_blocks: u64,
    pub(super) misses: u64,
    pub(super) misses_absent: u64,
    pub(super) misses_evicted: u64,
    pub(super) misses_behind_silence: u64,
    pub(super) misses_moving: u64,
    pub(super) leased_blocks: u64,
    pub(super) read_blocks: u64,
    /// Blocks under a lease at a node that was killed, frozen, started anew or cut off before they were read.
    pub(super) stated_losses: u64,
    pub(super) unreadable_under_lease: u64,
    pub(super) wrong_blocks: u64,
    pub(super) late_calls: u64,
    /// Calls to members that were silent for so long that all should have forgotten them.
    pub(super) stale_calls: u64,
    /// Refusals, and those without the reason that they gave.
    pub(super) refused_puts: u64,
    pub(super) dishonest_answers: u64,
    pub(super) slowest_lookup_ms: f64,
    /// Blocks whose only copy was on a node that was killed; those of them that had had two, with time for another.
    pub(super) lost_blocks: u64,
    pub(super) lost_copied_blocks: u64,
    /// Bytes that drains said they left behind, and that they did not say.
    pub(super) drain_lost_bytes: u64,
    pub(super) drain_unsaid_bytes: u64,
    /// Blocks that lie with somebody at the end, and with no owner of theirs.
    pub(super) stranded_blocks: u64,
    /// How often a node was seen to hold more than it has room for.
    pub(super) overfull: u64,
    /// The longest time from a change (or the end of a cut) to all seeing it; whether all see the same at the end.
    pub(super) convergence_ms: u64,
    pub(super) is_converged: bool,
    /// What one of them sees otherwise.
    pub(super) disagreement: Option<String>,
    pub(super) peer_calls: u64,
    pub(super) history_lines: u64,
    pub(super) history_digest: String,
    /// What is the server's and the client's own code, and what stands in for it.
    pub(super) real: [&'static str; 5],
    pub(super) models: [&'static str; 4],
}

impl Args {
    pub(super) fn scenario_name(&self) -> String {
        format!("{:?}", self.scenario).to_lowercase()
    }

    /// The words that repeat this run.
    fn again(&self) -> String {
        format!(
            "kvctl simulate --nodes {} --scenario {} --seed {} --seconds {} --clients {}",
            self.nodes,
            self.scenario_name(),
            self.seed,
            self.seconds,
            self.clients
        )
    }
}

impl Report {
    /// Of the reads of runs that many read, those at another than their owner.
    fn hot_share(&self) -> f64 {
        self.hot_reads_elsewhere as f64 / self.hot_reads.max(1) as f64
    }

    pub(super) fn new(
        args: &Args,
        town: &Town,
        tally: &Tally,
        watched: &Watched,
        events: u64,
    ) -> Self {
        let (view, bill) = town.ledger.close();
        let of = |counter: &AtomicU64| counter.load(Relaxed);
        let traffic = town.traffic();
        let (pushed, fetched) = (of(&traffic.pushed_bytes), of(&traffic.fetched_bytes));
        let (history_digest, history_lines) = town.history.digest();
        let (asked_blocks, hit_blocks) = (of(&tally.asked_blocks), of(&tally.hit_blocks));
        let moved = (pushed + fetched).saturating_sub(bill.came_again_bytes);
        let mut report = Self {
            nodes: args.nodes,
            scenario: args.scenario_name(),
            seed: args.seed,
            replicas: town.setting.replicas,
            simulated_s: args.seconds,
            wall_s: 0.0,
            broken: Vec::new(),
            again: args.again(),
            events,
            view_changes: town.ledger.changes(),
            views: town.views() as u64,
            moved_bytes: pushed + fetched,
            pushed_bytes: pushed,
            fetched_bytes: fetched,
            changed_owner_bytes: bill.changed_owner_bytes,
            came_again_bytes: bill.came_again_bytes,
            moved_over_ideal: moved as f64 / bill.changed_owner_bytes.max(1) as f64,
            copied_bytes: of(&traffic.copied_bytes),
            hot_copies: town.hot_copies(),
            hot_bytes: of(&traffic.hot_bytes),
            hot_reads: of(&tally.hot.reads),
            hot_reads_elsewhere: of(&tally.hot.reads_elsewhere),
            longest_queue: of(&tally.hot.longest_queue),
            unsaved_blocks: of(&tally.hot.unsaved_blocks),
            named_runs: town.named_runs(),
            max_share: max_share(&view, args.share_runs),
            lookups: of(&tally.lookups),
            asked_blocks,
            hit_blocks,
            misses: asked_blocks - hit_blocks,
            misses_absent: of(&tally.absent_blocks),
            misses_evicted: of(&tally.evicted_blocks),
            misses_behind_silence: of(&tally.behind_silence_blocks),
            misses_moving: of(&tally.moving_blocks),
            leased_blocks: of(&tally.leased_blocks),
            read_blocks: of(&tally.read_blocks),
            stated_losses: of(&tally.stated_losses),
            unreadable_under_lease: of(&tally.unreadable_under_lease),
            wrong_blocks: of(&tally.wrong_blocks),
            late_calls: of(&tally.late_calls),
            stale_calls: of(&tally.stale_calls),
            refused_puts: of(&town.refused_puts),
            dishonest_answers: of(&town.dishonest_answers),
            slowest_lookup_ms: of(&tally.slowest_lookup_us) as f64 / 1e3,
            lost_blocks: bill.lost_blocks,
            lost_copied_blocks: bill.lost_copied_blocks,
            drain_lost_bytes: bill.drain_lost_bytes,
            drain_unsaid_bytes: bill.drain_unsaid_bytes,
            stranded_blocks: town.stranded(),
            overfull: watched.overfull,
            convergence_ms: u64::try_from(watched.longest.as_millis()).unwrap_or(u64::MAX),
            is_converged: watched.is_reached,
            disagreement: town.disagreement(),
            peer_calls: of(&traffic.calls),
            history_lines,
            history_digest,
            real: [
                "kvproto::placement",
                "kvproto::view (merging, digests)",
                "kvserver::cluster (suspicion, grace, tombstones, ramp, drain)",
                "kvserver::blocks::motion (reads during changes, moves, drains, copies, hot runs)",
                "kvclient::route (what is known, split, assembly, whom of two to ask)",
            ],
            models: [
                "gossip: news arrive after 0.2 to 1.4 s, silence is noticed after 1 to 2.5 s",
                "engine: a map with leases and a room",
                "network: 250 us each way; cut, slow or lossy where the scenario says so",
                "client: the loop around its routing, a second owner after 30 ms, no breaker",
            ],
        };
        let quiet = town.clock.now().since(town.ledger.changed());
        report.broken = report.judge(&Bars {
            is_bill_judged: town.setting.is_bill_judged,
            was_quiet: quiet >= LONGEST_CONVERGENCE,
            is_spread_judged: town.setting.hot.is_some_and(|hot| hot.lasts() >= SPREAD),
            has_cooled: town
                .setting
                .hot
                .is_some_and(|hot| hot.is_long_over(town.clock.now())),
        });
        report
    }

    /// Which promises were broken.
    fn judge(&self, bars: &Bars) -> Vec<String> {
        let counts = [
            (
                self.unreadable_under_lease,
                "blocks unreadable under a lease",
            ),
            (self.wrong_blocks, "wrong blocks"),
            (self.late_calls, "calls past their deadline"),
            (self.stale_calls, "calls to members long gone"),
            (self.dishonest_answers, "answers that were not true"),
            (
                self.lost_copied_blocks,
                "blocks lost of which there were two",
            ),
            (
                self.drain_unsaid_bytes,
                "bytes that a drain lost and did not say",
            ),
            (
                self.unsaved_blocks,
                "blocks not read where they were known to be",
            ),
            (self.overfull, "times that a node held more than its room"),
        ];
        let mut broken: Vec<String> = counts
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        if bars.is_bill_judged && self.moved_over_ideal > MOST_MOVED {
            let over = self.moved_over_ideal;
            broken.push(format!("moved {over:.4} of what had to move"));
        }
        if bars.is_spread_judged && !ELSEWHERE.contains(&self.hot_share()) {
            let share = 100.0 * self.hot_share();
            broken.push(format!(
                "{share:.1} % of the reads of hot runs at a second owner"
            ));
        }
        if bars.has_cooled && self.named_runs > 0 {
            broken.push(format!("{} cool runs have second owners", self.named_runs));
        }
        if !self.is_converged && bars.was_quiet {
            let why = self.disagreement.as_deref().unwrap_or_default();
            broken.push(format!("members do not agree at the end {why}"));
        }
        broken
    }
}

/// The greatest share over the members of `view`, of so many runs each.
fn max_share(view: &View, runs_per_member: u32) -> f64 {
    let placement = Placement::new(view);
    let takers: Vec<_> = view
        .members()
        .iter()
        .filter(|member| member.state.takes_runs() && member.weight > 0)
        .collect();
    let count = u64::from(runs_per_member) * takers.len() as u64;
    let counts: Vec<AtomicU64> = takers.iter().map(|_| AtomicU64::new(0)).collect();
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get) as u64;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (placement, takers, counts) = (&placement, &takers, &counts);
            scope.spawn(move || {
                for number in (thread..count).step_by(threads as usize) {
                    let Some(owner) = placement.first(&run(number)) else {
                        return;
                    };
                    if let Ok(at) = takers.binary_search_by(|member| member.id.cmp(owner)) {
                        counts[at].fetch_add(1, Relaxed);
                    }
                }
            });
        }
    });
    let weight: u64 = takers.iter().map(|member| u64::from(member.weight)).sum();
    let share = |(count_of, member): (&AtomicU64, &&kvproto::Member)| {
        debug_assert!(member.state != MemberState::Gone);
        let due = count as f64 * f64::from(member.weight) / weight as f64;
        count_of.load(Relaxed) as f64 / due
    };
    counts.iter().zip(&takers).map(share).fold(0.0, f64::max)
}

/// A run of this number, that looks like a hash.
fn run(number: u64) -> RunHash {
    let mut state = number;
    let mut run = [0; 32];
    for word in run.chunks_exact_mut(8) {
        word.copy_from_slice(&super::clock::mix(&mut state).to_le_bytes());
    }
    RunHash(run)
}

pub(super) fn text(report: &Report) -> String {
    let r = report;
    let row = |what: &str, value: String, note: String| vec![what.to_owned(), value, note];
    let share = |blocks: u64| 100.0 * blocks as f64 / r.asked_blocks.max(1) as f64;
    let rows = [
        row(
            "moved / had to move",
            format!("{:.4}", r.moved_over_ideal),
            format!(
                "{} of {}; {} fetched by readers, {} given up and got again",
                size(r.moved_bytes),
                size(r.changed_owner_bytes),
                size(r.fetched_bytes),
                size(r.came_again_bytes)
            ),
        ),
        row(
            "greatest share",
            format!("{:.4}", r.max_share),
            "of its weight, in the last view".into(),
        ),
        row(
            "hits",
            format!("{:.3} %", share(r.hit_blocks)),
            format!("{} lookups, {} blocks asked for", r.lookups, r.asked_blocks),
        ),
        row(
            "misses: nowhere",
            format!("{:.3} %", share(r.misses_absent)),
            format!(
                "{} blocks lost with killed nodes, computed again",
                r.lost_blocks
            ),
        ),
        row(
            "misses: given up",
            format!("{:.3} %", share(r.misses_evicted)),
            format!("for want of room; {} puts refused", r.refused_puts),
        ),
        row(
            "misses: owner silent",
            format!("{:.3} %", share(r.misses_behind_silence)),
            "until its grace is over or it is back".into(),
        ),
        row(
            "misses: on the move",
            format!("{:.3} %", share(r.misses_moving)),
            "somewhere, and not found".into(),
        ),
        row(
            "unreadable under lease",
            r.unreadable_under_lease.to_string(),
            format!(
                "of {} leased; {} more at nodes that were killed, frozen or cut off",
                r.leased_blocks, r.stated_losses
            ),
        ),
        row(
            "wrong blocks",
            r.wrong_blocks.to_string(),
            format!("of {} read and verified", r.read_blocks),
        ),
        row(
            "calls past deadline",
            r.late_calls.to_string(),
            format!("slowest lookup {:.1} ms", r.slowest_lookup_ms),
        ),
        row(
            "left behind by drains",
            size(r.drain_lost_bytes),
            format!("and said so; {} unsaid", size(r.drain_unsaid_bytes)),
        ),
        row(
            "reads elsewhere",
            format!("{:.1} %", 100.0 * r.hot_share()),
            format!(
                "of {} of hot runs; {} times a second owner, longest queue {}",
                r.hot_reads, r.hot_copies, r.longest_queue
            ),
        ),
        row(
            "convergence",
            format!("{} ms", r.convergence_ms),
            match r.is_converged {
                true => "after the last change at most; all agree at the end".into(),
                false => "at most, but they do not agree at the end".into(),
            },
        ),
    ];
    let mut text = format!(
        "{} nodes, {}, {} owners per run, seed {}: {} simulated seconds in {:.1} s, {} events, {} views, {} calls between nodes\n\n",
        r.nodes,
        r.scenario,
        r.replicas,
        r.seed,
        r.simulated_s,
        r.wall_s,
        r.events,
        r.view_changes,
        r.peer_calls
    );
    text += &table(&["", "", ""], &rows);
    text += &format!(
        "\nhistory {} of {} events\n",
        r.history_digest, r.history_lines
    );
    text += &format!(
        "\nreal code: {}\nmodels: {}\ngrace {:?}, ramp {:?}, a change is young for {:?}, moves begin {:?} after it\n",
        r.real.join("; "),
        r.models.join("; "),
        TIMES.suspect_grace,
        TIMES.join_ramp,
        TIMES.motion_window,
        SETTLE
    );
    if !r.broken.is_empty() {
        text += &format!("\nbroken: {}\nagain: {}\n", r.broken.join("; "), r.again);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::Bars;
    use crate::simulate::{Args, feed::Scenario, simulate, tests::args};

    #[test]
    fn each_broken_promise_is_said() {
        let args = Args {
            seconds: 4,
            ..args(Scenario::Calm, 1)
        };
        let report = simulate(&args).unwrap();
        assert_eq!(report.broken, [""; 0]);
        let spoilt = |spoil: fn(&mut super::Report)| {
            let mut report = report.clone();
            spoil(&mut report);
            let bars = Bars {
                is_bill_judged: true,
                was_quiet: true,
                is_spread_judged: false,
                has_cooled: true,
            };
            report.judge(&bars).len()
        };
        assert_eq!(spoilt(|_| ()), 0);
        assert_eq!(spoilt(|r| r.unreadable_under_lease = 1), 1);
        assert_eq!(spoilt(|r| r.wrong_blocks = 1), 1);
        assert_eq!(spoilt(|r| r.late_calls = 1), 1);
        assert_eq!(spoilt(|r| r.stale_calls = 1), 1);
        assert_eq!(spoilt(|r| r.dishonest_answers = 1), 1);
        assert_eq!(spoilt(|r| r.lost_copied_blocks = 1), 1);
        assert_eq!(spoilt(|r| r.drain_unsaid_bytes = 1), 1);
        assert_eq!(spoilt(|r| r.overfull = 1), 1);
        assert_eq!(spoilt(|r| r.moved_over_ideal = 1.03), 1);
        assert_eq!(spoilt(|r| r.is_converged = false), 1);
        assert_eq!(spoilt(|r| r.unsaved_blocks = 1), 1);
        assert_eq!(spoilt(|r| r.named_runs = 1), 1);
        assert_eq!(
            report.again,
            "kvctl simulate --nodes 24 --scenario calm --seed 1 --seconds 4 --clients 6"
        );
    }
}
