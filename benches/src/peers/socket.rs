//! Carries a wire protocol: as a task on the client's runtime, or on a thread of its own with blocking calls.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as BlockingUnix;
use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::network::{Connection, Job};
use super::wire::{Ask, Wire};
use crate::load::{BlockingWorker, Sample, Window, drive_blocking};
use crate::rounds::{Cell, Op, Peer, Pending};

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Address {
    /// host:port.
    Tcp(String),
    /// Path of a socket.
    Unix(PathBuf),
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One connection that speaks `W`.
pub struct Socket<W> {
    stream: Stream,
    wire: W,
    reply: Vec<u8>,
}

impl<W: Wire + Default> Connection for Socket<W> {
    type Target = Address;

    async fn connect(target: &Address) -> Result<Self> {
        let stream = match target {
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Address::Unix(path) => Stream::Unix(UnixStream::connect(path).await?),
        };
        Ok(Self {
            stream,
            wire: W::default(),
            reply: Vec::new(),
        })
    }

    async fn act(&mut self, job: &Job, index: u64) -> Result<u64> {
        let mut reply = std::mem::take(&mut self.reply);
        let bytes = self.act_into(&mut reply, job, index).await;
        self.reply = reply;
        bytes
    }
}

impl<W: Wire> Socket<W> {
    /// As [`Connection::act`], with a buffer that others may share.
    pub(super) async fn act_into(
        &mut self,
        reply: &mut Vec<u8>,
        job: &Job,
        index: u64,
    ) -> Result<u64> {
        let ask = ask(&mut self.wire, job, index)?;
        if reply.len() < ask.reply_len() {
            reply.resize(ask.reply_len(), 0);
        }
        let reply = &mut reply[..ask.reply_len()];
        match &mut self.stream {
            Stream::Tcp(stream) => exchange(stream, &ask, reply).await?,
            Stream::Unix(stream) => exchange(stream, &ask, reply).await?,
        }
        Ok(job.payload_bytes())
    }
}

fn ask<'a, W: Wire>(wire: &'a mut W, job: &Job, index: u64) -> Result<Ask<'a>> {
    let bytes = usize::try_from(job.bytes)?;
    Ok(match job.op {
        Op::Get => wire.get(bytes, index),
        Op::Put => wire.put(bytes, index),
        Op::Exists => match wire.exists(bytes, index, job.keys) {
            Some(ask) => ask,
            None => bail!("this protocol has no exists"),
        },
        other => bail!("no peer has {}", other.as_str()),
    })
}

async fn exchange<S: AsyncReadExt + AsyncWriteExt + Unpin>(
    stream: &mut S,
    ask: &Ask<'_>,
    reply: &mut [u8],
) -> Result<()> {
    stream.write_all(ask.request).await?;
    let mut filled = 0;
    while filled < reply.len() {
        let n = stream.read(&mut reply[filled..]).await?;
        ensure!(n > 0, "the server closed the connection");
        if filled < ask.head.len() {
            ask.check_head(&reply[..filled + n])?;
        }
        filled += n;
    }
    ask.check(reply)
}

enum BlockingStream {
    Tcp(std::net::TcpStream),
    Unix(BlockingUnix),
}

impl BlockingStream {
    fn connect(address: &Address) -> Result<Self> {
        Ok(match address {
            Address::Tcp(address) => {
                let stream = std::net::TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                Self::Tcp(stream)
            }
            Address::Unix(path) => Self::Unix(BlockingUnix::connect(path)?),
        })
    }

    fn exchange(&mut self, ask: &Ask<'_>, reply: &mut [u8]) -> Result<()> {
        fn over(stream: &mut (impl Read + Write), ask: &Ask<'_>, reply: &mut [u8]) -> Result<()> {
            stream.write_all(ask.request)?;
            let mut filled = 0;
            while filled < reply.len() {
                let n = stream.read(&mut reply[filled..])?;
                ensure!(n > 0, "the server closed the connection");
                if filled < ask.head.len() {
                    ask.check_head(&reply[..filled + n])?;
                }
                filled += n;
            }
            ask.check(reply)
        }
        match self {
            Self::Tcp(stream) => over(stream, ask, reply),
            Self::Unix(stream) => over(stream, ask, reply),
        }
    }
}

/// A peer whose client is threads with blocking calls: what a user without an async runtime would write.
pub struct Threads<W> {
    address: Address,
    working_set_bytes: u64,
    server_pids: Vec<u32>,
    idle: Vec<(BlockingStream, W, Vec<u8>)>,
}

impl<W: Wire + Default> Threads<W> {
    /// A client of a server that another peer has filled.
    pub fn new(address: Address, working_set_bytes: u64, server_pids: Vec<u32>) -> Self {
        Self {
            address,
            working_set_bytes,
            server_pids,
            idle: Vec::new(),
        }
    }
}

struct ThreadWorker<W> {
    parts: (BlockingStream, W, Vec<u8>),
    job: Job,
}

impl<W: Wire> BlockingWorker for ThreadWorker<W> {
    fn step(&mut self) -> Result<u64> {
        let index = self.job.next_value();
        let (stream, wire, reply) = &mut self.parts;
        let ask = ask(wire, &self.job, index)?;
        if reply.len() < ask.reply_len() {
            reply.resize(ask.reply_len(), 0);
        }
        stream.exchange(&ask, &mut reply[..ask.reply_len()])?;
        Ok(self.job.payload_bytes())
    }
}

impl<W: Wire + Default> Peer for Threads<W> {
    fn run<'a>(&'a mut self, cell: &'a Cell, window: Window) -> Pending<'a, Result<Sample>> {
        Box::pin(async move {
            while self.idle.len() < cell.concurrency {
                self.idle.push((
                    BlockingStream::connect(&self.address)?,
                    W::default(),
                    Vec::new(),
                ));
            }
            let parts = self.idle.drain(..cell.concurrency).enumerate();
            let mut workers: Vec<_> = parts
                .map(|(nth, parts)| ThreadWorker {
                    parts,
                    job: Job::of(cell, nth, self.working_set_bytes),
                })
                .collect();
            // Blocks the runtime's thread, on which nothing else has to run meanwhile.
            let sample = drive_blocking(&mut workers, window, &self.server_pids)?;
            self.idle.extend(workers.into_iter().map(|w| w.parts));
            Ok(sample)
        })
    }
}
