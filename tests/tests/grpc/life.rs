//! A node's deadlines, its drain, its console, and what it leaves behind.

use std::time::Duration;

use kvproto::v1::{self, Ack, PutOutcome};
use kvtests::{
    node::{Stock, TestNode, filled, page},
    patience::{HANG, eventually},
};
use tokio::{
    sync::mpsc::{self, Sender},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use crate::{outcomes, reason};

/// What a put under way will be answered.
type Putting = JoinHandle<Result<Response<v1::PutResponse>, Status>>;

/// Begins a put; its blocks go into the sender.
async fn begin_put(client: &Stock) -> (Sender<v1::PutRequest>, Putting) {
    let (send, running) = mpsc::channel(4);
    let mut putting = client.client.clone();
    let put = tokio::spawn(async move { putting.put(ReceiverStream::new(running)).await });
    send.send(client.start(Ack::Cached)).await.unwrap();
    (send, put)
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
    let (keep, never) = mpsc::channel::<v1::PutRequest>(1);
    let stream = ReceiverStream::new(never);
    let status = client.put(stream).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status)),
        (Code::DeadlineExceeded, "deadline")
    );
    drop(keep);

    // Asking for an hour is cut to the node's longest.
    let (keep, never) = mpsc::channel::<v1::PutRequest>(1);
    let mut asked = Request::new(ReceiverStream::new(never));
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
async fn a_draining_node_finishes_what_runs_and_takes_nothing_new() {
    let node = TestNode::start(|_| {}).await;
    let client = node.client().await;
    let chain = client.chain(1, 1);
    let pieces = client.pieces(&chain, 0, &filled(1, 1 << 20), 600_000);
    let (send, put) = begin_put(&client).await;
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
    let (_open, put) = begin_put(&client).await;
    let metrics = std::sync::Arc::clone(node.node.blocks().metrics());
    eventually("the put runs", || metrics.calls_in_flight.get() == 1).await;
    let drained = node.node.shutdown(Duration::from_millis(200));
    tokio::time::timeout(HANG, drained)
        .await
        .expect("the drain does not wait for the call, which has an hour");
    assert!(put.await.unwrap().is_err());
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
async fn the_console_shows_metrics_and_readiness() {
    let node =
        TestNode::start(|config| config.http_listen = Some("127.0.0.1:0".parse().unwrap())).await;
    let fetch = async |path: &str| page(&node.node, path).await;
    assert!(fetch("/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(fetch("/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(fetch("/").await.contains("Terrace"));
    let metrics = fetch("/metrics").await;
    assert!(
        metrics.contains("terrace_tier_capacity_bytes{tier=\"ram\"} 67108864"),
        "{metrics}"
    );
    // Nobody is sent to a node whose blocks are with others now.
    node.node.cluster().leave();
    let left = fetch("/readyz").await;
    assert!(
        left.starts_with("HTTP/1.1 503") && left.contains("kvctl cluster resume"),
        "{left}"
    );
    node.stop().await;
}
