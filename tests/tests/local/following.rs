//! Puts that are told of while they are written: whole when they are, nothing when they are not.

use kvproto::{
    Announced, BlockHeader, Chain,
    checksum::{PAGE_BYTES, page_sums},
    local::fixed::encode_written,
    v1::{self, PutOutcome, Reason, local_reply::Answer, local_request::Call},
};
use kvtests::{
    local::{Raw, Space, pattern},
    node::TestNode,
    patience::eventually,
};

use super::{Client, MIB, metric, outcomes};

/// A put of blocks that are not written yet, side by side in the staging memory.
fn announced(space: &Space, headers: &[BlockHeader]) -> v1::LocalPut {
    let mut offset = 0;
    let blocks = headers.iter().map(|header| {
        let header = Announced::from(header);
        let at = offset;
        offset += header.length_bytes;
        v1::LocalWritten {
            header: Some((&header).into()),
            offset: at,
        }
    });
    v1::LocalPut {
        blocks: blocks.collect(),
        follows: true,
        ..space.put(&[])
    }
}

/// A put on its way.
struct Following<'a> {
    raw: &'a mut Raw,
    sequence: u64,
}

impl Following<'_> {
    fn tell(&mut self, sums: &[u64]) {
        let mut frame = Vec::new();
        encode_written(self.sequence, sums, &mut frame).expect("short");
        // A node that has refused it reads no more.
        let _ = self.raw.send(&frame);
    }
}

fn begin<'a>(raw: &'a mut Raw, put: v1::LocalPut) -> Following<'a> {
    let sequence = raw.begin(Call::Put(put));
    Following { raw, sequence }
}

fn answer(raw: &mut Raw) -> Result<Vec<v1::PutResult>, v1::LocalRefusal> {
    let reply = raw.reply().expect("words").expect("an answer");
    match reply.answer {
        Some(Answer::Put(put)) => Ok(put.results),
        Some(Answer::Refused(refused)) => Err(refused),
        other => panic!("{other:?}"),
    }
}

/// Blocks of a chain, and their bytes.
fn blocks(space: &Space, seed: u32, lengths: &[usize]) -> (Chain, Vec<BlockHeader>, Vec<u8>) {
    let chain = space.chain(seed, lengths.len() as u32);
    let (mut headers, mut together) = (Vec::new(), Vec::new());
    for (i, &length) in lengths.iter().enumerate() {
        let bytes = pattern(seed + i as u32, length);
        headers.push(space.header(&chain, i, &bytes));
        together.extend(bytes);
    }
    (chain, headers, together)
}

fn sums_of(headers: &[BlockHeader]) -> Vec<u64> {
    let sums = headers.iter().flat_map(|header| header.page_sums.iter());
    sums.copied().collect()
}

#[tokio::test]
async fn blocks_told_of_page_by_page_are_whole() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let lengths = [MIB, 1, 3 * PAGE_BYTES, PAGE_BYTES + 1];
    for at_once in [1, 3, 100] {
        let (chain, headers, bytes) = blocks(&space, at_once as u32, &lengths);
        let mut put = begin(&mut client.raw, announced(&space, &headers));
        client.staging.write(0, &bytes).expect("room");
        for sums in sums_of(&headers).chunks(at_once) {
            put.tell(sums);
        }
        let results = answer(&mut client.raw).expect("results");
        assert_eq!(outcomes(&results), [PutOutcome::Cached; 4]);
        let got = client.raw.get(space.get(&chain, 0));
        let mut at = 0;
        for (block, length) in got.blocks.iter().zip(lengths) {
            let read = client.read(&space, block).expect("right bytes");
            assert!(read == bytes[at..at + length]);
            at += length;
        }
        // The same once more: it is there, and every page is told of all the same.
        let mut put = begin(&mut client.raw, announced(&space, &headers));
        put.tell(&sums_of(&headers));
        let results = answer(&mut client.raw).expect("results");
        assert_eq!(outcomes(&results), [PutOutcome::Present; 4]);
    }
}

#[tokio::test]
async fn a_page_that_is_not_what_was_told_makes_its_block_corrupt_and_no_other() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (_, headers, mut bytes) = blocks(&space, 1, &[MIB, MIB]);
    bytes[MIB / 2] ^= 1;
    client.staging.write(0, &bytes).expect("room");
    let mut put = begin(&mut client.raw, announced(&space, &headers));
    put.tell(&sums_of(&headers));
    let results = answer(&mut client.raw).expect("results");
    assert_eq!(
        outcomes(&results),
        [PutOutcome::Corrupt, PutOutcome::Cached]
    );
}

