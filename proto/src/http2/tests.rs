//! Two lanes over a pipe that moves any number of bytes at a time, and takes some only now and then.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    rc::Rc,
};

use proptest::prelude::{
    Just, ProptestConfig, any, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use proptest::{collection::vec, option::of};

use super::{
    Fields, Lane, LaneLimits, Outgoing, Piece, Pump, Push, Receiver, Role, Socket,
    frame::{
        ACK, END_HEADERS, END_STREAM, HEAD_BYTES, Head, Kind, PADDED, PREFACE, put_field, put_frame,
    },
};

const LIMITS: LaneLimits = LaneLimits {
    max_headers_bytes: 16 << 10,
    max_frame_bytes: 1 << 20,
    send_frame_bytes: 64 << 10,
    read_bytes: 10_000,
};

/// One direction of a pipe.
type Line = Rc<RefCell<VecDeque<u8>>>;

struct End {
    inbound: Line,
    outbound: Line,
    /// Bytes per call, taken in turn; 0 is `WouldBlock`.
    steps: RefCell<VecDeque<usize>>,
}

impl End {
    fn step(&self) -> io::Result<usize> {
        let mut steps = self.steps.borrow_mut();
        let step = steps.pop_front().unwrap_or(usize::MAX);
        steps.push_back(step);
        if step == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(step)
    }
}

impl Socket for End {
    fn try_read_vectored(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut line = self.inbound.borrow_mut();
        if line.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let (mut left, mut read) = (self.step()?, 0);
        for slice in slices {
            let count = slice.len().min(left).min(line.len());
            for (to, from) in slice.iter_mut().zip(line.drain(..count)) {
                *to = from;
            }
            read += count;
            left -= count;
        }
        Ok(read)
    }

    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let (mut left, mut written) = (self.step()?, 0);
        for slice in slices {
            let count = slice.len().min(left);
            self.outbound.borrow_mut().extend(&slice[..count]);
            written += count;
            left -= count;
        }
        Ok(written)
    }
}

fn pipe(steps: &[usize]) -> (End, End) {
    let (up, down) = (Line::default(), Line::default());
    // A pipe that never moves would be no pipe.
    let steps: VecDeque<usize> = steps.iter().copied().chain([1]).collect();
    let end = |inbound: &Line, outbound: &Line| End {
        inbound: Rc::clone(inbound),
        outbound: Rc::clone(outbound),
        steps: RefCell::new(steps.clone()),
    };
    (end(&down, &up), end(&up, &down))
}

/// Keeps what comes in; has room for every other piece.
#[derive(Default)]
struct Keeper {
    fields: Fields,
    body: Vec<u8>,
    room: Vec<u8>,
    has_room: bool,
}

impl Receiver for Keeper {
    fn headers(&mut self, fields: Fields) -> io::Result<()> {
        self.fields.extend(fields);
        Ok(())
    }

    fn room(&mut self) -> Option<&mut [u8]> {
        self.has_room.then_some(&mut self.room[..])
    }

    fn landed(&mut self, bytes: usize) -> io::Result<()> {
        assert!(bytes <= self.room.len());
        self.body.extend_from_slice(&self.room[..bytes]);
        self.has_room = false;
        Ok(())
    }

    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.body.extend_from_slice(bytes);
        self.has_room = !self.room.is_empty();
        Ok(())
    }
}

fn keeper(room: usize) -> Keeper {
    Keeper {
        room: vec![0; room],
        ..Keeper::default()
    }
}

fn take_preface(end: &End) {
    let mut line = end.inbound.borrow_mut();
    let preface: Vec<u8> = line.drain(..PREFACE.len()).collect();
    assert_eq!(preface, PREFACE);
}

