//! Runs with several owners, most of them dead: whoever is left is asked, and soon the first of all.

use std::time::Duration;

use kvclient::{
    Chain, Client, GetOutcome, LocalPath, LookupOptions, Namespace, NamespaceHandle, PutBlock,
    PutOptions, PutOutcome,
};
use kvproto::Member;
use kvtests::{
    circle::Circle,
    node::filled,
    patience::{eventually, nowhere, until, within_awake},
    wires::Gate,
};

const RUN_BLOCKS: u32 = 4;
const BLOCKS: usize = 24;
const BLOCK_BYTES: usize = 3000;

/// Far from any of the times that this is about.
const DEADLINE: Duration = Duration::from_secs(30);

/// What the calls that find out may take together.
const SOON: Duration = Duration::from_secs(6);

/// After so long a lookup asks whoever else has the same.
const HEDGE: Duration = Duration::from_millis(30);

fn spec() -> Namespace {
    Namespace::opaque("silent", 16, RUN_BLOCKS)
}

fn block(i: usize) -> Vec<u8> {
    filled(i as u32, BLOCK_BYTES).to_vec()
}

/// Three nodes that all have a chain.
async fn thrice() -> (Circle, Chain) {
    let circle = Circle::start(3).await;
    let (client, ns) = connect(&circle).await;
    let chain = ns.chain(&(0..16 * BLOCKS as u32).collect::<Vec<u32>>());
    assert!(is_put(&client, &ns, &chain).await);
    let held = |number: usize| {
        let tiers = circle.nodes[number].node.blocks().stats().tiers;
        tiers.iter().map(|tier| tier.blocks).sum::<u64>()
    };
    eventually("all three have it", || {
        (0..3).all(|number| held(number) == BLOCKS as u64)
    })
    .await;
    (circle, chain)
}

async fn connect(circle: &Circle) -> (Client, NamespaceHandle) {
    let client = Client::builder(&circle.endpoint(0))
        .local(LocalPath::Off)
        .deadline(DEADLINE);
    let client = client.connect().await.expect("a client");
    let ns = client.open_replicated(&spec(), false, 3).await;
    (client, ns.expect("a namespace"))
}

/// Whether all blocks of a chain are kept, or were there.
async fn is_put(client: &Client, ns: &NamespaceHandle, chain: &Chain) -> bool {
    let blocks: Vec<_> = (0..chain.len())
        .map(|i| PutBlock::new(i, block(i)))
        .collect();
    let put = client.put(ns, chain, &blocks, PutOptions::default()).await;
    let put = put.expect("results");
    put.iter()
        .all(|put| matches!(put.outcome, PutOutcome::Cached | PutOutcome::Present))
}

/// Whether all of it is had, under a lease and without one.
async fn is_read(client: &Client, ns: &NamespaceHandle, chain: &Chain) -> bool {
    let found = client.lookup(ns, chain, &LookupOptions::default()).await;
    let found = found.expect("a lookup is answered");
    let mut is_whole = found.leased_blocks() as usize == chain.len();
    for lease in [found.lease.as_ref(), None] {
        let got = client.get(ns, chain, lease).await.expect("an answer");
        for (i, got) in got.iter().enumerate() {
            match got.outcome {
                GetOutcome::Hit => assert_eq!(got.bytes.as_deref(), Some(&block(i)[..])),
                _ => is_whole = false,
            }
        }
    }
    is_whole
}

