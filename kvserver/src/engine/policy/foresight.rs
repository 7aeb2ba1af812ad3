//! wip
use super::{
    BlockId, BlockMeta, EvictionPolicy,
    list::{Links, List},
    outlook::{EPOCHS, Outlook},
};
use std::collections::{HashMap, VecDeque};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Where {
    Absent,
    Listed,
    Parked,
}

#[derive(Clone, Copy)]
struct Node {
    parent: u32,
    children: u32,
    stamp: u64,
    epoch: u32,
    fingerprint: u64,
    class: u16,
    uses: u8,
    origin: u8,
    depth: u8,
    had_child: bool,
    place: Where,
}

struct Ghost {
    class: u16,
    uses: u8,
    stamp: u64,
    epoch: u32,
    serial: u64,
}

const NONE: u32 = u32::MAX;

/// Prefix-aware and self-tuning.
pub struct Foresight {
    links: Links,
    lists: Vec<List>,
    nodes: Vec<Node>,
    ghosts: HashMap<u64, Ghost>,
    order: VecDeque<(u64, u64)>,
    outlook: Outlook,
    now: u64,
    serial: u64,
    next_learn: u64,
    len: usize,
    opts: Opts,
}
struct Opts {
    ghost: usize,
    tail: bool,
    depth: bool,
    origin: bool,
}

fn uses_bucket(u: u8) -> usize {
    match u {
        0 => 0,
        1 => 1,
        2 => 2,
        3..=5 => 3,
        _ => 4,
    }
}
fn depth_bucket(i: u32) -> u8 {
    match i {
        0..=3 => 0,
        4..=15 => 1,
        16..=63 => 2,
        _ => 3,
    }
}

