//! `kvctl simulate`: a cluster of a thousand nodes in this process, on a clock that only goes where somebody waits.
//!
//! ```text
//! seed ─► feed (what befalls whom) ─► town (nodes) ◄─ callers        clock: events in order, no moment twice
//!                                       │   └─► ledger: what really is        history: every event, as a digest
//!                                       └─► report
//! real     placement, view merging, membership transitions, motion (reads during changes, moves, drains), client routing
//! models   gossip (delays), the engine (a map with leases), the network (250 µs), the client's loop around its routing
//! ```
//!
//! The same seed gives the same history to the byte; `history_digest` says so, `--history FILE` keeps it. The real
//! gossip is exercised elsewhere, where bounds are asserted instead of histories.
//! Units: simulated seconds, bytes. Errors: a file that cannot be written.

mod client;
mod clock;
mod feed;
mod history;
mod ledger;
mod report;
mod town;
mod wire;

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use kvserver::clock::{Clock, Tick};

use self::{
    client::{Caller, Tally},
    clock::SimClock,
    feed::{Scenario, events},
    history::History,
    report::Report,
    town::{RUN_BLOCKS, Town},
};
use crate::context::Context;

/// Flags of `simulate`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// Nodes at the start
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(4..=4000))]
    nodes: u32,
    /// What befalls them
    #[arg(long, value_enum, default_value_t = Scenario::Churn)]
    scenario: Scenario,
    /// Everything that is left to chance follows from it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Simulated seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(4..=3600))]
    seconds: u64,
    /// Callers
    #[arg(long, default_value_t = 48)]
    clients: u32,
    /// Runs per node with which shares are judged at the end
    #[arg(long, default_value_t = 10_000)]
    share_runs: u32,
    /// Write every event to this file
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
}

/// Prompts per node: with eight runs each, sixteen runs lie on a node.
const PROMPTS_PER_NODE: u32 = 2;
/// Mean pause of a caller between two lookups.
const PAUSE_MS: u64 = 250;
/// How often it is looked whether all see the same members.
const LOOK: Duration = Duration::from_millis(100);

pub(crate) async fn run(context: &Context, args: Args) -> Result<()> {
    let began = context.clock.now();
    // It has a runtime of its own, on a thread of its own.
    let outcome = tokio::task::spawn_blocking(move || simulate(&args)).await??;
    let mut report = outcome;
    report.wall_s = context.clock.now().since(began).as_secs_f64();
    context.print(&report, report::text)
}

fn simulate(args: &Args) -> Result<Report> {
    let file = args.history.as_ref().map(|path| {
        let file =
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        anyhow::Ok(Box::new(BufWriter::new(file)) as Box<dyn Write + Send>)
    });
    let file = file.transpose()?;
    // All tasks run until nobody can go on before the root is asked again: that is what makes a moment whole.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .event_interval(u32::MAX)
        .build()?;
    runtime.block_on(live(args, file))
}

async fn live(args: &Args, file: Option<Box<dyn Write + Send>>) -> Result<Report> {
    let clock = SimClock::new(args.seed);
    let history = History::new(clock.clone(), file);
    let town = Town::new(clock.clone(), Arc::clone(&history));
    town.found(args.nodes as usize);
    let prompts = (args.nodes * PROMPTS_PER_NODE).max(16);
    fill(&town, prompts);

    let tally = Arc::new(Tally::default());
    for number in 0..args.clients as usize {
        let caller = Caller::new(
            Arc::clone(&town),
            Arc::clone(&tally),
            prompts,
            number,
            args.seed,
        );
        tokio::spawn(caller.work(PAUSE_MS));
    }
    let feed = events(args.scenario, args.nodes as usize, args.seconds, args.seed);
    let befallen = feed.len() as u64;
    for (at, event) in feed {
        let (town, clock) = (Arc::clone(&town), clock.clone());
        tokio::spawn(async move {
            clock.sleep(at.since(clock.now())).await;
            town.befall(event).await;
        });
    }
    let agreement = Arc::new(parking_lot::Mutex::new(Agreement::default()));
    tokio::spawn(watch(Arc::clone(&town), Arc::clone(&agreement)));

    let end = Tick(Duration::from_secs(args.seconds));
    loop {
        // Once for those who can go on, once more for those who yielded.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        if !clock.next(end) {
            break;
        }
    }
    let agreement = agreement.lock().clone();
    Ok(Report::new(args, &town, &tally, &agreement, befallen))
}

