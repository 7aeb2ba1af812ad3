//! Demotion: what would be lost soonest goes down by itself, for as long as the node runs.
//!
//! It waits while anybody is being read to, a bounded time; what a tier will not take is remembered, so that it
//! does not stand in the way of others. Units: bytes.

use std::{collections::HashSet, sync::Arc, time::Duration};

use kvproto::BlockKey;

use super::{BUSY_PAUSE, DEMOTE_BATCH_BYTES, Mover};
use crate::tier::{BlockRef, Tier, WriteOutcome};

/// Pause between two looks for blocks to demote while there is work …
const DEMOTE_PAUSE: Duration = Duration::from_millis(20);

/// … and when there was none: lookups make blocks worth keeping without telling anybody.
const DEMOTE_IDLE: Duration = Duration::from_millis(250);

/// How long demotion waits for reads at most, so that it is slowed by them and never stopped.
const READS_FIRST: Duration = Duration::from_millis(50);

/// Shortest pause after a tier refused everything.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// Blocks a tier refused that are remembered, so that they do not stand in the way of others.
const REFUSED_BLOCKS: usize = 4096;

impl Mover {
    /// Sends down what would be lost soonest, for as long as the node runs.
    pub(super) async fn demote(self: Arc<Self>, nvme: Arc<dyn Tier>) {
        let mut refused = Refused::default();
        loop {
            let pause = match self.demote_once(&nvme, &mut refused).await {
                Demoted::All => DEMOTE_PAUSE,
                Demoted::Nothing => {
                    tokio::select! {
                        () = self.stopping.cancelled() => return,
                        () = self.work.notified() => {}
                        () = self.clock.sleep(DEMOTE_IDLE) => {}
                    }
                    DEMOTE_PAUSE
                }
                Demoted::Refused(retry_after) => retry_after.max(REFUSED_PAUSE),
            };
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.clock.sleep(pause) => {}
            }
        }
    }

    async fn demote_once(self: &Arc<Self>, nvme: &Arc<dyn Tier>, refused: &mut Refused) -> Demoted {
        self.let_reads_go_first().await;
        let mut blocks = self.engine.demotable(DEMOTE_BATCH_BYTES + refused.bytes);
        let mut bytes = 0;
        blocks.retain(|block| {
            let is_first = bytes == 0;
            if refused.keys.contains(block.key()) {
                return false;
            }
            bytes += block.len_bytes();
            is_first || bytes <= DEMOTE_BATCH_BYTES
        });
        if blocks.is_empty() {
            refused.forget();
            return Demoted::Nothing;
        }
        let outcomes = self.write_down(nvme, blocks.clone()).await;
        let mut retry_after = None;
        let mut held = false;
        for (block, outcome) in blocks.iter().zip(outcomes) {
            match outcome {
                WriteOutcome::Stored | WriteOutcome::Synced => held = true,
                // Trying again will not help: it must not stand in the way of the others.
                WriteOutcome::Rejected {
                    retry_after_ms: 0, ..
                } => refused.remember(block),
                WriteOutcome::Rejected { retry_after_ms, .. } => {
                    retry_after =
                        retry_after.max(Some(Duration::from_millis(retry_after_ms.into())));
                }
            }
        }
        match retry_after {
            Some(retry_after) if !held => Demoted::Refused(retry_after),
            _ => Demoted::All,
        }
    }

    async fn let_reads_go_first(&self) {
        let mut waited = Duration::ZERO;
        while self.reads.lock().awaited() > 0 && waited < READS_FIRST {
            self.clock.sleep(BUSY_PAUSE).await;
            waited += BUSY_PAUSE;
        }
    }
}

/// How a batch of demotions went.
enum Demoted {
    All,
    Nothing,
    Refused(Duration),
}

/// Blocks that a tier will not take.
#[derive(Default)]
struct Refused {
    keys: HashSet<BlockKey>,
    bytes: u64,
}

impl Refused {
    fn remember(&mut self, block: &BlockRef) {
        if self.keys.len() >= REFUSED_BLOCKS {
            self.forget();
        }
        if self.keys.insert(*block.key()) {
            self.bytes += block.len_bytes();
        }
    }

    fn forget(&mut self) {
        *self = Self::default();
    }
}
