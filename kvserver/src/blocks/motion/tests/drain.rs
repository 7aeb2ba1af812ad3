//! Drains over maps: what is at stake, and who has it in the end.

use tokio::task::JoinHandle;

use super::*;
use crate::blocks::motion::Progress;

impl Town {
    /// Waits for `a` to be drained, for so long at most.
    fn drained(&self, most: Duration) -> JoinHandle<Progress> {
        let motion = Arc::clone(&self.node("a").motion);
        let until = self.clock.now().after(most);
        tokio::spawn(async move { motion.drained(until).await })
    }
}

/// A drain has ended, nothing is at stake, and all of these that were `a`'s lie with `to` now.
async fn is_over(town: &Town, draining: JoinHandle<Progress>, put: &[(Chain, MemberId)], to: &str) {
    assert!(draining.is_finished());
    assert_eq!(draining.await.unwrap().at_stake_bytes(), 0);
    for (chain, owner) in put {
        assert!(owner.0 != "a" || town.has_all(to, chain));
    }
}

#[tokio::test]
async fn a_node_that_drains_loses_nothing() {
    let town = Town::new(&["a", "b", "c"], 1);
    let put: Vec<_> = (0..30).map(|seed| town.put(seed)).collect();
    town.nodes.values().for_each(|node| node.motion.start());
    town.node("a").cluster.drain();
    town.acquaint();
    let draining = town.drained(Duration::from_secs(60));
    town.pass(Duration::from_secs(2)).await;
    assert!(draining.is_finished(), "long before its deadline");
    let account = draining.await.unwrap();
    assert!(account.is_draining);
    assert_eq!((account.left_blocks, account.at_stake_bytes()), (0, 0));
    for (chain, _) in &put {
        let owner = town.owner(chain);
        assert_ne!(owner.0, "a");
        assert!(town.has_all(&owner.0, chain));
    }
}

#[tokio::test]
async fn a_block_whose_tier_was_busy_is_at_stake_until_it_was_tried_again() {
    let town = Town::new(&["a", "b"], 1);
    let put: Vec<_> = (0..20).map(|seed| town.put(seed)).collect();
    let of_a = put.iter().filter(|(_, owner)| owner.0 == "a");
    let of_a: Vec<&Chain> = of_a.map(|(chain, _)| chain).collect();
    let busy = town.keys(of_a[1])[2];
    let a = town.node("a");
    a.tiered.busy.lock().insert(busy);
    a.motion.start();
    a.cluster.drain();
    town.acquaint();
    let draining = town.drained(LONG);
    town.pass(Duration::from_secs(1)).await;
    assert!(!draining.is_finished(), "it has not handed over everything");
    assert!(a.tiered.busy.lock().is_empty() && !town.shelf("b").has(&busy));
    let account = a.motion.account();
    let at_stake = (account.left_blocks, account.at_stake_bytes());
    assert_eq!(at_stake, (1, BLOCK_BYTES as u64));
    assert_eq!(town.shelf("b").len(), put.len() * RUN_BLOCKS as usize - 1);
    // The next look finds the tier idle.
    town.pass(MotionConfig::default().again).await;
    assert!(draining.is_finished());
    assert_eq!(draining.await.unwrap().at_stake_bytes(), 0);
    assert!(of_a.iter().all(|chain| town.has_all("b", chain)));
}

#[tokio::test]
async fn a_drain_whose_deadline_passes_says_exactly_what_would_be_lost() {
    let town = Town::paced(&["a", "b"], 1, BLOCK_BYTES as u64 * 8);
    let put: Vec<_> = (0..20).map(|seed| town.put(seed)).collect();
    let of_a = put.iter().filter(|(_, owner)| owner.0 == "a");
    let of_a: Vec<&Chain> = of_a.map(|(chain, _)| chain).collect();
    town.node("a").motion.start();
    town.node("a").cluster.drain();
    town.acquaint();
    let draining = town.drained(Duration::from_millis(1300));
    town.pass(Duration::from_millis(1310)).await;
    assert!(draining.is_finished());
    let account = draining.await.unwrap();
    let lost = of_a
        .iter()
        .filter(|chain| !town.has_all("b", chain))
        .count();
    assert!((1..of_a.len()).contains(&lost), "{lost} of {}", of_a.len());
    let blocks = (lost * RUN_BLOCKS as usize) as u64;
    assert_eq!(account.waiting_runs, lost as u64);
    assert_eq!(account.left_blocks, blocks);
    assert_eq!(account.at_stake_bytes(), blocks * BLOCK_BYTES as u64);
}

