//! Reads in motion over maps: what a lookup that misses brings, and what it costs.

use super::*;

#[tokio::test]
async fn a_newcomer_fetches_what_it_owns_now_and_keeps_it() {
    let mut town = Town::new(&["a", "b"], 1);
    let moved = town.moved_to("c", 30);
    assert!(moved.len() > 3, "a third of them moves");
    for (chain, old) in &moved {
        assert!(town.has_none("c", chain));
        let lookup = tokio::spawn(town.lookup("c", chain));
        town.pass(Duration::from_millis(10)).await;
        assert!(lookup.is_finished());
        assert!(town.has_all("c", chain));
        assert!(town.has_all(&old.0, chain), "a copy is a copy");
        assert!(
            town.shelf(&old.0).leased().is_empty(),
            "the lease was given back"
        );
    }
    let calls = town.net.called().len();
    let again = tokio::spawn(town.lookup("c", &moved[0].0));
    settle().await;
    assert!(again.is_finished());
    assert_eq!(
        town.net.called().len(),
        calls,
        "what is here is asked of nobody"
    );
}

#[tokio::test]
async fn nobody_is_asked_for_what_somebody_else_owns_or_when_nothing_has_changed() {
    let mut town = Town::new(&["a", "b"], 1);
    let unknown = town.chain(1);
    town.lookup("a", &unknown).await;
    assert_eq!(town.net.called(), [], "no change is young");
    town.join("c");
    let owner = town.owner(&unknown);
    let other = ["a", "b", "c"]
        .into_iter()
        .find(|id| *id != owner.0)
        .unwrap();
    town.lookup(other, &unknown).await;
    assert_eq!(town.net.called(), [], "it is another's run");
    town.clock.advance(WINDOW);
    town.lookup(&owner.0, &unknown).await;
    assert_eq!(town.net.called(), [], "the change is old");
}

#[tokio::test]
async fn a_hundred_lookups_of_one_run_fetch_it_once() {
    let mut town = Town::new(&["a", "b"], 1);
    let (chain, _) = town.moved_to("c", 30).remove(0);
    let lookups: Vec<_> = (0..100)
        .map(|_| tokio::spawn(town.lookup("c", &chain)))
        .collect();
    town.pass(Duration::from_millis(10)).await;
    assert!(lookups.iter().all(|lookup| lookup.is_finished()));
    assert!(town.has_all("c", &chain));
    assert_eq!((town.called("lookup"), town.called("get")), (1, 1));
}

#[tokio::test]
async fn who_wants_more_of_a_run_than_is_on_its_way_waits_and_gets_it() {
    let mut town = Town::new(&["a", "b"], 1);
    let (chain, _) = town.moved_to("c", 30).remove(0);
    let head = chain.slice(0..2, RUN_BLOCKS);
    let first = tokio::spawn(town.lookup("c", &head));
    let second = tokio::spawn(town.lookup("c", &chain));
    town.pass(Duration::from_millis(20)).await;
    assert!(first.is_finished() && second.is_finished());
    assert!(town.has_all("c", &chain));
    assert_eq!(town.called("get"), 2);
}

#[tokio::test]
async fn a_dead_frozen_or_lying_candidate_costs_a_miss_and_no_time_beyond_the_bound() {
    for fault in [Fault::Dead, Fault::Frozen, Fault::Lies] {
        let mut town = Town::new(&["a", "b"], 1);
        let (chain, old) = town.moved_to("c", 30).remove(0);
        town.net.fault(&old, fault);
        let lookup = tokio::spawn(town.lookup("c", &chain));
        town.pass(Duration::from_millis(101)).await;
        assert!(lookup.is_finished(), "{fault:?}");
        assert!(
            town.has_none("c", &chain),
            "{fault:?}: a miss, and no wrong byte"
        );
        // The flight itself is bounded too, and the next one finds a node that is well again.
        town.pass(Duration::from_secs(2)).await;
        town.net.fault(&old, Fault::None);
        let lookup = tokio::spawn(town.lookup("c", &chain));
        town.pass(Duration::from_millis(20)).await;
        assert!(
            lookup.is_finished() && town.has_all("c", &chain),
            "{fault:?}"
        );
    }
}

