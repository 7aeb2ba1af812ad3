//! What a simulation found, for people and as JSON.

use std::{
    num::NonZeroUsize,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use kvproto::{MemberState, RunHash, View, placement::Placement};
use serde::Serialize;

use super::{
    Agreement, Args,
    client::Tally,
    town::{SETTLE, TIMES, Town},
};
use crate::context::{size, table};

/// The outcome of a run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) nodes: u32,
    pub(super) scenario: String,
    pub(super) seed: u64,
    pub(super) simulated_s: u64,
    pub(super) wall_s: f64,
    /// Things that befell members, and changes of the true view that came of them.
    pub(super) events: u64,
    pub(super) view_changes: u64,
    /// Bytes that moved between nodes (pushed and fetched), and those that had to.
    pub(super) moved_bytes: u64,
    pub(super) pushed_bytes: u64,
    pub(super) fetched_bytes: u64,
    pub(super) changed_owner_bytes: u64,
    /// The first over the second; 0 when nothing moved.
    pub(super) moved_over_ideal: f64,
    /// The greatest share of runs, relative to its weight's, in the last view.
    pub(super) max_share: f64,
    pub(super) lookups: u64,
    pub(super) asked_blocks: u64,
    pub(super) hit_blocks: u64,
    pub(super) misses: u64,
    pub(super) misses_absent: u64,
    pub(super) misses_behind_silence: u64,
    pub(super) misses_moving: u64,
    pub(super) leased_blocks: u64,
    pub(super) read_blocks: u64,
    /// Blocks under a lease at a node that was killed or frozen before they were read.
    pub(super) stated_losses: u64,
    pub(super) unreadable_under_lease: u64,
    pub(super) wrong_blocks: u64,
    pub(super) late_calls: u64,
    pub(super) slowest_lookup_ms: f64,
    /// Blocks whose only copy was on a node that was killed; bytes that drains left behind.
    pub(super) lost_blocks: u64,
    pub(super) drain_lost_bytes: u64,
    /// The longest time from a change to all seeing it; whether all see the same at the end.
    pub(super) convergence_ms: u64,
    pub(super) is_converged: bool,
    pub(super) peer_calls: u64,
    pub(super) history_lines: u64,
    pub(super) history_digest: String,
    /// What is the server's and the client's own code, and what stands in for it.
    pub(super) real: [&'static str; 5],
    pub(super) models: [&'static str; 4],
}

impl Report {
    pub(super) fn new(
        args: &Args,
        town: &Town,
        tally: &Tally,
        agreement: &Agreement,
        events: u64,
    ) -> Self {
        let (view, bill) = town.ledger.close();
        let of = |counter: &AtomicU64| counter.load(Relaxed);
        let (pushed, fetched) = (
            of(&town.traffic.pushed_bytes),
            of(&town.traffic.fetched_bytes),
        );
        let (history_digest, history_lines) = town.history.digest();
        let (asked_blocks, hit_blocks) = (of(&tally.asked_blocks), of(&tally.hit_blocks));
        let over = (pushed + fetched) as f64 / bill.changed_owner_bytes.max(1) as f64;
        Self {
            nodes: args.nodes,
            scenario: format!("{:?}", args.scenario).to_lowercase(),
            seed: args.seed,
            simulated_s: args.seconds,
            wall_s: 0.0,
            events,
            view_changes: town.ledger.changes(),
            moved_bytes: pushed + fetched,
            pushed_bytes: pushed,
            fetched_bytes: fetched,
            changed_owner_bytes: bill.changed_owner_bytes,
            moved_over_ideal: over,
            max_share: max_share(&view, args.share_runs),
            lookups: of(&tally.lookups),
            asked_blocks,
            hit_blocks,
            misses: asked_blocks - hit_blocks,
            misses_absent: of(&tally.absent_blocks),
            misses_behind_silence: of(&tally.behind_silence_blocks),
            misses_moving: of(&tally.moving_blocks),
            leased_blocks: of(&tally.leased_blocks),
            read_blocks: of(&tally.read_blocks),
            stated_losses: of(&tally.stated_losses),
            unreadable_under_lease: of(&tally.unreadable_under_lease),
            wrong_blocks: of(&tally.wrong_blocks),
            late_calls: of(&tally.late_calls),
            slowest_lookup_ms: of(&tally.slowest_lookup_us) as f64 / 1e3,
            lost_blocks: bill.lost_blocks,
            drain_lost_bytes: bill.drain_lost_bytes,
            convergence_ms: u64::try_from(agreement.longest.as_millis()).unwrap_or(u64::MAX),
            is_converged: agreement.is_reached,
            peer_calls: of(&town.traffic.calls),
            history_lines,
            history_digest,
            real: [
                "kvproto::placement",
                "kvproto::view (merging, digests)",
                "kvserver::cluster (suspicion, grace, tombstones, ramp, drain)",
                "kvserver::blocks::motion (reads during changes, moves, drains)",
                "kvclient::route (what is known, split, assembly)",
            ],
            models: [
                "gossip: news arrive after 0.2 to 1.4 s, silence is noticed after 1 to 2.5 s",
                "engine: a map with leases, never full",
                "network: 250 us each way, nothing is lost on it",
                "client: the loop around its routing, no breaker, no hedging",
            ],
        }
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
                "{} of {}; {} fetched by readers",
                size(r.moved_bytes),
                size(r.changed_owner_bytes),
                size(r.fetched_bytes)
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
                "of {} leased; {} more at nodes that were killed or frozen",
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
            String::new(),
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
        "{} nodes, {}, seed {}: {} simulated seconds in {:.1} s, {} events, {} views, {} calls between nodes\n\n",
        r.nodes,
        r.scenario,
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
    text
}
