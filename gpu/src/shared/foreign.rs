//! Copies out of and into memory that another process may be changing at the same time.
//!
//! To the compiler a plain copy promises that nobody else writes the bytes meanwhile. Here somebody may; what
//! arrives is then any mixture of old and new, and whoever copied finds out by sums or generations. The copy
//! itself is inline assembly, about which the compiler assumes nothing.
//!
//! Why `rep movsb` and not intrinsics: those are ordinary loads to the compiler. Why no stores past the cache: whole
//! pages go through `summed`; what comes here is odd pieces, summed where they were copied to, right after.

/// Copies `length` bytes; the bytes at `from`, or those at `to`, may be changed by others meanwhile.
///
/// # Safety
/// `from` is mapped readable and `to` writable for `length` bytes; they do not overlap; what of them is this
/// process's own memory is its caller's alone to write.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, length: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: reads and writes only what the caller says is mapped; the direction flag is clear by the ABI,
    // and no flags or other registers are touched.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") length => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let words = length / 8;
        for i in 0..words {
            // SAFETY: inside both ranges, as the caller promises; volatile and without an alignment to keep.
            unsafe {
                let word = from.cast::<[u8; 8]>().add(i).read_volatile();
                to.cast::<[u8; 8]>().add(i).write_volatile(word);
            }
        }
        for i in words * 8..length {
            // SAFETY: as above.
            unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::copy;

    #[test]
    fn every_length_and_alignment_is_copied_whole_and_no_byte_more() {
        let source: Vec<u8> = (0..9000_usize).map(|i| ((i * 31) >> 3) as u8).collect();
        for length in [0, 1, 7, 8, 9, 63, 64, 65, 4096, 8191] {
            for shift in [0, 1, 7, 33] {
                let mut target = vec![0xa5; shift + length + 16];
                // SAFETY: both vectors hold the ranges, and they are different vectors.
                unsafe {
                    copy(
                        target.as_mut_ptr().add(shift),
                        source.as_ptr().add(shift),
                        length,
                    );
                }
                assert_eq!(
                    &target[shift..shift + length],
                    &source[shift..shift + length]
                );
                assert!(target[..shift].iter().all(|byte| *byte == 0xa5));
                assert!(target[shift + length..].iter().all(|byte| *byte == 0xa5));
            }
        }
    }
}