/// The first node hears that the others are reached elsewhere.
fn tell(circle: &Circle, addresses: [String; 2]) {
    let elsewhere = |(number, address): (usize, String)| {
        let member = circle.member(number);
        Member {
            version: member.version + 1,
            address,
            ..member
        }
    };
    circle.tell(0, (1..).zip(addresses).map(elsewhere));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_two_of_three_owners_gone_no_call_misses_the_third() {
    let (circle, chain) = thrice().await;
    tell(&circle, [(); 2].map(|()| format!("http://{}", nowhere())));
    // Each time it is the first call that finds out.
    for first in ["lookup", "get", "put"] {
        let (client, ns) = connect(&circle).await;
        match first {
            "lookup" => {
                let found = client.lookup(&ns, &chain, &LookupOptions::default()).await;
                assert_eq!(found.unwrap().leased_blocks() as usize, BLOCKS);
            }
            "get" => {
                let got = client.get(&ns, &chain, None).await.unwrap();
                assert!(got.iter().all(|got| got.outcome == GetOutcome::Hit));
            }
            _ => assert!(is_put(&client, &ns, &chain).await),
        }
        for _ in 0..3 {
            assert!(is_read(&client, &ns, &chain).await, "{first}");
            assert!(is_put(&client, &ns, &chain).await, "{first}");
        }
    }
    circle.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_of_three_owners_that_freeze_delay_the_calls_that_find_out_and_no_others() {
    let (circle, chain) = thrice().await;
    let mut gates = Vec::new();
    for number in 1..3 {
        gates.push(Gate::before(circle.nodes[number].node.grpc_addr()).await);
    }
    tell(&circle, [gates[0].url(), gates[1].url()]);
    let (client, ns) = connect(&circle).await;
    assert!(is_read(&client, &ns, &chain).await && is_put(&client, &ns, &chain).await);

    gates.iter().for_each(Gate::close);
    let found = within_awake(SOON, is_read(&client, &ns, &chain)).await;
    assert_eq!(found, Some(true), "who is left is asked");
    let calls = 20;
    let lookups = async {
        for _ in 0..calls {
            let found = client.lookup(&ns, &chain, &LookupOptions::probe()).await;
            assert_eq!(found.unwrap().present_blocks as usize, BLOCKS);
        }
    };
    let quick = within_awake(HEDGE * calls / 2, lookups).await;
    assert!(quick.is_some(), "each lookup waited for who is silent");
    let rest = async {
        for _ in 0..calls {
            assert!(is_read(&client, &ns, &chain).await && is_put(&client, &ns, &chain).await);
        }
    };
    assert!(within_awake(SOON, rest).await.is_some());

    // They are owners all the same, and asked again once they are back.
    let hits = || {
        let text = circle.nodes[1].node.blocks().metrics_text();
        let mut samples = kvserver::telemetry::metrics::samples(&text);
        let of_ram = "terrace_get_blocks_total{source=\"ram\"}";
        samples.find(|(sample, _)| *sample == of_ram).unwrap().1
    };
    gates.iter().for_each(Gate::open);
    let before = hits();
    until("it is read of them", async || {
        assert!(is_read(&client, &ns, &chain).await);
        hits() > before
    })
    .await;
    circle.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_is_there_and_takes_no_block_leaves_the_others_time() {
    let circle = Circle::start(3).await;
    let gate = Gate::before(circle.nodes[1].node.grpc_addr()).await;
    let there = circle.member(2).address;
    tell(&circle, [gate.url(), there]);
    let (client, ns) = connect(&circle).await;
    let client = client.with_deadline(Duration::from_secs(6));
    // Blocks of which it is the first owner, all of them.
    let roster = circle.nodes[0].node.cluster().roster();
    let mut chains = (0..)
        .map(|seed: u32| {
            ns.chain(
                &(0..16 * RUN_BLOCKS)
                    .map(|i| seed << 16 | i)
                    .collect::<Vec<_>>(),
            )
        })
        .filter(|chain| {
            let run = chain.place(0, RUN_BLOCKS).run;
            roster
                .placement
                .first(&run)
                .is_some_and(|first| first.0 == "n1")
        });
    let mut put = async |bytes: usize| {
        let chain = chains.next().expect("one of three");
        let blocks: Vec<_> = (0..chain.len())
            .map(|i| PutBlock::new(i, vec![7; bytes]))
            .collect();
        let put = client.put(&ns, &chain, &blocks, PutOptions::default());
        let put = put.await.expect("results");
        put.iter().all(|put| put.outcome == PutOutcome::Cached)
    };
    assert!(put(BLOCK_BYTES).await);
    let blocks = || {
        let tiers = circle.nodes[1].node.blocks().stats().tiers;
        tiers.iter().map(|tier| tier.blocks).sum::<u64>()
    };
    let before = blocks();
    assert!(before > 0, "it is the first owner");
    gate.clog();
    assert!(put(1 << 20).await, "there are two others, and time");
    circle.stop().await;
}
