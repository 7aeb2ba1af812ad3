//! What operators do: restart one node after the other, add one, take one away.

use std::time::Duration;

use kvproto::v1::DrainPhase;
use kvtests::{
    load::Plan,
    patience::HANG,
    processes::{Fleet, agree},
};

use crate::{AGREED, BACK, NOTICED, PROGRAMS, SETTINGS, SHORT, scenario, show};

/// More than handing over a few MiB takes.
const DRAIN: Duration = Duration::from_secs(30);

#[test]
fn a_rolling_restart_loses_nothing() {
    let test = "growing::a_rolling_restart_loses_nothing";
    scenario(test, async {
        let mut fleet = Fleet::start(PROGRAMS, 3, SETTINGS).await;
        let mut load = fleet.load(&Plan::default());
        load.fill(false).await;
        load.go(false);
        let level = load.level().await;
        println!("  level before: {level:.4}");
        assert!(level > 0.99, "all that was put is there");
        for node in 0..3 {
            let from = load.tally();
            fleet.stop(node).await;
            fleet.start_node(node);
            fleet.is_one(3, HANG).await;
            load.returns_to("hits are back", level - SHORT, BACK).await;
            show(&format!("{} restarted", fleet.place(node)), &load, &from);
        }
        load.stop().await;
        let all = load.audit().await;
        assert_eq!(all.readable, all.blocks, "nothing is lost");
        load.assert_clean();
    });
}

#[test]
fn a_node_that_is_added_takes_its_share_and_one_that_is_drained_loses_nothing() {
    let test =
        "growing::a_node_that_is_added_takes_its_share_and_one_that_is_drained_loses_nothing";
    scenario(test, async {
        let mut fleet = Fleet::start(PROGRAMS, 3, SETTINGS).await;
        let mut load = fleet.load(&Plan::default());
        load.fill(false).await;
        load.go(false);
        let level = load.level().await;
        println!("  level before: {level:.4}");
        assert!(level > 0.99, "all that was put is there");

        let from = load.tally();
        let added = fleet.seat();
        fleet.start_node(added);
        fleet.is_one(4, HANG).await;
        load.returns_to("hits are back", level - SHORT, BACK).await;
        show("one added", &load, &from);
        load.assert_clean();

        let from = load.tally();
        let told = fleet.drain(0, DRAIN).await;
        println!(
            "  drained: {:?}, {} runs and {} bytes moved, {} bytes at stake",
            told.phase(),
            told.moved_runs,
            told.moved_bytes,
            told.at_stake_bytes
        );
        assert_eq!(told.phase(), DrainPhase::Left);
        assert_eq!((told.at_stake_bytes, told.left_blocks), (0, 0));
        let others = [1, 2, added];
        fleet
            .see("the others agree", NOTICED + AGREED, &others, |s| {
                agree(s, 3)
            })
            .await;
        fleet.stop(0).await;
        load.returns_to("hits are back", level - SHORT, BACK).await;
        show("one drained", &load, &from);
        load.stop().await;
        let all = load.audit().await;
        assert_eq!(all.readable, all.blocks, "a drain loses nothing");
        load.assert_clean();
    });
}
