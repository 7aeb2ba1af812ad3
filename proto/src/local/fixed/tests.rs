use proptest::{
    collection::vec,
    option,
    prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest},
};

use super::*;
use crate::local::{Frame, Inbox};

fn frame(wire: &[u8]) -> Frame {
    let mut inbox = Inbox::new();
    let mut rest = wire;
    while !rest.is_empty() {
        let room = inbox.room();
        let count = room.len().min(rest.len());
        room[..count].copy_from_slice(&rest[..count]);
        inbox.filled(count);
        rest = &rest[count..];
    }
    let frame = inbox.take_frame().expect("a frame").expect("whole");
    assert!(inbox.is_empty());
    frame
}

fn fixed(wire: &[u8]) -> bytes::Bytes {
    match frame(wire) {
        Frame::Fixed(bytes) => bytes,
        Frame::Message(_) => panic!("a message"),
    }
}

fn hash() -> impl Strategy<Value = SequenceHash> {
    any::<[u8; 32]>().prop_map(SequenceHash)
}

fn chains() -> impl Strategy<Value = Chain> {
    let run = option::of(any::<[u8; 32]>().prop_map(RunHash));
    let chain = (any::<u32>(), run, option::of(hash()), vec(hash(), 1..40));
    chain.prop_map(|(first_index, run, parent, hashes)| Chain {
        first_index,
        run,
        parent,
        hashes,
        jumps: Vec::new(),
    })
}

fn header(bytes: usize) -> BlockHeader {
    let key = BlockKey {
        namespace: NamespaceId([1; 16]),
        hash: SequenceHash([2; 32]),
        part: Part::default(),
    };
    let place = Place {
        run: RunHash([3; 32]),
        index: bytes as u32,
        parent: (!bytes.is_multiple_of(3)).then_some(SequenceHash([4; 32])),
    };
    BlockHeader::describe(key, place, &vec![5; bytes])
}

proptest! {
    #[test]
    fn a_get_comes_out_as_it_went_in(
        chain in chains(),
        ids in (any::<u64>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<[u8; 16]>()),
        done in vec(any::<u64>(), 0..5),
        ranks in vec(any::<u16>(), 0..4),
    ) {
        let (sequence, timeout_ms, view, lease, namespace) = ids;
        let parts: Vec<Part> = (0..).zip(&ranks).map(|(i, rank)| Part { rank: *rank, layer_group: i }).collect();
        let asking = Asking {
            sequence,
            timeout_ms,
            done: &done,
            view_digest: ViewDigest(view),
            namespace: NamespaceId(namespace),
            lease: (lease != 0).then_some(LeaseId(lease)),
            chain: &chain,
            parts: &parts,
        };
        let mut wire = Vec::new();
        prop_assert!(encode_get(&asking, &mut wire).unwrap());
        let call = decode_get(&fixed(&wire)).unwrap();
        prop_assert_eq!((call.sequence, call.timeout_ms, call.done), (sequence, timeout_ms, done.clone()));
        let asked = call.asked.unwrap();
        // As its message does.
        let message = crate::v1::GetRequest {
            context: Some(crate::v1::RequestContext { view_digest: view, ..Default::default() }),
            namespace_id: bytes::Bytes::copy_from_slice(&namespace),
            chain: Some(crate::convert::chain_to_wire(&chain)),
            parts: crate::convert::parts_to_wire(&parts),
            lease_id: lease,
            piece_bytes: 0,
        };
        prop_assert_eq!(asked, request::Get::try_from(message).unwrap());
    }

    #[test]
    fn an_answer_comes_out_as_it_went_in(
        ids in (any::<u64>(), any::<u64>(), any::<u64>(), any::<u32>(), any::<u64>()),
        sizes in vec(0_usize..200_000, 0..6),
        spots in any::<u8>(),
    ) {
        let (sequence, boot, view, queue, hold) = ids;
        let head = GotHead {
            sequence,
            boot_id: BootId(boot),
            view_digest: ViewDigest(view),
            queue,
            hold,
        };
        let headers: Vec<BlockHeader> = sizes.iter().map(|size| header(*size)).collect();
        let spot = |i: usize| (spots >> i & 1 == 1).then_some(Spot {
            segment: i as u32,
            offset: hold,
            generation: view,
        });
        // A block of no bytes is none.
        let blocks = headers.iter().enumerate().map(|(i, header)| match header.length_bytes {
            0 => Telling::Not(GetOutcome::Expired),
            _ => Telling::Hit { header, tier: TierKind::Nvme, spot: spot(i) },
        });
        let mut wire = Vec::new();
        encode_got(&head, blocks, &mut wire).unwrap();
        let got = decode_got(&fixed(&wire)).unwrap();
        prop_assert_eq!(got.head, head);
        prop_assert_eq!(got.blocks.len(), headers.len());
        for (i, (block, header)) in got.blocks.into_iter().zip(&headers).enumerate() {
            if header.length_bytes == 0 {
                prop_assert_eq!(block, GotBlock { outcome: Some(GetOutcome::Expired), tier: None, hit: None });
                continue;
            }
            prop_assert_eq!(block.tier, Some(TierKind::Nvme));
            let hit = block.hit.unwrap();
            prop_assert_eq!(hit.spot, spot(i));
            let read = hit.clone().header(header.key);
            prop_assert!(read.check_seal());
            prop_assert_eq!(&read, header);
            let other = BlockKey { part: Part { rank: 1, layer_group: 0 }, ..header.key };
            prop_assert!(!hit.header(other).check_seal());
        }
    }

    #[test]
    fn any_bytes_are_a_frame_or_refused(bytes in vec(any::<u8>(), 0..300), kind in 1_u8..4) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = kind;
        }
        if let Some(second) = bytes.get_mut(1) {
            *second = 0;
        }
        let _ = decode_request(&bytes);
        let _ = decode_got(&bytes);
    }

    #[test]
    fn news_of_a_put_come_out_as_they_went_in(sequence in any::<u64>(), sums in vec(any::<u64>(), 1..9)) {
        let mut wire = Vec::new();
        encode_written(sequence, &sums, &mut wire).unwrap();
        let frame = fixed(&wire);
        prop_assert_eq!(decode_request(&frame), Ok(Request::Written(Written { sequence, sums })));
        prop_assert!(decode_request(&frame[..frame.len() - 1]).is_err());
        prop_assert!(decode_request(&frame[..WRITTEN_BYTES]).is_err());
    }

    #[test]
    fn a_frame_cut_short_is_refused(chain in chains(), cut in any::<proptest::sample::Index>()) {
        let asking = Asking { chain: &chain, ..asking(&chain) };
        let mut wire = Vec::new();
        encode_get(&asking, &mut wire).unwrap();
        let whole = &wire[PREFIX_BYTES..];
        let cut = cut.index(whole.len());
        match decode_get(&whole[..cut]) {
            Err(LocalFrameError::Misshapen(_)) => {}
            // Between two hashes it is another, shorter get; without any it asks for nothing.
            Ok(call) => {
                prop_assert!(cut >= GET_BYTES && (cut - GET_BYTES).is_multiple_of(32));
                prop_assert_eq!(call.asked.is_err(), cut == GET_BYTES);
            }
            Err(other) => panic!("{other}"),
        }
    }
}

