//! What a lookup reports and a lease promises.

use std::time::Duration;

use kvproto::{BlockKey, Chain, Kind, Part, Reason, TierKind};

use super::super::{Demotion, Grant, LeaseAsk, LookupQuery, Published, Reserve};
use super::{PAGE, RUN, SPACE, chain, fill, key, owner, world, world_with};
use crate::clock::Clock;
use crate::tier::ReclaimGuard;

#[test]
fn what_is_published_is_found_and_a_gap_ends_the_prefix() {
    let world = world(64);
    let chain = chain(7, 6);
    for i in [0, 1, 2, 4] {
        world.put(&chain, i).unwrap();
    }
    let answer = world.lease(&chain, 1);
    assert_eq!(
        (answer.present_blocks, answer.tiers),
        (3, vec![(3, TierKind::Ram)])
    );
    assert_eq!(answer.lease.unwrap().blocks, 3);
    assert_eq!(world.bytes(&chain, 2, None), Ok(2 ^ 7));
    assert_eq!(world.bytes(&chain, 3, None), Err(Reason::Evicted));
    let stats = world.engine.stats();
    assert_eq!(
        (stats.lookups.asked(), stats.lookups.hits(TierKind::Ram)),
        (6, 3)
    );
    assert_eq!(
        (stats.gets.asked(), stats.gets.gone(Reason::Evicted)),
        (2, 1)
    );
    world.assert_nothing_leaked();
}

#[test]
fn leased_blocks_outlive_any_pressure_until_the_lease_ends() {
    let world = world(16);
    let leased = chain(1, 4);
    world.put_all(&leased);
    let grant = world.lease(&leased, 1).lease.unwrap();
    for name in 10..40 {
        let other = chain(name, 8);
        (0..8).for_each(|i| {
            let _ = world.put(&other, i);
        });
        for i in 0..4 {
            assert!(world.bytes(&leased, i, Some((grant.id, owner(1)))).is_ok());
        }
    }
    world.clock.advance(Duration::from_millis(1000));
    let late = world.bytes(&leased, 0, Some((grant.id, owner(1))));
    assert_eq!(late, Err(Reason::Expired));
    assert_eq!(world.engine.expire_leases(world.clock.now()), 1);
    for name in 40..80 {
        let other = chain(name, 8);
        (0..8).for_each(|i| {
            let _ = world.put(&other, i);
        });
    }
    assert_eq!(world.probe(&leased), 0);
    world.assert_nothing_leaked();
}

#[test]
fn ram_full_of_leases_refuses_puts_and_says_when_to_come_again() {
    let world = world_with(8, |config| {
        config.lease_bytes_per_owner = 4 * PAGE;
        config.kv.ceiling_bytes = 4 * PAGE;
    });
    let leased = chain(1, 4);
    world.put_all(&leased);
    assert_eq!(world.lease(&leased, 1).lease.unwrap().blocks, 4);
    match world.reserve(&chain(2, 1), 0, PAGE, Kind::Kv) {
        Reserve::Rejected {
            reason: Reason::Budget,
            retry_after_ms,
        } => assert!(retry_after_ms > 0),
        other => panic!("{other:?}"),
    }
    world.engine.release_owner(owner(1));
    assert_eq!(world.put(&chain(2, 1), 0), Ok(true));
    world.assert_nothing_leaked();
}

#[test]
fn a_lease_is_as_long_as_the_owners_budget() {
    let world = world_with(64, |config| config.lease_bytes_per_owner = 3 * PAGE);
    let chain = chain(1, 5);
    world.put_all(&chain);
    let answer = world.lease(&chain, 1);
    let grant = answer.lease.unwrap();
    assert_eq!(
        (answer.present_blocks, grant.blocks, grant.bytes),
        (5, 3, 3 * PAGE)
    );
    assert_eq!(answer.refused, Some(Reason::Budget));
    let second = world.lease(&chain, 1);
    assert_eq!(
        (second.present_blocks, second.lease, second.refused),
        (5, None, Some(Reason::Budget))
    );
    assert_eq!(world.lease(&chain, 2).lease.unwrap().blocks, 3);
    assert_eq!(
        world.engine.stats().leased_bytes,
        3 * PAGE,
        "each block once"
    );
    world.assert_nothing_leaked();
}

#[test]
fn what_lies_behind_a_gap_or_the_budget_is_neither_pinned_nor_used() {
    let world = world_with(256, |config| {
        config.lease_bytes_per_owner = 90 * PAGE;
        config.demotion = Demotion::Reuse;
    });
    // Several windows of the walk; the gap lies within one.
    let chain = chain(1, 200);
    for i in (0..200).filter(|i| *i != 120) {
        world.put(&chain, i).unwrap();
    }
    let answer = world.lease(&chain, 1);
    let grant = answer.lease.unwrap();
    assert_eq!(
        (answer.present_blocks, grant.blocks, grant.bytes),
        (120, 90, 90 * PAGE)
    );
    assert_eq!(answer.tiers, [(120, TierKind::Ram)]);
    assert_eq!(answer.refused, Some(Reason::Budget));
    assert_eq!(world.engine.stats().leased_bytes, 90 * PAGE);
    assert_eq!(world.engine.demotable(u64::MAX).len(), 120, "used");
    for i in 0..200 {
        assert_eq!(world.engine.is_pinned(&key(&chain, i)), i < 90, "block {i}");
    }
    assert!(world.engine.release(grant.id, owner(1)));
    assert_eq!(world.engine.stats().leased_bytes, 0);
    world.assert_nothing_leaked();
}