#[tokio::test]
async fn a_drain_waits_for_another_owner_where_the_one_that_took_a_run_falls_silent() {
    let town = Town::new(&["a", "b", "c"], 1);
    let put: Vec<_> = (0..30).map(|seed| town.put(seed)).collect();
    town.nodes.values().for_each(|node| node.motion.start());
    town.node("a").cluster.drain();
    town.acquaint();
    town.pass(Duration::from_secs(2)).await;
    // All is handed over, and half of it to somebody who dies right then.
    town.net.detach(&MemberId::from("b"));
    town.node("a").cluster.suspect(&MemberId::from("b"));
    assert!(town.node("a").motion.account().at_stake_bytes() > 0);
    let draining = town.drained(Duration::from_secs(60));
    town.pass(Duration::from_secs(2)).await;
    assert!(!draining.is_finished());
    town.clock.advance(Duration::from_secs(30));
    town.node("a").cluster.tick();
    town.pass(Duration::from_secs(2)).await;
    is_over(&town, draining, &put, "c").await;
}

#[tokio::test]
async fn what_was_handed_to_a_node_that_drains_as_well_is_at_stake_until_somebody_who_stays_has_it()
{
    let town = Town::new(&["a", "b", "c"], 1);
    let put: Vec<_> = (0..30).map(|seed| town.put(seed)).collect();
    town.node("a").motion.start();
    town.node("a").cluster.drain();
    town.acquaint();
    town.pass(Duration::from_secs(2)).await;
    let motion = Arc::clone(&town.node("a").motion);
    assert_eq!(motion.account().at_stake_bytes(), 0);
    // Whether b will hand its copies on is not for a to know.
    town.node("b").cluster.drain();
    town.acquaint();
    assert!(motion.account().at_stake_bytes() > 0);
    let draining = town.drained(LONG);
    town.pass(Duration::from_secs(2)).await;
    is_over(&town, draining, &put, "c").await;
}

#[tokio::test]
async fn the_last_node_that_drains_is_told_that_all_would_be_lost() {
    let town = Town::new(&["a"], 1);
    town.put(0);
    town.node("a").motion.start();
    town.node("a").cluster.drain();
    let draining = town.drained(LONG);
    town.pass(Duration::from_millis(300)).await;
    assert!(draining.is_finished(), "nobody will come");
    let account = draining.await.unwrap();
    assert_eq!(account.left_blocks, u64::from(RUN_BLOCKS));
}

#[tokio::test]
async fn what_comes_back_after_a_drain_that_was_called_off_goes_first_at_one_node_alone() {
    let town = Town::new(&["a", "b"], 1);
    let put: Vec<_> = (0..20).map(|seed| town.put(seed)).collect();
    town.nodes.values().for_each(|node| node.motion.start());
    town.node("a").cluster.drain();
    town.acquaint();
    town.pass(Duration::from_secs(5)).await;
    let of_a = || put.iter().filter(|(_, owner)| owner.0 == "a");
    assert!(of_a().all(|(chain, _)| town.has_all("b", chain)));
    assert!(!town.shelf("a").going().is_empty());

    town.node("a").cluster.resume();
    town.acquaint();
    town.pass(Duration::from_secs(5)).await;
    assert!(town.shelf("a").going().is_empty(), "it is its own again");
    let theirs: BTreeSet<BlockKey> = of_a().flat_map(|(chain, _)| town.keys(chain)).collect();
    assert_eq!(town.shelf("b").going(), theirs);
}
