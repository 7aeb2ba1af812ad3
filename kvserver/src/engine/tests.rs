//! The engine as a whole: leases, eviction, invalidation, budgets, against real slots and time by hand.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use kvgpu::{Arena, ArenaConfig, HugePages};
use kvproto::{
    BlockHeader, BlockKey, Chain, Kind, LeaseId, NamespaceId, OwnerId, Part, Reason, SequenceHash,
    TierKind,
};

use super::{
    Change, Demotion, Engine, EngineConfig, Grant, KindBudget, LeaseAsk, LookupAnswer, LookupQuery,
    Owner, Published, Reserve, Target, TenantId, Whereabouts, policy::by_name,
};
use crate::{
    clock::{Clock, ManualClock},
    tier::{ReclaimGuard, Resident, SealedBlock},
};

const PAGE: u64 = 4096;
const RUN: u32 = 4;
const SPACE: NamespaceId = NamespaceId([1; 16]);

struct World {
    engine: Arc<Engine>,
    arena: Arc<Arena>,
    clock: ManualClock,
}

fn world_with(pages: u64, change: impl FnOnce(&mut EngineConfig)) -> World {
    let arena = Arena::new(ArenaConfig {
        capacity_bytes: pages * PAGE,
        segment_bytes: pages * PAGE,
        huge_pages: HugePages::Off,
        prefault: false,
        boot_id: 1,
    })
    .unwrap();
    let clock = ManualClock::new(3);
    let mut config = EngineConfig::for_capacity(pages * PAGE);
    config.checkpoint.ceiling_bytes = pages * PAGE;
    config.demotion = Demotion::Open;
    config.shards = 4;
    change(&mut config);
    let policy = by_name("best").unwrap();
    let engine = Engine::new(config, Arc::clone(&arena), policy, Arc::new(clock.clone())).unwrap();
    World {
        engine,
        arena,
        clock,
    }
}

fn world(pages: u64) -> World {
    world_with(pages, |_| {})
}

/// Chain `name` of so many blocks.
fn chain(name: u8, blocks: u8) -> Chain {
    let hash = |i| {
        let mut hash = [name; 32];
        hash[0] = i;
        hash[1] = i.wrapping_mul(37);
        SequenceHash(hash)
    };
    Chain::from_root((0..blocks).map(hash).collect())
}

fn key(chain: &Chain, i: usize) -> BlockKey {
    BlockKey {
        namespace: SPACE,
        hash: chain.hashes[i],
        part: Part::default(),
    }
}

fn owner(n: u8) -> Owner {
    Owner {
        tenant: TenantId(0),
        id: OwnerId([n; 16]),
    }
}

fn fill(grant: Grant) -> (SealedBlock, super::Ticket) {
    let Grant { mut block, ticket } = grant;
    let fill = block.key().hash.0[0] ^ block.key().hash.0[31];
    block.bytes_mut().fill(fill);
    let header = BlockHeader::describe(*block.key(), *block.place(), block.bytes());
    (block.seal(header).unwrap(), ticket)
}

impl World {
    fn reserve(&self, chain: &Chain, i: usize, bytes: u64, kind: Kind) -> Reserve {
        self.engine
            .reserve(key(chain, i), chain.place(i, RUN), bytes, kind)
    }

    fn grant(&self, chain: &Chain, i: usize) -> Grant {
        match self.reserve(chain, i, PAGE, Kind::Kv) {
            Reserve::Granted(grant) => grant,
            other => panic!("{other:?}"),
        }
    }

    /// Whether block `i` was newly written; `Err` when it was refused.
    fn put_as(&self, chain: &Chain, i: usize, bytes: u64, kind: Kind) -> Result<bool, Reason> {
        match self.reserve(chain, i, bytes, kind) {
            Reserve::Granted(grant) => {
                let (sealed, ticket) = fill(grant);
                assert!(matches!(
                    self.engine.publish(sealed, ticket),
                    Published::New(_)
                ));
                Ok(true)
            }
            Reserve::Present(_) => Ok(false),
            Reserve::Rejected { reason, .. } => Err(reason),
        }
    }

    fn put(&self, chain: &Chain, i: usize) -> Result<bool, Reason> {
        self.put_as(chain, i, PAGE, Kind::Kv)
    }

    fn put_all(&self, chain: &Chain) {
        (0..chain.len()).for_each(|i| {
            self.put(chain, i).unwrap();
        });
    }

