//! Many who write at once.

use std::sync::Arc;

use kvserver::tier::{
    BlockRef, NvmeConfig, Tier, WriteOutcome,
    conformance::{block, has},
};

use crate::{KIB, MIB, nvme};

const WRITERS: u32 = 8;
const BLOCKS: u32 = 400;

/// foyer numbers what it is given, and its recovery leaves an extent at the first number that goes back: with two who
/// change places between being numbered and being queued, all that was stored behind them would be gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn what_many_have_stored_at_once_is_all_there_after_a_restart() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = NvmeConfig::new(dir.path(), 256 * MIB);
    let tier = Arc::new(nvme(config.clone()).await);
    let writers = (0..WRITERS).map(|writer| {
        let tier = Arc::clone(&tier);
        tokio::spawn(async move {
            let mine: Vec<BlockRef> = (0..BLOCKS)
                .map(|n| block(writer * BLOCKS + n, 4 * KIB))
                .collect();
            for few in mine.chunks(2) {
                let outcomes = tier.write(few.to_vec()).await;
                let is_stored = |outcome: &WriteOutcome| *outcome == WriteOutcome::Stored;
                assert!(outcomes.iter().all(is_stored), "{outcomes:?}");
            }
            mine
        })
    });
    let mut written = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        written.extend(writer.await.expect("a writer"));
    }
    tier.close().await;
    drop(tier);

    let tier = nvme(config).await;
    let found = tier.recovered();
    assert_eq!(
        (found.blocks, found.dropped),
        (u64::from(WRITERS * BLOCKS), 0)
    );
    for block in &written {
        assert!(has(&tier, block).await, "{:?}", block.key());
    }
}
