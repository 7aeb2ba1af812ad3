//! A whole node over tiers that fail: what it goes on to do, what it says, and what it never forgets to forget.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use kvproto::{
    Chain, Reason,
    v1::{Ack, GetOutcome, PutOutcome, invalidate_request::Target},
};
use kvserver::{
    Node,
    blocks::mover::Saved,
    config::{Capacity, Config, MIB, NvmeAdmission},
    tier::{Fault, Faults, FaultyTier, Tier},
};
use kvtests::{
    node::{Stock, filled, small},
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
        let made = Arc::new(OnceLock::new());
        let kept = Arc::clone(&made);
        let node = Node::start_around(config, move |tier, clock| {
            let faulty = Arc::new(FaultyTier::new(tier, Arc::clone(clock)));
            kept.set(Arc::clone(&faulty)).expect("one tier");
            faulty as Arc<dyn Tier>
        });
        let node = node.await.expect("it starts");
        let nvme = Arc::clone(made.get().expect("it has a disk"));
        Self { node, nvme }
    }

    async fn client(&self) -> Stock {
        Stock::open(&self.node.endpoint()).await
    }

    async fn stop(self) -> Saved {
        self.node.shutdown(HANG).await
    }

    fn page(&self, path: &str) -> String {
        let address = self.node.http_addr().expect("a console");
        let mut stream = TcpStream::connect(address).expect("a console");
        let ask = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(ask.as_bytes()).expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("text");
        text
    }
}

fn blocks(count: u32) -> Vec<Bytes> {
    (0..count).map(|i| filled(i, 100_000)).collect()
}

/// Puts until all is stored: a block that is going down by itself at this very moment is refused, and says
/// when to come again.
async fn store(client: &mut Stock, chain: &Chain, blocks: &[Bytes]) {
    until("all is stored", async || {
        let put = client.put(chain, blocks, Ack::Stored).await.expect("put");
        let safe = |outcome| matches!(outcome, PutOutcome::Stored | PutOutcome::Present);
        for result in &put {
            let passing = result.outcome() == PutOutcome::Rejected && result.retry_after_ms > 0;
            assert!(safe(result.outcome()) || passing, "{result:?}");
        }
        put.iter().all(|result| safe(result.outcome()))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalidation_that_a_tier_could_not_record_is_asked_for_again_by_a_repeat() {
    let dir = TempDir::new().expect("a folder");
    let frail = Frail::start(settings(dir.path())).await;
    let mut client = frail.client().await;
    let chain = client.chain(1, 4);
    let put = client
        .put(&chain, &blocks(4), Ack::Stored)
        .await
        .expect("put");
    assert!(
        put.iter().all(|r| r.outcome() == PutOutcome::Stored),
        "{put:?}"
    );
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
    assert_eq!(
        client
            .lookup(&chain, None)
            .await
            .expect("asked")
            .present_blocks,
        0
    );
    let metrics = frail.page("/metrics");
    assert!(
        metrics.contains("terrace_tier_owed_removals{tier=\"nvme\"} 4"),
        "{metrics}"
    );
    frail.nvme.set(Faults::default());
    client.invalidate(all()).await.expect("the disk works");
    drop(client);
    frail.stop().await;

    let again = Frail::start(settings(dir.path())).await;
    let mut client = again.client().await;
    assert_eq!(
        client
            .lookup(&chain, None)
            .await
            .expect("asked")
            .present_blocks,
        0
    );
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalidation_that_a_tier_could_not_record_is_recorded_without_anybody_asking() {
    let dir = TempDir::new().expect("a folder");
    let frail = Frail::start(settings(dir.path())).await;
    let mut client = frail.client().await;
    let chain = client.chain(1, 4);
    client
        .put(&chain, &blocks(4), Ack::Stored)
        .await
        .expect("put");
    frail.nvme.set(Faults {
        removes: Fault::Fail(Reason::Device),
        ..Faults::default()
    });
    let target = Target::Hash(Bytes::copy_from_slice(&chain.hashes[1].0));
    client.invalidate(target).await.expect_err("the disk fails");
    frail.nvme.set(Faults::default());
    eventually("nothing is owed", || {
        frail
            .page("/metrics")
            .contains("terrace_tier_owed_removals{tier=\"nvme\"} 0")
    })
    .await;
    drop(client);
    frail.stop().await;
    let again = Frail::start(settings(dir.path())).await;
    let mut client = again.client().await;
    assert_eq!(
        client
            .lookup(&chain, None)
            .await
            .expect("asked")
            .present_blocks,
        1
    );
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
    store(&mut client, &before, &blocks(4)).await;
    assert!(frail.page("/readyz").ends_with("ready\n"));

    frail.nvme.set(Faults {
        writes: Fault::Fail(Reason::Device),
        reads: Fault::Fail(Reason::Device),
        removes: Fault::Fail(Reason::Device),
    });
    // RAM serves what it has and takes what comes; only what needs the disk is refused, with the reason.
    let during = client.chain(2, 4);
    let put = client
        .put(&during, &blocks(4), Ack::Cached)
        .await
        .expect("put");
    assert!(
        put.iter().all(|r| r.outcome() == PutOutcome::Cached),
        "{put:?}"
    );
    for chain in [&before, &during] {
        let got = client.get(chain, 0, 0).await.expect("an answer");
        assert!(got.iter().all(|(outcome, _)| *outcome == GetOutcome::Hit));
    }
    let refused = client.chain(3, 1);
    let put = client
        .put(&refused, &blocks(1), Ack::Stored)
        .await
        .expect("put");
    assert_eq!(put[0].outcome(), PutOutcome::Rejected);
    let ready = frail.page("/readyz");
    assert!(
        ready.starts_with("HTTP/1.1 200") && ready.contains("without nvme: "),
        "{ready}"
    );
    let metrics = frail.page("/metrics");
    assert!(
        metrics.contains("terrace_tier_in_service{tier=\"nvme\"} 0"),
        "{metrics}"
    );
    assert!(
        metrics.contains("terrace_tier_in_service{tier=\"ram\"} 1"),
        "{metrics}"
    );

    // Back: what is in RAM alone goes down by itself, and a stored ack is given again.
    frail.nvme.set(Faults::default());
    let after = client.chain(4, 1);
    store(&mut client, &after, &blocks(1)).await;
    eventually("what came while the disk was away is on it", || {
        frail.nvme.residents().len() == 4 + 4 + 1 + 1
    })
    .await;
    assert!(frail.page("/readyz").ends_with("ready\n"));
    let metrics = frail.page("/metrics");
    assert!(
        metrics.contains("terrace_tier_in_service{tier=\"nvme\"} 1"),
        "{metrics}"
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
    client
        .put(&chain, &blocks(8), Ack::Cached)
        .await
        .expect("put");
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
    for ((outcome, bytes), sent) in got.iter().zip(&blocks(8)) {
        assert_eq!(*outcome, GetOutcome::Hit);
        assert!(bytes == sent);
    }
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
    client
        .put(&chain, &blocks(30), Ack::Cached)
        .await
        .expect("put");
    drop(client);
    let saved = frail.stop().await;
    assert_eq!(saved.kept_blocks + saved.left_blocks, 30);
    assert_eq!(saved.why, Some(Reason::Wear));
    assert!((5..=10).contains(&saved.kept_blocks), "{saved:?}");

    let again = Frail::start(settings(dir.path())).await;
    let mut client = again.client().await;
    let found = client.lookup(&chain, None).await.expect("asked");
    assert_eq!(
        u64::from(found.present_blocks),
        saved.kept_blocks,
        "the head"
    );
    again.stop().await;
}