    fn ask(&self, chain: &Chain, lease: Option<LeaseAsk>) -> LookupAnswer {
        self.engine.lookup(LookupQuery {
            namespace: SPACE,
            chain,
            parts: &[],
            lease,
        })
    }

    fn probe(&self, chain: &Chain) -> u32 {
        self.ask(chain, None).present_blocks
    }

    fn lease(&self, chain: &Chain, who: u8) -> LookupAnswer {
        self.ask(
            chain,
            Some(LeaseAsk {
                owner: owner(who),
                ttl_ms: 1000,
                idempotency: None,
            }),
        )
    }

    fn bytes(
        &self,
        chain: &Chain,
        i: usize,
        lease: Option<(LeaseId, Owner)>,
    ) -> Result<u8, Reason> {
        match self.engine.locate(&key(chain, i), lease) {
            Whereabouts::Ram(block) => Ok(block.bytes()[0]),
            Whereabouts::Below(below) => panic!("{below:?}"),
            Whereabouts::Gone(reason) => Err(reason),
        }
    }

    fn resident(&self, chain: &Chain, i: usize) -> Resident {
        Resident {
            key: key(chain, i),
            place: chain.place(i, RUN),
            length_bytes: PAGE,
            seal: 9,
        }
    }

    /// A block that only NVMe has.
    fn below(&self, chain: &Chain, blocks: std::ops::Range<usize>) {
        let residents = blocks.map(|i| self.resident(chain, i)).collect();
        self.engine.recover(TierKind::Nvme, residents, Kind::Kv);
    }

    fn assert_nothing_leaked(&self) {
        self.engine.invalidate(SPACE, Target::All);
        for n in 0..=255 {
            self.engine.release_owner(owner(n));
        }
        let stats = self.engine.stats();
        assert_eq!((stats.blocks, stats.leases, stats.leased_bytes), (0, 0, 0));
        assert_eq!((stats.kv.used_bytes, stats.checkpoint.used_bytes), (0, 0));
        assert_eq!((stats.kv.blocks, stats.checkpoint.blocks), (0, 0));
        assert_eq!(self.arena.stats().used_bytes, 0);
    }
}

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
        let _ = world.put(&super::tests::chain(name, 1), 0);
    }
    assert!(world.bytes(&chain, 1, Some((other.id, owner(2)))).is_ok());
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
fn a_promotion_of_what_was_invalidated_comes_to_nothing() {
    let world = world(64);
    let chain = chain(1, 1);
    world.below(&chain, 0..1);
    let promote = |gone: bool| {
        let landing = world.engine.landing(PAGE, Kind::Kv, false).unwrap();
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
        !world.engine.stored(&key(&chain, 0), TierKind::Nvme),
        "nor does a write below"
    );
    world.assert_nothing_leaked();
}

