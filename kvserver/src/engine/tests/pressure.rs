//! Puts, twins, budgets and eviction.

use kvproto::{Kind, Reason, TierKind};

use super::super::{Demotion, Grant, KindBudget, Published, Whereabouts};
use super::{PAGE, chain, fill, key, world, world_with};

#[test]
fn an_abandoned_put_leaves_nothing() {
    let world = world(8);
    let chain = chain(7, 2);
    drop(world.grant(&chain, 0));
    let Grant { block, ticket } = world.grant(&chain, 0);
    drop(block);
    drop(ticket);
    assert_eq!(world.probe(&chain), 0);
    world.assert_nothing_leaked();
}

#[test]
fn of_twins_the_first_stays() {
    let world = world(8);
    let chain = chain(7, 1);
    let (one, two) = (world.grant(&chain, 0), world.grant(&chain, 0));
    let (sealed, ticket) = fill(one);
    let Published::New(first) = world.engine.publish(sealed, ticket) else {
        panic!("first")
    };
    let (sealed, ticket) = fill(two);
    let Published::Twin(second) = world.engine.publish(sealed, ticket) else {
        panic!("twin")
    };
    assert_eq!(first.bytes().as_ptr(), second.bytes().as_ptr());
    assert_eq!(world.arena.stats().used_bytes, PAGE);
    assert_eq!(world.engine.stats().twins, 1);
    drop((first, second));
    world.assert_nothing_leaked();
}

#[test]
fn neither_kind_evicts_the_others_reserve() {
    let world = world_with(16, |config| {
        config.checkpoint = KindBudget {
            reserve_bytes: 4 * PAGE,
            ceiling_bytes: 8 * PAGE,
        };
        config.kv = KindBudget {
            reserve_bytes: 8 * PAGE,
            ceiling_bytes: 16 * PAGE,
        };
    });
    let shards = chain(1, 4);
    (0..4).for_each(|i| {
        world.put_as(&shards, i, PAGE, Kind::Checkpoint).unwrap();
    });
    for name in 10..30 {
        world.put_all(&chain(name, 4));
    }
    assert_eq!(world.probe(&shards), 4);
    assert_eq!(
        world.engine.stats().kv.used_bytes,
        12 * PAGE,
        "kv uses what is left"
    );
    for name in 40..60 {
        world
            .put_as(&chain(name, 1), 0, PAGE, Kind::Checkpoint)
            .unwrap();
    }
    let stats = world.engine.stats();
    let used = (
        stats.kv.used_bytes / PAGE,
        stats.checkpoint.used_bytes / PAGE,
    );
    assert_eq!(used, (10, 6), "what no reserve covers is shared evenly");
    world.assert_nothing_leaked();
}

#[test]
fn a_large_block_finds_room_among_crumbs() {
    let world = world(256);
    for name in 0..250 {
        world.put_all(&chain(name, 1));
    }
    assert_eq!(
        world.put_as(&chain(251, 1), 0, 64 * PAGE, Kind::Kv),
        Ok(true)
    );
    assert_eq!(
        world.put_as(&chain(252, 1), 0, 257 * PAGE, Kind::Kv),
        Err(Reason::TooLarge)
    );
    world.assert_nothing_leaked();
}

#[test]
fn what_a_reader_holds_is_not_evicted_for_nothing() {
    let world = world(4);
    let chain = chain(1, 4);
    world.put_all(&chain);
    let Whereabouts::Ram(held) = world.engine.locate(&key(&chain, 3), None) else {
        panic!("ram")
    };
    assert_eq!(world.put(&super::chain(2, 1), 0), Ok(true));
    assert!(world.bytes(&chain, 3, None).is_ok());
    drop(held);
    world.assert_nothing_leaked();
}

#[test]
fn the_coldest_in_ram_alone_are_offered_below() {
    let world = world_with(64, |config| config.demotion = Demotion::Reuse);
    let (once, twice) = (chain(1, 2), chain(2, 2));
    world.put_all(&once);
    world.put_all(&twice);
    world.lease(&twice, 1);
    let offered = world.engine.demotable(u64::MAX);
    assert_eq!(offered.len(), 2, "only what a lookup has found");
    for block in &offered {
        assert!(twice.hashes.contains(&block.key().hash));
        assert!(
            world
                .engine
                .stored(block.key(), TierKind::Nvme, world.engine.moment())
        );
    }
    assert!(
        world.engine.demotable(u64::MAX).is_empty(),
        "one copy below is enough"
    );
    world
        .engine
        .lost(offered[0].key(), TierKind::Nvme, Reason::Corrupt);
    assert_eq!(world.engine.demotable(u64::MAX).len(), 1);
}
