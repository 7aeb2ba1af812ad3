//! Messages split anywhere come out as prost reads them; hostile bytes get an error and never a panic.

use bytes::{Bytes, BytesMut};
use proptest::collection::vec;
use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest};
use prost::Message;

use super::{DATA_TAG, Frame, FrameError, FrameLimits, FrameReader, head};
use crate::v1::{BlockHeader, GetResponse, PutRequest, PutStart, ResponseContext};

/// One message as the reader cut it.
type Cut = (Bytes, u64, Vec<u8>);

/// Reads all that is there, and how it ended.
fn read(reader: &mut FrameReader, cuts: &mut Vec<Cut>) -> Result<(), FrameError> {
    while let Some(frame) = reader.next()? {
        match frame {
            Frame::Head { message, data_len } => cuts.push((message, data_len, Vec::new())),
            Frame::Data(data) => {
                assert!(!data.is_empty());
                cuts.last_mut()
                    .expect("data follows a head")
                    .2
                    .extend_from_slice(&data);
            }
            Frame::End => {
                let (_, data_len, data) = cuts.last().expect("an end follows a head");
                assert_eq!(data.len() as u64, *data_len);
            }
        }
    }
    Ok(())
}

fn read_split(
    stream: &[u8],
    cuts_at: &[usize],
    limits: FrameLimits,
) -> (Vec<Cut>, Result<(), FrameError>) {
    let mut at: Vec<usize> = cuts_at.iter().map(|&cut| cut.min(stream.len())).collect();
    at.extend([0, stream.len()]);
    at.sort_unstable();
    let (mut reader, mut cuts) = (FrameReader::new(limits), Vec::new());
    for range in at.windows(2) {
        reader.push(Bytes::copy_from_slice(&stream[range[0]..range[1]]));
        if let Err(error) = read(&mut reader, &mut cuts) {
            assert_eq!(reader.next(), Err(error), "an error is final");
            assert_eq!(reader.finish(), Err(error));
            return (cuts, Err(error));
        }
    }
    let end = reader.finish();
    (cuts, end)
}

fn grpc(message: &impl Message) -> Vec<u8> {
    let mut stream = vec![0];
    stream.extend((message.encoded_len() as u32).to_be_bytes());
    stream.extend(message.encode_to_vec());
    stream
}

fn message() -> impl Strategy<Value = GetResponse> {
    (
        any::<Option<u64>>(),
        any::<u32>(),
        0i32..9,
        any::<Option<[u8; 32]>>(),
        vec(any::<u64>(), 0..40),
        any::<u64>(),
        vec(any::<u8>(), 0..300),
    )
        .prop_map(
            |(boot_id, block, outcome, hash, page_sums, offset, data)| GetResponse {
                context: boot_id.map(|boot_id| ResponseContext {
                    boot_id,
                    ..Default::default()
                }),
                block,
                outcome,
                seconds: Vec::new(),
                header: hash.map(|hash| BlockHeader {
                    hash: hash.to_vec().into(),
                    page_sums,
                    ..Default::default()
                }),
                tier: 0,
                offset,
                data: data.into(),
            },
        )
}

