//! Room is made from what nobody leases.

use std::{collections::HashSet, sync::Arc};

use kvproto::{BlockKey, Reason};
use kvserver::{
    clock::{Clock, ManualClock},
    tier::{
        BlockRef, NvmeConfig, NvmeTier, Read, ReclaimGuard, Resident, Tier,
        conformance::{block, block_in, has, namespace, read},
    },
};
use kvtests::patience::eventually;
use parking_lot::Mutex;

use crate::{KIB, MIB, clock, write_patiently};

/// Keeps what is leased, and remembers what it let go.
#[derive(Default)]
struct Leases {
    leased: Mutex<HashSet<BlockKey>>,
    let_go: Mutex<HashSet<BlockKey>>,
}

impl ReclaimGuard for Leases {
    fn keep(&self, key: &BlockKey) -> bool {
        let keep = self.leased.lock().contains(key);
        if !keep {
            self.let_go.lock().insert(*key);
        }
        keep
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leased_blocks_survive_being_overwritten_four_times() {
    let dir = tempfile::tempdir().expect("a folder");
    let leases = Arc::new(Leases::default());
    let config = NvmeConfig::new(dir.path(), 64 * MIB);
    let tier = NvmeTier::open(config.clone(), clock(), leases.clone())
        .await
        .expect("it opens");
    let leased: Vec<BlockRef> = (0..40).map(|n| block(n, 256 * KIB)).collect();
    leases
        .leased
        .lock()
        .extend(leased.iter().map(|block| *block.key()));
    let outcomes = write_patiently(&tier, &leased).await;
    assert!(outcomes.iter().all(|outcome| outcome.is_held()));
    for batch in 0..64 {
        let others: Vec<BlockRef> = (0..16)
            .map(|n| block(1000 + batch * 16 + n, 256 * KIB))
            .collect();
        let outcomes = write_patiently(&tier, &others).await;
        assert!(
            outcomes.iter().all(|outcome| outcome.is_held()),
            "{outcomes:?}"
        );
        // Leases are used while reclaim goes on, too.
        let some = &leased[batch as usize % leased.len()];
        assert!(
            has(&tier, some).await,
            "a leased block is there in the middle of it"
        );
    }
    for block in &leased {
        assert!(
            has(&tier, block).await,
            "a leased block is there after 4 times the capacity"
        );
    }
    // Room is still being made in the background, so what is listed is asked on both sides of the read.
    let listed = |key: &BlockKey| tier.residents().iter().any(|r| r.key == *key);
    let mut here = 0;
    for number in 1000..1000 + 64 * 16 {
        let other = block(number, 256 * KIB);
        let before = listed(other.key());
        let found = read(&tier, Resident::of(&other)).await;
        let present = matches!(&found, Read::Hit(found) if found.bytes() == other.bytes());
        if present {
            assert!(before, "not listed is not readable");
        } else {
            assert!(matches!(found, Read::Gone(Reason::Evicted)), "{found:?}");
            // It may be on its way out of the list.
            eventually("listed is readable", || !listed(other.key())).await;
        }
        assert!(
            present || leases.let_go.lock().contains(other.key()),
            "nothing goes without asking the guard"
        );
        here += usize::from(present);
    }
    assert!(here > 100, "{here} of the others are there");
    let status = tier.status();
    assert!(
        status.in_service && status.used_bytes <= status.capacity_bytes,
        "{status:?}"
    );
    eventually("evictions are counted", || {
        let drops = tier.status().drops;
        let evicted = drops.iter().find(|(why, _)| *why == Reason::Evicted);
        evicted.is_some_and(|(_, count)| *count >= 1024 - here as u64)
    })
    .await;

    // And after a restart the same blocks are there.
    tier.close().await;
    drop(tier);
    let tier = NvmeTier::open(config, clock(), leases)
        .await
        .expect("it opens again");
    for block in &leased {
        assert!(
            has(&tier, block).await,
            "a leased block is there after a restart"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_elsewhere_too_goes_before_what_is_older() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = NvmeConfig::new(dir.path(), 64 * MIB);
    let leases = Arc::new(Leases::default());
    let tier = NvmeTier::open(config, clock(), leases.clone())
        .await
        .expect("it opens");
    let extent = tier.geometry().extent_bytes;
    let per_extent = extent / (256 * KIB as u64);
    let extents = tier.geometry().capacity_bytes() / extent;
    assert!(extents >= 4, "{extents} extents");
    // All but what foyer keeps clean: the last write that makes no room.
    let full = (extents - 2) * per_extent;
    let blocks: Vec<BlockRef> = (0..full).map(|n| block(n as u32, 256 * KIB)).collect();
    for batch in blocks.chunks(8) {
        write_patiently(&tier, batch).await;
    }
    tier.look().await;
    let is_held = |block: &&BlockRef| tier.residents().iter().any(|r| r.key == *block.key());
    let held: Vec<&BlockRef> = blocks.iter().filter(is_held).collect();
    assert!(
        held.len() * 4 > blocks.len() * 3,
        "{} are there",
        held.len()
    );
    // What lies in the middle has moved.
    let moved = &held[held.len() / 3..][..3 * per_extent as usize];
    let keys: Vec<BlockKey> = moved.iter().map(|block| *block.key()).collect();
    tier.first_to_go(&keys);
    assert_eq!(tier.going().len(), keys.len());
    // One comes back for a moment: then it is an ordinary one.
    tier.stays(&keys[..1]);
    assert!(tier.going().iter().all(|resident| resident.key != keys[0]));
    tier.first_to_go(&keys[..1]);
    let before = leases.let_go.lock().clone();
    for batch in 0..per_extent / 4 {
        let new: Vec<BlockRef> = (0..4)
            .map(|n| block((10_000 + batch * 4 + n) as u32, 256 * KIB))
            .collect();
        write_patiently(&tier, &new).await;
    }
    eventually("room was made", || {
        leases.let_go.lock().len() > before.len()
    })
    .await;
    let let_go: Vec<BlockKey> = leases.let_go.lock().difference(&before).copied().collect();
    let moved_first = let_go.iter().filter(|key| keys.contains(key)).count();
    assert!(
        moved_first * 2 > let_go.len(),
        "{moved_first} of {} that went had moved",
        let_go.len()
    );
    for block in &held[..4] {
        assert!(has(&tier, block).await, "the oldest are there");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn if_everything_is_leased_new_blocks_still_find_room() {
    let dir = tempfile::tempdir().expect("a folder");
    struct KeepAll;
    impl ReclaimGuard for KeepAll {
        fn keep(&self, _: &BlockKey) -> bool {
            true
        }
    }
    let config = NvmeConfig::new(dir.path(), 16 * MIB);
    let tier = NvmeTier::open(config, clock(), Arc::new(KeepAll))
        .await
        .expect("it opens");
    for batch in 0..24 {
        let blocks: Vec<BlockRef> = (0..8).map(|n| block(batch * 8 + n, 200 * KIB)).collect();
        write_patiently(&tier, &blocks).await;
    }
    assert!(tier.status().in_service, "{:?}", tier.status());
    for resident in tier.residents() {
        let found = read(&tier, resident).await;
        assert!(
            matches!(found, Read::Hit(_) | Read::Gone(Reason::Evicted)),
            "{found:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_tier_in_a_hurry_gives_no_wrong_byte_and_keeps_its_leases() {
    let dir = tempfile::tempdir().expect("a folder");
    let leases = Arc::new(Leases::default());
    let mut config = NvmeConfig::new(dir.path(), 16 * MIB);
    config.queue_bytes = 2 * MIB;
    let tier = Arc::new(
        NvmeTier::open(config, clock(), leases.clone())
            .await
            .expect("it opens"),
    );
    let leased: Vec<BlockRef> = (0..12).map(|n| block(n, 150 * KIB)).collect();
    leases
        .leased
        .lock()
        .extend(leased.iter().map(|block| *block.key()));
    assert!(
        write_patiently(&*tier, &leased)
            .await
            .iter()
            .all(|outcome| outcome.is_held())
    );

    let readers = (0..2).map(|reader| {
        let (tier, leased) = (Arc::clone(&tier), leased.clone());
        tokio::spawn(async move {
            for round in 0..300 {
                let at = (round * 7 + reader) % leased.len();
                assert!(
                    has(&*tier, &leased[at]).await,
                    "leased block {at} in round {round}"
                );
            }
        })
    });
    let writers = (0..3).map(|writer| {
        let tier = Arc::clone(&tier);
        let chance = ManualClock::new(writer);
        tokio::spawn(async move {
            for round in 0..250 {
                let number = 1000 + (chance.random_u64() % 150) as u32;
                let version = (chance.random_u64() % 2) as u32;
                let some = block_in(namespace(1), number, version, 120 * KIB + number as usize);
                match chance.random_u64() % 4 {
                    0 => drop(has(&*tier, &some).await),
                    1 if round % 16 == 0 => tier.remove(&[*some.key()]).await.expect("removed"),
                    _ => drop(tier.write(vec![some]).await),
                }
            }
        })
    });
    for task in readers.chain(writers).collect::<Vec<_>>() {
        task.await.expect("no task failed");
    }
    let status = tier.status();
    assert!(status.in_service && status.queued_bytes == 0, "{status:?}");
    // Room is still being made in the background: what was listed may be gone by now, and is then
    // listed no more.
    for resident in tier.residents() {
        match read(&*tier, resident).await {
            Read::Hit(_) => {}
            Read::Gone(Reason::Evicted) => {
                eventually("listed is readable", || {
                    !tier.residents().contains(&resident)
                })
                .await;
            }
            found => panic!("listed is readable: {found:?}"),
        }
    }
}
