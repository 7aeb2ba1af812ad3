//! Which invalidations this node was told of lately: what a node that was not told yet hands over must not undo them.
//!
//! ```text
//! invalidate ─► note ─► (fence, every shard) ─► done             the caller tells each node, one sooner, one later
//!                 │                              └─► told: what this node's own blocks have survived, for its peers
//!                 └─► undone: a block of a peer that has not survived the same is refused, for MEMORY
//! ```
//!
//! Each invalidation has an id, the same at every node that is told of it. A node says with the blocks that it hands over
//! which ids it has done, and who takes them compares: a block that one of its own covers, and that its giver was not
//! told of, goes no further. The moment after, when the giver is told too, it has nothing left to give. A client's put is
//! compared with nothing: it is new.
//!
//! Units: [`Tick`]. Errors: none.
//! Bounds: [`MAX_BLOCKS`] blocks and [`MAX_WHOLE`] invalidations of a namespace that reach further; beyond that the
//! oldest is forgotten.
//! Why not an epoch per namespace: nodes are told in any order, and one that has just joined of none.
//! Why not refuse for a while, whatever the giver knows: after a namespace was invalidated all its new blocks would have
//! one copy, and a node that drains could not hand them over.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use kvproto::{BlockKey, NamespaceId, SequenceHash};
use parking_lot::Mutex;

use crate::clock::Tick;

/// How long an invalidation is remembered: longer than a caller takes to tell every node, and a move to arrive.
const MEMORY: Duration = Duration::from_secs(60);

/// Blocks remembered as invalidated.
const MAX_BLOCKS: usize = 8192;

/// Invalidations of more than a block that are remembered of one namespace.
const MAX_WHOLE: usize = 64;

/// Namespaces of which such are remembered.
const MAX_NAMESPACES: usize = 1024;

/// One invalidation, by a number that all nodes have for it.
pub type InvalidationId = u64;

#[derive(Clone, Copy, Debug)]
struct Told {
    id: InvalidationId,
    at: Tick,
    /// Nothing that it covers is here any more.
    is_done: bool,
}

impl Told {
    fn is_fresh(&self, now: Tick) -> bool {
        now.since(self.at) < MEMORY
    }
}

/// What was invalidated lately.
#[derive(Debug, Default)]
pub(super) struct Forgotten(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    blocks: BTreeMap<(NamespaceId, SequenceHash), Told>,
    /// In the order of their moments; a block that was invalidated again is in it twice.
    order: VecDeque<(Tick, NamespaceId, SequenceHash)>,
    /// A prefix, or all of it: of a block on its way nobody knows its ancestors, so a prefix covers its namespace.
    whole: BTreeMap<NamespaceId, VecDeque<Told>>,
}

impl Forgotten {
    /// An invalidation begins. `hash`: of that block; `None`: of more.
    pub(super) fn note(
        &self,
        id: InvalidationId,
        namespace: NamespaceId,
        hash: Option<SequenceHash>,
        now: Tick,
    ) {
        let told = Told {
            id,
            at: now,
            is_done: false,
        };
        let mut state = self.0.lock();
        state.forget_past(now);
        match hash {
            Some(hash) => {
                state.blocks.insert((namespace, hash), told);
                state.order.push_back((now, namespace, hash));
                while state.order.len() > MAX_BLOCKS {
                    state.forget_oldest();
                }
            }
            None => {
                if state.whole.len() >= MAX_NAMESPACES && !state.whole.contains_key(&namespace) {
                    let last = |of: &VecDeque<Told>| of.back().map(|told| told.at);
                    let oldest = state.whole.iter().min_by_key(|(_, of)| last(of));
                    if let Some(oldest) = oldest.map(|(namespace, _)| *namespace) {
                        state.whole.remove(&oldest);
                    }
                }
                let of = state.whole.entry(namespace).or_default();
                of.retain(|known| known.id != id);
                of.push_back(told);
                if of.len() > MAX_WHOLE {
                    of.pop_front();
                }
            }
        }
    }

    /// It is done: what is here now of what it covers is new.
    pub(super) fn done(
        &self,
        id: InvalidationId,
        namespace: NamespaceId,
        hash: Option<SequenceHash>,
    ) {
        let mut state = self.0.lock();
        let state = &mut *state;
        let found = match hash {
            Some(hash) => state.blocks.get_mut(&(namespace, hash)),
            None => {
                let of = state.whole.get_mut(&namespace);
                of.and_then(|of| of.iter_mut().find(|told| told.id == id))
            }
        };
        if let Some(told) = found.filter(|told| told.id == id) {
            told.is_done = true;
        }
    }

    /// What blocks of these that are here now have survived.
    pub(super) fn told<'a>(
        &self,
        namespace: NamespaceId,
        hashes: impl IntoIterator<Item = &'a SequenceHash>,
        now: Tick,
    ) -> Vec<InvalidationId> {
        let state = self.0.lock();
        let counts = |told: &&Told| told.is_done && told.is_fresh(now);
        let whole = state.whole.get(&namespace).into_iter().flatten();
        let mut told: Vec<InvalidationId> = whole.filter(counts).map(|told| told.id).collect();
        if !state.blocks.is_empty() {
            let of = |hash: &SequenceHash| state.blocks.get(&(namespace, *hash)).filter(counts);
            told.extend(hashes.into_iter().filter_map(of).map(|told| told.id));
        }
        told
    }

    /// Whether a block that comes from a peer was invalidated here lately, by what that peer was not `told` of.
    pub(super) fn is_undone(&self, key: &BlockKey, told: &[InvalidationId], now: Tick) -> bool {
        let state = self.0.lock();
        if state.blocks.is_empty() && state.whole.is_empty() {
            return false;
        }
        let block = state.blocks.get(&(key.namespace, key.hash));
        let whole = state.whole.get(&key.namespace).into_iter().flatten();
        let mut of_it = block.into_iter().chain(whole);
        of_it.any(|known| known.is_fresh(now) && !told.contains(&known.id))
    }
}

