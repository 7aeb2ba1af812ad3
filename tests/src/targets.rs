//! Every parser of bytes that come from outside, as a function of those bytes.
//!
//! ```text
//! target(bytes) ─► parser ─► error: fine, as long as it is one
//!                        └─► value ─► written out again ─► parsed again ─► the same value
//! ```
//!
//! A target panics when a parser does, when it loops past a bound, or when what it read does not survive the
//! way there and back. The bounded run (`tests/fuzz.rs`) and libFuzzer (`tests/fuzz/`) use the same functions.

use std::{
    cell::Cell,
    io::{self, IoSlice, IoSliceMut},
    str::FromStr,
};

use bytes::Bytes;
use kvproto::{
    BlockKey, NamespaceId, Place, SequenceHash, convert,
    frame::{Frame, FrameLimits, FrameReader},
    http2::{Fields, Lane, LaneLimits, Pump, Receiver, Role, Socket},
    local::{self, Inbox, fixed},
    v1,
};
use kvserver::{
    config::Config,
    engine::replay::Trace,
    tier::{journal, record},
};
use prost::Message;

/// A parser under test.
pub type Target = fn(&[u8]);

/// Name (and corpus folder) of each target.
pub const TARGETS: &[(&str, Target)] = &[
    ("frame", frame),
    ("lane", lane),
    ("local", local),
    ("convert_request", convert_request),
    ("convert_answer", convert_answer),
    ("key", key),
    ("record", record_of_a_block),
    ("journal", journal_of_a_tier),
    ("trace", trace),
    ("config", config),
];

/// HTTP/2 on a lane, as either end reads it: however the bytes come, the same headers and the same body come out.
pub fn lane(bytes: &[u8]) {
    for role in [Role::Server, Role::Client] {
        let whole = read_lane(role, bytes, usize::MAX, 0);
        for (step, room) in [(1, 0), (7, 5), (usize::MAX, 100)] {
            assert_eq!(
                read_lane(role, bytes, step, room),
                whole,
                "{role:?} {step} {room}"
            );
        }
    }
}

/// What a lane makes of the bytes behind a greeting: header fields, body, and whether it broke.
fn read_lane(role: Role, bytes: &[u8], step: usize, room: usize) -> (Fields, Vec<u8>, bool) {
    let limits = LaneLimits {
        max_headers_bytes: 4 << 10,
        max_frame_bytes: 32 << 10,
        send_frame_bytes: 32 << 10,
        read_bytes: 16 << 10,
    };
    let script = Script {
        left: Cell::new(bytes),
        step,
    };
    let mut lane = Lane::new(role, limits);
    if role == Role::Client {
        lane.open(&[0x88]);
    }
    let mut kept = Kept {
        room: vec![0; room],
        ..Kept::default()
    };
    loop {
        lane.flush(&script).expect("every write is taken");
        match lane.pump(&script, &mut kept) {
            Ok(Pump::Starved) if script.left.get().is_empty() => {
                return (kept.fields, kept.body, false);
            }
            Ok(_) => {}
            Err(_) => return (kept.fields, kept.body, true),
        }
    }
}

/// A socket that has these bytes and no more, and takes everything.
struct Script<'a> {
    left: Cell<&'a [u8]>,
    step: usize,
}

impl Socket for Script<'_> {
    fn try_read_vectored(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let (all, mut left) = (self.left.get().len(), self.step);
        for slice in slices {
            let (now, later) = self
                .left
                .get()
                .split_at(slice.len().min(left).min(self.left.get().len()));
            slice[..now.len()].copy_from_slice(now);
            left -= now.len();
            self.left.set(later);
        }
        match all - self.left.get().len() {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            read => Ok(read),
        }
    }

    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(slices.iter().map(|slice| slice.len()).sum())
    }
}

#[derive(Default)]
struct Kept {
    fields: Fields,
    body: Vec<u8>,
    room: Vec<u8>,
}

impl Receiver for Kept {
    fn headers(&mut self, fields: Fields) -> io::Result<()> {
        self.fields.extend(fields);
        Ok(())
    }

    fn room(&mut self) -> Option<&mut [u8]> {
        (!self.room.is_empty()).then_some(&mut self.room[..])
    }

    fn landed(&mut self, bytes: usize) -> io::Result<()> {
        self.body.extend_from_slice(&self.room[..bytes]);
        Ok(())
    }

    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.body.extend_from_slice(bytes);
        Ok(())
    }
}

