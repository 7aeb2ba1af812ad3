//! What is forgotten, and how that is told.

use kvproto::{BlockHeader, Chain, Kind, Reason, TierKind};

use super::super::{Change, Published, Target};
use super::{PAGE, RUN, SPACE, chain, fill, key, owner, world};
use crate::tier::ReclaimGuard;

#[test]
fn what_was_invalidated_while_written_does_not_appear() {
    for target in [
        Target::Block(chain(1, 3).hashes[1]),
        Target::Prefix(chain(1, 3).hashes[0]),
        Target::All,
    ] {
        let world = world(64);
        let chain = chain(1, 3);
        world.put(&chain, 0).unwrap();
        let (sealed, ticket) = fill(world.grant(&chain, 1));
        world.engine.invalidate(SPACE, target);
        assert!(matches!(
            world.engine.publish(sealed, ticket),
            Published::Invalidated
        ));
        assert_eq!(
            world.bytes(&chain, 1, None),
            Err(Reason::Evicted),
            "it never was here"
        );
        assert_eq!(
            world.put(&chain, 1),
            Ok(true),
            "a put begun later is welcome"
        );
        world.assert_nothing_leaked();
    }
}

#[test]
fn a_prefix_takes_its_descendants_and_nobody_else() {
    let world = world(64);
    let trunk = chain(1, 6);
    // A branch that shares two blocks, and a stranger.
    let mut hashes = trunk.hashes[..2].to_vec();
    hashes.extend(&chain(2, 3).hashes);
    let branch = Chain::from_root(hashes);
    let stranger = chain(3, 3);
    [&trunk, &branch, &stranger]
        .into_iter()
        .for_each(|chain| world.put_all(chain));
    let gone = world
        .engine
        .invalidate(SPACE, Target::Prefix(trunk.hashes[2]));
    assert_eq!(gone.len(), 4);
    assert_eq!(
        (
            world.probe(&trunk),
            world.probe(&branch),
            world.probe(&stranger)
        ),
        (2, 5, 3)
    );
    assert_eq!(world.bytes(&trunk, 4, None), Err(Reason::Invalidated));
    world.assert_nothing_leaked();
}

#[test]
fn a_block_whose_ancestors_are_unknown_goes_with_any_prefix_it_might_hang_below() {
    let world = world(64);
    let chain = chain(1, 6);
    world.below(&chain, 0..2);
    world.below(&chain, 4..6);
    assert_eq!(
        world
            .engine
            .invalidate(SPACE, Target::Prefix(chain.hashes[2]))
            .len(),
        2
    );
    assert_eq!(world.probe(&chain), 2);
}

#[test]
fn what_was_missed_goes_in_one_pass_as_one_after_the_other() {
    let targets = [
        Target::Block(chain(1, 6).hashes[5]),
        Target::Prefix(chain(2, 6).hashes[3]),
        Target::Prefix(chain(2, 6).hashes[4]), // below the other
        Target::Prefix(chain(3, 6).hashes[1]),
        Target::Block(chain(4, 1).hashes[0]), // not here
    ];
    let [together, apart] = [(); 2].map(|()| {
        let world = world(64);
        (1..=3).for_each(|seed| world.put_all(&chain(seed, 6)));
        world
    });
    let missed = targets.map(|target| (SPACE, target));
    let mut gone = together.engine.invalidate_missed(&missed);
    let one_by_one = |target| apart.engine.invalidate(SPACE, target);
    let mut expected: Vec<_> = targets.into_iter().flat_map(one_by_one).collect();
    gone.sort_by_key(|gone| gone.key.hash);
    expected.sort_by_key(|gone| gone.key.hash);
    assert_eq!(gone, expected);
    assert_eq!(gone.len(), 1 + 3 + 5);
    for seed in 1..=3 {
        assert_eq!(
            together.probe(&chain(seed, 6)),
            apart.probe(&chain(seed, 6))
        );
    }
    // Peers that were told long ago, and say nothing of it any more, have newer ones.
    let newer = key(&chain(2, 6), 4);
    assert!(!together.engine.is_undone(&newer, &[]));
    let all = [(SPACE, Target::All)];
    assert_eq!(together.engine.namespaces().len(), 1);
    assert_eq!(together.engine.invalidate_missed(&all).len(), 18 - 9);
    together.assert_nothing_leaked();
}

