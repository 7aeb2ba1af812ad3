//! Redis as an index of where blocks are: a short text behind every key, asked for many at a time.
//!
//! Two ways of asking, because they cost differently: a pipeline of `GET`, and one `MGET`. The answers are read whole; all
//! locations have one length, so that the reply's length is known before it comes.

use super::etcd::LOCATION;
use super::wire::{Ask, Wire, key};

/// A pipeline of `GET`.
#[derive(Debug, Default)]
pub struct Pipelined(Index);

/// One `MGET`.
#[derive(Debug, Default)]
pub struct Mget(Index);

#[derive(Debug, Default)]
struct Index {
    request: Vec<u8>,
    head: Vec<u8>,
}

impl Index {
    fn keys(&mut self, before_each: &[u8], bytes: usize, first: u64, count: u32) {
        for index in first..first + u64::from(count) {
            self.request.extend_from_slice(before_each);
            self.request.extend_from_slice(b"$32\r\n");
            self.request.extend_from_slice(&key(bytes, index));
            self.request.extend_from_slice(b"\r\n");
        }
    }

    /// As many `GET` as keys.
    fn get(&mut self, bytes: usize, first: u64, count: u32) -> Ask<'_> {
        self.request.clear();
        self.keys(b"*2\r\n$3\r\nGET\r\n", bytes, first, count);
        self.locations(b"", count)
    }

    fn put(&mut self, bytes: usize, index: u64) -> Ask<'_> {
        self.request.clear();
        self.keys(b"*3\r\n$3\r\nSET\r\n", bytes, index, 1);
        self.request.extend_from_slice(&location());
        Ask {
            request: &self.request,
            head: b"+OK\r\n",
            body: 0,
            tail: b"",
        }
    }

    /// `count` locations behind `head`.
    fn locations(&mut self, head: &[u8], count: u32) -> Ask<'_> {
        let len = head.len() + location().len() * count as usize;
        if self.head.len() != len {
            self.head = [head, &location().repeat(count as usize)].concat();
        }
        Ask {
            request: &self.request,
            head: &self.head,
            body: 0,
            tail: b"",
        }
    }
}

fn location() -> Vec<u8> {
    let head = format!("${}\r\n", LOCATION.len());
    [head.as_bytes(), LOCATION, b"\r\n"].concat()
}

impl Wire for Pipelined {
    fn get(&mut self, bytes: usize, index: u64) -> Ask<'_> {
        self.0.get(bytes, index, 1)
    }

    fn put(&mut self, bytes: usize, index: u64) -> Ask<'_> {
        self.0.put(bytes, index)
    }

    fn exists(&mut self, bytes: usize, first: u64, count: u32) -> Option<Ask<'_>> {
        Some(self.0.get(bytes, first, count))
    }
}

impl Wire for Mget {
    fn get(&mut self, bytes: usize, index: u64) -> Ask<'_> {
        self.0.get(bytes, index, 1)
    }

    fn put(&mut self, bytes: usize, index: u64) -> Ask<'_> {
        self.0.put(bytes, index)
    }

    fn exists(&mut self, bytes: usize, first: u64, count: u32) -> Option<Ask<'_>> {
        self.0.request.clear();
        let head = format!("*{}\r\n$4\r\nMGET\r\n", count + 1);
        self.0.request.extend_from_slice(head.as_bytes());
        self.0.keys(b"", bytes, first, count);
        Some(self.0.locations(format!("*{count}\r\n").as_bytes(), count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ask_for_the_same_keys() {
        let key = "$32\r\n00000000000000040000000000000001\r\n";
        let (mut one, mut two) = (Pipelined::default(), Mget::default());
        let ask = one.exists(4, 1, 1).expect("supported");
        assert_eq!(ask.request, format!("*2\r\n$3\r\nGET\r\n{key}").as_bytes());
        assert_eq!(ask.head, b"$9\r\nnode-0001\r\n");
        let ask = two.exists(4, 1, 2).expect("supported");
        assert!(
            ask.request
                .starts_with(format!("*3\r\n$4\r\nMGET\r\n{key}").as_bytes())
        );
        assert_eq!(ask.head, b"*2\r\n$9\r\nnode-0001\r\n$9\r\nnode-0001\r\n");
        let put = one.put(4, 1);
        assert_eq!(
            put.request,
            format!("*3\r\n$3\r\nSET\r\n{key}$9\r\nnode-0001\r\n").as_bytes()
        );
    }
}