#[test]
fn a_leased_landing_never_fails() {
    let world = world_with(4, |config| config.lease_bytes_per_owner = 4 * PAGE);
    let held: Vec<Grant> = (0..4).map(|i| world.grant(&chain(1, 4), i)).collect();
    assert!(world.engine.landing(PAGE, Kind::Kv, false).is_none());
    let landing = world.engine.landing(PAGE, Kind::Kv, true).unwrap();
    assert!(landing.slot.location().is_none());
    drop((held, landing));
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
    assert_eq!(world.put(&super::tests::chain(2, 1), 0), Ok(true));
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
        assert!(world.engine.stored(block.key(), TierKind::Nvme));
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
    assert!(world.engine.stored(&key(&chain, 0), TierKind::Nvme));
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

/// Random steps against a model that knows only what the engine has promised.
#[test]
fn random_steps_keep_every_promise() {
    for seed in 0..6 {
        random_steps(seed);
    }
}

fn random_steps(seed: u64) {
    let world = world(24);
    let dice = ManualClock::new(seed);
    let roll = |bound: u64| dice.random_u64() % bound;
    let chains: Vec<Chain> = (0..8).map(|name| chain(name, 6)).collect();
    // What living leases cover: lease → (owner, chain, blocks, deadline in ms).
    let mut leases: BTreeMap<LeaseId, (u8, usize, u32, u64)> = BTreeMap::new();
    let mut writing: Vec<(usize, usize, Grant, bool)> = Vec::new();
    let mut invalidated: HashMap<(usize, usize), ()> = HashMap::new();
    let mut now = 0;
    for step in 0..3000 {
        let (c, i) = (roll(8) as usize, roll(6) as usize);
        match roll(12) {
            0..=3 => {
                if let Reserve::Granted(grant) = world.reserve(&chains[c], i, PAGE, Kind::Kv) {
                    writing.push((c, i, grant, false));
                }
            }
            4..=6 if !writing.is_empty() => {
                let (c, i, grant, outlawed) =
                    writing.swap_remove(roll(writing.len() as u64) as usize);
                let (sealed, ticket) = fill(grant);
                let published = world.engine.publish(sealed, ticket);
                let dropped = matches!(published, Published::Invalidated);
                assert!(
                    dropped || !outlawed,
                    "seed {seed} step {step}: {published:?}"
                );
                if !dropped {
                    invalidated.remove(&(c, i));
                }
            }
            7..=8 => {
                let who = roll(3) as u8;
                let answer = world.lease(&chains[c], who);
                assert!(
                    answer
                        .lease
                        .is_none_or(|lease| lease.blocks <= answer.present_blocks)
                );
                for i in 0..answer.present_blocks as usize {
                    assert!(
                        !invalidated.contains_key(&(c, i)),
                        "seed {seed} step {step}: came back"
                    );
                }
                if let Some(grant) = answer.lease {
                    leases.insert(grant.id, (who, c, grant.blocks, now + 1000));
                }
            }
            9 => {
                let hash = chains[c].hashes[i];
                let target = if roll(2) == 0 {
                    Target::Block(hash)
                } else {
                    Target::Prefix(hash)
                };
                world.engine.invalidate(SPACE, target);
                let gone = if matches!(target, Target::Block(_)) {
                    i..i + 1
                } else {
                    i..6
                };
                for i in gone.clone() {
                    invalidated.insert((c, i), ());
                }
                for write in writing
                    .iter_mut()
                    .filter(|w| w.0 == c && gone.contains(&w.1))
                {
                    write.3 = true;
                }
                // Those leases promise no more than what comes before.
                for lease in leases.values_mut().filter(|lease| lease.1 == c) {
                    lease.2 = lease.2.min(gone.start as u32);
                }
                // A prefix may take what only might hang below it; leases elsewhere hold their ancestors too.
            }
            10 => {
                now += 300;
                world.clock.advance(Duration::from_millis(300));
                world.engine.expire_leases(world.clock.now());
                leases.retain(|_, lease| lease.3 > now);
            }
            _ => {
                if let Some((id, lease)) = leases.pop_first() {
                    assert!(
                        world.engine.release(id, owner(lease.0)),
                        "seed {seed} step {step}"
                    );
                }
            }
        }
        for (id, (who, c, blocks, _)) in &leases {
            for i in 0..*blocks as usize {
                let got = world.bytes(&chains[*c], i, Some((*id, owner(*who))));
                assert_eq!(
                    got,
                    Ok(i as u8 ^ *c as u8),
                    "seed {seed} step {step}: chain {c} block {i}"
                );
            }
        }
    }
    drop(writing);
    world.assert_nothing_leaked();
}

#[test]
fn threads_at_once_leak_nothing_and_break_no_lease() {
    let world = world(64);
    std::thread::scope(|scope| {
        for who in 0..4_u8 {
            let world = &world;
            scope.spawn(move || {
                let dice = ManualClock::new(u64::from(who));
                for step in 0..800 {
                    let chain = chain((dice.random_u64() % 12) as u8, 10);
                    let answer = world.lease(&chain, who);
                    for i in answer.present_blocks as usize..chain.len() {
                        if let Reserve::Granted(grant) = world.reserve(&chain, i, PAGE, Kind::Kv) {
                            let (sealed, ticket) = fill(grant);
                            world.engine.publish(sealed, ticket);
                        }
                    }
                    if let Some(grant) = answer.lease {
                        for i in 0..grant.blocks as usize {
                            let got = world.bytes(&chain, i, Some((grant.id, owner(who))));
                            match got {
                                Ok(byte) => assert_eq!(byte, i as u8 ^ chain.hashes[0].0[31]),
                                Err(reason) => assert_eq!(reason, Reason::Invalidated),
                            }
                        }
                        assert!(world.engine.release(grant.id, owner(who)));
                    }
                    if step % 200 == 199 {
                        world
                            .engine
                            .invalidate(SPACE, Target::Prefix(chain.hashes[3]));
                    }
                }
            });
        }
    });
    world.assert_nothing_leaked();
}
