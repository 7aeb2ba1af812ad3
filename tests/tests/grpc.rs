//! The gRPC service as a stranger meets it: a stock client, a hostile one, one that vanishes.

use std::time::Duration;

use bytes::Bytes;
use kvproto::{OwnerId, convert, v1};
use kvserver::config::{Capacity, MIB};
use kvtests::{
    node::{Stock, TestNode, filled},
    patience::{HANG, eventually},
};
use tonic::{Code, Request, Status};
use v1::{Ack, GetOutcome, PutOutcome, invalidate_request::Target, watch_response::Event};

fn reason(status: &Status) -> &str {
    status
        .metadata()
        .get("terrace-reason")
        .map_or("", |value| value.to_str().unwrap_or(""))
}

fn outcomes(results: &[v1::PutResult]) -> Vec<PutOutcome> {
    results.iter().map(v1::PutResult::outcome).collect()
}

/// Blocks of every awkward length: one byte, around a page, around a piece.
fn awkward() -> Vec<Bytes> {
    let lengths = [
        1,
        4095,
        65_536,
        65_537,
        1 << 20,
        (1 << 20) + 3,
        (5 << 20) - 1,
    ];
    lengths
        .iter()
        .enumerate()
        .map(|(i, len)| filled(i as u32, *len))
        .collect()
}

#[tokio::test]
async fn a_stock_client_gets_back_what_it_put() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let blocks = awkward();
    let chain = client.chain(1, blocks.len() as u32);
    let results = client.put(&chain, &blocks, Ack::Cached).await.unwrap();
    assert_eq!(outcomes(&results), vec![PutOutcome::Cached; blocks.len()]);
    for piece_bytes in [0, 4096, 65_000, 4 << 20] {
        let got = client.get(&chain, 0, piece_bytes).await.unwrap();
        assert_eq!(got.len(), blocks.len());
        for (i, ((outcome, bytes), sent)) in got.iter().zip(&blocks).enumerate() {
            assert_eq!(*outcome, GetOutcome::Hit, "block {i}");
            assert!(bytes == sent, "block {i} in pieces of {piece_bytes}");
        }
    }
    node.stop().await;
}

#[tokio::test]
async fn pieces_of_a_put_may_be_cut_anywhere() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let blocks = [filled(1, 200_000), filled(2, 65_536)];
    let chain = client.chain(1, 2);
    let mut messages = vec![client.start(Ack::Cached)];
    messages.extend(client.pieces(&chain, 0, &blocks[0], 777));
    messages.extend(client.pieces(&chain, 1, &blocks[1], 65_535));
    let answer = client
        .client
        .put(tokio_stream::iter(messages))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(outcomes(&answer.results), vec![PutOutcome::Cached; 2]);
    let got = client.get(&chain, 0, 0).await.unwrap();
    assert!(
        got.iter()
            .zip(&blocks)
            .all(|((_, bytes), sent)| bytes == sent)
    );
    node.stop().await;
}

#[tokio::test]
async fn the_same_block_twice_is_present_and_changed_bytes_are_corrupt() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 2);
    let block = [filled(1, 100_000)];
    client.put(&chain, &block, Ack::Cached).await.unwrap();
    let again = client.put(&chain, &block, Ack::Cached).await.unwrap();
    assert_eq!(outcomes(&again), [PutOutcome::Present]);

    let mut message = client
        .pieces(&chain, 1, &filled(2, 100_000), 1 << 20)
        .remove(0);
    let mut bytes = message.data.to_vec();
    bytes[70_000] ^= 1;
    message.data = bytes.into();
    let messages = vec![client.start(Ack::Cached), message];
    let answer = client
        .client
        .put(tokio_stream::iter(messages))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(outcomes(&answer.results), [PutOutcome::Corrupt]);
    assert_eq!(client.lookup(&chain, None).await.unwrap().present_blocks, 1);
    node.stop().await;
}

