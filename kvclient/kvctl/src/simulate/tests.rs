//! Fixed seeds of every scenario, seeds that once broke a promise, and that a seed has one history.

use clap::ValueEnum;

use super::{Args, Scenario, simulate};

/// Seeds of each scenario that every test run goes through. Many more: `kvctl simulate --sweep`.
const SEEDS: std::ops::Range<u64> = 1..4;

/// Seeds that broke a promise before what they showed was mended: scenario, nodes, callers, seed, and what it was.
const ONCE_BROKEN: [(Scenario, u32, u32, u64, &str); 8] = [
    (
        Scenario::Replicas,
        24,
        6,
        2,
        "a drain counted as handed over what a member had taken that had died since",
    ),
    (
        Scenario::Churn,
        30,
        8,
        148,
        "answers between nodes brought no news: a run moved to where it did not belong any more",
    ),
    (
        Scenario::Replicas,
        30,
        8,
        169,
        "answers between nodes brought no news: members did not agree at the end",
    ),
    (
        Scenario::Churn,
        30,
        8,
        117,
        "a node that was started again asked itself what it had missed",
    ),
    (
        Scenario::Drain,
        30,
        8,
        103,
        "a run was sent to a member that said with the answer before that it drains",
    ),
    (
        Scenario::Drain,
        30,
        8,
        161,
        "a run was sent to a member that said with the answer before that it drains",
    ),
    (
        Scenario::Slow,
        30,
        8,
        239,
        "a run was sent and fetched at once over slow links",
    ),
    (
        Scenario::Mixed,
        30,
        8,
        124,
        "a tombstone of a member that was killed soon after did not count for the ledger, which took what that one had told nobody for told",
    ),
];

pub(super) fn args(scenario: Scenario, seed: u64) -> Args {
    Args {
        nodes: 24,
        scenario,
        seed,
        seconds: 40,
        clients: 6,
        share_runs: 50,
        history: None,
        sweep: None,
    }
}

#[test]
fn a_seed_has_one_history_and_another_seed_another() {
    for &scenario in Scenario::value_variants() {
        let digest = |seed| {
            let args = Args {
                nodes: 14,
                seconds: 25,
                ..args(scenario, seed)
            };
            simulate(&args).unwrap().history_digest
        };
        assert_eq!(digest(7), digest(7), "{scenario:?}");
        assert_ne!(digest(7), digest(8), "{scenario:?}");
    }
}

#[test]
fn nothing_moves_and_nothing_is_missed_where_nothing_happens() {
    let report = simulate(&args(Scenario::Calm, 1)).unwrap();
    assert!(report.lookups > 100, "{report:?}");
    assert_eq!((report.moved_bytes, report.changed_owner_bytes), (0, 0));
    assert_eq!((report.hit_blocks, report.misses), (report.asked_blocks, 0));
    assert_eq!(report.leased_blocks, report.read_blocks);
}

#[test]
fn every_scenario_keeps_its_promises() {
    for &scenario in Scenario::value_variants() {
        for seed in SEEDS {
            let report = simulate(&args(scenario, seed)).unwrap();
            assert_eq!(report.broken, [""; 0], "{report:#?}");
            assert!(report.is_converged, "{report:#?}");
            assert!(report.read_blocks > 100, "{report:#?}");
        }
    }
}

#[test]
fn what_once_broke_a_promise_keeps_it_now() {
    for (scenario, nodes, clients, seed, what) in ONCE_BROKEN {
        let args = Args {
            nodes,
            clients,
            ..args(scenario, seed)
        };
        let report = simulate(&args).unwrap();
        assert_eq!(report.broken, [""; 0], "{what}: {report:#?}");
    }
}

#[test]
fn each_scenario_shows_what_it_is_for() {
    let report = |scenario| simulate(&args(scenario, 2)).unwrap();
    for scenario in [
        Scenario::Grow,
        Scenario::Drain,
        Scenario::Churn,
        Scenario::Slow,
    ] {
        let report = report(scenario);
        assert!(report.moved_bytes > 0, "{scenario:?}: {report:#?}");
    }
    let crash = report(Scenario::Crash);
    assert!(crash.lost_blocks > 0, "{crash:#?}");
    let partition = report(Scenario::Partition);
    assert!(
        partition.misses_behind_silence > 0 && partition.views > 10,
        "{partition:#?}"
    );
    let replicas = report(Scenario::Replicas);
    assert_eq!((replicas.replicas, replicas.lost_copied_blocks), (2, 0));
    // What is put anew is little, and nothing with most seeds.
    let putting = simulate(&args(Scenario::Replicas, 9)).unwrap();
    assert!(putting.copied_bytes > 0, "{putting:#?}");
    let hot = report(Scenario::Hot);
    assert!(
        hot.hot_copies > 1 && hot.hot_reads_elsewhere > 100,
        "{hot:#?}"
    );
    let evictions = report(Scenario::Evictions);
    assert!(evictions.misses_evicted > 0, "{evictions:#?}");
    assert_eq!(evictions.overfull, 0);
}

#[test]
fn a_death_loses_nothing_of_which_there_were_two_copies() {
    for seed in SEEDS {
        let report = simulate(&args(Scenario::Replicas, seed)).unwrap();
        assert_eq!(report.lost_copied_blocks, 0, "{report:#?}");
        let again = simulate(&args(Scenario::Crash, seed)).unwrap();
        assert!(report.lost_blocks * 4 < again.lost_blocks, "{report:#?}");
    }
}
