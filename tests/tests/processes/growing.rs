//! What operators do: restart one node after the other, add one, take one away.

use std::time::Duration;

use kvproto::v1::DrainPhase;
use kvtests::{
    load::Plan,
    patience::HANG,
    processes::{Fleet, agree},
};

use crate::{
    AGREED, BACK, NOTICED, PROGRAMS, SETTINGS, SHORT, assert_all_left, full_level, scenario, show,
};

/// More than handing over a few MiB takes.
const DRAIN: Duration = Duration::from_secs(30);

#[test]
fn a_rolling_restart_loses_nothing() {
    let test = "growing::a_rolling_restart_loses_nothing";
    scenario(test, async {
        let mut fleet = Fleet::start(PROGRAMS, 3, SETTINGS).await;
        let mut load = fleet.load(&Plan::default());
        load.fill(false).await;
        let level = full_level(&mut load).await;
        for node in 0..3 {
            let from = load.tally();
            fleet.stop(node).await;
            fleet.start_node(node);
            fleet.is_one(3, HANG).await;
            load.returns_to("hits are back", level - SHORT, BACK).await;
            show(&format!("{} restarted", fleet.place(node)), &load, &from);
        }
        assert_all_left(&mut load, "nothing is lost").await;
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
        let level = full_level(&mut load).await;

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
        assert_all_left(&mut load, "a drain loses nothing").await;
    });
}
