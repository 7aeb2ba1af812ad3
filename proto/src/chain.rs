//! Blocks of one chain, and where each of them stands.
//!
//! ```text
//! index        0     1     2     3     4     5     6        run_blocks = 4
//!              └──────── run A ─────┘└────── run B …
//! this chain               parent │  first_index 3, run A, then 4, 5, …
//! ```
//!
//! Blocks here are consecutive, but for jumps: in a cluster the runs of a chain lie with several owners, and each is asked
//! for its own alone. The prefix of a chain with jumps is that of the blocks here, one after the other.
//!
//! ```text
//! index        0     1     2     3                 8     9    10        run_blocks = 4
//!              └──────── run A ─────┘              └── run C ─┘         one owner has A and C
//! jump                                         at 4, index 8, parent: the block at 7
//! ```
//!
//! Shape: at least one block and at most [`MAX_CHAIN_BLOCKS`] in a request. A chain that begins inside a run must
//! say where the run begins, and one that begins after index 0 what stands before it: then every block has
//! a [`Place`], even when its hash is an engine's own.
//! Errors: [`FieldError`] from [`Chain::validate`], by the field of the wire's `Chain`.

use std::ops::Range;

use crate::field::FieldError;
use crate::key::{Place, RunHash, SequenceHash};

/// Most blocks one chain of a request may have: a million tokens in blocks of 16.
///
/// Whoever has more asks for the first ones, and for the rest ([`Chain::slice`]) only when all of those are
/// present. It is not done for the caller, because each of the calls answers a lease of its own.
pub const MAX_CHAIN_BLOCKS: usize = 65_536;

/// From one block of a [`Chain`] to the next, past blocks that are not named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jump {
    /// Position among the blocks here of the first one behind it; at least 1.
    pub at: u32,
    /// Index in the chain of that block.
    pub index: u32,
    /// Start of the run that holds it; `None` exactly when it starts a run.
    pub run: Option<RunHash>,
    /// The block before it in the chain.
    pub parent: SequenceHash,
}

/// Blocks of one chain, root side first, with what is needed to place each of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Index in the chain of the first block here.
    pub first_index: u32,
    /// Start of the run that holds the first block; `None` exactly when the first block starts a run.
    pub run: Option<RunHash>,
    /// The block before the first; `None` exactly at index 0.
    pub parent: Option<SequenceHash>,
    /// The blocks' hashes.
    pub hashes: Vec<SequenceHash>,
    /// Where blocks are left out, in order; empty for consecutive ones.
    pub jumps: Vec<Jump>,
}

impl Chain {
    /// A chain from the first block of a prompt on.
    pub fn from_root(hashes: Vec<SequenceHash>) -> Self {
        Self {
            first_index: 0,
            run: None,
            parent: None,
            hashes,
            jumps: Vec::new(),
        }
    }

    /// Blocks here.
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// True when no block is here; such a chain is not valid in a request.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Where block `i` of those here stands.
    ///
    /// # Panics
    ///
    /// When `i` is out of range, `run_blocks` is 0, or the chain is not valid for `run_blocks`.
    pub fn place(&self, i: usize, run_blocks: u32) -> Place {
        assert!(
            i < self.hashes.len(),
            "block {i} of a chain of {}",
            self.hashes.len()
        );
        let stretch = self.stretch(i);
        let into_stretch = i - stretch.at;
        let index = stretch.index + into_stretch as u32;
        let into_run = (index % run_blocks) as usize;
        let run = if into_run <= into_stretch {
            self.hashes[i - into_run].into()
        } else {
            stretch
                .run
                .expect("a valid chain names the run it starts in")
        };
        let parent = if into_stretch == 0 {
            stretch.parent
        } else {
            Some(self.hashes[i - 1])
        };
        Place { run, index, parent }
    }

