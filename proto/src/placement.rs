//! Which members own a run: weighted rendezvous hashing.
//!
//! ```text
//! View ──new──► Placement (a seed, a weight and a zone for each member that takes runs)
//!                   │
//!          run ─────┴─► every member bids weight / -ln(u), u drawn by run and id   (`score`)
//!                       first: the highest bid     owners: the first, then the next in other zones (`zones`)
//!                                                  ranked: all, by falling bid
//! ```
//!
//! A pure function of a view and a run: no table, no publisher, no vote. Each member wins its exact share by
//! weight, and a join or a change of weight moves only runs towards whoever gained. Ties go to the smaller id.
//!
//! [`Placement`] is prepared once per view and asked often. [`owners`] and [`ranked`] prepare one for a single
//! question, for tests and tools.
//!
//! Shape: runs, never blocks or parts; equal runs have equal owners whatever part is asked for.
//! Cost: one hash of the run, a mix and a comparison of integers per member, a logarithm per distinct weight at most;
//! preparing hashes every id once.
//! Errors: none; no candidate, no owner.
//! Source: Thaler and Ravishankar 1998 (rendezvous), Schindelhauer and Schomaker 2005 (weights).

mod score;
mod zones;

use std::collections::BTreeMap;

use score::{Draw, seed};
use zones::Lifts;

use crate::key::RunHash;
use crate::view::{Member, MemberId, View};

/// A view made ready to be asked who owns what; joining and active members with a weight take runs.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    bidders: Vec<Bidder>, // in the order of their ids
    ids: Vec<MemberId>,
    classes: Vec<Class>,
    zone_count: usize,
    lifts: Option<Lifts>, // only where zones are of very unequal weight
}

#[derive(Clone, Copy, Debug)]
struct Bidder {
    seed: u64,
    weight: f64,
    zone: u32,
}

/// Members of one weight: among them the greatest draw wins, and no logarithm is needed to see which that is.
#[derive(Clone, Debug)]
struct Class {
    weight: f64,
    seeds: Vec<u64>,
    /// Which bidder each seed is of, ascending.
    at: Vec<u32>,
}

impl Placement {
    /// What `view` says of owners.
    pub fn new(view: &View) -> Self {
        let takers = || {
            view.members()
                .iter()
                .filter(|member| member.state.takes_runs() && member.weight > 0)
        };
        let mut zones: BTreeMap<&str, u64> = BTreeMap::new();
        for member in takers() {
            *zones.entry(&member.zone).or_default() += u64::from(member.weight);
        }
        let names: Vec<&str> = zones.keys().copied().collect();
        let weights: Vec<u64> = zones.into_values().collect();
        let bidder = |member: &Member| Bidder {
            seed: seed(member.id.0.as_bytes()),
            weight: f64::from(member.weight),
            zone: names.partition_point(|name| *name < member.zone.as_str()) as u32,
        };
        let bidders: Vec<Bidder> = takers().map(bidder).collect();
        Self {
            classes: classes(&bidders),
            bidders,
            ids: takers().map(|member| member.id.clone()).collect(),
            zone_count: weights.len(),
            lifts: Lifts::new(&weights),
        }
    }

    /// How many members take runs.
    pub fn len(&self) -> usize {
        self.bidders.len()
    }

    /// True when nobody takes runs.
    pub fn is_empty(&self) -> bool {
        self.bidders.is_empty()
    }

    /// The first owner of `run`; `None` when nobody takes runs.
    pub fn first(&self, run: &RunHash) -> Option<&MemberId> {
        let key = seed(&run.0);
        let (mut best, mut winner) = (0.0, usize::MAX);
        for class in &self.classes {
            let (draw, nth) = Draw::greatest(key, &class.seeds);
            if draw.loses_to(best, class.weight) {
                continue;
            }
            let (score, at) = (draw.score(class.weight), class.at[nth] as usize);
            if score > best || (score == best && at < winner) {
                (best, winner) = (score, at);
            }
        }
        self.ids.get(winner)
    }

