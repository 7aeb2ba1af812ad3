//! Eight processes and their gossip: bounds, not histories.

use std::time::Duration;

use kvtests::{
    patience::{HANG, pause},
    processes::{Fleet, Sight, agree, nobody_is_suspect},
};

use crate::{AGREED, NOTICED, PROGRAMS, scenario};

const NODES: usize = 8;

/// Short of `AGREED`, so that what is measured is gossip.
const SETTINGS: &[&str] = &[
    "--suspect-grace=500ms",
    "--join-ramp=0ms",
    "--ram-bytes=16MiB",
    "--nvme-bytes=0",
];

#[test]
fn a_death_is_known_to_all_in_time_and_views_agree_after_it_and_after_a_partition() {
    let test =
        "gossip::a_death_is_known_to_all_in_time_and_views_agree_after_it_and_after_a_partition";
    scenario(test, async {
        let mut fleet = Fleet::start(PROGRAMS, NODES, SETTINGS).await;
        let all: Vec<usize> = (0..NODES).collect();
        let before = fleet.sight(0).await.expect("it answers").digest;

        let dead = 5;
        fleet.kill(dead);
        let others = fleet.running();
        let missed = |sights: &[Sight]| sights.iter().all(|sight| sight.misses(dead));
        fleet
            .see("a death is known to all", NOTICED, &others, missed)
            .await;
        fleet
            .see("views are equal after it", AGREED, &others, |s| {
                agree(s, NODES - 1)
            })
            .await;
        let well = |sights: &[Sight]| sights.iter().all(nobody_is_suspect);
        fleet
            .see("nobody else is suspect", NOTICED, &others, well)
            .await;

        fleet.start_node(dead);
        fleet
            .see("it is back in every view", HANG, &all, |s| agree(s, NODES))
            .await;
        let again = fleet.sight(0).await.expect("it answers").digest;
        assert_eq!(again, before, "and has its old place");
        fleet
            .see("and nobody is suspect", NOTICED, &all, well)
            .await;

        let (left, right) = all.split_at(NODES / 2);
        fleet.divide(right, &[]);
        let misses = |sights: &[Sight], others: &[usize]| {
            sights
                .iter()
                .all(|sight| others.iter().all(|other| sight.misses(*other)))
        };
        fleet
            .see("each half misses the other", NOTICED, &all, |sights| {
                misses(&sights[..left.len()], right) && misses(&sights[left.len()..], left)
            })
            .await;
        fleet
            .see("each half agrees", AGREED, &all, |sights| {
                let (of_left, of_right) = sights.split_at(left.len());
                agree(of_left, left.len()) && agree(of_right, right.len())
            })
            .await;
        // Long enough for connections and gossip to have given each other up.
        pause(Duration::from_secs(8)).await;

        fleet.heal(right, &[]);
        let what = "after the partition all views are equal";
        fleet
            .see(what, NOTICED + AGREED, &all, |sights| agree(sights, NODES))
            .await;
        let again = fleet.sight(0).await.expect("it answers").digest;
        assert_eq!(again, before, "nobody lost its place");
        fleet
            .see("and nobody is suspect", NOTICED, &all, well)
            .await;
    });
}