/// Bulk messages: any split of the bytes gives the same frames, and what is whole is what prost reads.
pub fn frame(bytes: &[u8]) {
    let limits = FrameLimits {
        max_head_bytes: 4 << 10,
        max_data_bytes: 32 << 10,
    };
    let read = |step: usize| {
        let mut reader = FrameReader::new(limits);
        let (mut heads, mut data, mut ends) = (Vec::new(), Vec::new(), 0_u32);
        for chunk in bytes.chunks(step.max(1)) {
            reader.push(Bytes::copy_from_slice(chunk));
            loop {
                match reader.next() {
                    Ok(Some(Frame::Head { message, data_len })) => heads.push((message, data_len)),
                    Ok(Some(Frame::Data(piece))) => data.extend_from_slice(&piece),
                    Ok(Some(Frame::End)) => ends += 1,
                    Ok(None) => break,
                    Err(error) => return (heads, data, ends, Some(error)),
                }
            }
        }
        (heads, data, ends, reader.finish().err())
    };
    let whole = read(bytes.len());
    let split = read(1 + bytes.first().map_or(0, |byte| usize::from(*byte)));
    assert_eq!(whole.0, split.0, "heads depend on how the bytes were cut");
    assert_eq!(whole.2, split.2, "ends depend on how the bytes were cut");
    if whole.3.is_none() {
        assert_eq!(whole.1, split.1, "data depends on how the bytes were cut");
        for (head, _) in &whole.0 {
            let _ = v1::PutRequest::decode(head.clone());
            let _ = v1::GetResponse::decode(head.clone());
        }
    }
}

/// The same-host path, as either end reads it: however the bytes come, the same messages come out, and a request that
/// is read is read again from what it is written as.
pub fn local(bytes: &[u8]) {
    let whole = read_local(bytes, usize::MAX);
    for step in [1, 7, 4096] {
        assert_eq!(read_local(bytes, step), whole, "cut every {step}");
    }
    for call in whole.0 {
        let mut frame = Vec::new();
        match &call {
            LocalCall::Message(request) => {
                kvproto::local::encode(request, &mut frame).expect("as short as it came");
            }
            LocalCall::Fixed(fixed::Request::Get(call)) => {
                let Ok(asked) = &call.asked else {
                    continue;
                };
                let asking = fixed::Asking {
                    sequence: call.sequence,
                    timeout_ms: call.timeout_ms,
                    done: &call.done,
                    view_digest: asked.context.view_digest.unwrap_or_default(),
                    namespace: asked.namespace,
                    lease: asked.lease,
                    chain: &asked.chain,
                    parts: &asked.parts,
                };
                let put = fixed::encode_get(&asking, &mut frame);
                assert_eq!(put, Ok(true), "as short as it came");
            }
            LocalCall::Fixed(fixed::Request::Written(written)) => {
                let put = fixed::encode_written(written.sequence, &written.sums, &mut frame);
                put.expect("as short as it came");
            }
        }
        assert_eq!(read_local(&frame, usize::MAX).0, [call]);
    }
    let mut inbox = Inbox::new();
    feed(&mut inbox, bytes);
    while let Ok(Some(frame)) = inbox.take_frame() {
        match frame {
            local::Frame::Message(bytes) => drop(v1::LocalReply::decode(bytes)),
            local::Frame::Fixed(bytes) => drop(fixed::decode_got(&bytes)),
        }
    }
}

/// A call of the same-host path, in either form.
#[derive(Debug, PartialEq)]
enum LocalCall {
    Message(v1::LocalRequest),
    Fixed(fixed::Request),
}

/// The calls that the bytes are, and whether they break off in something that is none.
fn read_local(bytes: &[u8], step: usize) -> (Vec<LocalCall>, bool) {
    let (mut inbox, mut calls) = (Inbox::new(), Vec::new());
    for piece in bytes.chunks(step.min(bytes.len().max(1))) {
        feed(&mut inbox, piece);
        loop {
            let call = match inbox.take_frame() {
                Ok(Some(local::Frame::Message(bytes))) => {
                    v1::LocalRequest::decode(bytes).ok().map(LocalCall::Message)
                }
                Ok(Some(local::Frame::Fixed(bytes))) => {
                    fixed::decode_request(&bytes).ok().map(LocalCall::Fixed)
                }
                Ok(None) => break,
                Err(_) => None,
            };
            match call {
                Some(call) => calls.push(call),
                None => return (calls, true),
            }
        }
    }
    (calls, false)
}

fn feed(inbox: &mut Inbox, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let room = inbox.room();
        let count = room.len().min(bytes.len());
        room[..count].copy_from_slice(&bytes[..count]);
        inbox.filled(count);
        bytes = &bytes[count..];
    }
}

