//! Leases: what they promise, and when they end.

use bytes::Bytes;
use kvproto::{
    Chain, OwnerId, convert,
    v1::{self, Ack, GetOutcome, PutOutcome},
};
use kvserver::config::{Capacity, MIB};
use kvtests::{
    node::{Stock, TestNode, are_hits, filled},
    patience::eventually,
};

use crate::outcomes;

/// Puts the first block of a chain.
async fn put_one(client: &mut Stock, chain: &Chain) {
    let (ack, cached) = (Ack::Cached, PutOutcome::Cached);
    client
        .put_as(chain, &[filled(1, 10_000)], ack, cached)
        .await;
}

#[tokio::test]
async fn a_lookup_answers_the_prefix_and_leases_it() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 6);
    let blocks: Vec<Bytes> = (0..4).map(|i| filled(i, 10_000)).collect();
    client.put(&chain, &blocks, Ack::Cached).await.unwrap();

    let probe = client.lookup(&chain, None).await.unwrap();
    assert_eq!((probe.present_blocks, probe.lease), (4, None));
    let found = client.lookup(&chain, Some(50_000)).await.unwrap();
    let lease = found.lease.expect("a lease on what is present");
    assert_eq!(
        (found.present_blocks, lease.blocks, lease.ttl_ms),
        (4, 4, 50_000)
    );
    assert_eq!(
        found.tiers,
        [v1::TierRun {
            blocks: 4,
            tier: v1::Tier::Ram as i32
        }]
    );

    let got = client.get(&chain, lease.id, 0).await.unwrap();
    assert!(are_hits(&got[..4], &blocks));
    assert_eq!(got[4].0, GetOutcome::Miss);

    let renewed = client.renew(lease.id, 70_000).await;
    assert!(renewed.renewed);
    assert_eq!(renewed.ttl_ms, 70_000);
    assert!(client.release(lease.id).await);
    assert!(!client.release(lease.id).await);
    assert!(!client.renew(lease.id, 70_000).await.renewed);
    let got = client.get(&chain, lease.id, 0).await.unwrap();
    assert_eq!(got[0].0, GetOutcome::Expired);
    node.stop().await;
}

#[tokio::test]
async fn a_repeated_lookup_answers_the_same_lease() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 1);
    put_one(&mut client, &chain).await;
    let asked = v1::LookupRequest {
        namespace_id: Bytes::copy_from_slice(&client.namespace.0),
        chain: Some(convert::chain_to_wire(&chain)),
        idempotency_key: Bytes::from_static(&[7; 16]),
        ..v1::LookupRequest::default()
    };
    let first = client
        .client
        .lookup(asked.clone())
        .await
        .unwrap()
        .into_inner();
    let second = client.client.lookup(asked).await.unwrap().into_inner();
    assert_eq!(first.lease.unwrap().id, second.lease.unwrap().id);
    node.stop().await;
}

#[tokio::test]
async fn leases_end_with_their_connection() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 1);
    put_one(&mut client, &chain).await;
    client.lease(&chain).await;
    let leases = || node.node.blocks().engine().stats().leases;
    assert_eq!(leases(), 1);
    drop(client);
    eventually("the lease is released", || leases() == 0).await;
    node.stop().await;
}

#[tokio::test]
async fn an_owner_keeps_its_leases_until_its_last_connection_closes() {
    let node = TestNode::start(|_| {}).await;
    let mut one = node.client().await;
    let mut two = node.client().await;
    let chain = one.chain(1, 1);
    put_one(&mut one, &chain).await;
    let asked = v1::LookupRequest {
        context: Some(v1::RequestContext {
            owner_id: Bytes::copy_from_slice(&OwnerId([9; 16]).0),
            ..v1::RequestContext::default()
        }),
        namespace_id: Bytes::copy_from_slice(&one.namespace.0),
        chain: Some(convert::chain_to_wire(&chain)),
        lease_ttl_ms: 60_000,
        ..v1::LookupRequest::default()
    };
    one.client.lookup(asked.clone()).await.unwrap();
    two.client.lookup(asked).await.unwrap();
    let engine = node.node.blocks().engine();
    assert_eq!(engine.stats().leases, 2);
    drop(one);
    let metrics = node.node.blocks().metrics();
    eventually("the first connection is gone", || {
        metrics.connections() == 1
    })
    .await;
    assert_eq!(engine.stats().leases, 2);
    drop(two);
    eventually("the leases are released", || engine.stats().leases == 0).await;
    node.stop().await;
}

