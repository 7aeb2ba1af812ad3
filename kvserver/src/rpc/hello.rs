//! The first bytes of a connection, which say who it is that calls.
//!
//! ```text
//! preface 24 │ SETTINGS: 9 bytes of head, settings … │ …
//!                            └ one stream at a time? ──► a lane, else a general client
//! ```
//!
//! What was read is given on: nothing of it is taken from whoever serves the connection.
//! Bounds: [`GREETING_BYTES`], [`GREETING_TIME`]; a peer that connects and says nothing does not keep its place.
//! Errors: the socket's; `TimedOut`; end of file.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use kvproto::http2::frame::{HEAD_BYTES, Head, Kind, PREFACE, SETTING_ONE_STREAM};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use crate::clock::Clock;

/// Bytes read to know a peer; those of usual clients are below a hundred.
const GREETING_BYTES: usize = 4096;

/// How long a peer may take for them. A connection that is opened in good faith sends them at once.
const GREETING_TIME: Duration = Duration::from_secs(10);

/// What a peer has sent so far.
pub(crate) struct Greeting {
    pub(crate) bytes: Bytes,
    /// It has promised one stream at a time.
    pub(crate) is_lane: bool,
}

impl Greeting {
    /// What follows the preface.
    pub(crate) fn rest(&self) -> &[u8] {
        self.bytes.get(PREFACE.len()..).unwrap_or_default()
    }
}

/// Reads until it is clear who calls.
pub(crate) async fn read<I: AsyncRead + Unpin>(
    io: &mut I,
    clock: &dyn Clock,
) -> io::Result<Greeting> {
    let reading = async {
        let mut bytes = BytesMut::with_capacity(GREETING_BYTES);
        loop {
            if let Some(is_lane) = judge(&bytes) {
                return Ok(Greeting {
                    bytes: bytes.freeze(),
                    is_lane,
                });
            }
            let read = io.read_buf(&mut bytes).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    };
    let late = clock.sleep(GREETING_TIME);
    tokio::select! {
        greeting = reading => greeting,
        () = late => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Whether this is the beginning of a lane; `None` when more bytes are needed to know.
fn judge(bytes: &[u8]) -> Option<bool> {
    let known = bytes.len().min(PREFACE.len());
    if bytes[..known] != PREFACE[..known] {
        return Some(false);
    }
    let head = bytes.get(PREFACE.len()..)?.first_chunk()?;
    let head = Head::read(head);
    if head.kind != Kind::Settings {
        return Some(false);
    }
    let start = PREFACE.len() + HEAD_BYTES;
    if start + head.length > GREETING_BYTES {
        return Some(false); // so this is never asked for more bytes than it reads
    }
    let settings = bytes.get(start..start + head.length)?;
    let [high, low] = SETTING_ONE_STREAM.to_be_bytes();
    let mark = [high, low, 0, 0, 0, 1];
    Some(settings.chunks_exact(6).any(|setting| setting == mark))
}

/// A connection whose first bytes were read already.
pub(crate) struct Rewound<I> {
    first: Bytes,
    io: I,
}

impl<I> Rewound<I> {
    pub(crate) fn new(first: Bytes, io: I) -> Self {
        Self { first, io }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Rewound<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, into);
        }
        let count = self.first.len().min(into.remaining());
        into.put_slice(&self.first[..count]);
        self.first.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Rewound<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use kvproto::http2::{
        Lane, LaneLimits, Outgoing, Role, Socket,
        frame::{PREFACE, SETTING_ENABLE_PUSH, SETTING_ONE_STREAM, put_frame},
    };
    use parking_lot::Mutex;
    use std::io::{self, IoSlice, IoSliceMut};

    use tokio::io::AsyncWriteExt;

    use super::{GREETING_BYTES, GREETING_TIME, Kind, judge, read};

    fn greeting(settings: &[(u16, u32)]) -> Vec<u8> {
        let mut payload = Vec::new();
        for (name, value) in settings {
            payload.extend_from_slice(&name.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        let mut out = PREFACE.to_vec();
        put_frame(&mut out, Kind::Settings, 0, 0, &payload);
        out
    }

    #[test]
    fn only_the_promise_of_one_stream_makes_a_lane() {
        let lane = greeting(&[(SETTING_ENABLE_PUSH, 0), (SETTING_ONE_STREAM, 1)]);
        assert_eq!(judge(&lane), Some(true));
        for other in [
            greeting(&[]),
            greeting(&[(SETTING_ENABLE_PUSH, 0)]),
            greeting(&[(SETTING_ONE_STREAM, 0)]),
            b"GET / HTTP/1.1\r\n".to_vec(),
            [PREFACE, &[0, 0, 0, 6, 0, 0, 0, 0, 0]].concat(),
            [PREFACE, &[0xff, 0xff, 0xff, 4, 0, 0, 0, 0, 0]].concat(),
        ] {
            assert_eq!(judge(&other), Some(false));
        }
    }

    #[test]
    fn a_greeting_cut_anywhere_is_waited_for() {
        let lane = greeting(&[(SETTING_ONE_STREAM, 1)]);
        for length in 0..lane.len() {
            assert_eq!(judge(&lane[..length]), None, "{length}");
        }
    }

    #[test]
    fn a_lane_that_sends_a_block_with_its_greeting_is_one_too() {
        let mut lane = greeting(&[(SETTING_ONE_STREAM, 1)]);
        lane.resize(GREETING_BYTES, 7);
        assert_eq!(judge(&lane), Some(true));
    }

    #[tokio::test]
    async fn a_peer_that_says_nothing_is_not_waited_for() {
        let clock = crate::clock::ManualClock::new(1);
        let (mut near, mut far) = tokio::io::duplex(64);
        far.write_all(&PREFACE[..5]).await.expect("room");
        let reading = read(&mut near, &clock);
        tokio::pin!(reading);
        assert!(futures_util::poll!(reading.as_mut()).is_pending());
        clock.advance(GREETING_TIME);
        let error = reading.await.map(drop).expect_err("it is late");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[derive(Default)]
    struct Written(Mutex<Vec<u8>>);

    impl Socket for Written {
        fn try_read_vectored(&self, _: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }

        fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
            let mut written = self.0.lock();
            let before = written.len();
            slices
                .iter()
                .for_each(|slice| written.extend_from_slice(slice));
            Ok(written.len() - before)
        }
    }

    #[test]
    fn a_client_lane_is_known_by_its_greeting() {
        let limits = LaneLimits {
            max_headers_bytes: 1 << 14,
            max_frame_bytes: 1 << 20,
            send_frame_bytes: 1 << 20,
            read_bytes: 1 << 18,
        };
        let socket = Written::default();
        let mut lane = Lane::new(Role::Client, limits);
        lane.push(&socket, &mut Outgoing::default())
            .expect("written");
        assert_eq!(judge(&socket.0.lock()), Some(true));
    }
}
