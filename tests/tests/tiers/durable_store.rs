//! The durable store: refuses rather than evicts, sets damaged files aside.

use std::fs;

use kvproto::Reason;
use kvserver::tier::{
    BlockRef, DurableConfig, Read, Resident, Tier, WriteOutcome,
    conformance::{block, has, read},
};

use crate::{KIB, MIB, durable, flip};

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
