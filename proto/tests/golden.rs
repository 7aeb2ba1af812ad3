//! The vectors in `golden/` are what this crate computes, so that another language can be held to them.
//!
//! A difference means that the wire or a stored name has changed, which no released version may do. While
//! that is still wanted: `TERRACE_WRITE_GOLDEN=1 cargo test -p kvproto --test golden` writes them anew, and
//! `golden/check.py` shows whether another implementation agrees.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use kvproto::checksum::PAGE_BYTES;
use kvproto::frame::{Frame, FrameError, FrameLimits, FrameReader, head};
use kvproto::{
    BlockHeader, BlockKey, GetOutcome, Layout, Member, MemberId, MemberState, Namespace,
    NamespaceId, NamespaceKey, Part, Place, RunHash, SequenceHash, View, World, hash, placement,
    v1,
};
use serde_json::{Value, json};

fn check(name: &str, vectors: Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name);
    let text = format!("{}\n", serde_json::to_string_pretty(&vectors).unwrap());
    if std::env::var_os("TERRACE_WRITE_GOLDEN").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let stored: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert!(
        stored == vectors,
        "{name} is not what this crate computes:\n{text}"
    );
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hex64(number: u64) -> String {
    format!("{number:016x}")
}

/// 32 bytes that count up from `first`.
fn counting(first: u8) -> [u8; 32] {
    std::array::from_fn(|i| first.wrapping_add(i as u8))
}

/// The block bytes of the README: byte i is (167 i + 31 (i >> 8) + 13) mod 256.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (167 * i + 31 * (i >> 8) + 13) as u8)
        .collect()
}

#[test]
fn chain_hashes() {
    let key = NamespaceKey::from_bytes(counting(1));
    let long: Vec<u32> = (0..70).map(|i| i * 1_000_003 % 50_257).collect();
    let edge = [0, 1, u32::MAX, 0x0102_0304, 7, 7, 7, 7];
    let lora: &[u8] = b"lora:7f3a";
    let image: &[u8] = &counting(200);
    type Case<'a> = (&'a str, u32, &'a [u32], Vec<Vec<&'a [u8]>>);
    let cases: [Case<'_>; 7] = [
        (
            "16 tokens a block, the last 6 are no block",
            16,
            &long,
            vec![],
        ),
        ("a partial block only", 128, &long, vec![]),
        ("one token a block", 1, &edge, vec![]),
        ("tokens are little-endian", 4, &edge, vec![]),
        (
            "an extra key in every block",
            16,
            &long,
            vec![vec![lora]; 4],
        ),
        (
            "extra keys from the second block on",
            16,
            &long,
            vec![vec![], vec![lora, image], vec![lora]],
        ),
        (
            "an empty extra key is an extra key",
            4,
            &edge,
            vec![vec![b""], vec![b"a", b"b"]],
        ),
    ];
    let vectors: Vec<Value> = cases
        .iter()
        .map(|(name, block_tokens, tokens, extra)| {
            let hashes = hash::chain_with(&key, *block_tokens, tokens, |i| {
                extra.get(i).map_or(&[][..], Vec::as_slice)
            });
            json!({
                "name": name,
                "key": hex(key.as_bytes()),
                "block_tokens": block_tokens,
                "tokens": tokens,
                "extra_keys": extra.iter().map(|keys| keys.iter().map(|key| hex(key)).collect()).collect::<Vec<Vec<_>>>(),
                "hashes": hashes.iter().map(ToString::to_string).collect::<Vec<_>>(),
            })
        })
        .collect();
    check("chain.json", json!(vectors));
}

#[test]
fn engine_hashes() {
    let key = NamespaceKey::from_bytes(counting(1));
    let opaque: [&[u8]; 4] = [
        b"",
        &[0],
        &counting(9),
        &0x0123_4567_89ab_cdefu64.to_le_bytes(),
    ];
    let vectors: Vec<Value> = opaque
        .iter()
        .map(|opaque| {
            let hash = hash::engine(&key, opaque).to_string();
            json!({ "key": hex(key.as_bytes()), "opaque": hex(opaque), "hash": hash })
        })
        .collect();
    check("engine.json", json!(vectors));
}