    /// The runs of the blocks here, in order: which run, and where its blocks are. A run with blocks left out comes
    /// once per stretch.
    ///
    /// # Panics
    ///
    /// When `run_blocks` is 0, or the chain is not valid for it.
    pub fn runs(&self, run_blocks: u32) -> impl Iterator<Item = (RunHash, Range<usize>)> {
        let mut from = 0;
        std::iter::from_fn(move || {
            if from == self.hashes.len() {
                return None;
            }
            let place = self.place(from, run_blocks);
            let of_run = (run_blocks - place.index % run_blocks) as usize;
            let behind = self.jumps.partition_point(|jump| jump.at as usize <= from);
            let end = self
                .jumps
                .get(behind)
                .map_or(self.hashes.len(), |jump| jump.at as usize);
            let range = from..end.min(from + of_run);
            from = range.end;
            Some((place.run, range))
        })
    }

    /// The consecutive blocks that block `i` is among.
    fn stretch(&self, i: usize) -> Stretch {
        let behind = self.jumps.partition_point(|jump| jump.at as usize <= i);
        match behind.checked_sub(1).map(|jump| self.jumps[jump]) {
            None => Stretch {
                at: 0,
                index: self.first_index,
                run: self.run,
                parent: self.parent,
            },
            Some(jump) => Stretch {
                at: jump.at as usize,
                index: jump.index,
                run: jump.run,
                parent: Some(jump.parent),
            },
        }
    }

    /// Ends of the consecutive blocks here, in order; the last one is the chain's.
    fn stretch_ends(&self) -> impl Iterator<Item = usize> {
        let jumps = self.jumps.iter().map(|jump| jump.at as usize);
        jumps.chain([self.hashes.len()])
    }

    /// The blocks of `range` as a chain of their own.
    ///
    /// # Panics
    ///
    /// As [`Chain::place`], and when `range` is empty or out of range.
    pub fn slice(&self, range: Range<usize>, run_blocks: u32) -> Self {
        self.select([range], run_blocks)
    }

    /// The blocks of several ranges, in ascending order and apart, as one chain with jumps.
    ///
    /// # Panics
    ///
    /// As [`Chain::place`], and when there is no range, or one is empty or out of range.
    pub fn select(&self, ranges: impl IntoIterator<Item = Range<usize>>, run_blocks: u32) -> Self {
        let mut picked = Self::from_root(Vec::new());
        // Index in the chain of the block behind the last one picked.
        let mut next = None;
        for range in ranges {
            assert!(!range.is_empty(), "an empty slice of a chain is no chain");
            let mut from = range.start;
            for end in self.stretch_ends() {
                let to = end.min(range.end);
                if to <= from {
                    continue;
                }
                let place = self.place(from, run_blocks);
                picked.begin(place, next, run_blocks);
                picked.hashes.extend_from_slice(&self.hashes[from..to]);
                next = Some(place.index + (to - from) as u32);
                from = to;
            }
        }
        assert!(!picked.is_empty(), "a choice of no blocks is no chain");
        picked
    }

    /// Says where the block stands that comes next here; `next` is the index of the one that would need no saying.
    fn begin(&mut self, place: Place, next: Option<u32>, run_blocks: u32) {
        let run = (!place.index.is_multiple_of(run_blocks)).then_some(place.run);
        if self.hashes.is_empty() {
            (self.first_index, self.run, self.parent) = (place.index, run, place.parent);
        } else if next != Some(place.index) {
            self.jumps.push(Jump {
                at: self.hashes.len() as u32,
                index: place.index,
                run,
                parent: place
                    .parent
                    .expect("only the first block of a chain has none"),
            });
        }
    }

