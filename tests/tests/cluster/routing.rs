//! A client of a cluster: one prefix, one lease and one answer out of many nodes.

use std::time::{Duration, Instant};

use kvclient::{
    Chain, Client, Error, ErrorKind, GetOutcome, LocalPath, LookupOptions, Namespace,
    NamespaceHandle, OwnerId, Path, PutBlock, PutOptions, PutOutcome, Reason, Target, Tuning,
};
use kvproto::{key::RunHash, v1};
use kvtests::{
    circle::{Circle, member, pretended},
    node::{TestNode, filled},
    patience::{eventually, until},
};
use tokio::net::TcpListener;

const BLOCK_TOKENS: u32 = 16;
const RUN_BLOCKS: u32 = 4;
const BLOCK_BYTES: usize = 3000;

async fn connect(endpoint: &str) -> (Client, NamespaceHandle) {
    let client = Client::builder(endpoint)
        .local(LocalPath::Off)
        .connect()
        .await
        .expect("a client");
    let ns = open(&client).await;
    (client, ns)
}

async fn open(client: &Client) -> NamespaceHandle {
    let spec = Namespace::opaque("routing", BLOCK_TOKENS, RUN_BLOCKS);
    let opened = client.open_namespace(&spec, false).await;
    opened.expect("a namespace")
}

fn chain(ns: &NamespaceHandle, seed: u32, blocks: u32) -> Chain {
    let tokens = (0..blocks * BLOCK_TOKENS).map(|i| seed * 1_000_003 + i);
    ns.chain(&tokens.collect::<Vec<u32>>())
}

fn block(seed: u32, i: usize) -> Vec<u8> {
    filled(seed * 1000 + i as u32, BLOCK_BYTES).to_vec()
}

/// Puts these blocks of a chain; what became of each.
async fn put(
    client: &Client,
    ns: &NamespaceHandle,
    chain: &Chain,
    seed: u32,
    which: impl IntoIterator<Item = usize>,
) -> Vec<PutOutcome> {
    let which = which.into_iter();
    let blocks: Vec<_> = which.map(|i| PutBlock::new(i, block(seed, i))).collect();
    let results = client.put(ns, chain, &blocks, PutOptions::default()).await;
    let results = results.expect("results");
    results.iter().map(|result| result.outcome).collect()
}

async fn put_all(client: &Client, ns: &NamespaceHandle, chain: &Chain, seed: u32) {
    let outcomes = put(client, ns, chain, seed, 0..chain.len()).await;
    let all = outcomes
        .iter()
        .all(|outcome| *outcome == PutOutcome::Cached);
    assert!(all, "{outcomes:?}");
}

/// Blocks that node `number` holds.
fn held(cluster: &Circle, number: usize) -> u64 {
    let tiers = cluster.nodes[number].node.blocks().stats().tiers;
    tiers.iter().map(|tier| tier.blocks).sum()
}

/// The number of the first block that member `id` owns by the view of node `by`.
fn first_of(cluster: &Circle, by: usize, chain: &Chain, id: &str) -> Option<usize> {
    let roster = cluster.nodes[by].node.blocks().cluster().roster();
    let mut runs = chain.runs(RUN_BLOCKS);
    let is_its = |run: &RunHash| roster.placement.first(run).is_some_and(|m| m.0 == id);
    runs.find(|(run, _)| is_its(run))
        .map(|(_, range)| range.start)
}

/// A chain in which `id` owns runs, but not the first one.
fn chain_cut_by(
    cluster: &Circle,
    by: usize,
    ns: &NamespaceHandle,
    id: &str,
) -> (u32, Chain, usize) {
    (1..)
        .find_map(|seed| {
            let chain = chain(ns, seed, 48);
            let cut = first_of(cluster, by, &chain, id)?;
            (cut > 8).then_some((seed, chain, cut))
        })
        .expect("some chain does")
}

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
            let probe = client
                .lookup(&ns, &asked, &LookupOptions::probe())
                .await
                .unwrap();
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

    let mut found = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
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
    let found = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
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
    let found = scheduler
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
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

/// An address at which nobody listens.
async fn nowhere() -> String {
    let left = TcpListener::bind("127.0.0.1:0").await.unwrap();
    left.local_addr().unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_owner_cuts_the_prefix_where_its_first_run_lies() {
    let cluster = Circle::start_strangers(2, |_| {}).await;
    let dead = pretended("dead", &nowhere().await);
    for number in 0..2 {
        let all = [cluster.member(0), cluster.member(1), dead.clone()];
        cluster.tell(number, all);
    }
    let (client, ns) = connect(&cluster.endpoint(0)).await;
    let (seed, chain, cut) = chain_cut_by(&cluster, 0, &ns, "dead");
    put(&client, &ns, &chain, seed, 0..48).await;
    let (fresh, _) = connect(&cluster.endpoint(1)).await;

    for client in [&client, &fresh] {
        let found = client
            .lookup(&ns, &chain, &LookupOptions::default())
            .await
            .unwrap();
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
            let found = client
                .lookup(&ns, &chain, &LookupOptions::default())
                .await
                .unwrap();
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
        let found = client
            .lookup(&ns, &chain, &LookupOptions::default())
            .await
            .unwrap();
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_view_is_mended_by_one_answer() {
    let cluster = Circle::start_strangers(3, |_| {}).await;
    cluster.acquaint(0..2);
    let (stale, ns) = connect(&cluster.endpoint(0)).await;
    let warm = chain(&ns, 999, 8);
    stale
        .lookup(&ns, &warm, &LookupOptions::probe())
        .await
        .unwrap();
    assert!(stale.path().members.len() <= 2);

    cluster.acquaint(0..3);
    let (fresh, its) = connect(&cluster.endpoint(2)).await;
    let (seed, chain, _) = chain_cut_by(&cluster, 0, &ns, "n2");
    put_all(&fresh, &its, &chain, seed).await;

    let found = stale
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
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
    stale
        .lookup(&ns, &warm, &LookupOptions::probe())
        .await
        .unwrap();

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
    let found = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
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
    let address = std::mem::replace(&mut absent.address, nowhere().await);
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
    let found = client
        .lookup(&ns, &chain, &LookupOptions::probe())
        .await
        .unwrap();
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
    let found = client
        .lookup(&ns, &chain, &LookupOptions::probe())
        .await
        .unwrap();
    assert_eq!(found.present_blocks, 48);
    cluster.stop().await;
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
    (absent.version, absent.address) = (absent.version + 1, nowhere().await);
    for number in 0..2 {
        cluster.tell(number, [absent.clone()]);
    }
    let (client, _) = connect(&cluster.endpoint(0)).await;
    let its = client.open_replicated(&spec, false, 2).await.unwrap();
    let mut found = client
        .lookup(&its, &chain, &LookupOptions::default())
        .await
        .unwrap();
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
    let other = self::chain(&its, 4242, 48);
    let outcomes = put(&client, &its, &other, 4242, 0..48).await;
    assert!(
        outcomes
            .iter()
            .all(|outcome| *outcome == PutOutcome::Cached),
        "{outcomes:?}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_of_several_endpoints_will_do() {
    let cluster = Circle::start(3).await;
    let nobody = nowhere().await;
    let endpoints = format!("{nobody}, {},{}", cluster.endpoint(1), cluster.endpoint(2));
    let (client, ns) = connect(&endpoints).await;
    let chain = chain(&ns, 1, 48);
    put_all(&client, &ns, &chain, 1).await;
    let found = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
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
    let found = client
        .lookup(&ns, &chain, &LookupOptions::probe())
        .await
        .unwrap();
    assert_eq!(found.present_blocks, 0);
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
