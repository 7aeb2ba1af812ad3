//! Terrace in ten lines: put four blocks of a prompt, find them by its tokens, get them back.
//!
//! `cargo run -p kvexamples --example quickstart`

#![allow(clippy::print_stdout, reason = "a program for people prints")]

use kvclient::{Client, LookupOptions, Namespace, PutBlock, PutOptions};
use kvexamples::sandbox::Sandbox;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let node = Sandbox::start().await?; // or a kvserver that runs already, at "127.0.0.1:7070"
    let client = Client::connect(&node.endpoint()).await?;
    let namespace = client
        .open_namespace(&Namespace::opaque("quickstart", 16, 64), false)
        .await?;
    let prompt: Vec<u32> = (0..64).collect(); // 64 tokens make 4 blocks of 16
    let chain = namespace.chain(&prompt);
    let blocks: Vec<_> = (0..4)
        .map(|i| PutBlock::new(i, vec![i as u8; 256 << 10]))
        .collect();
    client
        .put(&namespace, &chain, &blocks, PutOptions::default())
        .await?;
    let found = client
        .lookup(&namespace, &chain, &LookupOptions::default())
        .await?;
    let got = client.get(&namespace, &chain, found.lease.as_ref()).await?;
    let bytes: usize = got
        .iter()
        .filter_map(|block| Some(block.bytes.as_ref()?.len()))
        .sum();
    println!(
        "{} of {} blocks present, {bytes} bytes back, verified",
        found.present_blocks,
        chain.len()
    );
    node.stop().await
}
