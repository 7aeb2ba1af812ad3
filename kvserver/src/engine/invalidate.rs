//! Forgetting on purpose: a block, everything below a prefix, or a namespace.
//!
//! ```text
//! raise the fence ─► visit every shard ─► what goes, and the tiers that must remove it for good
//! ```
//!
//! Below a prefix goes every block whose known ancestors lead to it, and every block of which that cannot be
//! excluded because an ancestor is missing: an engine may lose a block, and may not keep one that must go.
//! Leases do not hold what is invalidated: a get under them answers `Invalidated`.
//! Cost: a prefix or a namespace visits the whole index, one shard at a time. Units: blocks.

use std::collections::{HashMap, HashSet};

use kvproto::{BlockKey, Kind, NamespaceId, Reason, SequenceHash, TierKind};

use super::{
    Change, Engine, TierSet, budget::slot_bytes, forgotten::InvalidationId, policy::BlockId,
};
use crate::tier::BlockRef;

/// What is to be forgotten, within a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// This block, in all its parts.
    Block(SequenceHash),
    /// This block and every block after it in any chain.
    Prefix(SequenceHash),
    /// Everything.
    All,
}

/// A block that was forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalidated {
    /// Which.
    pub key: BlockKey,
    /// The tiers below RAM that must remove it.
    pub tiers: TierSet,
}

impl Engine {
    /// Forgets what `target` names, and outlaws the puts under way that might bring it back. The answer says which
    /// tiers have to remove what.
    pub fn invalidate(&self, namespace: NamespaceId, target: Target) -> Vec<Invalidated> {
        self.invalidate_as(self.clock.random_u64(), namespace, target)
    }

    /// As [`Engine::invalidate`]; `id` is that of the same invalidation at every node of a cluster.
    pub fn invalidate_as(
        &self,
        id: InvalidationId,
        namespace: NamespaceId,
        target: Target,
    ) -> Vec<Invalidated> {
        let hash = match target {
            Target::Block(hash) => Some(hash),
            Target::Prefix(_) | Target::All => None,
        };
        // Before the fence: a peer's block that is taken in meanwhile meets one of the two.
        let now = self.clock.now();
        self.forgotten.note(id, namespace, hash, now);
        let forgotten = self.forget(namespace, target);
        self.forgotten.done(id, namespace, hash);
        forgotten
    }

    /// Forgets all of this in one pass: what a node was not told while it was away. What peers hand over is not compared
    /// with it, for they were told when it was new.
    pub fn invalidate_missed(&self, missed: &[(NamespaceId, Target)]) -> Vec<Invalidated> {
        let (mut whole, mut some) = (HashSet::new(), HashSet::new());
        let mut prefixes: HashMap<NamespaceId, HashSet<SequenceHash>> = HashMap::new();
        for &(namespace, target) in missed {
            match target {
                Target::Block(hash) => {
                    self.fences.raise_for(&namespace, &hash);
                    some.insert((namespace, hash));
                }
                Target::Prefix(hash) => {
                    self.fences.raise(&namespace);
                    prefixes.entry(namespace).or_default().insert(hash);
                }
                Target::All => {
                    self.fences.raise(&namespace);
                    whole.insert(namespace);
                }
            }
        }
        prefixes.retain(|namespace, _| !whole.contains(namespace));
        for (namespace, prefixes) in &prefixes {
            let below = self.below_any(*namespace, prefixes).into_iter();
            some.extend(below.map(|hash| (*namespace, hash)));
        }
        self.forget_where(|key| {
            whole.contains(&key.namespace) || some.contains(&(key.namespace, key.hash))
        })
    }

    /// Namespaces of which there is anything.
    #[must_use]
    pub fn namespaces(&self) -> HashSet<NamespaceId> {
        let mut found = HashSet::new();
        for shard in self.index.shards() {
            found.extend(shard.iter().map(|(key, _)| key.namespace));
        }
        found
    }

    /// Invalidations of late that blocks of these which are here now have survived.
    #[must_use]
    pub fn survived(&self, namespace: NamespaceId, hashes: &[SequenceHash]) -> Vec<InvalidationId> {
        self.forgotten.told(namespace, hashes, self.clock.now())
    }

