//! The order of reads, and what becomes of those that nobody waits for.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use kvgpu::{Arena, ArenaConfig, HugePages, SlotMut};
use kvproto::{BlockKey, Chain, Kind, LeaseId, OwnerId, Reason, TierKind};
use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, oneshot},
};

use super::{Mover, ReadLimits, Reading, Urgency};
use crate::{
    blocks::Tiers,
    clock::ManualClock,
    data_dir::DataDir,
    engine::{
        Below, Engine, EngineConfig, LeaseAsk, LookupQuery, Owner, Target, TenantId, Whereabouts,
        policy,
    },
    telemetry::Metrics,
    tier::{
        BlockRef, BoxFuture, Durability, MutableBlock, Read, Resident, Tier, TierStatus,
        WriteOutcome, conformance::block,
    },
};

const BYTES: usize = 4096;
const OWNER: Owner = Owner {
    tenant: TenantId(0),
    id: OwnerId([1; 16]),
};

/// A tier whose reads, and writes if it is told to, end one by one, when the test says so.
struct Gated {
    blocks: HashMap<BlockKey, BlockRef>,
    began: Mutex<Vec<BlockKey>>,
    go: Arc<Semaphore>,
    /// What each write that has begun is going to be answered.
    writes: Mutex<Vec<oneshot::Sender<WriteOutcome>>>,
    holds_writes: AtomicBool,
    removals: AtomicUsize,
    fails: Mutex<bool>,
}

impl Tier for Gated {
    fn kind(&self) -> TierKind {
        TierKind::Nvme
    }

    fn durability(&self) -> Durability {
        Durability::Droppable
    }

    fn write(&self, blocks: Vec<BlockRef>) -> BoxFuture<'static, Vec<WriteOutcome>> {
        if !self.holds_writes.load(Ordering::Relaxed) {
            return Box::pin(async move { vec![WriteOutcome::Stored; blocks.len()] });
        }
        let (answer, outcome) = oneshot::channel();
        self.writes.lock().push(answer);
        Box::pin(async move {
            let outcome = outcome.await.expect("the test answers every write");
            vec![outcome; blocks.len()]
        })
    }

    fn read(&self, resident: Resident, into: SlotMut) -> BoxFuture<'static, Read> {
        self.began.lock().push(resident.key);
        let (go, held) = (Arc::clone(&self.go), self.blocks[&resident.key].clone());
        Box::pin(async move {
            go.acquire().await.expect("an open gate").forget();
            let header = held.header().clone();
            let mut block = MutableBlock::new(header.key, header.place, BYTES as u64, into);
            block.bytes_mut().copy_from_slice(held.bytes());
            Read::Hit(block.seal(header).expect("the bytes of the header"))
        })
    }

    fn remove(&self, _: &[BlockKey]) -> BoxFuture<'static, io::Result<()>> {
        self.removals.fetch_add(1, Ordering::Relaxed);
        let fails = *self.fails.lock();
        Box::pin(async move {
            match fails {
                true => Err(io::Error::other("no")),
                false => Ok(()),
            }
        })
    }

    fn residents(&self) -> Vec<Resident> {
        self.blocks.values().map(Resident::of).collect()
    }

    fn status(&self) -> TierStatus {
        TierStatus {
            capacity_bytes: 1 << 30,
            used_bytes: 0,
            blocks: 0,
            in_service: true,
            note: String::new(),
            queued_bytes: 0,
            written_bytes_today: 0,
            drops: Vec::new(),
        }
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        Box::pin(async {})
    }
}

struct World {
    engine: Arc<Engine>,
    mover: Arc<Mover>,
    tier: Arc<Gated>,
    keys: Vec<BlockKey>,
    clock: ManualClock,
    _dir: tempfile::TempDir,
}

/// So many blocks below RAM, one read at a time, two gets without a lease in the queue.
fn world(blocks: u32) -> World {
    world_with(blocks, 1 << 20, |_| {})
}