#[tokio::test]
async fn who_leaves_in_the_middle_leaves_nothing_behind() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    for told in [0, 1, 15] {
        let mut client = Client::new(&node, "", 1);
        let (_, headers, bytes) = blocks(&space, 1, &[MIB]);
        client.staging.write(0, &bytes).expect("room");
        let mut put = begin(&mut client.raw, announced(&space, &headers));
        if told > 0 {
            put.tell(&sums_of(&headers)[..told]);
        }
        drop(client);
        eventually("its connection is gone", || {
            metric(&node, "terrace_local_connections") == 0.0
        })
        .await;
        assert_eq!(node.arena_bytes(), 0, "its slot is free");
    }
}

#[tokio::test]
async fn who_never_says_the_rest_is_refused_in_time() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (_, headers, _) = blocks(&space, 1, &[MIB]);
    let sequence = client
        .raw
        .begin_within(50, Call::Put(announced(&space, &headers)));
    let refused = answer(&mut client.raw).expect_err("too late");
    assert!(sequence > 0);
    assert_eq!(refused.reason(), Reason::Deadline);
    assert!(client.raw.reply().expect("an end").is_none(), "still open");
    assert_eq!(node.arena_bytes(), 0);
}

#[tokio::test]
async fn what_does_not_follow_the_rules_is_refused_and_the_connection_ends() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let (_, headers, bytes) = blocks(&space, 1, &[MIB]);
    let sums = page_sums(&bytes);
    let with_sums = v1::LocalPut {
        follows: true,
        ..space.put(&[(headers[0].clone(), 0)])
    };
    let mut elsewhere = announced(&space, &headers);
    if let Some(start) = &mut elsewhere.start {
        start.namespace_id = bytes::Bytes::from_static(&[1; 16]);
    }
    type Say<'a> = Box<dyn Fn(&mut Raw) + 'a>;
    let cases: [(&str, Say<'_>); 5] = [
        (
            "put.blocks.header",
            Box::new(|raw| {
                raw.begin(Call::Put(with_sums.clone()));
            }),
        ),
        (
            "namespace_id",
            Box::new(|raw| {
                raw.begin(Call::Put(elsewhere.clone()));
            }),
        ),
        (
            "written.sums",
            Box::new(|raw| {
                let mut put = begin(raw, announced(&space, &headers));
                put.tell(&[&sums[..], &[1]].concat());
            }),
        ),
        (
            "written",
            Box::new(|raw| {
                let mut put = begin(raw, announced(&space, &headers));
                put.sequence += 1;
                put.tell(&sums);
            }),
        ),
        (
            "written",
            Box::new(|raw| {
                let mut put = Following { raw, sequence: 9 };
                put.tell(&sums);
            }),
        ),
    ];
    for (field, say) in cases {
        let mut client = Client::new(&node, "", 1);
        client.staging.write(0, &bytes).expect("room");
        say(&mut client.raw);
        let refused = answer(&mut client.raw).expect_err(field);
        assert!(refused.message.starts_with(field), "{}", refused.message);
        assert!(
            matches!(client.raw.reply(), Ok(None) | Err(_)),
            "{field}: still open"
        );
    }
    eventually("all connections are gone", || {
        metric(&node, "terrace_local_connections") == 0.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_lets_a_put_be_told_to_its_end() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let mut idle = Client::new(&node, "", 1);
    let (_, headers, bytes) = blocks(&space, 1, &[MIB]);
    client.staging.write(0, &bytes).expect("room");
    let sums = sums_of(&headers);
    let mut put = begin(&mut client.raw, announced(&space, &headers));
    put.tell(&sums[..3]);
    eventually("it is being copied", || {
        metric(&node, "terrace_local_put_bytes_total") >= 3.0 * PAGE_BYTES as f64
    })
    .await;
    let stopping = tokio::spawn(node.stop());
    // Who asks nothing is shown out at once.
    let shown_out = tokio::task::spawn_blocking(move || idle.raw.reply());
    assert!(matches!(
        shown_out.await.expect("no panic"),
        Ok(None) | Err(_)
    ));
    put.tell(&sums[3..]);
    let results = answer(&mut client.raw).expect("results");
    assert_eq!(outcomes(&results), [PutOutcome::Cached]);
    assert!(client.raw.reply().expect("an end").is_none(), "still open");
    stopping.await.expect("it stops");
}