    /// Whether a block that a peer hands over, and that has `survived` these, was invalidated here lately by another.
    #[must_use]
    pub fn is_undone(&self, key: &BlockKey, survived: &[InvalidationId]) -> bool {
        self.forgotten.is_undone(key, survived, self.clock.now())
    }

    fn forget(&self, namespace: NamespaceId, target: Target) -> Vec<Invalidated> {
        match target {
            Target::Block(hash) => {
                self.fences.raise_for(&namespace, &hash);
                self.forget_where(|key| key.namespace == namespace && key.hash == hash)
            }
            Target::All => {
                self.fences.raise(&namespace);
                self.forget_where(|key| key.namespace == namespace)
            }
            Target::Prefix(hash) => {
                self.fences.raise(&namespace);
                let below = self.below_any(namespace, &HashSet::from([hash]));
                self.forget_where(|key| key.namespace == namespace && below.contains(&key.hash))
            }
        }
    }

    fn forget_where(&self, gone: impl Fn(&BlockKey) -> bool) -> Vec<Invalidated> {
        let mut forgotten = Vec::new();
        let mut from_ram: Vec<(Kind, BlockId, BlockRef)> = Vec::new();
        for mut shard in self.index.shards() {
            let keys: Vec<BlockKey> = shard
                .iter()
                .map(|(key, _)| *key)
                .filter(|key| gone(key))
                .collect();
            for key in keys {
                let Some(entry) = shard.get_mut(&key) else {
                    continue;
                };
                if !entry.is_present() {
                    entry.gone = Some(Reason::Invalidated);
                    continue;
                }
                let change = Change::Removed(Reason::Invalidated);
                let tiers = std::mem::take(&mut entry.below);
                for tier in tiers.iter() {
                    self.tell(&key, entry, change, tier);
                }
                if let Some(held) = entry.ram.take() {
                    self.tell(&key, entry, change, TierKind::Ram);
                    from_ram.push((entry.kind, held.id, held.block));
                }
                shard.settle(&key, Reason::Invalidated);
                forgotten.push(Invalidated { key, tiers });
            }
        }
        // The RAM lock comes before a shard's, so the handles end afterwards. Until then the policy knows blocks
        // that the index has let go of; as victims they are refused, because their entry is gone.
        let mut ram = self.ram.lock();
        for (kind, id, block) in from_ram {
            ram.remove(kind, id);
            self.budget.release(kind, slot_bytes(block.len_bytes()));
        }
        forgotten
    }

    /// Every hash in the namespace that is one of these, or comes after it, or might.
    fn below_any(
        &self,
        namespace: NamespaceId,
        prefixes: &HashSet<SequenceHash>,
    ) -> HashSet<SequenceHash> {
        let mut places: HashMap<SequenceHash, (u32, Option<SequenceHash>)> = HashMap::new();
        for shard in self.index.shards() {
            let known = shard.iter().filter(|(key, _)| key.namespace == namespace);
            places.extend(
                known.map(|(key, entry)| (key.hash, (entry.place.index, entry.place.parent))),
            );
        }
        // Where the highest of them is, if it is known of all.
        let indices = prefixes.iter().map(|prefix| Some(places.get(prefix)?.0));
        let highest: Option<u32> = indices
            .collect::<Option<Vec<u32>>>()
            .and_then(|indices| indices.into_iter().min());
        let mut verdicts: HashMap<SequenceHash, bool> =
            prefixes.iter().map(|prefix| (*prefix, true)).collect();
        let mut path = Vec::new();
        for start in places.keys() {
            path.clear();
            let mut at = *start;
            let verdict = loop {
                if let Some(verdict) = verdicts.get(&at) {
                    break *verdict;
                }
                let Some((index, parent)) = places.get(&at) else {
                    // Unknown from here towards the root: it might hang below any.
                    break true;
                };
                path.push(at);
                match parent {
                    // At the depth of the highest or above, and none of them.
                    _ if highest.is_some_and(|highest| *index <= highest) => break false,
                    None => break false,
                    Some(parent) => at = *parent,
                }
                // Indices fall towards the root in honest chains; a loop in dishonest ones ends here.
                if path.len() > places.len() {
                    break true;
                }
            };
            verdicts.extend(path.iter().map(|hash| (*hash, verdict)));
        }
        verdicts
            .into_iter()
            .filter_map(|(hash, below)| below.then_some(hash))
            .collect()
    }
}
