//! An engine that has hashes of its own: opaque bytes in, Terrace's names out.
//!
//! vLLM and SGLang already chain a hash over every block. A connector hands those over as they are;
//! each is folded into a name under the namespace's key, so two models or two tenants never meet.
//!
//! `cargo run -p kvexamples --example engine_hashes`

#![allow(clippy::print_stdout, reason = "a program for people prints")]

use kvclient::{Client, LookupOptions, Namespace, PutBlock, PutOptions};
use kvexamples::sandbox::Sandbox;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let node = Sandbox::start().await?;
    let client = Client::connect(&node.endpoint()).await?;
    let namespace = client
        .open_namespace(&Namespace::opaque("engine_hashes", 16, 64), false)
        .await?;

    // Any length will do: 8 bytes from one engine, 32 from another. They must stand for the prefix.
    let from_the_engine: Vec<[u8; 8]> = [
        0x9e37_79b9_7f4a_7c15_u64,
        0xbf58_476d_1ce4_e5b9,
        0x94d0_49bb_1331_11eb,
    ]
    .map(u64::to_be_bytes)
    .to_vec();
    let chain = namespace.engine_chain(&from_the_engine);
    for (opaque, name) in from_the_engine.iter().zip(&chain.hashes) {
        println!("engine {:016x}  is  {name}", u64::from_be_bytes(*opaque));
    }

    let blocks: Vec<_> = (0..chain.len())
        .map(|i| PutBlock::new(i, vec![7; 64 << 10]))
        .collect();
    client
        .put(&namespace, &chain, &blocks, PutOptions::default())
        .await?;

    // The engine asks again, with one block more than is there.
    let mut longer = from_the_engine.clone();
    longer.push(42_u64.to_be_bytes());
    let found = client
        .lookup(
            &namespace,
            &namespace.engine_chain(&longer),
            &LookupOptions::default(),
        )
        .await?;
    println!(
        "asked for {} blocks, {} are present",
        longer.len(),
        found.present_blocks
    );

    // The same engine hash in another namespace is another name.
    let other = client
        .open_namespace(&Namespace::opaque("another model", 16, 64), false)
        .await?;
    let found = client
        .lookup(
            &other,
            &other.engine_chain(&from_the_engine),
            &LookupOptions::default(),
        )
        .await?;
    println!("in another namespace {} are", found.present_blocks);
    node.stop().await
}
