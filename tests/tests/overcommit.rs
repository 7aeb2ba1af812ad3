//! RAM over-committed four times onto NVMe: what was answered `stored` is there, and right.

use bytes::Bytes;
use kvproto::v1::{Ack, GetOutcome, PutOutcome};
use kvserver::config::{Capacity, MIB, NvmeAdmission};
use kvtests::{
    node::{TestNode, filled},
    patience::{eventually, until},
};

const RAM: u64 = 16 * MIB;

async fn node() -> TestNode {
    TestNode::start(|config| {
        config.ram_bytes = Capacity::Bytes(RAM);
        config.nvme_bytes = Capacity::Bytes(256 * MIB);
        config.nvme_admission = NvmeAdmission::Open;
        config.nvme_wear_bytes_per_day = Capacity::Bytes(0);
    })
    .await
}

#[tokio::test]
async fn everything_answered_stored_comes_back_right() {
    let node = node().await;
    let mut client = node.client().await;
    const CHAINS: u32 = 16;
    const BLOCKS: u32 = 16;
    const LEN: usize = 256 << 10;
    let mut kept = Vec::new();
    for seed in 0..CHAINS {
        let chain = client.chain(seed, BLOCKS);
        let blocks: Vec<Bytes> = (0..BLOCKS).map(|i| filled(seed * 100 + i, LEN)).collect();
        // A full queue is an answer: the writer puts again, and only what is missing is written.
        until("the queue drains", async || {
            let results = client.put(&chain, &blocks, Ack::Stored).await.unwrap();
            let safe = |outcome| matches!(outcome, PutOutcome::Stored | PutOutcome::Present);
            for result in &results {
                assert!(
                    safe(result.outcome()) || result.retry_after_ms > 0,
                    "a rejection in passing says when to come again: {result:?}"
                );
            }
            results.iter().all(|result| safe(result.outcome()))
        })
        .await;
        kept.push((chain, blocks));
    }
    let total = u64::from(CHAINS * BLOCKS) * LEN as u64;
    assert!(total >= 4 * RAM);

    let mut from_disk = 0;
    for (chain, blocks) in &kept {
        let found = client.lookup(chain, Some(60_000)).await.unwrap();
        assert_eq!(found.present_blocks, BLOCKS);
        let disk = |run: &&kvproto::v1::TierRun| run.tier() == kvproto::v1::Tier::Nvme;
        from_disk += found
            .tiers
            .iter()
            .filter(disk)
            .map(|run| run.blocks)
            .sum::<u32>();
        // Without a lease too: a node under pressure answers what it promised to have stored.
        let lease = found.lease.expect("a lease").id;
        let got = client.get(chain, lease, 0).await.unwrap();
        for (i, ((outcome, bytes), sent)) in got.iter().zip(blocks).enumerate() {
            assert_eq!(*outcome, GetOutcome::Hit, "block {i}");
            assert!(bytes == sent, "block {i}");
        }
        let release = kvproto::v1::ReleaseRequest {
            context: None,
            lease_id: lease,
        };
        client.client.release(release).await.unwrap();
    }
    assert!(
        from_disk >= CHAINS * BLOCKS / 2,
        "most of it had left RAM: {from_disk}"
    );
    node.stop().await;
}

#[tokio::test]
async fn many_writers_and_readers_at_once_see_only_right_bytes() {
    let node = node().await;
    let mut tasks = Vec::new();
    for writer in 0..4_u32 {
        let mut client = node.client().await;
        tasks.push(tokio::spawn(async move {
            let mut stored = 0_u32;
            for round in 0..16_u32 {
                let seed = writer * 1000 + round;
                let chain = client.chain(seed, 4);
                let blocks: Vec<Bytes> = (0..4).map(|i| filled(seed * 10 + i, 300_000)).collect();
                let results = client.put(&chain, &blocks, Ack::Stored).await.unwrap();
                let got = client.get(&chain, 0, 0).await.unwrap();
                for (((outcome, bytes), sent), put) in got.iter().zip(&blocks).zip(&results) {
                    if *outcome == GetOutcome::Hit {
                        assert!(bytes == sent, "a hit has the bytes that were put");
                    }
                    stored += u32::from(put.outcome() == PutOutcome::Stored);
                }
            }
            stored
        }));
    }
    let mut stored = 0;
    for task in tasks {
        stored += task.await.unwrap();
    }
    assert!(stored > 0);
    let blocks = node.node.blocks();
    eventually("nothing is held but what the index has", || {
        let stats = blocks.engine().stats();
        blocks.arena().stats().used_bytes == stats.kv.used_bytes
    })
    .await;
    node.stop().await;
}

#[tokio::test]
async fn cached_puts_go_down_by_themselves_when_admission_is_open() {
    let node = node().await;
    let mut client = node.client().await;
    let chain = client.chain(1, 8);
    let blocks: Vec<Bytes> = (0..8).map(|i| filled(i, 500_000)).collect();
    client.put(&chain, &blocks, Ack::Cached).await.unwrap();
    let on_disk = || {
        let tiers = node.node.blocks().snapshot().tiers;
        tiers
            .iter()
            .find(|t| t.kind == kvproto::TierKind::Nvme)
            .map_or(0, |t| t.blocks)
    };
    eventually("all eight are on disk", || on_disk() == 8).await;
    node.stop().await;
}
