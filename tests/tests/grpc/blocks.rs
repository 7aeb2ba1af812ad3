//! Blocks there and back, what is known of them, and what is forgotten.

use bytes::Bytes;
use kvproto::v1::{
    self, Ack, GetOutcome, PutOutcome, invalidate_request::Target, watch_response::Event,
};
use kvserver::config::{Capacity, MIB};
use kvtests::node::{Stock, TestNode, are_hits, filled};

use tonic::Code;

use crate::outcomes;

/// Blocks of every awkward length: one byte, around a page, around a piece.
fn awkward() -> Vec<Bytes> {
    let lengths = [
        1,
        4095,
        65_536,
        65_537,
        1 << 20,
        (1 << 20) + 3,
        (5 << 20) - 1,
    ];
    lengths
        .iter()
        .enumerate()
        .map(|(i, len)| filled(i as u32, *len))
        .collect()
}

#[tokio::test]
async fn a_stock_client_gets_back_what_it_put() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let blocks = awkward();
    let chain = client.chain(1, blocks.len() as u32);
    let results = client.put(&chain, &blocks, Ack::Cached).await.unwrap();
    assert_eq!(outcomes(&results), vec![PutOutcome::Cached; blocks.len()]);
    for piece_bytes in [0, 4096, 65_000, 4 << 20] {
        let got = client.get(&chain, 0, piece_bytes).await.unwrap();
        assert_eq!(got.len(), blocks.len());
        for (i, ((outcome, bytes), sent)) in got.iter().zip(&blocks).enumerate() {
            assert_eq!(*outcome, GetOutcome::Hit, "block {i}");
            assert!(bytes == sent, "block {i} in pieces of {piece_bytes}");
        }
    }
    node.stop().await;
}

#[tokio::test]
async fn pieces_of_a_put_may_be_cut_anywhere() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let blocks = [filled(1, 200_000), filled(2, 65_536)];
    let chain = client.chain(1, 2);
    let mut messages = vec![client.start(Ack::Cached)];
    messages.extend(client.pieces(&chain, 0, &blocks[0], 777));
    messages.extend(client.pieces(&chain, 1, &blocks[1], 65_535));
    let results = client.send(messages).await.unwrap();
    assert_eq!(outcomes(&results), vec![PutOutcome::Cached; 2]);
    let got = client.get(&chain, 0, 0).await.unwrap();
    assert!(are_hits(&got, &blocks));
    node.stop().await;
}

#[tokio::test]
async fn the_same_block_twice_is_present_and_changed_bytes_are_corrupt() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 2);
    let block = [filled(1, 100_000)];
    client.put(&chain, &block, Ack::Cached).await.unwrap();
    let again = client.put(&chain, &block, Ack::Cached).await.unwrap();
    assert_eq!(outcomes(&again), [PutOutcome::Present]);

    let mut message = client
        .pieces(&chain, 1, &filled(2, 100_000), 1 << 20)
        .remove(0);
    let mut bytes = message.data.to_vec();
    bytes[70_000] ^= 1;
    message.data = bytes.into();
    let messages = vec![client.start(Ack::Cached), message];
    let results = client.send(messages).await.unwrap();
    assert_eq!(outcomes(&results), [PutOutcome::Corrupt]);
    assert_eq!(client.present(&chain).await, 1);
    node.stop().await;
}

#[tokio::test]
async fn the_unix_socket_speaks_the_same() {
    let node = TestNode::start(|_| {}).await;
    let path = node.node.uds_path().expect("a socket").to_owned();
    let mut client = Stock::open(&format!("unix:{}", path.display())).await;
    let blocks = awkward();
    let chain = client.chain(1, blocks.len() as u32);
    client.put(&chain, &blocks, Ack::Cached).await.unwrap();
    let got = client.get(&chain, 0, 0).await.unwrap();
    assert!(are_hits(&got, &blocks));
    node.stop().await;
    assert!(!path.exists(), "a stopped node takes its socket away");
}

#[tokio::test]
async fn what_is_invalidated_is_gone_by_block_prefix_and_namespace() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 6);
    let blocks: Vec<Bytes> = (0..6).map(|i| filled(i, 5_000)).collect();
    client.put(&chain, &blocks, Ack::Cached).await.unwrap();
    let hash = |i: usize| Bytes::copy_from_slice(&chain.hashes[i].0);

    assert_eq!(client.invalidate(Target::Hash(hash(5))).await.unwrap(), 1);
    assert_eq!(client.present(&chain).await, 5);
    assert_eq!(
        client
            .invalidate(Target::PrefixHash(hash(2)))
            .await
            .unwrap(),
        3
    );
    assert_eq!(client.present(&chain).await, 2);
    assert_eq!(
        client.get(&chain, 0, 0).await.unwrap()[2].0,
        GetOutcome::Invalidated
    );
    assert_eq!(client.invalidate(Target::All(true)).await.unwrap(), 2);
    assert_eq!(client.present(&chain).await, 0);
    // Forgotten is not forbidden.
    client.put(&chain, &blocks[..1], Ack::Cached).await.unwrap();
    assert_eq!(client.present(&chain).await, 1);
    node.stop().await;
}

