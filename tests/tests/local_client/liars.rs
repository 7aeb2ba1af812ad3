//! Somebody at the socket who does not keep to the protocol: the call goes over gRPC, in time and with the right bytes.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    time::Duration,
};

use bytes::Bytes;
use kvclient::{Client, LocalPath, Path};
use kvproto::{
    Reason,
    local::{Inbox, encode},
    v1::{self, local_reply::Answer, local_request::Call},
};
use kvtests::{
    node::TestNode,
    patience::{HANG, until, within_awake},
};

use crate::{MIB, chain, get, open, over_grpc, put};

#[derive(Clone, Copy, Debug)]
enum Lie {
    Closes,
    Silent,
    Garbage,
    /// Attaches, as another life of the node.
    OtherBoot,
    /// Grants staging memory, and sends none.
    NoMemory,
    /// Attaches, then answers another call than was asked.
    WrongSequence,
    /// Attaches, then says nothing about some of the blocks.
    TooFew,
    /// Refuses to attach, as a node does to which the kernel said `ETOOMANYREFS`.
    Crowded,
}

const LIES: [Lie; 8] = [
    Lie::Closes,
    Lie::Silent,
    Lie::Garbage,
    Lie::OtherBoot,
    Lie::NoMemory,
    Lie::WrongSequence,
    Lie::TooFew,
    Lie::Crowded,
];

const CROWDED: &str = "too many descriptors are on their way to other clients; try again";

fn serve(mut stream: UnixStream, lie: Lie, boot: u64) -> Option<()> {
    let mut inbox = Inbox::new();
    loop {
        let request: v1::LocalRequest = loop {
            if let Some(request) = inbox.take().ok()? {
                break request;
            }
            let bytes = stream.read(inbox.room()).ok().filter(|bytes| *bytes > 0)?;
            inbox.filled(bytes);
        };
        let mut sequence = request.sequence;
        let answer = match (request.call?, lie) {
            (_, Lie::Closes) => return None,
            (_, Lie::Silent) => continue,
            (_, Lie::Garbage) => {
                stream.write_all(&[3, 0, 0, 0, 255, 255, 255]).ok()?;
                continue;
            }
            (Call::Attach(_), Lie::Crowded) => Answer::Refused(v1::LocalRefusal {
                reason: Reason::Overloaded.to_wire() as i32,
                message: CROWDED.to_owned(),
            }),
            (Call::Attach(_), lie) => Answer::Attached(v1::LocalAttached {
                boot_id: boot + u64::from(matches!(lie, Lie::OtherBoot)),
                attachment: Bytes::from_static(&[1; 16]),
                staging_bytes: u64::from(matches!(lie, Lie::NoMemory)) << 20,
                max_block_bytes: 64 << 20,
                hold_ms: 10_000,
            }),
            (Call::Get(asked), lie) => {
                sequence += u64::from(matches!(lie, Lie::WrongSequence));
                let count =
                    asked.chain?.hashes.len() / 32 - usize::from(matches!(lie, Lie::TooFew));
                let block = v1::LocalBlock {
                    outcome: v1::GetOutcome::Hit as i32,
                    place: Some(v1::LocalPlace {
                        segment: 77,
                        offset: 0,
                        generation: 1,
                    }),
                    ..v1::LocalBlock::default()
                };
                Answer::Got(v1::LocalGot {
                    context: None,
                    blocks: vec![block; count],
                    hold: 0,
                })
            }
            _ => Answer::Nothing(v1::LocalNothing {}),
        };
        let reply = v1::LocalReply {
            sequence,
            answer: Some(answer),
        };
        let mut frame = Vec::new();
        encode(&reply, &mut frame).ok()?;
        stream.write_all(&frame).ok()?;
    }
}

/// A socket at which nobody tells the truth, as long as the test runs.
fn liar(dir: &std::path::Path, lie: Lie, boot: u64) -> PathBuf {
    let path = dir.join(format!("{lie:?}.sock"));
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(stream, lie, boot));
        }
    });
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_socket_answers_the_bytes_are_right_and_in_time() {
    let node = TestNode::start(|_| {}).await;
    let grpc = over_grpc(&node).await;
    let ns = open(&grpc).await;
    let chain = chain(&ns, 1, 3);
    let lengths = [MIB, 4097, 3 * MIB];
    let data = put(&grpc, &ns, &chain, &lengths).await;
    for lie in LIES {
        let socket = liar(node.dir.path(), lie, grpc.boot_id().0);
        let client = Client::builder(&node.node.endpoint())
            .local(LocalPath::At(socket))
            .deadline(Duration::from_secs(8))
            .connect();
        let client = client.await.unwrap();
        let ns = open(&client).await;
        for _ in 0..3 {
            let got = within_awake(HANG / 2, get(&client, &ns, &chain, &lengths));
            assert!(got.await.expect("in time") == data, "{lie:?}");
        }
        let report = client.path();
        assert_eq!(
            (report.local.got_blocks, report.grpc.got_blocks),
            (0, 9),
            "{lie:?}: {report:?}"
        );
        assert_eq!(report.path, Path::Grpc, "{lie:?}: {report:?}");
        assert!(report.why_grpc.is_some(), "{lie:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_refused_for_too_many_descriptors_attaches_later() {
    let node = TestNode::start(|_| {}).await;
    let grpc = over_grpc(&node).await;
    let socket = liar(node.dir.path(), Lie::Crowded, grpc.boot_id().0);
    let builder = Client::builder(&node.node.endpoint()).local(LocalPath::At(socket.clone()));
    let client = builder.deadline(HANG / 2).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, 2);
    let data = put(&client, &ns, &chain, &[MIB; 2]).await;
    let why = client.path().why_grpc.expect("a reason");
    assert!(why.contains(CROWDED), "{why}");
    // The others have read theirs: now the node itself answers there.
    let real = node.node.local_path().expect("a socket");
    std::fs::remove_file(&socket).unwrap();
    std::os::unix::fs::symlink(real, &socket).unwrap();
    until("the same-host path is tried again", async || {
        get(&client, &ns, &chain, &[MIB; 2]).await == data && client.path().path == Path::Local
    })
    .await;
}
