//! Nodes that ask for credentials, as one cluster: blocks keep their tenant wherever they move.

use std::time::Duration;

use bytes::Bytes;
use kvclient::{
    Chain, Client, GetOutcome, LocalPath, LookupOptions, Namespace, NamespaceHandle, PutBlock,
    PutOptions, PutOutcome,
};
use kvproto::{convert, key::RunHash, v1};
use kvserver::{Node, config::Config};
use kvtests::{
    cluster::TestCluster,
    keys::{BLUE, Keys, RED, as_node, shown},
    node::{BLOCK_TOKENS, RUN_BLOCKS, figure, filled},
    patience::{HANG, eventually},
};
use tonic::Code;

/// So many that a newcomer gets some by any draw.
const RUNS: u32 = 60;
const BLOCK_BYTES: usize = 5000;

/// Two nodes of equal share that ask for credentials.
async fn two(change: impl Fn(&mut Config) + 'static) -> TestCluster {
    let keys = Keys::cut();
    TestCluster::start_with(2, move |_, config| {
        config.weight = 1;
        keys.lock(config);
        change(config);
    })
    .await
}

async fn tenant(node: &Node, token: &str) -> (Client, NamespaceHandle) {
    let client = Client::builder(&node.endpoint())
        .local(LocalPath::Off)
        .deadline(HANG)
        .token(token);
    let client = client.connect().await.expect("a client");
    let spec = Namespace::opaque("shared prompt", BLOCK_TOKENS, RUN_BLOCKS);
    let opened = client.open_namespace(&spec, false).await;
    (client, opened.expect("a namespace"))
}

/// One run.
fn chain(ns: &NamespaceHandle, seed: u32) -> Chain {
    let tokens = (0..RUN_BLOCKS * BLOCK_TOKENS).map(|i| seed * 1_000_003 + i);
    ns.chain(&tokens.collect::<Vec<u32>>())
}

fn block(seed: u32, i: usize) -> Bytes {
    filled(seed * 100 + i as u32, BLOCK_BYTES)
}

async fn fill(client: &Client, ns: &NamespaceHandle) {
    for seed in 0..RUNS {
        let blocks = (0..RUN_BLOCKS as usize).map(|i| PutBlock::new(i, block(seed, i)));
        let blocks: Vec<_> = blocks.collect();
        let put = client
            .put(ns, &chain(ns, seed), &blocks, PutOptions::default())
            .await
            .expect("results");
        assert!(put.iter().all(|put| put.outcome == PutOutcome::Cached));
    }
}

/// Every run, whole and right.
async fn read(client: &Client, ns: &NamespaceHandle) {
    for seed in 0..RUNS {
        let chain = chain(ns, seed);
        let found = client.lookup(ns, &chain, &LookupOptions::default()).await;
        let found = found.expect("an answer");
        assert_eq!(found.present_blocks, RUN_BLOCKS, "run {seed}");
        let got = client.get(ns, &chain, found.lease.as_ref()).await;
        for (i, got) in got.expect("an answer").iter().enumerate() {
            assert_eq!(got.outcome, GetOutcome::Hit, "run {seed}");
            assert_eq!(got.bytes.as_deref(), Some(&block(seed, i)[..]));
        }
    }
}

/// Runs of `ns` that a node owns by its own view.
fn owned(node: &Node, ns: &NamespaceHandle) -> Vec<u32> {
    let roster = node.cluster().roster();
    let is_its = |seed: &u32| {
        let run: RunHash = chain(ns, *seed).place(0, RUN_BLOCKS).run;
        roster.placement.first(&run) == Some(node.cluster().me())
    };
    (0..RUNS).filter(is_its).collect()
}

