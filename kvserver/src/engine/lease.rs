//! Leases: time-bounded pins on the leading blocks of a chain, each owned by one caller.
//!
//! ```text
//! lookup ─► grant ─► renew* ─► release | release_owner | expire ─► what it covered, to be unpinned
//! ```
//!
//! This table knows who holds what until when; the pins themselves are counts in the index. It is consulted
//! before and after the index and never while a shard is locked.
//!
//! Units: bytes of slots; deadlines are ticks of the engine's clock. A lease is alive *before* its deadline.
//! Bounds: so many leases, and so many bytes per owner.
//! Errors: none; a refusal is a [`Reason`], a lease that is gone is `None`.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use kvgpu::DomainId;
use kvproto::{BlockKey, LeaseId, NamespaceId, OwnerId, Part, Reason, SequenceHash};

use crate::clock::Tick;

/// A tenant of this node, as the credential says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub u32);

impl TenantId {
    /// The trust domain of the arena in which a tenant's blocks lie: processes of one tenant may map each other's.
    #[must_use]
    pub const fn domain(self) -> DomainId {
        DomainId(self.0)
    }
}

/// Who holds a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// The tenant, so that nobody guesses into another's leases.
    pub tenant: TenantId,
    /// The caller.
    pub id: OwnerId,
}

/// What a caller was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseGrant {
    /// Name it with every get, renew and release.
    pub id: LeaseId,
    /// Time left, milliseconds.
    pub ttl_ms: u64,
    /// Leading blocks of the chain under the lease.
    pub blocks: u32,
    /// Bytes in slots that it draws on the owner's budget.
    pub bytes: u64,
}

/// The blocks under one lease: every part of each hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Covered {
    pub(super) namespace: NamespaceId,
    pub(super) hashes: Box<[SequenceHash]>,
    pub(super) parts: Box<[Part]>,
}

/// The blocks that one lease holds, for whoever reads under it.
#[derive(Clone, Debug)]
pub struct Cover {
    namespace: NamespaceId,
    hashes: HashSet<SequenceHash>,
    parts: Box<[Part]>,
}

impl Cover {
    pub(super) fn new(covered: &Covered) -> Self {
        Self {
            namespace: covered.namespace,
            hashes: covered.hashes.iter().copied().collect(),
            parts: covered.parts.clone(),
        }
    }

    /// Whether the lease speaks for this block.
    #[must_use]
    pub fn contains(&self, key: &BlockKey) -> bool {
        self.namespace == key.namespace
            && self.parts.contains(&key.part)
            && self.hashes.contains(&key.hash)
    }
}

/// A lease to be.
pub(super) struct Request {
    pub(super) owner: Owner,
    pub(super) idempotency: Option<[u8; 16]>,
    /// Fingerprint of what was asked for: one idempotency key names one question.
    pub(super) subject: u64,
    pub(super) ttl: Duration,
    pub(super) bytes: u64,
    pub(super) covered: Covered,
}

struct Lease {
    owner: Owner,
    idempotency: Option<[u8; 16]>,
    subject: u64,
    deadline: Tick,
    bytes: u64,
    covered: Covered,
}

#[derive(Default)]
struct Holdings {
    bytes: u64,
    /// Of readers without a lease.
    held_bytes: u64,
    leases: HashSet<LeaseId>,
}

impl Holdings {
    fn is_empty(&self) -> bool {
        self.leases.is_empty() && self.held_bytes == 0
    }
}

/// Limits of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) max_leases: usize,
    pub(super) bytes_per_owner: u64,
}

/// All leases of a node.
pub(super) struct LeaseTable {
    limits: Limits,
    leases: HashMap<LeaseId, Lease>,
    deadlines: BTreeSet<(Tick, LeaseId)>,
    owners: HashMap<Owner, Holdings>,
    repeats: HashMap<(Owner, [u8; 16]), LeaseId>,
}