#[tokio::test]
async fn a_lookup_answers_the_prefix_and_leases_it() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 6);
    let blocks: Vec<Bytes> = (0..4).map(|i| filled(i, 10_000)).collect();
    client.put(&chain, &blocks, Ack::Cached).await.unwrap();

    let probe = client.lookup(&chain, None).await.unwrap();
    assert_eq!((probe.present_blocks, probe.lease), (4, None));
    let found = client.lookup(&chain, Some(50_000)).await.unwrap();
    let lease = found.lease.expect("a lease on what is present");
    assert_eq!(
        (found.present_blocks, lease.blocks, lease.ttl_ms),
        (4, 4, 50_000)
    );
    assert_eq!(
        found.tiers,
        [v1::TierRun {
            blocks: 4,
            tier: v1::Tier::Ram as i32
        }]
    );

    let got = client.get(&chain, lease.id, 0).await.unwrap();
    let expected = [
        GetOutcome::Hit,
        GetOutcome::Hit,
        GetOutcome::Hit,
        GetOutcome::Hit,
    ];
    assert_eq!(
        got.iter().map(|(outcome, _)| *outcome).collect::<Vec<_>>()[..4],
        expected
    );
    assert_eq!(got[4].0, GetOutcome::Miss);

    let renew = v1::RenewRequest {
        context: None,
        lease_id: lease.id,
        ttl_ms: 70_000,
    };
    let renewed = client
        .client
        .renew(renew.clone())
        .await
        .unwrap()
        .into_inner();
    assert!(renewed.renewed);
    assert_eq!(renewed.ttl_ms, 70_000);
    let release = v1::ReleaseRequest {
        context: None,
        lease_id: lease.id,
    };
    assert!(
        client
            .client
            .release(release.clone())
            .await
            .unwrap()
            .into_inner()
            .released
    );
    assert!(
        !client
            .client
            .release(release)
            .await
            .unwrap()
            .into_inner()
            .released
    );
    assert!(
        !client
            .client
            .renew(renew)
            .await
            .unwrap()
            .into_inner()
            .renewed
    );
    let got = client.get(&chain, lease.id, 0).await.unwrap();
    assert_eq!(got[0].0, GetOutcome::Expired);
    node.stop().await;
}

#[tokio::test]
async fn a_repeated_lookup_answers_the_same_lease() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 1);
    client
        .put(&chain, &[filled(1, 10_000)], Ack::Cached)
        .await
        .unwrap();
    let asked = v1::LookupRequest {
        namespace_id: Bytes::copy_from_slice(&client.namespace.0),
        chain: Some(convert::chain_to_wire(&chain)),
        idempotency_key: Bytes::from_static(&[7; 16]),
        ..v1::LookupRequest::default()
    };
    let first = client
        .client
        .lookup(asked.clone())
        .await
        .unwrap()
        .into_inner();
    let second = client.client.lookup(asked).await.unwrap().into_inner();
    assert_eq!(first.lease.unwrap().id, second.lease.unwrap().id);
    node.stop().await;
}

#[tokio::test]
async fn what_is_invalidated_is_gone_by_block_prefix_and_namespace() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 6);
    let blocks: Vec<Bytes> = (0..6).map(|i| filled(i, 5_000)).collect();
    client.put(&chain, &blocks, Ack::Cached).await.unwrap();
    let hash = |i: usize| Bytes::copy_from_slice(&chain.hashes[i].0);

    assert_eq!(client.invalidate(Target::Hash(hash(5))).await.unwrap(), 1);
    assert_eq!(client.lookup(&chain, None).await.unwrap().present_blocks, 5);
    assert_eq!(
        client
            .invalidate(Target::PrefixHash(hash(2)))
            .await
            .unwrap(),
        3
    );
    assert_eq!(client.lookup(&chain, None).await.unwrap().present_blocks, 2);
    assert_eq!(
        client.get(&chain, 0, 0).await.unwrap()[2].0,
        GetOutcome::Invalidated
    );
    assert_eq!(client.invalidate(Target::All(true)).await.unwrap(), 2);
    assert_eq!(client.lookup(&chain, None).await.unwrap().present_blocks, 0);
    // Forgotten is not forbidden.
    client.put(&chain, &blocks[..1], Ack::Cached).await.unwrap();
    assert_eq!(client.lookup(&chain, None).await.unwrap().present_blocks, 1);
    node.stop().await;
}

