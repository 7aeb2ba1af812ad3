//! A run that many read at once is served by two nodes for a while.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use kvclient::{
    Chain, Client, GetOutcome, LocalPath, LookupOptions, Namespace, NamespaceHandle, OwnerId,
    PutBlock, PutOptions, PutOutcome, Target,
};
use kvproto::v1::{self, blocks_client::BlocksClient};
use kvserver::config::Config;
use kvtests::{
    client::over_grpc,
    cluster::TestCluster,
    node::{Stock, figure, filled},
    patience::{HANG, eventually, until},
};
use tonic::{Request, transport::Endpoint};

const RUN_BLOCKS: u32 = 4;
const BLOCK_BYTES: usize = 256 << 10;

/// Clients that read at once, each with connections of its own …
const READERS: usize = 4;

/// … and those that have asked the owner and do not read on.
const WAITING: usize = 8;

/// Three nodes that call a run hot when a handful of calls wait, and forget it soon.
async fn cluster() -> TestCluster {
    TestCluster::start_with(3, |_, config: &mut Config| {
        config.weight = 1;
        config.hot_calls = 4;
        config.hot_time = Duration::from_secs(4);
    })
    .await
}

async fn connect(cluster: &TestCluster) -> (Client, NamespaceHandle) {
    let client = over_grpc(&cluster.node(0).endpoint()).await;
    let ns = open(&client).await;
    (client, ns)
}

async fn open(client: &Client) -> NamespaceHandle {
    let spec = Namespace::opaque("hot", 16, RUN_BLOCKS);
    let ns = client.open_namespace(&spec, false).await;
    ns.expect("a namespace")
}

fn hits(cluster: &TestCluster, number: usize) -> f64 {
    let source = "terrace_get_blocks_total{source=\"ram\"}";
    figure(cluster.node(number), source)
}

/// First and next owner of a run, by their numbers.
fn owners(cluster: &TestCluster, chain: &Chain) -> Vec<usize> {
    let roster = cluster.node(0).cluster().roster();
    let owners = roster.owners(&chain.place(0, RUN_BLOCKS).run, 2);
    let number = |id| (0..3).find(|number| cluster.id(*number) == id);
    let numbers = owners.into_iter().map(|owner| number(owner.id.clone()));
    numbers.map(|number| number.expect("one of them")).collect()
}

fn blocks() -> Vec<Bytes> {
    (0..RUN_BLOCKS).map(|i| filled(i, BLOCK_BYTES)).collect()
}

async fn put(client: &Client, ns: &NamespaceHandle) -> Chain {
    let chain = ns.chain(&(0..16 * RUN_BLOCKS).collect::<Vec<u32>>());
    let blocks: Vec<_> = (0..)
        .zip(blocks())
        .map(|(i, block)| PutBlock::new(i, block.to_vec()))
        .collect();
    let put = client.put(ns, &chain, &blocks, PutOptions::default()).await;
    let is_kept = |put: &kvclient::PutResult| put.outcome == PutOutcome::Cached;
    assert!(put.expect("results").iter().all(is_kept));
    chain
}

/// Looks up and gets the run; false when not all of it was had. The bytes are right, or the test fails.
async fn read(client: &Client, ns: &NamespaceHandle, chain: &Chain) -> bool {
    let found = client.lookup(ns, chain, &LookupOptions::default()).await;
    let found = found.expect("a lookup is answered");
    let got = client.get(ns, chain, found.lease.as_ref()).await;
    let got = got.expect("a get is answered");
    let mut is_whole = found.present_blocks == RUN_BLOCKS;
    for (got, block) in got.iter().zip(blocks()) {
        match got.outcome {
            GetOutcome::Hit => assert_eq!(got.bytes.as_deref(), Some(&block[..])),
            _ => is_whole = false,
        }
    }
    is_whole
}

/// Many who read one run, and some who have asked for it and do not take what they get, so that their calls wait at
/// the owner however quick the machine is.
struct Crowd {
    stop: Arc<AtomicBool>,
    short: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    waiting: Vec<tonic::Streaming<v1::GetResponse>>,
}

