//! Reading without a lease: what is read stays in its slot until the reader is done, or late.

use std::time::Duration;

use kvproto::{
    Chain,
    convert::request::Target,
    v1::{self, GetOutcome, local_request::Call},
};
use kvserver::engine::TenantId;
use kvtests::{local::Space, node::TestNode, patience::eventually};

use super::{Client, MIB, got, metric, put_one};

async fn forget(node: &TestNode, space: &Space) {
    let blocks = node.node.blocks();
    blocks
        .invalidate(TenantId(0), space.id, Target::All)
        .await
        .expect("forgotten");
}

fn done(client: &mut Client, holds: &[u64]) {
    let nothing = Call::Nothing(v1::LocalNothing {});
    client.raw.call_with(holds, 0, nothing).expect("an answer");
}

#[tokio::test]
async fn a_held_block_stays_in_its_slot_until_its_reader_is_done() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (chain, _) = put_one(&mut client, &space, 1, MIB);
    let answer = client.raw.get(space.get(&chain, 0));
    forget(&node, &space).await;
    assert_eq!(node.arena_bytes(), MIB as u64, "held");
    assert!(client.read(&space, &answer.blocks[0]).is_ok());
    assert_eq!(metric(&node, "terrace_local_holds"), 1.0);
    assert_eq!(metric(&node, "terrace_local_held_bytes"), MIB as f64);

    done(&mut client, &[answer.hold, answer.hold, 77]);
    assert_eq!(node.arena_bytes(), 0, "let go");
    assert_eq!(
        client.read(&space, &answer.blocks[0]),
        Err("its slot has another tenant")
    );
    assert_eq!(metric(&node, "terrace_local_holds"), 0.0);
    assert_eq!(metric(&node, "terrace_local_held_bytes"), 0.0);
}

#[tokio::test]
async fn a_call_is_in_the_queue_that_its_answer_tells_of() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (chain, _) = put_one(&mut client, &space, 1, MIB);
    for lease in [0, 1] {
        let answer = client.raw.get(space.get(&chain, lease));
        assert_eq!(answer.context.expect("a context").queue, 1);
    }
    let in_flight = || metric(&node, "terrace_local_calls_in_flight");
    eventually("it is over", || in_flight() == 0.0).await;
    assert_eq!(node.node.blocks().queue(), 0);
}

#[tokio::test]
async fn a_hold_ends_by_time_even_if_its_reader_says_nothing() {
    let node = TestNode::start(|config| config.local_hold = Duration::from_millis(30)).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (chain, _) = put_one(&mut client, &space, 1, MIB);
    let answer = client.raw.get(space.get(&chain, 0));
    assert_ne!(answer.hold, 0);
    forget(&node, &space).await;
    eventually("the slot is free", || node.arena_bytes() == 0).await;
    assert_eq!(
        client.read(&space, &answer.blocks[0]),
        Err("its slot has another tenant")
    );
    assert_eq!(metric(&node, "terrace_local_holds_expired_total"), 1.0);
    // The connection is none the worse for it.
    put_one(&mut client, &space, 2, MIB);
}

#[tokio::test]
async fn a_hold_ends_by_time_even_while_its_reader_sends_byte_by_byte() {
    let node = TestNode::start(|config| config.local_hold = Duration::from_millis(100)).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (chain, _) = put_one(&mut client, &space, 1, MIB);
    assert_ne!(client.raw.get(space.get(&chain, 0)).hold, 0);
    forget(&node, &space).await;
    let frame = 1_u32 << 20;
    client.raw.send(&frame.to_le_bytes()).expect("its length");
    eventually("the slot is free", || {
        client.raw.send(&[0]).expect("one byte more");
        node.arena_bytes() == 0
    })
    .await;
}

#[tokio::test]
async fn holds_draw_on_their_owners_lease_budget() {
    // 2 % of 64 MiB: one block of a MiB, not two.
    let node = TestNode::start(|config| config.lease_owner_percent = 2).await;
    let space = Space::open(&node.node, "default").await;
    let (mut client, mut other) = (Client::new(&node, "", 1), Client::new(&node, "", 2));
    let chain = space.chain(1, 2);
    client.put_chain(&space, &chain, MIB);

    let answer = client.raw.get(space.get(&chain, 0));
    assert_eq!(
        got(&answer.blocks),
        [GetOutcome::Hit, GetOutcome::Overloaded]
    );
    for source in ["ram", "rejected"] {
        let name = format!("terrace_get_blocks_total{{source=\"{source}\"}}");
        assert_eq!(metric(&node, &name), 1.0, "{source}: as it was answered");
    }
    assert!(
        client.raw.lookup(space.lookup(&chain, 0)).lease.is_none(),
        "nothing is left to lease"
    );
    let theirs = other.raw.get(space.get(&chain, 0));
    assert_eq!(
        got(&theirs.blocks),
        [GetOutcome::Hit, GetOutcome::Overloaded],
        "a budget of its own"
    );

    done(&mut client, &[answer.hold]);
    let lease = client
        .raw
        .lookup(space.lookup(&chain, 0))
        .lease
        .expect("room again");
    assert_eq!(lease.blocks, 1);
    let answer = client.raw.get(space.get(&chain, lease.id));
    assert_eq!(
        got(&answer.blocks),
        [GetOutcome::Hit, GetOutcome::Overloaded]
    );
    assert_eq!(answer.hold, 0, "the lease keeps the one it covers");
}

#[tokio::test]
async fn a_lease_keeps_what_it_covers_and_a_hold_the_rest() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let chain = space.chain(1, 4);
    client.put_chain(&space, &chain, 100_000);
    let head = Chain::from_root(chain.hashes[..2].to_vec());
    let lease = client
        .raw
        .lookup(space.lookup(&head, 60_000))
        .lease
        .expect("a lease");
    let answer = client.raw.get(space.get(&chain, lease.id));
    assert_eq!(got(&answer.blocks), [GetOutcome::Hit; 4]);
    assert_ne!(answer.hold, 0);
    // Two blocks of 100 000 bytes in slots of whole pages.
    assert_eq!(metric(&node, "terrace_local_held_bytes"), 2.0 * 102_400.0);
}

#[tokio::test]
async fn a_reader_that_is_never_done_keeps_no_more_than_its_share() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (chain, _) = put_one(&mut client, &space, 1, 4096);
    for _ in 0..400 {
        let answer = client.raw.get(space.get(&chain, 0));
        assert_eq!(got(&answer.blocks), [GetOutcome::Hit]);
    }
    assert_eq!(metric(&node, "terrace_local_holds"), 256.0);
}
