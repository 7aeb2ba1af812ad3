//! Owners that are dead or frozen: what they cost, and what a second owner saves.

use std::time::{Duration, Instant};

use kvclient::{
    Chain, Client, GetOutcome, LocalPath, Namespace, PutBlock, PutOptions, PutOutcome, Reason,
    Tuning,
};
use kvproto::v1;
use kvtests::{
    circle::{Circle, pretended},
    patience::{nowhere, until},
};
use tokio::net::TcpListener;

use super::{BLOCK_TOKENS, RUN_BLOCKS, block, chain_cut_by, connect, leased, put, put_all};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_owner_cuts_the_prefix_where_its_first_run_lies() {
    let cluster = Circle::start_strangers(2, |_| {}).await;
    let dead = pretended("dead", &nowhere().to_string());
    for number in 0..2 {
        let all = [cluster.member(0), cluster.member(1), dead.clone()];
        cluster.tell(number, all);
    }
    let (client, ns) = connect(&cluster.endpoint(0)).await;
    let (seed, chain, cut) = chain_cut_by(&cluster, 0, &ns, "dead");
    put(&client, &ns, &chain, seed, 0..48).await;
    let (fresh, _) = connect(&cluster.endpoint(1)).await;

    for client in [&client, &fresh] {
        let found = leased(client, &ns, &chain).await;
        assert_eq!(
            (found.present_blocks, found.leased_blocks()),
            (cut as u32, cut as u32)
        );
        let got = client.get(&ns, &chain, found.lease.as_ref()).await.unwrap();
        let of_dead = |at: usize| {
            let run = chain.place(at, RUN_BLOCKS).run;
            let roster = cluster.nodes[0].node.blocks().cluster().roster();
            roster.placement.first(&run).unwrap().0 == "dead"
        };
        for (at, got) in got.iter().enumerate() {
            let expected = match of_dead(at) {
                true => GetOutcome::Node,
                false => GetOutcome::Hit,
            };
            assert_eq!(got.outcome, expected, "block {at}");
        }
        let blocks: Vec<_> = (0..48).map(|i| PutBlock::new(i, block(seed, i))).collect();
        let results = client
            .put(&ns, &chain, &blocks, PutOptions::default())
            .await
            .unwrap();
        for (at, result) in results.iter().enumerate() {
            let expected = match of_dead(at) {
                true => (PutOutcome::Rejected, Some(Reason::Node)),
                false => (PutOutcome::Present, None),
            };
            assert_eq!((result.outcome, result.reason), expected, "block {at}");
        }
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_owner_delays_no_call_past_its_deadline() {
    let cluster = Circle::start_strangers(2, |_| {}).await;
    // It accepts, by its kernel, and says nothing.
    let frozen = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = frozen.local_addr().unwrap().to_string();
    for number in 0..2 {
        let all = [
            cluster.member(0),
            cluster.member(1),
            pretended("ice", &address),
        ];
        cluster.tell(number, all);
    }
    let (client, ns) = connect(&cluster.endpoint(0)).await;
    let deadline = Duration::from_millis(1500);
    let client = client.with_deadline(deadline);
    let (seed, chain, cut) = chain_cut_by(&cluster, 0, &ns, "ice");

    let took = async |what: &str, call: std::pin::Pin<Box<dyn Future<Output = ()> + '_>>| {
        let began = now();
        call.await;
        let took = began.elapsed();
        // What a loaded machine takes on top is not the client's.
        assert!(
            took < deadline + Duration::from_millis(500),
            "{what} took {took:?}"
        );
        took
    };
    took(
        "put",
        Box::pin(async {
            let outcomes = put(&client, &ns, &chain, seed, 0..48).await;
            assert!(
                outcomes[..cut]
                    .iter()
                    .all(|outcome| *outcome == PutOutcome::Cached)
            );
            assert_eq!(outcomes[cut], PutOutcome::Rejected);
        }),
    )
    .await;
    took(
        "lookup",
        Box::pin(async {
            let found = leased(&client, &ns, &chain).await;
            assert_eq!(found.leased_blocks(), cut as u32);
            let got = client.get(&ns, &chain, found.lease.as_ref()).await.unwrap();
            assert!(got[..cut].iter().all(|got| got.outcome == GetOutcome::Hit));
            assert_eq!(got[cut].outcome, GetOutcome::Node);
        }),
    )
    .await;
    // Found out by then, or soon: nobody waits for it any more.
    until("it is left alone", async || {
        let began = now();
        let found = leased(&client, &ns, &chain).await;
        assert_eq!(found.leased_blocks(), cut as u32);
        began.elapsed() < Duration::from_millis(100)
    })
    .await;
    drop(frozen);
    cluster.stop().await;
}

#[expect(clippy::disallowed_methods, reason = "a real node runs on real time")]
fn now() -> Instant {
    Instant::now()
}

/// A namespace whose runs have two owners, and a chain that both have; n2 is one of them.
async fn twice(cluster: &Circle) -> (Namespace, u32, Chain) {
    let (writer, _) = connect(&cluster.endpoint(0)).await;
    let spec = Namespace::opaque("twice", BLOCK_TOKENS, RUN_BLOCKS);
    let ns = writer.open_replicated(&spec, false, 2).await.unwrap();
    let (seed, chain, _) = chain_cut_by(cluster, 0, &ns, "n2");
    put_all(&writer, &ns, &chain, seed).await;
    // Each run at its owner's stand-in as well, as replication leaves it.
    let roster = cluster.nodes[0].node.blocks().cluster().roster();
    for (run, range) in chain.runs(RUN_BLOCKS) {
        let second = roster.placement.owners(&run, 2)[1].0.clone();
        let number: usize = second[1..].parse().unwrap();
        let mut stock = cluster.nodes[number].client().await;
        stock.namespace = ns.id();
        let piece = chain.slice(range.clone(), RUN_BLOCKS);
        let opened = v1::OpenNamespaceRequest {
            spec: Some((&spec).into()),
            ..v1::OpenNamespaceRequest::default()
        };
        stock.client.open_namespace(opened).await.unwrap();
        let bytes: Vec<_> = range.map(|i| block(seed, i).into()).collect();
        stock.put(&piece, &bytes, v1::Ack::Cached).await.unwrap();
    }
    (spec, seed, chain)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_replicas_a_silent_owner_leaves_a_get_the_time_to_ask_another() {
    let cluster = Circle::start_strangers(3, |_| {}).await;
    cluster.acquaint(0..3);
    let (spec, seed, chain) = twice(&cluster).await;
    // It accepts, by its kernel, and says nothing.
    let frozen = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut silent = cluster.member(2);
    silent.version += 1;
    silent.address = format!("http://{}", frozen.local_addr().unwrap());
    for number in 0..2 {
        cluster.tell(number, [silent.clone()]);
    }
    let client = Client::builder(&cluster.endpoint(0))
        .local(LocalPath::Off)
        .deadline(Duration::from_secs(4))
        .tuning(Tuning {
            // Nothing but the call's own time ends the wait for it.
            connect_timeout: Duration::from_secs(60),
            ..Tuning::default()
        });
    let client = client.connect().await.unwrap();
    let ns = client.open_replicated(&spec, false, 2).await.unwrap();
    let got = client.get(&ns, &chain, None).await.unwrap();
    for (i, got) in got.iter().enumerate() {
        assert_eq!(got.outcome, GetOutcome::Hit, "block {i}");
        assert_eq!(got.bytes.as_ref().unwrap()[..], block(seed, i)[..]);
    }
    drop(frozen);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_replicas_an_owner_that_is_away_is_not_missed() {
    let cluster = Circle::start_strangers(3, |_| {}).await;
    cluster.acquaint(0..3);
    let (spec, seed, chain) = twice(&cluster).await;

    // As this client hears it, n2 is nowhere.
    let mut absent = cluster.member(2);
    (absent.version, absent.address) = (absent.version + 1, nowhere().to_string());
    for number in 0..2 {
        cluster.tell(number, [absent.clone()]);
    }
    let (client, _) = connect(&cluster.endpoint(0)).await;
    let its = client.open_replicated(&spec, false, 2).await.unwrap();
    let mut found = leased(&client, &its, &chain).await;
    assert_eq!((found.present_blocks, found.leased_blocks()), (48, 48));
    let got = client
        .get(&its, &chain, found.lease.as_ref())
        .await
        .unwrap();
    for (i, got) in got.iter().enumerate() {
        assert_eq!(got.outcome, GetOutcome::Hit, "block {i}");
        assert_eq!(got.bytes.as_ref().unwrap()[..], block(seed, i)[..]);
    }
    let unleased = client.get(&its, &chain, None).await.unwrap();
    assert!(
        unleased
            .iter()
            .all(|block| block.outcome == GetOutcome::Hit)
    );
    assert!(
        found
            .lease
            .as_mut()
            .unwrap()
            .renew(Duration::ZERO)
            .await
            .unwrap()
    );
    // What it would have taken is taken by who stands in for it.
    let other = super::chain(&its, 4242, 48);
    let outcomes = put(&client, &its, &other, 4242, 0..48).await;
    assert!(
        outcomes
            .iter()
            .all(|outcome| *outcome == PutOutcome::Cached),
        "{outcomes:?}"
    );
    cluster.stop().await;
}