#[tokio::test]
async fn a_watcher_hears_what_comes_and_goes() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let asked = v1::WatchRequest {
        context: None,
        namespace_id: Bytes::copy_from_slice(&client.namespace.0),
    };
    let mut events = client.client.watch(asked).await.unwrap().into_inner();
    let first = events
        .message()
        .await
        .unwrap()
        .expect("the first message comes at once");
    assert!(first.context.is_some() && first.event.is_none());

    let chain = client.chain(1, 1);
    client
        .put(&chain, &[filled(1, 10_000)], Ack::Cached)
        .await
        .unwrap();
    client.invalidate(Target::All(true)).await.unwrap();
    let stored = events.message().await.unwrap().unwrap();
    let removed = events.message().await.unwrap().unwrap();
    assert_eq!(
        (stored.sequence, removed.sequence),
        (first.sequence + 1, first.sequence + 2)
    );
    let Some(Event::Stored(stored)) = stored.event else {
        panic!("{stored:?}")
    };
    assert_eq!(stored.hash[..], chain.hashes[0].0);
    assert_eq!(stored.length_bytes, 10_000);
    let Some(Event::Removed(removed)) = removed.event else {
        panic!("{removed:?}")
    };
    assert_eq!(removed.reason(), v1::Reason::Invalidated);
    node.stop().await;
}

#[tokio::test]
async fn stats_and_counters_tell_what_was_done() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 3);
    client
        .put(&chain, &[filled(1, 10_000), filled(2, 10_000)], Ack::Cached)
        .await
        .unwrap();
    client.lookup(&chain, Some(60_000)).await.unwrap();
    client.get(&chain, 0, 0).await.unwrap();
    let stats = client.stats().await.unwrap();
    assert_eq!(
        (stats.leases, stats.namespaces, stats.connections),
        (1, 1, 1)
    );
    assert_eq!(stats.tiers[0].tier(), v1::Tier::Ram);
    assert_eq!(stats.tiers[0].blocks, 2);
    let value = |name: &str| {
        stats
            .counters
            .iter()
            .find(|c| c.name == name)
            .map_or(-1.0, |c| c.value)
    };
    assert_eq!(value("terrace_get_blocks_asked_total"), 3.0);
    assert_eq!(value("terrace_get_blocks_total{source=\"ram\"}"), 2.0);
    assert_eq!(value("terrace_get_blocks_total{source=\"miss\"}"), 1.0);
    assert_eq!(value("terrace_get_bytes_total"), 20_000.0);
    assert_eq!(value("terrace_put_blocks_total{outcome=\"cached\"}"), 2.0);
    node.stop().await;
}

#[tokio::test]
async fn the_unix_socket_speaks_the_same() {
    let node = TestNode::start(|_| {}).await;
    let path = node.node.uds_path().expect("a socket").to_owned();
    let mut client = Stock::open(&format!("unix:{}", path.display())).await;
    let blocks = awkward();
    let chain = client.chain(1, blocks.len() as u32);
    client.put(&chain, &blocks, Ack::Cached).await.unwrap();
    let got = client.get(&chain, 0, 0).await.unwrap();
    assert!(
        got.iter()
            .zip(&blocks)
            .all(|((_, bytes), sent)| bytes == sent)
    );
    node.stop().await;
    assert!(!path.exists(), "a stopped node takes its socket away");
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
async fn a_bare_client_cannot_omit_the_deadline() {
    let node = TestNode::start(|config| {
        config.call_deadline = Duration::from_millis(100);
        config.call_max_deadline = Duration::from_millis(200);
        config.watch_max_lifetime = Duration::from_millis(100);
    })
    .await;
    // Without a namespace: opening one would have to be done in the same 100 ms.
    let endpoint = tonic::transport::Endpoint::from_shared(node.node.endpoint()).unwrap();
    let mut client = v1::blocks_client::BlocksClient::new(endpoint.connect().await.unwrap());
    let (keep, never) = tokio::sync::mpsc::channel::<v1::PutRequest>(1);
    let stream = tokio_stream::wrappers::ReceiverStream::new(never);
    let status = client.put(stream).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status)),
        (Code::DeadlineExceeded, "deadline")
    );
    drop(keep);

    // Asking for an hour is cut to the node's longest.
    let (keep, never) = tokio::sync::mpsc::channel::<v1::PutRequest>(1);
    let mut asked = Request::new(tokio_stream::wrappers::ReceiverStream::new(never));
    asked.set_timeout(Duration::from_secs(3600));
    let status = client.put(asked).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    drop(keep);

    // A slow machine may use the time up before the first message.
    let status = match client.watch(v1::WatchRequest::default()).await {
        Ok(events) => {
            let mut events = events.into_inner();
            loop {
                match events.message().await {
                    Ok(event) => assert!(event.is_some(), "a watch never ends in good order"),
                    Err(status) => break status,
                }
            }
        }
        Err(status) => status,
    };
    assert_eq!(
        (status.code(), reason(&status)),
        (Code::DeadlineExceeded, "deadline")
    );
    node.stop().await;
}

