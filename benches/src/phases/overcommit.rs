//! Four times the RAM, put with the ack `stored`: is everything that was answered `stored` still there, and right?
//!
//! ```text
//!   8 writers ─► put(ack stored) ─► stored    ─► remembered ─► read back, compared byte by byte
//!                               └─► rejected  ─► counted by reason; waits as told and tries again
//! ```
//!
//! Every block has bytes of its own, made from its number, so that a block returned for another is seen. The queue towards
//! the disk is kept short, so that rejections happen; nothing is left out of the account: offered = stored + given up.
//! A second run under the default admission shows what RAM drops on its way out, by reason.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use kvclient::{Ack, Chain, Client, NamespaceHandle, PutBlock, PutOptions, PutOutcome};
use tokio::task::JoinSet;

use super::Options;
use crate::bars::{Bar, Bound};
use crate::clock::pause;
use crate::peers::node::{self, Node};
use crate::peers::wire::payload;
use crate::report::size;

const BLOCK_BYTES: u64 = 1 << 20;
const WRITERS: u64 = 8;
const OVER: u64 = 4;
const TRIES: usize = 200;

#[derive(Default)]
struct Account {
    stored: Vec<u64>,
    given_up: u64,
    rejected: BTreeMap<String, u64>,
}

/// The bar, and what the default admission drops.
///
/// # Errors
/// A node cannot be started, or a call fails altogether.
pub async fn run(options: &Options) -> Result<Vec<Bar>> {
    let ram = options.working_set_bytes * 2;
    let spinner = options.spinner("overcommit");
    let settings = |admission: &str| {
        [
            ("ram_bytes", format!("{}MiB", ram >> 20)),
            (
                "nvme_bytes",
                format!("{}MiB", (ram * OVER * 3 / 2 + (512 << 20)) >> 20),
            ),
            ("nvme_admission", admission.to_owned()),
            ("nvme_wear_bytes_per_day", "0".to_owned()),
            ("max_block_bytes", "4MiB".to_owned()),
            ("nvme_queue_bytes", "8MiB".to_owned()),
        ]
    };
    spinner.set_message(format!(
        "putting {} into {} of RAM, ack stored",
        size(ram * OVER),
        size(ram)
    ));
    let node = Node::start(
        options.cores,
        &options.dir.join("overcommit"),
        &settings("open"),
    )
    .await?;
    let client = node.client(false, options.connections).await?;
    let namespace = node::namespace(&client).await?;
    let account = write(&client, &namespace, ram * OVER / BLOCK_BYTES, Ack::Stored).await?;
    spinner.set_message(format!(
        "reading {} stored blocks back",
        account.stored.len()
    ));
    let (mut lost, mut wrong) = (BTreeMap::<String, u64>::new(), 0u64);
    let mut buffer = vec![0; BLOCK_BYTES as usize];
    for &index in &account.stored {
        let chain = Chain::from_root(vec![node::name(&namespace, BLOCK_BYTES, index)]);
        let got = client
            .get_into(&namespace, &chain, None, &mut [&mut buffer])
            .await?;
        let got = got.first().context("an empty answer")?;
        if !got.is_hit() {
            *lost.entry(format!("{:?}", got.outcome)).or_default() += 1;
        } else if buffer != payload(BLOCK_BYTES as usize, index) {
            wrong += 1;
        }
    }
    drop(node);
    let stored = account.stored.len() as u64;
    let right = stored - wrong - lost.values().sum::<u64>();
    let mut note = format!(
        "{right} of {stored} stored blocks readable and right; {wrong} wrong, lost {}",
        list(&lost)
    );
    note.push_str(&format!(
        "; {} given up; rejections answered {}",
        account.given_up,
        list(&account.rejected)
    ));
    let share = (stored > 0).then(|| right as f64 / stored as f64);
    let bar = Bar::fact(
        "stored and readable and right, RAM over-committed 4 × onto NVMe",
        Bound::AtLeast(1.0),
        share,
        note,
    );

    spinner.set_message("the same under the default admission, ack cached");
    let node = Node::start(
        options.cores,
        &options.dir.join("overcommit-default"),
        &settings("reuse"),
    )
    .await?;
    let client = node.client(false, options.connections).await?;
    let namespace = node::namespace(&client).await?;
    let offered = ram * OVER / BLOCK_BYTES;
    let account = write(&client, &namespace, offered, Ack::Cached).await?;
    let stats = client.stats().await?;
    let reasons: Vec<_> = stats
        .counters
        .iter()
        .filter(|c| c.value > 0.0 && DROPS.iter().any(|d| c.name.starts_with(d)))
        .collect();
    let dropped: f64 = reasons
        .iter()
        .filter(|c| c.name.starts_with(DROPS[0]))
        .map(|c| c.value)
        .sum();
    let held: u64 = stats.tiers.iter().map(|t| t.blocks).max().unwrap_or(0);
    spinner.finish_and_clear();
    let by_reason: Vec<_> = reasons
        .iter()
        .map(|c| format!("{} {}", c.name, c.value))
        .collect();
    let kept = account.stored.len() as u64;
    // What was accepted and is in no tier any more must appear as dropped, with a reason.
    let explained = (kept > held).then(|| dropped / (kept - held) as f64);
    let note = format!(
        "{kept} accepted, {held} held; {}",
        if by_reason.is_empty() {
            "no reason given".into()
        } else {
            by_reason.join(", ")
        }
    );
    let default = Bar::fact(
        "drops reported by reason, default admission",
        Bound::AtLeast(1.0),
        explained,
        note,
    );
    Ok(vec![bar, default])
}

