//! Two nodes whose views differ learn from any call between them, gossip or no gossip.

use kvproto::{MemberId, key::RunHash};
use kvtests::{
    circle::{Circle, pretended},
    node::RUN_BLOCKS,
    patience::{eventually, until},
};

fn knows(circle: &Circle, number: usize, id: &str) -> bool {
    let roster = circle.nodes[number].node.cluster().roster();
    roster.view.get(&MemberId::from(id)).is_some()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_gossip_is_cut_learns_from_a_call_to_a_peer() {
    let circle = Circle::start_deaf(2).await;
    circle.acquaint(0..2);
    circle.tell(1, [pretended("n9", "http://127.0.0.1:9")]);
    let mut client = circle.nodes[0].client().await;
    circle.nodes[1].client().await; // opens the namespace there
    assert!(!knows(&circle, 0, "n9"));
    // Prompts that are nowhere: while the change is young, node 0 asks node 1 for those that are its own.
    let mut seeds = 0..1000;
    until("a peer was asked, and has told", async || {
        let chain = client.chain(seeds.next().expect("another"), RUN_BLOCKS);
        assert_eq!(client.present(&chain).await, 0);
        assert_eq!(
            client
                .lookup(&chain, Some(1000))
                .await
                .unwrap()
                .present_blocks,
            0
        );
        knows(&circle, 0, "n9")
    })
    .await;
    let digest = |number: usize| circle.nodes[number].node.cluster().digest();
    assert_eq!(digest(0), digest(1));
    circle.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_hands_over_blocks_learns_from_who_takes_them() {
    let circle = Circle::start_deaf(2).await;
    let mut client = circle.nodes[0].client().await;
    let block = [kvtests::node::filled(1, 1000)];
    for seed in 0..16 {
        let chain = client.chain(seed, 1);
        client
            .put_as(
                &chain,
                &block,
                kvproto::v1::Ack::Cached,
                kvproto::v1::PutOutcome::Cached,
            )
            .await;
    }
    circle.tell(1, [circle.member(0), pretended("n9", "http://127.0.0.1:9")]);
    // Half of its runs are another's now; it hands them over, and hears of the third with the first answer.
    circle.tell(0, [circle.member(1)]);
    eventually("it has learned", || knows(&circle, 0, "n9")).await;
    let roster = circle.nodes[0].node.cluster().roster();
    let run: RunHash = client.chain(0, 1).hashes[0].into();
    assert_eq!(roster.owners(&run, 3).len(), 3);
    circle.stop().await;
}