#[tokio::test]
async fn a_watcher_hears_what_comes_and_goes() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let asked = v1::WatchRequest {
        context: None,
        namespace_id: Bytes::copy_from_slice(&client.namespace.0),
    };
    let mut events = client.client.watch(asked).await.unwrap().into_inner();
    let first = events
        .message()
        .await
        .unwrap()
        .expect("the first message comes at once");
    assert!(first.context.is_some() && first.event.is_none());

    let chain = client.chain(1, 1);
    client
        .put(&chain, &[filled(1, 10_000)], Ack::Cached)
        .await
        .unwrap();
    client.invalidate(Target::All(true)).await.unwrap();
    let stored = events.message().await.unwrap().unwrap();
    let removed = events.message().await.unwrap().unwrap();
    assert_eq!(
        (stored.sequence, removed.sequence),
        (first.sequence + 1, first.sequence + 2)
    );
    let Some(Event::Stored(stored)) = stored.event else {
        panic!("{stored:?}")
    };
    assert_eq!(stored.hash[..], chain.hashes[0].0);
    assert_eq!(stored.length_bytes, 10_000);
    let Some(Event::Removed(removed)) = removed.event else {
        panic!("{removed:?}")
    };
    assert_eq!(removed.reason(), v1::Reason::Invalidated);
    node.stop().await;
}

#[tokio::test]
async fn stats_and_counters_tell_what_was_done() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 3);
    client
        .put(&chain, &[filled(1, 10_000), filled(2, 10_000)], Ack::Cached)
        .await
        .unwrap();
    client.lookup(&chain, Some(60_000)).await.unwrap();
    client.get(&chain, 0, 0).await.unwrap();
    let stats = client.stats().await.unwrap();
    assert_eq!(
        (stats.leases, stats.namespaces, stats.connections),
        (1, 1, 1)
    );
    assert_eq!(stats.tiers[0].tier(), v1::Tier::Ram);
    assert_eq!(stats.tiers[0].blocks, 2);
    let value = |name: &str| {
        stats
            .counters
            .iter()
            .find(|c| c.name == name)
            .map_or(-1.0, |c| c.value)
    };
    assert_eq!(value("terrace_get_blocks_asked_total"), 3.0);
    assert_eq!(value("terrace_get_blocks_total{source=\"ram\"}"), 2.0);
    assert_eq!(value("terrace_get_blocks_total{source=\"miss\"}"), 1.0);
    assert_eq!(value("terrace_get_bytes_total"), 20_000.0);
    assert_eq!(value("terrace_put_blocks_total{outcome=\"cached\"}"), 2.0);
    node.stop().await;
}

#[tokio::test]
async fn namespaces_are_listed_with_what_is_there_of_each() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 2);
    let blocks = [filled(1, 10_000), filled(2, 5000)];
    client.put(&chain, &blocks, Ack::Cached).await.unwrap();
    let listed = client.namespaces("", &[]).await.unwrap();
    let [own] = &listed.namespaces[..] else {
        panic!("one was opened: {listed:?}");
    };
    assert_eq!((own.blocks, own.bytes), (2, 15_000));
    assert!(own.is_latest && listed.next_page_token.is_empty() && own.replicas == 1);
    let label = &own.spec.as_ref().unwrap().label;
    assert_eq!(
        client.namespaces(label, &[]).await.unwrap().namespaces,
        listed.namespaces
    );
    let none = client.namespaces("another", &[]).await.unwrap().namespaces;
    assert_eq!(none, []);
    let wrong = client.namespaces("", &[1, 2, 3]).await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    assert!(wrong.message().contains("page_token"), "{wrong}");
    node.stop().await;
}

#[tokio::test]
async fn an_ack_that_the_node_cannot_give_is_rejected_with_its_reason() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 1);
    for ack in [Ack::Stored, Ack::Synced] {
        let results = client.put(&chain, &[filled(1, 10_000)], ack).await.unwrap();
        assert_eq!(outcomes(&results), [PutOutcome::Rejected]);
        assert_eq!(results[0].reason(), v1::Reason::TierDown);
    }
    // It is in RAM all the same.
    assert_eq!(
        client.get(&chain, 0, 0).await.unwrap()[0].0,
        GetOutcome::Hit
    );
    node.stop().await;
}

#[tokio::test]
async fn a_stored_block_is_on_nvme_and_a_synced_one_in_the_durable_store() {
    let node = TestNode::start(|config| {
        config.nvme_bytes = Capacity::Bytes(64 * MIB);
        config.durable_bytes = Capacity::Bytes(64 * MIB);
    })
    .await;
    let mut client = node.client().await;
    let chain = client.chain(1, 2);
    let blocks = [filled(1, 100_000), filled(2, 1 << 20)];
    let results = client.put(&chain, &blocks, Ack::Stored).await.unwrap();
    assert_eq!(outcomes(&results), [PutOutcome::Stored; 2]);
    let results = client.put(&chain, &blocks, Ack::Stored).await.unwrap();
    assert_eq!(outcomes(&results), [PutOutcome::Present; 2]);
    // Present is not safe enough for synced: it is written there too.
    let results = client.put(&chain, &blocks, Ack::Synced).await.unwrap();
    assert_eq!(outcomes(&results), [PutOutcome::Present; 2]);
    let stats = client.stats().await.unwrap();
    let blocks_in = |tier| {
        stats
            .tiers
            .iter()
            .find(|t| t.tier() == tier)
            .map_or(0, |t| t.blocks)
    };
    assert_eq!(blocks_in(v1::Tier::Nvme), 2);
    assert_eq!(blocks_in(v1::Tier::Durable), 2);
    node.stop().await;
}
