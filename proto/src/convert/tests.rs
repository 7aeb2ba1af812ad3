//! What is written reads back equal; what is wrong is named by its field.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest};
use prost::Message;

use super::answer::{
    BlockEvent, GetPiece, Lease, Lookup as Found, NamespaceStats, OpenedNamespace, PutResult,
    Second, WatchEvent,
};
use super::request::{
    Context, Get, Invalidate, ListNamespaces, Lookup, MAX_REPLICAS, OpenNamespace, PutStart,
    Release, Renew, Target, Watch,
};
use super::{AnswerContext, FieldError, HeaderRules, MAX_OBJECTS, MAX_PARTS, MAX_SURVIVED, header};
use crate::chain::Jump;
use crate::checksum::BlockHeader;
use crate::hash::{Chain, MAX_CHAIN_BLOCKS, NamespaceKey};
use crate::key::{
    BlockKey, BootId, LeaseId, NamespaceId, OwnerId, Part, Place, RequestId, RunHash, SequenceHash,
};
use crate::namespace::{MAX_LABEL_BYTES, Namespace};
use crate::reason::{Ack, GetOutcome, Kind, PutOutcome, Reason, TierKind};
use crate::v1;
use crate::view::{Member, MemberState, ViewDigest};

const NAMESPACE: NamespaceId = NamespaceId([9; 16]);
const RULES: HeaderRules = HeaderRules {
    namespace: NAMESPACE,
    run_blocks: 4,
    max_block_bytes: 1 << 20,
};

fn context() -> impl Strategy<Value = Context> {
    (
        option::of(1u64..),
        option::of(1u64..),
        any::<Option<[u8; 16]>>(),
        any::<bool>(),
        any::<Option<[u8; 16]>>(),
    )
        .prop_map(|(view, boot, request, no_forward, owner)| Context {
            view_digest: view.map(ViewDigest),
            boot_id: boot.map(BootId),
            request_id: request.map(RequestId),
            no_forward,
            owner_id: owner.map(OwnerId),
        })
}

fn chain() -> impl Strategy<Value = Chain> {
    let hash = || any::<[u8; 32]>().prop_map(SequenceHash);
    (0u32..40, hash(), hash(), vec(hash(), 1..30)).prop_map(|(first_index, run, parent, hashes)| {
        Chain {
            first_index,
            run: (first_index % 4 != 0).then_some(run.into()),
            parent: (first_index > 0).then_some(parent),
            jumps: (hashes.len() > 5)
                .then_some(Jump {
                    at: 5,
                    index: first_index + 9,
                    run: (!(first_index + 9).is_multiple_of(4)).then_some(run.into()),
                    parent,
                })
                .into_iter()
                .collect(),
            hashes,
        }
    })
}

fn parts() -> impl Strategy<Value = Vec<Part>> {
    proptest::collection::btree_set((any::<u16>(), any::<u16>()), 1..9).prop_map(|parts| {
        parts
            .into_iter()
            .map(|(rank, layer_group)| Part { rank, layer_group })
            .collect()
    })
}

/// Through the wire's own bytes, as the other end gets it.
fn sent<M: Message + Default>(message: M) -> M {
    M::decode(message.encode_to_vec().as_slice()).expect("what was encoded decodes")
}