const ORPHAN: usize = 72;
impl Foresight {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            links: Links::default(),
            lists: vec![List::default(); 73],
            nodes: vec![],
            ghosts: HashMap::new(),
            order: VecDeque::new(),
            outlook: Outlook::new(73),
            now: 0,
            serial: 0,
            next_learn: 64,
            len: 0,
            opts: Opts {
                ghost: 4,
                tail: true,
                depth: true,
                origin: true,
            },
        }
    }
    fn class(&self, n: &Node) -> u16 {
        let u = if n.uses > 0 {
            4 + uses_bucket(n.uses)
        } else if self.opts.origin {
            n.origin as usize
        } else {
            0
        };
        let d = if self.opts.depth { n.depth as usize } else { 0 };
        let t = self.opts.tail && n.had_child;
        ((u * 4 + d) * 2 + t as usize) as u16
    }
    fn unlink(&mut self, id: BlockId) {
        let n = self.nodes[id.slot()];
        if n.place == Where::Listed {
            self.links.unlink(&mut self.lists[n.class as usize], id);
        }
    }
    fn link_front(&mut self, id: BlockId) {
        let n = &mut self.nodes[id.slot()];
        n.place = Where::Listed;
        let c = n.class as usize;
        self.links.push_front(&mut self.lists[c], id);
    }
    fn link_back(&mut self, id: BlockId) {
        let n = &mut self.nodes[id.slot()];
        n.place = Where::Listed;
        let c = n.class as usize;
        self.links.push_back(&mut self.lists[c], id);
    }
    fn reclass(&mut self, id: BlockId) {
        let n = self.nodes[id.slot()];
        let c = self.class(&n);
        if c != n.class {
            self.unlink(id);
            // same start, another class: moves with its epoch
            self.outlook.left(n.class as usize, n.epoch);
            let m = &mut self.nodes[id.slot()];
            m.class = c;
            m.epoch = self.outlook.epoch;
            self.outlook.started(c as usize);
            self.link_front(id);
        }
    }
    fn tick(&mut self) {
        self.now += 1;
        if self.now >= self.next_learn {
            self.outlook.learn(self.now);
            self.next_learn = self.now + (self.len as u64 / 8).max(64);
        }
    }
    fn trim(&mut self) {
        while let Some(&(fp, serial)) = self.order.front() {
            let stale = match self.ghosts.get(&fp) {
                Some(g) if g.serial == serial => {
                    if self.order.len() <= self.opts.ghost * self.len.max(1)
                        && self.outlook.epoch - g.epoch < EPOCHS as u32 - 1
                    {
                        return;
                    }
                    false
                }
                _ => true,
            };
            self.order.pop_front();
            if !stale {
                let g = self.ghosts.remove(&fp).unwrap();
                self.outlook.left(g.class as usize, g.epoch);
                self.outlook.ended(g.class as usize, self.now - g.stamp);
            }
        }
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
        self.links.grow(id);
        if id.slot() >= self.nodes.len() {
            self.nodes.resize(
                id.slot() + 1,
                Node {
                    parent: NONE,
                    children: 0,
                    stamp: 0,
                    epoch: 0,
                    fingerprint: 0,
                    class: 0,
                    uses: 0,
                    origin: 0,
                    depth: 0,
                    had_child: false,
                    place: Where::Absent,
                },
            );
        }
        self.tick();
        let mut n = Node {
            parent: NONE,
            children: 0,
            stamp: self.now,
            epoch: self.outlook.epoch,
            fingerprint: meta.fingerprint,
            class: 0,
            uses: 0,
            origin: 0,
            depth: depth_bucket(meta.index),
            had_child: false,
            place: Where::Absent,
        };
        if let Some(g) = self.ghosts.remove(&meta.fingerprint) {
            self.outlook.left(g.class as usize, g.epoch);
            self.outlook.hit(g.class as usize, self.now - g.stamp);
            n.uses = g.uses.saturating_add(1);
        }
        if let Some(p) = meta.parent {
            n.parent = p.0;
            let parent = self.nodes[p.slot()];
            n.origin = if parent.uses == 0 {
                parent.origin
            } else {
                uses_bucket(parent.uses) as u8
            };
            let pn = &mut self.nodes[p.slot()];
            pn.children += 1;
            if !pn.had_child {
                pn.had_child = true;
                self.reclass(p);
            }
        }
        n.class = if meta.parent.is_none() && meta.index > 0 {
            ORPHAN as u16
        } else {
            self.class(&n)
        };
        let class = n.class;
        self.nodes[id.slot()] = n;
        self.outlook.started(class as usize);
        self.link_front(id);
        self.len += 1;
    }
    fn touched(&mut self, ids: &[BlockId]) {
        for &id in ids {
            let Some(&n) = self.nodes.get(id.slot()) else {
                continue;
            };
            if n.place == Where::Absent {
                continue;
            }
            self.unlink(id);
            self.outlook.left(n.class as usize, n.epoch);
            self.outlook.hit(n.class as usize, self.now - n.stamp);
            let m = &mut self.nodes[id.slot()];
            m.uses = m.uses.saturating_add(1);
            m.stamp = self.now;
            m.epoch = self.outlook.epoch;
            let c = self.class(&self.nodes[id.slot()]);
            self.nodes[id.slot()].class = c;
            self.outlook.started(c as usize);
            self.link_front(id);
        }
    }
    fn removed(&mut self, id: BlockId) {
        let n = self.nodes[id.slot()];
        if n.place == Where::Absent {
            return;
        }
        self.unlink(id);
        self.nodes[id.slot()].place = Where::Absent;
        self.len -= 1;
        if n.parent != NONE {
            let p = &mut self.nodes[n.parent as usize];
            p.children -= 1;
            if p.children == 0 && p.place == Where::Parked {
                self.link_back(BlockId(n.parent));
            }
        }
        self.serial += 1;
        self.ghosts.insert(
            n.fingerprint,
            Ghost {
                class: n.class,
                uses: n.uses,
                stamp: n.stamp,
                epoch: n.epoch,
                serial: self.serial,
            },
        );
        self.order.push_back((n.fingerprint, self.serial));
        self.trim();
    }
    fn victim(&mut self, evictable: &mut dyn FnMut(BlockId) -> bool) -> Option<BlockId> {
        loop {
            if let Some(id) = self.lists[ORPHAN].back() {
                if self.nodes[id.slot()].children == 0 && evictable(id) {
                    return Some(id);
                }
            }
            let mut best: Option<(f32, BlockId)> = None;
            for c in 0..self.lists.len() {
                while let Some(id) = self.lists[c].back() {
                    if self.nodes[id.slot()].children > 0 {
                        self.unlink(id);
                        self.nodes[id.slot()].place = Where::Parked;
                        continue;
                    }
                    let ix = self
                        .outlook
                        .index(c, self.now - self.nodes[id.slot()].stamp);
                    if best.is_none_or(|(b, _)| ix < b) {
                        best = Some((ix, id));
                    }
                    break;
                }
            }
            let (_, id) = best?;
            if evictable(id) {
                return Some(id);
            }
            return None;
        }
    }
    fn coldest(&self, _limit: usize, _out: &mut Vec<BlockId>) {}
    fn len(&self) -> usize {
        self.len
    }
}
