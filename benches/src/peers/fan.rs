//! Bare requests to several processes at once: what any question to many owners pays, whatever it asks.
//!
//! ```text
//!   1 server    one request of 512 keys' bytes   ──►   one reply
//!   8 servers   eight requests of 64 keys' bytes ──►   eight replies      all are written before one is read
//! ```
//!
//! The sizes are those of a look-up's frames; nothing is encoded, decoded, found or timed. The client is a task on the
//! runtime that every other client runs on, and reads the replies one after the other; the servers are threads with
//! blocking calls, one system call to read a request and one to answer it, which is the least there is.

use std::io::{Read, Write};
use std::net::TcpListener;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::network::{Connection, Job};

/// Bytes of a look-up's request besides its keys: header fields, frame heads, who asks, jumps between runs.
const HEAD_BYTES: usize = 280;
/// Bytes of a key.
const KEY_BYTES: usize = 32;
/// Bytes of a look-up's reply, header fields and trailers included.
const REPLY_BYTES: usize = 130;
/// What every request begins with: its own length.
const PREFIX_BYTES: usize = 4;

/// Answers whoever connects, a thread each, until the process ends.
///
/// # Errors
/// The address cannot be bound.
pub fn serve(tcp: &str) -> Result<()> {
    for stream in TcpListener::bind(tcp)?.incoming() {
        let stream = stream?;
        stream.set_nodelay(true)?;
        std::thread::Builder::new()
            .name("fan".into())
            .spawn(move || converse(stream))
            .context("starting a thread that answers")?;
    }
    Ok(())
}

/// One connection; ends with it.
fn converse(mut stream: impl Read + Write) -> std::io::Result<()> {
    let (mut request, reply) = (vec![0; 64 << 10], [1; REPLY_BYTES]);
    loop {
        let mut filled = 0;
        while filled < PREFIX_BYTES || filled < length(&request) {
            match stream.read(&mut request[filled..])? {
                0 => return Ok(()),
                read => filled += read,
            }
        }
        stream.write_all(&reply)?;
    }
}

fn length(request: &[u8]) -> usize {
    let bytes: [u8; PREFIX_BYTES] = request[..PREFIX_BYTES].try_into().expect("four bytes");
    u32::from_le_bytes(bytes) as usize
}

/// A connection to each server.
pub struct Fan {
    streams: Vec<TcpStream>,
    request: Vec<u8>,
}

impl Connection for Fan {
    type Target = Vec<String>;

    async fn connect(servers: &Vec<String>) -> Result<Self> {
        let mut streams = Vec::with_capacity(servers.len());
        for server in servers {
            let stream = TcpStream::connect(server).await?;
            stream.set_nodelay(true)?;
            streams.push(stream);
        }
        Ok(Self {
            streams,
            request: Vec::new(),
        })
    }

    async fn act(&mut self, job: &Job, _: u64) -> Result<u64> {
        let keys = job.keys as usize / self.streams.len();
        let bytes = HEAD_BYTES + keys * KEY_BYTES;
        if self.request.len() != bytes {
            self.request = vec![2; bytes];
            self.request[..PREFIX_BYTES].copy_from_slice(&u32::try_from(bytes)?.to_le_bytes());
        }
        for stream in &mut self.streams {
            stream.write_all(&self.request).await?;
        }
        let mut reply = [0; REPLY_BYTES];
        for stream in &mut self.streams {
            stream.read_exact(&mut reply).await?;
            ensure!(reply == [1; REPLY_BYTES], "another reply than was sent");
        }
        Ok(job.payload_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounds::{Cell, Op, Transport};

    #[tokio::test]
    async fn every_server_is_asked_and_answers() {
        let mut servers = Vec::new();
        for _ in 0..3 {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            servers.push(listener.local_addr().expect("bound").to_string());
            std::thread::spawn(move || converse(listener.accept().expect("a client").0));
        }
        let cell = Cell {
            peer: "bare",
            op: Op::Exists,
            transport: Transport::Tcp,
            bytes: super::super::LOOKUP_BYTES,
            concurrency: 1,
            keys: 512,
        };
        let job = Job::of(&cell, 0, 0);
        let mut fan = Fan::connect(&servers).await.expect("they listen");
        for _ in 0..3 {
            assert_eq!(fan.act(&job, 0).await.expect("they answer"), 0);
        }
    }

    #[test]
    fn a_request_in_pieces_is_answered_once_it_is_whole() {
        struct Pieces(Vec<Vec<u8>>, usize);
        impl Read for Pieces {
            fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
                let Some(piece) = self.0.pop() else {
                    return Ok(0);
                };
                out[..piece.len()].copy_from_slice(&piece);
                Ok(piece.len())
            }
        }
        impl Write for Pieces {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                assert!(self.0.is_empty(), "answered before its end");
                self.1 += bytes.len();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut pieces = Pieces(vec![vec![7; 3], vec![0, 7], vec![8, 0, 0]], 0);
        converse(&mut pieces).expect("a whole request");
        assert_eq!(pieces.1, REPLY_BYTES);
    }
}
