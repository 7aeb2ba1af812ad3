//! A lane by hand: what a client that promised one call at a time may do, and what becomes of it.

use std::io::{self, IoSlice, IoSliceMut};

use bytes::Bytes;
use kvproto::{
    frame::head,
    http2::{
        Fields, Lane, LaneLimits, Outgoing, Piece, Pump, Push, Receiver, Role, Socket,
        frame::{END_HEADERS, END_STREAM, HEAD_BYTES, Head, Kind, put_field, put_frame},
    },
    v1::{self, Ack, PutOutcome},
};
use kvtests::{
    node::{TestNode, filled},
    patience::eventually,
};
use prost::Message;
use tokio::{io::Interest, net::TcpStream};

const LIMITS: LaneLimits = LaneLimits {
    max_headers_bytes: 64 << 10,
    max_frame_bytes: 1 << 20,
    send_frame_bytes: 100_000,
    read_bytes: 1 << 20,
};

struct Tcp(TcpStream);

impl Socket for Tcp {
    fn try_read_vectored(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.0.try_read_vectored(slices)
    }

    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }
}

#[derive(Default)]
struct Answer {
    fields: Fields,
    body: Vec<u8>,
}

impl Answer {
    fn field(&self, name: &str) -> &str {
        let found = self.fields.iter().find(|(n, _)| n == name.as_bytes());
        found.map_or("", |(_, value)| std::str::from_utf8(value).expect("ASCII"))
    }
}

impl Receiver for Answer {
    fn headers(&mut self, fields: Fields) -> io::Result<()> {
        self.fields.extend(fields);
        Ok(())
    }

    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.body.extend_from_slice(bytes);
        Ok(())
    }
}

struct Client {
    lane: Lane,
    socket: Tcp,
}

impl Client {
    async fn connect(node: &TestNode) -> Self {
        let socket = TcpStream::connect(node.node.grpc_addr()).await.unwrap();
        Self {
            lane: Lane::new(Role::Client, LIMITS),
            socket: Tcp(socket),
        }
    }

    fn open(&mut self, path: &str) {
        let mut block = Vec::new();
        put_field(&mut block, b":method", b"POST");
        put_field(&mut block, b":path", path.as_bytes());
        put_field(&mut block, b"content-type", b"application/grpc");
        self.lane.open(&block);
    }

    /// Sends these pieces as the body of a call and reads its answer to the end.
    async fn call(&mut self, path: &str, pieces: &[Bytes]) -> io::Result<Answer> {
        self.open(path);
        let mut body = Outgoing::whole(pieces.iter().cloned().map(Piece::from));
        let mut answer = Answer::default();
        loop {
            let pushed = self.lane.push(&self.socket, &mut body)?;
            match self.lane.pump(&self.socket, &mut answer)? {
                Pump::Ended if body.is_sent() => return Ok(answer),
                Pump::Starved => {}
                _ => continue,
            }
            if self.lane.peer_has_ended() && body.is_sent() {
                return Ok(answer);
            }
            let interest = match pushed {
                Push::NoRoom => Interest::READABLE | Interest::WRITABLE,
                _ => Interest::READABLE,
            };
            self.socket.0.ready(interest).await?;
        }
    }

