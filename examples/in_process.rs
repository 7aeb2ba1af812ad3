//! A node inside your own program: one process, no second binary, the same rules.
//!
//! A program that holds its node may also read blocks by reference, straight from the arena: no byte
//! is copied, whatever the block's size. Other processes use the same node over its socket.
//!
//! `cargo run -p kvexamples --example in_process`

#![allow(clippy::print_stdout, reason = "a program for people prints")]

use std::time::Duration;

use kvclient::{Client, Namespace, PutBlock, PutOptions};
use kvexamples::stopwatch::Stopwatch;
use kvproto::BlockKey;
use kvserver::Node;
use kvserver::config::{Capacity, Config, UnixSocket};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let node = Node::start(Config {
        data_dir: folder.path().to_owned(),
        listen: "127.0.0.1:0".parse()?,
        http_listen: Some("127.0.0.1:0".parse()?),
        unix_socket: UnixSocket::Auto,
        ram_bytes: Capacity::Bytes(128 << 20),
        nvme_bytes: Capacity::Bytes(0),
        durable_bytes: Capacity::Bytes(0),
        ..Config::default()
    })
    .await?;
    println!("gRPC     {}", node.endpoint());
    println!(
        "socket   {}",
        node.uds_path()
            .map_or("off".into(), |path| path.display().to_string())
    );
    println!(
        "metrics  {}",
        node.http_addr()
            .map_or("off".into(), |address| format!("http://{address}/metrics"))
    );

    let client = Client::connect(&node.endpoint()).await?;
    let namespace = client
        .open_namespace(&Namespace::opaque("in_process", 16, 64), false)
        .await?;
    let chain = namespace.chain(&(0..16).collect::<Vec<u32>>());
    let block = PutBlock::new(0, vec![42; 4 << 20]);
    client
        .put(&namespace, &chain, &[block], PutOptions::default())
        .await?;

    let key = BlockKey {
        namespace: namespace.id(),
        hash: chain.hashes[0],
        part: Default::default(),
    };
    let watch = Stopwatch::start();
    let block = node.blocks().get_ref(&key, None);
    let by_reference = watch.elapsed();
    let watch = Stopwatch::start();
    client.get(&namespace, &chain, None).await?;
    println!(
        "4 MiB by reference: {by_reference:?}, over gRPC, copied and verified: {:?}",
        watch.elapsed()
    );
    if let Some(block) = block {
        println!(
            "its first byte is {}, its length {}",
            block.bytes()[0],
            block.len_bytes()
        );
    }

    let stats = client.stats().await?;
    println!(
        "the node says: version {}, policy {}, {} namespace",
        stats.version, stats.policy, stats.namespaces
    );
    node.shutdown(Duration::from_secs(5)).await;
    Ok(())
}
