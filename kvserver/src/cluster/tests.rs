//! The rules of membership, without a network and on time moved by hand.

use std::{sync::Arc, time::Duration};

use kvproto::{
    Member, MemberId, MemberState, View, ViewDigest, key::RunHash, placement::Placement,
};
use proptest::prelude::{any, prop_assert_eq, proptest};

use super::{
    MOST_CANDIDATES, MOST_PAST, Members, News, RAMP_STEPS, Standing, TOMBSTONES_KEPT, Times,
};
use crate::clock::Tick;

const TIMES: Times = Times {
    suspect_grace: Duration::from_secs(30),
    motion_window: Duration::from_secs(600),
    join_ramp: Duration::from_secs(30),
};

pub(crate) fn member(id: &str, weight: u32) -> Member {
    Member {
        id: MemberId::from(id),
        generation: 1,
        version: 1,
        weight,
        zone: String::new(),
        state: MemberState::Active,
        address: format!("http://{id}:7070"),
    }
}

fn at(seconds: u64) -> Tick {
    Tick(Duration::from_secs(seconds))
}

fn alone(id: &str) -> Members {
    Members::new(TIMES, member(id, 4), &View::default(), at(0))
}

/// `count` nodes that know each other, settled.
fn settled(count: usize) -> Vec<Members> {
    let all = View::new((0..count).map(|i| member(&format!("n{i}"), 4)));
    let node = |i| {
        let mut me = member(&format!("n{i}"), 4);
        me.generation = 2;
        Members::new(TIMES, me, &all, at(0))
    };
    let mut nodes: Vec<Members> = (0..count).map(node).collect();
    let all: Vec<Member> = nodes.iter().map(|node| node.me().clone()).collect();
    for node in &mut nodes {
        node.merge(all.clone(), at(0));
    }
    nodes
}

/// Everybody tells everybody, until nobody hears news. Answers in how many rounds; more than a few are a quarrel.
fn gossip(nodes: &mut [Members], now: Tick) -> usize {
    for round in 0..10 {
        let mut any = false;
        for from in 0..nodes.len() {
            let said: Vec<Member> = nodes[from].view().members().to_vec();
            for to in (0..nodes.len()).filter(|to| *to != from) {
                any |= nodes[to].merge(said.clone(), now);
            }
        }
        if !any {
            return round;
        }
    }
    panic!("no agreement after ten rounds");
}

fn state(node: &Members, id: &str) -> MemberState {
    node.view().get(&id.into()).unwrap().state
}

proptest! {
    #[test]
    fn any_order_of_news_ends_in_the_same_view(
        news in proptest::collection::vec((0u8..5, 1u64..4, 1u64..4, 0u32..3, any::<bool>()), 0..20),
        seed in any::<u64>(),
    ) {
        let news: Vec<Member> = news
            .into_iter()
            .map(|(id, generation, version, weight, gone)| Member {
                generation,
                version,
                state: if gone { MemberState::Gone } else { MemberState::Active },
                ..member(&format!("n{id}"), weight)
            })
            .collect();
        let mut other = news.clone();
        let mut random = seed;
        for i in (1..other.len()).rev() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            other.swap(i, (random >> 33) as usize % (i + 1));
        }
        let (mut a, mut b) = (alone("me"), alone("me"));
        a.merge(news, at(1));
        for one in other {
            b.merge([one], at(1));
        }
        prop_assert_eq!(a.view(), b.view());
    }

    /// Whatever each half believed of the other, and whatever changed meanwhile: when they meet again, all live.
    #[test]
    fn two_halves_agree_again_and_nobody_who_lives_stays_gone(
        count in 2usize..9,
        cut in 1usize..8,
        late in proptest::collection::vec(0u64..100, 9),
        weights in proptest::collection::vec(proptest::option::of(1u32..9), 9),
    ) {
        let cut = cut.min(count - 1);
        let mut nodes = settled(count);
        let ids: Vec<MemberId> = nodes.iter().map(|node| node.me().id.clone()).collect();
        for (i, node) in nodes.iter_mut().enumerate() {
            for (j, id) in ids.iter().enumerate() {
                if (i < cut) != (j < cut) {
                    node.suspect(id, at(100 + late[i] % 3));
                }
            }
            // Some are not done burying when the halves meet.
            node.tick(at(100 + late[i]));
            if let Some(weight) = weights[i] {
                node.set_weight(weight, at(100 + late[i]));
            }
        }
        let (left, right) = nodes.split_at_mut(cut);
        gossip(left, at(200));
        gossip(right, at(200));
        gossip(&mut nodes, at(201));
        for node in &mut nodes {
            for id in &ids {
                node.hear(id, at(202));
            }
            node.tick(at(1000));
        }
        for node in &nodes {
            prop_assert_eq!(node.view(), nodes[0].view());
            for id in &ids {
                prop_assert_eq!(node.view().get(id).unwrap().state, MemberState::Active);
                prop_assert_eq!(node.standing(id), Standing::Well);
            }
        }
    }
}

