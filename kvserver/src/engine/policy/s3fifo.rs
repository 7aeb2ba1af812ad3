//! S3-FIFO: three queues, no reordering on a hit (Yang et al., SOSP 2023).
//!
//! ```text
//! new ─► small (a tenth) ──used twice──► main ─► unused: out
//!            └─ else: out, remembered ─► ghost ──comes back──► main
//! ```
//!
//! Scan-resistant and blind to prefixes: the baseline that a prefix-aware policy has to beat.
//! Memory: 9 bytes a block, and 8 to 16 for each ghost; as many ghosts as blocks in main.

use std::collections::{HashSet, VecDeque};

use super::{
    BlockId, BlockMeta, EvictionPolicy,
    list::{Links, List},
};

/// Uses beyond the third are not told apart (the paper's two bits).
const MAX_USES: u8 = 3;
/// A block leaves small for main when it was used this often there (the paper's `freq > 1`).
const PROMOTE_USES: u8 = 2;
/// Small holds one block in so many.
const SMALL_SHARE: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    Absent,
    Small,
    Main,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    fingerprint: u64,
    queue: Queue,
    uses: u8,
}

/// S3-FIFO. See the module page.
#[derive(Debug, Default)]
pub struct S3Fifo {
    links: Links,
    small: List,
    main: List,
    nodes: Vec<Node>,
    ghosts: HashSet<u64>,
    ghost_order: VecDeque<u64>,
}

impl S3Fifo {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn queue(&self, id: BlockId) -> Queue {
        self.nodes
            .get(id.slot())
            .map_or(Queue::Absent, |node| node.queue)
    }

    fn push(&mut self, id: BlockId, queue: Queue) {
        self.nodes[id.slot()].queue = queue;
        match queue {
            Queue::Small => self.links.push_front(&mut self.small, id),
            Queue::Main => self.links.push_front(&mut self.main, id),
            Queue::Absent => {}
        }
    }

    fn unlink(&mut self, id: BlockId) {
        match self.queue(id) {
            Queue::Small => self.links.unlink(&mut self.small, id),
            Queue::Main => self.links.unlink(&mut self.main, id),
            Queue::Absent => return,
        }
        self.nodes[id.slot()].queue = Queue::Absent;
    }

    fn remember(&mut self, fingerprint: u64) {
        if self.ghosts.insert(fingerprint) {
            self.ghost_order.push_back(fingerprint);
        }
        while self.ghost_order.len() > self.main.len().max(1) {
            if let Some(oldest) = self.ghost_order.pop_front() {
                self.ghosts.remove(&oldest);
            }
        }
    }
}

impl EvictionPolicy for S3Fifo {
    fn name(&self) -> &'static str {
        "s3fifo"
    }

    fn fresh(&self) -> Box<dyn EvictionPolicy> {
        Box::new(Self::new())
    }

    fn inserted(&mut self, id: BlockId, meta: &BlockMeta) {
        self.removed(id);
        self.links.grow(id);
        if id.slot() >= self.nodes.len() {
            self.nodes.resize(
                id.slot() + 1,
                Node {
                    fingerprint: 0,
                    queue: Queue::Absent,
                    uses: 0,
                },
            );
        }
        self.nodes[id.slot()] = Node {
            fingerprint: meta.fingerprint,
            queue: Queue::Absent,
            uses: 0,
        };
        // A ghost that came back stays in the order until its turn; it is merely no longer known.
        let queue = if self.ghosts.remove(&meta.fingerprint) {
            Queue::Main
        } else {
            Queue::Small
        };
        self.push(id, queue);
    }

    fn touched(&mut self, ids: &[BlockId]) {
        for id in ids {
            if let Some(node) = self.nodes.get_mut(id.slot()) {
                node.uses = (node.uses + 1).min(MAX_USES);
            }
        }
    }

    fn removed(&mut self, id: BlockId) {
        self.unlink(id);
    }

    fn victim(&mut self, evictable: &mut dyn FnMut(BlockId) -> bool) -> Option<BlockId> {
        // Refused blocks wait aside, so that each is asked once; a block in main may come round `MAX_USES` times.
        let mut refused: Vec<(BlockId, Queue)> = Vec::new();
        let found = loop {
            let from_small = self.small.len() * SMALL_SHARE >= self.len() || self.main.len() == 0;
            let small = if from_small { self.small.back() } else { None };
            let Some(id) = small.or(self.main.back()).or(self.small.back()) else {
                break None;
            };
            let Node {
                fingerprint,
                queue,
                uses,
            } = self.nodes[id.slot()];
            let stays = match queue {
                Queue::Small => uses >= PROMOTE_USES,
                _ => uses > 0,
            };
            if stays {
                self.unlink(id);
                self.nodes[id.slot()].uses = if queue == Queue::Main { uses - 1 } else { 0 };
                self.push(id, Queue::Main);
            } else if evictable(id) {
                if queue == Queue::Small {
                    self.remember(fingerprint);
                }
                break Some(id);
            } else {
                self.unlink(id);
                refused.push((id, queue));
            }
        };
        for (id, queue) in refused {
            self.push(id, queue);
        }
        found
    }

    fn coldest(&self, limit: usize, out: &mut Vec<BlockId>) {
        let (small, main) = (self.links.iter(&self.small), self.links.iter(&self.main));
        out.extend(
            small
                .chain(main)
                .filter(|id| self.nodes[id.slot()].uses == 0)
                .take(limit),
        );
    }

    fn len(&self) -> usize {
        self.small.len() + self.main.len()
    }
}
