//! Hit share on a recorded trace, at room for 5 % of its distinct blocks, beside LRU and the offline optimum.
//!
//! No bytes move: the node's own policy is replayed, as `kvctl replay` does.

use std::fs::File;
use std::io::BufReader;

use anyhow::{Context, Result};
use kvserver::clock::SystemClock;
use kvserver::engine::replay::{Capacity, Trace, report};

use super::Options;
use crate::bars::{Bar, Bound};

const SHARE: f64 = 0.05;

/// The bar, if there is a trace.
///
/// # Errors
/// The trace cannot be read.
pub fn run(options: &Options) -> Result<Vec<Bar>> {
    let Some(path) = &options.trace else {
        anyhow::bail!("no trace given (--trace FILE or TERRACE_TRACE)");
    };
    let spinner = options.spinner("trace");
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let trace = Trace::read(BufReader::new(file))?;
    let found = report(&trace, "best", Capacity::Share(SHARE), &SystemClock::new())?;
    spinner.finish_and_clear();
    let note = format!(
        "{}: {:.4} of references, LRU {:.4}, optimum {:.4}, unbounded {:.4}; {} requests, {} blocks of room",
        found.policy,
        found.prefix_hit_share,
        found.lru_share,
        found.optimum_share,
        found.unbounded_share,
        found.requests,
        found.capacity_blocks
    );
    let path = "prefix hit share of a trace at 5 % of its blocks, to LRU";
    Ok(vec![Bar::fact(
        path,
        Bound::AtLeast(1.1),
        Some(found.ratio_to_lru()),
        note,
    )])
}
