//! Moves over maps: what goes where, in which order, and what becomes of what was left behind.

use super::*;
use crate::blocks::motion::plan;

#[tokio::test]
async fn what_changed_its_owner_moves_hottest_first_and_goes_first_only_then() {
    // Half a second for a run.
    let mut town = Town::paced(&["a", "b"], 1, 8 * BLOCK_BYTES as u64);
    town.nodes.values().for_each(|node| node.motion.start());
    let moved = town.moved_to("c", 40);
    // The hottest of one old owner, and another one of his.
    let from = |id: &str| {
        moved
            .iter()
            .filter(|(_, old)| old.0 == id)
            .collect::<Vec<_>>()
    };
    let of_a = from("a");
    assert!(of_a.len() > 2);
    let (hot, _) = of_a[of_a.len() / 2];
    let key = town.keys(hot)[1];
    for _ in 0..3 {
        assert!(town.shelf("a").find(&key).is_some());
    }
    town.pass(Duration::from_millis(150)).await;
    assert!(town.has_all("c", hot), "the first one goes without waiting");
    let arrived = of_a.iter().filter(|(chain, _)| town.has_all("c", chain));
    assert_eq!(arrived.count(), 1, "the next ones wait for their turn");
    let going = town.shelf("a").going();
    assert_eq!(
        going,
        town.keys(hot).into_iter().collect(),
        "acknowledged, and nothing else"
    );
    town.pass(Duration::from_secs(20)).await;
    for (chain, _) in &moved {
        assert!(town.has_all("c", chain));
    }
    let progress = town.node("a").motion.account();
    assert_eq!((progress.waiting_runs, progress.left_blocks), (0, 0));
    let bytes: u64 = ["a", "b"]
        .map(|id| town.node(id).motion.account().moved_bytes)
        .iter()
        .sum();
    let changed = moved.len() * RUN_BLOCKS as usize * BLOCK_BYTES;
    assert_eq!(bytes, changed as u64, "what changed its owner, once");
}

#[tokio::test]
async fn a_move_that_was_cut_off_goes_on_where_it_was() {
    let mut town = Town::new(&["a"], 1);
    let moved = town.moved_to("c", 12);
    let half = moved.len() / 2;
    for (chain, _) in &moved[..half] {
        town.put_at(chain, "c"); // they went before the node was stopped
    }
    town.node("a").motion.start();
    town.pass(Duration::from_millis(400)).await;
    for (chain, _) in &moved {
        assert!(town.has_all("c", chain));
    }
    assert_eq!(
        town.called("put"),
        moved.len() - half,
        "only the rest was sent"
    );
    let sent = town.node("a").motion.account();
    assert_eq!(sent.moved_runs as usize, moved.len() - half);
    let going = town.shelf("a").going().len();
    assert_eq!(going, moved.len() * RUN_BLOCKS as usize);
}

/// A caller with an old view puts it where it was put before.
#[tokio::test]
async fn what_is_put_anew_after_an_invalidation_moves_again() {
    let mut town = Town::new(&["a"], 1);
    town.node("a").motion.start();
    let moved = town.moved_to("c", 12);
    town.pass(Duration::from_secs(5)).await;
    let chain = &moved[0].0;
    assert!(town.has_all("c", chain));
    let sent = town.called("put");
    for (id, key) in (77..).zip(town.keys(chain)) {
        for node in ["a", "c"] {
            town.shelf(node).invalidate(&key, id);
            let motion = &town.node(node).motion;
            motion.forget(key.namespace, Some(key.hash));
        }
    }
    town.put_at(chain, "a");
    town.pass(Duration::from_secs(5)).await;
    assert!(town.has_all("c", chain));
    assert_eq!(town.called("put"), sent + 1, "nothing else went again");
}

/// Runs of `a` that belong to `c` from now on, in the order in which they will be sent: the first of them in `SETTLE`.
async fn about_to_move() -> (Town, Vec<Chain>) {
    let mut town = Town::new(&["a"], 1);
    town.node("a").motion.start();
    let mut moved: Vec<Chain> = town.moved_to("c", 30).into_iter().map(|(c, _)| c).collect();
    moved.sort_by_key(|chain| chain.hashes[0]);
    (town, moved)
}

#[tokio::test]
async fn a_run_that_is_being_fetched_is_not_sent_as_well() {
    let (town, moved) = about_to_move().await;
    town.pass(SETTLE).await;
    assert_eq!(
        town.called("lookup"),
        1,
        "it is asked whether it has the first"
    );
    let lookup = tokio::spawn(town.lookup("c", &moved[0]));
    town.pass(Duration::from_millis(200)).await;
    assert!(lookup.is_finished());
    assert!(moved.iter().all(|chain| town.has_all("c", chain)));
    assert_eq!(
        (town.called("get"), town.called("put")),
        (1, moved.len() - 1)
    );
    assert_eq!(town.node("a").motion.account().waiting_runs, 0);
}

#[tokio::test]
async fn a_node_that_may_have_what_others_were_told_to_forget_hands_nothing_over() {
    let (town, moved) = about_to_move().await;
    let late = &town.node("a").cluster;
    late.take_news();
    late.fall_behind();
    town.pass(Duration::from_millis(400)).await;
    assert_eq!(town.called("put"), 0);
    // What it forgets when it has asked never goes.
    town.shelf("a").invalidate(&town.keys(&moved[0])[0], 7);
    late.has_caught_up();
    town.pass(Duration::from_millis(400)).await;
    assert!(!town.has_all("c", &moved[0]));
    assert!(moved[1..].iter().all(|chain| town.has_all("c", chain)));
}