impl LeaseTable {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            leases: HashMap::new(),
            deadlines: BTreeSet::new(),
            owners: HashMap::new(),
            repeats: HashMap::new(),
        }
    }

    /// Bytes that the owner may still lease; an error when the table takes no further lease.
    pub(super) fn room(&self, owner: &Owner) -> Result<u64, Reason> {
        if self.leases.len() >= self.limits.max_leases {
            return Err(Reason::Overloaded);
        }
        Ok(self.bytes_left(owner))
    }

    fn bytes_left(&self, owner: &Owner) -> u64 {
        let drawn = self.owners.get(owner);
        let drawn = drawn.map_or(0, |holdings| holdings.bytes + holdings.held_bytes);
        self.limits.bytes_per_owner.saturating_sub(drawn)
    }

    /// Draws on the owner's budget without a lease; false when it does not reach.
    pub(super) fn hold(&mut self, owner: Owner, bytes: u64) -> bool {
        let fits = bytes <= self.bytes_left(&owner);
        if fits {
            self.owners.entry(owner).or_default().held_bytes += bytes;
        }
        fits
    }

    /// Gives back what was drawn.
    pub(super) fn let_go(&mut self, owner: &Owner, bytes: u64) {
        if let Some(holdings) = self.owners.get_mut(owner) {
            holdings.held_bytes = holdings.held_bytes.saturating_sub(bytes);
            if holdings.is_empty() {
                self.owners.remove(owner);
            }
        }
    }

    /// How many of these consecutive hashes, from the first on, lie in all these parts under a living lease of
    /// this owner.
    pub(super) fn covers(
        &self,
        id: LeaseId,
        owner: &Owner,
        now: Tick,
        asked: (NamespaceId, &[SequenceHash], &[Part]),
    ) -> usize {
        let (namespace, hashes, parts) = asked;
        if !self.is_alive(id, owner, now) {
            return 0;
        }
        let covered = &self.leases[&id].covered;
        let Some(first) = hashes.first() else {
            return 0;
        };
        if covered.namespace != namespace || !parts.iter().all(|part| covered.parts.contains(part))
        {
            return 0;
        }
        let Some(at) = covered.hashes.iter().position(|hash| hash == first) else {
            return 0;
        };
        let pairs = covered.hashes[at..].iter().zip(hashes);
        pairs
            .take_while(|(covered, asked)| covered == asked)
            .count()
    }

    /// The lease that an earlier ask with this key got, if it is alive and was for the same; it lives on for at
    /// least `ttl`.
    pub(super) fn repeated(
        &mut self,
        owner: Owner,
        idempotency: [u8; 16],
        subject: u64,
        now: Tick,
        ttl: Duration,
    ) -> Option<LeaseGrant> {
        let id = *self.repeats.get(&(owner, idempotency))?;
        let lease = self.leases.get(&id)?;
        if lease.subject != subject || lease.deadline <= now {
            return None;
        }
        let deadline = lease.deadline.max(now.after(ttl));
        self.set_deadline(id, deadline);
        let lease = &self.leases[&id];
        Some(LeaseGrant {
            id,
            ttl_ms: millis(deadline.since(now)),
            blocks: lease.covered.hashes.len() as u32,
            bytes: lease.bytes,
        })
    }

    /// Enters a lease under `id`, which nobody has yet.
    ///
    /// # Errors
    /// The owner's budget or the table is full; the request comes back.
    pub(super) fn grant(
        &mut self,
        id: LeaseId,
        request: Request,
        now: Tick,
    ) -> Result<LeaseGrant, Box<(Reason, Request)>> {
        match self.room(&request.owner) {
            Err(reason) => return Err(Box::new((reason, request))),
            Ok(room) if room < request.bytes => return Err(Box::new((Reason::Budget, request))),
            Ok(_) => {}
        }
        let Request {
            owner,
            idempotency,
            subject,
            ttl,
            bytes,
            covered,
        } = request;
        let grant = LeaseGrant {
            id,
            ttl_ms: millis(ttl),
            blocks: covered.hashes.len() as u32,
            bytes,
        };
        let deadline = now.after(ttl);
        let holdings = self.owners.entry(owner).or_default();
        holdings.bytes += bytes;
        holdings.leases.insert(id);
        self.deadlines.insert((deadline, id));
        if let Some(idempotency) = idempotency {
            self.repeats.insert((owner, idempotency), id);
        }
        self.leases.insert(
            id,
            Lease {
                owner,
                idempotency,
                subject,
                deadline,
                bytes,
                covered,
            },
        );
        Ok(grant)
    }

    /// Whether the lease exists, is this owner's, and has time left.
    pub(super) fn is_alive(&self, id: LeaseId, owner: &Owner, now: Tick) -> bool {
        self.leases
            .get(&id)
            .is_some_and(|lease| lease.owner == *owner && lease.deadline > now)
    }

    /// What a living lease of this owner covers.
    pub(super) fn covered(&self, id: LeaseId, owner: &Owner, now: Tick) -> Option<Covered> {
        self.is_alive(id, owner, now)
            .then(|| self.leases[&id].covered.clone())
    }

    /// Whether anybody has this id.
    pub(super) fn contains(&self, id: LeaseId) -> bool {
        self.leases.contains_key(&id)
    }

    /// Prolongs a living lease to `ttl` from now; false when it is gone.
    pub(super) fn renew(&mut self, id: LeaseId, owner: &Owner, now: Tick, ttl: Duration) -> bool {
        if !self.is_alive(id, owner, now) {
            return false;
        }
        self.set_deadline(id, now.after(ttl));
        true
    }

    /// Takes out the owner's lease.
    pub(super) fn release(&mut self, id: LeaseId, owner: &Owner) -> Option<Covered> {
        let lease = self.leases.get(&id)?;
        (lease.owner == *owner).then(|| self.take(id)).flatten()
    }

    /// Takes out all leases of an owner.
    pub(super) fn release_owner(&mut self, owner: &Owner) -> Vec<Covered> {
        let Some(holdings) = self.owners.get(owner) else {
            return Vec::new();
        };
        let ids: Vec<LeaseId> = holdings.leases.iter().copied().collect();
        ids.into_iter().filter_map(|id| self.take(id)).collect()
    }

    /// Takes out the leases whose time is up.
    pub(super) fn expire(&mut self, now: Tick) -> Vec<Covered> {
        let mut expired = Vec::new();
        while let Some((deadline, id)) = self.deadlines.first().copied() {
            if deadline > now {
                break;
            }
            expired.extend(self.take(id));
        }
        expired
    }

    pub(super) fn len(&self) -> usize {
        self.leases.len()
    }

    fn set_deadline(&mut self, id: LeaseId, deadline: Tick) {
        if let Some(lease) = self.leases.get_mut(&id) {
            self.deadlines.remove(&(lease.deadline, id));
            self.deadlines.insert((deadline, id));
            lease.deadline = deadline;
        }
    }

    fn take(&mut self, id: LeaseId) -> Option<Covered> {
        let lease = self.leases.remove(&id)?;
        self.deadlines.remove(&(lease.deadline, id));
        if let Some(holdings) = self.owners.get_mut(&lease.owner) {
            holdings.bytes -= lease.bytes;
            holdings.leases.remove(&id);
            if holdings.is_empty() {
                self.owners.remove(&lease.owner);
            }
        }
        if let Some(idempotency) = lease.idempotency {
            // A later lease may have taken the key over.
            let key = (lease.owner, idempotency);
            if self.repeats.get(&key) == Some(&id) {
                self.repeats.remove(&key);
            }
        }
        Some(lease.covered)
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(n: u8) -> Owner {
        Owner {
            tenant: TenantId(0),
            id: OwnerId([n; 16]),
        }
    }

    fn at(ms: u64) -> Tick {
        Tick(Duration::from_millis(ms))
    }

    fn request(who: u8, bytes: u64, key: Option<u8>) -> Request {
        Request {
            owner: owner(who),
            idempotency: key.map(|key| [key; 16]),
            subject: 1,
            ttl: Duration::from_millis(100),
            bytes,
            covered: Covered {
                namespace: NamespaceId([0; 16]),
                hashes: [SequenceHash([who; 32])].into(),
                parts: [Part::default()].into(),
            },
        }
    }

    fn table() -> LeaseTable {
        LeaseTable::new(Limits {
            max_leases: 3,
            bytes_per_owner: 100,
        })
    }

    fn grant(
        table: &mut LeaseTable,
        id: u64,
        request: Request,
        now: Tick,
    ) -> Result<LeaseGrant, Reason> {
        table
            .grant(LeaseId(id), request, now)
            .map_err(|refused| refused.0)
    }

    #[test]
    fn a_lease_is_alive_before_its_deadline_and_for_its_owner() {
        let mut table = table();
        grant(&mut table, 1, request(1, 10, None), at(0)).unwrap();
        assert!(table.is_alive(LeaseId(1), &owner(1), at(99)));
        assert!(!table.is_alive(LeaseId(1), &owner(1), at(100)));
        assert!(!table.is_alive(LeaseId(1), &owner(2), at(0)));
        assert!(!table.is_alive(LeaseId(2), &owner(1), at(0)));
    }

    #[test]
    fn renewal_moves_the_deadline_and_the_dead_stay_dead() {
        let mut table = table();
        grant(&mut table, 1, request(1, 10, None), at(0)).unwrap();
        assert!(table.renew(LeaseId(1), &owner(1), at(50), Duration::from_millis(100)));
        assert!(table.expire(at(149)).is_empty());
        assert!(!table.renew(LeaseId(1), &owner(2), at(60), Duration::from_millis(100)));
        assert!(!table.renew(LeaseId(1), &owner(1), at(150), Duration::from_millis(100)));
        assert_eq!(table.expire(at(150)).len(), 1);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn an_owner_cannot_exceed_its_bytes_and_gets_them_back() {
        let mut table = table();
        grant(&mut table, 1, request(1, 60, None), at(0)).unwrap();
        assert_eq!(table.room(&owner(1)), Ok(40));
        assert_eq!(
            grant(&mut table, 2, request(1, 41, None), at(0)),
            Err(Reason::Budget)
        );
        grant(&mut table, 3, request(2, 100, None), at(0)).unwrap();
        assert!(table.release(LeaseId(1), &owner(2)).is_none());
        assert!(table.release(LeaseId(1), &owner(1)).is_some());
        assert_eq!(table.room(&owner(1)), Ok(100));
    }

    #[test]
    fn the_table_is_bounded() {
        let mut table = table();
        for id in 0..3 {
            grant(&mut table, id, request(id as u8, 1, None), at(0)).unwrap();
        }
        assert_eq!(
            grant(&mut table, 9, request(9, 1, None), at(0)),
            Err(Reason::Overloaded)
        );
        assert_eq!(table.release_owner(&owner(1)).len(), 1);
        grant(&mut table, 9, request(9, 1, None), at(0)).unwrap();
    }

    #[test]
    fn a_repeated_ask_gets_the_same_lease_until_it_dies() {
        let mut table = table();
        let ttl = Duration::from_millis(100);
        grant(&mut table, 1, request(1, 10, Some(7)), at(0)).unwrap();
        let again = table.repeated(owner(1), [7; 16], 1, at(40), ttl).unwrap();
        assert_eq!((again.id, again.ttl_ms, again.blocks), (LeaseId(1), 100, 1));
        assert!(
            table.repeated(owner(1), [7; 16], 2, at(40), ttl).is_none(),
            "another question"
        );
        assert!(
            table.repeated(owner(2), [7; 16], 1, at(40), ttl).is_none(),
            "another owner"
        );
        assert!(
            table.repeated(owner(1), [7; 16], 1, at(140), ttl).is_none(),
            "too late"
        );
        table.expire(at(140));
        assert!(table.repeats.is_empty() && table.owners.is_empty() && table.deadlines.is_empty());
    }
}
