//! What the disk tiers keep, and what they say when they cannot: conformance, reclaim, limits, damage,
//! slow disks, wear.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kvgpu::{Arena, ArenaConfig, DomainId, HugePages};
use kvproto::{BlockKey, Reason};
use kvserver::{
    clock::{Clock, ManualClock, SystemClock},
    tier::{
        BlockRef, DurableConfig, DurableTier, Fault, Faults, FaultyTier, KeepNothing, NvmeConfig,
        NvmeError, NvmeTier, Read, ReclaimGuard, Resident, Tier, WriteOutcome,
        conformance::{block, block_in, conformance, has, key, namespace, read},
        journal, record,
    },
};
use kvtests::patience::{eventually, until};
use parking_lot::Mutex;

const KIB: usize = 1 << 10;
const MIB: u64 = 1 << 20;

fn clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock::new())
}

async fn nvme(config: NvmeConfig) -> NvmeTier {
    NvmeTier::open(config, clock(), Arc::new(KeepNothing))
        .await
        .expect("it opens")
}

async fn durable(config: DurableConfig) -> DurableTier {
    DurableTier::open(config, clock()).await.expect("it opens")
}

/// Writes until every block was either held or refused for good, as a patient caller does.
async fn write_patiently(tier: &dyn Tier, blocks: &[BlockRef]) -> Vec<WriteOutcome> {
    let mut outcomes = vec![None; blocks.len()];
    for _ in 0..1000 {
        let open: Vec<usize> = (0..blocks.len())
            .filter(|&at| outcomes[at].is_none())
            .collect();
        if open.is_empty() {
            break;
        }
        let answers = tier
            .write(open.iter().map(|&at| blocks[at].clone()).collect())
            .await;
        for (&at, answer) in open.iter().zip(answers) {
            let full = matches!(
                answer,
                WriteOutcome::Rejected {
                    reason: Reason::QueueFull,
                    ..
                }
            );
            outcomes[at] = (!full).then_some(answer);
        }
    }
    outcomes
        .into_iter()
        .map(|outcome| outcome.expect("a queue drains"))
        .collect()
}

