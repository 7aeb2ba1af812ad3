//! Who is let in, for whom, and with how much memory.

use std::{io::Write, os::unix::fs::MetadataExt};

use bytes::Bytes;
use kvproto::v1::{self, Reason, local_reply::Answer, local_request::Call};
use kvserver::config::{SocketMode, UnixSocket};
use kvtests::{
    local::{Raw, Space, attach, pattern},
    node::{BLOCK_TOKENS, RUN_BLOCKS, TestNode},
    patience::eventually,
};

use super::{Client, metric, put_one};

/// Attaches and is refused; the connection must be closed behind the refusal.
fn refusal(node: &TestNode, asked: v1::LocalAttach) -> v1::LocalRefusal {
    let mut raw = Raw::connect(node.node.local_path().expect("on")).expect("a connection");
    let refused = raw
        .call(Call::Attach(asked))
        .expect_err("it is not in order");
    assert!(raw.reply().expect("an end").is_none(), "still open");
    refused
}

#[tokio::test]
async fn callers_are_told_over_grpc_where_the_path_is() {
    let node = TestNode::start(|_| {}).await;
    let mut stock = node.client().await;
    let spec = kvproto::Namespace::opaque("test", BLOCK_TOKENS, RUN_BLOCKS);
    let asked = v1::OpenNamespaceRequest {
        spec: Some((&spec).into()),
        ..v1::OpenNamespaceRequest::default()
    };
    let opened = stock
        .client
        .open_namespace(asked.clone())
        .await
        .expect("a namespace");
    let told = opened.into_inner().local_socket;
    assert_eq!(Some(told.as_ref()), node.node.local_path());
    let mode = std::fs::metadata(&told).expect("a file").mode();
    assert_eq!(mode & 0o777, 0o600);

    let off = TestNode::start(|config| config.local_socket = UnixSocket::Off).await;
    assert_eq!(off.node.local_path(), None);
    let opened = off
        .client()
        .await
        .client
        .open_namespace(asked)
        .await
        .expect("a namespace");
    assert_eq!(opened.into_inner().local_socket, "");
}

#[tokio::test]
async fn what_is_out_of_order_is_refused_by_the_name_of_its_field() {
    let node = TestNode::start(|_| {}).await;
    let boot_id = node.node.blocks().boot_id().0;
    let wrong = [
        (
            v1::LocalAttach {
                version: 2,
                ..attach(1)
            },
            Reason::InvalidField,
            "attach.version",
        ),
        (
            v1::LocalAttach {
                boot_id: boot_id ^ 1,
                ..attach(1)
            },
            Reason::Expired,
            "attach.boot_id",
        ),
        (
            v1::LocalAttach {
                owner_id: Bytes::from_static(b"short"),
                ..attach(1)
            },
            Reason::InvalidField,
            "attach.owner_id",
        ),
        (
            v1::LocalAttach {
                join: Bytes::from_static(b"short"),
                ..attach(1)
            },
            Reason::InvalidField,
            "attach.join",
        ),
        (
            v1::LocalAttach {
                join: Bytes::from_static(&[9; 16]),
                ..attach(1)
            },
            Reason::Expired,
            "attach.join",
        ),
    ];
    for (asked, reason, field) in wrong {
        let refused = refusal(&node, asked);
        assert_eq!(refused.reason(), reason, "{}", refused.message);
        assert!(refused.message.starts_with(field), "{}", refused.message);
    }
    let right = v1::LocalAttach {
        boot_id,
        ..attach(1)
    };
    let mut raw = Raw::connect(node.node.local_path().expect("on")).expect("a connection");
    assert!(matches!(
        raw.call(Call::Attach(right)),
        Ok(Answer::Attached(_))
    ));
    let again = raw
        .call(Call::Attach(attach(1)))
        .expect_err("attached already");
    assert!(again.message.starts_with("attach"), "{}", again.message);
}

#[tokio::test]
async fn a_node_with_tokens_lets_nobody_in_without_one() {
    let mut tokens = tempfile::NamedTempFile::new().expect("a file");
    writeln!(tokens, "red 0123456789abcdef-red").expect("written");
    let path = tokens.path().to_owned();
    let node = TestNode::start(|config| config.tokens_file = path).await;
    for token in ["", "0123456789abcdef-blue", "Bearer 0123456789abcdef-red"] {
        let asked = v1::LocalAttach {
            token: token.to_owned(),
            ..attach(1)
        };
        let refused = refusal(&node, asked);
        assert_eq!(refused.reason(), Reason::Unauthenticated);
        assert!(
            !refused.message.contains("0123456789abcdef"),
            "{}",
            refused.message
        );
    }
    let _welcome = Raw::attached(&node.node, "0123456789abcdef-red", 1, 0);
}

