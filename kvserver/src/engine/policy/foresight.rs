//! Prefix-aware and self-tuning: what goes first is the tail that promises least.
//!
//! ```text
//! class      new                          used in RAM once, twice, 3–5 ×, more
//!            by how often the block it continues had been used: never, once, twice, 3–5 ×, more
//! per class  front (just used) ─ … ─ back: its candidate
//! victim     of all candidates the one of least worth at its age          (outlook.rs)
//! ```
//!
//! * **Tails before heads.** Only a block without a child in RAM is a candidate. One that has children when it
//!   reaches the back of its list is parked, and comes back as a candidate when the last child has gone.
//! * **What is learnt.** A block written under a prefix that was itself used before belongs to a conversation
//!   that goes on; one written under a fresh prefix, to one that may never. How likely each class is to be used
//!   again at each age, and so which list gives next, is learnt from the blocks themselves; no constant
//!   says that either is better. A scan forms a class that never comes back, and goes first.
//! * **Ghosts.** A block that left is remembered by fingerprint until another takes its place in a table of
//!   fixed width, so that the policy learns of uses it could not serve.
//!
//! Orphans, written while their parent is not in RAM, cannot be reached by a lookup and go first of all.
//!
//! Cost: a touch moves links in arrays; a victim compares ten candidates; hashing nowhere but the ghosts' place.
//! Memory: 64 bytes a block, and 96 to 192 for ghosts. Units: time in insertions.
//! Why not one list: recency alone gives a block that was used ten times the same stay as one never used.

use super::{
    BlockId, BlockMeta, EvictionPolicy,
    list::{Links, List},
    outlook::Outlook,
};

/// Uses are told apart as never, once, twice, three to five times, more often.
const USE_STEPS: usize = 5;
/// New blocks by the uses of what they continue; used ones by their own.
const CLASSES: usize = USE_STEPS + USE_STEPS - 1;
/// Not a class to learn about: nothing can use it.
const ORPHAN: u8 = CLASSES as u8;
const ABSENT: u8 = u8::MAX;
/// Epochs of learning in one turnover of the cache.
const EPOCHS_PER_TURNOVER: u64 = 8;
/// No epoch is shorter than this many insertions.
const SHORTEST_EPOCH: u64 = 256;
/// Ghosts per block in RAM, before rounding up to a power of two.
const GHOSTS_PER_BLOCK: usize = 4;

fn use_step(uses: u8) -> u8 {
    match uses {
        0..=2 => uses,
        3..=5 => 3,
        _ => 4,
    }
}

#[derive(Clone, Copy, Debug)]
struct Node {
    fingerprint: u64,
    /// Insertions when it was last used.
    stamp: u64,
    epoch: u32,
    /// Handles are reused: a parent is meant only while its life is the same.
    life: u32,
    parent: Option<(BlockId, u32)>,
    children: u32,
    class: u8,
    /// Use step of what it continues.
    origin: u8,
    uses: u8,
    /// Has children, and left its list for the time being.
    parked: bool,
}

const NOBODY: Node = Node {
    fingerprint: 0,
    stamp: 0,
    epoch: 0,
    life: 0,
    parent: None,
    children: 0,
    class: ABSENT,
    origin: 0,
    uses: 0,
    parked: false,
};

/// A block that left.
#[derive(Clone, Copy, Debug)]
struct Ghost {
    fingerprint: u64,
    /// Low half of the stamp: ghosts do not live for 2^32 insertions.
    stamp: u32,
    epoch: u32,
    class: u8,
    uses: u8,
}

/// The policy. See the module page.
#[derive(Debug)]
pub struct Foresight {
    links: Links,
    /// By class, orphans last.
    lists: [List; CLASSES + 1],
    nodes: Vec<Node>,
    ghosts: Vec<Option<Ghost>>,
    outlook: Outlook,
    now: u64,
    next_epoch: u64,
    len: usize,
}

impl Default for Foresight {
    fn default() -> Self {
        Self::new()
    }
}

impl Foresight {
    /// An empty one, which begins as LRU with tails before heads.
    #[must_use]
    pub fn new() -> Self {
        Self {
            links: Links::default(),
            lists: [List::default(); CLASSES + 1],
            nodes: Vec::new(),
            ghosts: Vec::new(),
            outlook: Outlook::new(CLASSES),
            now: 0,
            next_epoch: SHORTEST_EPOCH,
            len: 0,
        }
    }

