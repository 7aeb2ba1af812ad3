//! A planner's promises, whatever an engine does in which order.

use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::{prelude::*, proptest};

use super::*;

const BLOCK: usize = 4;

fn planner(workers: usize) -> Planner {
    let rules = Rules {
        block_tokens: BLOCK,
        loads: true,
        saves: true,
        prompts_only: false,
        workers,
    };
    Planner::new(rules).unwrap()
}

/// Tracks a request whose chain has the hashes 0..`blocks` of `prompt`.
fn admit(planner: &mut Planner, request: &str, prompt: u8, blocks: usize) {
    planner.track(request, 0);
    for i in planner.known(request)..blocks {
        planner.learn(request, &[prompt, i as u8]).unwrap();
    }
}

/// A request of `blocks` and a half, of which `found` are loaded into blocks 10, 11, ….
fn load(planner: &mut Planner, request: &str, blocks: usize, found: usize) -> Option<usize> {
    admit(planner, request, 7, blocks);
    planner.ask(request, blocks * BLOCK + 2, 0).unwrap();
    let tokens = planner.answered(request, Some(found))?;
    let ids: Vec<u32> = (10..).take(blocks + 1).collect();
    assert_eq!(planner.allocated(request, tokens, &ids, 5), tokens == 0);
    Some(tokens)
}

#[test]
fn an_answer_becomes_a_load_of_just_what_the_engine_lacks() {
    let mut planner = planner(1);
    admit(&mut planner, "r", 7, 4);
    assert_eq!(planner.ask("r", 18, 8), Some(&[7, 0, 7, 1, 7, 2, 7, 3][..]));
    assert_eq!(planner.answered("r", None), None);
    assert_eq!(planner.answered("r", Some(4)), Some(8));
    assert!(!planner.allocated("r", 8, &[9, 8, 6, 5, 4], 3));
    let plan = planner.take();
    let load = &plan.loads[0];
    assert_eq!(
        (load.first, &load.block_ids[..], load.lease),
        (2, &[6, 5][..], 3)
    );
    assert_eq!(load.hash(3), [7, 3]);
    assert_eq!(planner.take(), Plan::default());
}

#[test]
fn the_last_token_is_left_to_compute() {
    let mut planner = planner(1);
    admit(&mut planner, "r", 7, 4);
    assert_eq!(planner.ask("r", 16, 0).map(<[u8]>::len), Some(3 * 2));
    assert_eq!(planner.ask("r", 16, 12), None);
    assert!(
        planner.allocated("r", 0, &[], 0),
        "an answer of nothing is forgotten"
    );
}

#[test]
fn a_failed_block_is_missed_and_saved_again() {
    let mut planner = planner(1);
    assert_eq!(load(&mut planner, "r", 4, 4), Some(16));
    let failed = planner.failed(&HashSet::from([12])).unwrap();
    assert_eq!((&failed.bytes[..], failed.width), (&[7, 2][..], 2));
    planner.loaded("r");
    assert!(planner.fills("r", 8, 8, 16));
    planner.save("r", &[10, 11, 12, 13]).unwrap();
    let saves = planner.take().saves;
    assert_eq!(
        (saves[0].first, &saves[0].block_ids[..]),
        (2, &[12, 13][..])
    );
    assert_eq!(
        planner.failed(&HashSet::from([12])),
        None,
        "its load is over"
    );
}

#[test]
fn an_aborted_load_still_says_what_failed() {
    let mut planner = planner(1);
    load(&mut planner, "r", 4, 4);
    let leaves = planner.finished("r", 0);
    assert_eq!((leaves.blocks, leaves.lookup), (false, false));
    assert!(planner.failed(&HashSet::from([10])).is_some());
    planner.loaded("r");
    assert_eq!(planner.tracked(), 0);
}

#[test]
fn a_save_ends_when_all_workers_have_answered() {
    let mut planner = planner(2);
    admit(&mut planner, "r", 7, 2);
    assert!(planner.fills("r", 0, 8, 8));
    let job = planner.save("r", &[3, 4]).unwrap();
    assert!(planner.finished("r", 0).blocks);
    assert_eq!(planner.take().held, ["r"]);
    assert_eq!(planner.replied(job, 1, &[4]), None);
    let stored = planner.replied(job, 1, &[]).unwrap();
    assert_eq!((stored.blocks, &stored.missing[..]), (0..2, &[1][..]));
    assert_eq!(planner.replied(job, 1, &[]), None, "it is over");
}

#[test]
fn a_preempted_request_waits_for_its_saves_once() {
    let mut planner = planner(1);
    admit(&mut planner, "r", 7, 2);
    planner.fills("r", 0, 8, 8);
    planner.save("r", &[3, 4]).unwrap();
    planner.take();
    assert_eq!(planner.saving(), ["r"]);
    planner.preempted("r", 1);
    assert!(planner.take().preempted);
    planner.preempted("r", 1);
    assert!(!planner.take().preempted);
    assert!(!planner.finished("r", 1).blocks);
}

