//! The engine as a whole: leases, eviction, invalidation, budgets, against real slots and time by hand.

mod leases;
mod pressure;
mod promises;
mod removal;

use std::sync::Arc;

use kvgpu::{Arena, ArenaConfig, HugePages};
use kvproto::{
    BlockHeader, BlockKey, Chain, Kind, LeaseId, NamespaceId, OwnerId, Part, Reason, SequenceHash,
    TierKind,
};

use super::{
    Demotion, Engine, EngineConfig, Grant, LeaseAsk, LookupAnswer, LookupQuery, Owner, Published,
    Reserve, Target, TenantId, Whereabouts, policy::by_name,
};
use crate::{
    clock::ManualClock,
    tier::{Resident, SealedBlock},
};

const PAGE: u64 = 4096;
const RUN: u32 = 4;
const SPACE: NamespaceId = NamespaceId([1; 16]);

struct World {
    engine: Arc<Engine>,
    arena: Arc<Arena>,
    clock: ManualClock,
}

fn world_with(pages: u64, change: impl FnOnce(&mut EngineConfig)) -> World {
    let arena = Arena::new(ArenaConfig {
        capacity_bytes: pages * PAGE,
        segment_bytes: pages * PAGE,
        huge_pages: HugePages::Off,
        prefault: false,
        boot_id: 1,
    })
    .unwrap();
    let clock = ManualClock::new(3);
    let mut config = EngineConfig::for_capacity(pages * PAGE);
    config.checkpoint.ceiling_bytes = pages * PAGE;
    config.demotion = Demotion::Open;
    config.shards = 4;
    change(&mut config);
    let policy = by_name("best").unwrap();
    let engine = Engine::new(config, Arc::clone(&arena), policy, Arc::new(clock.clone())).unwrap();
    World {
        engine,
        arena,
        clock,
    }
}

fn world(pages: u64) -> World {
    world_with(pages, |_| {})
}

/// Chain `name` of so many blocks.
fn chain(name: u8, blocks: u8) -> Chain {
    let hash = |i| {
        let mut hash = [name; 32];
        hash[0] = i;
        hash[1] = i.wrapping_mul(37);
        SequenceHash(hash)
    };
    Chain::from_root((0..blocks).map(hash).collect())
}

fn key(chain: &Chain, i: usize) -> BlockKey {
    BlockKey {
        namespace: SPACE,
        hash: chain.hashes[i],
        part: Part::default(),
    }
}

fn owner(n: u8) -> Owner {
    Owner {
        tenant: TenantId(0),
        id: OwnerId([n; 16]),
    }
}

fn fill(grant: Grant) -> (SealedBlock, super::Ticket) {
    let Grant { mut block, ticket } = grant;
    let fill = block.key().hash.0[0] ^ block.key().hash.0[31];
    block.bytes_mut().fill(fill);
    let header = BlockHeader::describe(*block.key(), *block.place(), block.bytes());
    (block.seal(header).unwrap(), ticket)
}

impl World {
    fn reserve(&self, chain: &Chain, i: usize, bytes: u64, kind: Kind) -> Reserve {
        self.engine
            .reserve(key(chain, i), chain.place(i, RUN), bytes, kind)
    }

    fn grant(&self, chain: &Chain, i: usize) -> Grant {
        match self.reserve(chain, i, PAGE, Kind::Kv) {
            Reserve::Granted(grant) => grant,
            other => panic!("{other:?}"),
        }
    }

    /// Whether block `i` was newly written; `Err` when it was refused.
    fn put_as(&self, chain: &Chain, i: usize, bytes: u64, kind: Kind) -> Result<bool, Reason> {
        match self.reserve(chain, i, bytes, kind) {
            Reserve::Granted(grant) => {
                let (sealed, ticket) = fill(grant);
                assert!(matches!(
                    self.engine.publish(sealed, ticket),
                    Published::New(_)
                ));
                Ok(true)
            }
            Reserve::Present(_) => Ok(false),
            Reserve::Rejected { reason, .. } => Err(reason),
        }
    }

    fn put(&self, chain: &Chain, i: usize) -> Result<bool, Reason> {
        self.put_as(chain, i, PAGE, Kind::Kv)
    }

    fn put_all(&self, chain: &Chain) {
        (0..chain.len()).for_each(|i| {
            self.put(chain, i).unwrap();
        });
    }

    fn ask(&self, chain: &Chain, lease: Option<LeaseAsk>) -> LookupAnswer {
        self.engine.lookup(LookupQuery {
            namespace: SPACE,
            chain,
            parts: &[],
            lease,
        })
    }

    fn probe(&self, chain: &Chain) -> u32 {
        self.ask(chain, None).present_blocks
    }

    fn lease(&self, chain: &Chain, who: u8) -> LookupAnswer {
        self.ask(
            chain,
            Some(LeaseAsk {
                owner: owner(who),
                ttl_ms: 1000,
                idempotency: None,
                id: None,
            }),
        )
    }

    fn bytes(
        &self,
        chain: &Chain,
        i: usize,
        lease: Option<(LeaseId, Owner)>,
    ) -> Result<u8, Reason> {
        match self.engine.locate(&key(chain, i), lease) {
            Whereabouts::Ram(block) => Ok(block.bytes()[0]),
            Whereabouts::Below(below) => panic!("{below:?}"),
            Whereabouts::Gone(reason) => Err(reason),
        }
    }

    fn resident(&self, chain: &Chain, i: usize) -> Resident {
        Resident {
            key: key(chain, i),
            place: chain.place(i, RUN),
            length_bytes: PAGE,
            seal: 9,
        }
    }

    /// A block that only NVMe has.
    fn below(&self, chain: &Chain, blocks: std::ops::Range<usize>) {
        let residents = blocks.map(|i| self.resident(chain, i)).collect();
        self.engine.recover(TierKind::Nvme, residents, Kind::Kv);
    }

    fn assert_nothing_leaked(&self) {
        self.engine.invalidate(SPACE, Target::All);
        for n in 0..=255 {
            self.engine.release_owner(owner(n));
        }
        let stats = self.engine.stats();
        assert_eq!((stats.blocks, stats.leases, stats.leased_bytes), (0, 0, 0));
        assert_eq!((stats.kv.used_bytes, stats.checkpoint.used_bytes), (0, 0));
        assert_eq!((stats.kv.blocks, stats.checkpoint.blocks), (0, 0));
        assert_eq!(self.arena.stats().used_bytes, 0);
    }
}
