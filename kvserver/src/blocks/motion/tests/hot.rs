//! Second owners over maps: who gets one, who is told, and what becomes of the copy.

use super::*;
use crate::blocks::motion::HotRules;

const HOT_TIME: Duration = Duration::from_secs(4);

/// Three nodes that call a run hot when a tenth of their gets read it while four calls wait.
fn town() -> Town {
    let mut town = Town::new(&[], 1);
    town.hot = HotRules {
        calls: 4,
        share_percent: 10,
    };
    for id in ["a", "b", "c"] {
        town.build(id);
    }
    town.acquaint();
    town.clock.advance(WINDOW);
    town
}

impl Town {
    /// First and next owner of a prompt.
    fn two(&self, chain: &Chain) -> [MemberId; 2] {
        let roster = self.node("a").cluster.roster();
        let owners = roster.owners(&chain.hashes[0].into(), 2);
        [0, 1].map(|i| owners[i].id.clone())
    }

    fn gets(&self, id: &MemberId, chain: &Chain, count: u32, calls: u32) {
        for _ in 0..count {
            let motion = &self.node(&id.0).motion;
            motion.note_get(self.space.id, chain, RUN_BLOCKS, calls);
        }
    }

    async fn look(&self, id: &MemberId) {
        let motion = Arc::clone(&self.node(&id.0).motion);
        let looking = tokio::spawn(async move { motion.look().await });
        self.pass(Duration::from_millis(20)).await;
        assert!(looking.is_finished());
    }

    fn named(&self, id: &MemberId, chain: &Chain) -> Vec<(MemberId, u32)> {
        let motion = &self.node(&id.0).motion;
        let seconds = motion.seconds_of(self.space.id, chain, RUN_BLOCKS);
        seconds.into_iter().map(|s| (s.member, s.ttl_ms)).collect()
    }
}

#[tokio::test]
async fn what_many_read_lies_with_the_next_owner_and_is_named_until_it_has_cooled() {
    let town = town();
    let (chain, first) = town.put(1);
    let second = town.two(&chain)[1].clone();
    town.look(&first).await;
    town.gets(&first, &chain, 100, 8);
    assert!(town.has_none(&second.0, &chain));
    town.look(&first).await;
    assert!(town.has_all(&second.0, &chain));
    let named = town.named(&first, &chain);
    assert_eq!(named.len(), 1);
    assert_eq!(named[0].0, second);
    assert!(named[0].1 <= 4000 && named[0].1 > 3900, "{named:?}");
    assert_eq!(town.named(&second, &chain), [], "its owner alone says so");
    // Half of the reads go there now, and half of the queue: that keeps it hot.
    town.pass(Duration::from_secs(3)).await;
    town.gets(&first, &chain, 50, 4);
    let puts = town.called("put");
    town.look(&first).await;
    assert!(town.named(&first, &chain)[0].1 > 3900, "named anew");
    assert_eq!(town.called("put"), puts, "what is there is not sent again");
    // Nobody reads any more: what was read fades, look by look.
    for _ in 0..8 {
        town.look(&first).await;
    }
    town.pass(HOT_TIME).await;
    assert_eq!(town.named(&first, &chain), []);
    town.look(&first).await;
    assert_eq!(town.named(&first, &chain), []);
    assert!(
        town.has_all(&second.0, &chain),
        "the copy is an ordinary one"
    );
}

#[tokio::test]
async fn nobody_gets_what_few_read_or_what_nobody_waits_for() {
    let town = town();
    let (chain, first) = town.put(1);
    let second = town.two(&chain)[1].clone();
    town.look(&first).await;
    town.gets(&first, &chain, 1000, 3);
    town.look(&first).await;
    assert!(town.has_none(&second.0, &chain), "nobody waits");
    for _ in 0..20 {
        town.look(&first).await;
    }
    town.gets(&first, &chain, 99, 100);
    for seed in 2..=92 {
        town.gets(&first, &town.chain(seed), 10, 100);
    }
    town.look(&first).await;
    assert!(town.has_none(&second.0, &chain), "a tenth is not reached");
    // And somebody who is not its first owner keeps it to itself.
    town.look(&second).await;
    town.put_at(&chain, &second.0);
    town.gets(&second, &chain, 1000, 100);
    town.look(&second).await;
    assert_eq!(town.named(&second, &chain), []);
}

#[tokio::test]
async fn a_silent_or_dead_next_owner_is_not_named() {
    let town = town();
    let (chain, first) = town.put(1);
    let second = town.two(&chain)[1].clone();
    town.look(&first).await;
    town.net.fault(&second, Fault::Dead);
    town.gets(&first, &chain, 100, 8);
    town.look(&first).await;
    assert_eq!(town.named(&first, &chain), []);
    let calls = town.net.called().len();
    town.node(&first.0).cluster.suspect(&second);
    town.gets(&first, &chain, 100, 8);
    town.look(&first).await;
    assert_eq!(town.net.called().len(), calls, "nobody asks who is suspect");
}

#[tokio::test]
async fn a_guest_that_nobody_reads_any_more_is_the_first_to_go() {
    let town = town();
    let (chain, first) = town.put(1);
    let second = town.two(&chain)[1].clone();
    let (host, keys) = (&town.node(&second.0).motion, town.keys(&chain));
    town.look(&second).await;
    town.put_at(&chain, &second.0);
    keys.iter()
        .for_each(|key| host.hosts(key, chain.hashes[0].into(), 1));
    // What is its owner's is no guest.
    town.node(&first.0)
        .motion
        .hosts(&keys[0], chain.hashes[0].into(), 1);
    town.pass(HOT_TIME).await;
    town.gets(&second, &chain, 1, 1);
    town.pass(HOT_TIME * 2 - Duration::from_millis(50)).await;
    town.look(&second).await;
    assert!(town.shelf(&second.0).going().is_empty(), "it was read");
    town.pass(Duration::from_millis(100)).await;
    for id in [&first, &second] {
        town.look(id).await;
    }
    assert_eq!(
        town.shelf(&second.0).going(),
        keys.iter().copied().collect()
    );
    assert!(town.shelf(&first.0).going().is_empty());
}

#[tokio::test]
async fn what_was_invalidated_here_does_not_come_back_from_who_was_not_told_yet() {
    let town = town();
    let (chain, first) = town.put(1);
    let second = town.two(&chain)[1].clone();
    let keys = town.keys(&chain);
    town.look(&first).await;
    // The second one is told first.
    town.shelf(&second.0).invalidate(&keys[0], 7);
    town.gets(&first, &chain, 100, 8);
    town.look(&first).await;
    assert!(!town.shelf(&second.0).has(&keys[0]));
    assert_eq!(town.named(&first, &chain), [], "it has not all of it");
    // Now both are, and the block is put anew.
    town.shelf(&first.0).invalidate(&keys[0], 7);
    town.shelf(&first.0).put(town.block(&chain, 0), Kind::Kv);
    town.gets(&first, &chain, 100, 8);
    town.look(&first).await;
    assert!(town.has_all(&second.0, &chain));
}
