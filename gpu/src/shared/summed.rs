//! Copies and sums a page in one pass: what memory takes to answer hides the arithmetic.
//!
//! ```text
//!            ┌─ stored at the destination
//! 64 bytes ──┤                                    16 of them, then a scramble: XXH3's block of 1024 bytes
//!   loaded   └─ folded into the sum               the line PREFETCH_BYTES ahead is asked for meanwhile
//!   once
//! ```
//!
//! A byte is loaded once and the very register goes both ways, so the sum is that of what was stored, whatever
//! somebody else does to the source meanwhile. Other memory than the one copied is never looked at.
//!
//! Units: bytes. Errors: none; what this cannot do (`None`) is copied and then summed.
//! Why not a copy and then a hash of the page in the cache, as before, in µs of CPU for 1 MiB (2 cores, 2 MiB of cache
//! each, a noisy machine; `micro --only shared` measures it again):
//!
//! ```text
//!                                          rep movsb   and hash   one pass   one pass, past the cache
//!  out of memory, into 1 MiB used again       136        188        139        173
//!  out of memory, into much memory            205        268        213        176
//!  out of the cache, into much memory         143        205        168        100
//! ```
//!
//! Without the prefetch the first line is 159; 1 or 4 KiB ahead are no better than 2; AVX-512 is no quicker, and slower
//! where the stores go to memory; a prefetch past the cache costs twice what it saves where the source is in it.
//! Why an XXH3 of its own: no library hashes while it copies. Source: the specification of XXH3 (64 bits, seed
//! 0, longer than 240 bytes) at <https://github.com/Cyan4973/xxHash>; the tests hold it against `twox-hash`.
//! Why assembly: see `foreign`; and a debug build copies as fast.

/// Where copied bytes are on their way to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toward {
    /// Into the cache: somebody looks at them soon, or they replace what is there already.
    Cache,
    /// To memory, past the cache: nobody looks at them soon. The old bytes need not be fetched first, and the
    /// cache keeps what it has.
    Memory,
}