#[test]
fn namespaces() {
    let demo = Namespace {
        label: "demo".into(),
        model: "llama-3-8b@main".into(),
        weights: "sha256:9f2c".into(),
        tokenizer: "sha256:11aa".into(),
        kv_dtype: "bf16".into(),
        layout: Layout {
            layers: 32,
            kv_heads: 8,
            head_size: 128,
            packing: "layer-kv-token-head".into(),
        },
        block_tokens: 16,
        run_blocks: 64,
        world: World {
            tensor: 2,
            pipeline: 1,
            context: 1,
        },
        engine_class: "vllm".into(),
    };
    let label = Namespace {
        label: "prüfung".into(),
        ..demo.clone()
    };
    let cases: [(&Namespace, &str, &[u8]); 4] = [
        (&demo, "default", b"secret"),
        (&demo, "other", b"secret"),
        (&label, "default", b"secret"),
        (&demo, "", b""),
    ];
    let vectors: Vec<Value> = cases
        .iter()
        .map(|(n, tenant, secret)| {
            json!({
                "spec": {
                    "label": n.label, "model": n.model, "weights": n.weights, "tokenizer": n.tokenizer,
                    "kv_dtype": n.kv_dtype, "layers": n.layout.layers, "kv_heads": n.layout.kv_heads,
                    "head_size": n.layout.head_size, "packing": n.layout.packing,
                    "block_tokens": n.block_tokens, "run_blocks": n.run_blocks,
                    "tensor_parallel": n.world.tensor, "pipeline_parallel": n.world.pipeline,
                    "context_parallel": n.world.context, "engine_class": n.engine_class,
                },
                "tenant": tenant,
                "secret": hex(secret),
                "canonical": hex(&n.canonical_bytes()),
                "fingerprint": hex(&n.fingerprint()),
                "id": n.id(tenant).to_string(),
                "key": hex(n.key(tenant, secret).as_bytes()),
            })
        })
        .collect();
    check("namespace.json", json!(vectors));
}

fn key(rank: u16, layer_group: u16) -> BlockKey {
    BlockKey {
        namespace: NamespaceId(counting(64)[..16].try_into().unwrap()),
        hash: SequenceHash(counting(128)),
        part: Part { rank, layer_group },
    }
}

fn place(index: u32) -> Place {
    let parent = (index > 0).then_some(SequenceHash(counting(32)));
    Place {
        run: RunHash(counting(96)),
        index,
        parent,
    }
}

fn key_fields(key: &BlockKey) -> Value {
    json!({
        "namespace": key.namespace.to_string(), "hash": key.hash.to_string(),
        "rank": key.part.rank, "layer_group": key.part.layer_group,
    })
}

fn place_fields(place: &Place) -> Value {
    json!({
        "run": place.run.to_string(), "index": place.index,
        "parent": place.parent.map_or(String::new(), |parent| parent.to_string()),
    })
}

#[test]
fn keys_and_places() {
    let keys: Vec<Value> = [key(0, 0), key(0x0102, 0xfffe)]
        .iter()
        .map(|key| json!({ "key": key_fields(key), "bytes": hex(&key.to_bytes()) }))
        .collect();
    let places: Vec<Value> = [place(0), place(1), place(0x0102_0304)]
        .iter()
        .map(|place| json!({ "place": place_fields(place), "bytes": hex(&place.to_bytes()) }))
        .collect();
    check("key.json", json!({ "keys": keys, "places": places }));
}

#[test]
fn checksums() {
    let lengths = [
        1,
        100,
        240,
        241,
        4096,
        PAGE_BYTES - 1,
        PAGE_BYTES,
        PAGE_BYTES + 1,
        5 * PAGE_BYTES + 77,
    ];
    let vectors: Vec<Value> = lengths
        .iter()
        .enumerate()
        .map(|(i, &len)| {
            let header = BlockHeader::describe(key(i as u16, 1), place(i as u32), &pattern(len));
            json!({
                "key": key_fields(&header.key),
                "place": place_fields(&header.place),
                "length_bytes": len,
                "page_sums": header.page_sums.iter().map(|&sum| hex64(sum)).collect::<Vec<_>>(),
                "seal": hex64(header.seal),
            })
        })
        .collect();
    check("checksum.json", json!(vectors));
}

fn member(id: &str, weight: u32, zone: &str, state: MemberState) -> Member {
    Member {
        id: MemberId(id.to_owned()),
        generation: 1,
        version: 1,
        weight,
        zone: zone.to_owned(),
        state,
        address: String::new(),
    }
}

/// Every state, a weight of nothing, a long id; zones of about one size, of unequal size, and one that is nearly all.
fn views() -> [View; 3] {
    let long = format!("node-{}", "x".repeat(80));
    let active = |id: &str, weight, zone: &str| member(id, weight, zone, MemberState::Active);
    [
        View::new([
            active("node-a", 100, "z1"),
            active("node-b", 100, "z1"),
            active("node-c", 200, "z2"),
            member("node-d", 150, "z3", MemberState::Joining),
            member("node-e", 100, "z3", MemberState::Draining),
            member("node-f", 100, "z4", MemberState::Gone),
            active("node-g", 0, "z4"),
            active(&long, 150, ""),
        ]),
        View::new([
            active("node-a", 40, "z1"),
            active("node-b", 60, "z1"),
            active("node-c", 70, "z2"),
            active("node-d", 30, "z3"),
            active("node-e", 15, "z3"),
            active("node-f", 10, ""),
        ]),
        View::new([
            active("node-a", 100, "z1"),
            active("node-b", 300, "z1"),
            active("node-c", 500, "z1"),
            active("node-d", 30, "z2"),
            active("node-e", 20, "z3"),
        ]),
    ]
}