    /// The owners of `run`, first the primary: at most `count` members, in other zones where the view has them.
    ///
    /// When fewer zones than `count` exist, the next in order fill up, so that the answer is as long as the view
    /// allows. Where zones are of very unequal weight, other zones than the first owner's bid with a lift, so that
    /// nobody is starved or buried (`placement/zones.rs`).
    pub fn owners(&self, run: &RunHash, count: usize) -> Vec<&MemberId> {
        let count = count.min(self.len());
        if count <= 1 {
            return self.first(run).into_iter().take(count).collect();
        }
        let key = seed(&run.0);
        let owners = match &self.lifts {
            Some(lifts) => self.lifted(key, count, lifts),
            None => self.plain(key, count),
        };
        owners.into_iter().map(|at| &self.ids[at]).collect()
    }

    /// The best of the best zones, then, only where zones are too few, the best of all.
    fn plain(&self, key: u64, count: usize) -> Vec<usize> {
        let of_zones = count.min(self.zone_count);
        let (mut apart, mut next) = (Best::new(of_zones), Best::new(count));
        let mut floor = 0.0;
        for (at, bidder) in self.bidders.iter().enumerate() {
            let draw = Draw::new(key, bidder.seed);
            if draw.loses_to(floor, bidder.weight) {
                continue;
            }
            let bid = bidder.bid(at, draw);
            apart.take(bid, |known| known.zone == bid.zone);
            floor = apart.floor();
            if of_zones < count {
                next.take(bid, |_| false);
                floor = floor.min(next.floor());
            }
        }
        let mut owners: Vec<usize> = apart.bids.iter().map(|bid| bid.at).collect();
        fill(&mut owners, count, next.bids);
        owners
    }

    /// The best of all, then again and again whoever has the least left to wait, in a zone not used yet.
    fn lifted(&self, key: u64, count: usize, lifts: &Lifts) -> Vec<usize> {
        let heavy = lifts.heavy();
        let mut best_of: Vec<Option<Bid>> = vec![None; self.zone_count];
        let mut of_heavy = Best::new(count);
        for (at, bidder) in self.bidders.iter().enumerate() {
            let draw = Draw::new(key, bidder.seed);
            let is_heavy = heavy.is_some_and(|(zone, _)| zone == bidder.zone);
            let known = &mut best_of[bidder.zone as usize];
            let best = known.map_or(0.0, |bid| bid.score);
            let floor = if is_heavy { of_heavy.floor() } else { best };
            if draw.loses_to(floor, bidder.weight) {
                continue;
            }
            let bid = bidder.bid(at, draw);
            if bid.score > best {
                *known = Some(bid);
            }
            if is_heavy {
                of_heavy.take(bid, |_| false);
            }
        }
        let mut left: Vec<Bid> = best_of.into_iter().flatten().collect();
        let Some(first) = left.iter().copied().reduce(Bid::better) else {
            return Vec::new();
        };
        let mut owners = vec![first.at];
        left.retain(|bid| bid.zone != first.zone);
        let mut inside = of_heavy.bids.into_iter().peekable();
        let mut heavy_used = heavy.is_some_and(|(zone, _)| zone == first.zone);
        while owners.len() < count {
            while inside.next_if(|bid| owners.contains(&bid.at)).is_some() {}
            // Least first; a tie goes to the smaller id.
            let mut next: Option<(f64, Bid)> = None;
            let outside = left
                .iter()
                .map(|bid| (bid.wait(&first) / lifts.of(bid.zone), *bid));
            let inner = inside.peek().filter(|_| heavy_used).zip(heavy);
            let inner = inner.map(|(bid, (_, lift))| (bid.wait(&first) / lift, *bid));
            for (wait, bid) in outside.chain(inner) {
                let better = next.is_none_or(|(least, known)| {
                    wait.total_cmp(&least).then(bid.at.cmp(&known.at)).is_lt()
                });
                if better {
                    next = Some((wait, bid));
                }
            }
            let Some((_, bid)) = next else { break };
            owners.push(bid.at);
            left.retain(|other| other.zone != bid.zone);
            heavy_used |= heavy.is_some_and(|(zone, _)| zone == bid.zone);
        }
        if owners.len() < count {
            fill(&mut owners, count, self.bids(key));
        }
        owners
    }

    /// Every member that takes runs, best bid first: where to look next when an owner misses during a change.
    pub fn ranked(&self, run: &RunHash) -> Vec<&MemberId> {
        let bids = self.bids(seed(&run.0));
        bids.into_iter().map(|bid| &self.ids[bid.at]).collect()
    }

