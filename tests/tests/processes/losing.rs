//! Nodes that go without a word, and come back or do not.

use std::time::Duration;

use kvtests::{
    load::Plan,
    patience::{HANG, pause, until},
    processes::{Fleet, Sight, agree},
};

use crate::{
    AGREED, ANEW, BACK, GRACE, NOTICED, PROGRAMS, SETTINGS, SHORT, assert_all_left, full_level,
    scenario, show,
};

/// The first and the last of three notice in time that the second is silent.
async fn missed(fleet: &Fleet) {
    let all_miss_it = |sights: &[Sight]| sights.iter().all(|sight| sight.misses(1));
    fleet
        .see("the others miss it", NOTICED, &[0, 2], all_miss_it)
        .await;
}

#[test]
fn a_killed_node_comes_back_with_what_it_had_stored_and_one_that_stays_away_costs_its_blocks() {
    let test = "losing::a_killed_node_comes_back_with_what_it_had_stored_and_one_that_stays_away_costs_its_blocks";
    scenario(test, async {
        let mut fleet = Fleet::start(PROGRAMS, 3, SETTINGS).await;
        let mut load = fleet.load(&Plan::default());
        load.fill(true).await;
        let level = full_level(&mut load).await;

        // Quickly back, with its disk.
        let from = load.tally();
        fleet.kill(1);
        missed(&fleet).await;
        fleet.start_node(1);
        fleet.is_one(3, HANG).await;
        load.returns_to("hits are back, from its disk", level - SHORT, BACK)
            .await;
        show("killed and restarted", &load, &from);
        load.assert_clean();

        // Gone for good, with its disk.
        let from = load.tally();
        fleet.kill(1);
        fleet.wipe(1);
        missed(&fleet).await;
        fleet
            .see("and know it lost", GRACE + AGREED, &[0, 2], |s| agree(s, 2))
            .await;
        load.stop().await;
        let left = load.audit().await;
        println!(
            "  stated loss: {} of {} blocks",
            left.blocks - left.readable,
            left.blocks
        );
        assert!(left.readable > 0 && left.readable < left.blocks, "{left:?}");
        load.go(true);
        load.returns_to("hits are back, computed anew", level - SHORT, ANEW)
            .await;
        show("killed for good", &load, &from);
        load.assert_clean();

        // And somebody empty in its place.
        let from = load.tally();
        fleet.start_node(1);
        fleet.is_one(3, HANG).await;
        load.returns_to("hits are back, moved to it", level - SHORT, BACK)
            .await;
        show("a new one in its place", &load, &from);
        assert_all_left(&mut load, "nothing is lost by coming back").await;
    });
}

#[test]
fn a_frozen_node_delays_nobody_and_has_its_blocks_when_it_goes_on() {
    let test = "losing::a_frozen_node_delays_nobody_and_has_its_blocks_when_it_goes_on";
    scenario(test, async {
        let mut fleet = Fleet::start(PROGRAMS, 3, SETTINGS).await;
        let mut load = fleet.load(&Plan::default());
        // Over shared memory: the path on which a frozen node is silent in another way.
        let mut beside = fleet.load(&Plan {
            local: true,
            clients: 2,
            ..Plan::default()
        });
        load.fill(false).await;
        load.go(false);
        beside.go(false);
        let (level, level_beside) = (load.level().await, beside.level().await);
        println!("  level before: {level:.4}, beside the nodes {level_beside:.4}");
        assert!(
            level > 0.99 && level_beside > 0.99,
            "all that was put is there"
        );

        for frozen in [Duration::from_secs(3), Duration::from_secs(8)] {
            let (from, from_beside) = (load.tally(), beside.tally());
            fleet.freeze(1);
            missed(&fleet).await;
            pause(frozen).await;
            fleet.thaw(1);
            fleet.is_one(3, NOTICED + AGREED).await;
            load.returns_to("hits are back", level - SHORT, BACK).await;
            beside
                .returns_to("and beside the nodes", level_beside - SHORT, BACK)
                .await;
            show(&format!("frozen for {frozen:?} after that"), &load, &from);
            show("beside the nodes", &beside, &from_beside);
        }
        load.stop().await;
        beside.stop().await;
        let all = load.audit().await;
        assert_eq!(all.readable, all.blocks, "it has kept what it had");
        load.assert_clean();
        beside.assert_clean();
    });
}

