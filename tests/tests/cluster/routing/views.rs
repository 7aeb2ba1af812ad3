//! Clients that know less than the nodes do, or what was true before.

use kvclient::{GetOutcome, PutOutcome};
use kvtests::{
    circle::Circle,
    patience::{nowhere, until},
};

use super::{BLOCK_BYTES, block, chain, chain_cut_by, connect, held, leased, probed, put, put_all};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_view_is_mended_by_one_answer() {
    let cluster = Circle::start_strangers(3, |_| {}).await;
    cluster.acquaint(0..2);
    let (stale, ns) = connect(&cluster.endpoint(0)).await;
    let warm = chain(&ns, 999, 8);
    probed(&stale, &ns, &warm).await;
    assert!(stale.path().members.len() <= 2);

    cluster.acquaint(0..3);
    let (fresh, its) = connect(&cluster.endpoint(2)).await;
    let (seed, chain, _) = chain_cut_by(&cluster, 0, &ns, "n2");
    put_all(&fresh, &its, &chain, seed).await;

    let found = leased(&stale, &ns, &chain).await;
    assert_eq!((found.present_blocks, found.leased_blocks()), (48, 48));
    let got = stale.get(&ns, &chain, found.lease.as_ref()).await.unwrap();
    assert!(got.iter().all(|block| block.outcome == GetOutcome::Hit));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_get_by_an_old_view_finds_what_the_new_owner_has() {
    let cluster = Circle::start_strangers(3, |_| {}).await;
    cluster.acquaint(0..2);
    let (stale, ns) = connect(&cluster.endpoint(0)).await;
    let warm = chain(&ns, 999, 8);
    probed(&stale, &ns, &warm).await;

    cluster.acquaint(0..3);
    let (fresh, its) = connect(&cluster.endpoint(2)).await;
    let (seed, chain, _) = chain_cut_by(&cluster, 0, &ns, "n2");
    put_all(&fresh, &its, &chain, seed).await;
    let mut memory = vec![vec![0; BLOCK_BYTES]; 48];
    let mut buffers: Vec<&mut [u8]> = memory.iter_mut().map(|b| &mut b[..]).collect();
    let got = stale
        .get_into(&ns, &chain, None, &mut buffers)
        .await
        .unwrap();
    assert!(got.iter().all(kvclient::Got::is_hit), "{got:?}");
    for (i, bytes) in memory.iter().enumerate() {
        assert_eq!(*bytes, block(seed, i));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_one_node_follows_it_into_a_cluster_and_keeps_its_lease() {
    let cluster = Circle::start_strangers(2, |_| {}).await;
    let (client, ns) = connect(&cluster.endpoint(0)).await;
    let chain = chain(&ns, 1, 48);
    put_all(&client, &ns, &chain, 1).await;
    let found = leased(&client, &ns, &chain).await;
    assert!(client.path().members.is_empty(), "one node is no cluster");

    cluster.acquaint(0..2);
    // The next answer says so; the lease is where it was taken.
    let lease = found.lease.unwrap();
    for _ in 0..2 {
        let got = client.get(&ns, &chain, &lease).await.unwrap();
        assert!(got.iter().all(|block| block.outcome == GetOutcome::Hit));
    }
    assert!(!client.path().members.is_empty());
    assert!(lease.release().await.unwrap());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_came_back_elsewhere_is_found_there() {
    let cluster = Circle::start_strangers(3, |_| {}).await;
    let mut absent = cluster.member(2);
    let address = std::mem::replace(&mut absent.address, nowhere().to_string());
    absent.version += 1;
    let tell = |member: &kvproto::Member| {
        for number in 0..2 {
            cluster.tell(
                number,
                [cluster.member(0), cluster.member(1), member.clone()],
            );
        }
    };
    tell(&absent);
    let (client, ns) = connect(&cluster.endpoint(0)).await;
    let (seed, chain, cut) = chain_cut_by(&cluster, 0, &ns, "n2");
    put(&client, &ns, &chain, seed, 0..48).await;
    let found = probed(&client, &ns, &chain).await;
    assert_eq!(found.present_blocks, cut as u32);

    // No owner has changed, so no digest tells.
    let mut back = absent.clone();
    (back.version, back.address) = (back.version + 1, address);
    tell(&back);
    until("its blocks are put where it is now", async || {
        let outcomes = put(&client, &ns, &chain, seed, 0..48).await;
        outcomes
            .iter()
            .all(|outcome| *outcome != PutOutcome::Rejected)
    })
    .await;
    assert!(held(&cluster, 2) > 0);
    let found = probed(&client, &ns, &chain).await;
    assert_eq!(found.present_blocks, 48);
    cluster.stop().await;
}
