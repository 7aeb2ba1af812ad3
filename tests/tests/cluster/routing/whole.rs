//! What a client of eight owners sees is what a client of one node sees.

use kvclient::{Client, Error, ErrorKind, GetOutcome, LookupOptions, Path, Target};
use kvtests::{
    circle::{Circle, member},
    node::{TestNode, figure},
    patience::{eventually, nowhere},
};

use super::{
    BLOCK_BYTES, RUN_BLOCKS, block, chain, connect, held, leased, open, probed, put, put_all,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_over_eight_owners_is_that_of_a_single_node() {
    let cluster = Circle::start(8).await;
    let alone = cluster.another("alone", |_| {}).await;
    let (client, ns) = connect(&cluster.endpoint(3)).await;
    let (oracle, its) = connect(&alone.node.endpoint()).await;
    assert_eq!(
        (ns.id(), ns.key()),
        (its.id(), its.key()),
        "one secret, one name for all"
    );

    for (seed, gap) in [
        (1, None),
        (2, Some(0)),
        (3, Some(1)),
        (4, Some(17)),
        (5, Some(63)),
        (6, Some(40)),
    ] {
        let chain = chain(&ns, seed, 64);
        let there = |i: &usize| Some(*i) != gap && Some(*i) != gap.map(|gap| gap + 9);
        put(&client, &ns, &chain, seed, (0..64).filter(there)).await;
        put(&oracle, &its, &chain, seed, (0..64).filter(there)).await;

        // From the root, and from within a run.
        for range in [0..64, 3..64, 18..50] {
            let asked = chain.slice(range.clone(), RUN_BLOCKS);
            let options = LookupOptions::default();
            let found = client.lookup(&ns, &asked, &options).await.unwrap();
            let right = oracle.lookup(&its, &asked, &options).await.unwrap();
            let told = (found.present_blocks, found.leased_blocks(), &found.tiers);
            let expected = (right.present_blocks, right.leased_blocks(), &right.tiers);
            assert_eq!(told, expected, "chain {seed} {range:?}");
            let probe = probed(&client, &ns, &asked).await;
            assert_eq!(
                (probe.present_blocks, probe.lease.is_none()),
                (right.present_blocks, true)
            );

            // Under the lease, without one, into buffers and as bytes: every block of the chain, holes too.
            let got = client.get(&ns, &asked, found.lease.as_ref()).await.unwrap();
            let mut memory = vec![vec![0; BLOCK_BYTES]; asked.len()];
            let mut buffers: Vec<&mut [u8]> = memory.iter_mut().map(|b| &mut b[..]).collect();
            let landed = client
                .get_into(&ns, &asked, None, &mut buffers)
                .await
                .unwrap();
            for (i, at) in range.clone().enumerate() {
                let is_there = there(&at);
                assert_eq!(got[i].bytes.is_some(), is_there, "chain {seed} block {at}");
                assert_eq!(landed[i].is_hit(), is_there, "chain {seed} block {at}");
                if is_there {
                    assert_eq!(got[i].bytes.as_ref().unwrap()[..], block(seed, at)[..]);
                    assert_eq!(memory[i], block(seed, at));
                }
            }
        }
    }
    for number in 0..8 {
        assert!(held(&cluster, number) > 0, "n{number} owns some of it");
    }
    assert_eq!(client.path().members.len(), 8);
    alone.stop().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_of_several_endpoints_will_do() {
    let cluster = Circle::start(3).await;
    let nobody = nowhere().to_string();
    let endpoints = format!("{nobody}, {},{}", cluster.endpoint(1), cluster.endpoint(2));
    let (client, ns) = connect(&endpoints).await;
    let chain = chain(&ns, 1, 48);
    put_all(&client, &ns, &chain, 1).await;
    let found = leased(&client, &ns, &chain).await;
    assert_eq!(found.leased_blocks(), 48);
    assert!((0..3).all(|number| held(&cluster, number) > 0));

    let wrong = Client::connect("127.0.0.1:1, no port:x").await.unwrap_err();
    assert!(matches!(wrong, Error::Endpoint { .. }), "{wrong}");
    drop(found);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_with_another_secret_is_an_error_that_says_so() {
    let cluster = Circle::start(1).await;
    let odd = TestNode::start(|config| {
        config.node_id = "odd".to_owned();
        config.weight = 1;
    });
    let odd = odd.await;
    cluster.tell(0, [member(&odd)]);
    let (client, ns) = connect(&cluster.endpoint(0)).await;
    let chain = chain(&ns, 1, 48);
    let error = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::GiveUp);
    assert!(error.to_string().contains("secret"), "{error}");
    odd.stop().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalidation_reaches_every_member() {
    let cluster = Circle::start(3).await;
    let (client, ns) = connect(&cluster.endpoint(0)).await;
    let chain = chain(&ns, 1, 48);
    put_all(&client, &ns, &chain, 1).await;
    assert_eq!(client.invalidate(&ns, Target::All).await.unwrap(), 48);
    let found = probed(&client, &ns, &chain).await;
    assert_eq!(found.present_blocks, 0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_the_caller_had_not_heard_of_is_told_too() {
    let cluster = Circle::start_strangers(2, |_| {}).await;
    let (idle, ns) = connect(&cluster.endpoint(0)).await;
    let (other, there) = connect(&cluster.endpoint(1)).await;
    let chain = chain(&there, 1, 48);
    put_all(&other, &there, &chain, 1).await;
    cluster.acquaint(0..2);
    idle.invalidate(&ns, Target::All).await.unwrap();
    // The answer of the one that it knows brings the other, which may have asked by itself before it was told.
    let told = "terrace_calls_total{code=\"ok\",method=\"invalidate\"}";
    assert_eq!(figure(&cluster.nodes[1].node, told), 1.0);
    assert_eq!(probed(&other, &there, &chain).await.present_blocks, 0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_on_this_host_is_reached_through_its_own_memory() {
    let cluster = Circle::start(3).await;
    let client = Client::connect(&cluster.endpoint(0)).await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 48);
    put_all(&client, &ns, &chain, 1).await;
    let got = client.get(&ns, &chain, None).await.unwrap();
    assert!(got.iter().all(|block| block.outcome == GetOutcome::Hit));

    let report = client.path();
    assert_eq!(report.path, Path::Local, "{report:?}");
    assert_eq!(report.members.len(), 3);
    for member in &report.members {
        assert_eq!(member.path, Path::Local, "{member:?}");
        assert!(member.local.got_blocks > 0, "{member:?}");
    }
    let got: u64 = report
        .members
        .iter()
        .map(|m| m.local.got_blocks + m.grpc.got_blocks)
        .sum();
    assert_eq!(got, 48);
    assert_eq!(report.local.got_blocks + report.grpc.got_blocks, 48);
    client_is_closed(client, &cluster).await;
    cluster.stop().await;
}

/// With a client its connections to all members go.
async fn client_is_closed(client: Client, cluster: &Circle) {
    drop(client);
    let connections = |number: usize| cluster.nodes[number].node.blocks().stats().connections;
    eventually("no connection is left", || {
        (0..3).all(|number| connections(number) == 0)
    })
    .await;
}
