//! A whole node over tiers that fail: what it goes on to do, what it says, and what it never forgets to forget.

use std::{net::SocketAddr, path::Path, sync::Arc};

use bytes::Bytes;
use kvproto::{
    Reason,
    v1::{Ack, PutOutcome, invalidate_request::Target},
};
use kvserver::{
    Node,
    blocks::mover::Saved,
    config::{Capacity, Config, MIB, NvmeAdmission},
    tier::{Fault, Faults, FaultyTier, Tier},
};
use kvtests::{
    node::{Stock, are_hits, filled, page, small, start_frail},
    patience::{HANG, eventually, until},
};
use tempfile::TempDir;
use tonic::Code;

/// A node whose NVMe tier fails on demand.
struct Frail {
    node: Node,
    nvme: Arc<FaultyTier>,
}

fn settings(dir: &Path) -> Config {
    Config {
        nvme_bytes: Capacity::Bytes(128 * MIB),
        http_listen: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        ..small(dir)
    }
}

impl Frail {
    async fn start(config: Config) -> Self {
        let (node, nvme) = start_frail(config).await;
        Self { node, nvme }
    }

    async fn client(&self) -> Stock {
        Stock::open(&self.node.endpoint()).await
    }

    async fn stop(self) -> Saved {
        self.node.shutdown(HANG).await
    }

    async fn page(&self, path: &str) -> String {
        page(&self.node, path).await
    }

    /// Whether the metrics have this line.
    async fn counts(&self, line: &str) -> bool {
        let metrics = self.page("/metrics").await;
        metrics.lines().any(|found| found == line)
    }
}

