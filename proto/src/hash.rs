//! Chained block hashes.
//!
//! ```text
//! tokens ─cut─► block 0 ──► block 1 ──► block 2
//!                  │           │           │
//! key ─────────► hash 0 ───► hash 1 ───► hash 2      hash i covers everything up to block i
//! ```
//!
//! One hash is BLAKE3, keyed by the namespace, over
//!
//! ```text
//! frame("terrace/block/v1") │ frame(parent hash, or nothing) │ count u32 │ tokens u32 each
//!                           │ count u32 │ frame(extra key) each
//! ```
//!
//! and an engine's own hash becomes ours over `frame("terrace/other/v1") │ frame(opaque bytes)`, where
//! `frame(x)` is the length of x in bytes, u32, and then x. Integers are little-endian.
//!
//! Shape: a prompt of n tokens gives floor(n / `block_tokens`) hashes of 32 bytes.
//! Errors: none; every input has a hash.
//! Why a chain: equal hashes mean equal *prefixes*, so a lookup stops at the first gap. Why keyed: what one
//! tenant can compute says nothing about another's blocks. Why frames: no two inputs share their bytes, so
//! a token can never be taken for the start of an extra key. With 16 tokens and no extra keys the input
//! is 128 bytes, two BLAKE3 compressions.

use std::fmt;
use std::ops::Range;

use crate::field::FieldError;
use crate::key::{Place, RunHash, SequenceHash};
use crate::token;

/// Most blocks one chain of a request may have.
pub const MAX_CHAIN_BLOCKS: usize = 65_536;

const BLOCK_DOMAIN: &[u8; 16] = b"terrace/block/v1";
const ENGINE_DOMAIN: &[u8; 16] = b"terrace/other/v1";

/// The BLAKE3 key of every hash in one namespace. Whoever has it can name blocks; `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct NamespaceKey([u8; 32]);

impl NamespaceKey {
    /// Width in bytes.
    pub const BYTES: usize = 32;

    /// The key of these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key's bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for NamespaceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NamespaceKey(hidden)")
    }
}

/// The hash of one block after `parent` (`None`: it is the first).
///
/// `extra` are the block's extra keys in the engine's order: LoRA digest, multimodal content hash, cache
/// salt, adapter version.
///
/// # Panics
///
/// When an extra key is 4 GiB or longer.
pub fn next(
    key: &NamespaceKey,
    parent: Option<&SequenceHash>,
    tokens: &[u32],
    extra: &[&[u8]],
) -> SequenceHash {
    next_into(&mut Vec::new(), key, parent, tokens, extra)
}

/// The hashes of every full block of `tokens`.
///
/// ```
/// use kvproto::hash::{NamespaceKey, chain};
/// let key = NamespaceKey::from_bytes([7; 32]);
/// let tokens: Vec<u32> = (0..100).collect();
/// let hashes = chain(&key, 16, &tokens);
/// assert_eq!(hashes.len(), 6);
/// assert_eq!(hashes[..3], chain(&key, 16, &tokens[..48]));
/// ```
///
/// # Panics
///
/// When `block_tokens` is 0, which no namespace allows.
pub fn chain(key: &NamespaceKey, block_tokens: u32, tokens: &[u32]) -> Vec<SequenceHash> {
    chain_with(key, block_tokens, tokens, |_| &[])
}

/// As [`chain`], with the extra keys of block i from `extra(i)`.
///
/// # Panics
///
/// When `block_tokens` is 0 or an extra key is 4 GiB or longer.
pub fn chain_with<'a>(
    key: &NamespaceKey,
    block_tokens: u32,
    tokens: &[u32],
    extra: impl FnMut(usize) -> &'a [&'a [u8]],
) -> Vec<SequenceHash> {
    extend_with(key, None, block_tokens, tokens, extra)
}

/// As [`chain_with`], for the tokens that follow `parent`: how a chain grows while an engine decodes.
///
/// # Panics
///
/// When `block_tokens` is 0 or an extra key is 4 GiB or longer.
pub fn extend_with<'a>(
    key: &NamespaceKey,
    mut parent: Option<SequenceHash>,
    block_tokens: u32,
    tokens: &[u32],
    mut extra: impl FnMut(usize) -> &'a [&'a [u8]],
) -> Vec<SequenceHash> {
    let mut scratch = Vec::new();
    token::blocks(tokens, block_tokens)
        .enumerate()
        .map(|(i, block)| {
            let hash = next_into(&mut scratch, key, parent.as_ref(), block, extra(i));
            parent = Some(hash);
            hash
        })
        .collect()
}

/// Folds an engine's own hash, opaque bytes of any length, into the namespace.
///
/// # Panics
///
/// When `opaque` is 4 GiB or longer.
pub fn engine(key: &NamespaceKey, opaque: &[u8]) -> SequenceHash {
    let mut input = Vec::with_capacity(24 + opaque.len());
    frame(&mut input, ENGINE_DOMAIN);
    frame(&mut input, opaque);
    SequenceHash(*blake3::keyed_hash(&key.0, &input).as_bytes())
}

