//! Many owners' leases under one id.

use std::time::Duration;

use kvclient::{Client, GetOutcome, LocalPath, LookupOptions, OwnerId};
use kvproto::v1;
use kvtests::{circle::Circle, patience::eventually};

use super::{RUN_BLOCKS, chain, connect, first_of, leased, open, put, put_all};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_lease_id_goes_for_all_owners_and_dropping_it_gives_back_all() {
    let cluster = Circle::start(4).await;
    let (client, ns) = connect(&cluster.endpoint(0)).await;
    let chain = chain(&ns, 1, 48);
    put_all(&client, &ns, &chain, 1).await;
    let leases = || {
        (0..4)
            .map(|number| cluster.leases(number))
            .collect::<Vec<_>>()
    };

    let mut found = leased(&client, &ns, &chain).await;
    assert_eq!(found.leased_blocks(), 48);
    assert_eq!(leases(), [1, 1, 1, 1], "every node owns some runs of 12");
    let lease = found.lease.as_mut().unwrap();
    assert!(lease.renew(Duration::from_secs(30)).await.unwrap());
    assert_eq!(lease.ttl(), Duration::from_secs(30));
    assert!(lease.is_current());

    drop(found);
    eventually("all leases are given back", || leases() == [0, 0, 0, 0]).await;

    // Asked again with the same key: the same lease, of the same id.
    let options = LookupOptions {
        idempotency_key: Some([9; 16]),
        ..LookupOptions::default()
    };
    let first = client
        .lookup(&ns, &chain, &options)
        .await
        .unwrap()
        .lease
        .unwrap();
    let again = client
        .lookup(&ns, &chain, &options)
        .await
        .unwrap()
        .lease
        .unwrap();
    assert_eq!(first.id(), again.id());
    assert_eq!(leases(), [1, 1, 1, 1]);
    assert!(first.release().await.unwrap());
    assert!(!again.release().await.unwrap(), "gone already");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_behind_the_gap_are_given_back_at_once() {
    let cluster = Circle::start(4).await;
    let (client, ns) = connect(&cluster.endpoint(0)).await;
    let chain = chain(&ns, 1, 48);
    // The first run is missing: nothing is a prefix.
    put(&client, &ns, &chain, 1, 4..48).await;
    let found = leased(&client, &ns, &chain).await;
    assert_eq!((found.present_blocks, found.lease.is_none()), (0, true));
    let none = || (0..4).all(|number| cluster.leases(number) == 0);
    eventually("nobody holds a lease for nothing", none).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_of_the_owner_reads_under_the_id_alone() {
    let cluster = Circle::start(4).await;
    let owner = OwnerId([3; 16]);
    let of_owner = |number: usize| {
        let builder = Client::builder(&cluster.endpoint(number));
        builder.local(LocalPath::Off).owner(owner).connect()
    };
    let (scheduler, worker) = (of_owner(0).await.unwrap(), of_owner(2).await.unwrap());
    let (ns, its) = (open(&scheduler).await, open(&worker).await);
    let chain = chain(&ns, 1, 48);
    put_all(&scheduler, &ns, &chain, 1).await;
    let found = leased(&scheduler, &ns, &chain).await;
    let lease = found.lease.unwrap();

    let borrowed = worker.lease_of_owner(lease.id());
    let got = worker.get(&its, &chain, &borrowed).await.unwrap();
    assert!(got.iter().all(|block| block.bytes.is_some()));
    drop(borrowed);
    assert!(
        lease.release().await.unwrap(),
        "what is borrowed is not given back"
    );
    let gone = worker.lease_of_owner(kvclient::LeaseId(77));
    let got = worker.get(&its, &chain, &gone).await.unwrap();
    assert!(got.iter().all(|block| block.outcome == GetOutcome::Expired));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_somebody_has_makes_a_node_choose_its_own_and_the_lease_holds() {
    let cluster = Circle::start(3).await;
    let client = Client::builder(&cluster.endpoint(0)).local(LocalPath::Off);
    let client = client.owner(OwnerId([3; 16])).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 48);
    put_all(&client, &ns, &chain, 1).await;
    let options = LookupOptions {
        idempotency_key: Some([4; 16]),
        ..LookupOptions::default()
    };
    let found = client
        .lookup(&ns, &chain, &options)
        .await
        .unwrap()
        .lease
        .unwrap();
    let id = found.id();
    assert!(found.release().await.unwrap());

    // A stranger takes the id at one node.
    let mut stranger = cluster.nodes[1].client().await;
    let first = first_of(&cluster, 0, &chain, "n1").unwrap();
    let asked = v1::LookupRequest {
        namespace_id: bytes::Bytes::copy_from_slice(&ns.id().0),
        chain: Some(kvproto::convert::chain_to_wire(
            &chain.slice(first..first + 1, RUN_BLOCKS),
        )),
        lease_id: id.0,
        ..v1::LookupRequest::default()
    };
    let taken = stranger
        .client
        .lookup(asked)
        .await
        .unwrap()
        .into_inner()
        .lease
        .unwrap();
    assert_eq!(taken.id, id.0, "nobody had it");

    let mut lease = client
        .lookup(&ns, &chain, &options)
        .await
        .unwrap()
        .lease
        .unwrap();
    assert_eq!(lease.blocks(), 48);
    let got = client.get(&ns, &chain, &lease).await.unwrap();
    assert!(got.iter().all(|block| block.outcome == GetOutcome::Hit));
    assert!(lease.renew(Duration::ZERO).await.unwrap());
    assert!(lease.release().await.unwrap());
    cluster.stop().await;
}
