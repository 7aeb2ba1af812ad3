//! The walk along a chain: what is there up to the first gap, pinned in the very step that finds it.
//!
//! ```text
//! chain    b0 ……… b15 │ b16 ……………… b47 │ b48 …          windows, each twice as long as the one before
//! window   its keys by shard, each shard locked once: seen, used, pinned
//!          then in the chain's order: prefix, tiers, lease as far as the budgets go
//!          what lies behind the gap, or behind the budget, is unpinned again
//! ```
//!
//! Why windows: sorting by shard saves a lock per key and lets the misses of several keys overlap, and a chain that
//! ends early must not be looked up to its end. What a window pins too much stays pinned for its own length only;
//! in that time the total of all leases may be overstepped, and another lookup may be told `Budget` that need not.
//! Units: blocks, bytes of slots.

use std::sync::atomic::Ordering;

use kvproto::{BlockKey, Kind, NamespaceId, Part, Reason, SequenceHash, TierKind};

use super::{
    Engine,
    budget::{slot_bytes, slot_of},
    lease::Covered,
    lookup::{Below, LookupAnswer, LookupQuery},
    policy::BlockId,
};

/// Blocks that are looked up together, at first …
const FIRST_WINDOW: usize = 16;

/// … and at most: enough to lock a shard for many keys, few enough not to hold it long.
const LAST_WINDOW: usize = 512;

/// What a walk along a chain has found.
#[derive(Default)]
pub(super) struct Walk {
    pub(super) answer: LookupAnswer,
    pub(super) touched: [Vec<BlockId>; Kind::ALL.len()],
    pub(super) pinned_blocks: u32,
    pub(super) pinned_bytes: u64,
}

/// How a walk treats what it finds.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    /// Blocks are used, not only looked at.
    pub(super) uses: bool,
    /// Bytes that may still be pinned; `None` pins nothing.
    pub(super) room: Option<u64>,
}

/// Some blocks of a chain in all their parts; key `n` is part `n % parts` of block `n / parts`.
#[derive(Clone, Copy)]
struct Window<'a> {
    namespace: NamespaceId,
    hashes: &'a [SequenceHash],
    parts: &'a [Part],
}

impl Window<'_> {
    fn len(&self) -> usize {
        self.hashes.len() * self.parts.len()
    }

    fn key(&self, n: usize) -> BlockKey {
        BlockKey {
            namespace: self.namespace,
            hash: self.hashes[n / self.parts.len()],
            part: self.parts[n % self.parts.len()],
        }
    }
}

/// What was seen of one key.
#[derive(Clone, Copy, Default)]
struct Seen {
    /// The nearest tier; `None`: it is not here.
    tier: Option<TierKind>,
    ram: Option<(Kind, BlockId)>,
    slot_bytes: u64,
    is_pinned: bool,
    /// Nobody else had pinned it.
    is_fresh: bool,
}

/// What is taken back of a key.
#[derive(Clone, Copy)]
struct Undo {
    pin: bool,
    usage: bool,
}

/// What was seen of a window.
#[derive(Default)]
struct Sight {
    seen: Vec<Seen>,
    /// Where those are that are not in RAM.
    below: Vec<(u32, Below)>,
    fresh_bytes: u64,
}

impl Engine {
    /// Along the chain until the first gap.
    pub(super) fn walk(&self, query: &LookupQuery<'_>, parts: &[Part], mut manner: Manner) -> Walk {
        let hashes = &query.chain.hashes[..];
        let mut walk = Walk::default();
        let mut sight = Sight::default();
        let (mut from, mut blocks) = (0, FIRST_WINDOW);
        while from < hashes.len() {
            let window = Window {
                namespace: query.namespace,
                hashes: &hashes[from..hashes.len().min(from + blocks)],
                parts,
            };
            self.look(window, manner, &mut sight);
            let whole = self.take_in(window, &mut sight, &mut manner, &mut walk);
            from += whole;
            if whole < window.hashes.len() {
                break;
            }
            blocks = (blocks * 2).min(LAST_WINDOW);
        }
        for (blocks, tier) in &walk.answer.tiers {
            self.lookups.hit(*tier, u64::from(*blocks));
        }
        let missing = (hashes.len() - from) as u64;
        if missing > 0 {
            self.lookups.gone(Reason::Evicted, missing);
        }
        walk
    }

    /// Visits every key of a window; pins what is there if the manner pins at all.
    fn look(&self, window: Window<'_>, manner: Manner, sight: &mut Sight) {
        let Sight {
            seen,
            below,
            fresh_bytes,
        } = sight;
        seen.clear();
        seen.resize(window.len(), Seen::default());
        below.clear();
        *fresh_bytes = 0;
        let pins = manner.room.is_some();
        let key = |n| window.key(n);
        self.index.visit(window.len(), key, |shard, visitors| {
            let mut fresh = 0;
            for visitor in visitors {
                let key = window.key(visitor.number as usize);
                let Some(entry) = shard.visited(*visitor, &key) else {
                    continue;
                };
                let tier = entry.nearest();
                if tier.is_none() {
                    continue;
                }
                let slot_bytes = slot_bytes(entry.length_bytes);
                let is_fresh = pins && entry.pins == 0;
                entry.pins += u32::from(pins);
                fresh += if is_fresh { slot_bytes } else { 0 };
                if manner.uses {
                    entry.used();
                }
                seen[visitor.number as usize] = Seen {
                    tier,
                    ram: entry.ram.as_ref().map(|held| (entry.kind, held.id)),
                    slot_bytes,
                    is_pinned: pins,
                    is_fresh,
                };
                if pins
                    && entry.ram.is_none()
                    && let Some(tier) = entry.below.nearest()
                {
                    let found = Below {
                        tier,
                        resident: entry.resident(&key),
                        kind: entry.kind,
                    };
                    below.push((visitor.number, found));
                }
            }
            if fresh > 0 {
                self.pinned_bytes.fetch_add(fresh, Ordering::Relaxed);
                *fresh_bytes += fresh;
            }
        });
    }

