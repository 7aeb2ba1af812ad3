//! Doubly linked lists threaded through arrays that are indexed by handle.
//!
//! A handle is in at most one list at a time, so any number of lists share one pair of arrays: eight bytes a
//! block. Front is the most recent end, back the first to go. All operations are O(1) and touch no hash table.

use super::BlockId;

const NONE: u32 = u32::MAX;

/// The shared arrays.
#[derive(Debug, Default)]
pub(super) struct Links {
    toward_front: Vec<u32>,
    toward_back: Vec<u32>,
}

/// One list; its links live in [`Links`].
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    front: u32,
    back: u32,
    len: u32,
}

impl Default for List {
    fn default() -> Self {
        Self {
            front: NONE,
            back: NONE,
            len: 0,
        }
    }
}

impl List {
    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    pub(super) fn back(&self) -> Option<BlockId> {
        (self.back != NONE).then_some(BlockId(self.back))
    }
}

impl Links {
    /// Makes room for the handle.
    pub(super) fn grow(&mut self, id: BlockId) {
        if id.slot() >= self.toward_front.len() {
            self.toward_front.resize(id.slot() + 1, NONE);
            self.toward_back.resize(id.slot() + 1, NONE);
        }
    }

    pub(super) fn push_front(&mut self, list: &mut List, id: BlockId) {
        self.toward_front[id.slot()] = NONE;
        self.toward_back[id.slot()] = list.front;
        match list.front {
            NONE => list.back = id.0,
            front => self.toward_front[front as usize] = id.0,
        }
        list.front = id.0;
        list.len += 1;
    }

    pub(super) fn push_back(&mut self, list: &mut List, id: BlockId) {
        self.toward_back[id.slot()] = NONE;
        self.toward_front[id.slot()] = list.back;
        match list.back {
            NONE => list.front = id.0,
            back => self.toward_back[back as usize] = id.0,
        }
        list.back = id.0;
        list.len += 1;
    }

    /// Puts `id` right behind `ahead`, one step nearer to the back.
    pub(super) fn insert_behind(&mut self, list: &mut List, ahead: BlockId, id: BlockId) {
        let behind = self.toward_back[ahead.slot()];
        if behind == NONE {
            return self.push_back(list, id);
        }
        self.toward_front[id.slot()] = ahead.0;
        self.toward_back[id.slot()] = behind;
        self.toward_back[ahead.slot()] = id.0;
        self.toward_front[behind as usize] = id.0;
        list.len += 1;
    }

    /// Takes `id` out; it must be in `list`.
    pub(super) fn unlink(&mut self, list: &mut List, id: BlockId) {
        let (front, back) = (self.toward_front[id.slot()], self.toward_back[id.slot()]);
        match front {
            NONE => list.front = back,
            other => self.toward_back[other as usize] = back,
        }
        match back {
            NONE => list.back = front,
            other => self.toward_front[other as usize] = front,
        }
        list.len -= 1;
    }

    /// The neighbour one step nearer to the front.
    pub(super) fn ahead(&self, id: BlockId) -> Option<BlockId> {
        let ahead = self.toward_front[id.slot()];
        (ahead != NONE).then_some(BlockId(ahead))
    }

    /// From the back, the first to go, to the front.
    pub(super) fn iter<'a>(&'a self, list: &List) -> impl Iterator<Item = BlockId> + use<'a> {
        std::iter::successors(list.back(), |id| self.ahead(*id))
    }
}
