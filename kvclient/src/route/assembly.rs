//! The longest prefix, out of what each owner answers for its share.
//!
//! ```text
//! share A  0..4, 8..12    answered 8 of 8
//! share B  4..8           answered 2 of 4  ─► the prefix ends at 6; who has only blocks behind 6 need not be waited for
//! share C  12..16         asked
//! ```
//!
//! Units: positions in the chain.
//! Errors: none; who is lost has nothing.

use super::Split;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Asked,
    /// So many of its leading blocks are there.
    Answered(usize),
    Lost,
}

/// The answers so far.
#[derive(Clone, Debug)]
pub struct Assembly<'a> {
    split: &'a Split,
    states: Vec<State>,
}

impl<'a> Assembly<'a> {
    /// All shares are asked, none has answered.
    #[must_use]
    pub fn new(split: &'a Split) -> Self {
        Self {
            split,
            states: vec![State::Asked; split.shares.len()],
        }
    }

    /// So many leading blocks of share `number` are there.
    pub fn answered(&mut self, number: usize, blocks: usize) {
        self.states[number] = State::Answered(blocks);
    }

    /// Nobody answers for share `number`.
    pub fn lost(&mut self, number: usize) {
        self.states[number] = State::Lost;
    }

    /// Whether share `number` has neither answered nor been lost.
    #[must_use]
    pub fn is_asked(&self, number: usize) -> bool {
        self.states[number] == State::Asked
    }

    /// Blocks of the prefix that cannot be lengthened any more: whoever is asked answers for everything.
    #[must_use]
    pub fn most(&self) -> usize {
        self.end(|state| match state {
            State::Asked => None,
            State::Answered(blocks) => Some(blocks),
            State::Lost => Some(0),
        })
    }

    /// Blocks of the prefix by what is answered: whoever is asked has nothing.
    #[must_use]
    pub fn prefix(&self) -> usize {
        self.end(|state| match state {
            State::Answered(blocks) => Some(blocks),
            State::Asked | State::Lost => Some(0),
        })
    }

    /// Whether no answer that is still out can lengthen the prefix.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let most = self.most();
        let pairs = self.split.shares.iter().zip(&self.states);
        let mut asked = pairs.filter(|(_, state)| **state == State::Asked);
        asked.all(|(share, _)| share.first() >= most)
    }

    /// The first position that some share lacks, when `present` says how many leading blocks of a share are there
    /// (`None`: all).
    fn end(&self, present: impl Fn(State) -> Option<usize>) -> usize {
        let gaps = self.split.shares.iter().zip(&self.states);
        let gaps = gaps.filter_map(|(share, state)| share.position(present(*state)?));
        gaps.min().unwrap_or(self.split.blocks)
    }

    /// What goes by stretches of each share's blocks (`of` one share, from its first block on), by stretches of the
    /// chain's first `blocks`.
    #[must_use]
    pub fn stretches<T: Copy + PartialEq>(
        &self,
        blocks: usize,
        of: &[Vec<(u32, T)>],
    ) -> Vec<(u32, T)> {
        let mut whole: Vec<(usize, u32, T)> = Vec::new();
        for (share, stretches) in self.split.shares.iter().zip(of) {
            let mut positions = share.ranges.iter().cloned().flatten();
            for (length, what) in stretches {
                let of_stretch = positions.by_ref().take(*length as usize);
                for position in of_stretch.take_while(|position| *position < blocks) {
                    match whole.last_mut() {
                        Some((start, length, last))
                            if *start + *length as usize == position && last == what =>
                        {
                            *length += 1;
                        }
                        _ => whole.push((position, 1, *what)),
                    }
                }
            }
        }
        whole.sort_unstable_by_key(|(start, ..)| *start);
        let mut merged: Vec<(u32, T)> = Vec::with_capacity(whole.len());
        for (_, length, what) in whole {
            match merged.last_mut() {
                Some((so_far, last)) if *last == what => *so_far += length,
                _ => merged.push((length, what)),
            }
        }
        merged
    }
}
