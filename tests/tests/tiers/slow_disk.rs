//! A disk that does not answer: the tier does, and comes back.

use std::{sync::Arc, time::Duration};

use kvproto::Reason;
use kvserver::{
    clock::{Clock, ManualClock, SystemClock},
    tier::{
        KeepNothing, NvmeConfig, NvmeTier, Read, Resident, Tier, WriteOutcome,
        conformance::{block, has, read},
    },
};
use kvtests::patience::until;

use crate::{KIB, MIB};

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
