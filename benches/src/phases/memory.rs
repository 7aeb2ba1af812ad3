//! Resident memory per stored byte of a full node.
//!
//! ```text
//!   (anonymous + shared + huge pages of the full node) − (anonymous of an idle node without room)
//!   ─────────────────────────────────────────────────────────────────────────────────────────────
//!                     blocks that a lookup finds × their length
//! ```
//!
//! Blocks are put in chains of 16 until a quarter more than the capacity was offered; what is present is asked for by
//! lookup afterwards, not taken from what the puts answered, and not from the node's own account.

use anyhow::{Context, Result};
use bytes::Bytes;
use kvclient::{Ack, Chain, LookupOptions, PutBlock};

use super::Options;
use crate::bars::{Bar, Bound};
use crate::peers::node::{self, Node};
use crate::peers::wire::payload;
use crate::procfs::Memory;
use crate::report::size;

const CHAIN: u64 = 16;
/// The smallest class the bar speaks of has the most of everything that is kept per block.
const BLOCKS: [u64; 3] = [64 << 10, 1 << 20, 4 << 20];

/// One bar per block size.
///
/// # Errors
/// A node cannot be started or refuses a put.
pub async fn run(options: &Options) -> Result<Vec<Bar>> {
    let capacity = (options.working_set_bytes * 8).max(256 << 20);
    let baseline = {
        let node = node(options, "memory-idle", 64 << 20).await?;
        let client = node.client(false, None).await?;
        node::namespace(&client).await?;
        Memory::of(node.pid())
            .context("the idle node is gone")?
            .anonymous_bytes
    };
    let mut bars = Vec::new();
    for bytes in BLOCKS {
        let spinner = options.spinner("memory");
        spinner.set_message(format!(
            "filling {} with blocks of {}",
            size(capacity),
            size(bytes)
        ));
        let node = node(options, &format!("memory-{bytes}"), capacity).await?;
        let client = node.client(false, None).await?;
        let namespace = node::namespace(&client).await?;
        let value = Bytes::from(payload(bytes as usize, bytes));
        let chain = |nth: u64| {
            let names = nth * CHAIN..(nth + 1) * CHAIN;
            Chain::from_root(names.map(|i| node::name(&namespace, bytes, i)).collect())
        };
        let chains = capacity * 5 / 4 / bytes / CHAIN;
        for nth in 0..chains {
            let blocks: Vec<_> = (0..CHAIN as usize)
                .map(|i| PutBlock::new(i, value.clone()))
                .collect();
            node::put_kept(&client, &namespace, &chain(nth), &blocks, Ack::Cached).await?;
        }
        let mut present = 0;
        for nth in 0..chains {
            let found = client
                .lookup(&namespace, &chain(nth), &LookupOptions::probe())
                .await?;
            present += u64::from(found.present_blocks);
        }
        let memory = Memory::of(node.pid()).context("the node is gone")?;
        let stored = present * bytes;
        let held = memory.total_bytes().saturating_sub(baseline);
        spinner.finish_and_clear();
        let note = format!(
            "{} of {} filled; {:.1} MiB private above an idle node",
            size(stored),
            size(capacity),
            memory.anonymous_bytes.saturating_sub(baseline) as f64 / f64::from(1 << 20)
        );
        let path = format!(
            "resident memory per stored byte, full of {} blocks",
            size(bytes)
        );
        let ratio = (stored > 0).then(|| held as f64 / stored as f64);
        bars.push(Bar::fact(&path, Bound::AtMost(1.07), ratio, note));
    }
    Ok(bars)
}

async fn node(options: &Options, name: &str, ram_bytes: u64) -> Result<Node> {
    let settings = [
        ("ram_bytes", format!("{}MiB", ram_bytes >> 20)),
        ("nvme_bytes", "0".to_owned()),
    ];
    Node::start(options.cores, &options.dir.join(name), &settings).await
}