#[test]
fn drafts_are_not_saved() {
    let rules = Rules {
        block_tokens: BLOCK,
        loads: true,
        saves: true,
        prompts_only: true,
        workers: 1,
    };
    let mut planner = Planner::new(rules).unwrap();
    admit(&mut planner, "r", 7, 5);
    assert!(planner.fills("r", 0, 20, 10));
    planner.save("r", &[0, 1, 2, 3, 4]);
    assert_eq!(planner.take().saves[0].end(), 2);
}

#[test]
fn a_block_without_tokens_is_refused() {
    let rules = Rules {
        block_tokens: 0,
        loads: true,
        saves: true,
        prompts_only: false,
        workers: 1,
    };
    assert!(Planner::new(rules).is_err());
}

/// What an engine may do.
#[derive(Clone, Debug)]
enum Act {
    Step { request: u8, tokens: usize },
    TakeBack { request: u8, tokens: usize },
    Preempt { request: u8 },
    Reply { fails: bool },
    Finish { request: u8 },
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0u8..4, 1usize..30).prop_map(|(request, tokens)| Act::Step { request, tokens }),
        1 => (0u8..4, 0usize..40).prop_map(|(request, tokens)| Act::TakeBack { request, tokens }),
        1 => (0u8..4).prop_map(|request| Act::Preempt { request }),
        3 => any::<bool>().prop_map(|fails| Act::Reply { fails }),
        1 => (0u8..4).prop_map(|request| Act::Finish { request }),
    ]
}

proptest! {
    /// Requests 0 and 1 have one prompt, 2 and 3 another. Whatever happens: a save names just computed blocks of its own
    /// request by their own hashes, a finished request's blocks are kept exactly while a save reads them, and at the end nothing
    /// is left.
    #[test]
    fn saves_are_of_computed_blocks_and_their_blocks_are_kept(acts in proptest::collection::vec(act(), 1..80)) {
        let mut planner = planner(1);
        let (mut computed, mut preempted) = (HashMap::<u8, usize>::new(), HashMap::<u8, u64>::new());
        let mut open = BTreeMap::<u64, (String, HashSet<Vec<u8>>)>::new();
        let mut reads = HashMap::<String, HashSet<u64>>::new();
        for act in acts {
            match act {
                Act::Step { request, tokens } => {
                    let name = request.to_string();
                    let had = *computed.entry(request).or_default();
                    let has = (had + tokens).min(20 * BLOCK);
                    planner.track(&name, *preempted.entry(request).or_default());
                    for i in planner.known(&name)..has / BLOCK {
                        planner.learn(&name, &[request / 2, i as u8]).unwrap();
                    }
                    computed.insert(request, has);
                    if planner.fills(&name, had, has - had, 40) {
                        let table: Vec<u32> = (0..20).map(|i| u32::from(request) * 100 + i).collect();
                        let job = planner.save(&name, &table).unwrap();
                        let plan = planner.take();
                        let order = plan.saves.last().unwrap();
                        prop_assert!(order.job == job && order.end() <= has / BLOCK && order.first < order.end());
                        let mut hashes = HashSet::new();
                        prop_assert_eq!(&order.block_ids[..], &table[order.first..order.end()]);
                        for i in order.first..order.end() {
                            prop_assert_eq!(order.hash(i), [request / 2, i as u8]);
                            hashes.insert(order.hash(i).to_vec());
                        }
                        reads.entry(name.clone()).or_default().insert(job);
                        open.insert(job, (name, hashes));
                    }
                }
                Act::TakeBack { request, tokens } => {
                    let had = computed.entry(request).or_default();
                    *had = (*had).min(tokens);
                }
                Act::Preempt { request } => {
                    let name = request.to_string();
                    let times = preempted.entry(request).or_default();
                    *times += 1;
                    computed.insert(request, 0);
                    let was_read = reads.get(&name).is_some_and(|jobs| !jobs.is_empty());
                    prop_assert_eq!(planner.saving().contains(&name), was_read);
                    planner.preempted(&name, *times);
                    prop_assert_eq!(planner.take().preempted, was_read);
                    reads.remove(&name);
                }
                Act::Reply { fails } => {
                    if let Some((job, (name, hashes))) = open.pop_first() {
                        let stored = planner.replied(job, 1, if fails { &[0, 1, 100, 101, 200] } else { &[] }).unwrap();
                        prop_assert_eq!(stored.blocks.len(), hashes.len());
                        prop_assert!(fails || stored.missing.is_empty());
                        if let Some(jobs) = reads.get_mut(&name) {
                            jobs.remove(&job);
                        }
                    }
                }
                Act::Finish { request } => {
                    let name = request.to_string();
                    let was_read = reads.remove(&name).is_some_and(|jobs| !jobs.is_empty());
                    let leaves = planner.finished(&name, *preempted.entry(request).or_default());
                    prop_assert_eq!(leaves.blocks, was_read);
                    prop_assert_eq!(planner.take().held.contains(&name), was_read);
                    computed.remove(&request);
                }
            }
        }
        for (job, _) in open {
            prop_assert!(planner.replied(job, 1, &[]).is_some());
        }
        for request in 0u8..4 {
            planner.finished(&request.to_string(), 0);
        }
        prop_assert_eq!((planner.tracked(), planner.unanswered(), planner.in_hand.len()), (0, 0, 0));
    }
}
