//! Blocks stored and removed, as they happen: what a router listens to.
//!
//! `cargo run -p kvexamples --example watch_events`

#![allow(clippy::print_stdout, reason = "a program for people prints")]

use std::time::Duration;

use kvclient::{BlockEvent, Client, Namespace, PutBlock, PutOptions, Target, WatchEvent};
use kvexamples::sandbox::Sandbox;

use tokio::time::timeout;

/// How long the stream may last.
const LISTEN: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let node = Sandbox::start().await?;
    let client = Client::connect(&node.endpoint()).await?;
    let namespace = client
        .open_namespace(&Namespace::opaque("watch_events", 16, 64), false)
        .await?;
    let mut watch = client.watch(Some(&namespace), LISTEN).await?;

    let chain = namespace.chain(&(0..64).collect::<Vec<u32>>());
    let blocks: Vec<_> = (0..4)
        .map(|i| PutBlock::new(i, vec![1; 64 << 10]))
        .collect();
    client
        .put(&namespace, &chain, &blocks, PutOptions::default())
        .await?;
    // Everything from the third block on, in any chain that goes through it.
    client
        .invalidate(&namespace, Target::Prefix(chain.hashes[2]))
        .await?;

    // Events come in order. The stream lasts as long as the node, so this example stops listening
    // when nothing has come for a while.
    while let Ok(event) = timeout(Duration::from_millis(500), watch.next()).await {
        match event? {
            Some((sequence, WatchEvent::Stored(block))) => {
                println!("{sequence:>3}  stored   {}", line(&block))
            }
            Some((sequence, WatchEvent::Removed(block))) => {
                println!("{sequence:>3}  removed  {}", line(&block))
            }
            Some((_, WatchEvent::Lagged(lost))) => {
                println!("     {lost} events lost: look up again what matters")
            }
            None => break,
        }
    }
    node.stop().await
}

fn line(block: &BlockEvent) -> String {
    let (index, hash, bytes) = (block.index, block.key.hash, block.length_bytes);
    let reason = block
        .reason
        .map_or(String::new(), |reason| format!(" ({reason})"));
    format!(
        "block {index} {hash:?}, {bytes} bytes in {}{reason}",
        block.tier
    )
}