    /// Every bid, best first.
    fn bids(&self, key: u64) -> Vec<Bid> {
        let bid = |(at, bidder): (usize, &Bidder)| bidder.bid(at, Draw::new(key, bidder.seed));
        let mut bids: Vec<Bid> = self.bidders.iter().enumerate().map(bid).collect();
        bids.sort_unstable_by(|x, y| y.score.total_cmp(&x.score).then(x.at.cmp(&y.at)));
        bids
    }
}

impl Bidder {
    fn bid(&self, at: usize, draw: Draw) -> Bid {
        Bid {
            score: draw.score(self.weight),
            at,
            zone: self.zone,
        }
    }
}

/// The bidders by weight, the heaviest first: whoever is likely to win sets the mark for the others.
fn classes(bidders: &[Bidder]) -> Vec<Class> {
    let mut order: Vec<u32> = (0..bidders.len() as u32).collect();
    order.sort_by(|&a, &b| {
        bidders[b as usize]
            .weight
            .total_cmp(&bidders[a as usize].weight)
    });
    let of_one_weight =
        |&a: &u32, &b: &u32| bidders[a as usize].weight == bidders[b as usize].weight;
    let class = |at: &[u32]| Class {
        weight: bidders[at[0] as usize].weight,
        seeds: at.iter().map(|&at| bidders[at as usize].seed).collect(),
        at: at.to_vec(),
    };
    order.chunk_by(of_one_weight).map(class).collect()
}

#[derive(Clone, Copy)]
struct Bid {
    score: f64,
    at: usize,
    zone: u32,
}

impl Bid {
    fn better(self, other: Self) -> Self {
        let order = self
            .score
            .total_cmp(&other.score)
            .then(other.at.cmp(&self.at));
        if order.is_lt() { other } else { self }
    }

    /// What is left of this bid's delay when `first` has won.
    fn wait(&self, first: &Self) -> f64 {
        1.0 / self.score - 1.0 / first.score
    }
}

/// Adds the next in order until there are `count`.
fn fill(owners: &mut Vec<usize>, count: usize, bids: Vec<Bid>) {
    for bid in bids {
        if owners.len() < count && !owners.contains(&bid.at) {
            owners.push(bid.at);
        }
    }
}

/// The best few bids, best first.
struct Best {
    bids: Vec<Bid>,
    limit: usize,
}

impl Best {
    fn new(limit: usize) -> Self {
        Self {
            bids: Vec::with_capacity(limit + 1),
            limit,
        }
    }

    /// What a bid must exceed to be taken.
    fn floor(&self) -> f64 {
        if self.bids.len() < self.limit {
            return 0.0;
        }
        self.bids.last().map_or(0.0, |bid| bid.score)
    }

    /// Takes a bid that is good enough; of those that are `rivals` only the best stays. Bids come in the order of
    /// ids, so a tie keeps the smaller id.
    fn take(&mut self, bid: Bid, rivals: impl Fn(&Bid) -> bool) {
        if let Some(at) = self.bids.iter().position(rivals) {
            if self.bids[at].score >= bid.score {
                return;
            }
            self.bids.remove(at);
        }
        let at = self.bids.partition_point(|known| known.score >= bid.score);
        self.bids.insert(at, bid);
        self.bids.truncate(self.limit);
    }
}

/// The owners of `run` in `view`; see [`Placement::owners`].
pub fn owners<'a>(view: &'a View, run: &RunHash, count: usize) -> Vec<&'a Member> {
    known(view, Placement::new(view).owners(run, count))
}

/// Every member of `view` that takes runs, best bid first; see [`Placement::ranked`].
pub fn ranked<'a>(view: &'a View, run: &RunHash) -> Vec<&'a Member> {
    known(view, Placement::new(view).ranked(run))
}

