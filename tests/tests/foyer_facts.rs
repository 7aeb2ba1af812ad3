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
//! | its index pages list hash, sequence, offset and length | read where our entries lie |
//! | an entry is a header of 36 bytes, the value, the key, and begins on a page | read our record from there |
//! | it fills blocks in the order of their numbers, then of their reclaim, and tells its pickers | look there for the next index |

use std::{
    collections::HashSet,
    hash::{BuildHasher, Hasher},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use foyer::{
    BlockEngineConfig, Cache, CacheBuilder, Compression, DefaultHasher, DeviceBuilder,
    EvictionInfo, EvictionPicker, FifoPicker, FsDeviceBuilder, HybridCache, HybridCacheBuilder,
    HybridCachePolicy, HybridCacheProperties, InvalidRatioPicker, LruConfig, RecoverMode,
    Statistics, StorageFilter, StorageFilterCondition, StorageFilterResult,
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

fn file_of(dir: &Path, block: u32) -> Vec<u8> {
    std::fs::read(dir.join(format!("foyer-storage-direct-fs-{block:08}"))).expect("a block")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn sums_up(page: &[u8]) -> bool {
    let mut sum = DefaultHasher::default().build_hasher();
    sum.write(&page[8..]);
    sum.finish() == u64_at(page, 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_page_lists_the_entries_behind_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let cache = open(dir.path(), 64 * MIB, Compression::None, |engine| {
        roomy(engine).with_block_size(4 * MIB)
    })
    .await;
    // In two batches, which share the index: it is written again with the second.
    for keys in [0..2_u64, 2..3] {
        for key in keys {
            cache.insert(key, vec![key as u8 + 1; 5000]);
        }
        cache.storage().wait().await;
    }
    let block = file_of(dir.path(), 0);
    let page = &block[..4 * KIB];
    assert!(sums_up(page), "XXH64, seed 0, of all behind it");
    assert_eq!(u32_at(page, 8), 3, "three entries");
    let mut last_sequence = None;
    for key in 0..3_u64 {
        let line = 12 + 24 * key as usize;
        assert_eq!(u64_at(page, line), DefaultHasher::default().hash_one(key));
        let sequence = u64_at(page, line + 8);
        assert!(last_sequence < Some(sequence), "sequences grow");
        last_sequence = Some(sequence);
        let (offset, length) = (u32_at(page, line + 16), u32_at(page, line + 20));
        assert_eq!(
            offset as usize,
            4 * KIB + key as usize * 8 * KIB,
            "whole pages"
        );
        // A vector's length, its bytes, and the key, behind a header of 36 bytes.
        assert_eq!(length, 36 + 8 + 5000 + 8);
        let value = offset as usize + 36 + 8;
        assert!(
            block[value..value + 5000]
                .iter()
                .all(|&byte| byte == key as u8 + 1)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_full_index_page_another_one_begins() {
    let dir = tempfile::tempdir().expect("a folder");
    let cache = open(dir.path(), 64 * MIB, Compression::None, |engine| {
        roomy(engine).with_block_size(4 * MIB)
    })
    .await;
    for key in 0..200_u64 {
        cache.insert(key, vec![1; KIB]);
    }
    cache.storage().wait().await;
    let block = file_of(dir.path(), 0);
    assert_eq!(u32_at(&block, 8), 170, "as many as fit a page");
    let second = 4 * KIB + 170 * 4 * KIB;
    assert!(sums_up(&block[second..second + 4 * KIB]));
    assert_eq!(u32_at(&block, second + 8), 30);
    assert_eq!(
        u32_at(&block, second + 12 + 16),
        4 * KIB as u32,
        "offsets from the index"
    );
}

/// Remembers the blocks that the other pickers chose.
#[derive(Clone, Debug, Default)]
struct Watch(Arc<Mutex<Vec<u32>>>);

impl EvictionPicker for Watch {
    fn pick(&mut self, _: EvictionInfo<'_>) -> Option<u32> {
        None
    }

    fn on_block_evictable(&mut self, _: EvictionInfo<'_>, _: u32) {}

    fn on_block_evict(&mut self, _: EvictionInfo<'_>, block: u32) {
        self.0.lock().expect("a lock").push(block);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_filled_in_the_order_in_which_they_became_clean() {
    let dir = tempfile::tempdir().expect("a folder");
    let watch = Watch::default();
    let pickers: Vec<Box<dyn EvictionPicker>> = vec![
        Box::new(watch.clone()),
        Box::new(InvalidRatioPicker::new(0.8)),
        Box::<FifoPicker>::default(),
    ];
    let cache = open(dir.path(), 16 * MIB, Compression::None, |engine| {
        roomy(engine)
            .with_block_size(2 * MIB)
            .with_eviction_pickers(pickers)
    })
    .await;
    // One block's worth each; the sequence of a block's first entry tells when it was begun.
    for key in 0..40_u64 {
        cache.insert(key, vec![1; 1900 * KIB]);
        cache.storage().wait().await;
    }
    let mut begun: Vec<(u64, u32)> = (0..8)
        .map(|number| (file_of(dir.path(), number), number))
        .filter(|(block, _)| sums_up(&block[..4 * KIB]) && u32_at(block, 8) > 0)
        .map(|(block, number)| (u64_at(&block, 12 + 8), number))
        .collect();
    begun.sort_unstable();
    let filled: Vec<u32> = begun.into_iter().map(|(_, number)| number).collect();
    let reclaimed = watch.0.lock().expect("a lock").clone();
    // The last one reclaimed is clean and waits; those before it were filled again, in that order.
    let expected: Vec<u32> = reclaimed[..reclaimed.len() - 1]
        .iter()
        .rev()
        .take(filled.len())
        .rev()
        .copied()
        .collect();
    assert_eq!(filled, expected, "of {reclaimed:?}");
}