fn block(name: &str, value: &str) -> Vec<u8> {
    let mut block = Vec::new();
    put_field(&mut block, name.as_bytes(), value.as_bytes());
    block
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_byte_arrives_however_the_pipe_moves(
        bodies in vec((vec(any::<u8>(), 0..3000), vec(any::<u8>(), 0..60_000)), 1..5),
        cut in 1usize..4000,
        steps in vec(prop_oneof![Just(0), 1usize..20_000], 0..9),
        room in 0usize..5000,
    ) {
        let (client_end, server_end) = pipe(&steps);
        let (mut client, mut server) = (Lane::new(Role::Client, LIMITS), Lane::new(Role::Server, LIMITS));
        while client.has_mail() {
            let _ = client.flush(&client_end).expect("a flush");
        }
        take_preface(&server_end);
        for (asked, answered) in &bodies {
            client.open(&block("path", "/x"));
            let mut question = Outgoing::whole(asked.chunks(cut).map(Into::into));
            let (mut heard, mut answer) = (keeper(room), Outgoing::default());
            let mut got = keeper(room);
            let mut is_answering = false;
            let mut rounds = 0;
            loop {
                rounds += 1;
                prop_assert!(rounds < 2_000_000, "the lanes stand still");
                client.push(&client_end, &mut question).expect("a push");
                if client.pump(&client_end, &mut got).expect("a pump") == Pump::Ended {
                    break;
                }
                server.pump(&server_end, &mut heard).expect("a pump");
                if server.peer_has_ended() && !heard.fields.is_empty() && !is_answering {
                    is_answering = true;
                    server.put_headers(&block("status", "200"), false);
                    answered.chunks(cut).for_each(|piece| answer.push(piece));
                    answer.close_with(server.trailers(&block("grpc-status", "0")));
                }
                let _ = server.push(&server_end, &mut answer).expect("a push");
            }
            prop_assert!(question.is_sent());
            prop_assert_eq!(&heard.body, asked);
            prop_assert_eq!(&heard.fields, &vec![(b"path".to_vec(), b"/x".to_vec())]);
            prop_assert_eq!(&got.body, answered);
            prop_assert_eq!(got.fields.len(), 2);
            while server.push(&server_end, &mut answer).expect("a push") != Push::Done {}
        }
        prop_assert!(client.is_idle());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// gRPC servers that are not ours may pad what they answer.
    #[test]
    fn padding_is_passed_over_and_takes_from_the_windows(
        pieces in vec((vec(any::<u8>(), 0..3000), of(any::<u8>())), 1..9),
        steps in vec(prop_oneof![Just(0), 1usize..4000], 0..9),
        room in 0usize..2000,
    ) {
        let (client_end, server_end) = pipe(&steps);
        let mut client = Lane::new(Role::Client, LIMITS);
        client.open(&block("path", "/x"));
        let head = block("status", "200");
        let (mut answer, mut body, mut flow) = (Vec::new(), Vec::new(), 0);
        put_frame(&mut answer, Kind::Headers, END_HEADERS, 1, &head);
        for (at, (piece, padding)) in pieces.iter().enumerate() {
            let end = if at + 1 == pieces.len() { END_STREAM } else { 0 };
            let (payload, flags) = match padding {
                Some(bytes) => {
                    let zeros = vec![0; usize::from(*bytes)];
                    ([&[*bytes], &piece[..], &zeros].concat(), end | PADDED)
                }
                None => (piece.clone(), end),
            };
            put_frame(&mut answer, Kind::Data, flags, 1, &payload);
            flow += payload.len() as u64;
            body.extend_from_slice(piece);
        }
        server_end.outbound.borrow_mut().extend(answer);
        let mut got = keeper(room);
        while client.pump(&client_end, &mut got).expect("a pump") != Pump::Ended {}
        prop_assert_eq!(got.body, body);
        prop_assert_eq!(client.received_bytes(), (flow, flow));
    }
}

/// What a server says to these bytes behind a preface.
fn served(bytes: &[u8]) -> io::Result<Vec<Pump>> {
    let (_client, server_end) = pipe(&[]);
    server_end.inbound.borrow_mut().extend(bytes);
    let mut server = Lane::new(Role::Server, LIMITS);
    let mut pumps = Vec::new();
    loop {
        server.flush(&server_end)?;
        match server.pump(&server_end, &mut keeper(100))? {
            Pump::Starved => return Ok(pumps),
            pump => pumps.push(pump),
        }
    }
}

/// Kind, flags, stream and payload.
type Frame<'a> = (Kind, u8, u32, &'a [u8]);