    fn holds(&self, id: BlockId) -> bool {
        self.nodes
            .get(id.slot())
            .is_some_and(|node| node.class != ABSENT)
    }

    fn class_of(node: &Node) -> u8 {
        match node.uses {
            0 => node.origin,
            uses => USE_STEPS as u8 - 1 + use_step(uses),
        }
    }

    fn unlist(&mut self, id: BlockId) {
        let node = &self.nodes[id.slot()];
        if !node.parked {
            self.links.unlink(&mut self.lists[node.class as usize], id);
        }
    }

    /// Starts to watch a block in its class, from now on and as the most recent.
    fn start(&mut self, id: BlockId) {
        let (now, epoch) = (self.now, self.outlook.epoch());
        let node = &mut self.nodes[id.slot()];
        (node.stamp, node.epoch, node.parked) = (now, epoch, false);
        let class = node.class as usize;
        if class < CLASSES {
            self.outlook.started(class);
        }
        self.links.push_front(&mut self.lists[class], id);
    }

    fn age(&self, node: &Node) -> u64 {
        self.now - node.stamp
    }

    fn insertion(&mut self) {
        self.now += 1;
        if self.now >= self.next_epoch {
            self.outlook.learn(self.now);
            let epoch = (self.len as u64 / EPOCHS_PER_TURNOVER).max(SHORTEST_EPOCH);
            self.next_epoch = self.now + epoch;
            self.widen_ghosts();
        }
    }

    fn widen_ghosts(&mut self) {
        let width = (self.len * GHOSTS_PER_BLOCK).next_power_of_two();
        if width > self.ghosts.len() {
            let old = std::mem::replace(&mut self.ghosts, vec![None; width]);
            old.into_iter()
                .flatten()
                .for_each(|ghost| self.haunt(ghost));
        }
    }

    /// Remembers a ghost; whoever was in its place is lost from sight.
    fn haunt(&mut self, ghost: Ghost) {
        let place = ghost.fingerprint as usize & self.ghosts.len().wrapping_sub(1);
        let lost = match self.ghosts.get_mut(place) {
            Some(place) => place.replace(ghost),
            None => Some(ghost),
        };
        if let Some(lost) = lost {
            let age = u64::from((self.now as u32).wrapping_sub(lost.stamp));
            self.outlook.ended(lost.class as usize, lost.epoch, age);
        }
    }

    /// The uses of a block that comes back: as a ghost it was waited for, and that counts.
    fn revive(&mut self, fingerprint: u64) -> u8 {
        let place = fingerprint as usize & self.ghosts.len().wrapping_sub(1);
        let ghost = self.ghosts.get_mut(place);
        let Some(ghost) = ghost.and_then(|at| at.take_if(|at| at.fingerprint == fingerprint))
        else {
            return 0;
        };
        let age = u64::from((self.now as u32).wrapping_sub(ghost.stamp));
        self.outlook.hit(ghost.class as usize, ghost.epoch, age);
        ghost.uses.saturating_add(1)
    }

    /// The candidate of a class. Blocks with children that have come to the back are parked on the way.
    fn candidate(&mut self, class: usize) -> Option<BlockId> {
        loop {
            let id = self.lists[class].back()?;
            if self.nodes[id.slot()].children == 0 {
                return Some(id);
            }
            self.unlist(id);
            self.nodes[id.slot()].parked = true;
        }
    }

    /// What keeping the block promises; nothing, for an orphan.
    fn worth(&self, id: BlockId) -> f32 {
        let node = &self.nodes[id.slot()];
        match node.class {
            ORPHAN => -1.0,
            class => self.outlook.worth(class as usize, self.age(node)),
        }
    }

    /// No tail may go: then any block below which only blocks in use remain. Rare, and it looks at every block.
    fn forced(&self, evictable: &mut dyn FnMut(BlockId) -> bool) -> Option<BlockId> {
        let ids = (0..self.nodes.len() as u32).map(BlockId);
        let heads = ids.filter(|id| self.holds(*id) && self.nodes[id.slot()].children > 0);
        heads.into_iter().find(|id| evictable(*id))
    }

