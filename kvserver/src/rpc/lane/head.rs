//! The head of a call: its path and its header fields.
//!
//! ```text
//! block ── the same as the last one's ─────────► path, headers as they are
//!   └───── another ──► fields ──judge──► path, headers      or a breach
//! ```
//!
//! A client's calls differ in their bodies; their heads are alike to the byte as long as it calls one method with one
//! deadline. So a small call costs no map, no field and no name to look up.
//!
//! Errors: breaches of the protocol.

use std::io;

use http::{HeaderMap, HeaderName, HeaderValue};
use kvproto::http2::{Fields, Receiver, breach};

/// The head of a call. Kept for the next one: where that has the same to the byte, it is not read again.
#[derive(Default)]
pub(super) struct Head {
    /// As it came; empty when it is not to be known again.
    block: Vec<u8>,
    /// Fields that are still to be judged.
    fields: Option<Fields>,
    pub(super) path: String,
    pub(super) headers: HeaderMap,
}

impl Head {
    /// Its path and its headers out of what has come.
    pub(super) fn judge(&mut self) -> io::Result<()> {
        let Some(fields) = self.fields.take() else {
            return Ok(());
        };
        let block = std::mem::take(&mut self.block);
        let mut path = None;
        let mut headers = HeaderMap::with_capacity(fields.len());
        for (name, value) in fields {
            match &name[..] {
                b":method" if value == b"POST" => {}
                b":method" => return Err(breach("a call that is not a POST")),
                b":path" => {
                    let text = String::from_utf8(value);
                    path = Some(text.map_err(|_| breach("a path that is not UTF-8"))?);
                }
                [b':', ..] => {}
                _ => {
                    let name = HeaderName::from_bytes(&name);
                    let value = HeaderValue::try_from(value);
                    let (Ok(name), Ok(value)) = (name, value) else {
                        return Err(breach("a header field with bytes that none may have"));
                    };
                    headers
                        .try_append(name, value)
                        .map_err(|_| breach("too many header fields"))?;
                }
            }
        }
        self.path = path.ok_or_else(|| breach("a call without a path"))?;
        (self.headers, self.block) = (headers, block);
        Ok(())
    }
}

impl Receiver for Head {
    fn knows(&mut self, block: &[u8]) -> io::Result<bool> {
        if !block.is_empty() && block == self.block {
            return Ok(true);
        }
        self.block.clear();
        self.block.extend_from_slice(block);
        Ok(false)
    }

    fn headers(&mut self, fields: Fields) -> io::Result<()> {
        self.fields = Some(fields);
        Ok(())
    }

    fn chunk(&mut self, _: &[u8]) -> io::Result<()> {
        Err(breach("data without a call"))
    }
}

#[cfg(test)]
mod tests {
    use kvproto::http2::frame::put_field;

    use super::*;

    fn block(path: &str, timeout: &str) -> Vec<u8> {
        let mut block = Vec::new();
        for (name, value) in [
            (":method", "POST"),
            (":path", path),
            ("grpc-timeout", timeout),
        ] {
            put_field(&mut block, name.as_bytes(), value.as_bytes());
        }
        block
    }

    /// Whether it was known.
    fn hear(head: &mut Head, path: &str, timeout: &str) -> bool {
        let known = head.knows(&block(path, timeout)).expect("a block");
        if !known {
            let field = |name: &str, value: &str| (name.into(), value.into());
            let fields = vec![
                field(":method", "POST"),
                field(":path", path),
                field("grpc-timeout", timeout),
            ];
            head.headers(fields).expect("fields");
        }
        head.judge().expect("a head");
        known
    }

    #[test]
    fn the_head_of_a_call_is_its_own_however_it_was_read() {
        let mut head = Head::default();
        for (path, timeout, known) in [
            ("/a/b", "1S", false),
            ("/a/b", "1S", true),
            ("/a/b", "2S", false),
            ("/a/c", "2S", false),
            ("/a/c", "2S", true),
            ("/a/b", "1S", false),
        ] {
            assert_eq!(hear(&mut head, path, timeout), known);
            assert_eq!(
                (&*head.path, &head.headers["grpc-timeout"]),
                (path, &HeaderValue::from_str(timeout).expect("text"))
            );
        }
    }

    #[test]
    fn what_was_refused_or_empty_is_never_known() {
        let mut head = Head::default();
        assert!(!head.knows(b"").expect("a block"));
        head.headers(Fields::new()).expect("fields");
        assert!(head.judge().is_err(), "no path");
        assert!(!head.knows(b"").expect("a block"));

        let mut get = Vec::new();
        put_field(&mut get, b":method", b"GET");
        for _ in 0..2 {
            assert!(!head.knows(&get).expect("a block"));
            let fields = vec![(b":method".to_vec(), b"GET".to_vec())];
            head.headers(fields).expect("fields");
            assert!(head.judge().is_err());
        }
    }
}
