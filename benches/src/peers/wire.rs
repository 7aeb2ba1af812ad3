//! A key-value protocol without I/O: bytes to send, and exactly what must come back.
//!
//! ```text
//!   Ask { request ──────────────►          server
//!         reply: head │ body │ tail  ◄──── "$1048576\r\n" │ 1048576 bytes │ "\r\n"
//! ```
//!
//! Lengths of values are known to the caller (it brings the buffer), so a reply's length is known before it comes: it is
//! read in one piece into a reused buffer in which the value lies contiguous, and no client copies anything in user space.
//! A reply that differs in head or tail (a miss, an error) fails the cell.

use anyhow::{Result, ensure};

/// One exchange.
#[derive(Debug)]
pub struct Ask<'a> {
    /// To send, in one piece.
    pub request: &'a [u8],
    /// First bytes of the reply.
    pub head: &'a [u8],
    /// Length of the value in the reply.
    pub body: usize,
    /// Last bytes of the reply.
    pub tail: &'a [u8],
}

impl Ask<'_> {
    /// Length of the whole reply.
    pub fn reply_len(&self) -> usize {
        self.head.len() + self.body + self.tail.len()
    }

    /// Judges the part of a reply that has come so far, so that a short error reply is not waited on for ever.
    ///
    /// # Errors
    /// It is not what must come.
    pub fn check_head(&self, received: &[u8]) -> Result<()> {
        let known = received.len().min(self.head.len());
        ensure!(
            received[..known] == self.head[..known],
            "answered {:?}",
            String::from_utf8_lossy(&received[..received.len().min(80)])
        );
        Ok(())
    }

    /// Judges a whole reply.
    ///
    /// # Errors
    /// It is not what must come.
    pub fn check(&self, reply: &[u8]) -> Result<()> {
        self.check_head(reply)?;
        ensure!(
            reply.ends_with(self.tail),
            "the reply ends with something else"
        );
        Ok(())
    }
}

/// One side of such a protocol: the client's. Values of a size are numbered from 0.
pub trait Wire: Send + 'static {
    /// Reads a value.
    fn get(&mut self, bytes: usize, index: u64) -> Ask<'_>;
    /// Writes a value.
    fn put(&mut self, bytes: usize, index: u64) -> Ask<'_>;
    /// Asks which of `count` values from `first` on are there, with an answer for each; None if it cannot.
    fn exists(&mut self, bytes: usize, first: u64, count: u32) -> Option<Ask<'_>>;
}

/// Bytes of a key: as many as one of Terrace's hashes has.
pub const KEY_BYTES: usize = 32;

/// The key of value `index` of a size, 32 printable characters.
pub fn key(bytes: usize, index: u64) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    hex(bytes as u64, &mut key[..16]);
    hex(index, &mut key[16..]);
    key
}

fn hex(value: u64, out: &mut [u8]) {
    for (i, digit) in out.iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[(value >> (60 - 4 * i)) as usize & 15];
    }
}

/// Incompressible bytes that a seed determines.
pub fn payload(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// A request in one piece whose key lies at a fixed place: head, value and tail are written once and only the key changes.
#[derive(Debug, Default)]
pub struct Template {
    bytes: usize,
    buffer: Vec<u8>,
    key_at: usize,
}

impl Template {
    /// The request for `index`; laid out anew by `lay` (which answers where the key stands) only when the size changes.
    pub fn with(
        &mut self,
        bytes: usize,
        index: u64,
        lay: impl FnOnce(&mut Vec<u8>) -> usize,
    ) -> &[u8] {
        if self.bytes != bytes || self.buffer.is_empty() {
            self.buffer.clear();
            self.key_at = lay(&mut self.buffer);
            self.bytes = bytes;
        }
        self.buffer[self.key_at..self.key_at + KEY_BYTES].copy_from_slice(&key(bytes, index));
        &self.buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_distinct_and_32_bytes() {
        assert_eq!(&key(0x1000, 0xab), b"000000000000100000000000000000ab");
        assert_ne!(key(1, 2), key(2, 1));
    }

    #[test]
    fn a_wrong_reply_is_seen_at_its_first_byte() {
        let ask = Ask {
            request: b"",
            head: b"$4\r\n",
            body: 4,
            tail: b"\r\n",
        };
        assert_eq!(ask.reply_len(), 10);
        assert!(ask.check_head(b"$4").is_ok() && ask.check_head(b"$-1\r\n").is_err());
        assert!(ask.check(b"$4\r\nabcd\r\n").is_ok() && ask.check(b"$4\r\nabcdef").is_err());
    }

    #[test]
    fn payloads_are_determined_by_their_seed() {
        assert_eq!(payload(100, 1), payload(100, 1));
        assert_ne!(payload(100, 1), payload(100, 2));
        assert_eq!(payload(101, 1).len(), 101);
    }
}