#[tokio::test]
async fn a_prompt_that_is_nowhere_costs_one_question_each_and_is_not_asked_for_again_at_once() {
    let mut town = Town::new(&["a", "b"], 1);
    town.join("c");
    let tokens: Vec<u32> = (0..16 * RUN_BLOCKS * 50).collect();
    let long = Chain::from_root(hash::chain(&town.key, 16, &tokens));
    let first = RUN_BLOCKS as usize;
    let owner = town.owner(&long.slice(0..first, RUN_BLOCKS));
    for _ in 0..10 {
        let lookup = tokio::spawn(town.lookup(&owner.0, &long));
        town.pass(Duration::from_millis(10)).await;
        assert!(lookup.is_finished());
    }
    assert_eq!(town.called("lookup"), 2, "{:?}", town.net.called());
    town.pass(Duration::from_secs(1)).await;
    let lookup = tokio::spawn(town.lookup(&owner.0, &long));
    town.pass(Duration::from_millis(10)).await;
    assert!(lookup.is_finished());
    assert_eq!(
        town.called("lookup"),
        4,
        "a second later it is worth asking again"
    );
}

#[tokio::test]
async fn a_short_deadline_halves_the_wait() {
    let mut town = Town::new(&["a", "b"], 1);
    let (chain, old) = town.moved_to("c", 30).remove(0);
    town.net.fault(&old, Fault::Frozen);
    let motion = &town.node("c").motion;
    let time_left = Duration::from_millis(40);
    let lookup = tokio::spawn(motion.bring_prefix(&town.space, &chain, PARTS, time_left));
    town.pass(Duration::from_millis(19)).await;
    assert!(!lookup.is_finished());
    town.pass(Duration::from_millis(2)).await;
    assert!(lookup.is_finished());
}

#[tokio::test]
async fn two_nodes_that_each_think_to_be_the_owner_never_bounce_a_read() {
    let mut town = Town::new(&["a", "b"], 1);
    // Each believes that the other has left.
    for (me, other) in [("a", "b"), ("b", "a")] {
        let mut gone = member(other);
        (gone.version, gone.state) = (9, MemberState::Gone);
        town.node(me).cluster.merge([gone]);
    }
    town.clock.advance(Duration::from_millis(1));
    let chain = town.chain(77);
    let lookups = ["a", "b"].map(|id| tokio::spawn(town.lookup(id, &chain)));
    town.pass(Duration::from_millis(50)).await;
    assert!(lookups.iter().all(|lookup| lookup.is_finished()));
    assert!(
        town.called("lookup") <= 2,
        "each asks the other once: {:?}",
        town.net.called()
    );
    assert_eq!(town.called("get"), 0);
    town.join("c");
}

#[tokio::test]
async fn what_was_invalidated_while_it_was_on_its_way_does_not_come_back() {
    let mut town = Town::new(&["a", "b"], 1);
    let (chain, _) = town.moved_to("c", 30).remove(0);
    let lookup = tokio::spawn(town.lookup("c", &chain));
    settle().await; // it has been asked for, and is not here yet
    let keys = town.keys(&chain);
    town.shelf("c").invalidate(&keys[0], 1);
    town.pass(Duration::from_millis(20)).await;
    assert!(lookup.is_finished());
    assert!(!town.shelf("c").has(&keys[0]));
    // Nor later, although the old owner still has it.
    let lookup = tokio::spawn(town.lookup("c", &chain));
    town.pass(Duration::from_millis(20)).await;
    assert!(lookup.is_finished() && !town.shelf("c").has(&keys[0]));
}

#[tokio::test]
async fn a_further_owner_that_lost_its_copy_gets_it_back_by_reading() {
    let town = Town::new(&["a", "b", "c"], 2);
    let chain = town.chain(5);
    let roster = town.node("a").cluster.roster();
    let owners = roster.owners(&chain.hashes[0].into(), 2);
    town.put_at(&chain, &owners[0].id.0);
    // No change is young; that there is another owner is reason enough.
    let lookup = tokio::spawn(town.lookup(&owners[1].id.0, &chain));
    town.pass(Duration::from_millis(20)).await;
    assert!(lookup.is_finished());
    assert!(town.has_all(&owners[1].id.0, &chain));
}