fn asking(chain: &Chain) -> Asking<'_> {
    Asking {
        sequence: 1,
        timeout_ms: 2,
        done: &[],
        view_digest: ViewDigest(3),
        namespace: NamespaceId([4; 16]),
        lease: None,
        chain,
        parts: &[],
    }
}

#[test]
fn what_has_no_fixed_layout_is_left_to_a_message() {
    let mut chain = Chain::from_root(vec![SequenceHash([7; 32]); 3]);
    chain.jumps.push(crate::chain::Jump {
        at: 1,
        index: 9,
        run: None,
        parent: SequenceHash([8; 32]),
    });
    let mut wire = vec![1];
    assert_eq!(encode_get(&asking(&chain), &mut wire), Ok(false));
    chain.jumps.clear();
    let done = vec![0; 1 << 16];
    let asking = Asking {
        done: &done,
        ..asking(&chain)
    };
    assert_eq!(encode_get(&asking, &mut wire), Ok(false));
    assert_eq!(wire, [1]);
}

#[test]
fn what_is_wrong_with_a_field_is_said_as_of_a_message() {
    let chain = Chain::from_root(vec![SequenceHash([7; 32])]);
    let parts = [Part::default(), Part::default()];
    let asking = Asking {
        parts: &parts,
        ..asking(&chain)
    };
    let mut wire = Vec::new();
    encode_get(&asking, &mut wire).unwrap();
    let call = decode_get(&fixed(&wire)).unwrap();
    assert_eq!(call.asked.unwrap_err().field, "parts");
    assert_eq!(call.sequence, 1, "it can be refused");
}

#[test]
fn a_hit_promises_no_more_memory_than_the_frame_has() {
    let mut wire = Vec::new();
    let head = GotHead {
        sequence: 1,
        boot_id: BootId(2),
        view_digest: ViewDigest(3),
        queue: 0,
        hold: 0,
    };
    let header = header(70_000);
    let hit = Telling::Hit {
        header: &header,
        tier: TierKind::Ram,
        spot: None,
    };
    encode_got(&head, [hit].into_iter(), &mut wire).unwrap();
    let mut frame = wire[PREFIX_BYTES..].to_vec();
    assert!(decode_got(&frame).is_ok());
    frame[GOT_BYTES + 4..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
    frame[GOT_BYTES + 8..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(
        decode_got(&frame),
        Err(LocalFrameError::Misshapen(_))
    ));
}

#[test]
fn who_expects_a_message_takes_no_fixed_frame_for_one() {
    let chain = Chain::from_root(vec![SequenceHash([7; 32])]);
    let mut wire = Vec::new();
    encode_get(&asking(&chain), &mut wire).unwrap();
    let mut inbox = Inbox::new();
    inbox.room()[..wire.len()].copy_from_slice(&wire);
    inbox.filled(wire.len());
    let taken = inbox.take::<crate::v1::LocalRequest>();
    assert!(matches!(taken, Err(LocalFrameError::Misshapen(_))));
}
