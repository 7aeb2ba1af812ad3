//! `kvctl simulate`: a cluster of a thousand nodes in this process, on a clock that only goes where somebody waits.
//!
//! ```text
//! seed ─► feed (what befalls whom) ─► town (nodes) ◄─ callers        clock: events in order, no moment twice
//!                                       │   └─► ledger: what really is        history: every event, as a digest
//!                                       └─► report: what it cost, and which promise was broken
//! real     placement, view merging, membership transitions, motion (reads during changes, moves, drains, copies, hot
//!          runs), client routing
//! models   gossip (delays), the engine (a map with leases and a room), the network (250 µs, cuts, slow and lossy links),
//!          the client's loop around its routing; how long a get takes, where many read a few prompts
//! ```
//!
//! The same seed gives the same history to the byte; `history_digest` says so, `--history FILE` keeps it. A promise that
//! was broken ends the command with 1 and the words that repeat it; `--sweep N` looks for such seeds. The real gossip is
//! exercised elsewhere, where bounds are asserted instead of histories.
//! Units: simulated seconds, bytes. Errors: a file that cannot be written.

mod asking;
mod client;
mod clock;
mod fate;
mod feed;
mod gossip;
mod history;
mod hot;
mod ledger;
mod links;
mod node;
mod report;
mod sweep;
#[cfg(test)]
mod tests;
mod town;
mod wire;

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::PathBuf,
    process::ExitCode,
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
    hot::CROWD,
    report::Report,
    town::{PROMPTS_PER_NODE, Town},
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
    #[arg(long, default_value_t = 4_000)]
    share_runs: u32,
    /// Write every event to this file
    #[arg(long, value_name = "FILE", conflicts_with = "sweep")]
    history: Option<PathBuf>,
    /// So many seeds from this one on, and only those that break a promise are told
    #[arg(long, value_name = "SEEDS", value_parser = clap::value_parser!(u64).range(1..))]
    sweep: Option<u64>,
}

/// Mean pause of a caller between two lookups.
const PAUSE_MS: u64 = 250;
/// How often it is looked whether all see the same members.
const LOOK: Duration = Duration::from_millis(100);

pub(crate) async fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let began = context.clock.now();
    if let Some(seeds) = args.sweep {
        // They have threads of their own.
        let work = move || sweep::sweep(&args, seeds);
        let mut swept = tokio::task::spawn_blocking(work).await??;
        swept.wall_s = context.clock.now().since(began).as_secs_f64();
        context.print(&swept, sweep::text)?;
        return Ok(exit_code(swept.failures.is_empty()));
    }
    // It has a runtime of its own, on a thread of its own.
    let outcome = tokio::task::spawn_blocking(move || simulate(&args)).await??;
    let mut report = outcome;
    report.wall_s = context.clock.now().since(began).as_secs_f64();
    context.print(&report, report::text)?;
    Ok(exit_code(report.broken.is_empty()))
}

fn exit_code(is_well: bool) -> ExitCode {
    match is_well {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
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
    let setting = args.scenario.setting(args.seed, args.seconds);
    let town = Town::new(clock.clone(), Arc::clone(&history), setting);
    town.found(args.nodes as usize);
    let prompts = (args.nodes * PROMPTS_PER_NODE).max(16);
    town.fill(prompts);

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
    if let Some(fashion) = setting.hot {
        let crowd = args.clients as usize..(args.clients + CROWD) as usize;
        for number in crowd {
            let (town, tally) = (Arc::clone(&town), Arc::clone(&tally));
            let caller = Caller::new(town, tally, prompts, number, args.seed);
            tokio::spawn(caller.follow(fashion));
        }
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
    let watched = Arc::new(parking_lot::Mutex::new(Watched::default()));
    tokio::spawn(watch(Arc::clone(&town), Arc::clone(&watched)));

    let end = Tick(Duration::from_secs(args.seconds));
    loop {
        // Once for those who can go on, once more for those who yielded.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        if !clock.next(end) {
            break;
        }
    }
    let watched = watched.lock().clone();
    Ok(Report::new(args, &town, &tally, &watched, befallen))
}

/// What was seen by looking at all nodes at once.
#[derive(Clone, Debug, Default)]
struct Watched {
    /// The longest time from the last of some changes to all seeing them.
    longest: Duration,
    /// Whether all agreed when it was last looked.
    is_reached: bool,
    /// How often a node held more than it has room for.
    overfull: u64,
}

async fn watch(town: Arc<Town>, watched: Arc<parking_lot::Mutex<Watched>>) {
    loop {
        let is_reached = town.is_agreed();
        let now = town.clock.now();
        {
            let mut watched = watched.lock();
            if is_reached && !watched.is_reached {
                let took = now.since(town.ledger.changed());
                watched.longest = watched.longest.max(took);
                town.history
                    .note(format_args!("agreed {}", took.as_millis()));
            }
            watched.is_reached = is_reached;
            watched.overfull += town.overfull();
        }
        town.clock.sleep(LOOK).await;
    }
}
