//! A lane against h2's server: a peer that is strict about the protocol and not written by us.

use std::{
    io::{self, IoSliceMut},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};

use super::{Io, Lane, Lanes, Outgoing, Question, Receiver, Request, Sender, Socket};
use crate::{
    clock::{Clock, SystemClock, within},
    endpoint::Endpoint,
    error::Error,
    wire::{self, Method},
};

/// Keeps a body; offers room for every second half, so that both ways of reading are used.
#[derive(Default)]
struct Keeper {
    kept: Vec<u8>,
    room: Vec<u8>,
    offers_room: bool,
}

impl Receiver for Keeper {
    fn room(&mut self) -> Option<&mut [u8]> {
        self.offers_room.then_some(&mut self.room[..])
    }

    fn landed(&mut self, bytes: usize) -> io::Result<()> {
        self.kept.extend_from_slice(&self.room[..bytes]);
        self.offers_room = !self.kept.len().is_multiple_of(3);
        Ok(())
    }

    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.kept.extend_from_slice(bytes);
        self.offers_room = !self.room.is_empty();
        Ok(())
    }
}

impl Keeper {
    fn with_room(bytes: usize) -> Self {
        Self {
            room: vec![0; bytes],
            ..Self::default()
        }
    }
}

/// A body in slices, one at a time, some of them empty.
struct Slices<'a>(&'a [&'a [u8]]);

impl<'a> Sender<'a> for Slices<'a> {
    fn more(&mut self, out: &mut Outgoing<'a>) {
        match self.0.split_first() {
            Some((first, rest)) => {
                out.push(*first);
                self.0 = rest;
            }
            None => out.close(),
        }
    }
}

#[derive(Clone, Copy)]
struct Peer {
    window_bytes: u32,
    frame_bytes: u32,
    /// Answers before it has read the body.
    is_hasty: bool,
    /// Calls after which it says GOAWAY.
    calls: usize,
}

const PATIENT: Peer = Peer {
    window_bytes: 1 << 24,
    frame_bytes: 1 << 20,
    is_hasty: false,
    calls: usize::MAX,
};

/// Echoes bodies, on as many connections as come.
async fn echo(peer: Peer) -> Endpoint {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(serve(socket, peer));
        }
    });
    format!("127.0.0.1:{port}").parse().expect("an endpoint")
}

async fn serve(socket: tokio::net::TcpStream, peer: Peer) {
    let mut connection = h2::server::Builder::new()
        .initial_window_size(peer.window_bytes)
        .initial_connection_window_size(peer.window_bytes)
        .max_frame_size(peer.frame_bytes)
        .handshake::<_, Bytes>(socket)
        .await
        .expect("a handshake");
    let mut calls = 0;
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        calls += 1;
        if calls == peer.calls {
            connection.graceful_shutdown();
        }
        tokio::spawn(async move {
            let path = request.uri().path().to_owned();
            let mut body = request.into_body();
            let mut whole = BytesMut::new();
            loop {
                let piece = if peer.is_hasty {
                    None
                } else {
                    body.data().await
                };
                let Some(piece) = piece else {
                    break;
                };
                let piece = piece.expect("a piece");
                let _ = body.flow_control().release_capacity(piece.len());
                whole.extend_from_slice(&piece);
            }
            let response = Response::builder()
                .header("x-path", path)
                .body(())
                .expect("a head");
            let mut stream = respond.send_response(response, false).expect("a stream");
            let mut left = whole.freeze();
            while !left.is_empty() {
                stream.reserve_capacity(left.len());
                let room = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
                let Some(Ok(room)) = room else { return };
                stream
                    .send_data(left.split_to(room.min(left.len())), false)
                    .expect("room");
            }
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
            stream.send_trailers(trailers).expect("trailers");
        });
    }
}

