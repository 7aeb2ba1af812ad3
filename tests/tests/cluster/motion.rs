//! Blocks on their way between real nodes: reads in motion, moves, drains and copies, held against stock clients.

use std::time::Duration;

use bytes::Bytes;
use kvproto::{Chain, Member, MemberId, MemberState, RequestId, convert::request::Target, v1};
use kvserver::{
    Node,
    clock::{Clock as _, SystemClock, Tick},
    config::{Capacity, Config, MIB},
    engine::TenantId,
};
use kvtests::{
    cluster::TestCluster,
    node::{RUN_BLOCKS, Stock, TestNode, are_hits, filled},
    patience::{HANG, eventually, until, within_awake},
    peer::{Fault, Peer},
};
use tonic::Request;

const BLOCK_BYTES: usize = 100_000;

/// What a lookup may take when something is wrong: `motion_wait` is 100 ms, the rest is the machine's.
const BOUND: Duration = Duration::from_secs(1);

/// Nodes that each have an equal share.
async fn cluster(count: usize, change: impl Fn(&mut Config) + 'static) -> TestCluster {
    TestCluster::start_with(count, move |_, config| {
        config.weight = 1;
        change(config);
    })
    .await
}

async fn clients(cluster: &TestCluster) -> Vec<Stock> {
    let mut clients = Vec::new();
    for node in cluster.running() {
        clients.push(Stock::open(&node.endpoint()).await);
    }
    clients
}

/// The numbers of the owners of a chain's run, as the first node sees it.
fn owners(cluster: &TestCluster, chain: &Chain, replicas: usize) -> Vec<usize> {
    let roster = cluster.node(0).cluster().roster();
    let owners = roster.owners(&chain.hashes[0].into(), replicas);
    let number = |id: &MemberId| {
        let is_it = |node: &Option<Node>| node.as_ref().is_some_and(|n| n.cluster().me() == id);
        cluster
            .nodes
            .iter()
            .position(is_it)
            .expect("a node of ours")
    };
    owners.into_iter().map(|owner| number(&owner.id)).collect()
}

fn owner(cluster: &TestCluster, chain: &Chain) -> usize {
    owners(cluster, chain, 1)[0]
}

/// One figure of a node's scrape; several samples of one name add up.
fn figure(node: &Node, name: &str) -> f64 {
    let text = node.blocks().metrics_text();
    let samples = kvserver::telemetry::metrics::samples(&text);
    let of_name = samples.filter(|(sample, _)| sample.starts_with(name));
    of_name.map(|(_, value)| value).sum()
}

/// The blocks of one run.
fn blocks(seed: u32) -> Vec<Bytes> {
    (0..RUN_BLOCKS)
        .map(|i| filled(seed * 100 + i, BLOCK_BYTES))
        .collect()
}

async fn put(client: &mut Stock, chain: &Chain, seed: u32) {
    client
        .put_as(
            chain,
            &blocks(seed),
            v1::Ack::Cached,
            v1::PutOutcome::Cached,
        )
        .await;
}

/// A lookup with a lease; blocks present, and the lease's id.
async fn lease(client: &mut Stock, chain: &Chain) -> (u32, u64) {
    let found = client.lookup(chain, Some(60_000)).await;
    let found = found.expect("a lookup is answered, whatever moves");
    (
        found.present_blocks,
        found.lease.map_or(0, |lease| lease.id),
    )
}

/// Whether a lookup finds a whole run; keeps no lease, so that it can be asked often.
async fn arrived(client: &mut Stock, chain: &Chain) -> bool {
    let (present, id) = lease(client, chain).await;
    if id != 0 {
        client.release(id).await;
    }
    present == RUN_BLOCKS
}

/// Looks up and gets a run; the bytes must be right.
async fn read(client: &mut Stock, chain: &Chain, seed: u32) {
    let (present, id) = lease(client, chain).await;
    assert_eq!(present, RUN_BLOCKS, "run {seed}");
    let got = client.get(chain, id, 0).await.expect("a get is answered");
    assert!(are_hits(&got, &blocks(seed)), "run {seed}");
    assert!(client.release(id).await);
}