    /// Checks that every block here has a place.
    ///
    /// # Errors
    ///
    /// Names the wire field of `Chain` that is wrong.
    pub fn validate(&self, run_blocks: u32) -> Result<(), FieldError> {
        let problem = |field, problem: &str| Err(FieldError::new(field, problem));
        match self.hashes.len() {
            0 => return problem("chain.hashes", "is empty; name at least one block"),
            n if n > MAX_CHAIN_BLOCKS => return Err(too_long(n)),
            n if self.first_index.checked_add(n as u32).is_none() => {
                return problem(
                    "chain.first_index",
                    "leaves no room for the chain's indices in 32 bits",
                );
            }
            _ => {}
        }
        match (self.first_index, self.parent) {
            (0, Some(_)) => return problem("chain.parent_hash", "must be empty at first_index 0"),
            (1.., None) => {
                return problem(
                    "chain.parent_hash",
                    "is missing; only first_index 0 has no parent",
                );
            }
            _ => {}
        }
        match (self.first_index.checked_rem(run_blocks), self.run) {
            (None, _) => problem("spec.run_blocks", "must be at least 1"),
            (Some(0), Some(_)) => problem(
                "chain.run_hash",
                "must be empty where the first block starts a run",
            ),
            (Some(1..), None) => problem(
                "chain.run_hash",
                "is missing; the first block does not start a run",
            ),
            _ => self.validate_jumps(run_blocks),
        }
    }

    fn validate_jumps(&self, run_blocks: u32) -> Result<(), FieldError> {
        let problem = |field, problem: &str| Err(FieldError::new(field, problem));
        let (mut at, mut next) = (0, self.first_index);
        for jump in &self.jumps {
            if jump.at <= at || jump.at as usize >= self.hashes.len() {
                return problem(
                    "chain.jumps.at",
                    "must be positions of blocks behind the first, in ascending order",
                );
            }
            // The first block's index leaves room for all; a jump's must leave room for those behind it.
            let before = next.saturating_add(jump.at - at);
            let left = self.hashes.len() as u32 - jump.at;
            if jump.index <= before || jump.index.checked_add(left).is_none() {
                return problem(
                    "chain.jumps.index",
                    "must lie beyond the block before it and leave room for those behind it",
                );
            }
            if jump.index.is_multiple_of(run_blocks) == jump.run.is_some() {
                return problem(
                    "chain.jumps.run_hash",
                    "must be empty exactly where the block starts a run",
                );
            }
            (at, next) = (jump.at, jump.index);
        }
        Ok(())
    }
}

/// Consecutive blocks of a chain, and where the first of them stands.
struct Stretch {
    at: usize,
    index: u32,
    run: Option<RunHash>,
    parent: Option<SequenceHash>,
}

