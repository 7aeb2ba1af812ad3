//! A tier's promises, against a cache that is a set of keys.

use std::convert::Infallible;

use proptest::{prelude::*, proptest};

use super::*;

const TOKENS: usize = 32;

fn key(name: u8, group: u32) -> Vec<u8> {
    [&[name; 4][..], &group.to_be_bytes()].concat()
}

/// Keys of a prompt's chunks, with their ends.
fn prompt(names: &[u8]) -> Vec<(Vec<u8>, usize)> {
    let at = |(i, name): (usize, &u8)| (key(*name, 0), (i + 1) * TOKENS);
    names.iter().enumerate().map(at).collect()
}

impl Ends for [(Vec<u8>, usize)] {
    fn end_of(&self, key: &[u8]) -> Option<usize> {
        self.iter()
            .find(|(other, _)| other == key)
            .map(|(_, end)| *end)
    }

    fn each(&self, show: &mut dyn FnMut(&[u8], usize)) {
        self.iter().for_each(|(key, end)| show(key, *end));
    }
}

fn tier() -> Tier {
    let mut tier = Tier::new(HashMap::from([(0, TOKENS), (3, TOKENS)]));
    tier.begin_request("r");
    tier
}

/// What a cache says that holds `there`: the leading blocks from the question's first on.
fn cache(there: &[Vec<u8>]) -> impl Fn(&Question) -> Result<Option<usize>, Infallible> {
    |question: &Question| {
        let chain = question.hashes.chunks(question.width).skip(question.first);
        Ok(Some(
            chain
                .take_while(|hash| there.iter().any(|key| key == hash))
                .count(),
        ))
    }
}

fn ask(tier: &mut Tier, keys: &[(Vec<u8>, usize)], at: usize, there: &[Vec<u8>]) -> Answer {
    tier.lookup("r", &keys[at].0, keys, cache(there)).unwrap()
}

#[test]
fn one_chain_is_one_question() {
    let (mut tier, keys) = (tier(), prompt(b"abcd"));
    let there = [key(b'a', 0), key(b'b', 0)];
    let mut asked = 0;
    for (at, wanted) in [Answer::Hit, Answer::Hit, Answer::Miss]
        .into_iter()
        .enumerate()
    {
        let look = |question: &Question| {
            asked += 1;
            cache(&there)(question)
        };
        assert_eq!(tier.lookup("r", &keys[at].0, &keys[..], look), Ok(wanted));
    }
    assert_eq!(asked, 1);
}

#[test]
fn an_answer_on_its_way_is_waited_for_step_by_step() {
    let (mut tier, keys) = (tier(), prompt(b"ab"));
    let late = |_: &Question| Ok::<_, Infallible>(None);
    assert_eq!(
        tier.lookup("r", &keys[0].0, &keys[..], late),
        Ok(Answer::Retry)
    );
    // In the same step nobody is asked again.
    assert_eq!(ask(&mut tier, &keys, 1, &[key(b'a', 0)]), Answer::Retry);
    tier.end_step([]);
    assert_eq!(ask(&mut tier, &keys, 0, &[key(b'a', 0)]), Answer::Hit);
}

#[test]
fn a_failure_of_the_question_goes_through_and_it_is_asked_again() {
    let (mut tier, keys) = (tier(), prompt(b"a"));
    assert_eq!(
        tier.lookup("r", &keys[0].0, &keys[..], |_| Err("broken")),
        Err("broken")
    );
    assert_eq!(ask(&mut tier, &keys, 0, &[key(b'a', 0)]), Answer::Hit);
}

#[test]
fn a_scan_from_the_end_is_two_questions() {
    let (mut tier, keys) = (tier(), prompt(b"abcdefgh"));
    let there: Vec<Vec<u8>> = keys.iter().map(|(key, _)| key.clone()).collect();
    for at in (0..8).rev() {
        assert_eq!(ask(&mut tier, &keys, at, &there), Answer::Hit);
    }
    assert_eq!(tier.end_request("r").len(), 2);
}