#[tokio::test]
async fn a_run_that_is_being_sent_is_not_fetched_as_well() {
    let (town, moved) = about_to_move().await;
    town.pass(SETTLE + Duration::from_millis(1)).await;
    assert_eq!(town.called("put"), 1);
    assert!(town.has_none("c", &moved[0]));
    let lookup = tokio::spawn(town.lookup("c", &moved[0]));
    town.pass(Duration::from_millis(200)).await;
    assert!(lookup.is_finished());
    assert!(moved.iter().all(|chain| town.has_all("c", chain)));
    assert_eq!((town.called("get"), town.called("put")), (0, moved.len()));
    assert!(town.shelf("a").leased().is_empty());
}

#[tokio::test]
async fn what_was_fetched_while_its_move_waited_for_its_turn_is_not_sent() {
    // Half a second for a run.
    let mut town = Town::paced(&["a"], 1, 8 * BLOCK_BYTES as u64);
    town.node("a").motion.start();
    let mut moved: Vec<Chain> = town.moved_to("c", 30).into_iter().map(|(c, _)| c).collect();
    moved.sort_by_key(|chain| chain.hashes[0]);
    town.pass(Duration::from_millis(300)).await;
    assert_eq!(town.called("put"), 1, "the second waits for its turn");
    let lookup = tokio::spawn(town.lookup("c", &moved[1]));
    town.pass(Duration::from_millis(50)).await;
    assert!(lookup.is_finished() && town.has_all("c", &moved[1]));
    town.pass(Duration::from_secs(20)).await;
    assert!(moved.iter().all(|chain| town.has_all("c", chain)));
    assert_eq!(town.called("put"), moved.len() - 1);
}

#[tokio::test]
async fn nothing_is_sent_to_who_turns_out_to_own_it_no_more() {
    let (town, _) = about_to_move().await;
    town.pass(SETTLE).await;
    assert_eq!(town.called("lookup"), 1);
    // As its answer says that is on its way.
    town.node("c").cluster.drain();
    let news = town.node("c").cluster.declared();
    town.node("a").cluster.merge([news]);
    town.pass(Duration::from_secs(1)).await;
    assert_eq!(town.called("put"), 0);
}

#[tokio::test]
async fn a_node_that_is_started_again_in_mid_move_goes_on_with_it() {
    // Half a second for a run.
    let mut town = Town::paced(&["a"], 1, 8 * BLOCK_BYTES as u64);
    town.node("a").motion.start();
    let moved = town.moved_to("c", 30);
    town.pass(Duration::from_secs(2)).await;
    let has_come = |town: &Town| moved.iter().filter(|(c, _)| town.has_all("c", c)).count();
    let before = has_come(&town);
    assert!((1..moved.len()).contains(&before), "{before}");
    town.start_again("a").await;
    town.node("a").motion.start();
    town.pass(Duration::from_secs(20)).await;
    assert_eq!(has_come(&town), moved.len());
    assert_eq!(town.called("put"), moved.len(), "each once");
}

#[tokio::test]
async fn a_lease_is_honoured_while_its_run_moves() {
    let mut town = Town::new(&["a"], 1);
    let (chain, _) = town.put(0);
    let asked = Asked {
        space: Arc::clone(&town.space),
        chain: chain.clone(),
        parts: PARTS.to_vec(),
    };
    let lease = town.shelf("a").lease(&asked, Duration::from_secs(60)).lease;
    // Everything goes to the newcomer.
    town.build("c");
    town.node("a").cluster.set_weight(0);
    town.acquaint();
    town.node("a").motion.start();
    town.pass(Duration::from_millis(300)).await;
    assert!(town.has_all("c", &chain));
    assert!(!town.shelf("a").going().is_empty());
    // Room is needed; what is leased stays, although it is first to go.
    let roomy = (1 << 20) / BLOCK_BYTES as u32 / RUN_BLOCKS + 10;
    (1000..1000 + roomy).for_each(|seed| town.put_at(&town.chain(seed), "a"));
    for key in town.keys(&chain) {
        let got = Service::get(&**town.shelf("a"), &key, lease.map(|(id, _)| id));
        assert!(matches!(got, crate::peers::Fetched::Hit(_)));
    }
    town.clock.advance(Duration::from_secs(61));
    town.put_at(&town.chain(9000), "a");
    assert!(
        town.has_none("a", &chain),
        "first to go once nobody holds it"
    );
}

#[test]
fn a_plan_names_what_has_another_owner_hottest_first() {
    let clock = ManualClock::new(1);
    let members = Members::new(TIMES, member("a"), &View::default(), clock.now());
    let cluster = Cluster::new(members, Arc::new(clock.clone()));
    let run = |n: u8| HeldRun {
        key: RunKey {
            namespace: kvproto::NamespaceId([1; 16]),
            run: kvproto::RunHash(blake(n)),
        },
        blocks: 1,
        bytes: 1,
        heat: u32::from(n),
    };
    let held: Vec<HeldRun> = (0..100).map(run).collect();
    assert_eq!(
        plan(&cluster.roster(), cluster.me(), &held, |_| 1, clock.now()),
        []
    );
    cluster.merge([member("b")]);
    let roster = cluster.roster();
    let moves = plan(&roster, cluster.me(), &held, |_| 1, clock.now());
    assert!(
        (25..75).contains(&moves.len()),
        "about half: {}",
        moves.len()
    );
    assert!(
        moves
            .windows(2)
            .all(|pair| pair[0].run.heat > pair[1].run.heat)
    );
    for one in &moves {
        assert_eq!(roster.owners(&one.run.key.run, 1)[0].id, one.to.id);
        assert!(one.leaves);
    }
}

/// Something like a hash.
fn blake(n: u8) -> [u8; 32] {
    let key = NamespaceKey::from_bytes([9; 32]);
    hash::chain(&key, 1, &[u32::from(n)])[0].0
}