#[test]
fn all_leases_together_pin_at_most_their_total() {
    let world = world_with(64, |config| {
        config.lease_bytes_total = 4 * PAGE;
        config.lease_bytes_per_owner = 64 * PAGE;
    });
    let (one, two) = (chain(1, 3), chain(2, 3));
    world.put_all(&one);
    world.put_all(&two);
    assert_eq!(world.lease(&one, 1).lease.unwrap().blocks, 3);
    assert_eq!(
        world.lease(&one, 2).lease.unwrap().blocks,
        3,
        "pinned already, so it costs nothing"
    );
    assert_eq!(world.lease(&two, 3).lease.unwrap().blocks, 1);
    world.assert_nothing_leaked();
}

#[test]
fn an_ask_repeated_with_its_key_gets_the_same_lease() {
    let world = world(64);
    let chain = chain(1, 3);
    world.put_all(&chain);
    let ask = LeaseAsk {
        owner: owner(1),
        ttl_ms: 1000,
        idempotency: Some([5; 16]),
        id: None,
    };
    let first = world.ask(&chain, Some(ask)).lease.unwrap();
    world.clock.advance(Duration::from_millis(600));
    let again = world.ask(&chain, Some(ask)).lease.unwrap();
    assert_eq!((again.id, again.blocks, again.ttl_ms), (first.id, 3, 1000));
    assert_eq!(world.engine.stats().leases, 1);
    assert!(world.engine.release(first.id, owner(1)));
    assert!(!world.engine.release(first.id, owner(1)));
    assert_ne!(world.ask(&chain, Some(ask)).lease.unwrap().id, first.id);
    world.assert_nothing_leaked();
}

#[test]
fn a_renewed_lease_lives_on_and_only_its_owner_renews_it() {
    let world = world(64);
    let chain = chain(1, 1);
    world.put_all(&chain);
    let id = world.lease(&chain, 1).lease.unwrap().id;
    world.clock.advance(Duration::from_millis(900));
    assert_eq!(world.engine.renew(id, owner(2), 0), None);
    assert_eq!(
        world.engine.renew(id, owner(1), u64::MAX),
        Some(600_000),
        "the maximum binds"
    );
    world.clock.advance(Duration::from_millis(900));
    assert!(world.bytes(&chain, 0, Some((id, owner(1)))).is_ok());
    assert_eq!(
        world.bytes(&chain, 0, Some((id, owner(2)))),
        Err(Reason::Expired)
    );
    world.assert_nothing_leaked();
}

#[test]
fn a_block_counts_only_with_all_its_parts() {
    let world = world(64);
    let chain = chain(1, 2);
    let parts = [
        Part {
            rank: 0,
            layer_group: 0,
        },
        Part {
            rank: 1,
            layer_group: 0,
        },
    ];
    world.put_all(&chain);
    let second = BlockKey {
        part: parts[1],
        ..key(&chain, 0)
    };
    let Reserve::Granted(grant) = world
        .engine
        .reserve(second, chain.place(0, RUN), PAGE, Kind::Kv)
    else {
        panic!("granted")
    };
    let (sealed, ticket) = fill(grant);
    assert!(matches!(
        world.engine.publish(sealed, ticket),
        Published::New(_)
    ));
    let lease = Some(LeaseAsk {
        owner: owner(1),
        ttl_ms: 0,
        idempotency: None,
        id: None,
    });
    let query = LookupQuery {
        namespace: SPACE,
        chain: &chain,
        parts: &parts,
        lease,
    };
    let answer = world.engine.lookup(query);
    assert_eq!(
        (answer.present_blocks, answer.lease.unwrap().bytes),
        (1, 2 * PAGE)
    );
    assert_eq!(
        world.engine.stats().leased_bytes,
        2 * PAGE,
        "the lone part is not pinned"
    );
    world.assert_nothing_leaked();
}

#[test]
fn leased_blocks_survive_the_reclaim_of_a_lower_tier() {
    let world = world(64);
    let chain = chain(1, 3);
    world.below(&chain, 0..3);
    let answer = world.lease(&Chain::from_root(chain.hashes[..2].to_vec()), 1);
    assert_eq!(
        (answer.tiers, answer.promote.len()),
        (vec![(2, TierKind::Nvme)], 2)
    );
    let keep: Vec<bool> = (0..3).map(|i| world.engine.keep(&key(&chain, i))).collect();
    assert_eq!(keep, [true, true, false]);
    assert_eq!(
        world.probe(&chain),
        2,
        "what is not kept is forgotten in the same moment"
    );
    world.engine.release_owner(owner(1));
    assert!(!world.engine.keep(&key(&chain, 0)));
}

#[test]
fn a_leased_landing_never_fails() {
    let world = world_with(4, |config| config.lease_bytes_per_owner = 4 * PAGE);
    let held: Vec<Grant> = (0..4).map(|i| world.grant(&chain(1, 4), i)).collect();
    assert!(
        world
            .engine
            .landing(&SPACE, PAGE, Kind::Kv, false)
            .is_none()
    );
    let landing = world.engine.landing(&SPACE, PAGE, Kind::Kv, true).unwrap();
    assert!(landing.slot.location().is_none());
    drop((held, landing));
    world.assert_nothing_leaked();
}
