//! What is here: the longest prefix of a chain and one lease on it; and where one block's bytes are.
//!
//! ```text
//! chain  b0 b1 b2 b3 ✗ b5          present 4, a gap ends the prefix
//! tiers  ram ram nvme nvme         runs (2, ram) (2, nvme)
//! lease  ├──────────┤              3 blocks: the owner's budget ends here
//! ```
//!
//! A block is present when all parts asked for are; its tier is that of its furthest part. Blocks are pinned under
//! their shard's lock in the very step that finds them (walk.rs), so nothing reported under the lease can leave in
//! between.
//! Units: blocks, bytes of slots. Errors: none; a lease refused names its reason.

use std::time::Duration;

use kvproto::{BlockKey, Chain, Kind, LeaseId, NamespaceId, Part, Reason, TierKind};

use super::{
    Engine,
    budget::slot_of,
    lease::{Cover, Covered, LeaseGrant, Owner, Request},
    policy::BlockId,
    walk::{Manner, Walk},
};
use crate::{
    clock::Tick,
    tier::{BlockRef, Resident},
};

/// A wish for a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseAsk {
    /// Who will hold it.
    pub owner: Owner,
    /// For how long, milliseconds; 0 is the default, and the maximum binds.
    pub ttl_ms: u64,
    /// Asks with the same key, owner and question get the same lease.
    pub idempotency: Option<[u8; 16]>,
    /// The id that the caller would have; one that anybody has is not given again.
    pub id: Option<LeaseId>,
}

/// A question about one chain.
#[derive(Clone, Copy, Debug)]
pub struct LookupQuery<'a> {
    /// Whose blocks.
    pub namespace: NamespaceId,
    /// Which blocks, root side first.
    pub chain: &'a Chain,
    /// Parts that must all be present; empty means the single part {0, 0}.
    pub parts: &'a [Part],
    /// `None` is a probe: no lease, no promotion, no trace in the policy.
    pub lease: Option<LeaseAsk>,
}

/// A block that is not in RAM, and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Below {
    /// The nearest tier that has it.
    pub tier: TierKind,
    /// What to ask it for.
    pub resident: Resident,
    /// Whose budget its landing draws on.
    pub kind: Kind,
}

/// The answer to a lookup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LookupAnswer {
    /// Leading blocks present in all parts.
    pub present_blocks: u32,
    /// Runs of them by tier.
    pub tiers: Vec<(u32, TierKind)>,
    /// The lease; `None` for a probe, when nothing is present, and when it was refused.
    pub lease: Option<LeaseGrant>,
    /// Why a lease is missing or shorter than what is present.
    pub refused: Option<Reason>,
    /// Leased blocks that should be brought up to RAM, root first.
    pub promote: Vec<Below>,
}

/// Where the bytes of one block are.
#[derive(Clone, Debug)]
pub enum Whereabouts {
    /// Here they are.
    Ram(BlockRef),
    /// In a lower tier.
    Below(Below),
    /// Nowhere; `Evicted` is also the plain miss, `Expired` speaks of the lease.
    Gone(Reason),
}

const DEFAULT_PARTS: &[Part] = &[Part {
    rank: 0,
    layer_group: 0,
}];

impl Engine {
    /// The longest prefix of the chain that is present, and one lease on it unless it is a probe.
    pub fn lookup(&self, query: LookupQuery<'_>) -> LookupAnswer {
        let parts = if query.parts.is_empty() {
            DEFAULT_PARTS
        } else {
            query.parts
        };
        match query.lease {
            None => {
                self.walk(
                    &query,
                    parts,
                    Manner {
                        uses: false,
                        room: None,
                    },
                )
                .answer
            }
            Some(ask) => self.leased_lookup(&query, parts, ask),
        }
    }

    fn leased_lookup(
        &self,
        query: &LookupQuery<'_>,
        parts: &[Part],
        ask: LeaseAsk,
    ) -> LookupAnswer {
        let now = self.clock.now();
        let ttl = self.lease_ttl(ask.ttl_ms);
        let subject = self.subject(query, parts);
        // What the dead still hold is room for the living.
        self.expire_leases(now);
        let room = {
            let mut leases = self.leases.lock();
            let earlier = ask
                .idempotency
                .and_then(|key| leases.repeated(ask.owner, key, subject, now, ttl));
            if let Some(grant) = earlier {
                drop(leases);
                return self.repeat(query, parts, grant);
            }
            leases.room(&ask.owner)
        };
        let manner = Manner {
            uses: true,
            room: Some(*room.as_ref().unwrap_or(&0)),
        };
        let mut walk = self.walk(query, parts, manner);
        self.touch(&mut walk);
        if let Err(reason) = room {
            walk.answer.refused = (walk.answer.present_blocks > 0).then_some(reason);
        }
        if walk.pinned_blocks > 0 {
            self.enter_lease(query, parts, ask, subject, ttl, &mut walk);
        }
        walk.answer
    }

