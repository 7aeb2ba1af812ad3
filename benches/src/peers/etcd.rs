//! etcd as a metadata store: its v3 gRPC API, and a server of its own on a loopback port.
//!
//! ```text
//!   one Txn:  success = [ Range(key, serializable) × 512 ]   ──►   [ ResponseRange { kvs: [key, value] } × 512 ]
//! ```
//!
//! One transaction of plain ranges is the fastest way there is to ask etcd for many keys that do not lie side by side; the
//! server's limit of operations per transaction is raised for it (128 by default, which would take four round trips).
//! `serializable` spares the round through consensus: one member answers from what it has, as Terrace and Redis do.
//!
//! The few messages are written by hand after etcd's public `rpc.proto`; fields that are not used are left out.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use prost::Message;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

use super::network::{Connection, Job};
use super::wire::key;
use super::{CHAIN_KEYS, CHAINS, LOOKUP_BYTES};
use crate::rounds::Op;
use crate::spawn::{Cores, Server, find, free_port};

/// What stands behind a key: where the block is.
pub const LOCATION: &[u8] = b"node-0001";

/// `etcdserverpb.RangeRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct RangeRequest {
    /// Which key.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// No round through consensus.
    #[prost(bool, tag = "7")]
    pub serializable: bool,
}

/// `etcdserverpb.PutRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct PutRequest {
    /// Which key.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// Its value.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// `etcdserverpb.RequestOp`.
#[derive(Clone, PartialEq, Message)]
pub struct RequestOp {
    /// What.
    #[prost(oneof = "Request", tags = "1, 2")]
    pub request: Option<Request>,
}

/// One operation of a transaction.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Request {
    /// Reads.
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    /// Writes.
    #[prost(message, tag = "2")]
    Put(PutRequest),
}

/// `etcdserverpb.TxnRequest`, without conditions.
#[derive(Clone, PartialEq, Message)]
pub struct TxnRequest {
    /// Done in order.
    #[prost(message, repeated, tag = "2")]
    pub success: Vec<RequestOp>,
}

/// `mvccpb.KeyValue`.
#[derive(Clone, PartialEq, Message)]
pub struct KeyValue {
    /// Which key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: bytes::Bytes,
    /// Its value.
    #[prost(bytes = "bytes", tag = "5")]
    pub value: bytes::Bytes,
}

/// `etcdserverpb.RangeResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct RangeResponse {
    /// What was found.
    #[prost(message, repeated, tag = "2")]
    pub kvs: Vec<KeyValue>,
}

/// `etcdserverpb.ResponseOp`.
#[derive(Clone, PartialEq, Message)]
pub struct ResponseOp {
    /// Of a range.
    #[prost(message, optional, tag = "1")]
    pub range: Option<RangeResponse>,
}

/// `etcdserverpb.TxnResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct TxnResponse {
    /// The conditions held.
    #[prost(bool, tag = "2")]
    pub succeeded: bool,
    /// One for each operation.
    #[prost(message, repeated, tag = "3")]
    pub responses: Vec<ResponseOp>,
}

/// One connection.
pub struct Etcd(Grpc<Channel>);

impl Etcd {
    async fn txn(&mut self, success: Vec<RequestOp>) -> Result<TxnResponse> {
        self.0.ready().await.context("etcd is not ready")?;
        let path = PathAndQuery::from_static("/etcdserverpb.KV/Txn");
        let request = tonic::Request::new(TxnRequest { success });
        let codec = ProstCodec::<TxnRequest, TxnResponse>::default();
        Ok(self.0.unary(request, path, codec).await?.into_inner())
    }

    /// Writes every key of the lookup cells.
    ///
    /// # Errors
    /// The server refuses.
    pub async fn fill(&mut self) -> Result<()> {
        for nth in 0..u64::from(CHAINS) {
            let put = |key: Vec<u8>| {
                let value = LOCATION.to_vec();
                Some(Request::Put(PutRequest { key, value }))
            };
            let keys = keys(nth * u64::from(CHAIN_KEYS), CHAIN_KEYS);
            let operations = keys.map(|key| RequestOp { request: put(key) }).collect();
            ensure!(
                self.txn(operations).await?.succeeded,
                "etcd did not take the keys"
            );
        }
        Ok(())
    }
}

fn keys(first: u64, count: u32) -> impl Iterator<Item = Vec<u8>> {
    (first..first + u64::from(count)).map(|index| key(LOOKUP_BYTES as usize, index).to_vec())
}

impl Connection for Etcd {
    type Target = String;

    async fn connect(target: &String) -> Result<Self> {
        let endpoint = Endpoint::from_shared(target.clone())?.tcp_nodelay(true);
        // 512 answers are about 80 kB; windows as large as those of Terrace's client.
        let endpoint = endpoint
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20);
        let grpc = Grpc::new(endpoint.connect().await?);
        Ok(Self(grpc.max_decoding_message_size(64 << 20)))
    }

    async fn act(&mut self, job: &Job, index: u64) -> Result<u64> {
        ensure!(job.op == Op::Exists, "etcd is only asked for keys");
        let range = |key| {
            let serializable = true;
            Some(Request::Range(RangeRequest { key, serializable }))
        };
        let operations = keys(index, job.keys).map(|key| RequestOp {
            request: range(key),
        });
        let answer = self.txn(operations.collect()).await?;
        let known = |op: &&ResponseOp| op.range.as_ref().is_some_and(|range| range.kvs.len() == 1);
        let there = answer.responses.iter().filter(known).count();
        ensure!(
            there == job.keys as usize,
            "{there} of {} keys known",
            job.keys
        );
        Ok(0)
    }
}

/// Starts a server of one member whose data lie in `dir`; its client address is answered with it.
///
/// # Errors
/// It is not installed or cannot be started.
pub fn start(cores: Cores, dir: &Path) -> Result<(Server, String)> {
    let program =
        find("etcd").context("etcd is not installed (Debian: apt-get install etcd-server)")?;
    let url = |port: u16| format!("http://127.0.0.1:{port}");
    let (client, peer) = (url(free_port()?), url(free_port()?));
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ETCD_") {
            command.env_remove(name); // settings of another server are not meant for this one
        }
    }
    let arguments = [
        ("--name", "bench"),
        ("--data-dir", &dir.join("data").display().to_string()),
        ("--listen-client-urls", &client),
        ("--advertise-client-urls", &client),
        ("--listen-peer-urls", &peer),
        ("--initial-advertise-peer-urls", &peer),
        ("--initial-cluster", &format!("bench={peer}")),
        ("--max-txn-ops", "512"),
        ("--log-level", "error"),
    ];
    for (name, value) in arguments {
        command.args([name, value]);
    }
    let server = cores.start(&mut command, &dir.join("etcd.log"))?;
    Ok((server, client))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_on_the_wire_as_etcd_reads_it() {
        let request = Some(Request::Range(RangeRequest {
            key: b"k".to_vec(),
            serializable: true,
        }));
        let success = vec![RequestOp { request }];
        let bytes = TxnRequest { success }.encode_to_vec();
        // success = 2 { request_range = 1 { key = 1 "k", serializable = 7 true } }
        assert_eq!(bytes, [0x12, 7, 0x0a, 5, 0x0a, 1, b'k', 0x38, 1]);
    }
}