/// Every prompt at the owners of its runs.
fn fill(town: &Town, prompts: u32) {
    for number in 0..prompts {
        let chain = town.prompt(number);
        for i in 0..chain.len() {
            let owner = town.ledger.owner(&chain.place(i, RUN_BLOCKS).run);
            if let Some(node) = owner.and_then(|owner| town.named(&owner)) {
                town.put(&node, &chain, i);
            }
        }
    }
}

/// How long it took until all saw the same members.
#[derive(Clone, Debug, Default)]
struct Agreement {
    /// The longest time from the last of some changes to all seeing them.
    longest: Duration,
    /// Whether all agreed when it was last looked.
    is_reached: bool,
}

async fn watch(town: Arc<Town>, agreement: Arc<parking_lot::Mutex<Agreement>>) {
    loop {
        let is_reached = town.is_agreed();
        let now = town.clock.now();
        {
            let mut agreement = agreement.lock();
            if is_reached && !agreement.is_reached {
                let took = now.since(town.ledger.changed());
                agreement.longest = agreement.longest.max(took);
                town.history
                    .note(format_args!("agreed {}", took.as_millis()));
            }
            agreement.is_reached = is_reached;
        }
        town.clock.sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::{Args, Scenario, simulate};

    fn args(scenario: Scenario, seed: u64) -> Args {
        Args {
            nodes: 24,
            scenario,
            seed,
            seconds: 40,
            clients: 6,
            share_runs: 1000,
            history: None,
        }
    }

    #[test]
    fn a_seed_has_one_history_and_another_seed_another() {
        let digest = |seed| {
            simulate(&args(Scenario::Churn, seed))
                .unwrap()
                .history_digest
        };
        assert_eq!(digest(7), digest(7));
        assert_ne!(digest(7), digest(8));
    }

    #[test]
    fn nothing_moves_and_nothing_is_missed_where_nothing_happens() {
        let report = simulate(&args(Scenario::Calm, 1)).unwrap();
        assert!(report.lookups > 100, "{report:?}");
        assert_eq!((report.moved_bytes, report.changed_owner_bytes), (0, 0));
        assert_eq!((report.hit_blocks, report.misses), (report.asked_blocks, 0));
        assert_eq!(
            (
                report.unreadable_under_lease,
                report.wrong_blocks,
                report.late_calls
            ),
            (0, 0, 0)
        );
    }

    #[test]
    fn changes_move_what_changed_owner_and_break_no_lease() {
        for scenario in [
            Scenario::Grow,
            Scenario::Shrink,
            Scenario::Crash,
            Scenario::Churn,
        ] {
            for seed in 1..4 {
                let report = simulate(&args(scenario, seed)).unwrap();
                // What a killed node had is lost, not moved.
                let moves = scenario != Scenario::Crash;
                assert!(
                    !moves || report.changed_owner_bytes > 0,
                    "{scenario:?} {seed}"
                );
                assert!(
                    report.moved_over_ideal <= 1.02,
                    "{scenario:?} {seed}: {report:?}"
                );
                assert_eq!(
                    report.unreadable_under_lease, 0,
                    "{scenario:?} {seed}: {report:?}"
                );
                assert_eq!(
                    (report.wrong_blocks, report.late_calls),
                    (0, 0),
                    "{scenario:?} {seed}: {report:?}"
                );
                assert!(report.is_converged, "{scenario:?} {seed}: {report:?}");
            }
        }
    }
}
