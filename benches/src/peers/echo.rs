//! A bare request and reply over a Unix socket: what any protocol on one host pays before it does anything.
//!
//! Two processes, threads with blocking calls on both ends, the quickest there is: 128 bytes there, 256 bytes back, about
//! what a get under a lease sends and receives.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::load::{BlockingWorker, Sample, Window, drive_blocking};
use crate::rounds::{Cell, Peer, Pending};

/// Bytes of a request.
const REQUEST_BYTES: usize = 128;
/// Bytes of a reply.
const REPLY_BYTES: usize = 256;

/// Answers whoever connects to `path`, a thread each.
///
/// # Errors
/// The socket cannot be made.
pub fn serve(path: &Path) -> Result<()> {
    let answer = |mut stream: UnixStream| {
        let (mut request, reply) = ([0; REQUEST_BYTES], [1; REPLY_BYTES]);
        while stream.read_exact(&mut request).is_ok() && stream.write_all(&reply).is_ok() {}
    };
    for stream in UnixListener::bind(path)?.incoming() {
        let stream = stream?;
        std::thread::Builder::new()
            .name("echo".into())
            .spawn(move || answer(stream))
            .context("starting a thread that answers")?;
    }
    Ok(())
}

/// One connection per operation in flight.
pub struct Echo {
    socket: PathBuf,
    server_pid: u32,
    idle: Vec<Caller>,
}

impl Echo {
    /// Calls the process `server_pid`, which listens at `socket`.
    pub fn new(socket: PathBuf, server_pid: u32) -> Self {
        Self {
            socket,
            server_pid,
            idle: Vec::new(),
        }
    }
}

struct Caller(UnixStream);

impl BlockingWorker for Caller {
    fn step(&mut self) -> Result<u64> {
        let mut reply = [0; REPLY_BYTES];
        self.0.write_all(&[2; REQUEST_BYTES])?;
        self.0.read_exact(&mut reply)?;
        std::hint::black_box(&reply);
        Ok(0)
    }
}

impl Peer for Echo {
    fn run<'a>(&'a mut self, cell: &'a Cell, window: Window) -> Pending<'a, Result<Sample>> {
        Box::pin(async move {
            while self.idle.len() < cell.concurrency {
                self.idle.push(Caller(UnixStream::connect(&self.socket)?));
            }
            let callers = &mut self.idle[..cell.concurrency];
            drive_blocking(callers, window, &[self.server_pid])
        })
    }
}