proptest! {
    #[test]
    fn messages_split_anywhere_come_out_as_prost_reads_them(
        messages in vec(message(), 0..5), cuts_at in vec(0usize..3000, 0..20),
    ) {
        let stream: Vec<u8> = messages.iter().flat_map(grpc).collect();
        let (cuts, end) = read_split(&stream, &cuts_at, FrameLimits::default());
        prop_assert_eq!(end, Ok(()));
        let read: Vec<GetResponse> = cuts
            .into_iter()
            .map(|(message, _, data)| GetResponse {
                data: data.into(),
                ..GetResponse::decode(message).expect("the head is a message")
            })
            .collect();
        prop_assert_eq!(read, messages);
    }

    #[test]
    fn a_head_and_its_payload_are_what_prost_writes(message in message()) {
        let without = GetResponse { data: Bytes::new(), ..message.clone() };
        let mut sent = head(&without, message.data.len()).to_vec();
        sent.extend_from_slice(&message.data);
        prop_assert_eq!(sent, grpc(&message));
    }

    #[test]
    fn a_stream_cut_short_is_truncated(messages in vec(message(), 1..4), keep: usize) {
        let ends: Vec<usize> = messages
            .iter()
            .scan(0, |end, message| { *end += grpc(message).len(); Some(*end) })
            .collect();
        let stream: Vec<u8> = messages.iter().flat_map(grpc).collect();
        let keep = keep % stream.len();
        let (cuts, end) = read_split(&stream[..keep], &[keep / 2], FrameLimits::default());
        prop_assert!(cuts.len() <= messages.len());
        if keep == 0 || ends.contains(&keep) {
            prop_assert_eq!(end, Ok(()));
        } else {
            let truncated = matches!(end, Err(FrameError::Truncated { .. }));
            prop_assert!(truncated, "{:?}", end);
        }
    }

    #[test]
    fn hostile_bytes_get_the_same_answer_however_they_are_split(
        body in vec(any::<u8>(), 0..200), length in 0u32..220, cuts_at in vec(0usize..200, 0..20),
    ) {
        let mut stream = vec![0];
        stream.extend(length.to_be_bytes());
        stream.extend(body);
        let limits = FrameLimits { max_head_bytes: 100, max_data_bytes: 64 };
        let (whole, whole_end) = read_split(&stream, &[], limits);
        let (split, split_end) = read_split(&stream, &cuts_at, limits);
        prop_assert_eq!(whole, split);
        let kind = |end: Result<(), FrameError>| end.map_err(|error| std::mem::discriminant(&error));
        prop_assert_eq!(kind(whole_end), kind(split_end));
    }

    #[test]
    fn a_broken_byte_never_panics_and_never_invents_payload(
        messages in vec(message(), 1..3), at: usize, byte: u8, cuts_at in vec(0usize..900, 0..9),
    ) {
        let mut stream: Vec<u8> = messages.iter().flat_map(grpc).collect();
        let at = at % stream.len();
        stream[at] = byte;
        let (cuts, _) = read_split(&stream, &cuts_at, FrameLimits::default());
        let total: usize = cuts.iter().map(|(message, _, data)| message.len() + data.len()).sum();
        prop_assert!(total <= stream.len());
    }

    #[test]
    fn what_the_reader_takes_prost_takes_with_the_same_payload(body in vec(any::<u8>(), 0..60)) {
        let mut stream = vec![0];
        stream.extend((body.len() as u32).to_be_bytes());
        stream.extend_from_slice(&body);
        let (cuts, end) = read_split(&stream, &[], FrameLimits::default());
        if let (Ok(()), [(head, _, data)], Ok(message)) = (end, &cuts[..], PutRequest::decode(&body[..])) {
            prop_assert_eq!(&message.data[..], &data[..]);
            prop_assert_eq!(PutRequest { data: Bytes::new(), ..message }, PutRequest::decode(head.clone()).unwrap());
        }
    }
}

/// The error for one message with these bytes.
fn error(body: &[u8]) -> FrameError {
    let mut stream = vec![0];
    stream.extend((body.len() as u32).to_be_bytes());
    stream.extend_from_slice(body);
    let limits = FrameLimits {
        max_head_bytes: 16,
        max_data_bytes: 8,
    };
    read_split(&stream, &[], limits)
        .1
        .expect_err("the bytes are wrong")
}