#[tokio::test]
async fn a_reader_that_sleeps_is_cut_and_holds_no_block() {
    let node = TestNode::start(|config| config.max_block_bytes = 8 * MIB).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 1);
    client
        .put(&chain, &[filled(1, 4 << 20)], Ack::Cached)
        .await
        .unwrap();
    let key = client.header(&chain, 0, &filled(1, 4 << 20)).key;

    // A client that gives the stream no room and never reads.
    let socket = tokio::net::TcpStream::connect(node.node.grpc_addr())
        .await
        .unwrap();
    let (send, connection) = h2::client::Builder::new()
        .initial_window_size(16 << 10)
        .handshake::<_, Bytes>(socket)
        .await
        .unwrap();
    let driver = tokio::spawn(connection);
    let asked = v1::GetRequest {
        namespace_id: Bytes::copy_from_slice(&client.namespace.0),
        chain: Some(convert::chain_to_wire(&chain)),
        ..v1::GetRequest::default()
    };
    let mut send = send.ready().await.unwrap();
    let mut get = call("Get");
    get.headers_mut()
        .insert("grpc-timeout", "200m".parse().unwrap());
    let (response, mut body) = send.send_request(get, false).unwrap();
    body.send_data(kvproto::frame::head(&asked, 0), true)
        .unwrap();
    let response = response.await;
    let held = || {
        node.node
            .blocks()
            .get_ref(&key, None)
            .map_or(0, |block| block.strong_count())
    };
    let at_rest = 3; // index, policy and this look at it
    eventually("the stream is cut and lets go of the block", || {
        held() == at_rest
    })
    .await;
    drop(response);
    driver.abort();
    node.stop().await;
}

