//! One suite over all tiers, and the arena slot that a read fills.

use std::sync::Arc;

use kvgpu::{Arena, ArenaConfig, DomainId, HugePages};
use kvproto::Reason;
use kvserver::tier::{
    DurableConfig, Fault, Faults, FaultyTier, NvmeConfig, Read, Resident, Tier, WriteOutcome,
    conformance::{block, conformance, key, read},
};

use crate::{KIB, MIB, clock, durable, nvme};

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