/// The refusal of a chain of so many blocks.
pub(crate) fn too_long(blocks: usize) -> FieldError {
    let problem = format!(
        "has {blocks} blocks; at most {MAX_CHAIN_BLOCKS} are allowed in a call: ask for the first of them, then \
         for the rest as a chain of its own (first_index, run_hash, parent_hash)"
    );
    FieldError::new("chain.hashes", problem)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::{Chain, Jump, MAX_CHAIN_BLOCKS};
    use crate::hash::{NamespaceKey, chain};
    use crate::key::SequenceHash;

    proptest! {
        #[test]
        fn slices_keep_every_place(
            blocks in 1usize..60, run_blocks in 1u32..9, first in 0usize..60, len in 1usize..60,
        ) {
            let chain = Chain::from_root(chain(&NamespaceKey::from_bytes([7; 32]), 1, &(0..blocks as u32).collect::<Vec<_>>()));
            let first = first % blocks;
            let range = first..(first + len).min(blocks);
            let slice = chain.slice(range.clone(), run_blocks);
            prop_assert_eq!(slice.validate(run_blocks), Ok(()));
            for (i, at) in range.clone().enumerate() {
                prop_assert_eq!(slice.place(i, run_blocks), chain.place(at, run_blocks));
            }
            let half = slice.len() / 2;
            if half > 0 {
                let twice = slice.slice(half..slice.len(), run_blocks);
                prop_assert_eq!(twice, chain.slice(range.start + half..range.end, run_blocks));
            }
        }
    }

    proptest! {
        #[test]
        fn chosen_blocks_keep_every_place_and_can_be_cut_again(
            blocks in 1usize..80, run_blocks in 1u32..9, chosen in vec(any::<bool>(), 80), cut in any::<(usize, usize)>(),
        ) {
            let tokens: Vec<u32> = (0..blocks as u32).collect();
            let chain = Chain::from_root(chain(&NamespaceKey::from_bytes([7; 32]), 1, &tokens));
            let at: Vec<usize> = (0..blocks).filter(|i| chosen[*i]).collect();
            if !at.is_empty() {
                let picked = chain.select(at.iter().map(|i| *i..i + 1), run_blocks);
                prop_assert_eq!(picked.validate(run_blocks), Ok(()));
                prop_assert_eq!(picked.len(), at.len());
                let jumps = at.windows(2).filter(|pair| pair[0] + 1 < pair[1]).count();
                prop_assert_eq!(picked.jumps.len(), jumps);
                for (i, at) in at.iter().enumerate() {
                    prop_assert_eq!(picked.hashes[i], chain.hashes[*at]);
                    prop_assert_eq!(picked.place(i, run_blocks), chain.place(*at, run_blocks));
                }
                let mut next = 0;
                for (run, range) in picked.runs(run_blocks) {
                    prop_assert_eq!(range.start, next);
                    prop_assert!(range.clone().all(|i| picked.place(i, run_blocks).run == run));
                    next = range.end;
                }
                prop_assert_eq!(next, picked.len());
                let from = cut.0 % at.len();
                let to = from + 1 + cut.1 % (at.len() - from);
                let again = chain.select(at[from..to].iter().map(|i| *i..i + 1), run_blocks);
                prop_assert_eq!(picked.slice(from..to, run_blocks), again);
            }
        }
    }

    #[test]
    fn jumps_that_go_back_or_hide_their_run_are_refused() {
        let hash = SequenceHash([1; 32]);
        let jump = |at, index, run: bool| Jump {
            at,
            index,
            run: run.then_some(hash.into()),
            parent: hash,
        };
        let field = |jumps: Vec<Jump>| {
            let chain = Chain {
                jumps,
                ..Chain::from_root(vec![hash; 6])
            };
            chain.validate(4).err().map(|error| error.field)
        };
        assert_eq!(field(vec![jump(2, 4, false), jump(4, 9, true)]), None);
        for at in [0, 6, 7] {
            assert_eq!(field(vec![jump(at, 8, false)]), Some("chain.jumps.at"));
        }
        let twice = vec![jump(2, 4, false), jump(2, 8, false)];
        assert_eq!(field(twice), Some("chain.jumps.at"));
        for index in [0, 2, u32::MAX] {
            let jumps = vec![jump(2, index, true)];
            assert_eq!(field(jumps), Some("chain.jumps.index"), "{index}");
        }
        assert_eq!(field(vec![jump(2, 4, true)]), Some("chain.jumps.run_hash"));
        assert_eq!(field(vec![jump(2, 5, false)]), Some("chain.jumps.run_hash"));
    }

    #[test]
    fn a_chain_that_hides_its_run_or_parent_is_refused() {
        let hash = SequenceHash([1; 32]);
        let root = Chain::from_root(vec![hash; 3]);
        assert_eq!(root.validate(4), Ok(()));
        let field = |chain: Chain| chain.validate(4).unwrap_err().field;
        assert_eq!(
            field(Chain {
                parent: Some(hash),
                ..root.clone()
            }),
            "chain.parent_hash"
        );
        assert_eq!(
            field(Chain {
                run: Some(hash.into()),
                ..root.clone()
            }),
            "chain.run_hash"
        );
        assert_eq!(
            field(Chain {
                first_index: 4,
                ..root.clone()
            }),
            "chain.parent_hash"
        );
        assert_eq!(
            field(Chain {
                first_index: 5,
                parent: Some(hash),
                ..root.clone()
            }),
            "chain.run_hash"
        );
        assert_eq!(
            field(Chain {
                first_index: u32::MAX - 1,
                parent: Some(hash),
                ..root.clone()
            }),
            "chain.first_index"
        );
        assert_eq!(field(Chain::from_root(Vec::new())), "chain.hashes");
        assert_eq!(
            field(Chain::from_root(vec![hash; MAX_CHAIN_BLOCKS + 1])),
            "chain.hashes"
        );
        assert_eq!(root.validate(0).unwrap_err().field, "spec.run_blocks");
    }
}
