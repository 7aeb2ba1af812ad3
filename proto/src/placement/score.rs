//! What a member bids for a run.
//!
//! ```text
//! run ──XXH3-64──► key ──┐
//!                        xor ──mix──► h ──► u = ((h >> 12) + ½) / 2^52 ──► score = weight / -ln(u)
//! id  ──XXH3-64──► seed ─┘
//! ```
//!
//! Both hashes are made once: the seed when a view is prepared, the key when a run is asked for. What is left for each
//! member is one [`mix`], which has to be strong, because the keys of two members for all runs differ by one constant:
//! it is XXH3's own finish for short inputs (rotate, rotate, multiply, shift, multiply, shift).
//!
//! `ln` is computed here from additions, multiplications and divisions alone, in a fixed order, because two nodes must
//! agree to the last bit and the `ln` of two platforms may not. It is also the dear part, and mostly spared: from
//! `-ln(u) >= 1 - u` follows `score <= weight / (1 - u)`, and a member whose bound does not reach the best score yet
//! seen has lost ([`Draw::loses_to`]). Among members of one weight the greatest draw has the greatest score, so that for
//! the first owner one logarithm per distinct weight is the most there is.
//!
//! Errors: none.
//! Source: Thaler and Ravishankar 1998 (rendezvous), Schindelhauer and Schomaker 2005 (weights).

use twox_hash::XxHash3_64;

/// The hash of a member's id or of a run.
pub(super) fn seed(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// A bijection of 64 bits in which every bit of the input moves every bit of the output (XXH3's "rrmxmx").
#[inline]
fn mix(x: u64) -> u64 {
    const PRIME: u64 = 0x9fb2_1c65_1e98_df25;
    let x = x ^ x.rotate_left(49) ^ x.rotate_left(24);
    let x = x.wrapping_mul(PRIME);
    let x = x ^ (x >> 35);
    let x = x.wrapping_mul(PRIME);
    x ^ (x >> 28)
}

/// What a member drew for a run: a number in (0, 1) in steps of 2^-52, never 0 or 1.
#[derive(Clone, Copy)]
pub(super) struct Draw(u64);

impl Draw {
    #[inline]
    pub(super) fn new(key: u64, seed: u64) -> Self {
        Self(mix(key ^ seed) >> 12)
    }

    /// The greatest draw of these seeds and which it is of, the first one if there are several. Some seed there must be.
    #[inline]
    pub(super) fn greatest(key: u64, seeds: &[u64]) -> (Self, usize) {
        // Built for a processor that multiplies whole vectors of 64 bits, blocks are three times as quick; else a little
        // slower than one by one.
        if cfg!(target_feature = "avx512dq") {
            Self::greatest_of_blocks(key, seeds)
        } else {
            Self::greatest_one_by_one(key, seeds)
        }
    }

    #[inline]
    fn greatest_one_by_one(key: u64, seeds: &[u64]) -> (Self, usize) {
        let (mut greatest, mut of) = (Self::new(key, seeds[0]), 0);
        for (at, &seed) in seeds.iter().enumerate().skip(1) {
            let draw = Self::new(key, seed);
            if draw.0 > greatest.0 {
                (greatest, of) = (draw, at);
            }
        }
        (greatest, of)
    }

    /// The same without a branch inside a block, as compilers want it for vectors.
    #[inline]
    fn greatest_of_blocks(key: u64, seeds: &[u64]) -> (Self, usize) {
        const BLOCK: usize = 64;
        let (mut greatest, mut of) = (Self::new(key, seeds[0]), 0);
        for (nth, block) in seeds.chunks(BLOCK).enumerate() {
            let mut draws = [0; BLOCK];
            for (draw, &seed) in draws.iter_mut().zip(block) {
                *draw = Self::new(key, seed).0;
            }
            let top = draws
                .iter()
                .fold(0, |top, &draw| if draw > top { draw } else { top });
            if top > greatest.0 {
                let at = draws.iter().take_while(|&&draw| draw != top).count();
                (greatest, of) = (Self(top), nth * BLOCK + at);
            }
        }
        (greatest, of)
    }

    /// True when a member of this weight cannot score more than `best`; spares the logarithm.
    #[inline]
    pub(super) fn loses_to(self, best: f64, weight: f64) -> bool {
        // 1 - u in steps of 2^-53: exact. The margin is far above the error of `ln` and of the division, far below
        // what would spare fewer logarithms.
        const STEP: f64 = (1.0 - 1e-12) / (1u64 << 53) as f64;
        let rest = ((1i64 << 53) - 1 - 2 * self.0.cast_signed()) as f64;
        weight <= best * (rest * STEP)
    }

    pub(super) fn score(self, weight: f64) -> f64 {
        weight / -ln(self.number())
    }

    fn number(self) -> f64 {
        (self.0 as f64 + 0.5) / (1u64 << 52) as f64
    }
}

/// Natural logarithm of a normal number in (0, 1), to within a few units in the last place.
///
/// ln(m · 2^e) = e · ln 2 + 2 artanh((m - 1) / (m + 1)), with m in (√½, √2] and artanh by its series.
fn ln(u: f64) -> f64 {
    let bits = u.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut m = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if m > std::f64::consts::SQRT_2 {
        m /= 2.0;
        exponent += 1;
    }
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    // s² is below 0.03, so the term after z^11 is beneath the last bit.
    let mut series = 0.0;
    for term in TERMS {
        series = series * z + term;
    }
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * series
}

/// 1 / (2k + 1) for k from 11 down to 0.
const TERMS: [f64; 12] = {
    let mut terms = [0.0; 12];
    let mut at = 0;
    while at < 12 {
        terms[at] = 1.0 / (23 - 2 * at) as f64;
        at += 1;
    }
    terms
};

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::{Draw, ln};

    proptest! {
        #[test]
        fn the_logarithm_is_right_to_its_last_bits(h in any::<u64>()) {
            let u = Draw(h >> 12).number();
            let error = (ln(u) / u.ln() - 1.0).abs();
            prop_assert!(error < 1e-15, "{u}: {error}");
        }

        #[test]
        fn blocks_find_what_is_found_one_by_one(key in any::<u64>(), seeds in vec(0u64..400, 1..300)) {
            let (draw, of) = Draw::greatest_of_blocks(key, &seeds);
            let (expected, first) = Draw::greatest_one_by_one(key, &seeds);
            prop_assert_eq!((draw.0, of), (expected.0, first));
        }

        #[test]
        fn the_bound_never_rules_out_a_winner(h in any::<u64>(), near in 0u32..52, weight in 1u32.., nudge in 0u64..8) {
            // Draws near 1 as well, where the bound is tight, and scores that differ in the last bits.
            let weight = f64::from(weight);
            let draw = Draw((h >> 12) | (((1 << near) - 1) << (52 - near)));
            let score = draw.score(weight);
            prop_assert!(!draw.loses_to(f64::from_bits(score.to_bits() - nudge), weight));
            prop_assert!(!draw.loses_to(score, weight));
        }
    }

    #[test]
    fn the_logarithm_is_finite_and_negative_at_both_ends() {
        for draw in [0, 1, (1 << 52) - 1, (1 << 52) - 2] {
            let u = Draw(draw).number();
            assert!(
                u > 0.0 && u < 1.0 && ln(u) < 0.0 && ln(u).is_finite(),
                "{u}"
            );
        }
    }
}
