//! Hexadecimal text of fixed-width ids: lower case out, either case in.

use std::fmt::{Formatter, Result, Write};

/// Writes `bytes` as lower-case hex.
pub(crate) fn write(f: &mut Formatter<'_>, bytes: &[u8]) -> Result {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        f.write_char(char::from(DIGITS[usize::from(byte >> 4)]))?;
        f.write_char(char::from(DIGITS[usize::from(byte & 15)]))?;
    }
    Ok(())
}

/// Reads exactly `2 * N` hex digits.
pub(crate) fn read<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (digit(pair[0])? << 4) | digit(pair[1])?;
    }
    Some(bytes)
}

fn digit(ascii: u8) -> Option<u8> {
    char::from(ascii).to_digit(16).map(|digit| digit as u8)
}