fn known<'a>(view: &'a View, ids: Vec<&MemberId>) -> Vec<&'a Member> {
    ids.into_iter().filter_map(|id| view.get(id)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::{owners, ranked};
    use crate::key::RunHash;
    use crate::view::tests::member;
    use crate::view::{Member, MemberState, View};

    fn run(number: u32) -> RunHash {
        RunHash(blake3::hash(&number.to_le_bytes()).into())
    }

    fn view(weights: &[u32]) -> View {
        View::new(
            weights
                .iter()
                .enumerate()
                .map(|(i, &weight)| member(&format!("m{i}"), weight, &format!("z{}", i % 3))),
        )
    }

    proptest! {
        #[test]
        fn a_join_moves_only_what_the_newcomer_gains(
            weights in vec(0u32..5, 1..12), newcomer in 1u32..5, run in any::<[u8; 32]>(),
        ) {
            let run = RunHash(run);
            let before = view(&weights);
            let mut after = before.clone();
            after.merge_one(member("newcomer", newcomer, "z9"));
            let order: Vec<&Member> =
                ranked(&after, &run).into_iter().filter(|member| member.id.0 != "newcomer").collect();
            prop_assert_eq!(order, ranked(&before, &run));
            let (old, new) = (owners(&before, &run, 1), owners(&after, &run, 1));
            prop_assert!(new[0].id.0 == "newcomer" || new == old);
        }

        #[test]
        fn a_heavier_member_only_gains(weights in vec(1u32..5, 2..9), run in any::<[u8; 32]>()) {
            let run = RunHash(run);
            let before = view(&weights);
            let mut heavier = before.members()[0].clone();
            (heavier.weight, heavier.version) = (heavier.weight + 3, 2);
            let mut after = before.clone();
            after.merge_one(heavier.clone());
            let (old, new) = (owners(&before, &run, 1)[0], owners(&after, &run, 1)[0]);
            prop_assert!(old.id == new.id || new.id == heavier.id);
        }

        #[test]
        fn replicas_use_every_zone_before_one_twice(
            weights in vec(1u32..5, 1..12), count in 0usize..9, run in any::<[u8; 32]>(),
        ) {
            let run = RunHash(run);
            let view = view(&weights);
            let owners = owners(&view, &run, count);
            prop_assert_eq!(owners.len(), count.min(weights.len()));
            let zones = weights.len().min(3);
            let distinct = |owners: &[&Member]| {
                let mut zones: Vec<&str> = owners.iter().map(|owner| owner.zone.as_str()).collect();
                zones.sort_unstable();
                zones.dedup();
                zones.len()
            };
            let first = &owners[..owners.len().min(zones)];
            let weight_of = |zone: usize| weights.iter().skip(zone).step_by(3).sum::<u32>();
            let heavy = (0..3).any(|zone| weight_of(zone) * 4 > weights.iter().sum::<u32>() * 3);
            prop_assert!(heavy || distinct(first) == first.len());
            if count > 0 {
                prop_assert_eq!(owners[0], ranked(&view, &run)[0]);
                prop_assert_eq!(&owners[..1], &super::owners(&view, &run, 1)[..]);
            }
        }
    }

    #[test]
    fn shares_follow_the_weights() {
        let view = view(&[1, 2, 3, 4]);
        let mut shares = [0u32; 4];
        for i in 0..20_000 {
            let owner = &owners(&view, &run(i), 1)[0].id.0;
            shares[owner[1..].parse::<usize>().unwrap()] += 1;
        }
        for (i, share) in shares.iter().enumerate() {
            let expected = 2000.0 * (i + 1) as f64;
            // Four standard deviations of a binomial.
            assert!(
                (f64::from(*share) - expected).abs() < 4.0 * expected.sqrt(),
                "{shares:?}"
            );
        }
    }

    #[test]
    fn who_drains_has_left_or_weighs_nothing_owns_nothing() {
        let mut members = [
            member("a", 1, "x"),
            member("b", 1, "x"),
            member("c", 0, "x"),
            member("d", 1, "x"),
        ];
        members[0].state = MemberState::Draining;
        members[1].state = MemberState::Gone;
        members[3].state = MemberState::Joining;
        let view = View::new(members);
        for i in 0..50 {
            assert_eq!(
                owners(&view, &run(i), 3)
                    .iter()
                    .map(|owner| &owner.id.0)
                    .collect::<Vec<_>>(),
                ["d"]
            );
        }
        assert!(owners(&View::default(), &run(0), 1).is_empty());
    }
}
