//! Who owns what: rendezvous hashing beside what others use, and beside a store that is asked.
//!
//! ```text
//!   cluster ── members, before and after a join or a leave
//!   rendezvous  ring  maglev  table      one [`Owners`] each: what it knows, whom it answers
//!        └────────────┴──────────┴──► quality: shares and moves        speed: ns per look-up, in interleaved rounds
//!   proof       the bars of placement, 100 seeds
//!   stores      512 keys: a node's lookup, etcd, Redis as an index
//! ```
//!
//! All answer for a run's 32 bytes and hash them alike (XXH3-64), so a look-up's price is the whole one. A ring has its
//! number of points per unit of weight; Maglev's and the table's members take turns or have quotas by weight.
//!
//! Units: shares relative to the weight's, moves relative to the least possible, nanoseconds, bytes.

pub mod maglev;
pub mod proof;
pub mod quality;
pub mod rendezvous;
pub mod ring;
pub mod speed;
pub mod stores;
pub mod table;

use kvproto::{MemberId, MemberState, RunHash, View};
use serde::Serialize;
use twox_hash::XxHash3_64;

pub use maglev::Maglev;
pub use rendezvous::Rendezvous;
pub use ring::Ring;
pub use table::SlotTable;

/// Somebody who takes runs, as the algorithms see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Stays the same over joins and leaves.
    pub number: u32,
    /// Its share, relative to the others'.
    pub weight: u32,
}

/// The members of a cluster, in the order of their numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members(pub Vec<Member>);

impl Members {
    /// `count` members of weights 1 and 2 in turn.
    pub fn mixed(count: u32) -> Self {
        Self(
            (0..count)
                .map(|number| Member {
                    number,
                    weight: 1 + number % 2,
                })
                .collect(),
        )
    }

    /// The same and one more, of weight 2.
    pub fn joined(&self) -> (Self, Member) {
        let number = self.0.last().map_or(0, |last| last.number + 1);
        let newcomer = Member { number, weight: 2 };
        let mut all = self.clone();
        all.0.push(newcomer);
        (all, newcomer)
    }

    /// The same without the one in the middle.
    pub fn left(&self) -> (Self, Member) {
        let mut rest = self.clone();
        let leaver = rest.0.remove(self.0.len() / 2);
        (rest, leaver)
    }

    /// All weight.
    pub fn weight(&self) -> u64 {
        self.0.iter().map(|member| u64::from(member.weight)).sum()
    }

    /// As Terrace sees them: ids that differ in their digits, five zones.
    pub fn view(&self) -> View {
        View::new(self.0.iter().map(|member| kvproto::Member {
            id: id(member.number),
            generation: 1,
            version: 1,
            weight: member.weight,
            zone: format!("zone-{}", member.number % 5),
            state: MemberState::Active,
            address: String::new(),
        }))
    }
}

fn id(number: u32) -> MemberId {
    MemberId(format!("node-{number:04}"))
}

/// A way to know owners.
pub trait Owners {
    /// The number of the owner.
    fn owner(&self, run: &RunHash) -> u32;
    /// What it holds in memory, without the names of members.
    fn bytes(&self) -> usize;
}

/// The ways that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Terrace's.
    Rendezvous,
    /// A ring with so many points per unit of weight.
    Ring(usize),
    /// Maglev with a table of so many entries (a prime).
    Maglev(usize),
    /// A table of slots with as few moves as possible; needs its own past.
    Table(usize),
}

impl Way {
    /// All of them, for so many members.
    pub fn all(members: u32) -> [Self; 6] {
        let slots = if members <= 100 { 16_384 } else { 65_536 };
        [
            Self::Rendezvous,
            Self::Ring(160),
            Self::Ring(750),
            Self::Maglev(65_537),
            Self::Maglev(655_373),
            Self::Table(slots),
        ]
    }

    /// As it is written in reports.
    pub fn name(self) -> String {
        match self {
            Self::Rendezvous => "rendezvous (Terrace)".into(),
            Self::Ring(points) => format!("ring, {points} points"),
            Self::Maglev(entries) => format!("Maglev {entries}"),
            Self::Table(slots) => format!("slot table {slots}"),
        }
    }

    /// Knows `members`; `before` is what a way with a past starts from.
    pub fn know(self, members: &Members, before: Option<&Known>) -> Known {
        match self {
            Self::Rendezvous => Known::Rendezvous(Rendezvous::new(members)),
            Self::Ring(points) => Known::Ring(Ring::new(members, points)),
            Self::Maglev(entries) => Known::Maglev(Maglev::new(members, entries)),
            Self::Table(slots) => {
                let past = match before {
                    Some(Known::Table(table)) => Some(table),
                    _ => None,
                };
                Known::Table(SlotTable::new(members, slots, past))
            }
        }
    }
}

/// One of them, prepared.
#[derive(Clone)]
pub enum Known {
    /// See [`Way::Rendezvous`].
    Rendezvous(Rendezvous),
    /// See [`Way::Ring`].
    Ring(Ring),
    /// See [`Way::Maglev`].
    Maglev(Maglev),
    /// See [`Way::Table`].
    Table(SlotTable),
}

impl Owners for Known {
    fn owner(&self, run: &RunHash) -> u32 {
        match self {
            Self::Rendezvous(known) => known.owner(run),
            Self::Ring(known) => known.owner(run),
            Self::Maglev(known) => known.owner(run),
            Self::Table(known) => known.owner(run),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Rendezvous(known) => known.bytes(),
            Self::Ring(known) => known.bytes(),
            Self::Maglev(known) => known.bytes(),
            Self::Table(known) => known.bytes(),
        }
    }
}

/// The hash of a run, the same for all.
#[inline]
fn key(run: &RunHash) -> u64 {
    XxHash3_64::oneshot(&run.0)
}

/// A hash of two numbers, for what the ways lay out once.
fn hash(a: u64, b: u64) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&a.to_le_bytes());
    bytes[8..].copy_from_slice(&b.to_le_bytes());
    XxHash3_64::oneshot(&bytes)
}

/// Runs that look like hashes, as many as wanted; a seed gives the same ones everywhere.
pub fn runs(seed: u64) -> impl Iterator<Item = RunHash> {
    let mut state = seed << 32;
    std::iter::repeat_with(move || {
        let mut run = [0; 32];
        for word in run.chunks_exact_mut(8) {
            // SplitMix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word.copy_from_slice(&(x ^ (x >> 31)).to_le_bytes());
        }
        RunHash(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_answers_a_member_and_the_same_one_again() {
        let members = Members::mixed(10);
        for way in Way::all(10) {
            let (one, two) = (way.know(&members, None), way.know(&members, None));
            for run in runs(1).take(1000) {
                assert!(one.owner(&run) < 10 && one.owner(&run) == two.owner(&run));
            }
            assert!(one.bytes() > 0, "{}", way.name());
        }
    }

    #[test]
    fn joins_and_leaves_change_one_member() {
        let members = Members::mixed(10);
        let ((more, newcomer), (less, leaver)) = (members.joined(), members.left());
        assert_eq!((more.0.len(), newcomer.number, more.weight()), (11, 10, 17));
        assert_eq!((less.0.len(), leaver.number), (9, 5));
        assert!(!less.0.contains(&leaver));
    }
}
