//! Real `kvserver` processes in network namespaces: killed, frozen, divided, slowed down, restarted, added and drained
//! under a load that checks every byte and every deadline; and their gossip, with its bounds.
//!
//! ```text
//! test ─ inside(namespaces) ─► Fleet { nodes n1 … n8, Network } and Loads c1, c2         kvtests::{processes, namespaces, load}
//! ```
//!
//! Time is real here, and so are the bounds. What each scenario measured is printed (`--nocapture`).

#![allow(
    clippy::print_stdout,
    reason = "measured times are shown with --nocapture"
)]

mod gossip;
mod growing;
mod losing;
mod networks;
mod storm;

use std::{future::Future, time::Duration};

use kvtests::{
    load::{Load, Tally},
    namespaces::inside,
    processes::Programs,
};

const PROGRAMS: Programs = Programs {
    node: env!("CARGO_BIN_EXE_kvtests-node"),
    load: env!("CARGO_BIN_EXE_checking_load"),
};

/// How long a silent member keeps its place here: long enough for a restart, short enough to wait for.
const GRACE: Duration = Duration::from_secs(4);

/// Settings of all nodes that a load asks.
const SETTINGS: &[&str] = &[
    "--suspect-grace=4s",
    "--join-ramp=2s",
    "--motion-window=60s",
];

/// From a death to everybody's knowledge of it.
const NOTICED: Duration = Duration::from_secs(3);

/// From that, and any grace, to equal views.
const AGREED: Duration = Duration::from_secs(2);

/// For a hit share to be back after the cluster is one again: moves begin half a second after a change, and what two
/// seconds of turns have met is counted.
const BACK: Duration = Duration::from_secs(15);

/// The same where what was lost is computed anew, which takes until every prompt has been drawn.
const ANEW: Duration = Duration::from_secs(40);

/// The longest that any scenario takes.
const SCENARIO: Duration = Duration::from_secs(180);

/// What a hit share may be short of its level before and still be back.
const SHORT: f64 = 0.005;

/// Runs a scenario in a network of its own; `test` is the whole name of the test.
fn scenario(test: &str, body: impl Future<Output = ()>) {
    inside(test, SCENARIO, || {
        println!("{test}");
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().expect("a runtime");
        runtime.block_on(body);
    });
}

/// Lets a load read on, and answers its hit share, which is all that was put.
async fn full_level(load: &mut Load) -> f64 {
    load.go(false);
    let level = load.level().await;
    println!("  level before: {level:.4}");
    assert!(level > 0.99, "all that was put is there");
    level
}

/// Stops a load that had no offence to tell, and reads all that it has put.
async fn assert_all_left(load: &mut Load, why: &str) {
    load.stop().await;
    let all = load.audit().await;
    assert_eq!(all.readable, all.blocks, "{why}");
    load.assert_clean();
}

/// What a load saw since `from`, in a line.
fn show(what: &str, load: &Load, from: &Tally) {
    let now = load.tally();
    let (lowest, at_ms) = load.lowest(from).unwrap_or_default();
    println!(
        "  {what}: lowest second {:.0} % at {:.1} s; second by second: {}",
        lowest * 100.0,
        at_ms as f64 / 1000.0,
        load.course(from)
    );
    println!(
        "    {} calls, slowest {} ms (machine stood still for {} ms at most), {} hits of {} asked, {} lost under a lease, \
         {} put, {} rejected, {} wrong, {} late, {} dishonest",
        now.calls - from.calls,
        now.slowest_ms,
        now.stalled_ms,
        now.hits - from.hits,
        now.asked - from.asked,
        now.lost - from.lost,
        now.put - from.put,
        now.rejected - from.rejected,
        now.wrong - from.wrong,
        now.late - from.late,
        now.dishonest - from.dishonest,
    );
}
