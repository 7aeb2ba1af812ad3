//! HTTP/2 by hand: hostile bytes, a reader that sleeps, a writer that vanishes.

use bytes::Bytes;
use h2::client::SendRequest;
use kvproto::{
    convert,
    v1::{self, Ack},
};
use kvserver::config::MIB;
use kvtests::{
    node::{TestNode, filled},
    patience::eventually,
};
use tokio::task::JoinHandle;
use tonic::{Code, Status};

/// A connection whose streams get this window, and the task that moves its bytes: aborted, the socket closes.
async fn connect(node: &TestNode, window_bytes: u32) -> (SendRequest<Bytes>, JoinHandle<()>) {
    let socket = tokio::net::TcpStream::connect(node.node.grpc_addr())
        .await
        .unwrap();
    let (send, connection) = h2::client::Builder::new()
        .initial_window_size(window_bytes)
        .handshake(socket)
        .await
        .unwrap();
    // The end of a connection is what some of these tests are about.
    let driver = tokio::spawn(async move { drop(connection.await) });
    (send.ready().await.unwrap(), driver)
}

/// What a client that reads would give.
const WINDOW_BYTES: u32 = 64 << 10;

fn call(method: &str) -> http::Request<()> {
    http::Request::post(format!("http://node/terrace.v1.Blocks/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

/// Sends bytes as the body of a call and answers its status.
async fn raw(node: &TestNode, method: &str, chunks: Vec<Bytes>) -> Status {
    let (mut send, driver) = connect(node, WINDOW_BYTES).await;
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
    let (mut send, driver) = connect(&node, WINDOW_BYTES).await;
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
    let (mut send, driver) = connect(&node, 16 << 10).await;
    let asked = v1::GetRequest {
        namespace_id: Bytes::copy_from_slice(&client.namespace.0),
        chain: Some(convert::chain_to_wire(&chain)),
        ..v1::GetRequest::default()
    };
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

#[tokio::test]
async fn a_client_that_vanishes_in_the_middle_of_a_put_leaks_nothing() {
    let node = TestNode::start(|_| {}).await;
    let client = node.client().await;
    let chain = client.chain(1, 1);
    let block = filled(1, 1 << 20);
    let piece = client.pieces(&chain, 0, &block, 400_000).remove(0);

    let (mut send, driver) = connect(&node, WINDOW_BYTES).await;
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