proptest! {
    #[test]
    fn requests_read_back_equal(
        context in context(), chain in chain(), parts in parts(), flag: bool,
        ttl in option::of(1u32..), lease in 1u64.., key: Option<[u8; 16]>, hash: [u8; 32],
    ) {
        prop_assert_eq!(chain.validate(4), Ok(()));
        let (namespace, lease) = (NAMESPACE, LeaseId(lease));
        let lookup = Lookup {
            context, namespace, chain: chain.clone(), parts: parts.clone(), probe: flag,
            lease_ttl_ms: ttl, idempotency_key: key, lease: flag.then_some(lease),
        };
        prop_assert_eq!(Lookup::try_from(sent::<v1::LookupRequest>(lookup.clone().into())), Ok(lookup));
        let get = Get {
            context, namespace, chain, parts, lease: flag.then_some(lease),
            piece_bytes: ttl.map(|ttl| ttl.max(4096)),
        };
        prop_assert_eq!(Get::try_from(sent::<v1::GetRequest>(get.clone().into())), Ok(get));
        for &ack in Ack::ALL {
            let start = PutStart { context, namespace, ack, kind: Kind::Checkpoint, survived: vec![lease.0] };
            prop_assert_eq!(PutStart::try_from(sent::<v1::PutStart>(start.clone().into())), Ok(start));
        }
        let renew = Renew { context, lease, ttl_ms: ttl };
        prop_assert_eq!(Renew::try_from(sent::<v1::RenewRequest>(renew.into())), Ok(renew));
        let release = Release { context, lease };
        prop_assert_eq!(Release::try_from(sent::<v1::ReleaseRequest>(release.into())), Ok(release));
        let watch = Watch { context, namespace: flag.then_some(namespace) };
        prop_assert_eq!(Watch::try_from(sent::<v1::WatchRequest>(watch.into())), Ok(watch));
        for target in [Target::Block(SequenceHash(hash)), Target::Prefix(SequenceHash(hash)), Target::All] {
            let invalidate = Invalidate { context, namespace, target };
            let wire = sent::<v1::InvalidateRequest>(invalidate.into());
            prop_assert_eq!(Invalidate::try_from(wire), Ok(invalidate));
        }
        let list = ListNamespaces { context, label: flag.then(|| "demo".to_owned()), after: key.map(NamespaceId), names_only: flag };
        prop_assert_eq!(ListNamespaces::try_from(sent::<v1::ListNamespacesRequest>(list.clone().into())), Ok(list));
        let open = OpenNamespace { context, namespace: Namespace::opaque("demo", 16, 8), strict: flag, replicas: 3, aside: !flag };
        prop_assert_eq!(OpenNamespace::try_from(sent::<v1::OpenNamespaceRequest>(open.clone().into())), Ok(open));
    }

    #[test]
    fn headers_read_back_equal(hash: [u8; 32], run: [u8; 32], parent: [u8; 32], index: u32, len in 1usize..300_000) {
        let key = BlockKey { namespace: NAMESPACE, hash: SequenceHash(hash), part: Part { rank: 3, layer_group: 1 } };
        let place = Place {
            run: RunHash(if index % 4 == 0 { hash } else { run }),
            index,
            parent: (index > 0).then_some(SequenceHash(parent)),
        };
        let block = BlockHeader::describe(key, place, &vec![7; len]);
        let wire = sent(v1::BlockHeader::from(&block));
        let read = header(&wire, RULES);
        prop_assert_eq!(read.as_ref(), Ok(&block));
        prop_assert!(read.unwrap().check_seal());
        let piece = GetPiece { block: 2, outcome: GetOutcome::Hit, header: Some(block), tier: Some(TierKind::Nvme), offset: 0 };
        prop_assert_eq!(GetPiece::from_wire(&sent(piece.to_wire(None)), RULES, 3), Ok(piece));
    }

    #[test]
    fn any_bytes_are_a_request_or_an_error(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(wire) = v1::LookupRequest::decode(&bytes[..]) {
            let _ = Lookup::try_from(wire);
        }
        if let Ok(wire) = v1::OpenNamespaceRequest::decode(&bytes[..]) {
            let _ = OpenNamespace::try_from(wire);
        }
        if let Ok(wire) = v1::BlockHeader::decode(&bytes[..]) {
            let _ = header(&wire, RULES);
        }
    }
}

