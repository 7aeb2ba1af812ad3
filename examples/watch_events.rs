//! Blocks stored and removed, as they happen: what a router listens to.
//!
//! `cargo run -p kvexamples --example watch_events`

#![allow(clippy::print_stdout, reason = "a program for people prints")]

use std::time::Duration;

use kvclient::{
    BlockEvent, Client, Heard, Namespace, Notice, PutBlock, PutOptions, Target, WatchEvent,
};
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

    // Events come in order. A watch lasts its whole time, so this example stops listening
    // when nothing has come for a while.
    while let Ok(Some(Notice { member, heard })) =
        timeout(Duration::from_millis(500), watch.next()).await
    {
        match heard {
            Heard::Listening { missed, .. } => {
                let missed = missed.map_or("what it holds is to be looked up".to_owned(), |n| {
                    format!("at most {n} events were missed")
                });
                println!("     listening to {}; {missed}", member.address);
            }
            Heard::Event { sequence, event } => match event {
                WatchEvent::Stored(block) => println!("{sequence:>3}  stored   {}", line(&block)),
                WatchEvent::Removed(block) => println!("{sequence:>3}  removed  {}", line(&block)),
                WatchEvent::Lagged(lost) => {
                    println!("     {lost} events lost: look up again what matters");
                }
            },
            // Of a cluster: who is not heard for a while is listened to again by itself.
            Heard::Lost(why) => println!("     {} is not heard: {why}", member.address),
            Heard::Joined => println!("     {} came", member.id),
            Heard::Left => println!("     {} has left", member.id),
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