    /// Reads until the node closes the connection; the payload of its GOAWAY, if it said so.
    async fn goodbye(mut self) -> Option<u32> {
        let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
        loop {
            let over = self.lane.flush(&self.socket);
            if over.is_err() || self.socket.0.ready(Interest::READABLE).await.is_err() {
                break;
            }
            match self.socket.0.try_read(&mut piece) {
                Ok(0) => break,
                Ok(read) => bytes.extend_from_slice(&piece[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
        let mut rest = &bytes[..];
        while let Some(first) = rest.first_chunk::<HEAD_BYTES>() {
            let head = Head::read(first);
            let payload = &rest[HEAD_BYTES..HEAD_BYTES + head.length];
            if head.kind == Kind::GoAway {
                return Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
            }
            rest = &rest[HEAD_BYTES + head.length..];
        }
        None
    }
}

const PUT: &str = "/terrace.v1.Blocks/Put";
const STATS: &str = "/terrace.v1.Blocks/Stats";

fn framed(message: &v1::PutRequest) -> Vec<Bytes> {
    let bare = v1::PutRequest {
        data: Bytes::new(),
        ..message.clone()
    };
    vec![head(&bare, message.data.len()), message.data.clone()]
}

fn results(answer: &Answer) -> Vec<PutOutcome> {
    assert_eq!(
        answer.field("grpc-status"),
        "0",
        "{}",
        answer.field("grpc-message")
    );
    let message = v1::PutResponse::decode(&answer.body[5..]).expect("an answer");
    message.results.iter().map(v1::PutResult::outcome).collect()
}

#[tokio::test]
async fn a_call_that_is_refused_half_way_leaves_its_lane_to_the_next() {
    let node = TestNode::start(|config| config.max_message_bytes = 64 << 10).await;
    let mut client = Client::connect(&node).await;
    let bytes = |bytes: &'static [u8]| vec![Bytes::from_static(bytes)];
    let long = vec![Bytes::from(vec![0; 300_000])];
    let headless = vec![Bytes::from_static(&[0, 0, 0, 0, 0]), filled(1, 2 << 20)];
    let cases = [
        ("/terrace.v1.Blocks/Get", bytes(&[]), "3"),
        ("/terrace.v1.Blocks/Get", bytes(&[0, 0, 0, 0, 9, 1]), "3"),
        ("/terrace.v1.Blocks/Get", bytes(&[1, 0, 0, 0, 1, 1]), "12"),
        ("/terrace.v1.Blocks/Get", long.clone(), "8"),
        (STATS, long, "8"),
        ("/terrace.v1.Blocks/Nothing", bytes(&[0, 0, 0, 0, 0]), "12"),
        (PUT, bytes(&[]), "3"),
        (PUT, headless, "3"),
        (PUT, bytes(&[1, 0, 0, 0, 1, 1]), "12"),
    ];
    for (path, body, code) in cases {
        let answer = client.call(path, &body).await.expect("an answer");
        assert_eq!(
            answer.field("grpc-status"),
            code,
            "{path} {}",
            answer.field("grpc-message")
        );
        let stats = client.call(STATS, &[Bytes::from_static(&[0; 5])]).await;
        assert_eq!(stats.expect("an answer").field("grpc-status"), "0");
    }
    assert_eq!(node.arena_bytes(), 0);
    node.stop().await;
}

#[tokio::test]
async fn sums_may_stand_behind_the_data_and_are_judged_there() {
    let node = TestNode::start(|_| {}).await;
    let stock = node.client().await;
    let mut client = Client::connect(&node).await;
    let block = filled(1, 200_001);
    let put = |nth: u32, spoil: fn(&mut v1::BlockSums)| {
        let chain = stock.chain(nth, 1);
        let whole: v1::BlockHeader = (&stock.header(&chain, 0, &block)).into();
        let mut sums = v1::BlockSums {
            page_sums: whole.page_sums.clone(),
            seal: whole.seal,
        };
        spoil(&mut sums);
        let mut pieces = stock.pieces(&chain, 0, &block, 70_000);
        pieces[0].header = Some(v1::BlockHeader {
            page_sums: Vec::new(),
            seal: 0,
            ..whole
        });
        let sums = v1::PutRequest {
            sums: Some(sums),
            ..v1::PutRequest::default()
        };
        let messages = [vec![stock.start(Ack::Cached)], pieces, vec![sums]].concat();
        messages.iter().flat_map(framed).collect::<Vec<_>>()
    };
    let right = put(1, |_| {});
    let answer = client.call(PUT, &right).await.unwrap();
    assert_eq!(results(&answer), [PutOutcome::Cached]);
    // It is there: its data is read for nobody, and its sums are asked of nobody.
    let answer = client.call(PUT, &right).await.unwrap();
    assert_eq!(results(&answer), [PutOutcome::Present]);
    for spoil in [(|sums| sums.seal ^= 1) as fn(&mut v1::BlockSums), |sums| {
        sums.page_sums[1] ^= 1
    }] {
        let answer = client.call(PUT, &put(2, spoil)).await.unwrap();
        assert_eq!(results(&answer), [PutOutcome::Corrupt]);
    }
    let short = put(3, |sums| sums.page_sums.truncate(3));
    let unsummed = put(4, |_| {});
    let twice = [right.clone(), unsummed[unsummed.len() - 2..].to_vec()].concat();
    for (body, message) in [
        (short, "sums.page_sums: has 3 sums"),
        (
            unsummed[..unsummed.len() - 2].to_vec(),
            "sums: are missing behind block 0",
        ),
        (twice, "sums: came where"),
    ] {
        let answer = client.call(PUT, &body).await.unwrap();
        assert_eq!(answer.field("grpc-status"), "3");
        let said = answer.field("grpc-message").replace("%20", " ");
        assert!(said.starts_with(message), "{message}: {said}");
    }
    assert_eq!(node.node.blocks().engine().stats().blocks, 1);
    assert_eq!(node.arena_bytes(), 200_001_u64.next_multiple_of(4096));
    node.stop().await;
}

#[tokio::test]
async fn a_lane_that_vanishes_in_the_middle_of_a_put_leaks_nothing() {
    let node = TestNode::start(|_| {}).await;
    let stock = node.client().await;
    let chain = stock.chain(1, 1);
    let block = filled(1, 1 << 20);
    let mut client = Client::connect(&node).await;
    client.open(PUT);
    let pieces = stock.pieces(&chain, 0, &block, 400_000);
    let mut body = Outgoing::default();
    for piece in framed(&stock.start(Ack::Cached))
        .into_iter()
        .chain(framed(&pieces[0]))
    {
        body.push(piece);
    }
    while client.lane.push(&client.socket, &mut body).unwrap() != Push::Hungry {
        let _ = client.lane.pump(&client.socket, &mut Answer::default());
        tokio::task::yield_now().await;
    }
    eventually("the block has its slot", || node.arena_bytes() == 1 << 20).await;
    drop(client);
    eventually("the slot is free again", || node.arena_bytes() == 0).await;
    node.stop().await;
}

#[tokio::test]
async fn a_broken_promise_ends_the_lane_with_a_reason() {
    let node = TestNode::start(|_| {}).await;
    let mut client = Client::connect(&node).await;
    client.open(PUT);
    client.lane.flush(&client.socket).unwrap();
    let mut second = Vec::new();
    let mut block = Vec::new();
    put_field(&mut block, b":method", b"POST");
    put_field(&mut block, b":path", PUT.as_bytes());
    put_frame(
        &mut second,
        Kind::Headers,
        END_HEADERS | END_STREAM,
        3,
        &block,
    );
    client.socket.0.writable().await.unwrap();
    assert_eq!(client.socket.0.try_write(&second).unwrap(), second.len());
    assert_eq!(client.goodbye().await, Some(1), "PROTOCOL_ERROR");
    node.stop().await;
}

#[tokio::test]
async fn a_node_that_stops_lets_idle_lanes_go_at_once() {
    let node = TestNode::start(|_| {}).await;
    let mut client = Client::connect(&node).await;
    let stats = client.call(STATS, &[Bytes::from_static(&[0; 5])]).await;
    assert_eq!(stats.unwrap().field("grpc-status"), "0");
    node.stop().await;
    assert_eq!(client.goodbye().await, Some(0), "a friendly GOAWAY");
}