/// Puts this many runs, each at its owner.
async fn fill(cluster: &TestCluster, clients: &mut [Stock], runs: u32) -> Vec<Chain> {
    let mut chains = Vec::new();
    for seed in 0..runs {
        let chain = clients[0].chain(seed, RUN_BLOCKS);
        put(&mut clients[owner(cluster, &chain)], &chain, seed).await;
        chains.push(chain);
    }
    chains
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joined_node_serves_what_the_old_owners_held() {
    let mut cluster = cluster(2, |_| {}).await;
    let mut clients = clients(&cluster).await;
    let chains = fill(&cluster, &mut clients, 24).await;
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
    assert!(moved > 2, "{moved} of 24 runs have another owner");
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
async fn a_lease_is_honoured_while_its_run_moves() {
    let mut cluster = cluster(1, |_| {}).await;
    let mut clients = clients(&cluster).await;
    let chains = fill(&cluster, &mut clients, 12).await;
    let mut leases = Vec::new();
    for chain in &chains {
        leases.push(lease(&mut clients[0], chain).await.1);
    }
    let newcomer = cluster.add().await;
    cluster.agreed(2).await;
    let motion = cluster.node(0).blocks().motion().unwrap().clone();
    eventually("moves end", || {
        let now = motion.account();
        now.moved_runs > 0 && now.waiting_runs == 0
    })
    .await;
    // Room is needed where the old copies are: 64 MiB, twice over.
    let big = 2 * MIB as usize;
    for seed in 1000..1064 {
        let chain = clients[0].chain(seed, 1);
        let block = [filled(seed, big)];
        let put = clients[0].put(&chain, &block, v1::Ack::Cached).await;
        put.expect("a put is answered");
    }
    for ((seed, chain), id) in (0..).zip(&chains).zip(leases) {
        let got = clients[0].get(chain, id, 0).await.unwrap();
        assert!(are_hits(&got, &blocks(seed)), "run {seed}");
    }
    assert!(
        chains
            .iter()
            .any(|chain| owner(&cluster, chain) == newcomer)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_loses_nothing() {
    let cluster = cluster(3, |_| {}).await;
    let mut clients = clients(&cluster).await;
    let chains = fill(&cluster, &mut clients, 30).await;
    let leaving = cluster.node(2);
    leaving.cluster().drain();
    cluster.agreed(cluster.nodes.len()).await;
    let motion = leaving.blocks().motion().unwrap();
    let account = motion.drained(Tick(HANG)).await;
    assert!(account.is_draining);
    assert_eq!((account.left_blocks, account.at_stake_bytes()), (0, 0));
    for (seed, chain) in (0..).zip(&chains) {
        let owner = owner(&cluster, chain);
        assert_ne!(owner, 2);
        // Without asking anybody: it is there.
        assert_eq!(clients[owner].present(chain).await, RUN_BLOCKS);
        read(&mut clients[owner], chain, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_whose_time_is_up_says_what_would_be_lost() {
    // One run fits the first quarter of a second, and the next one has to wait for ten.
    let cluster = cluster(2, |config| {
        config.peer_bytes_per_second = u64::from(RUN_BLOCKS) * BLOCK_BYTES as u64 / 10;
    })
    .await;
    let mut clients = clients(&cluster).await;
    let chains = fill(&cluster, &mut clients, 20).await;
    let of_it: Vec<&Chain> = chains.iter().filter(|c| owner(&cluster, c) == 1).collect();
    let leaving = cluster.node(1);
    leaving.cluster().drain();
    cluster.agreed(cluster.nodes.len()).await;
    let motion = leaving.blocks().motion().unwrap();
    eventually("the first run has gone", || motion.account().moved_runs > 0).await;
    let account = motion.drained(Tick(Duration::ZERO)).await;
    let mut lost = 0;
    for chain in &of_it {
        lost += u64::from(RUN_BLOCKS - clients[0].present(chain).await);
    }
    assert!(lost > 0, "two seconds do not do for {} runs", of_it.len());
    assert_eq!(account.left_blocks, lost);
    assert_eq!(account.at_stake_bytes(), lost * BLOCK_BYTES as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_survive_the_death_of_an_owner_and_are_made_anew() {
    let mut cluster = cluster(3, |config| {
        config.replicas = 2;
        config.suspect_grace = Duration::from_millis(200);
    })
    .await;
    let mut clients = clients(&cluster).await;
    let mut chains = Vec::new();
    for seed in 0..12 {
        let chain = clients[0].chain(seed, RUN_BLOCKS);
        put(&mut clients[owner(&cluster, &chain)], &chain, seed).await;
        chains.push(chain);
    }
    for chain in &chains {
        for owner in owners(&cluster, chain, 2) {
            until("the copy arrives", async || {
                clients[owner].present(chain).await == RUN_BLOCKS
            })
            .await;
        }
    }
    // The last node dies without a word, and is declared lost.
    cluster.kill(2);
    cluster.agreed(2).await;
    clients.pop();
    for (seed, chain) in (0..).zip(&chains) {
        let both = owners(&cluster, chain, 2);
        assert_eq!(both.len(), 2);
        for owner in both {
            read(&mut clients[owner], chain, seed).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_safe_put_of_two_copies_is_answered_when_both_are_safe() {
    let cluster = cluster(2, |config| {
        config.replicas = 2;
        config.nvme_bytes = Capacity::Bytes(64 * MIB);
    })
    .await;
    let mut clients = clients(&cluster).await;
    let chain = clients[0].chain(1, RUN_BLOCKS);
    let both = owners(&cluster, &chain, 2);
    let put = clients[both[0]]
        .put(&chain, &blocks(1), v1::Ack::Stored)
        .await;
    let put = put.unwrap();
    assert!(
        put.iter()
            .all(|r| r.outcome() == v1::PutOutcome::Stored && r.reason == 0),
        "{put:?}"
    );
    // No waiting: it is there, and on its disk.
    assert_eq!(clients[both[1]].present(&chain).await, RUN_BLOCKS);
    let stats = cluster.node(both[1]).blocks().stats();
    let nvme = stats
        .tiers
        .iter()
        .find(|t| t.tier() == v1::Tier::Nvme)
        .unwrap();
    assert_eq!(nvme.blocks, u64::from(RUN_BLOCKS));
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_was_not_told_of_an_invalidation_cannot_undo_it_by_a_read() {
    let node = lone().await;
    let mut client = node.client().await;
    let (old, chain) = departed(&node, &mut client, 11, []).await;
    // The node never had these blocks; all it knows is that they must go.
    let target = v1::invalidate_request::Target::All(true);
    client.invalidate(target).await.unwrap();
    assert_eq!(lease(&mut client, &chain).await.0, 0);
    eventually("it has been asked", || old.count("Get") == 1).await;
    assert!(!arrived(&mut client, &chain).await);
    let refused = "terrace_motion_fetched_blocks_total{result=\"refused\"}";
    let refused = figure(&node.node, refused);
    assert_eq!(refused, f64::from(RUN_BLOCKS));
    // What somebody puts now is new.
    put(&mut client, &chain, 11).await;
    read(&mut client, &chain, 11).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_not_told_of_an_invalidation_cannot_undo_it_by_a_move() {
    let mut cluster = cluster(1, |_| {}).await;
    let mut clients = clients(&cluster).await;
    let chains = fill(&cluster, &mut clients, 24).await;
    let newcomer = cluster.add().await;
    let mut client = Stock::open(&cluster.node(newcomer).endpoint()).await;
    let request = Some(RequestId([5; 16]));
    let invalidate = async |number: usize| {
        let blocks = cluster.node(number).blocks();
        let forgotten = blocks.invalidate_as(request, TenantId(0), client.namespace, Target::All);
        forgotten.await.unwrap()
    };
    // It is told before anything has moved or when some has, and the other one only later.
    invalidate(newcomer).await;
    cluster.agreed(2).await;
    let refused = || {
        let name = "terrace_motion_refused_blocks_total{reason=\"invalidated\"}";
        figure(cluster.node(0), name)
    };
    eventually("moves are refused", || refused() > 0.0).await;
    for chain in &chains {
        let present = client.clone().present(chain).await;
        assert_eq!(present, 0, "it was told, and has none");
    }
    assert!(invalidate(0).await > 0);
    // Now both know, and what is put at the old owner by a caller with an old view goes where it belongs.
    for (seed, chain) in (0..).zip(&chains) {
        put(&mut clients[0], chain, seed).await;
    }
    let moved: Vec<_> = (0..)
        .zip(&chains)
        .filter(|(_, chain)| owner(&cluster, chain) == newcomer)
        .collect();
    assert!(moved.len() > 3);
    for (seed, chain) in moved {
        until("it has moved", async || {
            client.present(chain).await == RUN_BLOCKS
        })
        .await;
        read(&mut client, chain, seed).await;
    }
}

/// A run that is the other one's, in a view of two.
fn of_old(node: &TestNode, client: &Stock, from: u32) -> Chain {
    let roster = node.node.cluster().roster();
    (from..from + 100)
        .map(|seed| client.chain(seed, RUN_BLOCKS))
        .find(|chain| roster.owners(&chain.hashes[0].into(), 1)[0].id.0 == "old")
        .expect("every second one is")
}

/// A node alone.
async fn lone() -> TestNode {
    TestNode::start(|config| config.node_id = "me".to_owned()).await
}

/// A node that has left lately, plays these faults, and had this run, which is the node's own now.
async fn departed(
    node: &TestNode,
    client: &mut Stock,
    seed: u32,
    faults: impl IntoIterator<Item = Fault>,
) -> (Peer, Chain) {
    let old = Peer::start().await;
    let address = format!("http://{}", old.endpoint());
    let channel = tonic::transport::Endpoint::from_shared(address).unwrap();
    let channel = channel.connect().await.unwrap();
    let mut at_old = Stock {
        client: v1::blocks_client::BlocksClient::new(channel),
        ..client.clone()
    };
    let cluster = node.node.blocks().cluster();
    let member = Member {
        id: MemberId::from("old"),
        generation: 1,
        version: 1,
        weight: 1,
        zone: String::new(),
        state: MemberState::Active,
        address: format!("http://{}", old.endpoint()),
    };
    cluster.merge([member.clone()]);
    let chain = of_old(node, client, seed * 100);
    let mut messages: Vec<v1::PutRequest> = (0..)
        .zip(blocks(seed))
        .flat_map(|(i, block)| at_old.pieces(&chain, i, &block, 1 << 20))
        .collect();
    messages[0].start = at_old.start(v1::Ack::Cached).start;
    at_old.send(messages).await.expect("it takes anything");
    cluster.merge([Member {
        version: 2,
        state: MemberState::Gone,
        ..member
    }]);
    old.script(faults);
    (old, chain)
}
