//! Flipped bits and torn journals: a counted miss, never a wrong byte.

use std::{
    fs,
    path::{Path, PathBuf},
};

use kvproto::{BlockKey, Reason};
use kvserver::{
    clock::{Clock, ManualClock},
    tier::{
        BlockRef, NvmeConfig, Read, Resident, Tier, WriteOutcome,
        conformance::{block, has, read},
        journal, record,
    },
};

use crate::{KIB, MIB, flip, nvme, write_patiently};

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
