//! Maglev: members take turns in claiming entries of a table, each in an order of its own (Eisenbud and others 2016).
//!
//! A member of half the weight takes every other turn.

use kvproto::RunHash;

use super::{Members, Owners, hash, key};

const FREE: u32 = u32::MAX;

/// The table.
#[derive(Clone)]
pub struct Maglev {
    entries: Vec<u32>,
}

impl Maglev {
    /// A table of `len` entries, which has to be a prime.
    pub fn new(members: &Members, len: usize) -> Self {
        struct Turn {
            number: u32,
            weight: u32,
            at: usize,
            skip: usize,
            credit: u32,
        }
        let mut turns: Vec<Turn> = members
            .0
            .iter()
            .map(|member| Turn {
                number: member.number,
                weight: member.weight,
                at: (hash(u64::from(member.number), 1) % len as u64) as usize,
                skip: (hash(u64::from(member.number), 2) % (len as u64 - 1)) as usize + 1,
                credit: 0,
            })
            .collect();
        let most = turns.iter().map(|turn| turn.weight).max().unwrap_or(1);
        let (mut entries, mut left) = (vec![FREE; len], len);
        while left > 0 && !turns.is_empty() {
            for turn in &mut turns {
                turn.credit += turn.weight;
                if turn.credit < most || left == 0 {
                    continue;
                }
                turn.credit -= most;
                while entries[turn.at] != FREE {
                    turn.at = (turn.at + turn.skip) % len;
                }
                entries[turn.at] = turn.number;
                left -= 1;
            }
        }
        Self { entries }
    }
}

impl Owners for Maglev {
    fn owner(&self, run: &RunHash) -> u32 {
        self.entries[(key(run) % self.entries.len() as u64) as usize]
    }

    fn bytes(&self) -> usize {
        std::mem::size_of_val(&self.entries[..])
    }
}