#[test]
fn each_wrong_thing_has_its_own_name() {
    assert_eq!(
        error(&[DATA_TAG, 2, 1]),
        FrameError::Overrun { over_bytes: 1 }
    );
    assert_eq!(
        error(&[DATA_TAG, 1, 1, 0x08, 1]),
        FrameError::DataNotLast { trailing_bytes: 2 }
    );
    assert_eq!(
        error(&[DATA_TAG, 1, 1, DATA_TAG, 1, 1]),
        FrameError::DataNotLast { trailing_bytes: 3 }
    );
    assert_eq!(
        error(&[DATA_TAG, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        FrameError::DataTooLong {
            length_bytes: 9,
            limit_bytes: 8
        }
    );
    assert_eq!(error(&[0x78, 1]), FrameError::DataType { wire_type: 0 });
    assert_eq!(error(&[0x02, 0]), FrameError::BadTag { tag: 2 });
    assert_eq!(error(&[0x0b, 0x0c]), FrameError::BadTag { tag: 0x0b });
    assert_eq!(error(&[0x08, 0x80]), FrameError::Overrun { over_bytes: 1 });
    assert_eq!(error(&[0x0a, 5, 1]), FrameError::Overrun { over_bytes: 4 });
    assert_eq!(error(&[0xff; 11]), FrameError::BadVarint);
    assert_eq!(
        error(&[
            0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02
        ]),
        FrameError::BadVarint
    );
    assert_eq!(
        error(&[&[0x0a, 18][..], &[0; 18]].concat()),
        FrameError::HeadTooLong { limit_bytes: 16 }
    );
    let too_long = FrameError::MessageTooLong {
        length_bytes: 36,
        limit_bytes: 35,
    };
    assert_eq!(error(&[0; 36]), too_long);
}

#[test]
fn a_compressed_message_is_refused_at_its_first_bytes() {
    let mut reader = FrameReader::default();
    reader.push(Bytes::from_static(&[1, 0, 0, 0, 0]));
    assert_eq!(reader.next(), Err(FrameError::Compressed { flag: 1 }));
}

#[test]
fn a_hostile_length_is_refused_before_any_of_it_is_held() {
    let mut reader = FrameReader::default();
    reader.push(Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff]));
    assert!(matches!(
        reader.next(),
        Err(FrameError::MessageTooLong { .. })
    ));
    let mut reader = FrameReader::default();
    // Field 1, length 32 MiB, in a message that could hold it as data.
    reader.push(Bytes::from_static(&[
        0, 0x03, 0, 0, 0, 0x0a, 0x80, 0x80, 0x80, 0x10,
    ]));
    assert!(matches!(reader.next(), Err(FrameError::HeadTooLong { .. })));
}

#[test]
fn payload_and_head_are_slices_of_the_chunk() {
    let message = PutRequest {
        start: Some(PutStart {
            ack: 2,
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut stream = BytesMut::from(&head(&message, 1 << 20)[..]);
    stream.resize(stream.len() + (1 << 20), 7);
    let chunk = stream.freeze();
    let range = chunk.as_ptr_range();
    let mut reader = FrameReader::default();
    reader.push(chunk.clone());
    let Ok(Some(Frame::Head {
        message: bytes,
        data_len,
    })) = reader.next()
    else {
        panic!("a head")
    };
    assert_eq!(
        (PutRequest::decode(bytes.clone()).unwrap(), data_len),
        (message, 1 << 20)
    );
    assert!(range.contains(&bytes.as_ptr()));
    let Ok(Some(Frame::Data(data))) = reader.next() else {
        panic!("data")
    };
    assert_eq!(data.len(), 1 << 20);
    assert!(range.contains(&data.as_ptr()));
    assert_eq!(reader.next(), Ok(Some(Frame::End)));
    assert_eq!(reader.next(), Ok(None));
    assert_eq!(reader.finish(), Ok(()));
}

#[test]
fn an_empty_message_is_a_head_and_an_end() {
    let (cuts, end) = read_split(&[0; 10], &[3, 7], FrameLimits::default());
    assert_eq!(end, Ok(()));
    assert_eq!(cuts, [(Bytes::new(), 0, vec![]), (Bytes::new(), 0, vec![])]);
    // Explicitly empty data is as good as none.
    let (cuts, end) = read_split(&[0, 0, 0, 0, 2, DATA_TAG, 0], &[], FrameLimits::default());
    assert_eq!((cuts, end), (vec![(Bytes::new(), 0, vec![])], Ok(())));
}

#[test]
fn the_longest_allowed_head_and_data_pass_together() {
    let limits = FrameLimits {
        max_head_bytes: 16,
        max_data_bytes: 8,
    };
    let body = [&[0x0a, 14][..], &[1; 14], &[DATA_TAG, 8], &[2; 8]].concat();
    let mut stream = vec![0, 0, 0, 0, body.len() as u8];
    stream.extend(&body);
    for cut in 0..stream.len() {
        let (cuts, end) = read_split(&stream, &[cut], limits);
        assert_eq!((cuts[0].1, end), (8, Ok(())));
    }
}