    /// Goes through a window in the chain's order and undoes what was pinned too much; how many blocks are whole.
    fn take_in(
        &self,
        window: Window<'_>,
        sight: &mut Sight,
        manner: &mut Manner,
        walk: &mut Walk,
    ) -> usize {
        let parts = window.parts.len();
        let pinned_now = self.pinned_bytes.load(Ordering::Relaxed) + self.held_bytes();
        let over = pinned_now.saturating_sub(self.config.lease_bytes_total);
        // What this window may pin that nobody else does.
        let mut spare = sight.fresh_bytes.saturating_sub(over);
        let (mut whole, mut leased) = (0, 0);
        for block in sight.seen.chunks_exact(parts) {
            let Some(furthest) = furthest(block) else {
                break;
            };
            whole += 1;
            match walk.answer.tiers.last_mut() {
                Some((blocks, last)) if *last == furthest => *blocks += 1,
                _ => walk.answer.tiers.push((1, furthest)),
            }
            if manner.uses {
                for (kind, id) in block.iter().filter_map(|seen| seen.ram) {
                    walk.touched[slot_of(kind)].push(id);
                }
            }
            let Some(room) = manner.room else { continue };
            let bytes = block.iter().map(|seen| seen.slot_bytes).sum::<u64>();
            let fresh = block.iter().filter(|seen| seen.is_fresh);
            let fresh = fresh.map(|seen| seen.slot_bytes).sum::<u64>();
            // A block is leased whole or not at all.
            if bytes > room || fresh > spare {
                manner.room = None;
                walk.answer.refused = Some(Reason::Budget);
                continue;
            }
            manner.room = Some(room - bytes);
            spare -= fresh;
            leased += 1;
            walk.pinned_blocks += 1;
            walk.pinned_bytes += bytes;
        }
        walk.answer.present_blocks += whole as u32;
        sight.below.sort_unstable_by_key(|(n, _)| *n);
        let leased_keys = sight
            .below
            .iter()
            .take_while(|(n, _)| (*n as usize) < leased * parts);
        walk.answer
            .promote
            .extend(leased_keys.map(|(_, below)| *below));
        let (end, gap) = (leased * parts, whole * parts);
        let undo = |n: usize| Undo {
            pin: sight.seen[n].is_pinned,
            usage: manner.uses && n >= gap && sight.seen[n].tier.is_some(),
        };
        let undone: Vec<usize> = (end..sight.seen.len())
            .filter(|n| undo(*n).pin || undo(*n).usage)
            .collect();
        if !undone.is_empty() {
            let key = |i: usize| window.key(undone[i]);
            self.undo(undone.len(), key, |i| undo(undone[i]));
        }
        whole
    }

    /// Takes the pins of a lease off.
    pub(super) fn unpin(&self, covered: &Covered) {
        let window = Window {
            namespace: covered.namespace,
            hashes: &covered.hashes,
            parts: &covered.parts,
        };
        let pin = Undo {
            pin: true,
            usage: false,
        };
        self.undo(window.len(), |n| window.key(n), |_| pin);
    }

    /// Takes pins and uses off keys again.
    fn undo(&self, count: usize, key: impl Fn(usize) -> BlockKey, what: impl Fn(usize) -> Undo) {
        for from in (0..count).step_by(LAST_WINDOW) {
            let some = LAST_WINDOW.min(count - from);
            self.index.visit(
                some,
                |n| key(from + n),
                |shard, visitors| {
                    let mut freed = 0;
                    for visitor in visitors {
                        let n = from + visitor.number as usize;
                        let key = key(n);
                        let Some(entry) = shard.visited(*visitor, &key) else {
                            continue;
                        };
                        let Undo { pin, usage } = what(n);
                        if usage {
                            entry.uses = entry.uses.saturating_sub(1);
                        }
                        if !pin {
                            continue;
                        }
                        debug_assert!(entry.pins > 0, "every pin is taken off once");
                        entry.pins = entry.pins.saturating_sub(1);
                        if entry.pins > 0 {
                            continue;
                        }
                        freed += slot_bytes(entry.length_bytes);
                        if !entry.is_present() {
                            let reason = entry.gone.unwrap_or(Reason::Evicted);
                            shard.settle(&key, reason);
                        }
                    }
                    if freed > 0 {
                        self.pinned_bytes.fetch_sub(freed, Ordering::Relaxed);
                    }
                },
            );
        }
    }
}

/// The tier of a block's furthest part, if all parts are there.
fn furthest(block: &[Seen]) -> Option<TierKind> {
    let mut furthest = None;
    for seen in block {
        furthest = furthest.max(Some(seen.tier?));
    }
    furthest
}