/// Every request: decoded, judged, and if it is accepted, the same after a round trip.
pub fn convert_request(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else {
        return;
    };
    match kind % 9 {
        0 => judged::<v1::OpenNamespaceRequest, convert::request::OpenNamespace>(bytes),
        1 => judged::<v1::LookupRequest, convert::request::Lookup>(bytes),
        2 => judged::<v1::GetRequest, convert::request::Get>(bytes),
        3 => judged::<v1::PutStart, convert::request::PutStart>(bytes),
        4 => judged::<v1::RenewRequest, convert::request::Renew>(bytes),
        5 => judged::<v1::ReleaseRequest, convert::request::Release>(bytes),
        6 => judged::<v1::InvalidateRequest, convert::request::Invalidate>(bytes),
        7 => judged::<v1::WatchRequest, convert::request::Watch>(bytes),
        _ => judged::<v1::ListNamespacesRequest, convert::request::ListNamespaces>(bytes),
    }
}

fn judged<W, D>(bytes: &[u8])
where
    W: Message + Default,
    D: TryFrom<W, Error = kvproto::FieldError>,
{
    if let Ok(message) = W::decode(bytes)
        && let Err(error) = D::try_from(message)
    {
        assert!(!error.field.is_empty(), "a refusal names no field");
        assert!(
            !error.problem.is_empty(),
            "a refusal of {} gives no reason",
            error.field
        );
    }
}

/// Answers, as a client reads them.
pub fn convert_answer(bytes: &[u8]) {
    if let Ok(answer) = v1::LookupResponse::decode(bytes) {
        let _ = convert::answer::Lookup::from_wire(&answer, 64);
    }
    if let Ok(answer) = v1::WatchResponse::decode(bytes) {
        let _ = convert::answer::WatchEvent::from_wire(&answer);
    }
    if let Ok(answer) = v1::NamespaceStats::decode(bytes) {
        let _ = convert::answer::NamespaceStats::try_from(answer);
    }
    if let Ok(wire) = v1::BlockHeader::decode(bytes) {
        let rules = convert::HeaderRules {
            namespace: NamespaceId([7; 16]),
            run_blocks: 8,
            max_block_bytes: 64 << 20,
        };
        if let Ok(header) = convert::header(&wire, rules) {
            let again = convert::header(&v1::BlockHeader::from(&header), rules);
            assert_eq!(again.as_ref(), Ok(&header), "a header changes on the wire");
        }
    }
}

/// Keys and places from bytes and text.
pub fn key(bytes: &[u8]) {
    if let Ok(bytes) = bytes.try_into() {
        assert_eq!(BlockKey::from_bytes(bytes).to_bytes(), *bytes);
    }
    if let Ok(bytes) = bytes.try_into()
        && let Some(place) = Place::from_bytes(bytes)
    {
        assert_eq!(place.to_bytes(), *bytes);
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(hash) = SequenceHash::from_str(text)
    {
        assert_eq!(hash.to_string(), text.to_lowercase());
    }
}

/// A stored record: what is read was sealed, and verifies.
pub fn record_of_a_block(bytes: &[u8]) {
    if let Ok((header, payload)) = record::parse(bytes) {
        assert_eq!(header.length_bytes, payload.len() as u64);
        let head = record::encode_head(&header);
        let again = record::read_head(&mut &head[..]).expect("our own head");
        assert_eq!(again, header);
    }
}

/// A residency journal: entries before the first broken record, the same when written again.
pub fn journal_of_a_tier(bytes: &[u8]) {
    let (entries, scan) = journal::parse(bytes);
    assert_eq!(entries.len() as u64, scan.records);
    assert!(scan.good_bytes <= bytes.len() as u64);
    if scan.extent_bytes > 0 {
        let written = journal::encode(scan.extent_bytes, &entries);
        assert_eq!(
            journal::parse(&written).0,
            entries,
            "a journal changes when it is rewritten"
        );
    }
}

/// A request trace.
pub fn trace(bytes: &[u8]) {
    if let Ok(trace) = Trace::read(bytes) {
        assert!(trace.unique_blocks() <= trace.block_refs());
    }
}

/// Settings: `name=value` lines through the same door as file, environment and flags.
pub fn config(bytes: &[u8]) {
    let mut config = Config::default();
    for line in String::from_utf8_lossy(bytes).lines() {
        if let Some((name, value)) = line.split_once('=')
            && let Err(error) = config.set(name.trim(), value.trim(), "fuzz")
        {
            assert!(!error.to_string().is_empty());
        }
    }
    let _ = config.validate();
}
