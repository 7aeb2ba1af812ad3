//! Bytes and calls in ill faith: a clear refusal, then an end, and the node none the worse.

use kvproto::{
    local::MAX_FRAME_BYTES,
    v1::{self, Reason, local_reply::Answer, local_request::Call},
};
use kvtests::{
    local::{Raw, Space, attach},
    mutate::{Dice, mutate},
    node::TestNode,
    patience::eventually,
};

use super::{Client, metric, put_one};

fn connect(node: &TestNode) -> Raw {
    Raw::connect(node.node.local_path().expect("on")).expect("a connection")
}

#[tokio::test]
async fn bytes_that_are_no_frame_are_refused_and_then_the_connection_ends() {
    let node = TestNode::start(|_| {}).await;
    let too_long = (MAX_FRAME_BYTES as u32 + 1).to_le_bytes();
    let cases: [(&[u8], Reason); 3] = [
        (&too_long, Reason::TooLarge),
        (&[0xff; 64], Reason::TooLarge),
        (&[3, 0, 0, 0, 0xff, 0xff, 0xff], Reason::InvalidField),
    ];
    for (bytes, reason) in cases {
        for is_attached in [false, true] {
            let mut raw = match is_attached {
                true => Raw::attached(&node.node, "", 1, 0).0,
                false => connect(&node),
            };
            raw.send(bytes).expect("written");
            let reply = raw.reply().expect("words").expect("a refusal");
            let Some(Answer::Refused(refused)) = reply.answer else {
                panic!("{reply:?}");
            };
            assert_eq!(refused.reason(), reason, "{}", refused.message);
            assert!(refused.message.contains("frame"), "{}", refused.message);
            assert!(raw.reply().expect("an end").is_none(), "still open");
        }
    }
}

#[tokio::test]
async fn calls_out_of_bounds_are_refused_by_field_and_the_connection_lives() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let chain = space.chain(1, 1);
    let other = Some(v1::RequestContext {
        owner_id: bytes::Bytes::from_static(&[9; 16]),
        ..v1::RequestContext::default()
    });
    let mut elsewhere = space.get(&chain, 0);
    elsewhere.namespace_id = bytes::Bytes::from_static(&[1; 16]);
    let cases = [
        (
            Call::Map(v1::LocalMap {
                segments: vec![0; 65],
            }),
            "map.segments",
        ),
        (
            Call::Get(v1::GetRequest {
                context: other.clone(),
                ..space.get(&chain, 0)
            }),
            "context.owner_id",
        ),
        (
            Call::Lookup(v1::LookupRequest {
                context: other,
                ..space.lookup(&chain, 0)
            }),
            "context.owner_id",
        ),
        (Call::Get(elsewhere), "namespace_id"),
        (
            Call::Get(v1::GetRequest {
                chain: None,
                ..space.get(&chain, 0)
            }),
            "chain",
        ),
        (Call::Renew(v1::RenewRequest::default()), "lease_id"),
        (Call::Release(v1::ReleaseRequest::default()), "lease_id"),
    ];
    for (call, field) in cases {
        let refused = client.raw.call(call).expect_err(field);
        assert!(
            refused.message.starts_with(field),
            "{field}: {}",
            refused.message
        );
        assert_ne!(refused.reason(), Reason::Unspecified);
    }
    put_one(&mut client, &space, 1, 4096);
}

#[tokio::test]
async fn mutated_requests_over_a_real_socket_never_break_the_node() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let chain = space.chain(1, 3);
    let calls = [
        Call::Attach(attach(1)),
        Call::Map(v1::LocalMap {
            segments: vec![0, 1],
        }),
        Call::Lookup(space.lookup(&chain, 100)),
        Call::Get(space.get(&chain, 1)),
        Call::Put(space.put(&[(space.header(&chain, 0, b"bytes"), 0)])),
    ];
    let corpus: Vec<Vec<u8>> = calls
        .into_iter()
        .map(|call| {
            let mut frame = Vec::new();
            let request = v1::LocalRequest {
                sequence: 1,
                call: Some(call),
                ..Default::default()
            };
            kvproto::local::encode(&request, &mut frame).expect("short");
            frame
        })
        .collect();
    let mut dice = Dice::new(3);
    for _ in 0..300 {
        let (mut raw, _) = Raw::attached(&node.node, "", 1, 1 << 16);
        for _ in 0..5 {
            if raw.send(&mutate(&mut dice, &corpus)).is_err() {
                break;
            }
        }
    }
    let mut client = Client::new(&node, "", 2);
    put_one(&mut client, &space, 9, 4096);
}

#[tokio::test]
async fn descriptors_that_nobody_reads_are_sent_once_and_then_the_connection_ends() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (chain, _) = put_one(&mut client, &space, 1, 4096);
    let got = client.raw.get(space.get(&chain, 0));
    let segments = vec![got.blocks[0].place.expect("a place").segment];
    let mut frames = Vec::new();
    for sequence in [100, 101] {
        let call = Some(Call::Map(v1::LocalMap {
            segments: segments.clone(),
        }));
        let request = v1::LocalRequest {
            sequence,
            call,
            ..Default::default()
        };
        kvproto::local::encode(&request, &mut frames).expect("short");
    }
    client.raw.send(&frames).expect("written");
    eventually("the node gives the connection up", || {
        metric(&node, "terrace_local_connections") == 0.0
    })
    .await;
    let mut answers = Vec::new();
    while let Some(reply) = client.raw.reply().expect("answers") {
        answers.push((reply.sequence, reply.answer.expect("an answer")));
    }
    let [(100, Answer::Mapped(_)), (101, Answer::Refused(refused))] = &answers[..] else {
        panic!("{answers:?}");
    };
    assert!(
        refused.message.starts_with("sequence"),
        "{}",
        refused.message
    );
}

#[tokio::test]
async fn a_mapped_segment_cannot_be_written_nor_opened_anew_for_writing() {
    use std::os::fd::AsRawFd;
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (chain, _) = put_one(&mut client, &space, 1, 4096);
    let place = client.raw.get(space.get(&chain, 0)).blocks[0]
        .place
        .expect("a place");
    let asked = v1::LocalMap {
        segments: vec![place.segment],
    };
    let Ok(Answer::Mapped(mapped)) = client.raw.call(Call::Map(asked)) else {
        panic!("mapped");
    };
    assert_eq!(mapped.segments.len(), 1);
    assert_eq!(client.raw.fds.len(), 2);
    for fd in &client.raw.fds {
        assert!(rustix::io::write(fd, &[1]).is_err());
        assert!(rustix::fs::ftruncate(fd, 0).is_err());
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = rustix::fs::OFlags::RDWR;
        let writable = rustix::fs::open(path, flags, rustix::fs::Mode::empty());
        if let Ok(writable) = writable {
            assert_eq!(
                rustix::io::pwrite(&writable, &[1], 0),
                Err(rustix::io::Errno::PERM)
            );
            assert_eq!(
                rustix::fs::ftruncate(&writable, 0),
                Err(rustix::io::Errno::PERM)
            );
        }
    }
}
