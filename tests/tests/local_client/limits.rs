//! What does not fit, what is not shown, and what is given up half way.

use std::{io::Write, time::Duration};

use kvclient::{Client, GetOutcome, LocalPath, Path, PutBlock, PutOptions, PutOutcome, Target};
use kvtests::{
    node::{TestNode, filled},
    patience::{HANG, eventually},
};

use crate::{MIB, assert_is_local, builder, chain, get, open, put};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_larger_than_the_staging_memory_goes_through_it_in_turns() {
    let node = TestNode::start(|config| config.local_staging_bytes = 8 << 20).await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 40);
    let data = put(&client, &ns, &chain, &[MIB; 40]).await;
    assert!(get(&client, &ns, &chain, &[MIB; 40]).await == data);
    let report = client.path();
    assert_eq!(
        (
            report.local.put_blocks,
            report.local.got_blocks,
            report.grpc.calls
        ),
        (40, 40, 0),
        "{report:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_larger_than_the_staging_memory_goes_over_grpc_and_comes_back_local() {
    let node = TestNode::start(|config| config.local_staging_bytes = 1 << 20).await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 2);
    let lengths = [MIB + 1, 1000];
    let data = put(&client, &ns, &chain, &lengths).await;
    assert!(get(&client, &ns, &chain, &lengths).await == data);
    assert_is_local(&client);
    let report = client.path();
    assert!(report.grpc.put_blocks >= 1, "{report:?}");
    assert_eq!(report.local.got_blocks, 2, "{report:?}");
    assert_eq!(report.failures, 0, "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_staging_memory_is_read_from_and_put_to_over_grpc() {
    let node = TestNode::start(|config| config.local_staging_bytes = 0).await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 3);
    let data = put(&client, &ns, &chain, &[MIB; 3]).await;
    assert!(get(&client, &ns, &chain, &[MIB; 3]).await == data);
    let report = client.path();
    assert_eq!(
        (report.grpc.put_blocks, report.local.got_blocks),
        (3, 3),
        "{report:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn puts_given_up_at_any_moment_harm_no_later_one() {
    let node = TestNode::start(|config| config.local_staging_bytes = 8 << 20).await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let datas: Vec<_> = (0..4).map(|i| filled(i, MIB)).collect();
    for seed in 0..40 {
        let chain = chain(&ns, seed, 4);
        let blocks: Vec<_> = datas
            .iter()
            .enumerate()
            .map(|(i, data)| PutBlock::new(i, data.clone()))
            .collect();
        let whole = client.put(&ns, &chain, &blocks, PutOptions::default());
        // Polled a few times more each round, then dropped.
        let mut polls = seed % 8;
        let mut whole = Box::pin(whole);
        std::future::poll_fn(|context| {
            if polls == 0 || whole.as_mut().poll(context).is_ready() {
                return std::task::Poll::Ready(());
            }
            polls -= 1;
            std::task::Poll::Pending
        })
        .await;
        drop(whole);
        let results = client
            .put(&ns, &chain, &blocks, PutOptions::default())
            .await
            .unwrap();
        assert!(
            results
                .iter()
                .all(|r| r.outcome != PutOutcome::Corrupt && r.is_kept()),
            "{results:?}"
        );
        let fetched = client.get(&ns, &chain, None).await.unwrap();
        for (fetched, data) in fetched.iter().zip(&datas) {
            let outcome = fetched.outcome;
            assert!(
                fetched.bytes.as_ref() == Some(data),
                "{outcome} in round {seed}: {:?}",
                client.path()
            );
        }
        client.invalidate(&ns, Target::All).await.unwrap();
    }
    assert_eq!(client.path().failures, 0);
    assert!(client.path().local.put_blocks > 40, "{:?}", client.path());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_share_a_node_and_see_nothing_of_each_other() {
    let mut tokens = tempfile::NamedTempFile::new().unwrap();
    writeln!(
        tokens,
        "red 0123456789abcdef-red\nblue 0123456789abcdef-blue"
    )
    .unwrap();
    let path = tokens.path().to_owned();
    let node = TestNode::start(|config| {
        config.tokens_file = path;
        config.segment_bytes = 16 << 20; // enough of them that each tenant has its own
    })
    .await;
    let [red, blue] = ["red", "blue"].map(|name| format!("0123456789abcdef-{name}"));
    let red = builder(&node).token(red).connect().await.unwrap();
    let blue = builder(&node).token(blue).connect().await.unwrap();
    let (in_red, in_blue) = (open(&red).await, open(&blue).await);
    assert_ne!(in_red.id(), in_blue.id());
    let lengths = [MIB; 4];
    let data = put(&red, &in_red, &chain(&in_red, 1, 4), &lengths).await;
    let fetched = blue
        .get(&in_blue, &chain(&in_blue, 1, 4), None)
        .await
        .unwrap();
    assert!(
        fetched
            .iter()
            .all(|block| block.outcome == GetOutcome::Miss)
    );
    put(&blue, &in_blue, &chain(&in_blue, 1, 4), &lengths).await;
    for (client, ns) in [(&red, &in_red), (&blue, &in_blue)] {
        assert!(get(client, ns, &chain(ns, 1, 4), &lengths).await == data);
        assert_is_local(client);
    }
    // A handle of red's in blue's hands is no key to red's blocks.
    let stolen = blue.get(&in_red, &chain(&in_red, 1, 4), None).await;
    assert!(
        !matches!(&stolen, Ok(blocks) if blocks.iter().any(|b| b.bytes.is_some())),
        "{stolen:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_that_is_not_there_or_not_the_nodes_is_reported_and_gone_around() {
    let (node, other) = (TestNode::start(|_| {}).await, TestNode::start(|_| {}).await);
    let missing = node.dir.path().join("nothing.sock");
    let others = other.node.local_path().unwrap().to_owned();
    for socket in [missing, others] {
        let client = Client::builder(&node.node.endpoint()).local(LocalPath::At(socket));
        let client = client.connect().await.unwrap();
        let ns = open(&client).await;
        let chain = chain(&ns, 1, 2);
        client.invalidate(&ns, Target::All).await.unwrap();
        let data = put(&client, &ns, &chain, &[MIB; 2]).await;
        assert!(get(&client, &ns, &chain, &[MIB; 2]).await == data);
        let report = client.path();
        assert_eq!(
            (report.path, report.local.calls),
            (Path::Grpc, 0),
            "{report:?}"
        );
        assert!(report.why_grpc.is_some_and(|why| !why.is_empty()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_is_read_when_it_is_wanted_and_not_after_it_was_let_go() {
    let node = TestNode::start(|_| {}).await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 3);
    let data = put(&client, &ns, &chain, &[MIB, 5000, 70_000]).await;
    let held = client.hold(&ns, &chain, None).await.unwrap().unwrap();
    assert_eq!((held.len(), held.block(1).unwrap().0), (3, 5000));
    // What is held outlives its own invalidation, whole.
    client.invalidate(&ns, Target::All).await.unwrap();
    for (i, bytes) in data.iter().enumerate() {
        let mut into = vec![0; bytes.len()];
        assert_eq!(held.read(i, &mut into).unwrap(), GetOutcome::Hit);
        assert!(into == *bytes, "block {i}");
    }
    assert!(held.read(0, &mut [0; 10]).is_err(), "too short a buffer");
    assert!(node.arena_bytes() > 0);
    drop(held);
    eventually("what was let go is free", || node.arena_bytes() == 0).await;
    let gone = client.hold(&ns, &chain, None).await.unwrap().unwrap();
    assert_eq!(gone.outcome(0), GetOutcome::Invalidated);
    assert_eq!(gone.block(0), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_may_be_let_go_on_a_thread_without_a_runtime() {
    let node = TestNode::start(|config| config.local_hold = HANG * 4).await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 2);
    put(&client, &ns, &chain, &[MIB; 2]).await;
    let held = client.hold(&ns, &chain, None).await.unwrap().unwrap();
    client.invalidate(&ns, Target::All).await.unwrap();
    std::thread::spawn(move || drop(held)).join().unwrap();
    eventually("what was let go is free", || node.arena_bytes() == 0).await;
    assert_is_local(&client);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holds_leave_a_link_to_the_calls() {
    let node = TestNode::start(|_| {}).await;
    let client = builder(&node).lanes(3).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 2);
    let data = put(&client, &ns, &chain, &[MIB; 2]).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(client.hold(&ns, &chain, None).await.unwrap().unwrap());
    }
    let hurried = client.with_deadline(Duration::from_millis(100));
    assert!(hurried.hold(&ns, &chain, None).await.unwrap().is_none());
    let before = client.path().grpc.calls;
    assert!(get(&client, &ns, &chain, &[MIB; 2]).await == data);
    let report = client.path();
    assert_eq!((report.grpc.calls, report.failures), (before, 0));
    assert_is_local(&client);
    held.pop();
    assert!(client.hold(&ns, &chain, None).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_get_that_does_not_fit_its_buffer_holds_nothing_afterwards() {
    let node = TestNode::start(|config| config.local_hold = HANG * 4).await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 2);
    put(&client, &ns, &chain, &[MIB; 2]).await;
    let (mut whole, mut short) = (vec![0; MIB], vec![0; 10]);
    let mut buffers = [&mut whole[..], &mut short[..]];
    let refused = client.get_into(&ns, &chain, None, &mut buffers).await;
    assert!(refused.is_err(), "{refused:?}");
    client.invalidate(&ns, Target::All).await.unwrap();
    eventually("what did not fit is free", || node.arena_bytes() == 0).await;
    assert_is_local(&client);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_in_a_hurry_costs_nobody_the_path() {
    let node = TestNode::start(|_| {}).await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 8);
    put(&client, &ns, &chain, &[MIB; 8]).await;
    for ms in 1..30 {
        let hurried = client.with_deadline(Duration::from_millis(ms));
        // What becomes of it is the caller's affair.
        let _ = hurried.get(&ns, &chain, None).await;
    }
    assert_eq!(client.path().failures, 0, "{:?}", client.path());
    assert_is_local(&client);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_room_for_one_more_connection_keeps_the_one_there_is() {
    let node = TestNode::start(|config| config.local_max_connections = 1).await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 2);
    let data = put(&client, &ns, &chain, &[MIB; 2]).await;
    let held = client.hold(&ns, &chain, None).await.unwrap().unwrap();
    for _ in 0..20 {
        assert!(get(&client, &ns, &chain, &[MIB; 2]).await == data);
    }
    let report = client.path();
    assert_eq!(
        (report.grpc.got_blocks, report.local.got_blocks),
        (40, 0),
        "{report:?}"
    );
    assert_eq!(report.failures, 0, "{report:?}");
    drop(held);
    assert!(get(&client, &ns, &chain, &[MIB; 2]).await == data);
    assert_eq!(client.path().local.got_blocks, 2);
    assert_is_local(&client);
}