/// Another tenant finds nothing of it at a node: by the same prompt, by its name, or by saying to be a node.
async fn is_hidden_from_blue(node: &Node, ns: &NamespaceHandle) {
    let (blue, its) = tenant(node, BLUE).await;
    assert_ne!(its.id(), ns.id());
    let mut service = v1::blocks_client::BlocksClient::connect(node.endpoint())
        .await
        .expect("it listens");
    for seed in 0..RUNS {
        let probe = LookupOptions::probe();
        let found = blue.lookup(&its, &chain(&its, seed), &probe).await;
        assert_eq!(found.expect("an answer").present_blocks, 0);
        let named = v1::LookupRequest {
            namespace_id: Bytes::copy_from_slice(&ns.id().0),
            chain: Some(convert::chain_to_wire(&chain(ns, seed))),
            probe: true,
            ..v1::LookupRequest::default()
        };
        let named = || shown(named.clone(), Some(BLUE));
        for call in [named(), as_node(named(), "red")] {
            let refused = service.lookup(call).await.unwrap_err();
            assert_eq!(refused.code(), Code::NotFound, "{refused}");
        }
    }
}

fn fetched(node: &Node) -> f64 {
    figure(node, "terrace_motion_fetched_blocks_total{result=\"kept\"}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_owner_fetches_a_tenants_blocks_for_that_tenant_alone() {
    let mut cluster = two(|config| {
        // Nothing is handed over by itself, and a read has time to fetch.
        config.peer_bytes_per_second = 1;
        config.motion_wait = Duration::from_secs(20);
    })
    .await;
    let (red, ns) = tenant(cluster.node(0), RED).await;
    fill(&red, &ns).await;
    let newcomer = cluster.add().await;
    cluster.agreed(3).await;
    let node = cluster.node(newcomer);
    let its = owned(node, &ns);
    assert!(its.len() > 4, "{} of {RUNS} runs changed owner", its.len());

    let (red, ns) = tenant(node, RED).await;
    read(&red, &ns).await;
    // But for one run at most of each old owner's, which its first burst is for.
    let least = (its.len() - 2) as u32 * RUN_BLOCKS;
    let got = fetched(node);
    assert!(got >= f64::from(least), "{got} of {}", its.len());
    is_hidden_from_blue(node, &ns).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenants_blocks_move_to_their_new_owner_and_stay_that_tenants() {
    let mut cluster = two(|_| {}).await;
    let (red, ns) = tenant(cluster.node(0), RED).await;
    fill(&red, &ns).await;
    let newcomer = cluster.add().await;
    cluster.agreed(3).await;
    let node = cluster.node(newcomer);
    let its = owned(node, &ns).len() as u64;
    assert!(its > 4, "{its} of {RUNS} runs changed owner");
    eventually("all that changed owner has moved", || {
        let accounts = (0..2).map(|old| {
            let motion = cluster.node(old).blocks().motion().expect("it moves");
            motion.account()
        });
        let accounts: Vec<_> = accounts.collect();
        let moved: u64 = accounts.iter().map(|account| account.moved_runs).sum();
        moved == its && accounts.iter().all(|account| account.waiting_runs == 0)
    })
    .await;

    let (red, ns) = tenant(node, RED).await;
    read(&red, &ns).await;
    assert_eq!(fetched(node), 0.0, "it was all there");
    is_hidden_from_blue(node, &ns).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn namespaces_are_a_tenant_s_own_and_added_up_over_members() {
    let cluster = two(|_| {}).await;
    let (red, ns) = tenant(cluster.node(0), RED).await;
    let (blue, _) = tenant(cluster.node(1), BLUE).await;
    fill(&red, &ns).await;
    let blocks = u64::from(RUNS * RUN_BLOCKS);
    // Who knows of one member hears of the other by its answer, and counts neither twice.
    let fresh = Client::builder(&cluster.node(0).endpoint()).deadline(HANG);
    let fresh = fresh.token(RED).connect().await.unwrap();
    for client in [fresh, red] {
        let known = client.namespaces(None).await.unwrap();
        assert_eq!((known.known.len(), known.silent.len()), (1, 0));
        let sum = &known.known[0];
        assert_eq!(
            (sum.id, sum.blocks, sum.bytes),
            (ns.id(), blocks, blocks * BLOCK_BYTES as u64)
        );
        assert_eq!(client.stats_of_all().await.len(), 2);
    }
    let of_blue = blue.namespaces(None).await.unwrap().known;
    assert_eq!((of_blue.len(), of_blue[0].blocks), (1, 0));
}
