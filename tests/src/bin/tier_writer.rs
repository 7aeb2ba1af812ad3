//! A process that uses a disk tier until it is killed, and says what it was told.
//!
//! ```text
//! tier_writer nvme|durable FOLDER FIRST CAPACITY   one line per event, after the tier's answer:
//!     open BLOCKS DROPPED
//!     stored N VERSION     removing N     removed N
//! tier_writer full FOLDER                 meets a disk that takes no more bytes, and one that does again
//! ```
//!
//! The parent reads the lines, kills it in the middle and opens the folder itself.

use std::{
    io::{self, Write},
    path::Path,
    sync::Arc,
    time::Duration,
};

use kvproto::Reason;
use kvserver::{
    clock::{Clock, SystemClock},
    tier::{
        BlockRef, DurableConfig, DurableTier, KeepNothing, NvmeConfig, NvmeTier, Tier,
        WriteOutcome,
        conformance::{block, block_in, has, namespace},
    },
};
use kvtests::writer::{CAPACITY_BYTES, LENGTH_BYTES};
use rustix::process::{Resource, getrlimit, setrlimit};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["nvme", dir, first, capacity_bytes] => {
            let tier = open_nvme(Path::new(dir), capacity_bytes.parse()?).await?;
            let found = tier.recovered();
            say(&format!("open {} {}", found.blocks, found.dropped))?;
            write_until_killed(&tier, first.parse()?).await
        }
        ["durable", dir, first, _] => {
            let config = DurableConfig::new(dir, CAPACITY_BYTES);
            let tier = DurableTier::open(config, Arc::new(SystemClock::new())).await?;
            say(&format!("open {} 0", tier.residents().len()))?;
            write_until_killed(&tier, first.parse()?).await
        }
        ["full", dir] => meet_a_full_disk(Path::new(dir)).await,
        _ => anyhow::bail!("usage: tier_writer nvme|durable FOLDER FIRST CAPACITY | full FOLDER"),
    }
}

async fn open_nvme(dir: &Path, capacity_bytes: u64) -> anyhow::Result<NvmeTier> {
    let mut config = NvmeConfig::new(dir, capacity_bytes);
    config.cooldown_ms = 20;
    Ok(NvmeTier::open(config, Arc::new(SystemClock::new()), Arc::new(KeepNothing)).await?)
}

/// A line, at once: what is only in a buffer dies with the process.
fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes())?;
    out.flush()
}

/// Rounds of: write eight; remove one of them while it is being written and one that was stored before;
/// put one back that was removed.
async fn write_until_killed(tier: &dyn Tier, first: u32) -> anyhow::Result<()> {
    for round in 0.. {
        let base = first + round * 8;
        let blocks: Vec<BlockRef> = (0..8).map(|n| block(base + n, LENGTH_BYTES)).collect();
        let writing = tier.write(blocks.clone());
        let overtaken = base + 3;
        say(&format!("removing {overtaken}"))?;
        let removing = tier.remove(&[*blocks[3].key()]);
        let (outcomes, removed) = futures_util::future::join(writing, removing).await;
        removed?;
        for (n, outcome) in outcomes.into_iter().enumerate() {
            if outcome.is_held() && n != 3 {
                say(&format!("stored {} 0", base + n as u32))?;
            }
        }
        // It may have been removed before it was written, so remove it once more, then it is gone.
        tier.remove(&[*blocks[3].key()]).await?;
        say(&format!("removed {overtaken}"))?;

        say(&format!("removing {}", base + 5))?;
        tier.remove(&[*blocks[5].key()]).await?;
        say(&format!("removed {}", base + 5))?;
        say(&format!("removing {}", base + 6))?;
        tier.remove(&[*blocks[6].key()]).await?;
        let again = block_in(namespace(1), base + 6, 1, LENGTH_BYTES);
        if tier.write(vec![again]).await[0].is_held() {
            say(&format!("stored {} 1", base + 6))?;
        }
    }
    Ok(())
}