// ---- one suite over all ------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn the_nvme_tier_conforms() {
    let dir = tempfile::tempdir().expect("a folder");
    conformance(|| async {
        Arc::new(nvme(NvmeConfig::new(dir.path(), 64 * MIB)).await) as Arc<dyn Tier>
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nvme_tier_conforms_without_direct_io_and_without_reservation() {
    let dir = tempfile::tempdir().expect("a folder");
    conformance(|| async {
        let mut config = NvmeConfig::new(dir.path(), 64 * MIB);
        (config.direct_io, config.preallocate) = (false, false);
        Arc::new(nvme(config).await) as Arc<dyn Tier>
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_durable_tier_conforms() {
    let dir = tempfile::tempdir().expect("a folder");
    conformance(|| async {
        Arc::new(durable(DurableConfig::new(dir.path(), 64 * MIB)).await) as Arc<dyn Tier>
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrapper_without_faults_conforms() {
    let dir = tempfile::tempdir().expect("a folder");
    conformance(|| async {
        let inner = Arc::new(nvme(NvmeConfig::new(dir.path(), 64 * MIB)).await);
        Arc::new(FaultyTier::new(inner, clock())) as Arc<dyn Tier>
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_lands_in_the_arena_slot_of_the_reader() {
    let dir = tempfile::tempdir().expect("a folder");
    let tier = nvme(NvmeConfig::new(dir.path(), 64 * MIB)).await;
    let arena = Arena::new(ArenaConfig {
        capacity_bytes: 16 * MIB,
        segment_bytes: 16 * MIB,
        huge_pages: HugePages::Off,
        prefault: false,
        ..ArenaConfig::default()
    })
    .expect("an arena");
    let stored = block(1, 1024 * KIB);
    assert_eq!(
        tier.write(vec![stored.clone()]).await,
        [WriteOutcome::Stored]
    );
    let slot = arena.alloc(DomainId::NODE, 1024 * KIB).expect("room");
    let place = slot.location().expect("in the arena");
    match tier.read(Resident::of(&stored), slot).await {
        Read::Hit(found) => {
            let found = found.share();
            assert_eq!(
                found.location(),
                Some(place),
                "the very slot that was supplied"
            );
            assert!(found.bytes() == stored.bytes());
        }
        other => panic!("{other:?}"),
    }
    // On failure the slot is free again.
    let slot = arena.alloc(DomainId::NODE, 1024 * KIB).expect("room");
    let missing = Resident {
        key: key(77),
        ..Resident::of(&stored)
    };
    assert!(matches!(tier.read(missing, slot).await, Read::Gone(_)));
    assert_eq!(arena.stats().used_bytes, 0, "no slot is left behind");
}

// ---- reclaim -----------------------------------------------------------------------------------

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
        let present = has(&tier, &other).await;
        assert!(
            if present {
                before
            } else {
                !listed(other.key())
            },
            "listed is readable, not listed is not"
        );
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
                let listed = tier.residents();
                assert!(
                    !listed.contains(&resident),
                    "listed is readable: {resident:?}"
                );
            }
            found => panic!("listed is readable: {found:?}"),
        }
    }
}

// ---- limits ------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn under_overload_every_stored_block_is_there_and_the_rest_is_told_to_wait() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut config = NvmeConfig::new(dir.path(), 512 * MIB);
    config.queue_bytes = 4 * MIB;
    let tier = Arc::new(nvme(config).await);
    let writers = (0..16).map(|writer| {
        let tier = Arc::clone(&tier);
        tokio::spawn(async move {
            let blocks: Vec<BlockRef> = (0..8).map(|n| block(writer * 8 + n, 1024 * KIB)).collect();
            let outcomes = tier.write(blocks.clone()).await;
            blocks.into_iter().zip(outcomes).collect::<Vec<_>>()
        })
    });
    let (mut stored, mut told_to_wait) = (0, 0);
    for writer in writers.collect::<Vec<_>>() {
        for (block, outcome) in writer.await.expect("a writer") {
            match outcome {
                WriteOutcome::Stored => {
                    stored += 1;
                    assert!(has(&*tier, &block).await, "stored is stored");
                }
                WriteOutcome::Rejected {
                    reason: Reason::QueueFull,
                    retry_after_ms,
                } => {
                    told_to_wait += 1;
                    assert!(retry_after_ms > 0, "and says for how long");
                    assert!(!has(&*tier, &block).await, "refused is refused");
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(
        stored > 0 && told_to_wait > 0,
        "{stored} stored, {told_to_wait} told to wait"
    );
    let counted: HashMap<Reason, u64> = tier.status().drops.into_iter().collect();
    assert_eq!(counted.get(&Reason::QueueFull), Some(&told_to_wait));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_call_larger_than_the_queue_is_stored_whole() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut config = NvmeConfig::new(dir.path(), 512 * MIB);
    (config.queue_bytes, config.flight_bytes) = (4 * MIB, 2 * MIB);
    let tier = nvme(config).await;
    let blocks: Vec<BlockRef> = (0..64).map(|n| block(n, 1024 * KIB)).collect();
    let outcomes = tier.write(blocks.clone()).await;
    assert!(
        outcomes
            .iter()
            .all(|outcome| *outcome == WriteOutcome::Stored),
        "{outcomes:?}"
    );
    for block in &blocks {
        assert!(has(&tier, block).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_that_no_extent_can_hold_is_too_large() {
    let dir = tempfile::tempdir().expect("a folder");
    let tier = nvme(NvmeConfig::new(dir.path(), 64 * MIB)).await;
    let extent = tier.geometry().extent_bytes;
    let fits = (1..=extent)
        .rev()
        .step_by(64)
        .find(|&bytes| tier.geometry().fits(bytes))
        .expect("some");
    let outcomes = tier
        .write(vec![block(1, fits as usize), block(2, extent as usize)])
        .await;
    assert_eq!(
        outcomes[0],
        WriteOutcome::Stored,
        "the largest that fits does fit"
    );
    assert_eq!(
        outcomes[1],
        WriteOutcome::Rejected {
            reason: Reason::TooLarge,
            retry_after_ms: 0
        }
    );
    assert!(has(&tier, &block(1, fits as usize)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wear_budget_holds_over_a_restart_and_comes_back_the_next_day() {
    let dir = tempfile::tempdir().expect("a folder");
    let clock = ManualClock::new(1);
    let mut config = NvmeConfig::new(dir.path(), 64 * MIB);
    config.wear_bytes_per_day = 4 * MIB;
    let open = || {
        NvmeTier::open(
            config.clone(),
            Arc::new(clock.clone()),
            Arc::new(KeepNothing),
        )
    };
    let tier = open().await.expect("it opens");
    let blocks: Vec<BlockRef> = (0..8).map(|n| block(n, 1024 * KIB)).collect();
    let outcomes = tier.write(blocks.clone()).await;
    // A megabyte with its header is 257 pages, so the fourth does not fit any more.
    assert!(
        outcomes[..3]
            .iter()
            .all(|outcome| *outcome == WriteOutcome::Stored),
        "{outcomes:?}"
    );
    for outcome in &outcomes[3..] {
        match outcome {
            WriteOutcome::Rejected {
                reason: Reason::Wear,
                retry_after_ms,
            } => {
                let midnight = clock.unix_ms() + u64::from(*retry_after_ms);
                assert_eq!(midnight % 86_400_000, 0, "come back at midnight");
            }
            other => panic!("{other:?}"),
        }
    }
    let written = tier.status().written_bytes_today;
    assert!((3 * MIB..4 * MIB).contains(&written), "{written}");
    tier.close().await;
    drop(tier);

    let tier = open().await.expect("it opens again");
    assert_eq!(
        tier.status().written_bytes_today,
        written,
        "the day's total survived"
    );
    assert!(!tier.write(vec![blocks[7].clone()]).await[0].is_held());
    clock.advance(Duration::from_secs(86_400));
    assert_eq!(tier.status().written_bytes_today, 0);
    assert_eq!(
        tier.write(vec![blocks[7].clone()]).await,
        [WriteOutcome::Stored]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_has_one_tier() {
    let dir = tempfile::tempdir().expect("a folder");
    let tier = nvme(NvmeConfig::new(dir.path(), 16 * MIB)).await;
    let second = NvmeTier::open(
        NvmeConfig::new(dir.path(), 16 * MIB),
        clock(),
        Arc::new(KeepNothing),
    );
    assert!(matches!(second.await, Err(NvmeError::InUse { .. })));
    tier.close().await;
    nvme(NvmeConfig::new(dir.path(), 16 * MIB)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_too_small_or_read_only_is_refused_at_open() {
    let dir = tempfile::tempdir().expect("a folder");
    let huge = NvmeConfig::new(dir.path(), 20 << 40);
    match NvmeTier::open(huge, clock(), Arc::new(KeepNothing)).await {
        Err(NvmeError::NoSpace {
            needed_bytes,
            free_bytes,
            ..
        }) => assert!(needed_bytes > free_bytes),
        other => panic!("{other:?}"),
    }
    let read_only = NvmeConfig::new("/proc/terrace", 16 * MIB);
    let refused = NvmeTier::open(read_only, clock(), Arc::new(KeepNothing)).await;
    assert!(matches!(refused, Err(NvmeError::Io { .. })), "{refused:?}");
}

// ---- a bad disk --------------------------------------------------------------------------------

/// Where a block's record lies in foyer's files: it begins with the magic and the key.
fn find_record(dir: &Path, key: &BlockKey) -> (PathBuf, u64) {
    let mut wanted = record::MAGIC.to_vec();
    wanted.extend_from_slice(&[1, 0, 0, 0]);
    wanted.extend_from_slice(&key.to_bytes());
    for entry in fs::read_dir(dir.join("extents")).expect("extents") {
        let path = entry.expect("an entry").path();
        let bytes = fs::read(&path).expect("an extent");
        if let Some(at) = bytes
            .windows(wanted.len())
            .position(|piece| piece == wanted)
        {
            return (path, at as u64);
        }
    }
    panic!("the record is on disk");
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("an extent");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("flipped");
    file.sync_all().expect("synced");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_anywhere_in_a_record_is_a_counted_miss() {
    let length = 150 * KIB;
    let head = record::head_bytes(length as u64) as i64;
    // Magic, key, place, length, seal, a page sum, the header sum; first, middle and last byte; and
    // foyer's own header before it and key behind it.
    let places: [i64; 12] = [
        0,
        10,
        70,
        130,
        138,
        153,
        head - 1,
        head,
        head + 99_999,
        head + length as i64 - 1,
        -4,
        head + length as i64 + 5,
    ];
    for restart in [false, true] {
        let dir = tempfile::tempdir().expect("a folder");
        let mut tier = nvme(NvmeConfig::new(dir.path(), 64 * MIB)).await;
        let blocks: Vec<BlockRef> = (0..places.len() as u32 + 4)
            .map(|n| block(n, length))
            .collect();
        assert!(
            tier.write(blocks.clone())
                .await
                .iter()
                .all(|outcome| outcome.is_held())
        );
        if restart {
            tier.close().await;
        }
        for (block, place) in blocks.iter().zip(places) {
            let (path, at) = find_record(dir.path(), block.key());
            flip(&path, at.checked_add_signed(place).expect("inside"));
        }
        if restart {
            drop(tier);
            tier = nvme(NvmeConfig::new(dir.path(), 64 * MIB)).await;
        }
        let mut unharmed = 0;
        for (at, block) in blocks.iter().enumerate() {
            let found = read(&tier, Resident::of(block)).await;
            if at >= places.len() {
                assert!(
                    matches!(found, Read::Hit(_)),
                    "the neighbours are whole: {found:?}"
                );
                continue;
            }
            // foyer's header and key are outside of the record: who finds the block by its position
            // does not need them.
            let outside = !(0..head + length as i64).contains(&places[at]);
            if outside && matches!(&found, Read::Hit(found) if found.bytes() == block.bytes()) {
                unharmed += 1;
                continue;
            }
            assert!(
                matches!(found, Read::Gone(Reason::Corrupt)),
                "flip at {}: {found:?}",
                places[at]
            );
            let again = read(&tier, Resident::of(block)).await;
            assert!(
                matches!(again, Read::Gone(Reason::Evicted)),
                "it was forgotten: {again:?}"
            );
        }
        let corrupt = tier
            .status()
            .drops
            .into_iter()
            .find(|(reason, _)| *reason == Reason::Corrupt);
        assert_eq!(
            corrupt,
            Some((Reason::Corrupt, places.len() as u64 - unharmed)),
            "every one is counted"
        );
        assert!(
            tier.status().in_service,
            "bad sectors do not take a tier out of service"
        );
        // And the key may come again.
        assert_eq!(
            tier.write(vec![blocks[0].clone()]).await,
            [WriteOutcome::Stored]
        );
        assert!(has(&tier, &blocks[0]).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_damage_never_gives_a_wrong_byte() {
    let dir = tempfile::tempdir().expect("a folder");
    let tier = nvme(NvmeConfig::new(dir.path(), 32 * MIB)).await;
    let blocks: Vec<BlockRef> = (0..100)
        .map(|n| block(n, 60 * KIB + n as usize * 4000))
        .collect();
    let outcomes = write_patiently(&tier, &blocks).await;
    assert!(outcomes.iter().all(|outcome| outcome.is_held()));
    tier.close().await;
    drop(tier);
    let chance = ManualClock::new(42);
    for entry in fs::read_dir(dir.path().join("extents")).expect("extents") {
        let path = entry.expect("an entry").path();
        let length = fs::metadata(&path).expect("a file").len();
        for _ in 0..20 {
            flip(&path, chance.random_u64() % length);
        }
    }
    let tier = nvme(NvmeConfig::new(dir.path(), 32 * MIB)).await;
    // `has` panics on a wrong byte.
    let mut there = 0;
    for block in &blocks {
        there += usize::from(has(&tier, block).await);
    }
    assert!(there < 100, "some were hit");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_journal_starts_cold_and_a_torn_one_loses_its_last_record() {
    let dir = tempfile::tempdir().expect("a folder");
    let blocks: Vec<BlockRef> = (0..10).map(|n| block(n, 50 * KIB)).collect();
    let tier = nvme(NvmeConfig::new(dir.path(), 32 * MIB)).await;
    for block in &blocks {
        assert_eq!(
            tier.write(vec![block.clone()]).await,
            [WriteOutcome::Stored]
        );
    }
    tier.close().await;
    drop(tier);
    let path = dir.path().join("journal");
    let whole = fs::read(&path).expect("a journal");

    // The last record is the day's wear or a block; cut into the last block's.
    let (entries, _) = journal::parse(&whole);
    let last = entries
        .iter()
        .rposition(|entry| matches!(entry, journal::Entry::Stored(_)))
        .expect("one");
    let until = journal::encode(tier_extent(&whole), &entries[..last]).len();
    fs::write(&path, &whole[..until + 20]).expect("torn");
    let tier = nvme(NvmeConfig::new(dir.path(), 32 * MIB)).await;
    assert_eq!(tier.recovered().blocks, 9);
    assert!(has(&tier, &blocks[0]).await && !has(&tier, &blocks[9]).await);
    tier.close().await;
    drop(tier);

    let mut damaged = whole.clone();
    damaged[journal::HEAD_BYTES + 30] ^= 1;
    fs::write(&path, &damaged).expect("damaged");
    let tier = nvme(NvmeConfig::new(dir.path(), 32 * MIB)).await;
    assert!(
        tier.recovered().started_cold,
        "a record is missing in the middle: believe nothing"
    );
    assert_eq!(tier.residents(), []);
    assert!(
        tier.status().note.contains("damaged"),
        "{}",
        tier.status().note
    );
    assert!(
        tier.write(blocks.clone())
            .await
            .iter()
            .all(|outcome| outcome.is_held())
    );
    tier.close().await;
    drop(tier);
    let tier = nvme(NvmeConfig::new(dir.path(), 32 * MIB)).await;
    assert_eq!(tier.recovered().blocks, 10, "and from then on it is sound");
}

fn tier_extent(journal: &[u8]) -> u64 {
    journal::parse(journal).1.extent_bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn other_extents_start_cold_and_more_capacity_does_not() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = |capacity, extent| {
        let mut config = NvmeConfig::new(dir.path(), capacity);
        config.extent_bytes = Some(extent);
        config
    };
    let stored = block(1, 100 * KIB);
    let tier = nvme(config(16 * MIB, MIB)).await;
    assert_eq!(
        tier.write(vec![stored.clone()]).await,
        [WriteOutcome::Stored]
    );
    tier.close().await;
    drop(tier);
    let tier = nvme(config(32 * MIB, MIB)).await;
    assert!(has(&tier, &stored).await, "a larger tier keeps what it had");
    tier.close().await;
    drop(tier);
    let tier = nvme(config(32 * MIB, 2 * MIB)).await;
    assert!(tier.recovered().started_cold && !has(&tier, &stored).await);
    assert_eq!(
        tier.write(vec![stored.clone()]).await,
        [WriteOutcome::Stored]
    );
    assert!(has(&tier, &stored).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_disk_is_an_answer_and_the_tier_comes_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let clock = ManualClock::new(1);
    let mut config = NvmeConfig::new(dir.path(), 32 * MIB);
    (config.reads, config.read_queue, config.read_bytes) = (2, 1, MIB);
    (
        config.read_deadline_ms,
        config.write_deadline_ms,
        config.cooldown_ms,
    ) = (1000, 2000, 500);
    let tier = NvmeTier::open(config, Arc::new(clock.clone()), Arc::new(KeepNothing)).await;
    let tier = tier.expect("it opens");
    let stored = block(1, 100 * KIB);
    assert_eq!(
        tier.write(vec![stored.clone()]).await,
        [WriteOutcome::Stored]
    );

    let hung = tier.hang_disk();
    let reads: Vec<_> = (0..3)
        .map(|_| tokio::spawn(tier.read(Resident::of(&stored), kvgpu::SlotMut::heap(100 * KIB))))
        .collect();
    let waiting = |count| {
        let clock = clock.clone();
        async move {
            while clock.sleepers() < count {
                tokio::task::yield_now().await;
            }
        }
    };
    waiting(3).await;
    assert!(
        matches!(read(&tier, Resident::of(&stored)).await, Read::Busy),
        "the waiting room is full"
    );
    clock.advance(Duration::from_millis(1000));
    for read in reads {
        let read = read.await.expect("a read");
        assert!(
            matches!(read, Read::Gone(Reason::Device)),
            "a late read is a device failure: {read:?}"
        );
    }
    let status = tier.status();
    assert!(
        !status.in_service && status.note.contains("deadline"),
        "{status:?}"
    );
    assert!(matches!(
        read(&tier, Resident::of(&stored)).await,
        Read::Gone(Reason::TierDown)
    ));
    match tier.write(vec![block(2, 1000)]).await[0] {
        WriteOutcome::Rejected {
            reason: Reason::TierDown,
            retry_after_ms,
        } => {
            assert_eq!(retry_after_ms, 500, "the cool-down");
        }
        other => panic!("{other:?}"),
    }

    drop(hung);
    // Time moves on until the prober has found the disk well again, and no faster than a slow disk can follow.
    let step = Duration::from_millis(5);
    until("the prober finds the disk well", async || {
        SystemClock::new().sleep(step).await;
        clock.advance(step);
        tier.status().in_service
    })
    .await;
    assert!(has(&tier, &stored).await, "and what was stored is there");
    assert_eq!(
        tier.write(vec![block(2, 1000)]).await,
        [WriteOutcome::Stored]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_a_hung_disk_swallows_is_not_stored() {
    let dir = tempfile::tempdir().expect("a folder");
    let clock = ManualClock::new(1);
    let mut config = NvmeConfig::new(dir.path(), 32 * MIB);
    (config.reads, config.write_deadline_ms) = (2, 2000);
    let tier = NvmeTier::open(config, Arc::new(clock.clone()), Arc::new(KeepNothing)).await;
    let tier = tier.expect("it opens");
    let hung = tier.hang_disk();
    let swallowed = block(1, 100 * KIB);
    let write = tokio::spawn(tier.write(vec![swallowed.clone()]));
    while clock.sleepers() < 1 {
        tokio::task::yield_now().await;
    }
    clock.advance(Duration::from_millis(2000));
    match write.await.expect("an answer")[0] {
        WriteOutcome::Rejected {
            reason: Reason::Device,
            ..
        } => {}
        other => panic!("{other:?}"),
    }
    assert!(!tier.status().in_service);
    assert!(!has(&tier, &swallowed).await && tier.residents().is_empty());
    drop(hung);
}

// ---- the durable store -------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_full_durable_store_refuses_and_evicts_nobody() {
    let dir = tempfile::tempdir().expect("a folder");
    let tier = durable(DurableConfig::new(dir.path(), 2 * MIB)).await;
    let blocks: Vec<BlockRef> = (0..30).map(|n| block(n, 100 * KIB)).collect();
    let outcomes = tier.write(blocks.clone()).await;
    let held: Vec<&BlockRef> = blocks
        .iter()
        .zip(&outcomes)
        .filter(|(_, outcome)| outcome.is_held())
        .map(|(block, _)| block)
        .collect();
    assert_eq!(held.len(), 20, "as many as fit with their headers");
    let full = WriteOutcome::Rejected {
        reason: Reason::TierFull,
        retry_after_ms: 0,
    };
    assert!(
        outcomes
            .iter()
            .all(|outcome| outcome.is_held() || *outcome == full),
        "{outcomes:?}"
    );
    for block in &held {
        assert!(has(&tier, block).await, "nobody was evicted");
    }
    tier.remove(&[*held[0].key()]).await.expect("removed");
    assert_eq!(
        tier.write(vec![blocks[29].clone()]).await,
        [WriteOutcome::Synced],
        "room again"
    );
    assert!(tier.status().used_bytes <= 2 * MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_durable_removal_that_failed_is_done_by_the_next() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = || DurableConfig::new(dir.path(), 8 * MIB);
    let tier = durable(config()).await;
    let stored = block(1, 100 * KIB);
    assert!(tier.write(vec![stored.clone()]).await[0].is_held());
    // A folder in the file's place cannot be unlinked.
    let folders = fs::read_dir(dir.path().join("blocks")).expect("folders");
    let files =
        folders.flat_map(|folder| fs::read_dir(folder.expect("one").path()).expect("files"));
    let path = files.map(|file| file.expect("one").path()).next();
    let path = path.expect("the block's file");
    let aside = dir.path().join("aside");
    fs::rename(&path, &aside).expect("set aside");
    fs::create_dir(&path).expect("in its place");
    tier.remove(&[*stored.key()]).await.expect_err("no file");
    fs::remove_dir(&path).expect("empty");
    fs::rename(&aside, &path).expect("back");
    tier.remove(&[*stored.key()]).await.expect("it can now");
    tier.close().await;
    drop(tier);
    assert!(durable(config()).await.residents().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_durable_file_is_set_aside_and_never_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let tier = durable(DurableConfig::new(dir.path(), 16 * MIB)).await;
    let blocks: Vec<BlockRef> = (0..3).map(|n| block(n, 100 * KIB)).collect();
    assert!(
        tier.write(blocks.clone())
            .await
            .iter()
            .all(|outcome| outcome.is_held())
    );
    let file_of = |block: &BlockRef| {
        let hash = block.key().hash;
        let folder = dir.path().join("blocks").join(format!("{:02x}", hash.0[0]));
        let mut files = fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("one").path());
        files
            .find(|path| path.to_string_lossy().contains(&hash.to_string()))
            .expect("the file")
    };
    // One in its bytes, found by a read; one in its header, found at open.
    flip(&file_of(&blocks[0]), 60_000);
    let found = read(&tier, Resident::of(&blocks[0])).await;
    assert!(matches!(found, Read::Gone(Reason::Corrupt)), "{found:?}");
    assert!(
        file_of(&blocks[0])
            .extension()
            .is_some_and(|ext| ext == "corrupt")
    );
    assert!(
        tier.status().note.contains("1 damaged"),
        "{}",
        tier.status().note
    );
    flip(&file_of(&blocks[1]), 20);
    tier.close().await;
    drop(tier);
    fs::write(dir.path().join("tmp/7"), b"half a record").expect("left over");

    let tier = durable(DurableConfig::new(dir.path(), 16 * MIB)).await;
    assert_eq!(tier.residents(), [Resident::of(&blocks[2])]);
    assert!(
        tier.status().note.contains("2 damaged"),
        "{}",
        tier.status().note
    );
    assert_eq!(
        fs::read_dir(dir.path().join("tmp")).expect("tmp").count(),
        0,
        "left-overs are cleared"
    );
    assert_eq!(
        tier.write(vec![blocks[0].clone()]).await,
        [WriteOutcome::Synced],
        "and may come again"
    );
    assert!(has(&tier, &blocks[0]).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_sees_a_lying_tier_by_its_reads() {
    let dir = tempfile::tempdir().expect("a folder");
    let inner = Arc::new(nvme(NvmeConfig::new(dir.path(), 32 * MIB)).await);
    let tier = FaultyTier::new(inner, clock());
    tier.set(Faults {
        writes: Fault::Lose,
        ..Faults::default()
    });
    let lost = block(1, 10 * KIB);
    assert_eq!(tier.write(vec![lost.clone()]).await, [WriteOutcome::Stored]);
    assert!(matches!(
        read(&tier, Resident::of(&lost)).await,
        Read::Gone(Reason::Evicted)
    ));
}
