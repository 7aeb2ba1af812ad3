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
    BlockHeader, BlockKey, BootId, Reason, ViewDigest,
    local::{Frame, Inbox, encode, fixed},
    v1::{self, local_reply::Answer, local_request::Call},
};
use kvtests::{
    node::TestNode,
    patience::{HANG, until, within_awake},
};

use prost::Message;

use crate::{MIB, chain, get, open, over_grpc, put};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Lie {
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
    /// Knows the fixed layout of gets by its word, and answers in none.
    Misshapen,
    /// Answers in the fixed layout, about blocks that it does not show.
    Unshown,
    /// Answers in the fixed layout, about fewer blocks.
    FixedTooFew,
    /// Refuses to attach, as a node does to which the kernel said `ETOOMANYREFS`.
    Crowded,
}

pub(crate) const LIES: [Lie; 11] = [
    Lie::Closes,
    Lie::Silent,
    Lie::Garbage,
    Lie::OtherBoot,
    Lie::NoMemory,
    Lie::WrongSequence,
    Lie::TooFew,
    Lie::Misshapen,
    Lie::Unshown,
    Lie::FixedTooFew,
    Lie::Crowded,
];

const CROWDED: &str = "too many descriptors are on their way to other clients; try again";

fn serve(mut stream: UnixStream, lie: Lie, boot: u64) -> Option<()> {
    let mut inbox = Inbox::new();
    loop {
        let frame = loop {
            if let Some(frame) = inbox.take_frame().ok()? {
                break frame;
            }
            let bytes = stream.read(inbox.room()).ok().filter(|bytes| *bytes > 0)?;
            inbox.filled(bytes);
        };
        let request = match frame {
            Frame::Message(bytes) => v1::LocalRequest::decode(bytes).ok()?,
            Frame::Fixed(bytes) => {
                let Ok(fixed::Request::Get(call)) = fixed::decode_request(&bytes) else {
                    return None;
                };
                stream.write_all(&fixed_lie(&call, lie)?).ok()?;
                continue;
            }
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
                layouts: match lie {
                    Lie::Misshapen | Lie::Unshown | Lie::FixedTooFew => u32::MAX,
                    _ => 0,
                },
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
                    seconds: Vec::new(),
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

fn fixed_lie(call: &fixed::GetCall, lie: Lie) -> Option<Vec<u8>> {
    if matches!(lie, Lie::Misshapen) {
        return Some(vec![3, 0, 0, 0x80, 2, 0, 255]);
    }
    let asked = call.asked.as_ref().ok()?;
    let headers = (0..asked.chain.len()).map(|i| {
        let key = BlockKey {
            namespace: asked.namespace,
            hash: asked.chain.hashes[i],
            part: asked.parts[0],
        };
        BlockHeader::describe(key, asked.chain.place(i, 4), &[7; 100])
    });
    let mut headers: Vec<BlockHeader> = headers.collect();
    if matches!(lie, Lie::FixedTooFew) {
        headers.pop();
    }
    let head = fixed::GotHead {
        sequence: call.sequence,
        boot_id: BootId(0),
        view_digest: ViewDigest(0),
        queue: 0,
        hold: 0,
    };
    let spot = Some(fixed::Spot {
        segment: 77,
        offset: 0,
        generation: 1,
    });
    let blocks = headers.iter().map(|header| fixed::Telling::Hit {
        header,
        tier: kvproto::TierKind::Ram,
        spot,
    });
    let mut frame = Vec::new();
    fixed::encode_got(&head, blocks, &mut frame).ok()?;
    Some(frame)
}

/// A socket at which nobody tells the truth, as long as the test runs.
pub(crate) fn liar(dir: &std::path::Path, lie: Lie, boot: u64) -> PathBuf {
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