/// `RLIMIT_FSIZE` makes every write of this process beyond a few bytes of a file fail with `EFBIG`: foyer's,
/// the journal's and the probe's, as a full or failing disk does.
async fn meet_a_full_disk(dir: &Path) -> anyhow::Result<()> {
    // Otherwise the kernel kills the process for exceeding the limit.
    let mut ignored = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::from_raw(25))?;
    tokio::spawn(async move { while ignored.recv().await.is_some() {} });
    let clock = SystemClock::new();
    let nvme = open_nvme(&dir.join("nvme"), CAPACITY_BYTES).await?;
    let durable = DurableConfig {
        cooldown_ms: 20,
        ..DurableConfig::new(dir.join("durable"), CAPACITY_BYTES)
    };
    let durable = DurableTier::open(durable, Arc::new(SystemClock::new())).await?;
    for tier in [&nvme as &dyn Tier, &durable] {
        let kept: Vec<BlockRef> = (0..4).map(|n| block(n, LENGTH_BYTES)).collect();
        anyhow::ensure!(
            tier.write(kept.clone())
                .await
                .iter()
                .all(|outcome| outcome.is_held())
        );

        let limit = getrlimit(Resource::Fsize);
        setrlimit(
            Resource::Fsize,
            rustix::process::Rlimit {
                current: Some(100),
                ..limit
            },
        )?;
        let refused = tier
            .write(vec![block(10, LENGTH_BYTES), block(11, LENGTH_BYTES)])
            .await;
        anyhow::ensure!(
            refused.iter().all(|outcome| matches!(
                outcome,
                WriteOutcome::Rejected {
                    reason: Reason::Device,
                    ..
                }
            )),
            "a failing disk stores nothing: {refused:?}"
        );
        let status = tier.status();
        anyhow::ensure!(
            !status.in_service && !status.note.is_empty(),
            "it says so: {status:?}"
        );
        for block in &kept {
            anyhow::ensure!(has(tier, block).await, "what was stored is still read");
        }
        anyhow::ensure!(!has(tier, &block(10, LENGTH_BYTES)).await);
        match tier.write(vec![block(12, LENGTH_BYTES)]).await[0] {
            WriteOutcome::Rejected {
                reason: Reason::TierDown | Reason::Device,
                retry_after_ms,
            } => {
                anyhow::ensure!(retry_after_ms > 0, "and says when to come again");
            }
            other => anyhow::bail!("{other:?}"),
        }
        let removed = tier.remove(&[*kept[0].key()]).await;
        anyhow::ensure!(!has(tier, &kept[0]).await, "removed is gone at once");
        say(&format!("removal while full: {removed:?}"))?;

        setrlimit(Resource::Fsize, limit)?;
        let mut tries = 0;
        while !tier.write(vec![block(13, LENGTH_BYTES)]).await[0].is_held() {
            tries += 1;
            anyhow::ensure!(tries < 500, "it comes back: {:?}", tier.status());
            clock.sleep(Duration::from_millis(20)).await;
        }
        anyhow::ensure!(tier.status().in_service, "{:?}", tier.status());
        for block in &kept[1..] {
            anyhow::ensure!(has(tier, block).await, "what was stored before is there");
        }
        anyhow::ensure!(has(tier, &block(13, LENGTH_BYTES)).await);
        anyhow::ensure!(!has(tier, &kept[0]).await, "removed stays gone");
        tier.close().await;
    }
    // And after a restart: nothing wrong, nothing that was removed.
    drop(nvme);
    let nvme = open_nvme(&dir.join("nvme"), CAPACITY_BYTES).await?;
    for (number, expected) in [
        (0, false),
        (1, true),
        (2, true),
        (3, true),
        (10, false),
        (13, true),
    ] {
        let there = has(&nvme, &block(number, LENGTH_BYTES)).await;
        anyhow::ensure!(there == expected, "block {number} after a restart: {there}");
    }
    say("ok")?;
    Ok(())
}
