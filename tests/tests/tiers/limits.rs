//! Full queues, blocks too large, worn disks, folders in use.

use std::{collections::HashMap, sync::Arc, time::Duration};

use kvproto::Reason;
use kvserver::{
    clock::{Clock, ManualClock},
    tier::{
        BlockRef, KeepNothing, NvmeConfig, NvmeError, NvmeTier, Tier, WriteOutcome,
        conformance::{block, has},
    },
};

use crate::{KIB, MIB, clock, nvme};

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