fn frames(frames: &[Frame<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, flags, stream, payload) in frames {
        put_frame(&mut out, *kind, *flags, *stream, payload);
    }
    out
}

#[test]
fn what_the_protocol_forbids_is_a_breach() {
    let head = block("a", "b");
    let open = (Kind::Headers, END_HEADERS, 1, &head[..]);
    let half = (Kind::Headers, 0, 1, &head[..1]);
    let cases: Vec<(&str, Vec<Frame<'_>>)> = vec![
        (
            "a second stream",
            vec![open, (Kind::Headers, END_HEADERS, 3, &head)],
        ),
        (
            "an even stream",
            vec![(Kind::Headers, END_HEADERS, 2, &head)],
        ),
        ("DATA before HEADERS", vec![(Kind::Data, 0, 1, b"x")]),
        (
            "DATA of another stream",
            vec![open, (Kind::Data, 0, 3, b"x")],
        ),
        (
            "DATA behind the end",
            vec![
                open,
                (Kind::Data, END_STREAM, 1, b"x"),
                (Kind::Data, 0, 1, b"x"),
            ],
        ),
        (
            "DATA shorter than its padding",
            vec![open, (Kind::Data, PADDED, 1, &[2, 1])],
        ),
        (
            "padded DATA without a length",
            vec![open, (Kind::Data, PADDED, 1, &[])],
        ),
        (
            "CONTINUATION alone",
            vec![(Kind::Continuation, END_HEADERS, 1, &head)],
        ),
        (
            "a block interrupted",
            vec![half, (Kind::Ping, 0, 0, &[0; 8])],
        ),
        (
            "a block of another stream",
            vec![half, (Kind::Continuation, END_HEADERS, 3, &head)],
        ),
        (
            "HEADERS shorter than their padding",
            vec![(Kind::Headers, END_HEADERS | PADDED, 1, &[9, 0])],
        ),
        ("a short PING", vec![(Kind::Ping, 0, 0, &[0; 7])]),
        (
            "a short WINDOW_UPDATE",
            vec![(Kind::WindowUpdate, 0, 0, &[0; 3])],
        ),
        (
            "a window opened by nothing",
            vec![(Kind::WindowUpdate, 0, 0, &[0; 4])],
        ),
        (
            "a window that overflows",
            vec![(Kind::WindowUpdate, 0, 0, &[0x7f, 255, 255, 255])],
        ),
        (
            "SETTINGS of odd length",
            vec![(Kind::Settings, 0, 0, &[0; 5])],
        ),
        ("SETTINGS on a stream", vec![(Kind::Settings, 0, 1, &[])]),
        (
            "a window setting over the top",
            vec![(Kind::Settings, 0, 0, &[0, 4, 255, 0, 0, 0])],
        ),
        ("PUSH_PROMISE", vec![(Kind::PushPromise, 0, 1, &[])]),
        (
            "a large control frame",
            vec![(Kind::Other(0xbe), 0, 0, &[0; (16 << 10) + 1])],
        ),
        (
            "a header block too long",
            vec![
                half,
                (Kind::Continuation, 0, 1, &[0; 16_000]),
                (Kind::Continuation, 0, 1, &[0; 16_000]),
            ],
        ),
        (
            "Huffman coding",
            vec![(Kind::Headers, END_HEADERS, 1, &[0, 0x81, 0xff, 0])],
        ),
        (
            "a field of a table",
            vec![(Kind::Headers, END_HEADERS, 1, &[0x82])],
        ),
        (
            "a second stream before the answer",
            vec![
                (Kind::Headers, END_HEADERS | END_STREAM, 1, &head),
                (Kind::Headers, END_HEADERS, 3, &head),
            ],
        ),
        (
            "nonsense for HPACK",
            vec![(
                Kind::Headers,
                END_HEADERS,
                1,
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            )],
        ),
    ];
    for (what, case) in cases {
        let error = served(&frames(&case)).expect_err(what);
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{what}: {error}");
    }
    let reset = served(&frames(&[open, (Kind::Reset, 0, 1, &[0; 4])]));
    assert_eq!(
        reset.expect_err("a reset").kind(),
        io::ErrorKind::ConnectionReset
    );
}

