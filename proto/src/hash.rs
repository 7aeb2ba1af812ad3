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

use crate::key::SequenceHash;
use crate::token;

pub use crate::chain::{Chain, MAX_CHAIN_BLOCKS};

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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert_eq, prop_assert_ne, proptest};

    use super::{NamespaceKey, chain, chain_with, engine, extend_with, next};

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
    fn debug_hides_the_key() {
        assert_eq!(format!("{KEY:?}"), "NamespaceKey(hidden)");
    }
}
