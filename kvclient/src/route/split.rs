//! A chain split by owner, and what belongs to it grouped the same way.
//!
//! ```text
//! positions  0 1 2 3 │ 4 5 6 7 │ 8 9 10 11 │ 12 13        runs of 4
//! owners     m       │ k       │ m         │ m
//! shares     m: 0..4, 8..14    k: 4..8                    in the order of their first blocks
//! ```
//!
//! Units: positions in the chain.
//! Errors: none.

use std::ops::Range;

use kvproto::{Chain, key::RunHash};

/// The blocks of a chain that one member is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The member's number (see [`super::Table::members`]).
    pub member: usize,
    /// Positions of its blocks, ascending, none touching the next.
    pub ranges: Vec<Range<usize>>,
}

impl Share {
    /// Blocks of it.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).sum()
    }

    /// The position of its first block.
    #[must_use]
    pub fn first(&self) -> usize {
        self.ranges[0].start
    }

    /// The position of its block `i`; `None` behind its last.
    #[must_use]
    pub fn position(&self, i: usize) -> Option<usize> {
        let mut left = i;
        for range in &self.ranges {
            if left < range.len() {
                return Some(range.start + left);
            }
            left -= range.len();
        }
        None
    }

    /// How many of its blocks stand before position `end`.
    #[must_use]
    pub fn before(&self, end: usize) -> usize {
        let cut = |range: &Range<usize>| range.end.min(end).saturating_sub(range.start);
        self.ranges.iter().map(cut).sum()
    }

    /// Its blocks as a chain to ask for.
    #[must_use]
    pub fn chain(&self, whole: &Chain, run_blocks: u32) -> Chain {
        whole.select(self.ranges.iter().cloned(), run_blocks)
    }
}

/// A chain, split by owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Each member once, in the order of their first blocks.
    pub shares: Vec<Share>,
    /// Blocks in all.
    pub blocks: usize,
}

impl Split {
    /// Splits the blocks of `chain` by what `owner` says of their runs.
    pub fn new(chain: &Chain, run_blocks: u32, mut owner: impl FnMut(&RunHash) -> usize) -> Self {
        let mut split = Self {
            shares: Vec::new(),
            blocks: chain.len(),
        };
        for (run, range) in chain.runs(run_blocks) {
            split.push(owner(&run), range);
        }
        split
    }

    /// Splits by what is said of each position; `None`: nobody is asked for it.
    pub fn of(members: impl IntoIterator<Item = Option<usize>>) -> Self {
        let mut split = Self::default();
        for member in members {
            let at = split.blocks;
            split.blocks += 1;
            if let Some(member) = member {
                split.push(member, at..at + 1);
            }
        }
        split
    }

    fn push(&mut self, member: usize, range: Range<usize>) {
        let share = self.shares.iter_mut().find(|share| share.member == member);
        let Some(share) = share else {
            self.shares.push(Share {
                member,
                ranges: vec![range],
            });
            return;
        };
        match share.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => share.ranges.push(range),
        }
    }

    /// Of each position the share that it is in; `None` for positions that were not wanted.
    #[must_use]
    pub fn shares_by_position(&self) -> Vec<Option<usize>> {
        let mut by_position = vec![None; self.blocks];
        for (number, share) in self.shares.iter().enumerate() {
            for range in &share.ranges {
                by_position[range.clone()].fill(Some(number));
            }
        }
        by_position
    }
}