#[test]
fn a_tail_stands_behind_its_chunks_and_a_key_of_no_place_alone() {
    let (mut tier, mut keys) = (tier(), prompt(b"ab"));
    keys.push((key(b't', 0), 2 * TOKENS + 5));
    let runs = tier.begin(
        1,
        "r",
        &[&keys[0].0, &keys[1].0, &keys[2].0],
        &[5, 6, 7],
        &keys[..],
        false,
    );
    assert_eq!(
        runs.iter()
            .map(|run| (run.first, run.rows.len()))
            .collect::<Vec<_>>(),
        [(0, 2), (2, 1)]
    );
    assert_eq!(runs[1].hashes.len(), 3 * 8);
    let strange = key(b's', 0);
    let run = &tier.begin(2, "r", &[&strange], &[9], &keys[..], false)[0];
    assert_eq!((&run.hashes[..], run.first), (&strange[..], 0));
    let short = tier.begin(3, "r", &[b"abc"], &[9], &[(b"abc".to_vec(), 0)][..], false);
    assert_eq!(short[0].first, 0, "too short for a group");
}

#[test]
fn a_job_with_holes_ends_once_with_what_failed() {
    let (mut tier, keys) = (tier(), prompt(b"abcde"));
    let there: Vec<Vec<u8>> = keys.iter().map(|(key, _)| key.clone()).collect();
    for at in 0..5 {
        assert_eq!(ask(&mut tier, &keys, at, &there), Answer::Hit);
    }
    let wanted: [&[u8]; 3] = [&keys[0].0, &keys[1].0, &keys[4].0];
    let runs = tier.begin(9, "r", &wanted, &[10, 11, 14], &keys[..], true);
    assert_eq!(runs.len(), 2);
    assert_eq!(runs[0].question.as_deref(), Some("r/1"));
    assert!(
        tier.end_request("r").is_empty(),
        "a load reads under the lease"
    );
    assert_eq!(tier.refuse(runs[1].job, "full"), None);
    let ended = Ended {
        job: runs[0].job,
        blocks: 1,
        bytes: 64,
        failed_block_ids: vec![11],
        seconds: 0.1,
        reason: Some("gone".to_owned()),
    };
    let ending = tier.ended(ended).unwrap();
    assert_eq!((ending.job, ending.blocks, ending.dropped), (9, 1, 1));
    assert_eq!(
        (&ending.failed[..], &ending.forget[..]),
        (&[1, 2][..], &["r/1".to_owned()][..])
    );
    assert_eq!((tier.requests(), tier.runs().len()), (0, 0));
}

#[test]
fn a_scheduled_requests_leases_go_and_it_may_ask_again() {
    let (mut tier, keys) = (tier(), prompt(b"a"));
    assert_eq!(ask(&mut tier, &keys, 0, &[key(b'a', 0)]), Answer::Hit);
    assert_eq!(tier.end_step(["other", "r"]), ["r/1"]);
    assert_eq!(ask(&mut tier, &keys, 0, &[key(b'a', 0)]), Answer::Hit);
    assert_eq!(tier.end_request("r"), ["r/2"]);
    assert!(tier.end_request("r").is_empty());
}

proptest! {
    /// Whichever keys are asked in whichever order, of a node that holds any set of them: a hit is a block that is there, and
    /// no more questions are kept than may be.
    #[test]
    fn a_hit_is_there(
        held in proptest::collection::hash_set(0usize..12, 0..12),
        asked in proptest::collection::vec(0usize..12, 1..40),
    ) {
        let (mut tier, keys) = (tier(), prompt(b"abcdefghijkl"));
        let there: Vec<Vec<u8>> = held.iter().map(|at| keys[*at].0.clone()).collect();
        for at in asked {
            let questions = tier.request("r").groups.get(&0).map_or(0, |group| group.questions.len());
            prop_assert!(questions <= MAX_QUESTIONS);
            match ask(&mut tier, &keys, at, &there) {
                Answer::Hit => prop_assert!(held.contains(&at)),
                Answer::Miss => {}
                Answer::Retry => prop_assert!(false, "the cache answers at once"),
            }
        }
        prop_assert!(tier.end_request("r").len() <= MAX_QUESTIONS);
    }
}