#[tokio::test]
async fn nothing_is_answered_before_an_attach() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let chain = space.chain(1, 1);
    let calls = [
        Call::Map(v1::LocalMap { segments: vec![0] }),
        Call::Lookup(space.lookup(&chain, 0)),
        Call::Get(space.get(&chain, 0)),
        Call::Put(space.put(&[(space.header(&chain, 0, b"x"), 0)])),
        Call::Nothing(v1::LocalNothing {}),
    ];
    for call in calls {
        let mut raw = Raw::connect(node.node.local_path().expect("on")).expect("a connection");
        let refused = raw.call(call).expect_err("not attached");
        assert_eq!(refused.reason(), Reason::Unauthenticated);
        assert!(refused.message.starts_with("attach"), "{}", refused.message);
        assert!(raw.reply().expect("an end").is_none(), "still open");
        assert!(raw.fds.is_empty());
    }
}

#[tokio::test]
async fn connections_of_one_client_share_its_staging_memory_and_others_do_not() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let (mut first, attached) = Raw::attached(&node.node, "", 1, 1 << 20);
    let staging = first.staging();
    let join = |owner| v1::LocalAttach {
        join: attached.attachment.clone(),
        ..attach(owner)
    };

    let mut second = Raw::connect(node.node.local_path().expect("on")).expect("a connection");
    let Ok(Answer::Attached(joined)) = second.call(Call::Attach(join(1))) else {
        panic!("the same owner may join");
    };
    assert_eq!(joined, attached);
    assert!(second.fds.is_empty(), "the memory is known already");
    let (chain, bytes) = (space.chain(1, 1), pattern(1, 5000));
    staging.write(4096, &bytes).expect("inside");
    let results = second.put(space.put(&[(space.header(&chain, 0, &bytes), 4096)]));
    assert!(results.is_ok(), "{results:?}");

    assert_eq!(refusal(&node, join(2)).reason(), Reason::Expired);
    drop((first, second));
    eventually("the memory goes with the last connection", || {
        metric(&node, "terrace_local_staging_bytes") == 0.0
    })
    .await;
    assert_eq!(refusal(&node, join(1)).reason(), Reason::Expired);
}

#[tokio::test]
async fn staging_memory_is_granted_as_far_as_the_node_allows() {
    let node = TestNode::start(|config| {
        config.local_staging_bytes = 1 << 20;
        config.local_staging_total_bytes = 3 << 19;
    })
    .await;
    let (first, a) = Raw::attached(&node.node, "", 1, u64::MAX);
    let (_second, b) = Raw::attached(&node.node, "", 2, 1 << 20);
    let (mut third, c) = Raw::attached(&node.node, "", 3, 1 << 20);
    assert_eq!(
        [a, b, c].map(|attached| attached.staging_bytes),
        [1 << 20, 1 << 19, 0]
    );
    assert!(third.fds.is_empty());
    let space = Space::open(&node.node, "default").await;
    let chain = space.chain(1, 1);
    let refused = third.put(space.put(&[(space.header(&chain, 0, b"x"), 0)]));
    assert!(refused.is_err_and(|refused| refused.message.starts_with("put.blocks.offset")));
    drop(first);
    eventually("what was granted comes back", || {
        metric(&node, "terrace_local_staging_bytes") == f64::from(1 << 19)
    })
    .await;
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let node = TestNode::start(|config| config.local_max_connections = 1).await;
    let (first, _) = Raw::attached(&node.node, "", 1, 0);
    let mut second = Raw::connect(node.node.local_path().expect("on")).expect("a connection");
    let reply = second.reply().expect("words").expect("a refusal");
    let Some(Answer::Refused(refused)) = reply.answer else {
        panic!("{reply:?}");
    };
    assert_eq!(refused.reason(), Reason::Overloaded);
    assert!(
        refused.message.contains("local_max_connections"),
        "{}",
        refused.message
    );
    drop(first);
    eventually("its place is free again", || {
        metric(&node, "terrace_local_connections") == 0.0
    })
    .await;
    let _third = Raw::attached(&node.node, "", 1, 0);
}

#[tokio::test]
async fn the_socket_file_goes_with_the_node_and_a_stale_one_is_replaced() {
    let node = TestNode::start(|config| config.local_socket_mode = SocketMode(0o660)).await;
    let path = node.node.local_path().expect("on").to_owned();
    assert_eq!(
        std::fs::metadata(&path).expect("a file").mode() & 0o777,
        0o660
    );
    let dir = node.stop().await;
    assert!(!path.exists());
    drop(std::os::unix::net::UnixListener::bind(&path).expect("as a killed node leaves it"));
    assert!(path.exists());
    let node = TestNode::start_in(dir, |_| {}).await;
    let mut client = Client::new(&node, "", 1);
    let space = Space::open(&node.node, "default").await;
    put_one(&mut client, &space, 1, 4096);
}