    fn least(&mut self) -> Option<BlockId> {
        let mut least: Option<(f32, BlockId)> = None;
        for class in 0..=CLASSES {
            if let Some(id) = self.candidate(class) {
                let worth = self.worth(id);
                if least.is_none_or(|(other, _)| worth < other) {
                    least = Some((worth, id));
                }
            }
        }
        least.map(|(_, id)| id)
    }
}

impl EvictionPolicy for Foresight {
    fn name(&self) -> &'static str {
        "foresight"
    }

    fn fresh(&self) -> Box<dyn EvictionPolicy> {
        Box::new(Self::new())
    }

    fn inserted(&mut self, id: BlockId, meta: &BlockMeta) {
        self.removed(id);
        self.links.grow(id);
        if id.slot() >= self.nodes.len() {
            self.nodes.resize(id.slot() + 1, NOBODY);
        }
        self.insertion();
        let uses = self.revive(meta.fingerprint);
        let parent = meta.parent.filter(|parent| self.holds(*parent));
        let mut origin = 0;
        if let Some(parent) = parent {
            let node = &mut self.nodes[parent.slot()];
            node.children += 1;
            // Blocks written one after the other continue the same thing.
            origin = if node.uses == 0 {
                node.origin
            } else {
                use_step(node.uses)
            };
        }
        let mut node = Node {
            fingerprint: meta.fingerprint,
            life: self.nodes[id.slot()].life.wrapping_add(1),
            parent: parent.map(|parent| (parent, self.nodes[parent.slot()].life)),
            origin,
            uses,
            ..NOBODY
        };
        let orphan = parent.is_none() && meta.index > 0;
        node.class = if orphan {
            ORPHAN
        } else {
            Self::class_of(&node)
        };
        self.nodes[id.slot()] = node;
        self.start(id);
        self.len += 1;
    }

    fn touched(&mut self, ids: &[BlockId]) {
        for &id in ids {
            if !self.holds(id) {
                continue;
            }
            self.unlist(id);
            let age = self.age(&self.nodes[id.slot()]);
            let node = &mut self.nodes[id.slot()];
            if node.class != ORPHAN {
                self.outlook.hit(node.class as usize, node.epoch, age);
            }
            node.uses = node.uses.saturating_add(1);
            node.class = Self::class_of(node);
            self.start(id);
        }
    }

    fn removed(&mut self, id: BlockId) {
        if !self.holds(id) {
            return;
        }
        self.unlist(id);
        let node = self.nodes[id.slot()];
        self.nodes[id.slot()].class = ABSENT;
        self.len -= 1;
        if let Some((parent, life)) = node.parent {
            let above = &mut self.nodes[parent.slot()];
            if above.life == life && above.class != ABSENT {
                above.children -= 1;
                if above.children == 0 && above.parked {
                    // It had come to the back when it was parked.
                    above.parked = false;
                    let class = above.class as usize;
                    self.links.push_back(&mut self.lists[class], parent);
                }
            }
        }
        if node.class != ORPHAN {
            self.haunt(Ghost {
                fingerprint: node.fingerprint,
                stamp: node.stamp as u32,
                epoch: node.epoch,
                class: node.class,
                uses: node.uses,
            });
        }
    }

    fn victim(&mut self, evictable: &mut dyn FnMut(BlockId) -> bool) -> Option<BlockId> {
        let mut refused = Vec::new();
        let found = loop {
            let Some(id) = self.least() else {
                break self.forced(evictable);
            };
            if evictable(id) {
                break Some(id);
            }
            self.unlist(id);
            self.nodes[id.slot()].parked = true;
            refused.push(id);
        };
        // In use now: as recent as it gets, though nobody has looked it up.
        for id in refused {
            let node = &mut self.nodes[id.slot()];
            node.parked = false;
            let class = node.class as usize;
            self.links.push_front(&mut self.lists[class], id);
        }
        found
    }

    fn coldest(&self, limit: usize, out: &mut Vec<BlockId>) {
        let mut classes: Vec<_> = self
            .lists
            .iter()
            .map(|list| self.links.iter(list).peekable())
            .collect();
        for _ in 0..limit {
            let worth = |id: &BlockId| self.worth(*id);
            let next = classes
                .iter_mut()
                .filter_map(|class| class.peek().map(worth).map(|worth| (worth, class)))
                .min_by(|(one, _), (other, _)| one.total_cmp(other));
            let Some((_, class)) = next else { return };
            out.extend(class.next());
        }
    }

    fn len(&self) -> usize {
        self.len
    }
}