fn call(method: &str) -> http::Request<()> {
    http::Request::post(format!("http://node/terrace.v1.Blocks/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

/// Sends bytes as the body of a call and answers its status.
async fn raw(node: &TestNode, method: &str, chunks: Vec<Bytes>) -> Status {
    let socket = tokio::net::TcpStream::connect(node.node.grpc_addr())
        .await
        .unwrap();
    let (send, connection) = h2::client::handshake(socket).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut send = send.ready().await.unwrap();
    let (response, mut body) = send.send_request(call(method), false).unwrap();
    for chunk in chunks {
        // The node may have answered already.
        if body.send_data(chunk, false).is_err() {
            break;
        }
    }
    let _ = body.send_data(Bytes::new(), true);
    let (head, mut body) = response.await.unwrap().into_parts();
    let mut status = Status::from_header_map(&head.headers);
    while status.is_none() {
        match body.data().await {
            Some(Ok(_)) => {}
            _ => break,
        }
    }
    if status.is_none() {
        let trailers = body.trailers().await.unwrap().unwrap_or_default();
        status = Status::from_header_map(&trailers);
    }
    driver.abort();
    status.expect("every call ends with a status")
}

#[tokio::test]
async fn hostile_bytes_get_a_precise_status() {
    let node = TestNode::start(|config| config.max_message_bytes = 64 << 10).await;
    let bytes = |bytes: &'static [u8]| vec![Bytes::from_static(bytes)];
    let cases = [
        ("Get", bytes(&[]), Code::InvalidArgument),
        ("Get", bytes(&[0, 0, 0, 0, 9, 1]), Code::InvalidArgument),
        ("Get", bytes(&[1, 0, 0, 0, 1, 1]), Code::Unimplemented),
        (
            "Get",
            bytes(&[0, 0, 0, 0, 2, 0xff, 0xff]),
            Code::InvalidArgument,
        ),
        (
            "Get",
            vec![Bytes::from(vec![0; 100_000])],
            Code::ResourceExhausted,
        ),
        ("Put", bytes(&[]), Code::InvalidArgument),
        ("Put", bytes(&[0, 0, 0]), Code::InvalidArgument),
        ("Put", bytes(&[1, 0, 0, 0, 1, 1]), Code::Unimplemented),
        (
            "Put",
            bytes(&[0, 0xff, 0xff, 0xff, 0xff, 1]),
            Code::ResourceExhausted,
        ),
        (
            "Put",
            bytes(&[0, 0, 0, 0, 3, 0x7a, 0x7f, 1]),
            Code::InvalidArgument,
        ),
        (
            "Put",
            bytes(&[0, 0, 0, 0, 2, 0x7b, 0]),
            Code::InvalidArgument,
        ),
        (
            "Lookup",
            bytes(&[0, 0, 0, 0, 2, 0xff, 0xff]),
            Code::Internal,
        ),
        ("Nothing", bytes(&[]), Code::Unimplemented),
    ];
    for (method, chunks, code) in cases {
        let status = raw(&node, method, chunks.clone()).await;
        assert_eq!(
            status.code(),
            code,
            "{method} {:?}: {status:?}",
            &chunks[0][..chunks[0].len().min(8)]
        );
        assert!(!status.message().is_empty());
    }
    // The node is none the worse for it.
    let mut client = node.client().await;
    assert_eq!(
        client
            .lookup(&client.chain(1, 1), None)
            .await
            .unwrap()
            .present_blocks,
        0
    );
    assert_eq!(node.arena_bytes(), 0);
    node.stop().await;
}

#[tokio::test]
async fn the_health_service_says_serving() {
    let node = TestNode::start(|_| {}).await;
    let socket = tokio::net::TcpStream::connect(node.node.grpc_addr())
        .await
        .unwrap();
    let (send, connection) = h2::client::handshake(socket).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut send = send.ready().await.unwrap();
    let mut asked = call("");
    *asked.uri_mut() = "http://node/grpc.health.v1.Health/Check".parse().unwrap();
    let (response, mut body) = send.send_request(asked, false).unwrap();
    body.send_data(Bytes::from_static(&[0; 5]), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    let answer = body.data().await.unwrap().unwrap();
    assert_eq!(answer[..], [0, 0, 0, 0, 2, 8, 1], "status 1 is SERVING");
    driver.abort();
    node.stop().await;
}

#[tokio::test]
async fn a_dropped_node_lets_go_of_its_folder() {
    let node = TestNode::start(|_| {}).await;
    let _client = node.client().await;
    let TestNode { node, dir } = node;
    drop(node);
    eventually("the folder is free", || {
        let lock = std::fs::File::open(dir.path().join("lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_client_that_vanishes_in_the_middle_of_a_put_leaks_nothing() {
    let node = TestNode::start(|_| {}).await;
    let client = node.client().await;
    let chain = client.chain(1, 1);
    let block = filled(1, 1 << 20);
    let piece = client.pieces(&chain, 0, &block, 400_000).remove(0);

    let socket = tokio::net::TcpStream::connect(node.node.grpc_addr())
        .await
        .unwrap();
    let (send, connection) = h2::client::handshake(socket).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut send = send.ready().await.unwrap();
    let (_response, mut body) = send.send_request(call("Put"), false).unwrap();
    body.send_data(kvproto::frame::head(&client.start(Ack::Cached), 0), false)
        .unwrap();
    let data = piece.data.clone();
    let bare = v1::PutRequest {
        data: Bytes::new(),
        ..piece
    };
    body.send_data(kvproto::frame::head(&bare, data.len()), false)
        .unwrap();
    body.send_data(data, false).unwrap();
    eventually("the block has its slot", || node.arena_bytes() == 1 << 20).await;
    driver.abort(); // the socket closes with the task
    eventually("the slot is free again", || node.arena_bytes() == 0).await;
    assert_eq!(node.node.blocks().engine().stats().blocks, 0);
    node.stop().await;
}

#[tokio::test]
async fn leases_end_with_their_connection() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 1);
    client
        .put(&chain, &[filled(1, 10_000)], Ack::Cached)
        .await
        .unwrap();
    client
        .lookup(&chain, Some(60_000))
        .await
        .unwrap()
        .lease
        .expect("a lease");
    let leases = || node.node.blocks().engine().stats().leases;
    assert_eq!(leases(), 1);
    drop(client);
    eventually("the lease is released", || leases() == 0).await;
    node.stop().await;
}

#[tokio::test]
async fn an_owner_keeps_its_leases_until_its_last_connection_closes() {
    let node = TestNode::start(|_| {}).await;
    let mut one = node.client().await;
    let mut two = node.client().await;
    let chain = one.chain(1, 1);
    one.put(&chain, &[filled(1, 10_000)], Ack::Cached)
        .await
        .unwrap();
    let asked = v1::LookupRequest {
        context: Some(v1::RequestContext {
            owner_id: Bytes::copy_from_slice(&OwnerId([9; 16]).0),
            ..v1::RequestContext::default()
        }),
        namespace_id: Bytes::copy_from_slice(&one.namespace.0),
        chain: Some(convert::chain_to_wire(&chain)),
        lease_ttl_ms: 60_000,
        ..v1::LookupRequest::default()
    };
    one.client.lookup(asked.clone()).await.unwrap();
    two.client.lookup(asked).await.unwrap();
    let engine = node.node.blocks().engine();
    assert_eq!(engine.stats().leases, 2);
    drop(one);
    let metrics = node.node.blocks().metrics();
    eventually("the first connection is gone", || {
        metrics.connections() == 1
    })
    .await;
    assert_eq!(engine.stats().leases, 2);
    drop(two);
    eventually("the leases are released", || engine.stats().leases == 0).await;
    node.stop().await;
}

#[tokio::test]
async fn nobody_uses_anothers_lease() {
    let node = TestNode::start(|_| {}).await;
    let (mut one, mut two) = (node.client().await, node.client().await);
    let chain = one.chain(1, 1);
    one.put(&chain, &[filled(1, 10_000)], Ack::Cached)
        .await
        .unwrap();
    let lease = one
        .lookup(&chain, Some(60_000))
        .await
        .unwrap()
        .lease
        .unwrap();
    assert_eq!(
        two.get(&chain, lease.id, 0).await.unwrap()[0].0,
        GetOutcome::Expired
    );
    let release = v1::ReleaseRequest {
        context: None,
        lease_id: lease.id,
    };
    assert!(
        !two.client
            .release(release)
            .await
            .unwrap()
            .into_inner()
            .released
    );
    assert_eq!(
        one.get(&chain, lease.id, 0).await.unwrap()[0].0,
        GetOutcome::Hit
    );
    node.stop().await;
}

#[tokio::test]
async fn a_leased_block_is_never_evicted_and_a_full_node_says_so() {
    let node = TestNode::start(|config| config.ram_bytes = Capacity::Bytes(16 * MIB)).await;
    let mut client = node.client().await;
    let leased = client.chain(1, 3);
    let blocks: Vec<Bytes> = (0..3).map(|i| filled(i, 1 << 20)).collect();
    client.put(&leased, &blocks, Ack::Cached).await.unwrap();
    let lease = client
        .lookup(&leased, Some(60_000))
        .await
        .unwrap()
        .lease
        .unwrap();
    assert_eq!(lease.blocks, 3);
    for seed in 2..40 {
        let chain = client.chain(seed, 1);
        let results = client
            .put(&chain, &[filled(seed, 1 << 20)], Ack::Cached)
            .await
            .unwrap();
        assert_eq!(outcomes(&results), [PutOutcome::Cached], "others make room");
    }
    let got = client.get(&leased, lease.id, 0).await.unwrap();
    assert!(
        got.iter()
            .zip(&blocks)
            .all(|((_, bytes), sent)| bytes == sent)
    );
    // A block that cannot fit beside the leased ones is an answer with a hint, not an error.
    let chain = client.chain(99, 1);
    let results = client
        .put(&chain, &[filled(99, 15 << 20)], Ack::Cached)
        .await
        .unwrap();
    assert_eq!(outcomes(&results), [PutOutcome::Rejected]);
    assert!(matches!(
        results[0].reason(),
        v1::Reason::NoSlot | v1::Reason::Budget
    ));
    assert!(results[0].retry_after_ms > 0);
    node.stop().await;
}

#[tokio::test]
async fn an_ack_that_the_node_cannot_give_is_rejected_with_its_reason() {
    let node = TestNode::start(|_| {}).await;
    let mut client = node.client().await;
    let chain = client.chain(1, 1);
    for ack in [Ack::Stored, Ack::Synced] {
        let results = client.put(&chain, &[filled(1, 10_000)], ack).await.unwrap();
        assert_eq!(outcomes(&results), [PutOutcome::Rejected]);
        assert_eq!(results[0].reason(), v1::Reason::TierDown);
    }
    // It is in RAM all the same.
    assert_eq!(
        client.get(&chain, 0, 0).await.unwrap()[0].0,
        GetOutcome::Hit
    );
    node.stop().await;
}

#[tokio::test]
async fn a_stored_block_is_on_nvme_and_a_synced_one_in_the_durable_store() {
    let node = TestNode::start(|config| {
        config.nvme_bytes = Capacity::Bytes(64 * MIB);
        config.durable_bytes = Capacity::Bytes(64 * MIB);
    })
    .await;
    let mut client = node.client().await;
    let chain = client.chain(1, 2);
    let blocks = [filled(1, 100_000), filled(2, 1 << 20)];
    let results = client.put(&chain, &blocks, Ack::Stored).await.unwrap();
    assert_eq!(outcomes(&results), [PutOutcome::Stored; 2]);
    let results = client.put(&chain, &blocks, Ack::Stored).await.unwrap();
    assert_eq!(outcomes(&results), [PutOutcome::Present; 2]);
    // Present is not safe enough for synced: it is written there too.
    let results = client.put(&chain, &blocks, Ack::Synced).await.unwrap();
    assert_eq!(outcomes(&results), [PutOutcome::Present; 2]);
    let stats = client.stats().await.unwrap();
    let blocks_in = |tier| {
        stats
            .tiers
            .iter()
            .find(|t| t.tier() == tier)
            .map_or(0, |t| t.blocks)
    };
    assert_eq!(blocks_in(v1::Tier::Nvme), 2);
    assert_eq!(blocks_in(v1::Tier::Durable), 2);
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
            strict: false,
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

#[tokio::test]
async fn a_draining_node_finishes_what_runs_and_takes_nothing_new() {
    let node = TestNode::start(|_| {}).await;
    let client = node.client().await;
    let chain = client.chain(1, 1);
    let pieces = client.pieces(&chain, 0, &filled(1, 1 << 20), 600_000);
    let (send, running) = tokio::sync::mpsc::channel(4);
    let mut putting = client.client.clone();
    let put = tokio::spawn(async move {
        putting
            .put(tokio_stream::wrappers::ReceiverStream::new(running))
            .await
    });
    send.send(client.start(Ack::Cached)).await.unwrap();
    send.send(pieces[0].clone()).await.unwrap();
    eventually("the put runs", || node.arena_bytes() > 0).await;

    let endpoint = node.node.endpoint();
    let metrics = std::sync::Arc::clone(node.node.blocks().metrics());
    let stopping = tokio::spawn(node.stop());
    eventually("new connections are refused", || {
        std::net::TcpStream::connect(endpoint.trim_start_matches("http://")).is_err()
    })
    .await;
    assert_eq!(metrics.calls_in_flight.get(), 1);
    send.send(pieces[1].clone()).await.unwrap();
    drop(send);
    let results = put.await.unwrap().unwrap().into_inner().results;
    assert_eq!(outcomes(&results), [PutOutcome::Cached]);
    stopping.await.unwrap();
}

#[tokio::test]
async fn a_drain_ends_at_its_deadline() {
    let hour = Duration::from_secs(3600);
    let node = TestNode::start(|config| {
        (config.call_deadline, config.call_max_deadline) = (hour, hour);
    })
    .await;
    let client = node.client().await;
    let (send, running) = tokio::sync::mpsc::channel(4);
    let mut putting = client.client.clone();
    let put = tokio::spawn(async move {
        putting
            .put(tokio_stream::wrappers::ReceiverStream::new(running))
            .await
    });
    send.send(client.start(Ack::Cached)).await.unwrap();
    let metrics = std::sync::Arc::clone(node.node.blocks().metrics());
    eventually("the put runs", || metrics.calls_in_flight.get() == 1).await;
    let drained = node.node.shutdown(Duration::from_millis(200));
    tokio::time::timeout(HANG, drained)
        .await
        .expect("the drain does not wait for the call, which has an hour");
    assert!(put.await.unwrap().is_err());
}

#[tokio::test]
async fn the_console_shows_metrics_and_readiness() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let node =
        TestNode::start(|config| config.http_listen = Some("127.0.0.1:0".parse().unwrap())).await;
    let address = node.node.http_addr().unwrap();
    let fetch = async |path: &str| {
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let asked = format!("GET {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n");
        socket.write_all(asked.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    };
    assert!(fetch("/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(fetch("/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(fetch("/").await.contains("Terrace"));
    let metrics = fetch("/metrics").await;
    assert!(
        metrics.contains("terrace_tier_capacity_bytes{tier=\"ram\"} 67108864"),
        "{metrics}"
    );
    node.stop().await;
}