impl State {
    fn forget_past(&mut self, now: Tick) {
        while self
            .order
            .front()
            .is_some_and(|(at, ..)| now.since(*at) >= MEMORY)
        {
            self.forget_oldest();
        }
        self.whole.retain(|_, of| {
            of.retain(|told| told.is_fresh(now));
            !of.is_empty()
        });
    }

    fn forget_oldest(&mut self) {
        let Some((at, namespace, hash)) = self.order.pop_front() else {
            return;
        };
        let key = (namespace, hash);
        // Unless it was invalidated again since.
        if self.blocks.get(&key).is_some_and(|told| told.at <= at) {
            self.blocks.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use kvproto::Part;

    use super::*;

    const NAMESPACE: NamespaceId = NamespaceId([1; 16]);

    fn at(seconds: u64) -> Tick {
        Tick(Duration::from_secs(seconds))
    }

    fn hash(n: u64) -> SequenceHash {
        let mut hash = [0; 32];
        hash[..8].copy_from_slice(&n.to_be_bytes());
        SequenceHash(hash)
    }

    fn key(n: u64) -> BlockKey {
        BlockKey {
            namespace: NAMESPACE,
            hash: hash(n),
            part: Part::default(),
        }
    }

    fn invalidated(forgotten: &Forgotten, id: u64, of: Option<u64>, now: Tick) {
        forgotten.note(id, NAMESPACE, of.map(hash), now);
        forgotten.done(id, NAMESPACE, of.map(hash));
    }

    #[test]
    fn a_block_of_who_was_not_told_is_refused_for_as_long_as_it_is_remembered() {
        for of in [Some(1), None] {
            let forgotten = Forgotten::default();
            assert!(!forgotten.is_undone(&key(1), &[], at(0)));
            invalidated(&forgotten, 7, of, at(0));
            assert!(forgotten.is_undone(&key(1), &[], at(59)), "{of:?}");
            assert!(forgotten.is_undone(&key(1), &[8], at(59)), "{of:?}");
            assert!(!forgotten.is_undone(&key(1), &[8, 7], at(0)), "{of:?}");
            assert!(!forgotten.is_undone(&key(1), &[], at(60)), "{of:?}");
            let other = BlockKey {
                namespace: NamespaceId([2; 16]),
                ..key(1)
            };
            assert!(!forgotten.is_undone(&other, &[], at(0)), "{of:?}");
        }
    }

    #[test]
    fn another_block_is_nobodys_business() {
        let forgotten = Forgotten::default();
        invalidated(&forgotten, 7, Some(1), at(0));
        assert!(!forgotten.is_undone(&key(2), &[], at(0)));
        assert_eq!(forgotten.told(NAMESPACE, &[hash(1), hash(2)], at(0)), [7]);
        assert!(forgotten.told(NAMESPACE, &[hash(2)], at(0)).is_empty());
    }

    #[test]
    fn what_was_invalidated_twice_was_survived_by_who_was_told_twice() {
        let forgotten = Forgotten::default();
        invalidated(&forgotten, 1, Some(1), at(0));
        invalidated(&forgotten, 2, Some(1), at(30));
        assert!(forgotten.is_undone(&key(1), &[1], at(30)));
        assert!(!forgotten.is_undone(&key(1), &[2], at(30)));
        // The first one's time is over, the second's is not.
        invalidated(&forgotten, 3, Some(9), at(70));
        assert!(forgotten.is_undone(&key(1), &[], at(70)));
        invalidated(&forgotten, 4, None, at(71));
        invalidated(&forgotten, 5, None, at(72));
        assert!(forgotten.is_undone(&key(5), &[5], at(72)));
        assert!(!forgotten.is_undone(&key(5), &[4, 5], at(72)));
    }

    #[test]
    fn what_is_not_done_was_not_survived_and_is_refused_already() {
        for of in [Some(hash(1)), None] {
            let forgotten = Forgotten::default();
            forgotten.note(7, NAMESPACE, of, at(0));
            assert!(forgotten.told(NAMESPACE, &[hash(1)], at(0)).is_empty());
            assert!(forgotten.is_undone(&key(1), &[], at(0)));
            forgotten.done(7, NAMESPACE, of);
            assert_eq!(forgotten.told(NAMESPACE, &[hash(1)], at(0)), [7]);
        }
    }

    #[test]
    fn the_tables_are_bounded_and_the_oldest_goes_first() {
        let forgotten = Forgotten::default();
        for n in 0..MAX_BLOCKS as u64 + 1 {
            invalidated(&forgotten, n, Some(n), at(0));
        }
        assert!(!forgotten.is_undone(&key(0), &[], at(0)));
        assert!(forgotten.is_undone(&key(1), &[], at(0)));
        for id in 0..MAX_WHOLE as u64 + 1 {
            invalidated(&forgotten, id, None, at(0));
        }
        let told = forgotten.told(NAMESPACE, &[], at(0));
        assert_eq!(told, (1..=MAX_WHOLE as u64).collect::<Vec<_>>());
    }
}
