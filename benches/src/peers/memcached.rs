//! memcached: the meta protocol by hand, one server for TCP and one for a Unix socket, because it serves only either.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::wire::{Ask, KEY_BYTES, Template, Wire, key, payload};
use crate::spawn::{Cores, Server, find, free_port};

/// The client's side of the meta protocol.
#[derive(Debug, Default)]
pub struct Meta {
    get: Template,
    put: Template,
    head: Vec<u8>,
    head_of: usize,
    pipeline: Vec<u8>,
    hits: Vec<u8>,
}

impl Wire for Meta {
    fn get(&mut self, bytes: usize, index: u64) -> Ask<'_> {
        if self.head_of != bytes || self.head.is_empty() {
            (self.head, self.head_of) = (format!("VA {bytes}\r\n").into_bytes(), bytes);
        }
        let request = self.get.with(bytes, index, |out| {
            out.extend_from_slice(b"mg ");
            out.extend_from_slice(&[0; KEY_BYTES]);
            out.extend_from_slice(b" v\r\n");
            3
        });
        Ask {
            request,
            head: &self.head,
            body: bytes,
            tail: b"\r\n",
        }
    }

    fn put(&mut self, bytes: usize, index: u64) -> Ask<'_> {
        let request = self.put.with(bytes, index, |out| {
            out.extend_from_slice(b"ms ");
            out.extend_from_slice(&[0; KEY_BYTES]);
            out.extend_from_slice(format!(" {bytes}\r\n").as_bytes());
            out.extend_from_slice(&payload(bytes, bytes as u64));
            out.extend_from_slice(b"\r\n");
            3
        });
        Ask {
            request,
            head: b"HD\r\n",
            body: 0,
            tail: b"",
        }
    }

    fn exists(&mut self, bytes: usize, first: u64, count: u32) -> Option<Ask<'_>> {
        self.pipeline.clear();
        for index in first..first + u64::from(count) {
            self.pipeline.extend_from_slice(b"mg ");
            self.pipeline.extend_from_slice(&key(bytes, index));
            self.pipeline.extend_from_slice(b"\r\n");
        }
        let len = 4 * count as usize;
        if self.hits.len() != len {
            self.hits = b"HD\r\n".repeat(count as usize);
        }
        Some(Ask {
            request: &self.pipeline,
            head: &self.hits,
            body: 0,
            tail: b"",
        })
    }
}

/// Starts the two servers, each with two threads and room for `memory_mib`.
///
/// # Errors
/// It is not installed or cannot be started.
pub fn start(cores: Cores, dir: &Path, memory_mib: u64) -> Result<([Server; 2], String, PathBuf)> {
    let program = find("memcached").ok_or_else(|| anyhow::anyhow!("memcached is not installed"))?;
    let (port, unix) = (free_port()?, dir.join("memcached.sock"));
    // Items up to 64 MiB, as Terrace's blocks. No eviction: a full server must fail the cell, not answer misses.
    let sized = |command: &mut Command| {
        command.args(["-M", "-I", "64m", "-t", "2", "-m", &memory_mib.to_string()]);
        if rustix::process::getuid().is_root() {
            command.args(["-u", "root"]); // it refuses to run as root unless told so
        }
    };
    let mut tcp = Command::new(&program);
    tcp.args(["-l", "127.0.0.1", "-U", "0", "-p", &port.to_string()]);
    sized(&mut tcp);
    let mut local = Command::new(program);
    local.arg("-s").arg(&unix);
    sized(&mut local);
    let servers = [
        cores.start(&mut tcp, &dir.join("memcached.log"))?,
        cores.start(&mut local, &dir.join("memcached-unix.log"))?,
    ];
    Ok((servers, format!("127.0.0.1:{port}"), unix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_meta_commands() {
        let mut meta = Meta::default();
        let ask = meta.get(4, 1);
        assert_eq!(ask.request, b"mg 00000000000000040000000000000001 v\r\n");
        assert_eq!(
            (ask.head, ask.body, ask.tail),
            (&b"VA 4\r\n"[..], 4, &b"\r\n"[..])
        );
        let put = meta.put(4, 2);
        assert!(
            put.request
                .starts_with(b"ms 00000000000000040000000000000002 4\r\n")
                && put.request.ends_with(b"\r\n")
        );
        assert_eq!(
            meta.exists(4, 0, 3).expect("supported").head,
            b"HD\r\nHD\r\nHD\r\n"
        );
    }
}
