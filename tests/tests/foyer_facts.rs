//! What foyer 0.22.6 does that the NVMe tier is built around: each fact is a reason for something in
//! `kvserver/src/tier/nvme`. A test that fails after an upgrade says which precaution may go.
//!
//! | fact | what we do |
//! |---|---|
//! | a burst over its queue is dropped without an error | bound the bytes before it, ask its index after |
//! | an entry as large as a block vanishes | check the length before |
//! | deleted keys come back after a restart | believe only our journal |
//! | its tombstone log forgets its place after a restart | leave it off |
//! | compression is set and never used | leave it off |
//! | `clear` empties the map and not the books | never call it |
//! | only the reinsertion filter hears of evictions, once per entry | hang reclaim on it |

use std::{
    collections::HashSet,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use foyer::{
    BlockEngineConfig, Cache, CacheBuilder, Compression, DeviceBuilder, FsDeviceBuilder,
    HybridCache, HybridCacheBuilder, HybridCachePolicy, HybridCacheProperties, LruConfig,
    RecoverMode, Statistics, StorageFilter, StorageFilterCondition, StorageFilterResult,
};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

type Engine = BlockEngineConfig<u64, Vec<u8>, HybridCacheProperties>;
type Hybrid = HybridCache<u64, Vec<u8>>;

async fn open(
    dir: &Path,
    capacity_bytes: usize,
    compression: Compression,
    tune: impl FnOnce(Engine) -> Engine,
) -> Hybrid {
    let device = FsDeviceBuilder::new(dir)
        .with_capacity(capacity_bytes)
        .build()
        .expect("a device");
    HybridCacheBuilder::new()
        .with_policy(HybridCachePolicy::WriteOnInsertion)
        .with_flush_on_close(false)
        .memory(1)
        .with_shards(1)
        .storage()
        .with_engine_config(tune(BlockEngineConfig::new(device)))
        .with_recover_mode(RecoverMode::Quiet)
        .with_compression(compression)
        .build()
        .await
        .expect("a cache")
}

/// Queues large enough for these tests.
fn roomy(engine: Engine) -> Engine {
    engine
        .with_buffer_pool_size(64 * MIB)
        .with_submit_queue_size_threshold(128 * MIB)
}

fn count(cache: &Hybrid, keys: std::ops::Range<u64>) -> usize {
    keys.filter(|key| cache.storage().may_contains(key)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_over_its_queue_is_dropped_without_an_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let cache = open(dir.path(), 256 * MIB, Compression::None, |engine| engine).await;
    for key in 0..128 {
        cache.insert(key, vec![7; MIB]);
    }
    cache.storage().wait().await;
    let kept = count(&cache, 0..128);
    assert!(
        kept < 128,
        "all {kept} reached the disk: the default queue no longer drops"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_as_large_as_a_block_vanishes() {
    let dir = tempfile::tempdir().expect("a folder");
    let cache = open(dir.path(), 64 * MIB, Compression::None, |engine| {
        roomy(engine).with_block_size(4 * MIB)
    })
    .await;
    cache.insert(1, vec![1; 4 * MIB]);
    cache.insert(2, vec![1; 4 * MIB - 8 * KIB]);
    cache.storage().wait().await;
    assert!(
        !cache.storage().may_contains(&1),
        "it is gone, and nobody was told"
    );
    assert!(cache.storage().may_contains(&2));
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_keys_come_back_after_a_restart() {
    let dir = tempfile::tempdir().expect("a folder");
    let reopen = || {
        open(dir.path(), 64 * MIB, Compression::None, |engine| {
            roomy(engine).with_block_size(4 * MIB)
        })
    };
    let cache = reopen().await;
    for key in 0..50 {
        cache.insert(key, vec![1; KIB]);
    }
    cache.storage().wait().await;
    for key in 0..50 {
        cache.remove(&key);
    }
    cache.storage().wait().await;
    assert_eq!(count(&cache, 0..50), 0, "gone for now");
    cache.close().await.expect("closed");
    drop(cache);
    assert_eq!(count(&reopen().await, 0..50), 50, "and back");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tombstone_log_forgets_its_place_after_a_restart() {
    let dir = tempfile::tempdir().expect("a folder");
    let reopen = || {
        open(dir.path(), 64 * MIB, Compression::None, |engine| {
            roomy(engine)
                .with_block_size(4 * MIB)
                .with_tombstone_log(true)
        })
    };
    let cache = reopen().await;
    for key in 0..1200 {
        cache.insert(key, vec![1; 8]);
    }
    cache.storage().wait().await;
    let remove = |cache: Hybrid, keys: std::ops::Range<u64>| async move {
        for key in keys {
            cache.remove(&key);
        }
        cache.storage().wait().await;
        cache.close().await.expect("closed");
    };
    remove(cache, 0..600).await;
    let cache = reopen().await;
    assert_eq!(count(&cache, 0..600), 0, "one restart it survives");
    remove(cache, 600..800).await;
    let back = count(&reopen().await, 0..800);
    assert!(back > 0, "it no longer overwrites its older entries");
}

#[tokio::test(flavor = "multi_thread")]
async fn compression_is_set_and_never_used() {
    let dir = tempfile::tempdir().expect("a folder");
    let cache = open(dir.path(), 64 * MIB, Compression::Zstd, roomy).await;
    for key in 0..4 {
        cache.insert(key, vec![7; MIB]);
    }
    cache.storage().wait().await;
    let written = cache.statistics().disk_write_bytes();
    assert!(
        written >= 4 * MIB,
        "4 MiB of one byte were written as {written} bytes"
    );
}

#[test]
fn clear_empties_the_map_and_not_the_books() {
    let cache: Cache<u64, Vec<u8>> = CacheBuilder::new(8 * MIB)
        .with_shards(1)
        .with_eviction_config(LruConfig::default())
        .with_weighter(|_: &u64, value: &Vec<u8>| value.len())
        .build();
    for key in 0..6 {
        cache.insert(key, vec![1; MIB]);
    }
    cache.clear();
    assert!(!cache.contains(&0), "the entries are gone");
    assert_eq!(cache.usage(), 6 * MIB, "their bytes are not");
}

/// Admits some hashes to be carried over, and counts the others.
#[derive(Debug, Default)]
struct Carry {
    kept: Mutex<HashSet<u64>>,
    evicted: AtomicU64,
}

#[derive(Debug)]
struct CarryFilter(Arc<Carry>);

impl StorageFilterCondition for CarryFilter {
    fn filter(&self, _: &Arc<Statistics>, hash: u64, _: usize) -> StorageFilterResult {
        if self.0.kept.lock().expect("a lock").contains(&hash) {
            return StorageFilterResult::Admit;
        }
        self.0.evicted.fetch_add(1, Relaxed);
        StorageFilterResult::Reject
    }
}

async fn with_carry(dir: &Path, carry: &Arc<Carry>) -> Hybrid {
    let filter = StorageFilter::new().with_condition(CarryFilter(Arc::clone(carry)));
    open(dir, 32 * MIB, Compression::None, |engine| {
        roomy(engine)
            .with_block_size(2 * MIB)
            .with_reinsertion_filter(filter)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reinsertion_filter_hears_of_every_eviction_once() {
    let dir = tempfile::tempdir().expect("a folder");
    let carry = Arc::new(Carry::default());
    let cache = with_carry(dir.path(), &carry).await;
    for key in 0..400 {
        cache.insert(key, vec![1; 250 * KIB]);
        if key % 16 == 15 {
            cache.storage().wait().await;
        }
    }
    cache.storage().wait().await;
    let here = count(&cache, 0..400) as u64;
    assert_eq!(
        here + carry.evicted.load(Relaxed),
        400,
        "on disk and heard of make all"
    );
}
