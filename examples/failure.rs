//! What a caller sees when the node goes away, and when it comes back.
//!
//! Every call returns within its deadline with an answer to act on: "unavailable" means *compute it*.
//! The engine restarts nothing; when the node is back, the next calls reach it.
//!
//! `cargo run -p kvexamples --example failure`

#![allow(clippy::print_stdout, reason = "a program for people prints")]

use std::time::Duration;

use kvclient::{
    Ack, Chain, Client, LookupOptions, Namespace, NamespaceHandle, PutBlock, PutOptions,
};
use kvexamples::sandbox::Sandbox;
use kvexamples::stopwatch::Stopwatch;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut node = Sandbox::start().await?;
    let client = Client::builder(&node.endpoint())
        .deadline(Duration::from_millis(500))
        .connect()
        .await?;
    let namespace = client
        .open_namespace(&Namespace::opaque("failure", 16, 64), false)
        .await?;
    let chain = namespace.chain(&(0..64).collect::<Vec<u32>>());
    let blocks: Vec<_> = (0..4)
        .map(|i| PutBlock::new(i, vec![1; 64 << 10]))
        .collect();
    // Stored: they are on the disk when this returns, so they outlive the node.
    let options = PutOptions {
        ack: Ack::Stored,
        ..PutOptions::default()
    };
    client.put(&namespace, &chain, &blocks, options).await?;

    ask(&client, &namespace, &chain, "node is up").await;
    node.pause().await?;
    for _ in 0..6 {
        ask(&client, &namespace, &chain, "node is gone").await;
    }
    node.resume().await?;
    println!("-- the node is back --");
    let watch = Stopwatch::start();
    while ask(&client, &namespace, &chain, "node is back").await == 0 {
        anyhow::ensure!(
            watch.elapsed() < Duration::from_secs(20),
            "the client did not find the node again"
        );
        tokio::time::timeout(Duration::from_millis(200), std::future::pending::<()>())
            .await
            .ok();
    }
    node.stop().await
}

/// One request of an engine. Blocks it may reuse; 0 is always a right answer.
async fn ask(client: &Client, namespace: &NamespaceHandle, chain: &Chain, when: &str) -> u32 {
    let watch = Stopwatch::start();
    match client
        .lookup(namespace, chain, &LookupOptions::default())
        .await
    {
        Ok(found) => {
            println!(
                "{when}: {} blocks present ({:.1} ms)",
                found.present_blocks,
                watch.ms()
            );
            found.present_blocks
        }
        Err(error) => {
            println!(
                "{when}: compute it ({:.1} ms; {:?}: {error})",
                watch.ms(),
                error.kind()
            );
            0
        }
    }
}
