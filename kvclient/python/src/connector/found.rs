//! Leases between the question whether pages are there and the reads that follow: SGLang's.
//!
//! ```text
//! exists ─► kept under each page it found ─► read of the last, `hold` seconds, or too many newer ones ─► let go
//! ```
//!
//! Units: seconds of any clock that only goes forward.
//! Errors: none; a page that nobody asked for is read without a lease.
//! Why: SGLang asks, queues the prefetch, and reads later in batches of its own; a page that was named must still be there.
//! Why the ends: a prefetch may be revoked without a word, and what is leased is memory that nobody else can have.

use std::collections::{BTreeMap, HashMap};

use super::pages::WIDTH;

/// Most leases at a time; the oldest goes first.
pub const MAX_HELD: usize = 256;

/// A page of one of a back end's pools.
type Slot = (String, [u8; WIDTH]);

/// A lookup whose lease shall be given back: its pool and its name.
pub type LetGo = (String, String);

#[derive(Debug)]
struct Held {
    pool: String,
    request: String,
    pages: Vec<[u8; WIDTH]>,
    until: f64,
}

/// Which lookups are still leased, by the pages they found.
#[derive(Debug)]
pub struct Found {
    hold: f64,
    /// In the order they were asked, and so of their ends.
    held: BTreeMap<u64, Held>,
    /// The newest lookup that found a page.
    holder: HashMap<Slot, u64>,
    last: u64,
}

impl Found {
    /// None yet; each will be kept `hold` seconds at most.
    #[must_use]
    pub fn new(hold: f64) -> Self {
        Self {
            hold,
            held: BTreeMap::new(),
            holder: HashMap::new(),
            last: 0,
        }
    }

    /// The lookup `request` found the pages of these names in `pool`. Those whose time is over, and those that are too many.
    pub fn keep(&mut self, pool: &str, request: &str, names: &[u8], now: f64) -> Vec<LetGo> {
        self.last += 1;
        let pages: Vec<[u8; WIDTH]> = names.as_chunks().0.to_vec();
        for page in &pages {
            self.holder.insert((pool.to_owned(), *page), self.last);
        }
        let held = Held {
            pool: pool.to_owned(),
            request: request.to_owned(),
            pages,
            until: now + self.hold,
        };
        self.held.insert(self.last, held);
        self.over(now)
    }

    /// The lookup under whose lease a page is read.
    #[must_use]
    pub fn of(&self, pool: &str, page: [u8; WIDTH]) -> Option<&str> {
        let held = self.held.get(self.holder.get(&(pool.to_owned(), page))?)?;
        Some(&held.request)
    }

    /// Pages up to `last` were read under the lease of the lookup `request`. It, if that was all that it had found.
    pub fn read(&mut self, request: &str, last: [u8; WIDTH]) -> Option<LetGo> {
        let mut held = self.held.iter();
        let (&lookup, held) = held.find(|(_, held)| held.request == request)?;
        let whole = held.pages.last() == Some(&last);
        whole.then(|| self.let_go(lookup)).flatten()
    }

    /// Those whose time is over, and those that are too many.
    pub fn over(&mut self, now: f64) -> Vec<LetGo> {
        let mut over = Vec::new();
        while let Some((&oldest, held)) = self.held.first_key_value()
            && (held.until <= now || self.held.len() > MAX_HELD)
        {
            over.extend(self.let_go(oldest));
        }
        over
    }

    /// Leases held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// True when there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty() && self.holder.is_empty()
    }

    fn let_go(&mut self, lookup: u64) -> Option<LetGo> {
        let held = self.held.remove(&lookup)?;
        for page in held.pages {
            let slot = (held.pool.clone(), page);
            // A newer lookup may have found it too.
            if self.holder.get(&slot) == Some(&lookup) {
                self.holder.remove(&slot);
            }
        }
        Some((held.pool, held.request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: [u8; WIDTH] = [1; WIDTH];
    const B: [u8; WIDTH] = [2; WIDTH];
    const C: [u8; WIDTH] = [3; WIDTH];

    fn go(request: &str) -> LetGo {
        ("kv".to_owned(), request.to_owned())
    }

    #[test]
    fn a_lease_ends_when_the_last_page_was_read() {
        let mut found = Found::new(10.0);
        assert!(found.keep("kv", "one", &[A, B].concat(), 0.0).is_empty());
        assert_eq!(found.of("kv", B), Some("one"));
        assert_eq!(found.of("side", B), None, "another pool's page");
        assert_eq!(found.read("one", A), None);
        assert_eq!(found.read("one", B), Some(go("one")));
        assert!(found.is_empty());
        assert_eq!(found.read("one", B), None);
    }

    #[test]
    fn the_newest_lookup_has_a_page_that_two_found() {
        let mut found = Found::new(10.0);
        found.keep("kv", "one", &[A, B].concat(), 0.0);
        found.keep("kv", "two", &[B, C].concat(), 1.0);
        assert_eq!(
            (found.of("kv", A), found.of("kv", B)),
            (Some("one"), Some("two"))
        );
        assert_eq!(found.over(10.0), [go("one")]);
        assert_eq!((found.of("kv", A), found.of("kv", B)), (None, Some("two")));
    }

    #[test]
    fn leases_end_by_time_and_by_number() {
        let mut found = Found::new(10.0);
        for i in 0..MAX_HELD {
            assert!(
                found
                    .keep("kv", &i.to_string(), &A, i as f64 / 1000.0)
                    .is_empty()
            );
        }
        assert_eq!(found.keep("kv", "new", &A, 1.0), [go("0")]);
        assert_eq!(found.len(), MAX_HELD);
        assert_eq!(found.over(10.001), [go("1")]);
        assert_eq!(found.over(11.0).len(), MAX_HELD - 1);
        assert!(found.is_empty());
    }
}
