//! Reads in motion: what an owner does not have yet it asks of those who had it.

use std::time::Duration;

use bytes::Bytes;
use kvproto::{Member, MemberState, v1};
use kvserver::clock::{Clock as _, SystemClock};
use kvtests::{
    node::{RUN_BLOCKS, Stock, TestNode, are_hits, figure},
    patience::{HANG, eventually, until, within_awake},
    peer::Fault,
};
use tonic::Request;

use super::{BOUND, arrived, blocks, clients, cluster, departed, fill, lease, lone, owner, read};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joined_node_serves_what_the_old_owners_held() {
    let mut cluster = cluster(2, |_| {}).await;
    let mut clients = clients(&cluster).await;
    let chains = fill(&cluster, &mut clients, 48).await;
    let newcomer = cluster.add().await;
    cluster.agreed(3).await;
    let mut client = Stock::open(&cluster.node(newcomer).endpoint()).await;
    let mut moved = 0;
    for (seed, chain) in (0..).zip(&chains) {
        if owner(&cluster, chain) == newcomer {
            moved += 1;
            read(&mut client, chain, seed).await;
        }
    }
    assert!(moved > 2, "{moved} of 48 runs have another owner");
    // And what did not move is where it was.
    for (seed, chain) in (0..).zip(&chains) {
        let owner = owner(&cluster, chain);
        if owner != newcomer {
            read(&mut clients[owner], chain, seed).await;
        }
    }
    // In the end all has been handed over, and the old copies are the first to go.
    for old in 0..2 {
        let motion = cluster.node(old).blocks().motion().unwrap().clone();
        eventually("moves end", || motion.account().waiting_runs == 0).await;
    }
    for (seed, chain) in (0..).zip(&chains) {
        let owner = owner(&cluster, chain);
        let at = if owner == newcomer {
            &mut client
        } else {
            &mut clients[owner]
        };
        assert_eq!(at.present(chain).await, RUN_BLOCKS, "run {seed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_get_alone_waits_for_the_old_owner_and_is_counted_as_a_peers() {
    let node = lone().await;
    let mut client = node.client().await;
    let (old, chain) = departed(&node, &mut client, 1, []).await;
    let got = client.get(&chain, 0, 0).await.unwrap();
    assert!(are_hits(&got, &blocks(1)));
    assert_eq!(old.count("Get"), 1);
    let source = |name: &str| {
        figure(
            &node.node,
            &format!("terrace_get_blocks_total{{source=\"{name}\"}}"),
        )
    };
    assert_eq!(source("peer"), f64::from(RUN_BLOCKS));
    assert_eq!(source("ram"), 0.0);
    // The next one finds them here.
    let got = client.get(&chain, 0, 0).await.unwrap();
    assert!(are_hits(&got, &blocks(1)));
    assert_eq!(
        (old.count("Get"), source("ram")),
        (1, f64::from(RUN_BLOCKS))
    );
    let asked = figure(&node.node, "terrace_get_blocks_asked_total");
    assert_eq!(figure(&node.node, "terrace_get_blocks_total{"), asked);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_lookups_of_one_run_fetch_it_once() {
    let node = lone().await;
    let mut client = node.client().await;
    let (old, chain) = departed(&node, &mut client, 2, []).await;
    let lookups = (0..32).map(|_| {
        let (mut client, chain) = (client.clone(), chain.clone());
        tokio::spawn(async move { lease(&mut client, &chain).await.0 })
    });
    let lookups: Vec<_> = lookups.collect();
    for lookup in lookups {
        let present = lookup.await.unwrap();
        assert!(
            present == RUN_BLOCKS || present == 0,
            "it may have waited long enough"
        );
    }
    until("it has arrived", async || {
        arrived(&mut client, &chain).await
    })
    .await;
    read(&mut client, &chain, 2).await;
    assert_eq!((old.count("Lookup"), old.count("Get")), (1, 1));
    let digest = node.node.cluster().digest().0;
    for seen in old.seen().iter().filter(|seen| seen.method != "Put") {
        assert!(seen.context.no_forward, "nobody asks on: {seen:?}");
        assert_eq!(seen.context.view_digest, digest, "{seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_candidate_that_lies_costs_a_miss() {
    let lies = [Fault::FlipByte(70_000), Fault::WrongBlock, Fault::EndEarly];
    for (seed, lie) in (3..).zip(lies) {
        let node = lone().await;
        let mut client = node.client().await;
        let (old, chain) = departed(&node, &mut client, seed, [Fault::None, lie]).await;
        let (present, _) = lease(&mut client, &chain).await;
        // What came whole before the answer broke off is a block like any other, if it came in time.
        let whole = u32::from(lie == Fault::EndEarly);
        assert!(present <= whole, "{lie:?}: {present}");
        eventually("it has been asked", || old.count("Get") == 1).await;
        let corrupt = figure(
            &node.node,
            "terrace_motion_fetched_blocks_total{result=\"corrupt\"}",
        );
        assert_eq!(
            corrupt,
            f64::from(u8::from(matches!(lie, Fault::FlipByte(_))))
        );
        // Once it tells the truth, it is asked again.
        until("the truth arrives", async || {
            arrived(&mut client, &chain).await
        })
        .await;
        read(&mut client, &chain, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_candidate_that_is_frozen_or_dead_costs_a_miss_and_little_time() {
    let node = lone().await;
    let mut client = node.client().await;
    let (old, chain) = departed(&node, &mut client, 9, [Fault::Silence]).await;
    let quick = within_awake(BOUND, lease(&mut client, &chain)).await;
    assert_eq!(quick.map(|(present, _)| present), Some(0), "frozen");
    // A get has a deadline of its own, and answers before it.
    old.script([Fault::Silence]);
    let other = client.chain(4000, RUN_BLOCKS);
    let mut asked = Request::new(v1::GetRequest {
        namespace_id: Bytes::copy_from_slice(&client.namespace.0),
        chain: Some(kvproto::convert::chain_to_wire(&other)),
        ..v1::GetRequest::default()
    });
    asked.set_timeout(Duration::from_millis(400));
    let clock = SystemClock::new();
    let began = clock.now();
    let mut stream = client.client.get(asked).await.unwrap().into_inner();
    let mut misses = 0;
    while let Some(piece) = stream.message().await.expect("never an error") {
        misses += u32::from(piece.outcome() == v1::GetOutcome::Miss);
    }
    assert_eq!(misses, RUN_BLOCKS);
    assert!(clock.now().since(began) < HANG);
    drop(old);
    let quick = within_awake(BOUND, lease(&mut client, &chain)).await;
    assert_eq!(quick.map(|(present, _)| present), Some(0), "dead");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_with_opposite_views_never_bounce_a_read() {
    let cluster = cluster(2, |_| {}).await;
    let mut clients = clients(&cluster).await;
    // Each is told that the other has gone, and owns everything for as long as it believes that.
    let all = [0, 1].map(|i| cluster.node(i).cluster().declared());
    for (i, other) in [(0, 1), (1, 0)] {
        let gone = Member {
            version: all[other].version + 1,
            state: MemberState::Gone,
            ..all[other].clone()
        };
        cluster.node(i).cluster().merge([gone]);
    }
    for seed in 0..8 {
        let chain = clients[0].chain(seed, RUN_BLOCKS);
        for client in &mut clients {
            let quick = within_awake(BOUND, lease(client, &chain)).await;
            assert_eq!(quick.map(|(present, _)| present), Some(0));
        }
    }
    let asked: f64 = cluster
        .running()
        .map(|node| figure(node, "terrace_calls_total{code=\"ok\",method=\"lookup\"}"))
        .sum();
    assert!(
        asked <= 32.0,
        "for a client's call one of a node's at most: {asked}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_calls_of_nodes_have_a_bound_of_their_own() {
    let node = TestNode::start(|config| config.peer_calls = 1).await;
    let client = node.client().await;
    // A put of a "node" that does not end takes the only seat …
    let (send, receive) = tokio::sync::mpsc::channel(1);
    send.send(client.start(v1::Ack::Cached)).await.unwrap();
    let mut putting = Request::new(tokio_stream::wrappers::ReceiverStream::new(receive));
    putting
        .metadata_mut()
        .insert("terrace-peer", "other".parse().unwrap());
    let mut other = client.client.clone();
    let held = tokio::spawn(async move { other.put(putting).await.is_ok() });
    eventually("it is served", || {
        figure(&node.node, "terrace_peer_calls") == 1.0
    })
    .await;
    let chain = client.chain(1, 1);
    let lookup = || v1::LookupRequest {
        namespace_id: Bytes::copy_from_slice(&client.namespace.0),
        chain: Some(kvproto::convert::chain_to_wire(&chain)),
        probe: true,
        ..v1::LookupRequest::default()
    };
    let mut asked = Request::new(lookup());
    asked
        .metadata_mut()
        .insert("terrace-peer", "other".parse().unwrap());
    let refused = client.client.clone().lookup(asked).await.unwrap_err();
    assert!(refused.message().contains("peer_calls"), "{refused}");
    // … and clients do not notice.
    client.client.clone().lookup(lookup()).await.unwrap();
    drop(send);
    held.await.unwrap();
    eventually("the seat is free again", || {
        figure(&node.node, "terrace_peer_calls") == 0.0
    })
    .await;
}