fn lookup_wire() -> v1::LookupRequest {
    v1::LookupRequest {
        namespace_id: vec![9; 16].into(),
        chain: Some(v1::Chain {
            hashes: vec![1; 64].into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[test]
fn what_is_left_unsaid_has_its_default() {
    let lookup = Lookup::try_from(lookup_wire()).unwrap();
    assert_eq!(
        (lookup.context, lookup.parts),
        (Context::default(), vec![Part::default()])
    );
    assert_eq!((lookup.lease_ttl_ms, lookup.idempotency_key), (None, None));
    let start = v1::PutStart {
        namespace_id: vec![9; 16].into(),
        ..Default::default()
    };
    let start = PutStart::try_from(start).unwrap();
    assert_eq!((start.ack, start.kind), (Ack::Cached, Kind::Kv));
}

#[test]
fn each_wrong_field_of_a_lookup_is_named() {
    let field = |change: fn(&mut v1::LookupRequest)| {
        let mut wire = lookup_wire();
        change(&mut wire);
        Lookup::try_from(wire).unwrap_err().field
    };
    assert_eq!(field(|w| w.namespace_id = Bytes::new()), "namespace_id");
    assert_eq!(field(|w| w.chain = None), "chain");
    assert_eq!(
        field(|w| w.chain.as_mut().unwrap().hashes = Bytes::new()),
        "chain.hashes"
    );
    assert_eq!(
        field(|w| w.chain.as_mut().unwrap().hashes = vec![0; 33].into()),
        "chain.hashes"
    );
    let long = |w: &mut v1::LookupRequest| {
        w.chain.as_mut().unwrap().hashes = vec![0; 32 * (MAX_CHAIN_BLOCKS + 1)].into();
    };
    assert_eq!(field(long), "chain.hashes");
    assert_eq!(
        field(|w| w.chain.as_mut().unwrap().run_hash = vec![0; 31].into()),
        "chain.run_hash"
    );
    assert_eq!(
        field(|w| w.chain.as_mut().unwrap().parent_hash = vec![0; 1].into()),
        "chain.parent_hash"
    );
    assert_eq!(
        field(|w| w.parts = vec![v1::Part {
            rank: 65_536,
            layer_group: 0
        }]),
        "parts"
    );
    assert_eq!(
        field(|w| w.parts = vec![v1::Part {
            rank: 0,
            layer_group: 1 << 20
        }]),
        "parts"
    );
    assert_eq!(field(|w| w.parts = vec![v1::Part::default(); 2]), "parts");
    let many = |w: &mut v1::LookupRequest| {
        w.parts = (0..=MAX_PARTS as u32)
            .map(|rank| v1::Part {
                rank,
                layer_group: 0,
            })
            .collect();
    };
    assert_eq!(field(many), "parts");
    let objects = |w: &mut v1::LookupRequest| {
        w.chain.as_mut().unwrap().hashes = vec![0; 32 * (MAX_OBJECTS / 16 + 1)].into();
        w.parts = (0..16)
            .map(|rank| v1::Part {
                rank,
                layer_group: 0,
            })
            .collect();
    };
    assert_eq!(field(objects), "parts");
    assert_eq!(
        field(|w| w.idempotency_key = vec![0; 15].into()),
        "idempotency_key"
    );
    let id = |w: &mut v1::LookupRequest| {
        w.context = Some(v1::RequestContext {
            request_id: vec![0; 4].into(),
            ..Default::default()
        });
    };
    assert_eq!(field(id), "context.request_id");
    let owner = |w: &mut v1::LookupRequest| {
        w.context = Some(v1::RequestContext {
            owner_id: vec![0; 17].into(),
            ..Default::default()
        });
    };
    assert_eq!(field(owner), "context.owner_id");
}

#[test]
fn each_wrong_field_of_a_header_is_named() {
    let key = BlockKey {
        namespace: NAMESPACE,
        hash: SequenceHash([1; 32]),
        part: Part::default(),
    };
    let place = Place {
        run: RunHash([2; 32]),
        index: 5,
        parent: Some(SequenceHash([3; 32])),
    };
    let good = v1::BlockHeader::from(&BlockHeader::describe(key, place, &[1; 70_000]));
    let error = |change: fn(&mut v1::BlockHeader)| {
        let mut wire = good.clone();
        change(&mut wire);
        header(&wire, RULES).unwrap_err()
    };
    assert_eq!(error(|w| w.hash = vec![0; 31].into()).field, "header.hash");
    assert_eq!(
        error(|w| w.run_hash = Bytes::new()).field,
        "header.run_hash"
    );
    assert_eq!(error(|w| w.index = 8).field, "header.run_hash");
    assert_eq!(error(|w| w.index = 0).field, "header.parent_hash");
    assert_eq!(
        error(|w| w.parent_hash = Bytes::new()).field,
        "header.parent_hash"
    );
    assert_eq!(
        error(|w| w.part = Some(v1::Part {
            rank: 1 << 16,
            layer_group: 0
        }))
        .field,
        "header.part"
    );
    assert_eq!(error(|w| w.length_bytes = 0).field, "header.length_bytes");
    assert_eq!(
        error(|w| w.length_bytes = (1 << 20) + 1).to_string(),
        "header.length_bytes: is 1048577; 1 to 1048576 are allowed"
    );
    assert_eq!(error(|w| w.length_bytes = 60_000).field, "header.page_sums");
    assert_eq!(error(|w| w.page_sums.push(0)).field, "header.page_sums");
}

#[test]
fn other_requests_name_their_wrong_fields() {
    let open = OpenNamespace::try_from(v1::OpenNamespaceRequest::default()).unwrap_err();
    assert_eq!(open, FieldError::new("spec", "is missing"));
    let start = v1::PutStart {
        namespace_id: vec![9; 16].into(),
        ack: 9,
        ..Default::default()
    };
    assert_eq!(
        PutStart::try_from(start).unwrap_err().to_string(),
        "start.ack: 9 is not a known value"
    );
    let start = v1::PutStart {
        namespace_id: vec![9; 16].into(),
        survived: vec![1; MAX_SURVIVED + 1],
        ..Default::default()
    };
    assert_eq!(
        PutStart::try_from(start).unwrap_err().field,
        "start.survived"
    );
    assert_eq!(
        Renew::try_from(v1::RenewRequest::default())
            .unwrap_err()
            .field,
        "lease_id"
    );
    let wire = lookup_wire();
    let get = v1::GetRequest {
        namespace_id: wire.namespace_id.clone(),
        chain: wire.chain,
        piece_bytes: 4095,
        ..Default::default()
    };
    assert_eq!(Get::try_from(get).unwrap_err().field, "piece_bytes");
    let target = |target| {
        let wire = v1::InvalidateRequest {
            namespace_id: wire.namespace_id.clone(),
            target,
            context: None,
        };
        Invalidate::try_from(wire).unwrap_err().field
    };
    let list = |label: String, page_token: &'static [u8]| {
        let wire = v1::ListNamespacesRequest {
            label,
            page_token: Bytes::from_static(page_token),
            ..Default::default()
        };
        ListNamespaces::try_from(wire).unwrap_err().field
    };
    assert_eq!(list("l".repeat(MAX_LABEL_BYTES + 1), &[]), "label");
    assert_eq!(list("l".repeat(MAX_LABEL_BYTES), &[1]), "page_token");
    use v1::invalidate_request::Target as Wire;
    assert_eq!(target(None), "target");
    assert_eq!(target(Some(Wire::All(false))), "all");
    assert_eq!(target(Some(Wire::Hash(Bytes::new()))), "hash");
    assert_eq!(
        target(Some(Wire::PrefixHash(vec![0; 64].into()))),
        "prefix_hash"
    );
}

#[test]
fn answers_read_back_equal() {
    let member = Member {
        id: "a".into(),
        generation: 1,
        version: 2,
        weight: 3,
        zone: "z".into(),
        state: MemberState::Draining,
        address: "http://[::1]:7070".into(),
    };
    let context = AnswerContext {
        boot_id: BootId(5),
        view_digest: ViewDigest(6),
        members: vec![member],
        queue: 17,
    };
    assert_eq!(
        AnswerContext::try_from(sent(v1::ResponseContext::from(&context))),
        Ok(context.clone())
    );

    let opened = OpenedNamespace {
        id: NAMESPACE,
        key: NamespaceKey::from_bytes([4; 32]),
        difference: Some("layers was 1, is 2".into()),
        max_block_bytes: 64 << 20,
        local_socket: Some("/run/terrace/local.sock".into()),
        replicas: 3,
    };
    assert_eq!(
        OpenedNamespace::try_from(&sent(opened.clone().into_wire(&context))),
        Ok(opened)
    );

    let lease = Lease {
        id: LeaseId(7),
        ttl_ms: 10_000,
        blocks: 2,
        bytes: 1 << 20,
    };
    let found = Found {
        present_blocks: 3,
        tiers: vec![(2, TierKind::Ram), (1, TierKind::Nvme)],
        lease: Some(lease),
        seconds: vec![Second {
            run: RunHash([8; 32]),
            member: "b".into(),
            ttl_ms: 30_000,
        }],
        survived: vec![4, 5],
    };
    assert_eq!(
        Found::from_wire(&sent(found.clone().into_wire(&context)), 3),
        Ok(found)
    );

    for &outcome in PutOutcome::ALL {
        let result = PutResult {
            outcome,
            retry_after_ms: 9,
            reason: Some(Reason::QueueFull),
        };
        assert_eq!(
            PutResult::try_from(&sent(v1::PutResult::from(result))),
            Ok(result)
        );
    }

    let event = BlockEvent {
        key: BlockKey {
            namespace: NAMESPACE,
            hash: SequenceHash([1; 32]),
            part: Part::default(),
        },
        index: 1,
        parent: Some(SequenceHash([2; 32])),
        tier: TierKind::Ram,
        reason: Some(Reason::Evicted),
        length_bytes: 4096,
    };
    for event in [
        WatchEvent::Stored(event),
        WatchEvent::Removed(event),
        WatchEvent::Lagged(3),
    ] {
        assert_eq!(
            WatchEvent::from_wire(&sent(event.to_wire(8, Some(&context)))),
            Ok(Some(event))
        );
    }
}

#[test]
fn a_namespace_that_a_node_knows_reads_back_equal() {
    let known = NamespaceStats {
        id: NAMESPACE,
        namespace: Namespace::opaque("demo", 16, 8),
        replicas: 2,
        is_latest: true,
        blocks: 3,
        bytes: 4096,
    };
    let wire = || sent::<v1::NamespaceStats>(known.clone().into());
    assert_eq!(NamespaceStats::try_from(wire()), Ok(known.clone()));
    let field = |break_it: fn(&mut v1::NamespaceStats)| {
        let mut wire = wire();
        break_it(&mut wire);
        NamespaceStats::try_from(wire).map_err(|e| e.field)
    };
    assert_eq!(
        field(|w| w.namespace_id = Bytes::new()),
        Err("namespace_id")
    );
    assert_eq!(field(|w| w.spec = None), Err("spec"));
    // A promise of more than any node keeps would only make callers ask in vain.
    assert_eq!(field(|w| w.replicas = 99).unwrap().replicas, MAX_REPLICAS);
}

#[test]
fn a_node_that_promises_too_much_is_not_believed() {
    let wire = |blocks, lease_blocks, tier_blocks| v1::LookupResponse {
        context: None,
        present_blocks: blocks,
        tiers: vec![v1::TierRun {
            blocks: tier_blocks,
            tier: 2,
        }],
        lease: Some(v1::Lease {
            id: 1,
            ttl_ms: 1,
            blocks: lease_blocks,
            bytes: 1,
        }),
        seconds: Vec::new(),
        survived: Vec::new(),
    };
    assert!(Found::from_wire(&wire(4, 4, 4), 4).is_ok());
    assert_eq!(
        Found::from_wire(&wire(5, 4, 5), 4).unwrap_err().field,
        "present_blocks"
    );
    assert_eq!(
        Found::from_wire(&wire(3, 4, 3), 4).unwrap_err().field,
        "lease"
    );
    assert_eq!(
        Found::from_wire(&wire(4, 4, 3), 4).unwrap_err().field,
        "tiers"
    );
    let second = v1::SecondOwner {
        run_hash: vec![1; 32].into(),
        member: "b".into(),
        ttl_ms: 1,
    };
    let named = |seconds| v1::LookupResponse {
        seconds,
        ..wire(4, 4, 4)
    };
    assert!(Found::from_wire(&named(vec![second.clone(); 4]), 4).is_ok());
    assert_eq!(
        Found::from_wire(&named(vec![second; 5]), 4)
            .unwrap_err()
            .field,
        "seconds"
    );
    assert_eq!(
        Found::from_wire(&named(vec![v1::SecondOwner::default()]), 4)
            .unwrap_err()
            .field,
        "seconds.run_hash"
    );
    let piece = v1::GetResponse {
        block: 3,
        outcome: 1,
        ..Default::default()
    };
    assert_eq!(
        GetPiece::from_wire(&piece, RULES, 3).unwrap_err().field,
        "block"
    );
    let piece = v1::GetResponse {
        block: 0,
        outcome: 77,
        ..Default::default()
    };
    assert_eq!(
        GetPiece::from_wire(&piece, RULES, 3).unwrap_err().field,
        "outcome"
    );
}