#[tokio::test]
async fn nobody_uses_anothers_lease() {
    let node = TestNode::start(|_| {}).await;
    let (mut one, mut two) = (node.client().await, node.client().await);
    let chain = one.chain(1, 1);
    put_one(&mut one, &chain).await;
    let lease = one.lease(&chain).await;
    assert_eq!(
        two.get(&chain, lease.id, 0).await.unwrap()[0].0,
        GetOutcome::Expired
    );
    assert!(!two.release(lease.id).await);
    assert_eq!(
        one.get(&chain, lease.id, 0).await.unwrap()[0].0,
        GetOutcome::Hit
    );
    node.stop().await;
}

#[tokio::test]
async fn a_block_that_two_have_leased_is_read_until_the_last_of_them_lets_go() {
    let node = TestNode::start(|config| config.ram_bytes = Capacity::Bytes(16 * MIB)).await;
    let (mut one, mut two) = (node.client().await, node.client().await);
    let shared = one.chain(1, 3);
    let blocks: Vec<Bytes> = (0..3).map(|i| filled(i, 1 << 20)).collect();
    let (ack, cached) = (Ack::Cached, PutOutcome::Cached);
    one.put_as(&shared, &blocks, ack, cached).await;
    let (first, second) = (one.lease(&shared).await, two.lease(&shared).await);
    assert_eq!((first.blocks, second.blocks), (3, 3));
    let got = one.get(&shared, first.id, 0).await.unwrap();
    assert!(are_hits(&got, &blocks), "another's pin is in nobody's way");

    // The first lets go; the pin of the second holds against everything that wants the room.
    assert!(one.release(first.id).await);
    let pressure = async |client: &mut Stock, seeds: std::ops::Range<u32>| {
        for seed in seeds {
            let chain = client.chain(seed, 1);
            let block = [filled(seed, 1 << 20)];
            client.put_as(&chain, &block, ack, cached).await;
        }
    };
    pressure(&mut one, 100..140).await;
    let expired = one.get(&shared, first.id, 0).await.unwrap();
    assert!(expired.iter().all(|(o, _)| *o == GetOutcome::Expired));
    let got = two.get(&shared, second.id, 0).await.unwrap();
    assert!(are_hits(&got, &blocks));

    assert!(two.release(second.id).await);
    pressure(&mut one, 200..240).await;
    assert_eq!(two.present(&shared).await, 0, "nobody pins them any more");
    node.stop().await;
}

#[tokio::test]
async fn a_leased_block_is_never_evicted_and_a_full_node_says_so() {
    let node = TestNode::start(|config| config.ram_bytes = Capacity::Bytes(16 * MIB)).await;
    let mut client = node.client().await;
    let leased = client.chain(1, 3);
    let blocks: Vec<Bytes> = (0..3).map(|i| filled(i, 1 << 20)).collect();
    client.put(&leased, &blocks, Ack::Cached).await.unwrap();
    let lease = client.lease(&leased).await;
    assert_eq!(lease.blocks, 3);
    for seed in 2..40 {
        let chain = client.chain(seed, 1);
        let results = client
            .put(&chain, &[filled(seed, 1 << 20)], Ack::Cached)
            .await
            .unwrap();
        assert_eq!(outcomes(&results), [PutOutcome::Cached], "others make room");
    }
    let got = client.get(&leased, lease.id, 0).await.unwrap();
    assert!(are_hits(&got, &blocks));
    // A block that cannot fit beside the leased ones is an answer with a hint, not an error.
    let chain = client.chain(99, 1);
    let results = client
        .put(&chain, &[filled(99, 15 << 20)], Ack::Cached)
        .await
        .unwrap();
    assert_eq!(outcomes(&results), [PutOutcome::Rejected]);
    assert!(matches!(
        results[0].reason(),
        v1::Reason::NoSlot | v1::Reason::Budget
    ));
    assert!(results[0].retry_after_ms > 0);
    node.stop().await;
}