#[test]
fn what_it_allows_is_passed_over_or_answered() {
    let head = block("a", "b");
    let pumps = served(&frames(&[
        (Kind::Settings, 0, 0, &[0xf7, 0xe0, 0, 0, 0, 1]),
        (Kind::Settings, ACK, 0, &[]),
        (Kind::Ping, 0, 0, &[1; 8]),
        (Kind::Ping, ACK, 0, &[1; 8]),
        (Kind::Other(0xbe), 7, 9, b"from a later version"),
        (Kind::Headers, 0, 1, &head[..2]),
        (Kind::Continuation, END_HEADERS, 1, &head[2..]),
        (Kind::Data, 0, 1, b""),
        (Kind::Data, END_STREAM, 1, b"x"),
        (Kind::WindowUpdate, 0, 1, &[0, 0, 1, 0]),
        (Kind::Reset, 0, 7, &[0; 4]),
    ]))
    .expect("nothing wrong");
    assert!(pumps.contains(&Pump::Opened) && pumps.contains(&Pump::Ended));
}

#[test]
fn a_flood_of_pings_to_a_deaf_peer_ends() {
    struct Deaf(End);
    impl Socket for Deaf {
        fn try_read_vectored(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
            self.0.try_read_vectored(slices)
        }

        fn try_write_vectored(&self, _: &[IoSlice<'_>]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }
    let (_client, end) = pipe(&[1 << 16]);
    for _ in 0..10_000 {
        end.inbound
            .borrow_mut()
            .extend(frames(&[(Kind::Ping, 0, 0, &[1; 8])]));
    }
    let deaf = Deaf(end);
    let mut server = Lane::new(Role::Server, LIMITS);
    let over = (0..1000).find_map(|_| server.pump(&deaf, &mut keeper(0)).err());
    assert_eq!(over.expect("a bound").kind(), io::ErrorKind::InvalidData);
}

#[test]
fn nothing_is_written_into_the_middle_of_a_frame() {
    for cut in 1..200 {
        let (end, far) = pipe(&[]);
        let mut lane = Lane::new(Role::Client, LIMITS);
        *end.steps.borrow_mut() = [usize::MAX].into();
        lane.flush(&end).expect("a flush");
        take_preface(&far);
        lane.open(&block("path", "/x"));
        let payload = [7; 100];
        let mut body = Outgoing::whole([Piece::from(&payload[..])]);
        *end.steps.borrow_mut() = [cut, 0].into();
        let pushed = lane.push(&end, &mut body).expect("a push");
        // A sign of life is asked for while the frame is half sent.
        end.inbound
            .borrow_mut()
            .extend(frames(&[(Kind::Ping, 0, 0, &[9; 8])]));
        *end.steps.borrow_mut() = [usize::MAX].into();
        lane.pump(&end, &mut keeper(0)).expect("a pump");
        assert_eq!(
            lane.is_mid_frame(),
            pushed == Push::NoRoom && body.frame_left > 0
        );
        while !body.is_sent() || lane.has_mail() {
            lane.push(&end, &mut body).expect("a push");
        }
        let bytes: Vec<u8> = far.inbound.borrow_mut().drain(..).collect();
        let (mut rest, mut kinds) = (&bytes[..], Vec::new());
        while let Some(first) = rest.first_chunk() {
            let head = Head::read(first);
            let (frame, later) = rest.split_at(HEAD_BYTES + head.length);
            if head.kind == Kind::Data {
                assert_eq!(frame[HEAD_BYTES..], payload, "cut at {cut}");
            }
            kinds.push(head.kind);
            rest = later;
        }
        assert!(rest.is_empty(), "cut at {cut}: {kinds:?}");
        assert!(
            kinds.contains(&Kind::Data) && kinds.contains(&Kind::Ping),
            "{kinds:?}"
        );
    }
}