fn world_with(blocks: u32, ram_bytes: u64, change: impl FnOnce(&mut EngineConfig)) -> World {
    let held: Vec<BlockRef> = (0..blocks).map(|n| block(n, BYTES)).collect();
    let keys: Vec<BlockKey> = held.iter().map(|block| *block.key()).collect();
    let tier = Arc::new(Gated {
        blocks: held
            .into_iter()
            .map(|block| (*block.key(), block))
            .collect(),
        began: Mutex::default(),
        go: Arc::new(Semaphore::new(0)),
        writes: Mutex::default(),
        holds_writes: AtomicBool::new(false),
        removals: AtomicUsize::new(0),
        fails: Mutex::new(false),
    });
    let arena = Arena::new(ArenaConfig {
        capacity_bytes: ram_bytes,
        segment_bytes: ram_bytes,
        huge_pages: HugePages::Off,
        prefault: false,
        boot_id: 1,
    })
    .unwrap();
    let clock = ManualClock::new(1);
    let mut config = EngineConfig::for_capacity(ram_bytes);
    change(&mut config);
    let policy = policy::by_name("best").unwrap();
    let engine = Engine::new(config, arena, policy, Arc::new(clock.clone())).unwrap();
    engine.recover(TierKind::Nvme, tier.residents(), Kind::Kv);
    let dir = tempfile::tempdir().unwrap();
    let mover = Mover::start(
        Arc::clone(&engine),
        Tiers {
            nvme: Some(Arc::<Gated>::clone(&tier)),
            ..Tiers::default()
        },
        Arc::new(clock.clone()),
        Metrics::new(),
        Handle::current(),
        ReadLimits {
            reads: 1,
            waiting: 2,
        },
        DataDir::open(dir.path()).unwrap(),
    );
    World {
        engine,
        mover,
        tier,
        keys,
        clock,
        _dir: dir,
    }
}

impl World {
    fn below(&self, n: usize) -> Below {
        match self.engine.locate(&self.keys[n], None) {
            Whereabouts::Below(below) => below,
            other => panic!("{other:?}"),
        }
    }

    fn get(&self, n: usize, urgency: Urgency) -> Reading {
        self.mover.read(self.below(n), urgency)
    }

    /// Leases one block and starts to bring it up, as a lookup does.
    fn look_up(&self, n: usize) -> LeaseId {
        let chain = Chain::from_root(vec![self.keys[n].hash]);
        let answer = self.engine.lookup(LookupQuery {
            namespace: self.keys[n].namespace,
            chain: &chain,
            parts: &[self.keys[n].part],
            lease: Some(LeaseAsk {
                owner: OWNER,
                ttl_ms: 1000,
                idempotency: None,
                id: None,
            }),
        });
        self.mover.prefetch(answer.promote);
        answer.lease.unwrap().id
    }

    /// Starts to write one block, as a put with ack `stored` does, or a demotion.
    fn write(&self, n: usize) -> oneshot::Receiver<WriteOutcome> {
        self.tier.holds_writes.store(true, Ordering::Relaxed);
        let block = self.tier.blocks[&self.keys[n]].clone();
        self.mover.write(TierKind::Nvme, block)
    }

    /// Waits until so many writes have begun and everybody who could join them has; answers the last.
    async fn answer_write(&self, writes: usize, outcome: WriteOutcome) {
        while self.tier.writes.lock().len() < writes {
            tokio::task::yield_now().await;
        }
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
        let mut begun = self.tier.writes.lock();
        assert_eq!(begun.len(), writes, "nobody writes it a second time");
        let (gone, _) = oneshot::channel();
        let answer = std::mem::replace(&mut begun[writes - 1], gone);
        answer.send(outcome).expect("the write waits");
    }

    /// Waits until so many reads have begun; which they were.
    async fn began(&self, reads: usize) -> Vec<BlockKey> {
        while self.tier.began.lock().len() < reads {
            tokio::task::yield_now().await;
        }
        self.tier.began.lock().clone()
    }
}

#[tokio::test]
async fn a_get_that_joins_a_prefetch_goes_before_all_other_prefetches() {
    let world = world(8);
    (0..8).for_each(|n| {
        world.look_up(n);
    });
    world.began(1).await;
    let last = world.get(7, Urgency::Leased);
    world.tier.go.add_permits(2);
    let block = last.await.unwrap();
    assert_eq!(block.key(), &world.keys[7]);
    assert_eq!(world.began(2).await[1], world.keys[7]);
}

