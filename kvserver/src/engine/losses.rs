//! Why blocks left lately, so that a miss can say more than "miss".
//!
//! Shape: a ring of fingerprints and a table over it, 24 bytes a loss; the oldest is forgotten first.
//! Two keys with one fingerprint share a reason: it is an account for people, and no promise hangs on it.

use std::collections::{HashMap, VecDeque};

use kvproto::{BlockKey, Reason};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// A bounded memory of losses.
#[derive(Debug)]
pub(super) struct Losses {
    order: VecDeque<u64>,
    reasons: HashMap<u64, Reason>,
    limit: usize,
    seed: u64,
}

impl Losses {
    pub(super) fn new(limit: usize, seed: u64) -> Self {
        Self {
            order: VecDeque::new(),
            reasons: HashMap::new(),
            limit,
            seed,
        }
    }

    fn fingerprint(&self, key: &BlockKey) -> u64 {
        xxh3_64_with_seed(&key.to_bytes(), self.seed)
    }

    pub(super) fn remember(&mut self, key: &BlockKey, reason: Reason) {
        // A plain miss is answered as evicted without any help.
        let fingerprint = self.fingerprint(key);
        if reason == Reason::Evicted {
            self.reasons.remove(&fingerprint);
            return;
        }
        if self.reasons.insert(fingerprint, reason).is_none() {
            self.order.push_back(fingerprint);
        }
        while self.order.len() > self.limit {
            if let Some(oldest) = self.order.pop_front() {
                self.reasons.remove(&oldest);
            }
        }
    }

    pub(super) fn reason(&self, key: &BlockKey) -> Option<Reason> {
        self.reasons.get(&self.fingerprint(key)).copied()
    }
}

#[cfg(test)]
mod tests {
    use kvproto::{NamespaceId, Part, SequenceHash};

    use super::*;

    fn key(n: u8) -> BlockKey {
        BlockKey {
            namespace: NamespaceId([0; 16]),
            hash: SequenceHash([n; 32]),
            part: Part::default(),
        }
    }

    #[test]
    fn the_oldest_loss_is_forgotten_first() {
        let mut losses = Losses::new(2, 0);
        losses.remember(&key(1), Reason::Corrupt);
        losses.remember(&key(2), Reason::Device);
        losses.remember(&key(3), Reason::Invalidated);
        assert_eq!(losses.reason(&key(1)), None);
        assert_eq!(losses.reason(&key(2)), Some(Reason::Device));
        assert_eq!(losses.reason(&key(3)), Some(Reason::Invalidated));
    }

    #[test]
    fn the_latest_reason_counts() {
        let mut losses = Losses::new(2, 0);
        losses.remember(&key(1), Reason::Corrupt);
        losses.remember(&key(1), Reason::Evicted);
        assert_eq!(losses.reason(&key(1)), None);
    }
}