fn bytes(length: usize, salt: usize) -> Vec<u8> {
    (0..length)
        .map(|i| ((i + salt).wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect()
}

const REQUEST: Request<'static> = Request {
    path: "/terrace.v1.Blocks/Echo",
    timeout: b"5000m",
    authorization: None,
};

#[tokio::test]
async fn bodies_of_any_size_come_back_over_any_window_and_frame() {
    for (window_bytes, frame_bytes) in [(1 << 24, 1 << 20), (70_000, 16 << 10), (1 << 20, 1 << 18)]
    {
        let endpoint = echo(Peer {
            window_bytes,
            frame_bytes,
            ..PATIENT
        })
        .await;
        let mut lane = Lane::open(&endpoint).await.expect("a lane");
        for (salt, length) in [1, 2, 511, 512, 513, 16 << 10, (1 << 20) + 7, 5 << 20]
            .into_iter()
            .enumerate()
        {
            let body = bytes(length, salt);
            let (first, second) = body.split_at(length / 3);
            for room in [0, 1, 1000, 1 << 20] {
                let mut keeper = Keeper::with_room(room);
                let sent = [first, &[], second];
                let answer = lane
                    .exchange(&REQUEST, &mut Slices(&sent), &mut keeper)
                    .await
                    .expect("an answer");
                assert_eq!(answer.status, 200);
                assert!(!answer.is_early);
                assert_eq!(answer.headers["grpc-status"], "0");
                assert_eq!(answer.headers["x-path"], REQUEST.path);
                assert!(keeper.kept == body, "{length} bytes with room for {room}");
            }
        }
        assert!(lane.is_usable());
    }
}

#[tokio::test]
async fn an_early_answer_is_read_and_marked() {
    let endpoint = echo(Peer {
        is_hasty: true,
        window_bytes: 70_000,
        ..PATIENT
    })
    .await;
    let mut lane = Lane::open(&endpoint).await.expect("a lane");
    let body = bytes(1 << 20, 0);
    let answer = lane
        .exchange(&REQUEST, &mut Slices(&[&body]), &mut Keeper::default())
        .await
        .expect("an answer");
    assert!(answer.is_early);
    assert_eq!(answer.headers["grpc-status"], "0");
}

#[tokio::test]
async fn a_lane_whose_peer_leaves_is_replaced() {
    let endpoint = echo(Peer {
        calls: 2,
        ..PATIENT
    })
    .await;
    let lanes = Lanes::new(endpoint, 1);
    for salt in 0..9 {
        let body = bytes(1000, salt);
        let mut guard = lanes.take().await.expect("a lane");
        let mut keeper = Keeper::default();
        let body_slices = [&body[..]];
        let mut sender = Slices(&body_slices);
        let answer = guard
            .lane
            .exchange(&REQUEST, &mut sender, &mut keeper)
            .await;
        // A GOAWAY that is under way while we send may cost the call its connection; never its bytes.
        if answer.is_ok() {
            assert_eq!(keeper.kept, body);
            guard.keep();
        }
    }
}

/// A peer that answers so many calls on each connection, and closes it when it reads the next.
async fn forgetful(calls: usize) -> Endpoint {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let mut connection = h2::server::handshake(socket).await.expect("a handshake");
            for call in 0..=calls {
                let Some(Ok((_, mut respond))) = connection.accept().await else {
                    break;
                };
                if call == calls {
                    break;
                }
                let mut response = Response::new(());
                let status = HeaderValue::from_static("0");
                response.headers_mut().insert("grpc-status", status);
                respond.send_response(response, true).expect("a stream");
            }
        }
    });
    format!("127.0.0.1:{port}").parse().expect("an endpoint")
}

/// The outcome of a call on a lane to this peer.
async fn ask(lanes: &Lanes) -> Result<(), Error> {
    let patience = std::time::Duration::from_secs(5);
    let mut heard = Keeper::default();
    wire::exchange(
        lanes,
        Method::STATS,
        patience,
        None,
        &mut Question(b"x"),
        &mut heard,
    )
    .await
}

#[tokio::test]
async fn only_a_lane_that_has_served_before_may_have_been_given_up() {
    let lanes = Lanes::new(forgetful(2).await, 1);
    assert!(ask(&lanes).await.is_ok() && ask(&lanes).await.is_ok());
    let given_up = ask(&lanes).await.expect_err("it is closed");
    assert!(matches!(given_up, Error::Stale { .. }), "{given_up:?}");
    assert!(!given_up.is_endpoint_failure() && given_up.is_worth_repeating());
    assert!(ask(&lanes).await.is_ok(), "a new lane");

    let lanes = Lanes::new(forgetful(0).await, 1);
    let broken = ask(&lanes).await.expect_err("it is closed");
    assert!(matches!(broken, Error::Broken { .. }), "{broken:?}");
    assert!(broken.is_endpoint_failure());
}

#[tokio::test]
async fn the_kernel_looks_after_a_silent_lane() {
    use rustix::net::sockopt;
    let lane = Lane::open(&echo(PATIENT).await).await.expect("a lane");
    let Io::Tcp(socket) = &lane.io else {
        panic!("a lane over TCP");
    };
    assert!(sockopt::socket_keepalive(socket).expect("an option"));
    let idle = sockopt::tcp_keepidle(socket).expect("an option");
    let interval = sockopt::tcp_keepintvl(socket).expect("an option");
    let probes = sockopt::tcp_keepcnt(socket).expect("an option");
    assert!((idle + interval * probes).as_secs() < 30);
}

#[tokio::test]
async fn a_peer_that_does_not_speak_http2_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.expect("a caller");
        use tokio::io::AsyncWriteExt;
        let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        let _ = socket.shutdown().await;
    });
    let endpoint = format!("127.0.0.1:{port}").parse().expect("an endpoint");
    let mut lane = Lane::open(&endpoint).await.expect("a lane");
    assert!(
        lane.exchange(&REQUEST, &mut Slices(&[b"x"]), &mut Keeper::default())
            .await
            .is_err()
    );
}

/// A read that leaves room is taken for the last one there is; what comes right behind it must wake the reader all the
/// same, whichever thread hears of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_follows_a_read_with_room_is_missed() {
    const WRITES: usize = 20_000;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let writer = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.expect("a client");
        socket.set_nodelay(true).expect("a live socket");
        for _ in 0..WRITES {
            socket.write_all(b"abc").await.expect("a reader");
        }
    });
    let io = Io::Tcp(TcpStream::connect(address).await.expect("a listener"));
    let reading = tokio::spawn(async move {
        let (mut total, mut buffer) = (0, [0; 64]);
        loop {
            io.readable().await.expect("a live socket");
            let mut slices = [IoSliceMut::new(&mut buffer)];
            match Socket::try_read_vectored(&io, &mut slices) {
                Ok(0) => return total,
                Ok(bytes) => total += bytes,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
    });
    let clock = SystemClock::new();
    let deadline = clock.now().after(Duration::from_secs(30));
    let total = within(&clock, deadline, reading).await;
    assert_eq!(
        total.expect("no wake-up is lost").expect("no panic"),
        3 * WRITES
    );
    writer.await.expect("no panic");
}
