//! Writes the fuzz corpus: one honest input or two per target, made by the product's own encoders.
//!
//! `cargo run -p kvtests --bin make_corpus` after a format has changed; inputs found by fuzzing stay.

use std::{fs, path::Path};

use bytes::Bytes;
use kvproto::{
    BlockHeader, BlockKey, Chain, NamespaceId, Part, Place, RunHash, SequenceHash,
    convert::request,
    frame,
    http2::frame::{END_HEADERS, END_STREAM, Kind, put_field, put_frame},
    local::fixed,
    v1::{self, local_request::Call},
};
use kvserver::tier::{Resident, journal, record};
use prost::Message;

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let payload: Vec<u8> = (0..1500_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as u8)
        .collect();
    let key = BlockKey {
        namespace: NamespaceId([7; 16]),
        hash: SequenceHash([1; 32]),
        part: Part {
            rank: 1,
            layer_group: 2,
        },
    };
    let place = Place {
        run: RunHash([2; 32]),
        index: 9,
        parent: Some(SequenceHash([3; 32])),
    };
    let header = BlockHeader::describe(key, place, &payload);
    let wire = v1::BlockHeader::from(&header);
    let context = Some(v1::RequestContext {
        view_digest: 1,
        boot_id: 2,
        request_id: Bytes::from_static(&[4; 16]),
        no_forward: true,
        owner_id: Bytes::from_static(&[5; 16]),
    });
    let namespace_id = Bytes::from_static(&[7; 16]);
    let chain = Some(v1::Chain {
        hashes: Bytes::from(vec![6; 96]),
        first_index: 3,
        run_hash: Bytes::from_static(&[2; 32]),
        parent_hash: Bytes::from_static(&[3; 32]),
        jumps: vec![v1::Jump {
            at: 2,
            index: 9,
            run_hash: Bytes::from_static(&[2; 32]),
            parent_hash: Bytes::from_static(&[3; 32]),
        }],
    });

    let put = v1::PutRequest {
        start: Some(v1::PutStart {
            context: context.clone(),
            namespace_id: namespace_id.clone(),
            ack: 2,
            kind: 1,
            survived: vec![7],
        }),
        header: Some(wire.clone()),
        sums: None,
        data: Bytes::new(),
    };
    let mut stream = frame::head(&put, payload.len()).to_vec();
    stream.extend_from_slice(&payload);
    stream.extend_from_slice(&frame::head(
        &v1::GetResponse {
            block: 1,
            outcome: 2,
            ..Default::default()
        },
        0,
    ));
    save(&root, "frame", "put_then_miss", &stream)?;

    let requests: [(&str, Vec<u8>); 9] = [
        (
            "open",
            v1::OpenNamespaceRequest {
                context: context.clone(),
                spec: Some(spec()),
                strict: true,
                replicas: 2,
                aside: true,
            }
            .encode_to_vec(),
        ),
        (
            "lookup",
            v1::LookupRequest {
                context: context.clone(),
                namespace_id: namespace_id.clone(),
                chain: chain.clone(),
                parts: vec![v1::Part {
                    rank: 1,
                    layer_group: 0,
                }],
                lease_ttl_ms: 5000,
                idempotency_key: Bytes::from_static(&[8; 16]),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "get",
            v1::GetRequest {
                context: context.clone(),
                namespace_id: namespace_id.clone(),
                chain,
                lease_id: 77,
                piece_bytes: 1 << 20,
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "put_start",
            put.start.clone().unwrap_or_default().encode_to_vec(),
        ),
        (
            "renew",
            v1::RenewRequest {
                context: context.clone(),
                lease_id: 77,
                ttl_ms: 1,
            }
            .encode_to_vec(),
        ),
        (
            "release",
            v1::ReleaseRequest {
                context: context.clone(),
                lease_id: 77,
            }
            .encode_to_vec(),
        ),
        (
            "invalidate",
            v1::InvalidateRequest {
                context: context.clone(),
                namespace_id: namespace_id.clone(),
                target: Some(v1::invalidate_request::Target::PrefixHash(
                    Bytes::from_static(&[6; 32]),
                )),
            }
            .encode_to_vec(),
        ),
        (
            "watch",
            v1::WatchRequest {
                context: context.clone(),
                namespace_id: namespace_id.clone(),
            }
            .encode_to_vec(),
        ),
        (
            "list_namespaces",
            v1::ListNamespacesRequest {
                context,
                label: "demo".to_owned(),
                page_token: namespace_id,
                names_only: true,
            }
            .encode_to_vec(),
        ),
    ];
    for (kind, (name, bytes)) in requests.iter().enumerate() {
        save(
            &root,
            "convert_request",
            name,
            &[&[kind as u8], &bytes[..]].concat(),
        )?;
    }
    save(&root, "convert_answer", "header", &wire.encode_to_vec())?;
    save(
        &root,
        "convert_answer",
        "lookup",
        &v1::LookupResponse {
            present_blocks: 3,
            tiers: vec![v1::TierRun { blocks: 3, tier: 2 }],
            lease: Some(v1::Lease {
                id: 77,
                ttl_ms: 10_000,
                blocks: 2,
                bytes: 4096,
            }),
            ..Default::default()
        }
        .encode_to_vec(),
    )?;
    save(&root, "key", "key", &key.to_bytes())?;
    save(&root, "key", "place", &place.to_bytes())?;
    save(&root, "key", "hash", key.hash.to_string().as_bytes())?;
    save(
        &root,
        "record",
        "block",
        &[&record::encode_head(&header)[..], &payload].concat(),
    )?;
    let resident = Resident {
        key,
        place,
        length_bytes: header.length_bytes,
        seal: header.seal,
    };
    save(
        &root,
        "journal",
        "life",
        &journal::encode(
            1 << 20,
            &[
                journal::Entry::Stored(resident),
                journal::Entry::Invalidated(key),
                journal::Entry::Stored(resident),
                journal::Entry::InvalidatedNamespace(key.namespace),
            ],
        ),
    )?;
    let mut lane = Vec::new();
    let mut block = Vec::new();
    put_field(&mut block, b":path", b"/terrace.v1.Blocks/Put");
    put_frame(&mut lane, Kind::Settings, 0, 0, &[0, 4, 0, 1, 0, 0]);
    put_frame(&mut lane, Kind::Headers, 0, 1, &block[..9]);
    put_frame(&mut lane, Kind::Continuation, END_HEADERS, 1, &block[9..]);
    put_frame(&mut lane, Kind::Data, 0, 1, &payload[..700]);
    put_frame(&mut lane, Kind::Ping, 0, 0, &[1; 8]);
    put_frame(&mut lane, Kind::WindowUpdate, 0, 1, &[0, 0, 1, 0]);
    put_frame(&mut lane, Kind::Data, END_STREAM, 1, &payload[700..]);
    put_frame(
        &mut lane,
        Kind::Headers,
        END_HEADERS | END_STREAM,
        3,
        &block,
    );
    save(&root, "lane", "two_streams", &lane)?;
    let mut local = Vec::new();
    let calls = [
        Call::Attach(v1::LocalAttach {
            version: kvproto::local::VERSION,
            token: "0123456789abcdef".to_owned(),
            owner_id: Bytes::from_static(&[5; 16]),
            boot_id: 2,
            join: Bytes::from_static(&[9; 16]),
            staging_bytes: 1 << 20,
            layouts: 1,
        }),
        Call::Map(v1::LocalMap {
            segments: vec![0, 3],
        }),
        Call::Lookup(v1::LookupRequest::decode(&requests[1].1[..]).expect("our own")),
        Call::Get(v1::GetRequest::decode(&requests[2].1[..]).expect("our own")),
        Call::Put(v1::LocalPut {
            start: put.start.clone(),
            blocks: vec![v1::LocalWritten {
                header: Some(wire.clone()),
                offset: 4096,
            }],
            follows: false,
        }),
    ];
    for (i, call) in calls.into_iter().enumerate() {
        let request = v1::LocalRequest {
            sequence: i as u64 + 1,
            timeout_ms: 500,
            done: vec![1, 2],
            call: Some(call),
        };
        kvproto::local::encode(&request, &mut local).expect("short");
    }
    save(&root, "local", "five_calls", &local)?;
    let asked =
        request::Get::try_from(v1::GetRequest::decode(&requests[2].1[..]).expect("our own"));
    let asked = asked.expect("in order");
    let chain = Chain {
        jumps: Vec::new(),
        ..asked.chain
    };
    let asking = fixed::Asking {
        sequence: 6,
        timeout_ms: 500,
        done: &[3],
        view_digest: kvproto::ViewDigest(4),
        namespace: asked.namespace,
        lease: asked.lease,
        chain: &chain,
        parts: &asked.parts,
    };
    let mut gets = Vec::new();
    fixed::encode_get(&asking, &mut gets).expect("short");
    let head = fixed::GotHead {
        sequence: 6,
        boot_id: kvproto::BootId(2),
        view_digest: kvproto::ViewDigest(4),
        queue: 1,
        hold: 9,
    };
    let hit = fixed::Telling::Hit {
        header: &header,
        tier: kvproto::TierKind::Ram,
        spot: Some(fixed::Spot {
            segment: 1,
            offset: 4096,
            generation: 3,
        }),
    };
    let miss = fixed::Telling::Not(kvproto::GetOutcome::Miss);
    fixed::encode_got(&head, [hit, miss].into_iter(), &mut gets).expect("short");
    save(&root, "local", "fixed_get_and_answer", &gets)?;
    save(&root, "trace", "two_requests", b"{\"timestamp\": 0, \"input_length\": 1000, \"output_length\": 10, \"hash_ids\": [1, 2]}\n{\"timestamp\": 5, \"input_length\": 600, \"output_length\": 1, \"hash_ids\": [1, 3]}\n")?;
    save(
        &root,
        "config",
        "some",
        b"ram_bytes=1GiB\nlisten=127.0.0.1:7070\nnvme_admission=open\nlease_ttl=10s\n",
    )
}

fn spec() -> v1::NamespaceSpec {
    v1::NamespaceSpec {
        label: "corpus".into(),
        model: "m@1".into(),
        weights: "w".into(),
        tokenizer: "t".into(),
        kv_dtype: "bf16".into(),
        layers: 32,
        kv_heads: 8,
        head_size: 128,
        packing: "layer-major".into(),
        block_tokens: 16,
        run_blocks: 8,
        tensor_parallel: 1,
        pipeline_parallel: 1,
        context_parallel: 1,
        engine_class: "vllm".into(),
    }
}

fn save(root: &Path, target: &str, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let folder = root.join(target);
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(name), bytes)
}
