//! Copying large blocks past the cache.
//!
//! A block that goes from a socket or a file into the arena, or out of it to a caller, is larger than
//! what the cache should give up for it and is not read again soon by this core. Stores that bypass the
//! cache (non-temporal) need not first read the lines they overwrite: here 19 to 23 GiB/s instead of
//! 13 to 17 for 1 MiB blocks.
//!
//! ```text
//!  head, up to a line ─ plain │ 256-byte steps ─ streamed (AVX-512, AVX or SSE2) │ tail ─ plain │ fence
//! ```
//!
//! Short copies, and processors other than x86-64, take the ordinary `memcpy`.

/// From this length on, [`copy`] bypasses the cache. Below, the caller is likely to look at the bytes
/// while they are still in it, and the fence costs more than it saves.
pub const STREAM_FROM_BYTES: usize = 256 << 10;

/// Copies `source` to `target`; for long copies with stores that leave the cache alone.
///
/// # Panics
/// If the lengths differ.
pub fn copy(target: &mut [u8], source: &[u8]) {
    if source.len() < STREAM_FROM_BYTES {
        target.copy_from_slice(source);
    } else {
        stream(target, source);
    }
}

/// [`copy`] without the threshold.
///
/// # Panics
/// If the lengths differ.
pub fn stream(target: &mut [u8], source: &[u8]) {
    assert_eq!(
        target.len(),
        source.len(),
        "source and target differ in length"
    );
    #[cfg(target_arch = "x86_64")]
    x86::stream(target, source);
    #[cfg(not(target_arch = "x86_64"))]
    target.copy_from_slice(source);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m256i, __m512i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128,
        _mm256_loadu_si256, _mm256_stream_si256, _mm512_loadu_si512, _mm512_stream_si512,
    };

    const LINE: usize = 64;
    const STEP: usize = 4 * LINE;

    pub(super) fn stream(target: &mut [u8], source: &[u8]) {
        let head = target.as_ptr().align_offset(LINE).min(target.len());
        let (target_head, target) = target.split_at_mut(head);
        let (source_head, source) = source.split_at(head);
        target_head.copy_from_slice(source_head);

        let body = target.len() / STEP * STEP;
        let (target_body, target_tail) = target.split_at_mut(body);
        let (source_body, source_tail) = source.split_at(body);
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F; both bodies are equally long, a multiple of STEP,
            // and the target's starts at a line.
            unsafe { avx512(target_body, source_body) }
        } else if is_x86_feature_detected!("avx") {
            // SAFETY: as above, with AVX.
            unsafe { avx(target_body, source_body) }
        } else {
            // SAFETY: as above; every x86-64 has SSE2.
            unsafe { sse2(target_body, source_body) }
        }
        // Streamed stores are not ordered with others: whoever is told that the copy is done must see it.
        // SAFETY: every x86-64 has SSE.
        unsafe { _mm_sfence() };
        target_tail.copy_from_slice(source_tail);
    }

    /// # Safety
    /// AVX-512F; equal lengths, a multiple of STEP; target aligned to LINE.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(target: &mut [u8], source: &[u8]) {
        for at in (0..target.len()).step_by(STEP) {
            // SAFETY: `at + STEP` is within both, as the caller promises.
            unsafe {
                let from = source.as_ptr().add(at).cast::<__m512i>();
                let to = target.as_mut_ptr().add(at).cast::<__m512i>();
                let words = [0, 1, 2, 3].map(|i| _mm512_loadu_si512(from.add(i)));
                for (i, word) in words.into_iter().enumerate() {
                    _mm512_stream_si512(to.add(i), word);
                }
            }
        }
    }

    /// # Safety
    /// AVX; equal lengths, a multiple of STEP; target aligned to LINE.
    #[target_feature(enable = "avx")]
    pub(super) unsafe fn avx(target: &mut [u8], source: &[u8]) {
        for at in (0..target.len()).step_by(STEP) {
            // SAFETY: `at + STEP` is within both, as the caller promises.
            unsafe {
                let from = source.as_ptr().add(at).cast::<__m256i>();
                let to = target.as_mut_ptr().add(at).cast::<__m256i>();
                let words = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| _mm256_loadu_si256(from.add(i)));
                for (i, word) in words.into_iter().enumerate() {
                    _mm256_stream_si256(to.add(i), word);
                }
            }
        }
    }

    /// # Safety
    /// Equal lengths, a multiple of STEP; target aligned to LINE.
    pub(super) unsafe fn sse2(target: &mut [u8], source: &[u8]) {
        for at in (0..target.len()).step_by(LINE) {
            // SAFETY: `at + LINE` is within both, as the caller promises.
            unsafe {
                let from = source.as_ptr().add(at).cast::<__m128i>();
                let to = target.as_mut_ptr().add(at).cast::<__m128i>();
                let words = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
                for (i, word) in words.into_iter().enumerate() {
                    _mm_stream_si128(to.add(i), word);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{STREAM_FROM_BYTES, copy, stream};

    fn pattern(length: usize) -> Vec<u8> {
        (0..length)
            .map(|i| (i.wrapping_mul(0x9e37_79b1) >> 13) as u8)
            .collect()
    }

    #[test]
    fn streamed_bytes_equal_plain_ones_at_every_alignment() {
        let source = pattern(3 * STREAM_FROM_BYTES);
        for target_offset in [0, 1, 15, 63, 64] {
            for source_offset in [0, 3, 32] {
                for length in [
                    0,
                    1,
                    63,
                    64,
                    255,
                    256,
                    257,
                    4096,
                    70_001,
                    STREAM_FROM_BYTES + 77,
                ] {
                    let mut target = vec![0xa5; target_offset + length + 64];
                    let source = &source[source_offset..source_offset + length];
                    stream(&mut target[target_offset..target_offset + length], source);
                    assert_eq!(&target[target_offset..target_offset + length], source);
                    assert!(target[..target_offset].iter().all(|byte| *byte == 0xa5));
                    assert!(
                        target[target_offset + length..]
                            .iter()
                            .all(|byte| *byte == 0xa5)
                    );
                }
            }
        }
    }

    #[test]
    fn both_sides_of_the_threshold_copy_alike() {
        for length in [
            STREAM_FROM_BYTES - 1,
            STREAM_FROM_BYTES,
            4 * STREAM_FROM_BYTES,
        ] {
            let source = pattern(length);
            let mut target = vec![0; length];
            copy(&mut target, &source);
            assert!(target == source);
        }
    }

    #[test]
    #[should_panic(expected = "differ in length")]
    fn lengths_that_differ_are_refused() {
        stream(&mut [0; 4], &[0; 5]);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_instruction_set_at_hand_copies_alike() {
        #[repr(align(64))]
        struct Aligned([u8; 8192]);
        let source = pattern(8192);
        let check = |name: &str, run: &dyn Fn(&mut [u8], &[u8])| {
            let mut target = Aligned([0; 8192]);
            run(&mut target.0, &source);
            assert!(target.0[..] == source[..], "{name}");
        };
        // SAFETY: lengths are equal multiples of the step, the target is aligned; SSE2 is everywhere.
        check("sse2", &|target, source| unsafe {
            super::x86::sse2(target, source)
        });
        if is_x86_feature_detected!("avx") {
            // SAFETY: as above, and AVX was found.
            check("avx", &|target, source| unsafe {
                super::x86::avx(target, source)
            });
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: as above, and AVX-512F was found.
            check("avx512", &|target, source| unsafe {
                super::x86::avx512(target, source)
            });
        }
    }
}
