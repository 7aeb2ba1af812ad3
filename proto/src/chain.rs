//! Consecutive blocks of one chain, and where each of them stands.
//!
//! ```text
//! index        0     1     2     3     4     5     6        run_blocks = 4
//!              └──────── run A ─────┘└────── run B …
//! this chain               parent │  first_index 3, run A, then 4, 5, …
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

/// Consecutive blocks of one chain, root side first, with what is needed to place each of them.
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
}

impl Chain {
    /// A chain from the first block of a prompt on.
    pub fn from_root(hashes: Vec<SequenceHash>) -> Self {
        Self {
            first_index: 0,
            run: None,
            parent: None,
            hashes,
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
        let index = self.first_index + i as u32;
        let into_run = (index % run_blocks) as usize;
        let run = if into_run <= i {
            self.hashes[i - into_run].into()
        } else {
            self.run.expect("a valid chain names the run it starts in")
        };
        let parent = if i == 0 {
            self.parent
        } else {
            Some(self.hashes[i - 1])
        };
        Place { run, index, parent }
    }

    /// The blocks of `range` as a chain of their own.
    ///
    /// # Panics
    ///
    /// As [`Chain::place`], and when `range` is empty or out of range.
    pub fn slice(&self, range: Range<usize>, run_blocks: u32) -> Self {
        assert!(!range.is_empty(), "an empty slice of a chain is no chain");
        let first = self.place(range.start, run_blocks);
        Self {
            first_index: first.index,
            run: (!first.index.is_multiple_of(run_blocks)).then_some(first.run),
            parent: first.parent,
            hashes: self.hashes[range].to_vec(),
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
            _ => Ok(()),
        }
    }
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
    use proptest::prelude::{prop_assert_eq, proptest};

    use super::{Chain, MAX_CHAIN_BLOCKS};
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
