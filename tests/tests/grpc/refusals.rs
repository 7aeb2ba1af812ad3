//! What the node refuses: wrong fields, broken rules, too much at once, strangers.

use bytes::Bytes;
use kvproto::{
    hash::MAX_CHAIN_BLOCKS,
    v1::{self, Ack},
};
use kvserver::config::MIB;
use kvtests::{
    node::{RUN_BLOCKS, TestNode, filled},
    patience::eventually,
};
use tonic::{Code, Request};

use crate::reason;

#[tokio::test]
async fn a_chain_of_too_many_blocks_is_refused_with_what_to_do_instead() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let whole = client.chain(1, MAX_CHAIN_BLOCKS as u32 + 2);
    let status = client.lookup(&whole, None).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status)),
        (Code::InvalidArgument, "invalid_field")
    );
    let refusal = whole.validate(RUN_BLOCKS).unwrap_err();
    assert_eq!(
        status.message(),
        refusal.to_string(),
        "as our client says it, unasked"
    );
    for what in ["chain.hashes: has 65538 blocks", "65536", "parent_hash"] {
        assert!(status.message().contains(what), "{}", status.message());
    }

    // What it says works: each part is looked up, and held, by itself.
    let mut present = Vec::new();
    for part in [0..MAX_CHAIN_BLOCKS, MAX_CHAIN_BLOCKS..whole.len()] {
        let part = whole.slice(part, RUN_BLOCKS);
        let blocks = [filled(1, 100), filled(2, 100)];
        client.put(&part, &blocks, Ack::Cached).await.unwrap();
        let found = client.lookup(&part, Some(1000)).await.unwrap();
        assert_eq!(found.lease.unwrap().blocks, 2);
        present.push(found.present_blocks);
    }
    assert_eq!(present, [2, 2]);
    node.stop().await;
}

#[tokio::test]
async fn a_strict_caller_is_refused_another_shape() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let other = kvproto::Namespace::opaque("test", 99, 4);
    let mut asked = v1::OpenNamespaceRequest {
        context: None,
        spec: Some((&other).into()),
        strict: true,
        ..Default::default()
    };
    let status = client
        .client
        .open_namespace(asked.clone())
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), reason(&status)),
        (Code::FailedPrecondition, "namespace_differs")
    );
    assert!(
        status.message().contains("block_tokens was 16, is 99"),
        "{}",
        status.message()
    );
    asked.strict = false;
    let opened = client
        .client
        .open_namespace(asked)
        .await
        .unwrap()
        .into_inner();
    assert_ne!(opened.namespace_id[..], client.namespace.0);
    assert_eq!(opened.difference, "block_tokens was 16, is 99");
    node.stop().await;
}

#[tokio::test]
async fn a_wrong_field_is_named() {
    let node = TestNode::start(|config| config.max_blocks_per_call = 4).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 5);
    let status = client.get(&chain, 0, 0).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status)),
        (Code::InvalidArgument, "invalid_field")
    );
    assert!(
        status.message().starts_with("chain.hashes: 5 blocks"),
        "{}",
        status.message()
    );

    let status = client.get(&client.chain(1, 1), 0, 17).await.unwrap_err();
    assert!(
        status.message().starts_with("piece_bytes: "),
        "{}",
        status.message()
    );

    let blocks: Vec<Bytes> = (0..5).map(|i| filled(i, 100)).collect();
    let status = client.put(&chain, &blocks, Ack::Cached).await.unwrap_err();
    assert!(
        status.message().starts_with("header: is one too many"),
        "{}",
        status.message()
    );

    client.namespace.0[0] ^= 1;
    let status = client.lookup(&chain, None).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status)),
        (Code::NotFound, "unknown_namespace")
    );
    node.stop().await;
}

