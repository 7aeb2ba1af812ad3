//! What the disk tiers keep, and what they say when they cannot: conformance, reclaim, limits, damage,
//! slow disks, wear.

mod conforms;
mod damage;
mod durable_store;
mod limits;
mod reclaim;
mod slow_disk;
mod together;

use std::{fs, os::unix::fs::FileExt, path::Path, sync::Arc};

use kvproto::Reason;
use kvserver::{
    clock::{Clock, SystemClock},
    tier::{
        BlockRef, DurableConfig, DurableTier, KeepNothing, NvmeConfig, NvmeTier, Tier, WriteOutcome,
    },
};

const KIB: usize = 1 << 10;
const MIB: u64 = 1 << 20;

fn clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock::new())
}

async fn nvme(config: NvmeConfig) -> NvmeTier {
    NvmeTier::open(config, clock(), Arc::new(KeepNothing))
        .await
        .expect("it opens")
}

async fn durable(config: DurableConfig) -> DurableTier {
    DurableTier::open(config, clock()).await.expect("it opens")
}

/// Writes until every block was either held or refused for good, as a patient caller does.
async fn write_patiently(tier: &dyn Tier, blocks: &[BlockRef]) -> Vec<WriteOutcome> {
    let mut outcomes = vec![None; blocks.len()];
    for _ in 0..1000 {
        let open: Vec<usize> = (0..blocks.len())
            .filter(|&at| outcomes[at].is_none())
            .collect();
        if open.is_empty() {
            break;
        }
        let answers = tier
            .write(open.iter().map(|&at| blocks[at].clone()).collect())
            .await;
        for (&at, answer) in open.iter().zip(answers) {
            let full = matches!(
                answer,
                WriteOutcome::Rejected {
                    reason: Reason::QueueFull,
                    ..
                }
            );
            outcomes[at] = (!full).then_some(answer);
        }
    }
    outcomes
        .into_iter()
        .map(|outcome| outcome.expect("a queue drains"))
        .collect()
}

/// Flips one bit of a file.
fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("an extent");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("flipped");
    file.sync_all().expect("synced");
}