#[test]
fn a_silent_member_keeps_its_place_until_its_grace_is_over() {
    let mut nodes = settled(3);
    let digest = nodes[0].view().digest();
    let silent = MemberId::from("n2");
    assert!(nodes[0].suspect(&silent, at(10)));
    assert!(
        !nodes[0].suspect(&silent, at(20)),
        "the first moment counts"
    );
    assert!(!nodes[0].tick(at(39)));
    assert_eq!(nodes[0].view().digest(), digest);
    assert_eq!(
        nodes[0].standing(&silent),
        Standing::Suspect { since: at(10) }
    );
    assert!(nodes[0].tick(at(40)));
    assert_eq!(nodes[0].standing(&silent), Standing::Departed);
    // Who buries it later, and knows as much, writes the same stone.
    nodes[1].suspect(&silent, at(15));
    nodes[1].tick(at(45));
    assert_eq!(nodes[0].view(), nodes[1].view());
}

#[test]
fn a_sign_of_life_ends_suspicion_and_an_older_one_does_not() {
    let mut node = settled(2).remove(0);
    let other = MemberId::from("n1");
    node.suspect(&other, at(10));
    assert!(!node.hear(&other, at(9)));
    assert!(node.hear(&other, at(11)));
    assert!(!node.tick(at(100)));
    assert_eq!(node.standing(&other), Standing::Well);
}

#[test]
fn another_life_is_not_suspect_for_what_the_last_one_did() {
    let mut node = settled(2).remove(0);
    let other = MemberId::from("n1");
    node.suspect(&other, at(10));
    let reborn = Member {
        generation: 3,
        ..member("n1", 4)
    };
    let digest = node.view().digest();
    node.merge([reborn], at(12));
    assert_eq!(node.standing(&other), Standing::Well);
    assert_eq!(node.view().digest(), digest, "a restart moves no owner");
}

#[test]
fn who_reads_of_its_own_death_answers_above_it() {
    let mut nodes = settled(2);
    let before = nodes[1].me().clone();
    nodes[0].suspect(&before.id, at(0));
    nodes[0].tick(at(30));
    let stone = nodes[0].view().get(&before.id).unwrap().clone();
    assert_eq!(stone.state, MemberState::Gone);
    assert!(nodes[1].merge([stone.clone()], at(31)));
    let after = nodes[1].me().clone();
    assert_eq!(
        (after.generation, after.version),
        (stone.generation, stone.version + 1)
    );
    assert_eq!(
        (after.state, after.weight),
        (MemberState::Active, before.weight)
    );
    assert!(nodes[0].merge([after], at(32)));
    assert_eq!(nodes[0].standing(&before.id), Standing::Well);
    assert_eq!(nodes[0].view(), nodes[1].view());
    let [news, own] = [0, 1].map(|n| nodes[n].take_news());
    assert!(news.is_back && news.appeared.contains(&before.id) && !news.was_gone);
    assert!(own.was_gone && !own.is_back);
    assert_eq!(nodes[0].take_news(), News::default(), "told once");
}

#[test]
fn a_restart_hears_of_those_it_thought_gone_and_of_newcomers() {
    let gone = Member {
        state: MemberState::Gone,
        ..member("a", 8)
    };
    let mut node = Members::new(TIMES, member("me", 8), &View::new([gone.clone()]), at(0));
    assert_eq!(node.take_news(), News::default());
    let back = Member {
        version: gone.version + 1,
        state: MemberState::Active,
        ..gone
    };
    node.merge([back, member("new", 8)], at(1));
    let news = node.take_news();
    assert!(news.is_back && news.appeared.len() == 2);
    node.merge([member("other", 8)], at(2));
    assert!(!node.take_news().is_back, "it was never here");
}

#[test]
fn who_comes_back_after_it_left_was_gone_and_who_drained_alone_was_not() {
    let mut node = settled(2).remove(0);
    node.drain(at(1));
    node.resume(at(2));
    node.leave(at(3));
    assert!(!node.news().was_gone, "not yet back");
    node.resume(at(4));
    assert!(node.news().was_gone);
}

