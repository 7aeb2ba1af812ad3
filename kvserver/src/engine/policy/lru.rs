//! Least recently used, as the baseline.
//!
//! ```text
//! front (just used) ─ head ─ … ─ tail ─ older chains … ─ back (next victim)
//! ```
//!
//! One list. Engines write a chain head first, which would leave its tail the most recent; so a new block goes
//! right *behind* its parent while that one is fresh, and plain LRU gives up tails before heads.
//! Units: recency counts touches and insertions. Memory: 16 bytes a block.

use super::{
    BlockId, BlockMeta, EvictionPolicy,
    list::{Links, List},
};

/// Least recently used. See the module page.
#[derive(Debug, Default)]
pub struct Lru {
    links: Links,
    list: List,
    /// When each block was last used; 0 for a handle that is not here.
    used: Vec<u64>,
    now: u64,
}

impl Lru {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn holds(&self, id: BlockId) -> bool {
        self.used.get(id.slot()).is_some_and(|used| *used != 0)
    }

    /// A parent used within the last eighth of a turnover carries its child's recency: the child belongs to the
    /// same request. An older one says nothing about a child written now.
    fn fresh_parent(&self, meta: &BlockMeta) -> Option<BlockId> {
        let parent = meta.parent.filter(|parent| self.holds(*parent))?;
        (self.now - self.used[parent.slot()] <= self.list.len() as u64 / 8).then_some(parent)
    }
}

impl EvictionPolicy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn fresh(&self) -> Box<dyn EvictionPolicy> {
        Box::new(Self::new())
    }

    fn inserted(&mut self, id: BlockId, meta: &BlockMeta) {
        self.removed(id);
        self.links.grow(id);
        if id.slot() >= self.used.len() {
            self.used.resize(id.slot() + 1, 0);
        }
        self.now += 1;
        match self.fresh_parent(meta) {
            Some(parent) => {
                self.links.insert_behind(&mut self.list, parent, id);
                self.used[id.slot()] = self.used[parent.slot()];
            }
            None => {
                self.links.push_front(&mut self.list, id);
                self.used[id.slot()] = self.now;
            }
        }
    }

    fn touched(&mut self, ids: &[BlockId]) {
        for &id in ids {
            if self.holds(id) {
                self.now += 1;
                self.links.unlink(&mut self.list, id);
                self.links.push_front(&mut self.list, id);
                self.used[id.slot()] = self.now;
            }
        }
    }

    fn removed(&mut self, id: BlockId) {
        if self.holds(id) {
            self.links.unlink(&mut self.list, id);
            self.used[id.slot()] = 0;
        }
    }

    fn victim(&mut self, evictable: &mut dyn FnMut(BlockId) -> bool) -> Option<BlockId> {
        for _ in 0..self.list.len() {
            let id = self.list.back()?;
            if evictable(id) {
                return Some(id);
            }
            // In use now, which is as recent as it gets; and the next search need not pass it again.
            self.touched(&[id]);
        }
        None
    }

    fn coldest(&self, limit: usize, out: &mut Vec<BlockId>) {
        out.extend(self.links.iter(&self.list).take(limit));
    }

    fn len(&self) -> usize {
        self.list.len()
    }
}
