//! One suite over all policies.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use super::{BlockId, BlockMeta, EvictionPolicy, NAMES, by_name};
use crate::{
    clock::{Clock, ManualClock},
    engine::{
        recorder::{Log, Recorder},
        replay::{Capacity, Trace, replay, report, synthetic},
    },
};

fn each(test: impl Fn(&'static str, Recorder, Arc<Mutex<Log>>)) {
    for name in NAMES {
        let (policy, log) = Recorder::new(by_name(name).unwrap(), 64);
        test(name, policy, Arc::clone(&log));
        assert_eq!(log.lock().check(), Ok(()), "{name}");
    }
}

fn meta(parent: Option<u32>, index: u32, fingerprint: u64) -> BlockMeta {
    BlockMeta {
        parent: parent.map(BlockId),
        index,
        bytes: 4096,
        fingerprint,
    }
}

fn chain(policy: &mut dyn EvictionPolicy, handles: std::ops::Range<u32>) {
    for (index, id) in handles.enumerate() {
        let parent = (index > 0).then(|| id - 1);
        policy.inserted(BlockId(id), &meta(parent, index as u32, u64::from(id)));
    }
}

fn evict(policy: &mut dyn EvictionPolicy) -> Option<BlockId> {
    let victim = policy.victim(&mut |_| true)?;
    policy.removed(victim);
    Some(victim)
}

#[test]
fn every_name_finds_a_policy_and_strangers_do_not() {
    assert!(NAMES.iter().all(|name| by_name(name).is_some()));
    assert!(by_name("clairvoyant").is_none());
    assert_eq!(by_name("best").unwrap().name(), "foresight");
}

#[test]
fn everything_inserted_comes_out_once() {
    each(|name, mut policy, _| {
        chain(&mut policy, 0..50);
        chain(&mut policy, 50..80);
        policy.touched(&[BlockId(9), BlockId(8)]);
        assert_eq!(policy.len(), 80, "{name}");
        let mut out: Vec<BlockId> = std::iter::from_fn(|| evict(&mut policy)).collect();
        out.sort();
        assert_eq!(out, (0..80).map(BlockId).collect::<Vec<_>>(), "{name}");
        assert!(policy.is_empty() && evict(&mut policy).is_none(), "{name}");
    });
}

#[test]
fn a_chain_goes_tail_first() {
    each(|name, mut policy, _| {
        if name == "s3fifo" {
            return; // blind to prefixes
        }
        chain(&mut policy, 0..20);
        policy.touched(&(0..20).rev().map(BlockId).collect::<Vec<_>>());
        let out: Vec<u32> = std::iter::from_fn(|| evict(&mut policy))
            .map(|id| id.0)
            .collect();
        assert_eq!(out, (0..20).rev().collect::<Vec<_>>(), "{name}");
    });
}

#[test]
fn what_is_in_use_stays_and_the_search_ends() {
    each(|name, mut policy, _| {
        chain(&mut policy, 0..30);
        assert_eq!(policy.victim(&mut |_| false), None, "{name}");
        assert_eq!(policy.len(), 30, "{name}");
        let victim = policy.victim(&mut |id| id.0 == 17);
        assert_eq!(victim, Some(BlockId(17)), "{name}");
        policy.removed(BlockId(17));
        assert_eq!(policy.len(), 29, "{name}");
    });
}

#[test]
fn strangers_are_passed_over() {
    each(|name, mut policy, _| {
        chain(&mut policy, 0..3);
        policy.touched(&[BlockId(77), BlockId(1), BlockId(3)]);
        assert_eq!(policy.len(), 3, "{name}");
    });
}

#[test]
fn the_coldest_are_the_next_to_go() {
    each(|name, mut policy, _| {
        for id in 0..40 {
            policy.inserted(BlockId(id), &meta(None, 0, u64::from(id)));
        }
        policy.touched(&(20..40).map(BlockId).collect::<Vec<_>>());
        let mut coldest = Vec::new();
        policy.coldest(5, &mut coldest);
        assert_eq!(coldest.len(), 5, "{name}");
        let gone: Vec<BlockId> = (0..20).map_while(|_| evict(&mut policy)).collect();
        assert!(
            coldest.iter().all(|id| gone.contains(id)),
            "{name}: {coldest:?} not in {gone:?}"
        );
    });
}

/// Any calls in any order, against the recorder's rules and a count of our own.
#[test]
fn random_calls_keep_the_rules() {
    each(|name, mut policy, log| {
        let dice = ManualClock::new(7);
        let random = |bound: u64| dice.random_u64() % bound;
        let mut free: Vec<u32> = (0..64).rev().collect();
        let mut present: HashMap<u32, u32> = HashMap::new(); // handle → index
        for step in 0..20_000_u64 {
            match random(10) {
                0..=4 => {
                    let Some(id) = free.pop() else { continue };
                    let parent = present
                        .iter()
                        .nth(random(64) as usize)
                        .map(|(id, index)| (*id, *index));
                    let index = parent.map_or(0, |(_, index)| index + 1);
                    let fingerprint = random(200);
                    policy.inserted(
                        BlockId(id),
                        &meta(parent.map(|(id, _)| id), index, fingerprint),
                    );
                    present.insert(id, index);
                }
                5..=6 => {
                    let ids: Vec<BlockId> =
                        (0..random(6)).map(|_| BlockId(random(64) as u32)).collect();
                    policy.touched(&ids);
                }
                7 => {
                    let Some(id) = present.keys().nth(random(64) as usize).copied() else {
                        continue;
                    };
                    policy.removed(BlockId(id));
                    present.remove(&id);
                    free.push(id);
                }
                _ => {
                    let odd = random(2) as u32;
                    if let Some(id) = policy.victim(&mut |id| id.0 % 2 == odd) {
                        policy.removed(id);
                        present.remove(&id.0);
                        free.push(id.0);
                    }
                }
            }
            assert_eq!(policy.len(), present.len(), "{name} at step {step}");
        }
        assert_eq!(log.lock().present().len(), present.len(), "{name}");
    });
}

fn share(trace: &Trace, name: &str, capacity: f64) -> f64 {
    let blocks = Capacity::Share(capacity).blocks(trace);
    let hits = replay(trace, by_name(name).unwrap(), blocks).prefix_hits;
    hits as f64 / trace.block_refs() as f64
}

/// The margin below is three standard errors of a share of 5 % over 2,500 requests.
#[test]
fn the_best_policy_is_never_much_worse_than_lru() {
    for seed in [1, 2] {
        for (name, trace) in synthetic::all(seed, 2500) {
            for capacity in [0.02, 0.1] {
                let (best, lru) = (
                    share(&trace, "best", capacity),
                    share(&trace, "lru", capacity),
                );
                assert!(
                    best >= 0.95 * lru - 0.01,
                    "{name} (seed {seed}) at {capacity}: best {best:.4}, lru {lru:.4}"
                );
            }
        }
    }
}

#[test]
fn the_best_policy_beats_lru_where_scans_and_questions_of_once_flood_it() {
    for (name, trace) in [
        ("scans", synthetic::scans(3, 4000)),
        ("prompts", synthetic::shared_prompts(3, 4000)),
    ] {
        let (best, lru) = (share(&trace, "best", 0.05), share(&trace, "lru", 0.05));
        assert!(best > 1.1 * lru, "{name}: best {best:.4}, lru {lru:.4}");
    }
}

#[test]
fn no_policy_beats_the_optimum_and_room_for_all_meets_it() {
    let trace = synthetic::chat(5, 1500);
    for name in NAMES {
        let report = report(&trace, name, Capacity::Share(0.1), &ManualClock::new(0)).unwrap();
        assert!(
            report.prefix_hit_share <= report.optimum_share,
            "{name}: {report:?}"
        );
        let all = report_all(&trace, name);
        assert_eq!(all.prefix_hit_share, all.unbounded_share, "{name}");
    }
}

fn report_all(trace: &Trace, name: &str) -> crate::engine::replay::ReplayReport {
    report(trace, name, Capacity::Share(1.0), &ManualClock::new(0)).unwrap()
}

/// The published conversation trace, where it is at hand: `TERRACE_TRACE` names the file.
#[test]
fn the_recorded_conversation_meets_its_facts_and_its_bar() {
    let Some(path) = std::env::var_os("TERRACE_TRACE") else {
        eprintln!("skipped: TERRACE_TRACE names no trace");
        return;
    };
    let file = std::fs::File::open(&path).expect("TERRACE_TRACE can be read");
    let trace = Trace::read(std::io::BufReader::new(file)).unwrap();
    assert_eq!((trace.len(), trace.block_refs()), (12_031, 288_500));
    assert_eq!(
        (trace.unique_blocks(), trace.input_tokens()),
        (182_790, 144_793_823)
    );
    let rounded = |share: f64| (share * 1e4).round() / 1e4;
    for (capacity, lru) in [(0.05, 0.1958), (0.1, 0.2789), (0.2, 0.3453)] {
        assert_eq!(rounded(share(&trace, "lru", capacity)), lru);
        let best = share(&trace, "best", capacity);
        assert!(best > lru, "at {capacity}: {best:.4}");
    }
    let at = |capacity| {
        report(
            &trace,
            "best",
            Capacity::Share(capacity),
            &ManualClock::new(0),
        )
        .unwrap()
    };
    let (two, five) = (at(0.02), at(0.05));
    assert_eq!(
        (rounded(two.optimum_share), rounded(two.unbounded_share)),
        (0.3142, 0.3664)
    );
    assert!(
        two.ratio_to_lru() >= 1.1 && five.ratio_to_lru() >= 1.1,
        "{two:?} {five:?}"
    );
}