#[test]
fn who_has_left_stays_gone() {
    let mut nodes = settled(2);
    nodes[1].leave(at(1));
    gossip(&mut nodes, at(2));
    let left = nodes[1].me().clone();
    assert_eq!(state(&nodes[0], "n1"), MemberState::Gone);
    assert!(!nodes[1].merge([left], at(3)));
    assert_eq!(nodes[1].me().state, MemberState::Gone);
}

#[test]
fn a_newcomer_ramps_up_in_steps_and_a_first_node_does_not() {
    assert_eq!(alone("a").me().state, MemberState::Active);
    let known = View::new([member("a", 8)]);
    let mut new = Members::new(TIMES, member("b", 8), &known, at(100));
    let mut seen = vec![(new.me().state, new.me().weight)];
    for second in 101..=130 {
        if new.tick(at(second)) {
            seen.push((new.me().state, new.me().weight));
        }
    }
    let joining = |weight| (MemberState::Joining, weight);
    assert_eq!(
        seen,
        [
            joining(2),
            joining(4),
            joining(6),
            joining(8),
            (MemberState::Active, 8)
        ]
    );
    assert_eq!(seen.len(), RAMP_STEPS as usize + 1);
    assert!(!new.tick(at(1000)));
}

#[test]
fn a_light_newcomer_takes_runs_from_its_first_step_and_never_more_than_its_weight() {
    let known = View::new([member("a", 8)]);
    let light = Members::new(TIMES, member("b", 1), &known, at(0));
    assert_eq!(
        (light.me().weight, light.me().state),
        (1, MemberState::Joining)
    );
    let none = Members::new(TIMES, member("b", 0), &known, at(0));
    assert_eq!(none.me().weight, 0);
}

#[test]
fn a_restarted_node_has_its_place_at_once_and_a_drained_one_begins_anew() {
    let others = [member("a", 8)];
    let again = |state| {
        let before = Member {
            state,
            version: 9,
            ..member("b", 8)
        };
        let known = View::new(others.iter().cloned().chain([before]));
        let me = Member {
            generation: 2,
            ..member("b", 8)
        };
        Members::new(TIMES, me, &known, at(0))
    };
    let restarted = again(MemberState::Active);
    assert_eq!(
        (restarted.me().state, restarted.me().weight),
        (MemberState::Active, 8)
    );
    assert!(!restarted.roster().is_young(at(1)), "nothing has moved");
    for state in [MemberState::Draining, MemberState::Gone] {
        assert_eq!(again(state).me().state, MemberState::Joining);
    }
    // A machine whose time has gone back: this life still wins over what is known of the last one.
    let me = Member {
        generation: 0,
        ..member("b", 8)
    };
    let known = View::new([member("b", 8)]);
    let node = Members::new(TIMES, me, &known, at(0));
    assert_eq!(node.view().get(&"b".into()), Some(node.me()));
}

#[test]
fn a_restarted_node_knows_who_owned_what_before_changes_that_it_slept_through() {
    let before = View::new([member("a", 4), member("b", 4)]);
    let now = View::new([member("a", 4), member("b", 4), member("c", 4)]);
    let me = Member {
        generation: 2,
        ..member("b", 4)
    };
    let mut again = Members::new(TIMES, me.clone(), &now, at(0));
    again.remember(&before, at(0));
    let roster = again.roster();
    assert!(roster.is_young(at(599)) && !roster.is_young(at(600)));
    let runs = (0..200).map(|n| RunHash([n; 32]));
    let moved = runs.filter(|run| {
        let was_mine = roster.former(run, at(1)) == ["b".into()];
        was_mine && !roster.owns(&me.id, run, 1)
    });
    assert!(
        (20..60).contains(&moved.count()),
        "about a third of its half"
    );
    // Where nothing has changed, or nobody was known, nothing is young.
    for before in [now.clone(), View::default()] {
        let mut again = Members::new(TIMES, me.clone(), &now, at(0));
        again.remember(&before, at(0));
        assert!(!again.roster().is_young(at(1)));
    }
}

#[test]
fn a_drained_node_takes_nothing_until_it_resumes() {
    let mut nodes = settled(3);
    assert!(nodes[1].drain(at(5)) && !nodes[1].drain(at(6)));
    gossip(&mut nodes, at(7));
    assert_eq!(nodes[0].roster().placement.len(), 2);
    assert!(nodes[1].resume(at(8)));
    assert_eq!(nodes[1].me().state, MemberState::Joining);
    nodes[1].tick(at(60));
    gossip(&mut nodes, at(61));
    assert_eq!(nodes[0].roster().placement.len(), 3);
    assert_eq!(state(&nodes[0], "n1"), MemberState::Active);
}

