//! How even the shares are, and what a join and a leave move.

use serde::Serialize;

use super::{Member, Members, Owners, Way, runs};
use crate::clock::Started;

/// Runs per member.
pub const RUNS_PER_MEMBER: usize = 10_000;

/// One way, one size of cluster.
#[derive(Clone, Debug, Serialize)]
pub struct Quality {
    /// Which way.
    pub way: String,
    /// Members of weights 1 and 2 in turn.
    pub members: u32,
    /// Runs that were placed.
    pub runs: usize,
    /// The greatest share, relative to its weight's.
    pub max_share: f64,
    /// The smallest share, relative to its weight's.
    pub min_share: f64,
    /// What one of weight 2 joining moves.
    pub join: Moves,
    /// What one leaving moves.
    pub leave: Moves,
    /// What is held in memory.
    pub bytes: usize,
    /// Milliseconds to prepare it; for a table, to follow the one before.
    pub prepare_ms: f64,
}

/// What a change of members moved.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Moves {
    /// Runs moved, relative to the share of the weight that came or went.
    pub over_ideal: f64,
    /// Runs moved, relative to what the newcomer got or the leaver had: 1 when nothing else moved.
    pub over_needed: f64,
    /// Of all runs, those moved between two that were there before and after, per million.
    pub stray_per_million: f64,
}

/// Measures one way.
pub fn measure(way: Way, members: &Members, count: usize) -> Quality {
    let (more, newcomer) = members.joined();
    let (less, leaver) = members.left();
    let base = way.know(members, None);
    let started = Started::now();
    let joined = way.know(&more, Some(&base));
    let prepare_ms = started.seconds() * 1e3;
    let left = way.know(&less, Some(&base));

    let mut shares = vec![0u64; members.0.len()];
    let (mut join, mut leave) = (Account::default(), Account::default());
    for run in runs(1).take(count) {
        let before = base.owner(&run);
        shares[before as usize] += 1;
        join.note(before, joined.owner(&run), |_, to| to == newcomer.number);
        leave.note(before, left.owner(&run), |from, _| from == leaver.number);
    }
    let relative: Vec<f64> = relative(members, &shares, count);
    let part = |member: Member, of: &Members| f64::from(member.weight) / of.weight() as f64;
    Quality {
        way: way.name(),
        members: members.0.len() as u32,
        runs: count,
        max_share: relative.iter().copied().fold(0.0, f64::max),
        min_share: relative.iter().copied().fold(f64::INFINITY, f64::min),
        join: join.moves(count, part(newcomer, &more)),
        leave: leave.moves(count, part(leaver, members)),
        bytes: base.bytes(),
        prepare_ms,
    }
}

/// Shares relative to those of the weights.
pub fn relative(members: &Members, shares: &[u64], count: usize) -> Vec<f64> {
    let unit = count as f64 / members.weight() as f64;
    let of = |(member, &share): (&Member, &u64)| share as f64 / unit / f64::from(member.weight);
    members.0.iter().zip(shares).map(of).collect()
}

#[derive(Default)]
struct Account {
    needed: u64,
    stray: u64,
}

impl Account {
    fn note(&mut self, from: u32, to: u32, needed: impl Fn(u32, u32) -> bool) {
        if from != to {
            *if needed(from, to) {
                &mut self.needed
            } else {
                &mut self.stray
            } += 1;
        }
    }

    fn moves(&self, count: usize, part: f64) -> Moves {
        let (all, count) = ((self.needed + self.stray) as f64, count as f64);
        Moves {
            over_ideal: all / (count * part),
            over_needed: all / self.needed.max(1) as f64,
            stray_per_million: self.stray as f64 / count * 1e6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_without_strays_have_none_and_maglev_has_some() {
        let members = Members::mixed(20);
        for way in Way::all(20) {
            let quality = measure(way, &members, 100_000);
            let strays = quality.join.stray_per_million + quality.leave.stray_per_million;
            assert_eq!(
                strays > 0.0,
                matches!(way, Way::Maglev(_)),
                "{}",
                way.name()
            );
            assert!((0.7..1.4).contains(&quality.join.over_ideal) || strays > 0.0);
            assert!(quality.max_share >= 1.0 && quality.min_share <= 1.0);
        }
    }
}
