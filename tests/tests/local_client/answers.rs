//! Answers that leave something out: the rest comes in another answer, or over gRPC.
//!
//! ```text
//! client ──► meddler ──► node's socket        hands on every call and every descriptor, and changes some answers
//! ```

use std::{
    io::{IoSlice, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
};

use kvclient::{Client, LocalPath, Path};
use kvproto::{
    local::{Inbox, encode},
    v1::{self, local_reply::Answer},
};
use kvserver::config::{Capacity, MIB as A_MIB};
use kvtests::{local::Raw, node::TestNode};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::{MIB, assert_is_local, builder, chain, get, open, over_grpc, put};

/// What becomes of an answer and its descriptors on their way.
type Change = fn(&mut Answer, &mut Vec<OwnedFd>);

fn hand_on(mut client: UnixStream, mut node: Raw, change: Change) -> Option<()> {
    let mut inbox = Inbox::new();
    loop {
        let request: v1::LocalRequest = loop {
            if let Some(request) = inbox.take().ok()? {
                break request;
            }
            let bytes = client.read(inbox.room()).ok().filter(|bytes| *bytes > 0)?;
            inbox.filled(bytes);
        };
        let mut frame = Vec::new();
        encode(&request, &mut frame).ok()?;
        node.send(&frame).ok()?;
        let mut reply = node.reply().ok()??;
        let mut fds = std::mem::take(&mut node.fds);
        let answer = reply.answer.as_mut()?;
        if let Answer::Attached(attached) = answer {
            attached.layouts = 0; // messages alone are what is changed here
        }
        change(answer, &mut fds);
        frame.clear();
        encode(&reply, &mut frame).ok()?;
        send(&client, &frame, &fds)?;
    }
}

/// One frame, with its descriptors at its first byte.
fn send(client: &UnixStream, frame: &[u8], fds: &[OwnedFd]) -> Option<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(128))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let sent = rustix::net::sendmsg(
        client,
        &[IoSlice::new(frame)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    );
    (sent.ok()? == frame.len()).then_some(())
}

/// A client that speaks to `node` through somebody who changes answers, as long as the test runs.
async fn meddled(node: &TestNode, change: Change) -> Client {
    let path: PathBuf = node.dir.path().join("meddler.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let nodes = node.node.local_path().unwrap().to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let node = Raw::connect(&nodes).unwrap();
            std::thread::spawn(move || hand_on(stream, node, change));
        }
    });
    let builder = builder(node).local(LocalPath::At(path));
    builder.connect().await.unwrap()
}

/// Six blocks put over gRPC and got through the meddler: how many came by which path.
async fn got_through(node: &TestNode, change: Change) -> kvclient::PathReport {
    let lengths = [MIB, 4097, 70_000, 1, 2 * MIB, 300_000];
    let grpc = over_grpc(node).await;
    let ns = open(&grpc).await;
    let chain = chain(&ns, 1, lengths.len() as u32);
    let data = put(&grpc, &ns, &chain, &lengths).await;
    let client = meddled(node, change).await;
    let ns = open(&client).await;
    assert!(get(&client, &ns, &chain, &lengths).await == data);
    client.path()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_that_lie_where_nobody_can_map_them_come_over_grpc_and_the_others_do_not() {
    let node = TestNode::start(|_| {}).await;
    // As a node answers of leased blocks that found no slot.
    let report = got_through(&node, |answer, _| {
        if let Answer::Got(got) = answer {
            got.blocks
                .iter_mut()
                .skip(1)
                .step_by(2)
                .for_each(|block| block.place = None);
        }
    })
    .await;
    let got = (report.local.got_blocks, report.grpc.got_blocks);
    assert_eq!((got, report.failures), ((3, 3), 0), "{report:?}");
    assert_eq!(report.path, Path::Local, "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_in_segments_that_the_node_does_not_show_come_over_grpc() {
    let node = TestNode::start(|_| {}).await;
    // As a node answers who asks for another tenant's segments.
    let report = got_through(&node, |answer, fds| {
        if let Answer::Mapped(mapped) = answer {
            mapped.segments.clear();
            fds.clear();
        }
    })
    .await;
    let got = (report.local.got_blocks, report.grpc.got_blocks);
    assert_eq!((got, report.failures), ((0, 6), 0), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_map_that_is_refused_costs_the_path_and_no_block() {
    let node = TestNode::start(|_| {}).await;
    let report = got_through(&node, |answer, fds| {
        if matches!(answer, Answer::Mapped(_)) {
            fds.clear();
            *answer = Answer::Refused(v1::LocalRefusal {
                reason: v1::Reason::Overloaded as i32,
                message: "no segments today".to_owned(),
            });
        }
    })
    .await;
    let got = (report.local.got_blocks, report.grpc.got_blocks);
    assert_eq!(got, (0, 6), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_cannot_keep_for_one_answer_comes_in_the_next() {
    let node = TestNode::start(|config| {
        config.ram_bytes = Capacity::Bytes(64 * A_MIB);
        config.lease_owner_percent = 10;
    })
    .await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 16);
    let data = put(&client, &ns, &chain, &[MIB; 16]).await;
    let before = client.path().local.calls;
    assert!(get(&client, &ns, &chain, &[MIB; 16]).await == data);
    let report = client.path();
    assert_eq!(
        (report.local.got_blocks, report.grpc.got_blocks),
        (16, 0),
        "{report:?}"
    );
    assert!(
        report.local.calls >= before + 3,
        "six blocks are kept at a time: {report:?}"
    );
    assert_is_local(&client);
}