fn next_into(
    input: &mut Vec<u8>,
    key: &NamespaceKey,
    parent: Option<&SequenceHash>,
    tokens: &[u32],
    extra: &[&[u8]],
) -> SequenceHash {
    input.clear();
    frame(input, BLOCK_DOMAIN);
    frame(input, parent.map_or(&[], |hash| &hash.0));
    count(input, tokens.len());
    input.reserve(4 * tokens.len() + 4);
    for token in tokens {
        input.extend_from_slice(&token.to_le_bytes());
    }
    count(input, extra.len());
    for key in extra {
        frame(input, key);
    }
    SequenceHash(*blake3::keyed_hash(&key.0, input).as_bytes())
}

/// Appends the length of `bytes` and `bytes`.
pub(crate) fn frame(input: &mut Vec<u8>, bytes: &[u8]) {
    count(input, bytes.len());
    input.extend_from_slice(bytes);
}

fn count(input: &mut Vec<u8>, len: usize) {
    let len = u32::try_from(len).expect("what is hashed into a name is shorter than 4 GiB");
    input.extend_from_slice(&len.to_le_bytes());
}

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
            n if n > MAX_CHAIN_BLOCKS => {
                return problem(
                    "chain.hashes",
                    &format!("has {n} blocks; at most {MAX_CHAIN_BLOCKS} are allowed"),
                );
            }
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert_eq, prop_assert_ne, proptest};

    use super::{Chain, NamespaceKey, SequenceHash, chain, chain_with, engine, extend_with, next};

    const KEY: NamespaceKey = NamespaceKey::from_bytes([7; 32]);

    proptest! {
        #[test]
        fn prefix_of_a_chain_is_the_chain_of_the_prefix(
            tokens in vec(any::<u32>(), 0..200), block in 1u32..20, cut in 0usize..200,
        ) {
            let cut = cut.min(tokens.len());
            let whole = chain(&KEY, block, &tokens);
            let prefix = chain(&KEY, block, &tokens[..cut]);
            prop_assert_eq!(&whole[..prefix.len()], &prefix[..]);
        }

        #[test]
        fn a_chain_grows_from_its_last_hash(tokens in vec(any::<u32>(), 32..200), cut in 1usize..4) {
            let whole = chain(&KEY, 8, &tokens);
            let rest = extend_with(&KEY, Some(whole[cut - 1]), 8, &tokens[8 * cut..], |_| &[]);
            prop_assert_eq!(&whole[cut..], &rest[..]);
        }

        #[test]
        fn another_token_changes_every_hash_after_it(
            tokens in vec(any::<u32>(), 8..64), at in 0usize..64,
        ) {
            let at = at % (tokens.len() / 4 * 4);
            let mut other = tokens.clone();
            other[at] ^= 1;
            let (a, b) = (chain(&KEY, 4, &tokens), chain(&KEY, 4, &other));
            prop_assert_eq!(&a[..at / 4], &b[..at / 4]);
            for (a, b) in a[at / 4..].iter().zip(&b[at / 4..]) {
                prop_assert_ne!(a, b);
            }
        }

        #[test]
        fn extra_keys_frame_unambiguously(
            tokens in vec(any::<u32>(), 1..6),
            a in vec(vec(any::<u8>(), 0..6), 0..4),
            b in vec(vec(any::<u8>(), 0..6), 0..4),
        ) {
            let hash = |extra: &[Vec<u8>]| {
                let extra: Vec<&[u8]> = extra.iter().map(Vec::as_slice).collect();
                next(&KEY, None, &tokens, &extra)
            };
            prop_assert_eq!(hash(&a) == hash(&b), a == b);
        }

        #[test]
        fn slices_keep_every_place(
            blocks in 1usize..60, run_blocks in 1u32..9, first in 0usize..60, len in 1usize..60,
        ) {
            let chain = Chain::from_root(chain(&KEY, 1, &(0..blocks as u32).collect::<Vec<_>>()));
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
    fn moving_a_boundary_between_extra_keys_changes_the_hash() {
        let tokens = [1, 2, 3];
        let one = next(&KEY, None, &tokens, &[b"ab", b"c"]);
        assert_ne!(one, next(&KEY, None, &tokens, &[b"a", b"bc"]));
        assert_ne!(one, next(&KEY, None, &tokens, &[b"abc"]));
        assert_ne!(
            next(&KEY, None, &tokens, &[]),
            next(&KEY, None, &tokens, &[b""])
        );
    }

    #[test]
    fn extra_keys_of_one_block_reach_all_after_it() {
        let tokens: Vec<u32> = (0..16).collect();
        let salt: &[&[u8]] = &[b"salt"];
        let salted = chain_with(&KEY, 4, &tokens, |i| if i == 1 { salt } else { &[] });
        let plain = chain(&KEY, 4, &tokens);
        assert_eq!(salted[0], plain[0]);
        assert!((1..4).all(|i| salted[i] != plain[i]));
    }

    #[test]
    fn keys_and_domains_separate() {
        let other = NamespaceKey::from_bytes([8; 32]);
        assert_ne!(engine(&KEY, b"x"), engine(&other, b"x"));
        assert_ne!(chain(&KEY, 1, &[1]), chain(&other, 1, &[1]));
        assert_ne!(engine(&KEY, b""), next(&KEY, None, &[], &[]));
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
            field(Chain::from_root(vec![hash; super::MAX_CHAIN_BLOCKS + 1])),
            "chain.hashes"
        );
        assert_eq!(root.validate(0).unwrap_err().field, "spec.run_blocks");
    }

    #[test]
    fn debug_hides_the_key() {
        assert_eq!(format!("{KEY:?}"), "NamespaceKey(hidden)");
    }
}
