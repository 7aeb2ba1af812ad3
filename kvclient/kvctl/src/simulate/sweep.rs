//! Many seeds of one scenario, for those that break a promise.
//!
//! Each seed is a simulation of its own with a history of its own, whatever runs beside it. Units: seeds.
//! Errors: those of a simulation.

use std::{
    num::NonZeroUsize,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use anyhow::Result;
use parking_lot::Mutex;
use serde::Serialize;

use super::{Args, report::Report, simulate};

/// Shares are not what is looked for.
const SHARE_RUNS: u32 = 50;

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct Swept {
    scenario: String,
    nodes: u32,
    first_seed: u64,
    seeds: u64,
    pub(super) wall_s: f64,
    /// The most that was seen of what is held to a bound.
    most_moved_over_ideal: f64,
    longest_convergence_ms: u64,
    lookups: u64,
    pub(super) failures: Vec<Failure>,
}

/// A seed that breaks a promise.
#[derive(Debug, Serialize)]
pub(super) struct Failure {
    seed: u64,
    broken: Vec<String>,
    again: String,
}

pub(super) fn sweep(args: &Args, seeds: u64) -> Result<Swept> {
    let (next, reports) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let work = || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Relaxed);
            if number >= seeds {
                return Ok(());
            }
            let one = Args {
                seed: args.seed.wrapping_add(number),
                share_runs: args.share_runs.min(SHARE_RUNS),
                ..args.clone()
            };
            let report = simulate(&one)?;
            reports.lock().push(report);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        // A panic of a seed is one of the sweep.
        workers.into_iter().try_for_each(|worker| {
            let ended = worker.join();
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    let mut reports = reports.into_inner();
    reports.sort_by_key(|report| report.seed);
    let failed = reports.iter().filter(|report| !report.broken.is_empty());
    let failure = |report: &Report| Failure {
        seed: report.seed,
        broken: report.broken.clone(),
        again: report.again.clone(),
    };
    let all = reports.iter();
    Ok(Swept {
        scenario: args.scenario_name(),
        nodes: args.nodes,
        first_seed: args.seed,
        seeds,
        wall_s: 0.0,
        most_moved_over_ideal: all.clone().map(|r| r.moved_over_ideal).fold(0.0, f64::max),
        longest_convergence_ms: all.clone().map(|r| r.convergence_ms).max().unwrap_or(0),
        lookups: all.map(|r| r.lookups).sum(),
        failures: failed.map(failure).collect(),
    })
}

pub(super) fn text(swept: &Swept) -> String {
    let s = swept;
    let mut text = format!(
        "{} seeds of {} with {} nodes in {:.1} s: {} lookups, moved {:.4} of what had to at most, all agreed within {} ms\n",
        s.seeds,
        s.scenario,
        s.nodes,
        s.wall_s,
        s.lookups,
        s.most_moved_over_ideal,
        s.longest_convergence_ms,
    );
    for failure in &s.failures {
        text += &format!("seed {}: {}\n", failure.seed, failure.broken.join("; "));
        text += &format!("    {}\n", failure.again);
    }
    text += &match s.failures.len() {
        0 => "every promise was kept\n".to_owned(),
        count => format!("{count} seeds broke a promise\n"),
    };
    text
}