    /// A lease for what the walk has pinned; on refusal the pins go again.
    fn enter_lease(
        &self,
        query: &LookupQuery<'_>,
        parts: &[Part],
        ask: LeaseAsk,
        subject: u64,
        ttl: Duration,
        walk: &mut Walk,
    ) {
        let hashes = &query.chain.hashes[..walk.pinned_blocks as usize];
        let covered = Covered {
            namespace: query.namespace,
            hashes: hashes.into(),
            parts: parts.into(),
        };
        let request = Request {
            owner: ask.owner,
            idempotency: ask.idempotency,
            subject,
            ttl,
            bytes: walk.pinned_bytes,
            covered,
        };
        let now = self.clock.now();
        let mut leases = self.leases.lock();
        // The same question may have been asked twice at once: the first to come back has the lease.
        let twin = ask
            .idempotency
            .and_then(|key| leases.repeated(ask.owner, key, subject, now, ttl));
        if let Some(twin) = twin {
            drop(leases);
            self.unpin(&request.covered);
            walk.answer.lease = Some(twin);
            return;
        }
        let mut id = ask.id.unwrap_or(LeaseId(0));
        while id.0 == 0 || leases.contains(id) {
            id = LeaseId(self.clock.random_u64());
        }
        match leases.grant(id, request, now) {
            Ok(grant) => walk.answer.lease = Some(grant),
            Err(refused) => {
                let (reason, request) = *refused;
                drop(leases);
                self.unpin(&request.covered);
                walk.answer.refused = Some(reason);
                walk.answer.promote.clear();
            }
        }
    }

    /// The answer to a question asked again: what is present now, under the lease of then.
    fn repeat(&self, query: &LookupQuery<'_>, parts: &[Part], grant: LeaseGrant) -> LookupAnswer {
        let mut walk = self.walk(
            query,
            parts,
            Manner {
                uses: false,
                room: None,
            },
        );
        let leased = grant.blocks.min(walk.answer.present_blocks) as usize;
        let below = query.chain.hashes[..leased].iter().flat_map(|hash| {
            let namespace = query.namespace;
            parts.iter().map(move |part| BlockKey {
                namespace,
                hash: *hash,
                part: *part,
            })
        });
        walk.answer.promote = below.filter_map(|key| self.below(&key)).collect();
        if grant.blocks < walk.answer.present_blocks {
            walk.answer.refused = Some(Reason::Budget);
        }
        walk.answer.lease = Some(grant);
        walk.answer
    }

    fn below(&self, key: &BlockKey) -> Option<Below> {
        let shard = self.index.shard(key);
        let entry = shard.get(key).filter(|entry| entry.ram.is_none())?;
        let tier = entry.below.nearest()?;
        Some(Below {
            tier,
            resident: entry.resident(key),
            kind: entry.kind,
        })
    }

    fn touch(&self, walk: &mut Walk) {
        if walk.touched.iter().all(Vec::is_empty) {
            return;
        }
        let mut ram = self.ram.lock();
        for kind in Kind::ALL {
            let ids = &mut walk.touched[slot_of(*kind)];
            ids.reverse();
            ram.touch(*kind, ids);
        }
    }

    /// Where a block's bytes are. Under a living lease of that owner a block that the lease covers is never
    /// `Gone(Evicted)`.
    pub fn locate(&self, key: &BlockKey, lease: Option<(LeaseId, Owner)>) -> Whereabouts {
        if let Some((id, owner)) = lease
            && !self.leases.lock().is_alive(id, &owner, self.clock.now())
        {
            self.gets.gone(Reason::Expired, 1);
            return Whereabouts::Gone(Reason::Expired);
        }
        let (found, touch) = self.find(key, lease.is_none());
        match &found {
            Whereabouts::Ram(_) => self.gets.hit(TierKind::Ram, 1),
            Whereabouts::Below(below) => self.gets.hit(below.tier, 1),
            Whereabouts::Gone(reason) => self.gets.gone(*reason, 1),
        }
        if let Some((kind, id)) = touch {
            self.ram.lock().touch(kind, &[id]);
        }
        found
    }

