//! A table of slots that moves as few of them as it can: the choice of those who can agree on a history.
//!
//! ```text
//!   quotas     by weight, the largest remainders rounded up
//!   keep       every slot with whom it was, as long as that member is within its quota
//!   give       what is left to a member below its quota, the one that bids most for the slot
//! ```
//!
//! The next table follows from the one before, so everybody has to have seen the same tables in the same order: it takes a
//! publisher, or a log, and a way to catch up. That is its real price; the look-up itself is one load.

use kvproto::RunHash;

use super::{Member, Members, Owners, hash, key};

const FREE: u32 = u32::MAX;

/// Who has each slot.
#[derive(Clone)]
pub struct SlotTable {
    slots: Vec<u32>,
}

impl SlotTable {
    /// The table of `members` that follows `before`.
    pub fn new(members: &Members, len: usize, before: Option<&Self>) -> Self {
        let quotas = quotas(members, len);
        let mut taken = vec![0usize; members.0.len()];
        let place = |number: u32| members.0.binary_search_by_key(&number, |m| m.number).ok();
        let mut slots = vec![FREE; len];
        if let Some(before) = before {
            // In an order of no meaning, so that nobody loses a stretch.
            let mut order: Vec<usize> = (0..len).collect();
            order.sort_by_key(|&slot| hash(slot as u64, 77));
            for slot in order {
                let Some(at) = place(before.slots[slot]) else {
                    continue;
                };
                if taken[at] < quotas[at] {
                    taken[at] += 1;
                    slots[slot] = before.slots[slot];
                }
            }
        }
        let mut below: Vec<usize> = (0..taken.len())
            .filter(|&at| taken[at] < quotas[at])
            .collect();
        for (slot, owner) in slots.iter_mut().enumerate().filter(|(_, o)| **o == FREE) {
            let bid = |at: &usize| hash(slot as u64, u64::from(members.0[*at].number) + 1);
            let Some(&at) = below.iter().max_by_key(|at| bid(at)) else {
                break; // quotas add up to the slots, so none is left without a taker
            };
            *owner = members.0[at].number;
            taken[at] += 1;
            if taken[at] == quotas[at] {
                below.retain(|&other| other != at);
            }
        }
        Self { slots }
    }
}

fn quotas(members: &Members, len: usize) -> Vec<usize> {
    let total = members.weight() as f64;
    let exact = |member: &Member| len as f64 * f64::from(member.weight) / total;
    let mut quotas: Vec<usize> = members.0.iter().map(|m| exact(m) as usize).collect();
    let mut by_rest: Vec<usize> = (0..quotas.len()).collect();
    by_rest.sort_by(|&a, &b| {
        let rest = |at: usize| exact(&members.0[at]).fract();
        rest(b).total_cmp(&rest(a)).then(a.cmp(&b))
    });
    let missing = len - quotas.iter().sum::<usize>();
    for at in by_rest.into_iter().take(missing) {
        quotas[at] += 1;
    }
    quotas
}

impl Owners for SlotTable {
    fn owner(&self, run: &RunHash) -> u32 {
        self.slots[((u128::from(key(run)) * self.slots.len() as u128) >> 64) as usize]
    }

    fn bytes(&self) -> usize {
        std::mem::size_of_val(&self.slots[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_moves_the_newcomers_quota_and_nothing_else() {
        let members = Members::mixed(20);
        let (more, newcomer) = members.joined();
        let before = SlotTable::new(&members, 4096, None);
        let after = SlotTable::new(&more, 4096, Some(&before));
        let moved = before
            .slots
            .iter()
            .zip(&after.slots)
            .filter(|(a, b)| a != b);
        let to: Vec<u32> = moved.map(|(_, to)| *to).collect();
        assert!(to.iter().all(|&to| to == newcomer.number));
        assert_eq!(to.len(), *quotas(&more, 4096).last().expect("a newcomer"));
    }

    #[test]
    fn quotas_add_up() {
        for count in [1, 7, 100] {
            assert_eq!(
                quotas(&Members::mixed(count), 1000).iter().sum::<usize>(),
                1000
            );
        }
    }
}