#[test]
fn invalidation_beats_a_lease_and_says_so() {
    let world = world(64);
    let chain = chain(1, 2);
    world.put_all(&chain);
    let grant = world.lease(&chain, 1).lease.unwrap();
    world
        .engine
        .invalidate(SPACE, Target::Block(chain.hashes[1]));
    let lease = Some((grant.id, owner(1)));
    assert_eq!(world.bytes(&chain, 1, lease), Err(Reason::Invalidated));
    assert!(world.bytes(&chain, 0, lease).is_ok());
    // Written again and leased by another, it stays pinned when the first lease goes.
    assert_eq!(world.put(&chain, 1), Ok(true));
    let other = world.lease(&chain, 2).lease.unwrap();
    assert!(world.engine.release(grant.id, owner(1)));
    for name in 10..60 {
        let _ = world.put(&super::chain(name, 1), 0);
    }
    assert!(world.bytes(&chain, 1, Some((other.id, owner(2)))).is_ok());
    world.assert_nothing_leaked();
}

#[test]
fn a_promotion_of_what_was_invalidated_comes_to_nothing() {
    let world = world(64);
    let chain = chain(1, 1);
    let read = BlockHeader::describe(key(&chain, 0), chain.place(0, RUN), &[6; PAGE as usize]);
    let resident = crate::tier::Resident {
        seal: read.seal,
        ..world.resident(&chain, 0)
    };
    world
        .engine
        .recover(TierKind::Nvme, vec![resident], Kind::Kv);
    let promote = |gone: bool| {
        let landing = world.engine.landing(&SPACE, PAGE, Kind::Kv, false).unwrap();
        let mut block =
            crate::tier::MutableBlock::new(key(&chain, 0), chain.place(0, RUN), PAGE, landing.slot);
        block.bytes_mut().fill(6);
        let header = BlockHeader::describe(*block.key(), *block.place(), block.bytes());
        let sealed = block.seal(header).unwrap();
        if gone {
            let tiers = world.engine.invalidate(SPACE, Target::All)[0].tiers;
            assert!(tiers.contains(TierKind::Nvme));
        }
        world.engine.promoted(sealed, landing.ticket)
    };
    assert_eq!(promote(false).unwrap().bytes()[0], 6);
    assert_eq!(world.lease(&chain, 1).tiers, [(1, TierKind::Ram)]);
    assert!(promote(true).is_none());
    assert!(
        !world
            .engine
            .stored(&key(&chain, 0), TierKind::Nvme, world.engine.moment()),
        "nor does a write below"
    );
    world.assert_nothing_leaked();
}

#[test]
fn what_was_read_before_a_key_was_put_anew_is_not_taken_for_it() {
    let world = world(64);
    let chain = chain(1, 1);
    world.below(&chain, 0..1);
    let landing = world.engine.landing(&SPACE, PAGE, Kind::Kv, false).unwrap();
    let mut old =
        crate::tier::MutableBlock::new(key(&chain, 0), chain.place(0, RUN), PAGE, landing.slot);
    old.bytes_mut().fill(6);
    let header = BlockHeader::describe(*old.key(), *old.place(), old.bytes());
    let old = old.seal(header).unwrap();
    let began = world.engine.moment();
    world.engine.invalidate(SPACE, Target::All);
    world.put_all(&chain);
    assert!(world.engine.promoted(old, landing.ticket).is_none());
    assert!(
        !world.engine.stored(&key(&chain, 0), TierKind::Nvme, began),
        "nor is a write of before"
    );
    assert_eq!(world.lease(&chain, 1).tiers, [(1, TierKind::Ram)]);
    world.assert_nothing_leaked();
}

#[test]
fn losses_below_name_their_reason() {
    let world = world(64);
    let chain = chain(1, 3);
    world.below(&chain, 0..3);
    world
        .engine
        .lost(&key(&chain, 0), TierKind::Nvme, Reason::Corrupt);
    world
        .engine
        .lost(&key(&chain, 1), TierKind::Nvme, Reason::Device);
    assert!(!world.engine.keep(&key(&chain, 2)));
    let reasons: Vec<_> = (0..3)
        .map(|i| world.bytes(&chain, i, None).unwrap_err())
        .collect();
    assert_eq!(reasons, [Reason::Corrupt, Reason::Device, Reason::Evicted]);
}

#[test]
fn events_are_numbered_and_tell_what_left() {
    let world = world(64);
    let mut events = world.engine.events();
    let chain = chain(1, 1);
    world.put_all(&chain);
    assert!(
        world
            .engine
            .stored(&key(&chain, 0), TierKind::Nvme, world.engine.moment())
    );
    world.engine.invalidate(SPACE, Target::All);
    let seen: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).collect();
    let changes: Vec<_> = seen
        .iter()
        .map(|e| (e.sequence, e.change, e.tier, e.present))
        .collect();
    let removed = Change::Removed(Reason::Invalidated);
    assert_eq!(
        changes,
        [
            (1, Change::Stored, TierKind::Ram, true),
            (2, Change::Stored, TierKind::Nvme, true),
            (3, removed, TierKind::Nvme, true),
            (4, removed, TierKind::Ram, false),
        ]
    );
}
