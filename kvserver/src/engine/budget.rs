//! RAM shared out between the kinds of block, in bytes.
//!
//! ```text
//! 0 ├─ kv reserve ─┤······· whoever needs it ·······├─ checkpoint reserve ─┤ capacity
//!   └────────── kv ceiling ──────────────┘
//! ```
//!
//! A kind may use its reserve at any time, and beyond it whatever the other's reserve leaves, up to its own
//! ceiling. Reserved bytes that their kind does not use stay free for it.
//!
//! Units: bytes of slots, rounded up to whole arena pages ([`slot_bytes`]).
//! Errors: none; "no room" is a [`Short`] that says who could make some.
//! Why a charge is a value: bytes are taken before a slot is filled, and whoever drops the work half-way gives
//! them back by dropping the [`Charge`].

use std::sync::Arc;

use kvproto::Kind;
use parking_lot::Mutex;

/// What one kind may have, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KindBudget {
    /// Nobody else can take these.
    pub reserve_bytes: u64,
    /// Never more than these.
    pub ceiling_bytes: u64,
}

/// Bytes that a block of this length takes in RAM.
#[must_use]
pub fn slot_bytes(length_bytes: u64) -> u64 {
    length_bytes.next_multiple_of(kvgpu::PAGE_BYTES as u64)
}

/// Which kind has how much. Locks: one, a leaf.
#[derive(Debug)]
pub(super) struct Budget {
    capacity_bytes: u64,
    limits: [KindBudget; Kind::ALL.len()],
    used: Mutex<[u64; Kind::ALL.len()]>,
}

/// There is no room; these kinds could make some by giving up blocks, in order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Short {
    pub(super) donors: [Option<Kind>; 2],
    /// The kind's own ceiling is what is in the way.
    pub(super) ceiling: bool,
}

/// Position of a kind in tables by kind.
pub(super) fn slot_of(kind: Kind) -> usize {
    match kind {
        Kind::Kv => 0,
        Kind::Checkpoint => 1,
    }
}

fn other(kind: Kind) -> Kind {
    match kind {
        Kind::Kv => Kind::Checkpoint,
        Kind::Checkpoint => Kind::Kv,
    }
}

impl Budget {
    pub(super) fn new(capacity_bytes: u64, kv: KindBudget, checkpoint: KindBudget) -> Arc<Self> {
        Arc::new(Self {
            capacity_bytes,
            limits: [kv, checkpoint],
            used: Mutex::new([0; 2]),
        })
    }

    /// Takes `bytes` for a block of that kind.
    pub(super) fn charge(self: &Arc<Self>, kind: Kind, bytes: u64) -> Result<Charge, Short> {
        let (mine, theirs) = (slot_of(kind), slot_of(other(kind)));
        let mut used = self.used.lock();
        let over_reserve = |kind: usize| used[kind].saturating_sub(self.limits[kind].reserve_bytes);
        if used[mine] + bytes > self.limits[mine].ceiling_bytes {
            return Err(Short {
                donors: [Some(kind), None],
                ceiling: true,
            });
        }
        let kept_for_them = used[theirs].max(self.limits[theirs].reserve_bytes);
        if used[mine] + bytes + kept_for_them > self.capacity_bytes {
            // Who is further over its reserve gives first; a kind within its reserve gives only to itself.
            let donors = match (over_reserve(mine), over_reserve(theirs)) {
                (_, 0) => [Some(kind), None],
                (ours, theirs) if ours >= theirs => [Some(kind), Some(other(kind))],
                _ => [Some(other(kind)), Some(kind)],
            };
            return Err(Short {
                donors,
                ceiling: false,
            });
        }
        used[mine] += bytes;
        Ok(Charge {
            budget: Arc::clone(self),
            kind,
            bytes,
        })
    }

    /// Gives back bytes of a charge that was [kept](Charge::keep).
    pub(super) fn release(&self, kind: Kind, bytes: u64) {
        let mut used = self.used.lock();
        let used = &mut used[slot_of(kind)];
        debug_assert!(*used >= bytes, "released more than was charged");
        *used = used.saturating_sub(bytes);
    }

    /// Bytes in use by a kind, those of blocks under way included.
    pub(super) fn used(&self, kind: Kind) -> u64 {
        self.used.lock()[slot_of(kind)]
    }
}

/// Bytes taken and not yet spent; dropping it gives them back.
#[derive(Debug)]
pub(super) struct Charge {
    budget: Arc<Budget>,
    kind: Kind,
    bytes: u64,
}

impl Charge {
    /// The bytes now belong to a block in the index, which releases them when it leaves.
    pub(super) fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.budget.release(self.kind, self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget() -> Arc<Budget> {
        Budget::new(
            100,
            KindBudget {
                reserve_bytes: 40,
                ceiling_bytes: 90,
            },
            KindBudget {
                reserve_bytes: 20,
                ceiling_bytes: 50,
            },
        )
    }

    #[test]
    fn a_reserve_is_kept_free_for_its_kind() {
        let budget = budget();
        let _kv = budget.charge(Kind::Kv, 80).unwrap();
        assert_eq!(
            budget.charge(Kind::Kv, 1).unwrap_err(),
            Short {
                donors: [Some(Kind::Kv), None],
                ceiling: false
            }
        );
        let _checkpoint = budget.charge(Kind::Checkpoint, 20).unwrap();
    }

    #[test]
    fn a_ceiling_holds_while_there_is_room() {
        let budget = budget();
        let short = budget.charge(Kind::Checkpoint, 51).unwrap_err();
        assert!(short.ceiling);
        assert_eq!(short.donors, [Some(Kind::Checkpoint), None]);
    }

    #[test]
    fn who_is_further_over_its_reserve_gives_first() {
        let budget = budget();
        let _kv = budget.charge(Kind::Kv, 70).unwrap();
        let checkpoint = budget.charge(Kind::Checkpoint, 30).unwrap();
        let short = budget.charge(Kind::Checkpoint, 1).unwrap_err();
        assert_eq!(short.donors, [Some(Kind::Kv), Some(Kind::Checkpoint)]);
        drop(checkpoint);
        let _within = budget.charge(Kind::Checkpoint, 20).unwrap();
        assert_eq!(
            budget.charge(Kind::Kv, 11).unwrap_err().donors,
            [Some(Kind::Kv), None]
        );
    }

    #[test]
    fn a_dropped_charge_is_given_back_and_a_kept_one_is_not() {
        let budget = budget();
        drop(budget.charge(Kind::Kv, 30).unwrap());
        assert_eq!(budget.used(Kind::Kv), 0);
        budget.charge(Kind::Kv, 30).unwrap().keep();
        assert_eq!(budget.used(Kind::Kv), 30);
        budget.release(Kind::Kv, 30);
        assert_eq!(budget.used(Kind::Kv), 0);
    }
}
