//! Blocks of several owners, held where they lie.

use kvclient::{
    Chain, Client, GetOutcome, LookupOptions, Namespace, NamespaceHandle, PutBlock, PutOptions,
};
use kvproto::key::RunHash;
use kvserver::config::UnixSocket;
use kvtests::{circle::Circle, node::filled};

const RUN_BLOCKS: u32 = 4;
const BLOCKS: usize = 48;
const BLOCK_BYTES: usize = 3000;

fn block(i: usize) -> Vec<u8> {
    filled(i as u32, BLOCK_BYTES).to_vec()
}

async fn client(circle: &Circle) -> (Client, NamespaceHandle, Chain) {
    let client = Client::connect(&circle.endpoint(0))
        .await
        .expect("a client");
    let spec = Namespace::opaque("hold", 16, RUN_BLOCKS);
    let ns = client
        .open_namespace(&spec, false)
        .await
        .expect("a namespace");
    let chain = ns.chain(&(0..16 * BLOCKS as u32).collect::<Vec<u32>>());
    (client, ns, chain)
}

async fn put(client: &Client, ns: &NamespaceHandle, chain: &Chain) {
    let blocks: Vec<_> = (0..BLOCKS).map(|i| PutBlock::new(i, block(i))).collect();
    let put = client.put(ns, chain, &blocks, PutOptions::default()).await;
    assert!(
        put.expect("results")
            .iter()
            .all(kvclient::PutResult::is_kept)
    );
}

/// Whether node `id` owns each block.
fn owned_by(circle: &Circle, chain: &Chain, id: &str) -> Vec<bool> {
    let roster = circle.nodes[0].node.cluster().roster();
    let is_its = |run: &RunHash| {
        roster
            .placement
            .first(run)
            .is_some_and(|first| first.0 == id)
    };
    let runs = (0..chain.len()).map(|i| chain.place(i, RUN_BLOCKS).run);
    runs.map(|run| is_its(&run)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_of_three_owners_on_this_host_are_held_where_they_lie() {
    let circle = Circle::start(3).await;
    let (client, ns, chain) = client(&circle).await;
    put(&client, &ns, &chain).await;
    let found = client.lookup(&ns, &chain, &LookupOptions::default()).await;
    let lease = found.unwrap().lease.expect("it is there");
    for lease in [None, Some(&lease)] {
        let held = client.hold(&ns, &chain, lease).await.unwrap();
        let held = held.expect("all are on this host");
        assert_eq!(held.len(), BLOCKS);
        assert!(
            held.held().eq(0..BLOCKS),
            "{:?}",
            held.held().collect::<Vec<_>>()
        );
        let mut memory = vec![0; BLOCK_BYTES];
        for i in 0..BLOCKS {
            assert!(!held.is_elsewhere(i));
            assert_eq!(held.read(i, &mut memory).unwrap(), GetOutcome::Hit);
            assert!(memory == block(i), "block {i}");
        }
    }
    // Dropped, nothing is kept: with the lease everything can go.
    drop(lease);
    kvtests::patience::eventually("nothing is held", || {
        (0..3).all(|number| circle.leases(number) == 0)
    })
    .await;
    circle.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_with_a_node_that_is_not_on_this_host_is_to_be_got() {
    let circle = Circle::start_strangers(3, |config| {
        if config.node_id == "n2" {
            // As a node of another host looks from here.
            config.local_socket = UnixSocket::Off;
        }
    });
    let circle = circle.await;
    circle.acquaint(0..3);
    let (client, ns, chain) = client(&circle).await;
    let (theirs, ours) = (
        owned_by(&circle, &chain, "n2"),
        owned_by(&circle, &chain, "n0"),
    );
    put(&client, &ns, &chain).await;
    let held = client.hold(&ns, &chain, None).await.unwrap();
    let held = held.expect("most are on this host");
    assert!(theirs.contains(&true) && ours.contains(&true));
    let mut memory = vec![0; BLOCK_BYTES];
    for (i, is_theirs) in theirs.into_iter().enumerate() {
        let expected = match is_theirs {
            true => GetOutcome::Node,
            false => GetOutcome::Hit,
        };
        assert_eq!(
            (held.is_elsewhere(i), held.outcome(i)),
            (is_theirs, expected)
        );
        assert_eq!(held.block(i).is_some(), !is_theirs);
        assert_eq!(held.read(i, &mut memory).unwrap(), expected);
        assert!(is_theirs || memory == block(i), "block {i}");
    }

    // All of it elsewhere: there is nothing to hold.
    let first = (0..).find(|i| held.is_elsewhere(*i)).unwrap();
    let run = chain.slice(first..first + 1, RUN_BLOCKS);
    assert!(client.hold(&ns, &run, None).await.unwrap().is_none());
    drop(held);
    circle.stop().await;
}