#[tokio::test]
async fn a_put_that_breaks_the_rules_is_refused_and_leaks_nothing() {
    let node = TestNode::start(|_| {}).await;
    let client = node.client().await;
    let chain = client.chain(1, 2);
    let block = filled(1, 300_000);
    let pieces = client.pieces(&chain, 0, &block, 100_000);
    let first = || client.start(Ack::Cached);
    let twice = v1::PutRequest {
        data: Bytes::from_static(&[1]),
        ..pieces[2].clone()
    };
    let headless = v1::PutRequest {
        header: None,
        ..pieces[0].clone()
    };
    let cases: Vec<(&str, Vec<v1::PutRequest>)> = vec![
        ("start: is missing", vec![pieces[0].clone()]),
        ("start: came twice", vec![first(), first()]),
        ("start: is missing", vec![]),
        ("data: came before any header", vec![first(), headless]),
        (
            "data: block 0 ended after 200000 of 300000 bytes",
            vec![first(), pieces[0].clone(), pieces[1].clone()],
        ),
        (
            "data: block 0 has at least 300001 bytes",
            [vec![first()], pieces.clone(), vec![twice]].concat(),
        ),
        (
            "data: block 0 ended after 100000",
            vec![
                first(),
                pieces[0].clone(),
                client.pieces(&chain, 1, &block, 9_999)[0].clone(),
            ],
        ),
    ];
    for (message, messages) in cases {
        let status = client
            .client
            .clone()
            .put(tokio_stream::iter(messages))
            .await
            .unwrap_err();
        assert_eq!(
            status.code(),
            Code::InvalidArgument,
            "{message}: {status:?}"
        );
        assert!(
            status.message().starts_with(message),
            "{message}: {}",
            status.message()
        );
    }
    // Only the block of the case that was whole before it broke is there.
    let kept = node.node.blocks().engine().stats().blocks;
    assert_eq!(kept, 1);
    assert_eq!(node.arena_bytes(), 300_000_u64.next_multiple_of(4096));
    node.stop().await;
}

#[tokio::test]
async fn a_block_over_the_limit_is_refused_by_its_header() {
    let node = TestNode::start(|config| config.max_block_bytes = MIB).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 1);
    let status = client
        .put(&chain, &[filled(1, (1 << 20) + 1)], Ack::Cached)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().starts_with("header.length_bytes: "),
        "{}",
        status.message()
    );
    node.stop().await;
}

#[tokio::test]
async fn watchers_and_calls_are_bounded() {
    let node = TestNode::start(|config| config.max_watchers = 1).await;
    let mut client = node.client().await;
    let mut first = client
        .client
        .watch(v1::WatchRequest::default())
        .await
        .unwrap()
        .into_inner();
    first.message().await.unwrap();
    let status = client
        .client
        .watch(v1::WatchRequest::default())
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), reason(&status)),
        (Code::ResourceExhausted, "overloaded")
    );
    drop(first);
    let metrics = node.node.blocks().metrics();
    eventually("the seat is free again", || metrics.watchers.get() == 0).await;
    client
        .client
        .watch(v1::WatchRequest::default())
        .await
        .unwrap();
    node.stop().await;
}

#[tokio::test]
async fn the_tenant_comes_from_the_credential() {
    let tokens = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        tokens.path(),
        "red 0123456789abcdef\nblue fedcba9876543210\n",
    )
    .unwrap();
    let node = TestNode::start(|config| config.tokens_file = tokens.path().to_owned()).await;
    let endpoint = tonic::transport::Endpoint::from_shared(node.node.endpoint()).unwrap();
    let mut client = v1::blocks_client::BlocksClient::new(endpoint.connect().await.unwrap());
    let spec = kvproto::Namespace::opaque("test", 16, 4);
    let open = |token: Option<&str>| {
        let mut asked = Request::new(v1::OpenNamespaceRequest {
            context: None,
            spec: Some((&spec).into()),
            ..v1::OpenNamespaceRequest::default()
        });
        if let Some(token) = token {
            asked
                .metadata_mut()
                .insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        asked
    };
    let status = client.open_namespace(open(None)).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status)),
        (Code::Unauthenticated, "unauthenticated")
    );
    assert_eq!(
        client
            .open_namespace(open(Some("wrong")))
            .await
            .unwrap_err()
            .code(),
        Code::Unauthenticated
    );
    let red = client
        .open_namespace(open(Some("0123456789abcdef")))
        .await
        .unwrap()
        .into_inner();
    let blue = client
        .open_namespace(open(Some("fedcba9876543210")))
        .await
        .unwrap()
        .into_inner();
    assert_ne!(red.namespace_id, blue.namespace_id);
    assert_ne!(red.namespace_key, blue.namespace_key);
    // Blue cannot look into red's namespace, even knowing its id.
    let mut asked = Request::new(v1::LookupRequest {
        namespace_id: red.namespace_id,
        chain: Some(v1::Chain {
            hashes: Bytes::from_static(&[1; 32]),
            ..v1::Chain::default()
        }),
        ..v1::LookupRequest::default()
    });
    asked
        .metadata_mut()
        .insert("authorization", "Bearer fedcba9876543210".parse().unwrap());
    assert_eq!(
        client.lookup(asked).await.unwrap_err().code(),
        Code::NotFound
    );
    node.stop().await;
}
