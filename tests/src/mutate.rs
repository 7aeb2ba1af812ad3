//! A small seeded mutator: the bounded fuzzing that `make test` can afford.
//!
//! corpus entry ─► 1 to 8 of {flip, set, insert, remove, truncate, repeat, splice, integer} ─► input
//!
//! Same seed, same inputs: a failure is repeated by its number alone. It is no match for coverage guidance
//! (`tests/fuzz` has the same targets for libFuzzer); it is here because it needs nothing installed.

/// A xorshift64* generator; quick, seedable, good enough to pick mutations.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// A generator; any seed will do, zero included.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`; 0 when `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        if bound == 0 {
            0
        } else {
            (self.next_u64() % bound as u64) as usize
        }
    }

    /// Fills `out`.
    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let word = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// Values that parsers of lengths and tags trip over.
const INTEGERS: [u64; 10] = [
    0,
    1,
    127,
    128,
    255,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    u64::MAX >> 1,
    u64::MAX,
];

/// Longest input made, bytes: parsers see their limits long before, and runs stay quick.
pub const INPUT_MAX_BYTES: usize = 64 * 1024;

/// One mutated input from `corpus` (which may be empty).
pub fn mutate(dice: &mut Dice, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = if corpus.is_empty() || dice.below(16) == 0 {
        let mut fresh = vec![0; dice.below(256)];
        dice.fill(&mut fresh);
        fresh
    } else {
        corpus[dice.below(corpus.len())].clone()
    };
    for _ in 0..=dice.below(8) {
        step(dice, &mut input, corpus);
    }
    input.truncate(INPUT_MAX_BYTES);
    input
}

fn step(dice: &mut Dice, input: &mut Vec<u8>, corpus: &[Vec<u8>]) {
    let at = dice.below(input.len());
    match dice.below(8) {
        0 if !input.is_empty() => input[at] ^= 1 << dice.below(8),
        1 if !input.is_empty() => input[at] = dice.next_u64() as u8,
        2 => input.insert(at, dice.next_u64() as u8),
        3 if !input.is_empty() => {
            let end = (at + 1 + dice.below(16)).min(input.len());
            input.drain(at..end);
        }
        4 => input.truncate(at),
        5 if !input.is_empty() => {
            let end = (at + 1 + dice.below(64)).min(input.len());
            let piece = input[at..end].to_vec();
            input.splice(at..at, piece);
        }
        6 if !corpus.is_empty() => {
            let other = &corpus[dice.below(corpus.len())];
            let from = dice.below(other.len());
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
        _ => {
            let value = INTEGERS[dice.below(INTEGERS.len())];
            let bytes = if dice.below(2) == 0 {
                value.to_le_bytes()
            } else {
                value.to_be_bytes()
            };
            let width = 1 << dice.below(4);
            let end = (at + width).min(input.len());
            for (slot, byte) in input[at..end].iter_mut().zip(bytes) {
                *slot = byte;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Dice, mutate};

    #[test]
    fn the_same_seed_gives_the_same_inputs() {
        let corpus = vec![b"terrace".to_vec(), vec![0; 100]];
        let run = |seed| {
            let mut dice = Dice::new(seed);
            (0..100)
                .map(|_| mutate(&mut dice, &corpus))
                .collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }
}
