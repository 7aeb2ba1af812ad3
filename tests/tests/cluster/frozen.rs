//! A member that keeps its connections and answers nothing: calls learn of it long before their deadlines.

use std::{sync::Arc, time::Duration};

use kvclient::{GetOutcome, LookupOptions, Namespace, PutBlock, PutOptions, PutOutcome};
use kvproto::Member;
use kvtests::{
    circle::Circle, client::over_grpc, node::filled, patience::within_awake, wires::Gate,
};

const RUN_BLOCKS: u32 = 4;
const BLOCK_BYTES: usize = 3000;

/// What a call may take at most while a member is silent: half a second until it is looked at, a quarter for its
/// answer, and room for a slow machine. A tenth of the deadline.
const SOON: Duration = Duration::from_secs(3);
const DEADLINE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_owner_costs_its_blocks_and_not_the_deadline() {
    let circle = Circle::start(2).await;
    let gate = Gate::before(circle.nodes[1].node.grpc_addr()).await;
    // Clients are told of the way that can be frozen. No digest covers an address.
    let told = Member {
        version: circle.member(1).version + 1,
        address: gate.url(),
        ..circle.member(1)
    };
    circle.tell(0, [told]);
    let client = over_grpc(&circle.endpoint(0)).await.with_deadline(DEADLINE);
    let spec = Namespace::opaque("frozen", 16, RUN_BLOCKS);
    let ns = Arc::new(client.open_namespace(&spec, false).await.unwrap());
    let roster = circle.nodes[0].node.cluster().roster();
    let is_frozens = |run| roster.placement.first(&run).unwrap().0 == "n1";
    // A prompt that begins at the node that stays well, and goes on at the other.
    let chain = (1..)
        .map(|seed| {
            ns.chain(
                &(0..16 * 64)
                    .map(|i| seed * 10_007 + i)
                    .collect::<Vec<u32>>(),
            )
        })
        .find(|chain| !is_frozens(chain.place(0, RUN_BLOCKS).run))
        .unwrap();
    let of_frozen: Vec<bool> = (0..chain.len())
        .map(|i| is_frozens(chain.place(i, RUN_BLOCKS).run))
        .collect();
    let cut = of_frozen.iter().position(|is| *is).expect("half of it");
    let blocks: Vec<_> = (0..chain.len())
        .map(|i| PutBlock::new(i, filled(i as u32, BLOCK_BYTES).to_vec()))
        .collect();
    let put = client
        .put(&ns, &chain, &blocks, PutOptions::default())
        .await
        .unwrap();
    assert!(put.iter().all(|put| put.outcome == PutOutcome::Cached));
    let whole = client.get(&ns, &chain, None).await.unwrap();
    assert!(whole.iter().all(|got| got.outcome == GetOutcome::Hit));

    gate.close();
    let got = within_awake(SOON, client.get(&ns, &chain, None)).await;
    let got = got.expect("long before its deadline").expect("an answer");
    for (got, of_frozen) in got.iter().zip(&of_frozen) {
        let expected = if *of_frozen {
            GetOutcome::Node
        } else {
            GetOutcome::Hit
        };
        assert_eq!(got.outcome, expected);
    }
    // From then on it is known, and nobody waits for it.
    let quick = Duration::from_millis(400);
    let found = within_awake(quick, client.lookup(&ns, &chain, &LookupOptions::default())).await;
    assert_eq!(found.expect("at once").unwrap().present_blocks, cut as u32);

    gate.open();
    kvtests::patience::until("it is asked again", async || {
        let got = client.get(&ns, &chain, None).await.unwrap();
        got.iter().all(|got| got.outcome == GetOutcome::Hit)
    })
    .await;
    circle.stop().await;
}