fn blocks(count: u32) -> Vec<Bytes> {
    (0..count).map(|i| filled(i, 100_000)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalidation_that_a_tier_could_not_record_is_asked_for_again_by_a_repeat() {
    let dir = TempDir::new().expect("a folder");
    let frail = Frail::start(settings(dir.path())).await;
    let mut client = frail.client().await;
    let chain = client.chain(1, 4);
    let (ack, stored) = (Ack::Stored, PutOutcome::Stored);
    client.put_as(&chain, &blocks(4), ack, stored).await;
    // What an earlier background attempt does must not help: nothing succeeds but the very last call.
    frail.nvme.set(Faults {
        removes: Fault::Fail(Reason::Device),
        ..Faults::default()
    });
    let all = || Target::All(true);
    for attempt in 0..2 {
        let refused = client.invalidate(all()).await.expect_err("the disk fails");
        assert_eq!(refused.code(), Code::Unavailable, "attempt {attempt}");
        assert!(refused.message().contains("of 4 blocks"), "{refused}");
    }
    assert_eq!(client.present(&chain).await, 0);
    assert!(
        frail
            .counts("terrace_tier_owed_removals{tier=\"nvme\"} 4")
            .await
    );
    frail.nvme.set(Faults::default());
    client.invalidate(all()).await.expect("the disk works");
    drop(client);
    frail.stop().await;

    let again = Frail::start(settings(dir.path())).await;
    let mut client = again.client().await;
    assert_eq!(client.present(&chain).await, 0);
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalidation_that_a_tier_could_not_record_is_recorded_without_anybody_asking() {
    let dir = TempDir::new().expect("a folder");
    let frail = Frail::start(settings(dir.path())).await;
    let mut client = frail.client().await;
    let chain = client.chain(1, 4);
    let (ack, stored) = (Ack::Stored, PutOutcome::Stored);
    client.put_as(&chain, &blocks(4), ack, stored).await;
    frail.nvme.set(Faults {
        removes: Fault::Fail(Reason::Device),
        ..Faults::default()
    });
    let target = Target::Hash(Bytes::copy_from_slice(&chain.hashes[1].0));
    client.invalidate(target).await.expect_err("the disk fails");
    frail.nvme.set(Faults::default());
    until("nothing is owed", async || {
        frail
            .counts("terrace_tier_owed_removals{tier=\"nvme\"} 0")
            .await
    })
    .await;
    drop(client);
    frail.stop().await;
    let again = Frail::start(settings(dir.path())).await;
    let mut client = again.client().await;
    assert_eq!(client.present(&chain).await, 1);
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_disk_fails_goes_on_with_ram_says_so_and_comes_back() {
    let dir = TempDir::new().expect("a folder");
    let mut config = settings(dir.path());
    config.nvme_admission = NvmeAdmission::Open;
    let frail = Frail::start(config).await;
    let mut client = frail.client().await;
    let before = client.chain(1, 4);
    // They begin to go down by themselves while they are put; the put meets that and waits for it.
    let (ack, stored) = (Ack::Stored, PutOutcome::Stored);
    client.put_as(&before, &blocks(4), ack, stored).await;
    assert!(frail.page("/readyz").await.ends_with("ready\n"));

    frail.nvme.set(Faults {
        writes: Fault::Fail(Reason::Device),
        reads: Fault::Fail(Reason::Device),
        removes: Fault::Fail(Reason::Device),
    });
    // RAM serves what it has and takes what comes; only what needs the disk is refused, with the reason.
    let during = client.chain(2, 4);
    let (ack, cached) = (Ack::Cached, PutOutcome::Cached);
    client.put_as(&during, &blocks(4), ack, cached).await;
    for chain in [&before, &during] {
        let got = client.get(chain, 0, 0).await.expect("an answer");
        assert!(are_hits(&got, &blocks(4)));
    }
    let refused = client.chain(3, 1);
    let (ack, rejected) = (Ack::Stored, PutOutcome::Rejected);
    client.put_as(&refused, &blocks(1), ack, rejected).await;
    let ready = frail.page("/readyz").await;
    assert!(
        ready.starts_with("HTTP/1.1 200") && ready.contains("without nvme: "),
        "{ready}"
    );
    for line in ["{tier=\"nvme\"} 0", "{tier=\"ram\"} 1"] {
        let line = format!("terrace_tier_in_service{line}");
        assert!(frail.counts(&line).await, "{line}");
    }

    // Back: what is in RAM alone goes down by itself, and a stored ack is given again.
    frail.nvme.set(Faults::default());
    let after = client.chain(4, 1);
    client.put_as(&after, &blocks(1), Ack::Stored, stored).await;
    eventually("what came while the disk was away is on it", || {
        frail.nvme.residents().len() == 4 + 4 + 1 + 1
    })
    .await;
    assert!(frail.page("/readyz").await.ends_with("ready\n"));
    assert!(
        frail
            .counts("terrace_tier_in_service{tier=\"nvme\"} 1")
            .await
    );
    drop(client);
    frail.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_only_in_ram_outlives_an_orderly_restart() {
    let dir = TempDir::new().expect("a folder");
    let frail = Frail::start(settings(dir.path())).await;
    let mut client = frail.client().await;
    let chain = client.chain(1, 8);
    let (ack, cached) = (Ack::Cached, PutOutcome::Cached);
    client.put_as(&chain, &blocks(8), ack, cached).await;
    assert!(frail.nvme.residents().is_empty(), "nothing was used again");
    drop(client);
    let saved = frail.stop().await;
    assert_eq!(
        (saved.kept_blocks, saved.left_blocks, saved.why),
        (8, 0, None)
    );
    assert_eq!(saved.kept_bytes, 800_000);

    let again = Frail::start(settings(dir.path())).await;
    let mut client = again.client().await;
    let got = client.get(&chain, 0, 0).await.expect("an answer");
    assert!(are_hits(&got, &blocks(8)));
    drop(client);
    let saved = again.stop().await;
    assert_eq!(saved, Saved::default(), "all of it is below already");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_node_keeps_heads_first_within_its_wear_budget() {
    let dir = TempDir::new().expect("a folder");
    let mut config = settings(dir.path());
    config.nvme_wear_bytes_per_day = Capacity::Bytes(MIB);
    let frail = Frail::start(config).await;
    let mut client = frail.client().await;
    let chain = client.chain(1, 30);
    let (ack, cached) = (Ack::Cached, PutOutcome::Cached);
    client.put_as(&chain, &blocks(30), ack, cached).await;
    drop(client);
    let saved = frail.stop().await;
    assert_eq!(saved.kept_blocks + saved.left_blocks, 30);
    assert_eq!(saved.why, Some(Reason::Wear));
    assert!((5..=10).contains(&saved.kept_blocks), "{saved:?}");

    let again = Frail::start(settings(dir.path())).await;
    let mut client = again.client().await;
    let present = client.present(&chain).await;
    assert_eq!(u64::from(present), saved.kept_blocks, "the head");
    again.stop().await;
}
