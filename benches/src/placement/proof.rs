//! The bars of placement: shares of 100 seeds at 10,000 runs per member, and what a join and a leave move.
//!
//! Every run is placed by the very look-up that nodes and clients use. Of each seed one run in [`MOVES_EVERY`] is placed
//! in the cluster with one more and with one less as well, and any that moves between two that were there before and
//! after is counted.
//!
//! Cost: a thousand members, 100 seeds: 1.1 · 10⁹ look-ups of a thousand members each.
//!
//! With n runs expected, a fair draw alone puts a share off by 1/√n: 1.2 % for the lighter half of 1000 members, whose
//! greatest is then about 1.04 in an ordinary seed and near 1.05 in the worst of a hundred. The figures say what was seen.

use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::quality::{RUNS_PER_MEMBER, relative};
use super::{Known, Members, Owners, Way, runs};
use crate::stats::{quantile, sorted};

/// One run in so many is placed before and after a join and a leave.
pub const MOVES_EVERY: usize = 16;

/// One size of cluster, all seeds.
#[derive(Clone, Debug, Serialize)]
pub struct Proof {
    /// Members of weights 1 and 2 in turn.
    pub members: u32,
    /// Seeds, each with other runs.
    pub seeds: u64,
    /// Runs of a seed.
    pub runs: usize,
    /// How far any member's mean share over the seeds is off its weight; the bar is 0.005.
    pub mean_share_off: f64,
    /// Median over seeds of the greatest share; the bar is 1.05.
    pub max_share: f64,
    /// The greatest share of any seed.
    pub worst_share: f64,
    /// Seeds whose greatest share is above 1.05.
    pub seeds_above: usize,
    /// Runs that were placed before and after a join and a leave; those of them that moved; and those that moved although
    /// neither the newcomer gained nor the leaver lost them. The bar is 0.
    pub compared: u64,
    /// See `compared`.
    pub moved: u64,
    /// See `compared`.
    pub strays: u64,
    /// Standard deviation of all shares in units of a fair draw's; 1 is perfect chance.
    pub spread_over_fair: f64,
}

/// Places `seeds` × 10,000 runs per member, on all cores; `after` is called after each seed.
pub fn prove(members: u32, seeds: u64, after: impl Fn() + Sync) -> Proof {
    let cluster = Members::mixed(members);
    let known = Way::Rendezvous.know(&cluster, None);
    let change = Change::new(&cluster);
    let count = RUNS_PER_MEMBER * members as usize;
    let (next, found) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let account = Mutex::new(Moved::default());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                return;
            }
            let mut shares = vec![0u64; members as usize];
            let mut moved = Moved::default();
            for (number, run) in runs(1000 + seed).take(count).enumerate() {
                let owner = known.owner(&run);
                shares[owner as usize] += 1;
                if number % MOVES_EVERY == 0 {
                    change.note(&run, owner, &mut moved);
                }
            }
            account
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .add(&moved);
            let shares = relative(&cluster, &shares, count);
            found.lock().unwrap_or_else(|e| e.into_inner()).push(shares);
            after();
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let found = found.into_inner().unwrap_or_else(|e| e.into_inner());
    let account = account.into_inner().unwrap_or_else(|e| e.into_inner());
    judge(&cluster, &found, count, &account)
}

/// The cluster with one more and with one less.
struct Change {
    joined: Known,
    newcomer: u32,
    left: Known,
    leaver: u32,
}

#[derive(Default)]
struct Moved {
    compared: u64,
    moved: u64,
    strays: u64,
}

impl Change {
    fn new(cluster: &Members) -> Self {
        let ((more, newcomer), (less, leaver)) = (cluster.joined(), cluster.left());
        Self {
            joined: Way::Rendezvous.know(&more, None),
            newcomer: newcomer.number,
            left: Way::Rendezvous.know(&less, None),
            leaver: leaver.number,
        }
    }

    fn note(&self, run: &kvproto::RunHash, owner: u32, account: &mut Moved) {
        let (joined, left) = (self.joined.owner(run), self.left.owner(run));
        account.compared += 1;
        account.moved += u64::from(joined != owner) + u64::from(left != owner);
        let strays_in = joined != owner && joined != self.newcomer;
        // What the leaver had has to go, and nothing else may.
        let strays_out = (left != owner) != (owner == self.leaver);
        account.strays += u64::from(strays_in) + u64::from(strays_out);
    }
}

impl Moved {
    fn add(&mut self, other: &Self) {
        self.compared += other.compared;
        self.moved += other.moved;
        self.strays += other.strays;
    }
}

fn judge(cluster: &Members, found: &[Vec<f64>], count: usize, account: &Moved) -> Proof {
    let seeds = found.len() as f64;
    let mean = |at: usize| found.iter().map(|shares| shares[at]).sum::<f64>() / seeds;
    let greatest: Vec<f64> = found
        .iter()
        .map(|shares| shares.iter().copied().fold(0.0, f64::max))
        .collect();
    let unit = count as f64 / cluster.weight() as f64;
    let fair = |at: usize| 1.0 / (unit * f64::from(cluster.0[at].weight));
    let square = |(at, share): (usize, &f64)| (share - 1.0).powi(2) / fair(at);
    let squares: f64 = found
        .iter()
        .flat_map(|shares| shares.iter().enumerate())
        .map(square)
        .sum();
    // One degree of freedom of each seed is spent: shares add up.
    let freedom = seeds * (cluster.0.len() - 1) as f64;
    let ordered = sorted(&greatest);
    Proof {
        members: cluster.0.len() as u32,
        seeds: found.len() as u64,
        runs: count,
        mean_share_off: (0..cluster.0.len())
            .map(|at| (mean(at) - 1.0).abs())
            .fold(0.0, f64::max),
        max_share: quantile(&ordered, 0.5).unwrap_or(f64::NAN),
        worst_share: ordered.last().copied().unwrap_or(f64::NAN),
        seeds_above: greatest.iter().filter(|&&share| share > 1.05).count(),
        compared: account.compared,
        moved: account.moved,
        strays: account.strays,
        spread_over_fair: (squares / freedom).sqrt(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_members_are_as_even_as_a_fair_draw() {
        let proof = prove(10, 8, || ());
        assert_eq!(
            (proof.seeds, proof.runs, proof.seeds_above),
            (8, 100_000, 0)
        );
        assert!(proof.max_share < 1.05 && proof.worst_share >= proof.max_share);
        assert!((0.7..1.3).contains(&proof.spread_over_fair), "{proof:?}");
        assert_eq!((proof.compared, proof.strays), (8 * 6250, 0));
        // One of 17 and one of 15 parts: the newcomer's two, the leaver's two.
        let ideal = proof.compared as f64 * (2.0 / 17.0 + 2.0 / 15.0);
        assert!(
            (0.95..1.05).contains(&(proof.moved as f64 / ideal)),
            "{proof:?}"
        );
    }
}