#[test]
fn where_runs_have_two_owners_a_frozen_node_costs_no_block() {
    let test = "losing::where_runs_have_two_owners_a_frozen_node_costs_no_block";
    scenario(test, async {
        // It keeps its place: nothing moves, and only the other owners help.
        let settings = [SETTINGS, &["--suspect-grace=60s"]].concat();
        let mut fleet = Fleet::start(PROGRAMS, 3, &settings).await;
        let mut load = fleet.load(&Plan {
            replicas: 2,
            ..Plan::default()
        });
        // Answered when both have it.
        load.fill(true).await;
        let level = full_level(&mut load).await;

        let from = load.tally();
        fleet.freeze(1);
        load.returns_to(
            "hits are back from the other owners",
            level - SHORT,
            NOTICED,
        )
        .await;
        pause(Duration::from_secs(3)).await;
        show("frozen", &load, &from);
        fleet.thaw(1);
        fleet.is_one(3, NOTICED + AGREED).await;
        load.returns_to("and when it goes on", level - SHORT, BACK)
            .await;
        assert_all_left(&mut load, "nothing is lost").await;
    });
}

#[test]
fn what_had_owners_enough_survives_each_of_them_one_after_the_other() {
    let test = "losing::what_had_owners_enough_survives_each_of_them_one_after_the_other";
    scenario(test, async {
        let mut fleet = Fleet::start(PROGRAMS, 3, SETTINGS).await;
        let plan = Plan {
            replicas: 3,
            ..Plan::default()
        };
        let blocks = u64::from(plan.prompts * plan.blocks);
        let mut load = fleet.load(&plan);
        load.fill(true).await;
        fleet
            .hold("all have everything", BACK, &[0, 1, 2], blocks)
            .await;
        let level = full_level(&mut load).await;

        let from = load.tally();
        fleet.kill(1);
        fleet.wipe(1);
        load.returns_to("hits are back without it", level - SHORT, NOTICED)
            .await;
        fleet.start_node(1);
        fleet.is_one(3, HANG).await;
        fleet
            .hold("and it has everything again", BACK, &[1], blocks)
            .await;
        show("one died and came back empty", &load, &from);

        let from = load.tally();
        for node in [0, 2] {
            fleet.kill(node);
            fleet.wipe(node);
        }
        let limit = NOTICED + GRACE + AGREED;
        fleet
            .see("the others are known lost", limit, &[1], |s| agree(s, 1))
            .await;
        load.returns_to("hits are back from it alone", level - SHORT, BACK)
            .await;
        show("the other two died", &load, &from);
        assert_all_left(&mut load, "nothing is lost").await;
    });
}

#[test]
fn a_load_notices_other_bytes_and_calls_that_nobody_answers() {
    let test = "losing::a_load_notices_other_bytes_and_calls_that_nobody_answers";
    scenario(test, async {
        let mut fleet = Fleet::start(PROGRAMS, 1, SETTINGS).await;
        let small = Plan {
            prompts: 4,
            deadline_ms: 300,
            ..Plan::default()
        };
        let mut load = fleet.load(&small);
        load.fill(false).await;
        let mut other = fleet.load(&Plan { salt: 1, ..small });
        let read = other.audit().await;
        assert_eq!((read.readable, other.stop().await.wrong), (0, read.blocks));

        fleet.freeze(0);
        load.go(false);
        let failed = async || load.tally().dishonest > 0;
        until("calls fail", failed).await;
        load.stop().await;
        fleet.thaw(0);
        assert_eq!((load.tally().wrong, load.tally().late), (0, 0));
        assert!(!load.offences().is_empty(), "and it says which");
    });
}
