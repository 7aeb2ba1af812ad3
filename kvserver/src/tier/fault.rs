//! A tier that misbehaves on demand, around any other: how the node is tested against bad disks.
//!
//! ```text
//!   mover, engine ──► FaultyTier ──► any Tier
//!                       │ Fail(reason)  answers it and does nothing
//!                       │ Lag(time)     does it, that much later, by the clock
//!                       │ Hang          never answers
//!                       │ Lose          writes: answers as if it had; reads: forgets the block first
//!                       └ Corrupt       reads: the medium has a flipped bit; forgotten and counted
//! ```
//!
//! It keeps to the contract as far as a broken disk can: a wrong byte cannot be handed out through it,
//! because nobody can seal one; a flipped bit *is* `Gone(Corrupt)` here as it is below. Only `Lose` on a
//! write breaks the contract, on purpose: it is the tier that lies.

use std::{io, sync::Arc, time::Duration};

use kvgpu::SlotMut;
use kvproto::{BlockKey, Reason, TierKind};
use parking_lot::Mutex;

use super::{BlockRef, BoxFuture, Durability, Read, Resident, Tier, TierStatus, WriteOutcome};
use crate::clock::Clock;

/// What goes wrong with one kind of call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// It is refused for this reason.
    Fail(Reason),
    /// It is done, but later.
    Lag(Duration),
    /// It never answers.
    Hang,
    /// What was written is not there, whatever the answer said.
    Lose,
    /// What is read does not match its sums.
    Corrupt,
}

/// What goes wrong now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Of writes.
    pub writes: Fault,
    /// Of reads.
    pub reads: Fault,
    /// Of removals.
    pub removes: Fault,
}

/// See the [module docs](self).
pub struct FaultyTier {
    inner: Arc<dyn Tier>,
    clock: Arc<dyn Clock>,
    faults: Mutex<Faults>,
    corrupted: Mutex<u64>,
}

impl FaultyTier {
    /// A tier that behaves, so far.
    #[must_use]
    pub fn new(inner: Arc<dyn Tier>, clock: Arc<dyn Clock>) -> Self {
        Self {
            inner,
            clock,
            faults: Mutex::default(),
            corrupted: Mutex::default(),
        }
    }

    /// Changes what goes wrong from now on.
    pub fn set(&self, faults: Faults) {
        *self.faults.lock() = faults;
    }

    /// The tier behind.
    #[must_use]
    pub fn inner(&self) -> &Arc<dyn Tier> {
        &self.inner
    }

    fn lag<T: Send + 'static>(
        &self,
        fault: Fault,
        work: BoxFuture<'static, T>,
    ) -> BoxFuture<'static, T> {
        match fault {
            Fault::Lag(time) => {
                let clock = Arc::clone(&self.clock);
                Box::pin(async move {
                    clock.sleep(time).await;
                    work.await
                })
            }
            Fault::Hang => Box::pin(std::future::pending()),
            _ => work,
        }
    }
}

impl std::fmt::Debug for FaultyTier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultyTier")
            .field("faults", &*self.faults.lock())
            .finish_non_exhaustive()
    }
}

impl Tier for FaultyTier {
    fn kind(&self) -> TierKind {
        self.inner.kind()
    }

    fn durability(&self) -> Durability {
        self.inner.durability()
    }