#[test]
fn views_and_placement() {
    check("placement.json", views().iter().map(placed).collect());
}

fn placed(view: &View) -> Value {
    let members: Vec<Value> = view
        .members()
        .iter()
        .map(|member| {
            json!({
                "id": member.id.0, "weight": member.weight, "zone": member.zone, "state": member.state as u8,
            })
        })
        .collect();
    let runs: Vec<Value> = (0..48u8)
        .map(|i| {
            let run = RunHash(counting(i.wrapping_mul(37)));
            let ids =
                |members: Vec<&Member>| members.iter().map(|m| m.id.0.clone()).collect::<Vec<_>>();
            json!({
                "run": run.to_string(),
                "ranked": ids(placement::ranked(view, &run)),
                "owners_of_3": ids(placement::owners(view, &run, 3)),
            })
        })
        .collect();
    json!({ "members": members, "digest": hex64(view.digest().0), "runs": runs })
}

/// What the reader makes of a stream.
fn cut(stream: &[u8]) -> (Vec<Value>, Option<FrameError>) {
    let limits = FrameLimits {
        max_head_bytes: 1024,
        max_data_bytes: 4096,
    };
    let mut reader = FrameReader::new(limits);
    reader.push(Bytes::copy_from_slice(stream));
    let mut messages = Vec::new();
    let (mut fields, mut data) = (Bytes::new(), Vec::new());
    loop {
        match reader.next() {
            Ok(Some(Frame::Head { message, .. })) => (fields, data) = (message, Vec::new()),
            Ok(Some(Frame::Data(slice))) => data.extend_from_slice(&slice),
            Ok(Some(Frame::End)) => {
                messages.push(json!({ "head": hex(&fields), "data": hex(&data) }))
            }
            Ok(None) => return (messages, reader.finish().err()),
            Err(error) => return (messages, Some(error)),
        }
    }
}

#[test]
fn frames() {
    let piece = |block, header: Option<&BlockHeader>, offset| v1::GetResponse {
        block,
        outcome: GetOutcome::Hit as i32,
        header: header.map(Into::into),
        offset,
        ..Default::default()
    };
    let data = pattern(300);
    let header = BlockHeader::describe(key(0, 0), place(1), &data);
    let mut two_pieces = head(&piece(1, Some(&header), 0), 200).to_vec();
    two_pieces.extend(&data[..200]);
    two_pieces.extend(head(&piece(1, None, 200), 100).iter());
    two_pieces.extend(&data[200..]);
    let miss = v1::GetResponse {
        block: 3,
        outcome: GetOutcome::Miss as i32,
        ..Default::default()
    };
    let framed =
        |message: &[u8]| [&[0], &(message.len() as u32).to_be_bytes()[..], message].concat();
    let streams: [(&str, Vec<u8>); 13] = [
        ("a block in two pieces", two_pieces.clone()),
        ("a miss has no data field", head(&miss, 0).to_vec()),
        ("an empty message", framed(&[])),
        (
            "an explicitly empty data field",
            framed(&[0x10, 5, 0x7a, 0]),
        ),
        ("nothing at all", vec![]),
        (
            "the stream ends inside a payload",
            two_pieces[..two_pieces.len() - 1].to_vec(),
        ),
        ("compressed", vec![1, 0, 0, 0, 0]),
        ("a field after data", framed(&[0x7a, 1, 9, 0x10, 5])),
        ("data over the end of its message", framed(&[0x7a, 5, 9])),
        ("data as a varint", framed(&[0x78, 5])),
        ("field number 0", framed(&[0x02, 0])),
        (
            "more data than allowed",
            framed(&[&[0x7a, 0x81, 0x20][..], &[0; 4097]].concat()),
        ),
        (
            "a message longer than anything allowed",
            vec![0, 0xff, 0xff, 0xff, 0xff],
        ),
    ];
    let vectors: Vec<Value> = streams
        .iter()
        .map(|(name, stream)| {
            let (messages, error) = cut(stream);
            let error = error.map(|error| error.to_string());
            json!({ "name": name, "stream": hex(stream), "messages": messages, "error": error })
        })
        .collect();
    check("frame.json", json!(vectors));
}