#[test]
fn a_weight_set_during_the_ramp_is_where_it_ends() {
    let known = View::new([member("a", 8)]);
    let mut new = Members::new(TIMES, member("b", 8), &known, at(0));
    new.set_weight(16, at(1));
    assert_eq!(new.me().weight, 4);
    new.tick(at(30));
    assert_eq!((new.me().weight, new.me().state), (16, MemberState::Active));
}

#[test]
fn while_a_change_is_young_the_former_owner_is_asked_first() {
    let mut node = settled(3).remove(0);
    let roster = node.roster();
    let run = (0..)
        .map(|i: u8| RunHash([i; 32]))
        .find(|run| roster.owners(run, 1)[0].id.0 == "n2")
        .unwrap();
    assert!(
        roster.candidates(&run, at(1)).is_empty(),
        "nothing has moved"
    );
    let gone = Member {
        generation: 2,
        version: 2,
        state: MemberState::Gone,
        ..member("n2", 4)
    };
    node.merge([gone], at(10));
    let roster = node.roster();
    let asked = roster.candidates(&run, at(11));
    assert_eq!(asked[0].id.0, "n2", "those just departed included");
    assert!(asked.iter().all(|candidate| candidate.id.0 != "n0") && asked.len() <= MOST_CANDIDATES);
    let mut ids: Vec<_> = asked.iter().map(|candidate| &candidate.id).collect();
    ids.dedup();
    assert_eq!(ids.len(), asked.len());
    assert!(!roster.is_young(at(610)) && roster.candidates(&run, at(610)).is_empty());
}

#[test]
fn of_many_changes_the_oldest_and_the_newest_are_remembered() {
    let mut node = alone("a");
    node.merge([member("b", 4)], at(1));
    for change in 2..40 {
        let heavier = Member {
            version: change,
            weight: change as u32,
            ..member("b", 4)
        };
        node.merge([heavier], at(change));
    }
    let roster = node.roster();
    assert_eq!(roster.past.len(), MOST_PAST);
    assert_eq!(roster.past[0].0, at(39));
    assert_eq!(roster.past[MOST_PAST - 1].0, at(1));
    assert_eq!(roster.past[MOST_PAST - 1].1.len(), 1, "a alone");
}

#[test]
fn a_view_that_lasted_is_remembered_through_a_storm_of_changes() {
    let mut node = alone("a");
    let heavier = |version: u64| Member {
        version,
        weight: version as u32,
        ..member("b", 4)
    };
    node.merge([heavier(2)], at(1));
    node.merge([heavier(3)], at(2));
    // A minute of this, and then many changes at once.
    node.merge([heavier(4)], at(62));
    let lasted = node.roster().past[0].1.clone();
    for change in 0..40 {
        let now = Tick(Duration::from_millis(62_001 + change));
        node.merge([heavier(5 + change)], now);
    }
    let past = node.roster().past;
    assert_eq!(past.len(), MOST_PAST);
    let is_it = |(_, placement): &(Tick, Arc<Placement>)| Arc::ptr_eq(placement, &lasted);
    assert!(
        past.iter().any(is_it),
        "what was put in that minute is found"
    );
    assert_eq!(past[MOST_PAST - 1].0, at(1));
}

#[test]
fn a_tombstone_is_forgotten_after_a_long_time() {
    let mut nodes = settled(2);
    let gone = MemberId::from("n1");
    nodes[0].suspect(&gone, at(0));
    nodes[0].tick(at(30));
    let kept = TOMBSTONES_KEPT.as_secs();
    nodes[0].tick(at(30 + kept - 1));
    assert!(nodes[0].view().get(&gone).is_some());
    let digest = nodes[0].view().digest();
    assert!(nodes[0].tick(at(30 + kept)));
    assert!(nodes[0].view().get(&gone).is_none());
    assert_eq!(nodes[0].view().digest(), digest);
    assert_eq!(nodes[0].standing(&gone), Standing::Departed);
}

#[test]
fn a_roster_says_who_owns_what_it_says() {
    let node = settled(3).remove(1);
    let roster = node.roster();
    assert_eq!(roster.digest, roster.view.digest());
    assert_ne!(roster.digest, ViewDigest(0));
    for i in 0..50 {
        let run = RunHash([i; 32]);
        for replicas in 1..=3 {
            let owners = roster.owners(&run, replicas);
            assert_eq!(owners.len(), replicas);
            for id in ["n0", "n1", "n2"] {
                let owns = owners.iter().any(|owner| owner.id.0 == id);
                assert_eq!(roster.owns(&id.into(), &run, replicas), owns);
            }
        }
    }
}
