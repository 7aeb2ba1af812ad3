//! Tenants on one node: nobody maps what is another's, and nobody keeps another from having room.

use std::io::Write;

use kvproto::{
    Chain,
    v1::{self, GetOutcome, PutOutcome, Reason, local_request::Call},
};
use kvserver::config::{Capacity, MIB as A_MIB};
use kvtests::{
    local::{Space, pattern},
    node::TestNode,
};
use tempfile::NamedTempFile;

use super::{Client, MIB, got, outcomes, put_one};

const RED: &str = "0123456789abcdef-red";
const BLUE: &str = "0123456789abcdef-blue";

/// 32 MiB in eight segments, two tenants.
async fn two_tenants() -> (TestNode, NamedTempFile) {
    let mut tokens = NamedTempFile::new().expect("a file");
    writeln!(tokens, "red {RED}\nblue {BLUE}").expect("written");
    let path = tokens.path().to_owned();
    let node = TestNode::start(|config| {
        config.tokens_file = path;
        config.ram_bytes = Capacity::Bytes(32 * A_MIB);
        config.max_block_bytes = 4 * A_MIB;
    })
    .await;
    node.node.blocks().arena().wait_ready();
    (node, tokens)
}

fn segments_of(client: &mut Client, space: &Space, chain: &Chain) -> Vec<u32> {
    let answer = client.raw.get(space.get(chain, 0));
    let places = answer
        .blocks
        .iter()
        .map(|block| block.place.expect("a place"));
    let segments = places.map(|place| place.segment).collect();
    let nothing = Call::Nothing(v1::LocalNothing {});
    client
        .raw
        .call_with(&[answer.hold], 0, nothing)
        .expect("done");
    segments
}

#[tokio::test]
async fn a_tenant_maps_its_own_segments_and_no_others() {
    let (node, _tokens) = two_tenants().await;
    let (red, blue) = (
        Space::open(&node.node, "red").await,
        Space::open(&node.node, "blue").await,
    );
    assert_ne!(red.id, blue.id, "the tenant is part of the name");
    let (mut a, mut b) = (Client::new(&node, RED, 1), Client::new(&node, BLUE, 1));
    let (red_chain, _) = put_one(&mut a, &red, 1, MIB);
    let (blue_chain, _) = put_one(&mut b, &blue, 1, MIB);
    let red_segment = segments_of(&mut a, &red, &red_chain)[0];
    let blue_segment = segments_of(&mut b, &blue, &blue_chain)[0];
    assert_ne!(red_segment, blue_segment);

    let all: Vec<u32> = (0..64).collect();
    let mapped: Vec<u32> = a
        .raw
        .map(&all)
        .iter()
        .map(|(segment, _)| segment.segment)
        .collect();
    assert_eq!(mapped, [red_segment]);
    let mapped: Vec<u32> = b
        .raw
        .map(&all)
        .iter()
        .map(|(segment, _)| segment.segment)
        .collect();
    assert_eq!(mapped, [blue_segment]);
    assert!(b.raw.map(&[red_segment, 77]).is_empty());

    let refused = b
        .raw
        .call(Call::Get(red.get(&red_chain, 0)))
        .expect_err("not theirs");
    assert_eq!(refused.reason(), Reason::UnknownNamespace);
    let answer = a.raw.get(red.get(&red_chain, 0));
    assert!(a.read(&red, &answer.blocks[0]).is_ok());
}

#[tokio::test]
async fn a_tenant_finds_room_on_a_node_that_another_has_filled() {
    let (node, _tokens) = two_tenants().await;
    let (red, blue) = (
        Space::open(&node.node, "red").await,
        Space::open(&node.node, "blue").await,
    );
    let (mut a, mut b) = (Client::new(&node, RED, 1), Client::new(&node, BLUE, 1));
    for seed in 0..60 {
        put_one(&mut a, &red, seed, MIB);
    }
    let domains = |node: &TestNode| {
        let segments = node.node.blocks().arena().segments();
        let count = |of: u32| {
            let is_its = |domain: kvgpu::DomainId| domain.0 == of;
            segments
                .iter()
                .filter(|s| s.domain.is_some_and(is_its))
                .count()
        };
        (count(0), count(1))
    };
    assert_eq!(domains(&node), (8, 0), "red has it all");

    // Blue puts and is told to come again until the memory has changed hands; red goes on all the while.
    let bytes = pattern(1, MIB);
    b.staging.write(0, &bytes).expect("inside");
    let mut refused = 0;
    for seed in 0..12 {
        let chain = blue.chain(seed, 1);
        loop {
            let put = blue.put(&[(blue.header(&chain, 0, &bytes), 0)]);
            let result = b.raw.put(put).expect("an answer").remove(0);
            if result.outcome() == PutOutcome::Cached {
                break;
            }
            assert_eq!(outcomes(&[result]), [PutOutcome::Rejected]);
            assert_eq!(result.reason(), Reason::NoSlot);
            assert!(result.retry_after_ms > 0, "coming again helps");
            refused += 1;
            assert!(refused < 100_000, "blue starves");
            put_red(&mut a, &red, 1000 + refused % 50);
        }
    }
    for seed in 100..160 {
        put_red(&mut a, &red, seed);
    }
    let (of_red, of_blue) = domains(&node);
    assert!(of_red >= 2 && of_blue >= 2, "red {of_red}, blue {of_blue}");
    let last = blue.chain(11, 1);
    let answer = b.raw.get(blue.get(&last, 0));
    assert_eq!(got(&answer.blocks), [GetOutcome::Hit]);
    assert!(b.read(&blue, &answer.blocks[0]).as_ref() == Ok(&bytes));
    for segment in segments_of(&mut b, &blue, &last) {
        assert!(a.raw.map(&[segment]).is_empty(), "red sees blue's memory");
    }
}

/// A put of red's, which may have to come again as well.
fn put_red(client: &mut Client, space: &Space, seed: u32) {
    let (chain, bytes) = (space.chain(seed, 1), pattern(seed, MIB));
    client.staging.write(0, &bytes).expect("inside");
    let put = space.put(&[(space.header(&chain, 0, &bytes), 0)]);
    let result = client.raw.put(put).expect("an answer").remove(0);
    let fine = [
        PutOutcome::Cached,
        PutOutcome::Present,
        PutOutcome::Rejected,
    ];
    assert!(fine.contains(&result.outcome()), "{result:?}");
}