#[tokio::test]
async fn reads_that_gets_wait_for_are_bounded_and_those_nobody_waits_for_are_dropped() {
    let world = world(8);
    let running = world.get(0, Urgency::Asked);
    let first = world.get(1, Urgency::Asked);
    let second = world.get(2, Urgency::Asked);
    let refused = world.get(3, Urgency::Asked).await;
    assert_eq!(refused.unwrap_err(), Reason::Overloaded);
    let leased = world.get(4, Urgency::Leased);
    assert_eq!(
        world.mover.reads.lock().queued(),
        3,
        "a lease is not refused"
    );
    // A stream that was reset takes its place in the queue with it; one of two who wait does not.
    let also_second = world.get(2, Urgency::Asked);
    drop((first, second, leased));
    assert_eq!(world.mover.reads.lock().queued(), 1);
    world.tier.go.add_permits(8);
    running.await.unwrap();
    also_second.await.unwrap();
    assert_eq!(world.began(2).await, [world.keys[0], world.keys[2]]);
}

#[tokio::test]
async fn a_prefetch_that_a_get_left_is_one_again_and_without_its_lease_it_is_none() {
    let world = world(4);
    let running = world.get(0, Urgency::Asked);
    world.look_up(1);
    let lease = world.look_up(2);
    drop(world.get(1, Urgency::Asked));
    assert_eq!(world.mover.reads.lock().queued(), 2);
    assert!(world.engine.release(lease, OWNER));
    world.tier.go.add_permits(8);
    running.await.unwrap();
    while world.mover.reads.lock().queued() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.began(2).await, [world.keys[0], world.keys[1]]);
}

#[tokio::test]
async fn a_prefetch_goes_on_while_anybody_leases_its_block() {
    let world = world(4);
    let running = world.get(0, Urgency::Asked);
    let (one, another) = (world.look_up(2), world.look_up(2));
    world.look_up(3);
    assert!(world.engine.release(one, OWNER));
    world.tier.go.add_permits(8);
    running.await.unwrap();
    let wanted = [world.keys[0], world.keys[2], world.keys[3]];
    assert_eq!(world.began(3).await, wanted);
    assert!(world.engine.release(another, OWNER));
}

#[tokio::test]
async fn leased_reads_beyond_the_overflow_wait_for_readers_to_let_go() {
    let page = BYTES as u64;
    let world = world_with(3, 4 * page, |config| {
        config.overflow_bytes = page;
        config.lease_bytes_total = 2 * page;
        config.kv.ceiling_bytes = page;
    });
    // The one page that blocks may have is in the hands of a reader.
    world.tier.go.add_permits(8);
    let in_ram = world.get(0, Urgency::Asked).await.unwrap();
    let outside = world.get(1, Urgency::Leased).await.unwrap();
    assert!(in_ram.location().is_some() && outside.location().is_none());
    assert_eq!(world.engine.stats().overflow_bytes, page);
    let mut waits = world.get(2, Urgency::Leased);
    while world.clock.sleepers() < 3 {
        // The sweep, the demotion, and this read.
        assert!(futures_util::poll!(&mut waits).is_pending());
        tokio::task::yield_now().await;
    }
    assert_eq!(world.engine.stats().overflow_bytes, page);
    drop(outside);
    world.clock.advance(super::BUSY_PAUSE);
    assert!(waits.await.unwrap().location().is_none());
    assert_eq!(world.engine.stats().overflow_bytes, 0);
}

#[tokio::test]
async fn a_write_that_meets_one_of_the_same_block_gets_its_outcome() {
    let refused = WriteOutcome::Rejected {
        reason: Reason::Device,
        retry_after_ms: 7,
    };
    for outcome in [WriteOutcome::Stored, refused] {
        let world = world(1);
        let (first, second) = (world.write(0), world.write(0));
        world.answer_write(1, outcome).await;
        assert_eq!(
            (first.await.unwrap(), second.await.unwrap()),
            (outcome, outcome)
        );
        assert!(!world.mover.is_writing(TierKind::Nvme, &world.keys[0]));
    }
}

#[tokio::test]
async fn a_block_put_again_is_not_told_that_the_write_before_it_was_invalidated() {
    let world = world(1);
    let before = world.write(0);
    while world.tier.writes.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    let BlockKey {
        namespace, hash, ..
    } = world.keys[0];
    world.engine.invalidate(namespace, Target::Block(hash));
    let again = world.tier.residents();
    world.engine.recover(TierKind::Nvme, again, Kind::Kv);
    let after = world.write(0);
    world.answer_write(1, WriteOutcome::Stored).await;
    let invalidated = WriteOutcome::Rejected {
        reason: Reason::Invalidated,
        retry_after_ms: 0,
    };
    assert_eq!(before.await.unwrap(), invalidated);
    world.answer_write(2, WriteOutcome::Stored).await;
    assert_eq!(after.await.unwrap(), WriteOutcome::Stored);
}
