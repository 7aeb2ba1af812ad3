//! Networks that fall in two, and networks that are slow.

use std::time::Duration;

use kvtests::{
    load::Plan,
    namespaces::SlowLink,
    patience::pause,
    processes::{Fleet, agree},
};

use crate::{
    AGREED, ANEW, BACK, GRACE, NOTICED, PROGRAMS, SETTINGS, SHORT, assert_all_left, full_level,
    scenario, show,
};

#[test]
fn both_sides_of_a_partition_go_on_serving_and_are_one_again_when_it_heals() {
    let test = "networks::both_sides_of_a_partition_go_on_serving_and_are_one_again_when_it_heals";
    scenario(test, async {
        let mut fleet = Fleet::start(PROGRAMS, 4, SETTINGS).await;
        let (mut left, mut right) = (fleet.load(&Plan::default()), fleet.load(&Plan::default()));
        left.fill(false).await;
        left.go(true);
        right.go(true);
        let (level, level_right) = (left.level().await, right.level().await);
        println!("  level before: {level:.4}, {level_right:.4}");
        assert!(
            level > 0.99 && level_right > 0.99,
            "all that was put is there"
        );

        let (from, from_right) = (left.tally(), right.tally());
        fleet.divide(&[2, 3], &[1]);
        let limit = NOTICED + GRACE + AGREED;
        fleet
            .see("each side agrees", limit, &[0, 1, 2, 3], |s| {
                agree(&s[..2], 2) && agree(&s[2..], 2)
            })
            .await;
        left.returns_to("hits are back on the left", level - SHORT, ANEW)
            .await;
        right
            .returns_to("and on the right", level_right - SHORT, ANEW)
            .await;
        show("divided, left", &left, &from);
        show("divided, right", &right, &from_right);
        left.assert_clean();
        right.assert_clean();

        let (from, from_right) = (left.tally(), right.tally());
        fleet.heal(&[2, 3], &[1]);
        fleet.is_one(4, NOTICED + AGREED).await;
        left.returns_to("hits are back on the left", level - SHORT, BACK)
            .await;
        right
            .returns_to("and on the right", level_right - SHORT, BACK)
            .await;
        show("healed, left", &left, &from);
        show("healed, right", &right, &from_right);
        left.stop().await;
        right.stop().await;
        left.assert_clean();
        right.assert_clean();
    });
}

#[test]
fn a_slow_link_costs_hits_and_no_more_time_than_a_call_has() {
    let test = "networks::a_slow_link_costs_hits_and_no_more_time_than_a_call_has";
    scenario(test, async {
        let mut fleet = Fleet::start(PROGRAMS, 3, SETTINGS).await;
        let mut load = fleet.load(&Plan::default());
        load.fill(false).await;
        let level = full_level(&mut load).await;

        for kbit in [20_000, 1_000] {
            let from = load.tally();
            let link = SlowLink { kbit, delay_ms: 30 };
            let means = fleet.network.slow(&fleet.place(1), link);
            println!("  {kbit} kbit/s by {means}");
            pause(Duration::from_secs(8)).await;
            show("slow", &load, &from);
            fleet.network.quick(&fleet.place(1));
            fleet.is_one(3, NOTICED + AGREED).await;
            load.returns_to("hits are back", level - SHORT, BACK).await;
        }
        assert_all_left(&mut load, "nothing is lost").await;
    });
}