impl Crowd {
    async fn gather(cluster: &TestCluster, ns: &NamespaceHandle, chain: &Chain) -> Self {
        let first = owners(cluster, chain)[0];
        let mut waiting = Vec::new();
        for _ in 0..WAITING {
            // A window that half a block fills.
            let endpoint = Endpoint::from_shared(cluster.node(first).endpoint()).unwrap();
            let endpoint = endpoint
                .initial_stream_window_size(64 << 10)
                .initial_connection_window_size(64 << 10);
            let channel = endpoint.connect().await.expect("a connection");
            let mut client = BlocksClient::new(channel);
            let mut asked = Request::new(v1::GetRequest {
                namespace_id: Bytes::copy_from_slice(&ns.id().0),
                chain: Some(kvproto::convert::chain_to_wire(chain)),
                ..v1::GetRequest::default()
            });
            asked.set_timeout(HANG * 10);
            let begun = client.get(asked).await.expect("an answer begins");
            waiting.push(begun.into_inner());
        }
        let (stop, short) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let mut tasks = Vec::new();
        for _ in 0..READERS {
            let (client, ns) = connect(cluster).await;
            let (stop, short, chain) = (stop.clone(), short.clone(), chain.clone());
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    if !read(&client, &ns, &chain).await {
                        short.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }));
        }
        Self {
            stop,
            short,
            tasks,
            waiting,
        }
    }

    /// Once the second owner has been drawn in.
    async fn served_by_two(cluster: &TestCluster, ns: &NamespaceHandle, chain: &Chain) -> Self {
        let crowd = Self::gather(cluster, ns, chain).await;
        let second = owners(cluster, chain)[1];
        eventually("the second owner serves it", || hits(cluster, second) > 0.0).await;
        crowd
    }

    /// How many reads did not get all.
    async fn leave(mut self) -> u64 {
        self.readers_leave().await;
        self.short.load(Ordering::Relaxed)
    }

    /// Those who wait stay, until dropped.
    async fn leave_waiting(mut self) -> Vec<tonic::Streaming<v1::GetResponse>> {
        self.readers_leave().await;
        self.waiting
    }

    async fn readers_leave(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks.drain(..) {
            task.await.expect("right bytes, and no errors");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_run_is_served_by_two_nodes_until_it_has_cooled() {
    let cluster = cluster().await;
    let (client, ns) = connect(&cluster).await;
    let chain = put(&client, &ns).await;
    let [first, second] = owners(&cluster, &chain)[..] else {
        panic!("two owners");
    };
    let third = 3 - first - second;
    let hot = || figure(cluster.node(first), "terrace_motion_hot_runs");
    assert!(read(&client, &ns, &chain).await);
    assert_eq!((hits(&cluster, second), hot()), (0.0, 0.0));

    let crowd = Crowd::gather(&cluster, &ns, &chain).await;
    eventually("it is hot", || hot() == 1.0).await;
    eventually("the second owner serves it", || {
        hits(&cluster, second) > 0.0
    })
    .await;
    // From here on, both do.
    let before = [first, second].map(|number| hits(&cluster, number));
    eventually("many reads", || {
        hits(&cluster, first) + hits(&cluster, second) > before[0] + before[1] + 400.0
    })
    .await;
    let [at_first, at_second] =
        [(first, before[0]), (second, before[1])].map(|(n, before)| hits(&cluster, n) - before);
    let share = at_second / (at_first + at_second);
    println!("the second owner served {share:.2} of the reads");
    // The first has a queue, the second has none.
    assert!((0.3..1.0).contains(&share), "{at_first} {at_second}");
    assert_eq!(hits(&cluster, third), 0.0);
    assert_eq!(crowd.leave().await, 0, "reads that did not get all");

    // Nobody reads it: it is not named any more, and only its owner is asked.
    eventually("it has cooled", || hot() == 0.0).await;
    let mut stock = Stock::open(&cluster.node(first).endpoint()).await;
    stock.namespace = ns.id();
    let answer = stock.lookup(&chain, Some(1000)).await.expect("an answer");
    assert_eq!(
        (answer.present_blocks, answer.seconds),
        (RUN_BLOCKS, vec![])
    );
    let before = hits(&cluster, second);
    for _ in 0..20 {
        assert!(read(&client, &ns, &chain).await);
    }
    assert_eq!(hits(&cluster, second), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_reads_under_a_lease_that_was_taken_of_the_second_owner() {
    let cluster = cluster().await;
    let (client, ns) = connect(&cluster).await;
    let chain = put(&client, &ns).await;
    let second = owners(&cluster, &chain)[1];
    let leases = || cluster.node(second).blocks().stats().leases;
    let of_owner = || {
        let builder = Client::builder(&cluster.node(0).endpoint()).local(LocalPath::Off);
        builder.owner(OwnerId([3; 16])).connect()
    };
    let (scheduler, worker) = (of_owner().await.unwrap(), of_owner().await.unwrap());
    // By that each learns of the others.
    open(&scheduler).await;
    open(&worker).await;
    let crowd = Crowd::served_by_two(&cluster, &ns, &chain).await;
    // The readers go; those who wait at the first owner stay, so that the second is asked.
    let waiting = crowd.leave_waiting().await;
    let mut taken = None;
    until("a lease of the second owner's alone", async || {
        // What was held before is given back in the background.
        taken = None;
        eventually("nothing is held there", || leases() == 0).await;
        let options = LookupOptions::default();
        let found = scheduler.lookup(&ns, &chain, &options).await.unwrap();
        taken = found.lease;
        leases() == 1
    })
    .await;
    let borrowed = worker.lease_of_owner(taken.as_ref().expect("it is there").id());
    let got = worker.get(&ns, &chain, &borrowed).await.unwrap();
    let outcomes: Vec<_> = got.iter().map(|got| got.outcome).collect();
    assert!(
        outcomes.iter().all(|outcome| *outcome == GetOutcome::Hit),
        "{outcomes:?}"
    );
    drop(waiting);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_only_gets_is_told_of_the_second_owner() {
    let cluster = cluster().await;
    let (client, ns) = connect(&cluster).await;
    let chain = put(&client, &ns).await;
    let second = owners(&cluster, &chain)[1];
    let crowd = Crowd::gather(&cluster, &ns, &chain).await;
    eventually("the second owner serves it", || {
        hits(&cluster, second) > 0.0
    })
    .await;
    // The readers go; those who wait at the first owner stay, so that it has a queue.
    let waiting = crowd.leave_waiting().await;
    for local in [LocalPath::Off, LocalPath::Auto] {
        let builder = Client::builder(&cluster.node(0).endpoint()).local(local.clone());
        let getter = builder.connect().await.expect("a client");
        let its = open(&getter).await;
        let before = hits(&cluster, second);
        until(&format!("it is read there, {local:?}"), async || {
            let got = getter.get(&its, &chain, None).await.expect("an answer");
            let outcomes = got.iter().map(|got| got.outcome);
            assert!(outcomes.clone().all(|outcome| outcome == GetOutcome::Hit));
            hits(&cluster, second) > before
        })
        .await;
    }
    drop(waiting);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_second_owner_lacks_its_owner_is_asked_for() {
    let cluster = cluster().await;
    let (client, ns) = connect(&cluster).await;
    let chain = put(&client, &ns).await;
    let second = owners(&cluster, &chain)[1];
    let crowd = Crowd::served_by_two(&cluster, &ns, &chain).await;
    // It loses what it was given, and nobody tells: a node may evict a copy whenever it likes.
    let lost = cluster.node(second).blocks().clone();
    let held = lost
        .engine()
        .invalidate(ns.id(), kvserver::engine::Target::All);
    assert_eq!(held.len(), RUN_BLOCKS as usize);
    let at_first = hits(&cluster, owners(&cluster, &chain)[0]);
    eventually("its owner serves it", || {
        hits(&cluster, owners(&cluster, &chain)[0]) > at_first + 400.0
    })
    .await;
    // A lease that was taken there is void, as after any invalidation; nothing else is short.
    let short = crowd.leave().await;
    assert!(short <= 2 * READERS as u64, "{short} reads did not get all");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalidation_reaches_the_second_owner() {
    let cluster = cluster().await;
    let (client, ns) = connect(&cluster).await;
    let chain = put(&client, &ns).await;
    let crowd = Crowd::served_by_two(&cluster, &ns, &chain).await;
    crowd.leave().await;
    client
        .invalidate(&ns, Target::All)
        .await
        .expect("all are told");
    for number in 0..3 {
        let mut stock = Stock::open(&cluster.node(number).endpoint()).await;
        stock.namespace = ns.id();
        let found = stock
            .lookup(&chain, None)
            .await
            .map(|found| found.present_blocks);
        assert_eq!(found.ok().unwrap_or_default(), 0, "node {number}");
    }
    until("it is a miss", async || !read(&client, &ns, &chain).await).await;
}