/// Counters of what leaves: every removal first, then what the mover and the tiers let go.
const DROPS: [&str; 3] = [
    "terrace_removed_blocks_total",
    "terrace_mover_dropped_blocks_total",
    "terrace_tier_dropped_blocks",
];

async fn write(
    client: &Client,
    namespace: &NamespaceHandle,
    count: u64,
    ack: Ack,
) -> Result<Account> {
    let next = Arc::new(AtomicU64::new(0));
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let (client, namespace, next) = (client.clone(), namespace.clone(), next.clone());
        writers.spawn(async move {
            let mut account = Account::default();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    return anyhow::Ok(account);
                }
                write_one(&client, &namespace, index, ack, &mut account).await?;
            }
        });
    }
    let mut all = Account::default();
    while let Some(account) = writers.join_next().await {
        let account = account??;
        all.stored.extend(account.stored);
        all.given_up += account.given_up;
        for (reason, count) in account.rejected {
            *all.rejected.entry(reason).or_default() += count;
        }
    }
    Ok(all)
}

async fn write_one(
    client: &Client,
    namespace: &NamespaceHandle,
    index: u64,
    ack: Ack,
    account: &mut Account,
) -> Result<()> {
    let chain = Chain::from_root(vec![node::name(namespace, BLOCK_BYTES, index)]);
    let value = Bytes::from(payload(BLOCK_BYTES as usize, index));
    for _ in 0..TRIES {
        let block = [PutBlock::new(0, value.clone())];
        let results = client
            .put(
                namespace,
                &chain,
                &block,
                PutOptions {
                    ack,
                    ..PutOptions::default()
                },
            )
            .await?;
        let result = results.first().context("an empty answer")?;
        if result.is_kept() {
            account.stored.push(index);
            return Ok(());
        }
        anyhow::ensure!(
            result.outcome == PutOutcome::Rejected,
            "block {index}: {result:?}"
        );
        let reason = result
            .reason
            .map_or_else(|| "without a reason".into(), |r| r.as_str().to_owned());
        *account.rejected.entry(reason).or_default() += 1;
        pause(Duration::from_millis(u64::from(
            result.retry_after_ms.clamp(1, 1000),
        )))
        .await;
    }
    account.given_up += 1;
    Ok(())
}

fn list(counts: &BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "none".into();
    }
    counts
        .iter()
        .map(|(what, count)| format!("{what} {count}"))
        .collect::<Vec<_>>()
        .join(", ")
}