    fn write(&self, blocks: Vec<BlockRef>) -> BoxFuture<'static, Vec<WriteOutcome>> {
        let fault = self.faults.lock().writes;
        match fault {
            Fault::Fail(reason) => {
                let refused = WriteOutcome::Rejected {
                    reason,
                    retry_after_ms: 1,
                };
                let outcomes = vec![refused; blocks.len()];
                Box::pin(async move { outcomes })
            }
            Fault::Lose | Fault::Corrupt => {
                let claimed = match self.inner.durability() {
                    Durability::Droppable => WriteOutcome::Stored,
                    Durability::Durable => WriteOutcome::Synced,
                };
                let outcomes = vec![claimed; blocks.len()];
                Box::pin(async move { outcomes })
            }
            _ => self.lag(fault, self.inner.write(blocks)),
        }
    }

    fn read(&self, resident: Resident, into: SlotMut) -> BoxFuture<'static, Read> {
        let fault = self.faults.lock().reads;
        let forget = |reason| {
            let removed = self.inner.remove(&[resident.key]);
            let gone: BoxFuture<'static, Read> = Box::pin(async move {
                let _ = removed.await;
                Read::Gone(reason)
            });
            gone
        };
        match fault {
            Fault::Fail(reason) => Box::pin(async move { Read::Gone(reason) }),
            Fault::Lose => forget(Reason::Evicted),
            Fault::Corrupt => {
                *self.corrupted.lock() += 1;
                forget(Reason::Corrupt)
            }
            _ => self.lag(fault, self.inner.read(resident, into)),
        }
    }

    fn remove(&self, keys: &[BlockKey]) -> BoxFuture<'static, io::Result<()>> {
        let fault = self.faults.lock().removes;
        match fault {
            Fault::Fail(reason) => Box::pin(async move { Err(io::Error::other(reason.as_str())) }),
            _ => self.lag(fault, self.inner.remove(keys)),
        }
    }

    fn first_to_go(&self, keys: &[BlockKey]) {
        self.inner.first_to_go(keys);
    }

    fn going(&self) -> Vec<Resident> {
        self.inner.going()
    }

    fn stays(&self, keys: &[BlockKey]) {
        self.inner.stays(keys);
    }

    fn residents(&self) -> Vec<Resident> {
        self.inner.residents()
    }

    fn status(&self) -> TierStatus {
        let mut status = self.inner.status();
        let faults = *self.faults.lock();
        if matches!(faults.writes, Fault::Fail(_)) {
            status.in_service = false;
            "writes fail on demand".clone_into(&mut status.note);
        }
        let corrupted = *self.corrupted.lock();
        if corrupted > 0 {
            match status
                .drops
                .iter_mut()
                .find(|(reason, _)| *reason == Reason::Corrupt)
            {
                Some((_, count)) => *count += corrupted,
                None => status.drops.push((Reason::Corrupt, corrupted)),
            }
        }
        status
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.inner.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::{ManualClock, SystemClock},
        tier::{
            DurableConfig, DurableTier,
            conformance::{self, block, conformance, has},
        },
    };

    async fn durable(dir: &std::path::Path) -> Arc<dyn Tier> {
        let config = DurableConfig::new(dir, 64 << 20);
        Arc::new(
            DurableTier::open(config, Arc::new(SystemClock::new()))
                .await
                .expect("it opens"),
        )
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn without_a_fault_it_conforms_like_what_it_wraps() {
        let dir = tempfile::tempdir().expect("a folder");
        conformance(|| async {
            let clock = Arc::new(SystemClock::new());
            Arc::new(FaultyTier::new(durable(dir.path()).await, clock)) as Arc<dyn Tier>
        })
        .await;
    }

    #[tokio::test]
    async fn every_fault_is_an_answer_or_a_delay() {
        let dir = tempfile::tempdir().expect("a folder");
        let clock = ManualClock::new(1);
        let tier = FaultyTier::new(durable(dir.path()).await, Arc::new(clock.clone()));
        let blocks = [block(1, 5000), block(2, 5000)];
        assert!(
            tier.write(blocks.to_vec())
                .await
                .iter()
                .all(|outcome| outcome.is_held())
        );

        tier.set(Faults {
            writes: Fault::Fail(Reason::Device),
            ..Faults::default()
        });
        assert!(!tier.write(vec![block(3, 5000)]).await[0].is_held());
        assert!(!tier.status().in_service);

        tier.set(Faults {
            reads: Fault::Lag(Duration::from_secs(2)),
            ..Faults::default()
        });
        let mut slow = Box::pin(conformance::read(&tier, Resident::of(&blocks[0])));
        assert!(futures_util::poll!(&mut slow).is_pending());
        clock.advance(Duration::from_secs(2));
        assert!(matches!(slow.await, Read::Hit(_)));

        tier.set(Faults {
            reads: Fault::Corrupt,
            ..Faults::default()
        });
        let found = conformance::read(&tier, Resident::of(&blocks[0])).await;
        assert!(matches!(found, Read::Gone(Reason::Corrupt)));
        tier.set(Faults::default());
        assert!(
            !has(&tier, &blocks[0]).await,
            "a corrupt block is forgotten"
        );
        assert!(has(&tier, &blocks[1]).await, "its neighbour is not");

        tier.set(Faults {
            writes: Fault::Lose,
            ..Faults::default()
        });
        assert!(
            tier.write(vec![block(4, 5000)]).await[0].is_held(),
            "the lie"
        );
        assert!(!has(&tier, &block(4, 5000)).await);
    }
}
