//! Token ids and how they are cut into blocks.
//!
//! ```text
//! tokens  t0 t1 t2 t3 t4 t5 t6 t7 t8 t9        block_tokens = 4
//! blocks  └── 0 ────┘ └── 1 ────┘  (t8 t9 are no block)
//! ```
//!
//! Shape: n tokens give floor(n / `block_tokens`) blocks. A last partial run is no block, because its
//! keys and values would be recomputed as soon as the next token arrives.
//! Errors: none.

/// A token id, as the tokenizer of the namespace gives it.
pub type Token = u32;

/// The full blocks of `tokens`, in order.
///
/// # Panics
///
/// When `block_tokens` is 0, which no namespace allows.
///
/// ```
/// let tokens: Vec<u32> = (0..10).collect();
/// let blocks: Vec<&[u32]> = kvproto::token::blocks(&tokens, 4).collect();
/// assert_eq!(blocks, [&[0, 1, 2, 3], &[4, 5, 6, 7]]);
/// ```
pub fn blocks(tokens: &[Token], block_tokens: u32) -> impl ExactSizeIterator<Item = &[Token]> {
    tokens.chunks_exact(block_tokens as usize)
}

/// How many full blocks `tokens` tokens give.
///
/// # Panics
///
/// When `block_tokens` is 0, which no namespace allows.
pub fn block_count(tokens: usize, block_tokens: u32) -> usize {
    tokens / block_tokens as usize
}