/// Copies `length` bytes and answers their XXH3-64; `None`, and nothing was copied, where this processor or this
/// length is not for one pass. What was stored is ordered ahead of later stores, whichever way it went.
///
/// # Safety
/// As [`super::foreign::copy`].
pub(super) unsafe fn copy(
    to: *mut u8,
    from: *const u8,
    length: usize,
    toward: Toward,
) -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    if length.is_multiple_of(x86::STRIPE) && length > x86::SHORT && is_x86_feature_detected!("avx2")
    {
        // SAFETY: as the caller promises; the length was looked at, and the processor has AVX2.
        return Some(unsafe { x86::copy(to, from, length, toward) });
    }
    let _ = (to, from, length, toward);
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;

    use super::Toward;

    /// Bytes of an XXH3 stripe.
    pub(super) const STRIPE: usize = 64;
    /// Up to this length XXH3 is another function.
    pub(super) const SHORT: usize = 240;
    /// Stripes between two scrambles, with a secret of 192 bytes.
    const STRIPES: usize = 16;
    /// How far ahead lines are asked for: what memory takes to answer, at the rate of the loop.
    const PREFETCH_BYTES: usize = 2048;
    /// What a store past the cache wants of its address.
    const ALIGN: usize = 32;

    const SECRET_BYTES: usize = 192;
    /// XXH3's default secret.
    #[rustfmt::skip]
    static SECRET: [u8; SECRET_BYTES] = [
        0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
        0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
        0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
        0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
        0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
        0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
        0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
        0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
        0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
        0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
        0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
        0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
    ];
    /// Where in the secret the scramble, the last stripe and the merge begin.
    const SCRAMBLE_AT: usize = SECRET_BYTES - STRIPE;
    const LAST_AT: usize = SECRET_BYTES - STRIPE - 7;
    const MERGE_AT: usize = 11;

    const PRIME32: [u64; 3] = [0x9e37_79b1, 0x85eb_ca77, 0xc2b2_ae3d];
    const PRIME64: [u64; 5] = [
        0x9e37_79b1_85eb_ca87,
        0xc2b2_ae3d_27d4_eb4f,
        0x1656_67b1_9e37_79f9,
        0x85eb_ca77_c2b2_ae63,
        0x27d4_eb2f_1656_67c5,
    ];

    /// # Safety
    /// As [`super::copy`]; `length` is a multiple of [`STRIPE`] above [`SHORT`], the processor has AVX2.
    pub(super) unsafe fn copy(to: *mut u8, from: *const u8, length: usize, toward: Toward) -> u64 {
        let mut sum = [
            PRIME32[2], PRIME64[0], PRIME64[1], PRIME64[2], PRIME64[3], PRIME32[1], PRIME64[4],
            PRIME32[0],
        ];
        let is_past = toward == Toward::Memory && to.addr().is_multiple_of(ALIGN);
        let stripes: Stripes = if is_past { past_cache } else { into_cache };
        // The last stripe, whole as it is, is folded in apart from the others.
        let (mut at, last) = (0, length - STRIPE);
        while at < last {
            let count = STRIPES.min((last - at) / STRIPE);
            // SAFETY: `at + count * STRIPE <= last`, inside both ranges, and `to` is aligned where that counts.
            unsafe { stripes(&mut sum, to.add(at), from.add(at), count, SECRET.as_ptr()) };
            at += count * STRIPE;
            if count == STRIPES {
                scramble(&mut sum);
            }
        }
        // SAFETY: the last stripe of both ranges.
        unsafe {
            stripes(
                &mut sum,
                to.add(last),
                from.add(last),
                1,
                SECRET[LAST_AT..].as_ptr(),
            )
        };
        if is_past {
            // SAFETY: such stores are not ordered with others; whoever is told of the copy must see it. Touches nothing.
            unsafe { asm!("sfence", options(nostack, preserves_flags)) };
        }
        merge(&sum, length)
    }

    /// Copies so many stripes, at least one, and folds them into the sum, the secret moving on by 8 bytes with each.
    ///
    /// # Safety
    /// The source is readable and the target writable for the stripes, the target aligned as its store wants it; the
    /// secret has a stripe's bytes and 8 more for each stripe but the first; the processor has AVX2.
    type Stripes = unsafe fn(&mut [u64; 8], *mut u8, *const u8, usize, *const u8);

    macro_rules! stripes {
        ($name:ident, $store:literal) => {
            unsafe fn $name(
                sum: &mut [u64; 8],
                to: *mut u8,
                from: *const u8,
                count: usize,
                secret: *const u8,
            ) {
                // SAFETY: reads and writes what the caller says is there, `sum`, and registers that are named;
                // a prefetch touches nothing, wherever it points.
                unsafe {
                    asm!(
                        "vmovdqu ymm0, [{sum}]",
                        "vmovdqu ymm1, [{sum} + 32]",
                        "2:",
                        "vmovdqu ymm2, [{from}]",
                        "vmovdqu ymm3, [{from} + 32]",
                        "prefetcht0 [{from} + {ahead}]",
                        concat!($store, " [{to}], ymm2"),
                        concat!($store, " [{to} + 32], ymm3"),
                        "vpxor ymm4, ymm2, [{secret}]",
                        "vpxor ymm5, ymm3, [{secret} + 32]",
                        "vpshufd ymm2, ymm2, 0x4e",
                        "vpshufd ymm3, ymm3, 0x4e",
                        "vpaddq ymm0, ymm0, ymm2",
                        "vpaddq ymm1, ymm1, ymm3",
                        "vpsrlq ymm2, ymm4, 32",
                        "vpsrlq ymm3, ymm5, 32",
                        "vpmuludq ymm4, ymm4, ymm2",
                        "vpmuludq ymm5, ymm5, ymm3",
                        "vpaddq ymm0, ymm0, ymm4",
                        "vpaddq ymm1, ymm1, ymm5",
                        "add {from}, 64",
                        "add {to}, 64",
                        "add {secret}, 8",
                        "dec {count}",
                        "jnz 2b",
                        "vmovdqu [{sum}], ymm0",
                        "vmovdqu [{sum} + 32], ymm1",
                        "vzeroupper",
                        sum = in(reg) sum.as_mut_ptr(),
                        from = inout(reg) from => _,
                        to = inout(reg) to => _,
                        secret = inout(reg) secret => _,
                        count = inout(reg) count => _,
                        ahead = const PREFETCH_BYTES,
                        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                        out("xmm4") _, out("xmm5") _,
                        // `vzeroupper` cuts these too, and a build for a processor with AVX may keep something there.
                        out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _,
                        out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                        options(nostack),
                    );
                }
            }
        };
    }
    stripes!(into_cache, "vmovdqu");
    stripes!(past_cache, "vmovntdq");

    fn secret(at: usize) -> u64 {
        let bytes = SECRET[at..]
            .first_chunk()
            .expect("eight bytes of the secret");
        u64::from_le_bytes(*bytes)
    }

    fn scramble(sum: &mut [u64; 8]) {
        for (i, lane) in sum.iter_mut().enumerate() {
            *lane = (*lane ^ *lane >> 47 ^ secret(SCRAMBLE_AT + 8 * i)).wrapping_mul(PRIME32[0]);
        }
    }

    fn merge(sum: &[u64; 8], length: usize) -> u64 {
        let mut merged = (length as u64).wrapping_mul(PRIME64[0]);
        for (i, pair) in sum.chunks_exact(2).enumerate() {
            let at = MERGE_AT + 16 * i;
            let product = u128::from(pair[0] ^ secret(at)) * u128::from(pair[1] ^ secret(at + 8));
            merged = merged.wrapping_add(product as u64 ^ (product >> 64) as u64);
        }
        merged ^= merged >> 37;
        merged = merged.wrapping_mul(0x1656_6791_9e37_79f9);
        merged ^ merged >> 32
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert_eq, proptest};
    use twox_hash::XxHash3_64;

    use super::{Toward, copy};

    fn pattern(length: usize, seed: u64) -> Vec<u8> {
        let word = |i: u64| {
            (i ^ seed)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        };
        (0..length as u64).map(|i| word(i) as u8).collect()
    }

    /// The copy, its sum, and nothing written beside it.
    fn check(length: usize, shift: usize, toward: Toward, seed: u64) -> Option<u64> {
        let source = pattern(shift + length, seed);
        let mut target = vec![0xa5; 64 + shift + length + 64];
        let at = target.as_ptr().align_offset(64) + shift;
        // SAFETY: both vectors hold the ranges, and they are different vectors.
        let sum = unsafe {
            copy(
                target.as_mut_ptr().add(at),
                source.as_ptr().add(shift),
                length,
                toward,
            )
        }?;
        assert!(target[at..at + length] == source[shift..]);
        assert!(target[..at].iter().all(|byte| *byte == 0xa5));
        assert!(target[at + length..].iter().all(|byte| *byte == 0xa5));
        Some(sum)
    }

    #[test]
    fn pages_are_for_one_pass_where_the_processor_can_do_it() {
        #[cfg(target_arch = "x86_64")]
        assert_eq!(
            check(65536, 0, Toward::Cache, 0).is_some(),
            is_x86_feature_detected!("avx2")
        );
        for length in [0, 1, 63, 64, 192, 240, 241, 257, 65535] {
            assert_eq!(check(length, 0, Toward::Memory, 0), None, "{length}");
        }
    }

    proptest! {
        #[test]
        fn every_length_and_alignment_has_the_sum_of_the_library(
            stripes in 4_usize..1100, shift in 0_usize..70, past in any::<bool>(), seed in any::<u64>(),
        ) {
            let toward = if past { Toward::Memory } else { Toward::Cache };
            let length = stripes * 64;
            if let Some(sum) = check(length, shift, toward, seed) {
                prop_assert_eq!(sum, XxHash3_64::oneshot(&pattern(shift + length, seed)[shift..]));
            }
        }
    }

    #[test]
    fn lengths_around_a_block_have_the_sum_of_the_library() {
        for length in [
            256, 960, 1024, 1088, 2048, 2112, 65472, 65536, 65600, 131_072,
        ] {
            for toward in [Toward::Cache, Toward::Memory] {
                let Some(sum) = check(length, 0, toward, 7) else {
                    return; // no such processor
                };
                assert_eq!(sum, XxHash3_64::oneshot(&pattern(length, 7)), "{length}");
            }
        }
    }
}