    /// Where a block is and, when that `uses` it, what the policy should be told.
    pub(super) fn find(
        &self,
        key: &BlockKey,
        uses: bool,
    ) -> (Whereabouts, Option<(Kind, BlockId)>) {
        let mut shard = self.index.shard(key);
        if let Some(entry) = shard.get_mut(key) {
            if uses {
                entry.used();
            }
            if let Some(held) = &entry.ram {
                let touch = uses.then_some((entry.kind, held.id));
                return (Whereabouts::Ram(held.block.clone()), touch);
            }
            if let Some(tier) = entry.below.nearest() {
                let (resident, kind) = (entry.resident(key), entry.kind);
                return (
                    Whereabouts::Below(Below {
                        tier,
                        resident,
                        kind,
                    }),
                    None,
                );
            }
        }
        (Whereabouts::Gone(shard.why_gone(key)), None)
    }

    /// Prolongs a living lease, for `ttl_ms` from now (0 is the default); the time granted, or `None` when the
    /// lease is gone.
    pub fn renew(&self, id: LeaseId, owner: Owner, ttl_ms: u64) -> Option<u64> {
        let ttl = self.lease_ttl(ttl_ms);
        let renewed = self.leases.lock().renew(id, &owner, self.clock.now(), ttl);
        renewed.then(|| super::lease::millis(ttl))
    }

    /// The blocks that a living lease of this owner holds; the lease of another, or a dead one, holds none.
    #[must_use]
    pub fn cover(&self, id: LeaseId, owner: Owner) -> Option<Cover> {
        let covered = self.leases.lock().covered(id, &owner, self.clock.now())?;
        Some(Cover::new(&covered))
    }

    /// How many blocks of a chain, from its first on, lie in all these parts under a living lease of this owner.
    #[must_use]
    pub fn covers(
        &self,
        id: LeaseId,
        owner: Owner,
        namespace: NamespaceId,
        chain: &Chain,
        parts: &[Part],
    ) -> usize {
        let asked = (namespace, &chain.hashes[..], parts);
        self.leases
            .lock()
            .covers(id, &owner, self.clock.now(), asked)
    }

    /// Gives a lease back; false when it was gone already or is not this owner's.
    pub fn release(&self, id: LeaseId, owner: Owner) -> bool {
        let covered = self.leases.lock().release(id, &owner);
        covered.inspect(|covered| self.unpin(covered)).is_some()
    }

    /// Gives back all leases of an owner whose last connection is gone; how many there were.
    pub fn release_owner(&self, owner: Owner) -> usize {
        let covered = self.leases.lock().release_owner(&owner);
        covered.iter().for_each(|covered| self.unpin(covered));
        covered.len()
    }

    /// Ends the leases whose time is up at `now`; how many there were. To be called now and then.
    pub fn expire_leases(&self, now: Tick) -> usize {
        let covered = self.leases.lock().expire(now);
        covered.iter().for_each(|covered| self.unpin(covered));
        covered.len()
    }

    fn lease_ttl(&self, ttl_ms: u64) -> Duration {
        let ttl_ms = if ttl_ms == 0 {
            self.config.lease_default_ttl_ms
        } else {
            ttl_ms
        };
        Duration::from_millis(ttl_ms.min(self.config.lease_max_ttl_ms))
    }

    /// Fingerprint of a question: namespace, parts, the chain's two ends, and both sides of every jump.
    fn subject(&self, query: &LookupQuery<'_>, parts: &[Part]) -> u64 {
        let hashes = &query.chain.hashes;
        let sides = query.chain.jumps.iter().flat_map(|jump| {
            let at = jump.at as usize;
            [hashes.get(at.wrapping_sub(1)), hashes.get(at)]
        });
        let ends = [hashes.first(), hashes.last()];
        let keys = ends.into_iter().chain(sides).flatten().flat_map(|hash| {
            let namespace = query.namespace;
            parts.iter().map(move |part| BlockKey {
                namespace,
                hash: *hash,
                part: *part,
            })
        });
        keys.fold(hashes.len() as u64, |subject, key| {
            subject.rotate_left(1) ^ self.fences.fingerprint(&key)
        })
    }
}
