//! Chains and branches: what two conversations share, and where they part.
//!
//! ```text
//! system prompt ──┬── question A ── follow-up A
//!                 └── question B
//! ```
//!
//! `cargo run -p kvexamples --example prefix_reuse`

#![allow(clippy::print_stdout, reason = "a program for people prints")]

use kvclient::{Client, LookupOptions, Namespace, NamespaceHandle, PutBlock, PutOptions};
use kvexamples::sandbox::Sandbox;

const BLOCK_TOKENS: usize = 16;
const BLOCK_BYTES: usize = 64 << 10;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let node = Sandbox::start().await?;
    let client = Client::connect(&node.endpoint()).await?;
    let spec = Namespace::opaque("prefix_reuse", BLOCK_TOKENS as u32, 64);
    let namespace = client.open_namespace(&spec, false).await?;

    // Token ids stand for text here; a real caller has them from its tokenizer.
    let system: Vec<u32> = (0..128).collect();
    let first = [&system[..], &(1000..1048).collect::<Vec<u32>>()].concat();
    let second = [&system[..], &(2000..2048).collect::<Vec<u32>>()].concat();
    let follow_up = [&first[..], &(3000..3040).collect::<Vec<u32>>()].concat();

    serve(&client, &namespace, "question A  ", &first).await?;
    serve(&client, &namespace, "question B  ", &second).await?;
    serve(&client, &namespace, "follow-up A ", &follow_up).await?;
    serve(&client, &namespace, "A once more ", &follow_up).await?;

    // One changed token at the top, and nothing can be reused: every name depends on all before it.
    let mut dated = follow_up.clone();
    dated[0] = 9999;
    serve(&client, &namespace, "A, new date ", &dated).await?;

    println!(
        "\nOnly full blocks count: the last {} tokens of the follow-up are no block, and",
        follow_up.len() % BLOCK_TOKENS
    );
    println!("are computed each time. Put what changes at the end of a prompt, not at its top.");
    node.stop().await
}

/// What an engine does with one prompt: ask, take what is there, "compute" and put the rest.
async fn serve(
    client: &Client,
    namespace: &NamespaceHandle,
    name: &str,
    prompt: &[u32],
) -> anyhow::Result<()> {
    let chain = namespace.chain(prompt);
    let found = client
        .lookup(namespace, &chain, &LookupOptions::default())
        .await?;
    let usable = found
        .lease
        .as_ref()
        .map_or(0, |lease| lease.blocks() as usize);
    let computed: Vec<_> = (usable..chain.len())
        .map(|i| PutBlock::new(i, vec![i as u8; BLOCK_BYTES]))
        .collect();
    client
        .put(namespace, &chain, &computed, PutOptions::default())
        .await?;

    let reused = usable * BLOCK_TOKENS;
    let bar = "█".repeat(usable) + &"░".repeat(chain.len() - usable);
    println!(
        "{name} {bar:<16} {reused:>3} tokens reused, {:>3} computed",
        prompt.len() - reused
    );
    Ok(())
}
