//! What a lease promises: while it lives, what the lookup reported can be had.
//!
//! `cargo run -p kvexamples --example leases`

#![allow(clippy::print_stdout, reason = "a program for people prints")]

use std::future::pending;
use std::time::Duration;

use kvclient::{Client, LookupOptions, Namespace, PutBlock, PutOptions};
use kvexamples::sandbox::Sandbox;

use tokio::time::timeout;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let node = Sandbox::start().await?;
    let client = Client::connect(&node.endpoint()).await?;
    let namespace = client
        .open_namespace(&Namespace::opaque("leases", 16, 64), false)
        .await?;
    let chain = namespace.chain(&(0..64).collect::<Vec<u32>>());
    let blocks: Vec<_> = (0..4)
        .map(|i| PutBlock::new(i, vec![1; 64 << 10]))
        .collect();
    client
        .put(&namespace, &chain, &blocks, PutOptions::default())
        .await?;

    // A probe only looks.
    let probe = client
        .lookup(&namespace, &chain, &LookupOptions::probe())
        .await?;
    println!(
        "probe:   {} blocks present, lease: {}",
        probe.present_blocks,
        probe.lease.is_some()
    );

    // A lookup pins what it reports, and says how many blocks and for how long.
    let ttl = Duration::from_millis(300);
    let found = client
        .lookup(
            &namespace,
            &chain,
            &LookupOptions {
                lease_ttl: ttl,
                ..LookupOptions::default()
            },
        )
        .await?;
    let mut lease = found.lease.expect("four blocks are present");
    println!(
        "lookup:  {} blocks, {} bytes under a lease of {:?}",
        lease.blocks(),
        lease.bytes(),
        lease.ttl()
    );

    let got = client.get(&namespace, &chain, &lease).await?;
    println!(
        "get:     {:?}",
        got.iter()
            .map(|block| block.outcome.as_str())
            .collect::<Vec<_>>()
    );

    println!(
        "renew:   {}",
        if lease.renew(ttl).await? {
            "held for longer"
        } else {
            "too late"
        }
    );

    // Let it run out: the answer is `expired`, at once, and the caller looks up again.
    let _ = timeout(2 * ttl, pending::<()>()).await;
    let got = client.get(&namespace, &chain, &lease).await?;
    println!(
        "expired: {:?}",
        got.iter()
            .map(|block| block.outcome.as_str())
            .collect::<Vec<_>>()
    );

    // Given back by hand; dropping the handle does the same in the background.
    let found = client
        .lookup(&namespace, &chain, &LookupOptions::default())
        .await?;
    let released = found
        .lease
        .expect("they are still present")
        .release()
        .await?;
    println!("release: {released}");
    node.stop().await
}
