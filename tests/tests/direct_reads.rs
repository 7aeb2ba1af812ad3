//! The short way to a block on disk: right where it is known, a detour where it is not, and never a
//! wrong byte.
//!
//! The short way needs a hard limit of open files over 1024 (`ulimit -Hn`); below it each test still reads what
//! it wrote, the long way, and says what it could not see.

use std::sync::Arc;

use kvproto::Reason;
use kvserver::{
    clock::SystemClock,
    tier::{
        BlockRef, KeepNothing, NvmeConfig, NvmeTier, Read, Resident, Tier, WriteOutcome,
        conformance::{block, has, read},
        nvme::ReadPaths,
    },
};
use rustix::process::{Resource, getrlimit};

const KIB: usize = 1 << 10;
const MIB: u64 = 1 << 20;

async fn open(config: &NvmeConfig) -> NvmeTier {
    NvmeTier::open(
        config.clone(),
        Arc::new(SystemClock::new()),
        Arc::new(KeepNothing),
    )
    .await
    .expect("it opens")
}

/// Whether reads can go the short way here: not where the hard limit of open files is too low. The tier must
/// say so then, and what a test expects of positions cannot be seen.
fn can_read_directly(tier: &NvmeTier) -> bool {
    let needed = tier.geometry().files_for_direct_reads();
    let most = getrlimit(Resource::Nofile).maximum;
    let can = most.is_none_or(|most| most >= needed);
    let note = tier.status().note;
    assert_eq!(!can, note.contains("too few open files"), "{note}");
    if !can {
        eprintln!("SKIPPED in part: direct reads need {needed} open files, {most:?} are allowed");
    }
    can
}

async fn store(tier: &NvmeTier, blocks: &[BlockRef]) {
    let outcomes = tier.write(blocks.to_vec()).await;
    let stored = |outcome: &WriteOutcome| *outcome == WriteOutcome::Stored;
    assert!(outcomes.iter().all(stored), "{outcomes:?}");
}

/// Lengths around a page, what is copied past the cache, what is read at once; and enough to fill an index.
fn of_all_lengths() -> Vec<BlockRef> {
    let lengths = [
        1,
        4 * KIB,
        64 * KIB,
        256 * KIB - 1,
        256 * KIB,
        256 * KIB + 1,
        300_001,
        1024 * KIB,
        1024 * KIB + 3999,
        2048 * KIB - 500,
        2048 * KIB,
        5000 * KIB + 1,
    ];
    let mut blocks: Vec<BlockRef> = (0..)
        .zip(lengths)
        .map(|(n, length)| block(n, length))
        .collect();
    blocks.extend((1000..1400).map(|n| block(n, 4 * KIB)));
    blocks
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_is_read_where_it_lies_also_after_a_restart() {
    for direct_io in [true, false] {
        let dir = tempfile::tempdir().expect("a folder");
        let mut config = NvmeConfig::new(dir.path(), 128 * MIB);
        config.direct_io = direct_io;
        let blocks = of_all_lengths();
        let tier = open(&config).await;
        let reads = blocks.len() as u64;
        let all_one_way = match can_read_directly(&tier) {
            true => ReadPaths {
                direct: reads,
                ..ReadPaths::default()
            },
            false => ReadPaths {
                through_foyer: reads,
                ..ReadPaths::default()
            },
        };
        store(&tier, &blocks).await;
        for restart in [false, true] {
            let tier = match restart {
                false => &tier,
                true => {
                    tier.close().await;
                    &open(&config).await
                }
            };
            tier.look().await;
            for block in &blocks {
                assert!(has(tier, block).await, "{block:?}");
            }
            assert_eq!(tier.read_paths(), all_one_way);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn positions_follow_what_makes_room_for_other_blocks() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = NvmeConfig::new(dir.path(), 32 * MIB);
    let mut tier = open(&config).await;
    let mut reads = 0;
    // Four times the capacity, small and large blocks by turns, with a restart in the middle.
    for round in 0..128 {
        if round == 64 {
            tier.close().await;
            drop(tier);
            tier = open(&config).await;
            reads = 0;
        }
        let fresh: Vec<BlockRef> = (0..4)
            .map(|n| {
                block(
                    round * 4 + n,
                    [300 * KIB, 4 * KIB, 600 * KIB, 60 * KIB][n as usize],
                )
            })
            .collect();
        store(&tier, &fresh).await;
        tier.look().await;
        for block in &fresh {
            assert!(has(&tier, block).await, "just written");
            reads += 1;
        }
        // And somebody who may be gone: gone or right.
        let older = block(round.saturating_sub(20) * 4, 300 * KIB);
        reads += u64::from(has(&tier, &older).await);
    }
    let paths = tier.read_paths();
    let expected = if can_read_directly(&tier) { reads } else { 0 };
    assert!(paths.direct * 100 >= expected * 95, "{paths:?} of {reads}");
    let status = tier.status();
    assert!(
        status
            .drops
            .iter()
            .all(|(reason, _)| *reason == Reason::Evicted),
        "{status:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_position_is_a_detour() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = NvmeConfig::new(dir.path(), 64 * MIB);
    for length in [64 * KIB, 512 * KIB] {
        let tier = open(&config).await;
        if !can_read_directly(&tier) {
            return; // without positions there are no wrong ones
        }
        let entry_bytes = tier.geometry().entry_bytes(length as u64) as u32;
        let number = length as u32;
        let blocks: Vec<BlockRef> = (number..number + 8).map(|n| block(n, length)).collect();
        store(&tier, &blocks).await;
        tier.look().await;
        // A page further; and the neighbour's place, where a whole record lies, only another one.
        for (nth, shift) in [4096, entry_bytes].into_iter().enumerate() {
            tier.misplace(shift);
            let astray = &blocks[4 * nth..4 * nth + 4];
            for block in astray {
                assert!(has(&tier, block).await);
            }
            let paths = tier.read_paths();
            assert_eq!(paths.strayed, 4 * (nth as u64 + 1), "{paths:?}");
            assert_eq!(paths.direct, 0, "{paths:?}");
        }
        tier.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_removed_is_not_found_at_its_position() {
    let dir = tempfile::tempdir().expect("a folder");
    let tier = open(&NvmeConfig::new(dir.path(), 64 * MIB)).await;
    let first = block(1, 300 * KIB);
    store(&tier, std::slice::from_ref(&first)).await;
    tier.look().await;
    assert!(has(&tier, &first).await);
    tier.remove(&[*first.key()]).await.expect("noted");
    let found = read(&tier, Resident::of(&first)).await;
    assert!(matches!(found, Read::Gone(_)), "{found:?}");
    // Stored again: the later copy's place, and no stale one.
    store(&tier, std::slice::from_ref(&first)).await;
    tier.look().await;
    assert!(has(&tier, &first).await);
    let paths = tier.read_paths();
    let direct = if can_read_directly(&tier) { 2 } else { 0 };
    assert_eq!((paths.direct, paths.strayed), (direct, 0), "{paths:?}");
}
