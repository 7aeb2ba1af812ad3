//! Redis: RESP2 by hand, and a server without persistence on a loopback port and a Unix socket.
//!
//! `GET`, `SET` and a pipeline of `EXISTS`, one per key, because Terrace too answers which keys are there and not how many.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::wire::{Ask, KEY_BYTES, Template, Wire, key, payload};
use crate::spawn::{Cores, Server, find, free_port};

/// The client's side of RESP2.
#[derive(Debug, Default)]
pub struct Resp {
    get: Template,
    put: Template,
    head: Vec<u8>,
    head_of: usize,
    pipeline: Vec<u8>,
    ones: Vec<u8>,
}

impl Wire for Resp {
    fn get(&mut self, bytes: usize, index: u64) -> Ask<'_> {
        if self.head_of != bytes || self.head.is_empty() {
            (self.head, self.head_of) = (format!("${bytes}\r\n").into_bytes(), bytes);
        }
        let request = self.get.with(bytes, index, |out| {
            out.extend_from_slice(format!("*2\r\n$3\r\nGET\r\n${KEY_BYTES}\r\n").as_bytes());
            let at = out.len();
            out.extend_from_slice(&[0; KEY_BYTES]);
            out.extend_from_slice(b"\r\n");
            at
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
            out.extend_from_slice(format!("*3\r\n$3\r\nSET\r\n${KEY_BYTES}\r\n").as_bytes());
            let at = out.len();
            out.extend_from_slice(&[0; KEY_BYTES]);
            out.extend_from_slice(format!("\r\n${bytes}\r\n").as_bytes());
            out.extend_from_slice(&payload(bytes, bytes as u64));
            out.extend_from_slice(b"\r\n");
            at
        });
        Ask {
            request,
            head: b"+OK\r\n",
            body: 0,
            tail: b"",
        }
    }

    fn exists(&mut self, bytes: usize, first: u64, count: u32) -> Option<Ask<'_>> {
        self.pipeline.clear();
        for index in first..first + u64::from(count) {
            self.pipeline
                .extend_from_slice(b"*2\r\n$6\r\nEXISTS\r\n$32\r\n");
            self.pipeline.extend_from_slice(&key(bytes, index));
            self.pipeline.extend_from_slice(b"\r\n");
        }
        let len = 4 * count as usize;
        if self.ones.len() != len {
            self.ones = b":1\r\n".repeat(count as usize);
        }
        Some(Ask {
            request: &self.pipeline,
            head: &self.ones,
            body: 0,
            tail: b"",
        })
    }
}

/// Starts a server; its TCP address and the path of its Unix socket are answered with it.
///
/// # Errors
/// It is not installed or cannot be started.
pub fn start(cores: Cores, dir: &Path) -> Result<(Server, String, std::path::PathBuf)> {
    let program =
        find("redis-server").ok_or_else(|| anyhow::anyhow!("redis-server is not installed"))?;
    let (port, unix) = (free_port()?, dir.join("redis.sock"));
    let mut command = Command::new(program);
    command
        .args([
            "--bind",
            "127.0.0.1",
            "--port",
            &port.to_string(),
            "--unixsocket",
        ])
        .arg(&unix);
    command
        .args([
            "--save",
            "",
            "--appendonly",
            "no",
            "--daemonize",
            "no",
            "--protected-mode",
            "no",
            "--dir",
        ])
        .arg(dir);
    let server = cores.start(&mut command, &dir.join("redis.log"))?;
    Ok((server, format!("127.0.0.1:{port}"), unix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_resp() {
        let mut resp = Resp::default();
        let ask = resp.get(4, 1);
        assert_eq!(
            ask.request,
            b"*2\r\n$3\r\nGET\r\n$32\r\n00000000000000040000000000000001\r\n"
        );
        assert_eq!(
            (ask.head, ask.body, ask.tail),
            (&b"$4\r\n"[..], 4, &b"\r\n"[..])
        );
        let again = resp.get(65536, 2);
        assert!(
            again
                .request
                .ends_with(b"00000000000100000000000000000002\r\n")
                && again.head == b"$65536\r\n"
        );
        let put = resp.put(4, 7);
        assert!(
            put.request.starts_with(
                b"*3\r\n$3\r\nSET\r\n$32\r\n00000000000000040000000000000007\r\n$4\r\n"
            )
        );
        assert_eq!(put.request.len(), 18 + 32 + 2 + 4 + 4 + 2);
        let exists = resp.exists(4, 1, 2).expect("supported");
        assert_eq!(exists.head, b":1\r\n:1\r\n");
        assert!(
            exists
                .request
                .ends_with(b"*2\r\n$6\r\nEXISTS\r\n$32\r\n00000000000000040000000000000002\r\n")
        );
    }
}
