//! Which namespaces there are, over members; and what is opened without being an engine's.

use kvclient::{Client, Namespace, NamespaceHandle, PutBlock, PutOptions};
use kvtests::{
    circle::{Circle, pretended},
    client::over_grpc,
    cluster::TestCluster,
    node::{BLOCK_TOKENS, RUN_BLOCKS, filled},
    patience::{nowhere, until},
};

fn model(revision: u32) -> Namespace {
    Namespace {
        model: format!("org/model@{revision}"),
        engine_class: "vllm".to_owned(),
        ..Namespace::opaque("chat", BLOCK_TOKENS, RUN_BLOCKS)
    }
}

/// A block at the start of each of so many runs.
async fn fill(client: &Client, ns: &NamespaceHandle, runs: u32) {
    for seed in 0..runs {
        let tokens: Vec<u32> = (0..BLOCK_TOKENS).map(|i| seed * 1_000_003 + i).collect();
        let block = [PutBlock::new(0, filled(seed, 5000))];
        let put = client
            .put(ns, &ns.chain(&tokens), &block, PutOptions::default())
            .await;
        assert!(put.expect("an answer")[0].outcome.is_kept());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_away_is_named_beside_what_the_others_know() {
    let circle = Circle::start(2).await;
    let client = over_grpc(&circle.endpoint(0)).await;
    client.open_namespace(&model(1), false).await.unwrap();
    let away = nowhere();
    circle.tell(0, [pretended("away", &format!("http://{away}"))]);
    let found = client.namespaces(Some("chat")).await.unwrap();
    assert_eq!(found.known.len(), 1);
    let silent: Vec<String> = found
        .silent
        .iter()
        .map(|(who, _)| who.to_string())
        .collect();
    assert_eq!(silent, [away.to_string()]);
    // Of what the first one knows nobody else is asked; of what nobody knows the one that is away may.
    let found = client.find_namespaces(Some("chat")).await.unwrap();
    assert_eq!((found.len(), found[0].blocks), (1, 0));
    let nobody_can_say = client.find_namespaces(Some("other")).await;
    assert!(nobody_can_say.unwrap_err().is_unavailable());
    circle.stop().await;
}

/// What moves is opened where it comes to; an engine never was there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strict_engine_is_refused_neither_for_blocks_that_moved_nor_for_tools() {
    const RUNS: u32 = 40;
    let mut cluster = TestCluster::start_with(1, |_, config| config.weight = 1).await;
    let client = over_grpc(&cluster.node(0).endpoint()).await;
    let old = client.open_namespace(&model(1), false).await.unwrap();
    fill(&client, &old, RUNS).await;
    client.open_namespace(&model(2), false).await.unwrap();
    let newcomer = cluster.add().await;
    cluster.agreed(2).await;
    let there = over_grpc(&cluster.node(newcomer).endpoint()).await;
    until("blocks of the older model have moved", async || {
        let stats = cluster.node(newcomer).blocks().snapshot();
        stats.tiers[0].blocks > 0
    })
    .await;
    there.open_namespace(&model(2), true).await.unwrap();
    for client in [&client, &there] {
        let tool = client.open_aside(&model(1), 0).await.unwrap();
        assert_eq!(tool.id(), old.id());
        client.open_namespace(&model(2), true).await.unwrap();
        let known = client.namespaces(Some("chat")).await.unwrap().known;
        let latest = known.iter().filter(|stats| stats.is_latest);
        let latest: Vec<&str> = latest.map(|stats| &*stats.namespace.model).collect();
        assert_eq!(latest, ["org/model@2"]);
    }
    let refused = there.open_namespace(&model(1), true).await.unwrap_err();
    assert!(refused.to_string().contains("org/model@2"), "{refused}");
}
