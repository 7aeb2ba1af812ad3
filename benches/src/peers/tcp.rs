//! Plain length-framed TCP: the least a server of values could do, and therefore the ceiling of every protocol here.
//!
//! ```text
//!   get   0 │ slot u64 │ length u32              ──►   length u32 │ value
//!   put   1 │ slot u64 │ length u32 │ value      ──►   length u32
//! ```
//!
//! Values lie in a table by number; there is no index, no eviction and no checksum.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use bytes::Buf;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};

use super::wire::{Ask, Wire, payload};

const HEAD_BYTES: usize = 13;

/// The client's side.
#[derive(Debug, Default)]
pub struct Framed {
    head: [u8; HEAD_BYTES],
    put: Vec<u8>,
    length: [u8; 4],
}

impl Framed {
    fn head(&mut self, op: u8, bytes: usize, index: u64) {
        self.length = u32::try_from(bytes)
            .expect("values are below 4 GiB")
            .to_le_bytes();
        self.head[0] = op;
        self.head[1..9].copy_from_slice(&slot(bytes, index).to_le_bytes());
        self.head[9..].copy_from_slice(&self.length);
    }
}

/// Values of all sizes in one table.
fn slot(bytes: usize, index: u64) -> u64 {
    (bytes as u64) << 32 | index
}

impl Wire for Framed {
    fn get(&mut self, bytes: usize, index: u64) -> Ask<'_> {
        self.head(0, bytes, index);
        Ask {
            request: &self.head,
            head: &self.length,
            body: bytes,
            tail: b"",
        }
    }

    fn put(&mut self, bytes: usize, index: u64) -> Ask<'_> {
        self.head(1, bytes, index);
        if self.put.len() != HEAD_BYTES + bytes {
            self.put = self.head.to_vec();
            self.put.extend_from_slice(&payload(bytes, bytes as u64));
        }
        self.put[..HEAD_BYTES].copy_from_slice(&self.head);
        Ask {
            request: &self.put,
            head: &self.length,
            body: 0,
            tail: b"",
        }
    }

    fn exists(&mut self, _: usize, _: u64, _: u32) -> Option<Ask<'_>> {
        None // there is no index that could answer
    }
}

type Table = Arc<Mutex<HashMap<u64, Arc<Vec<u8>>>>>;

/// Serves until the process ends.
///
/// # Errors
/// The addresses cannot be bound.
pub async fn serve(tcp: &str, unix: &Path) -> Result<()> {
    let table = Table::default();
    let (tcp, unix) = (TcpListener::bind(tcp).await?, UnixListener::bind(unix)?);
    loop {
        tokio::select! {
            accepted = tcp.accept() => {
                let (stream, _) = accepted?;
                stream.set_nodelay(true)?;
                tokio::spawn(converse(stream, table.clone()));
            }
            accepted = unix.accept() => {
                tokio::spawn(converse(accepted?.0, table.clone()));
            }
        }
    }
}

/// One connection. A received value is swapped with the one it replaces, whose memory receives the next.
async fn converse(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    table: Table,
) -> std::io::Result<()> {
    let mut spare = Vec::new();
    loop {
        let op = stream.read_u8().await?;
        let (slot, bytes) = (stream.read_u64_le().await?, stream.read_u32_le().await?);
        let length = bytes.to_le_bytes();
        if op == 0 {
            let value = table.lock().expect("no holder panics").get(&slot).cloned();
            let Some(value) = value.filter(|v| v.len() == bytes as usize) else {
                stream.write_all(&u32::MAX.to_le_bytes()).await?;
                continue;
            };
            let mut reply = Buf::chain(&length[..], &value[..]);
            stream.write_all_buf(&mut reply).await?;
        } else {
            spare.resize(bytes as usize, 0);
            stream.read_exact(&mut spare).await?;
            let old = table
                .lock()
                .expect("no holder panics")
                .insert(slot, Arc::new(std::mem::take(&mut spare)));
            spare = old.and_then(Arc::into_inner).unwrap_or_default();
            stream.write_all(&length).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_put_is_got_and_what_was_not_is_refused() {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        tokio::spawn(converse(server, Table::default()));
        let mut wire = Framed::default();
        let mut exchange = async |ask: Ask<'_>| {
            client.write_all(ask.request).await.expect("server lives");
            let mut reply = vec![0; ask.reply_len().max(4)];
            let n = if ask.body == 0 {
                4
            } else {
                client.read(&mut reply).await.expect("server lives")
            };
            if ask.body == 0 {
                client
                    .read_exact(&mut reply[..4])
                    .await
                    .expect("server lives");
            }
            (ask.check_head(&reply[..n]).is_ok(), reply)
        };
        assert!(!exchange(wire.get(100, 3)).await.0);
        assert!(exchange(wire.put(100, 3)).await.0);
        let (ok, reply) = exchange(wire.get(100, 3)).await;
        assert!(ok && reply[4..] == payload(100, 100));
        assert!(!exchange(wire.get(100, 4)).await.0);
    }
}
