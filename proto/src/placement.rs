//! Which members own a run: weighted rendezvous hashing.
//!
//! ```text
//! for every member:  u = XXH3-64(run hash │ id) as a number in (0, 1)     score = weight / -ln(u)
//! owners:            the highest score, then the next ones that sit in zones not yet used
//! ```
//!
//! A pure function of a view and a run: no table, no publisher, no vote. Each member wins its exact share by
//! weight, and a join or a change of weight moves only runs towards whoever gained.
//!
//! `u` is ((h >> 12) + ½) / 2^52, never 0 or 1. `ln` is computed here from additions, multiplications and
//! divisions alone, in a fixed order, because two nodes must agree to the last bit and the `ln` of two platforms may
//! not. Ties go to the smaller id.
//!
//! Shape: runs, never blocks or parts; equal runs have equal owners whatever part is asked for.
//! Cost: one short hash and one logarithm per member, about 20 µs for 1000 members.
//! Errors: none; no candidate, no owner.
//! Source: Thaler and Ravishankar 1998 (rendezvous), Schindelhauer and Schomaker 2005 (weights).

use twox_hash::XxHash3_64;

use crate::key::RunHash;
use crate::view::{Member, View};

/// The owners of `run`, first the primary: at most `count` members, in other zones where the view has them.
///
/// Joining and active members with a weight take runs. When fewer zones than `count` exist, the next in order fill
/// up, so that the answer is as long as the view allows.
pub fn owners<'a>(view: &'a View, run: &RunHash, count: usize) -> Vec<&'a Member> {
    if count == 1 {
        // The usual question needs no order, only the best.
        let best = candidates(view)
            .map(|member| (score(member, run), member))
            .reduce(better);
        return best.map(|(_, member)| member).into_iter().collect();
    }
    let mut left = ranked(view, run);
    let mut owners: Vec<&Member> = Vec::with_capacity(count.min(left.len()));
    while owners.len() < count && !left.is_empty() {
        let fresh_zone = |member: &&Member| owners.iter().all(|owner| owner.zone != member.zone);
        let at = left.iter().position(fresh_zone).unwrap_or(0);
        owners.push(left.remove(at));
    }
    owners
}

/// Every member that takes runs, best score first: where to look next when an owner misses during a change.
pub fn ranked<'a>(view: &'a View, run: &RunHash) -> Vec<&'a Member> {
    let mut scored: Vec<(f64, &Member)> = candidates(view)
        .map(|member| (score(member, run), member))
        .collect();
    scored.sort_by(|(a, x), (b, y)| b.total_cmp(a).then_with(|| x.id.cmp(&y.id)));
    scored.into_iter().map(|(_, member)| member).collect()
}

fn candidates(view: &View) -> impl Iterator<Item = &Member> {
    view.members()
        .iter()
        .filter(|member| member.state.takes_runs() && member.weight > 0)
}

/// The higher score; members come in the order of their ids, so a tie keeps the smaller id.
fn better<'a>(best: (f64, &'a Member), next: (f64, &'a Member)) -> (f64, &'a Member) {
    if next.0 > best.0 { next } else { best }
}

/// What `member` bids for `run`.
fn score(member: &Member, run: &RunHash) -> f64 {
    const STACK: usize = 96;
    let id = member.id.0.as_bytes();
    let mut stack = [0; STACK];
    let hash = if 32 + id.len() <= STACK {
        stack[..32].copy_from_slice(&run.0);
        stack[32..32 + id.len()].copy_from_slice(id);
        XxHash3_64::oneshot(&stack[..32 + id.len()])
    } else {
        XxHash3_64::oneshot(&[&run.0, id].concat())
    };
    let u = ((hash >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
    f64::from(member.weight) / -ln(u)
}

/// Natural logarithm of a normal number in (0, 1), to within a few units in the last place.
///
/// ln(m · 2^e) = e · ln 2 + 2 artanh((m - 1) / (m + 1)), with m in (√½, √2] and artanh by its series.
fn ln(u: f64) -> f64 {
    let bits = u.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut m = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if m > std::f64::consts::SQRT_2 {
        m /= 2.0;
        exponent += 1;
    }
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    // s² is below 0.03, so the term after z^11 is beneath the last bit.
    let mut series = 0.0;
    for k in (0..12).rev() {
        series = series * z + 1.0 / f64::from(2 * k + 1);
    }
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * series
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::{ln, owners, ranked};
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
            prop_assert_eq!(distinct(first), first.len());
            if count > 0 {
                prop_assert_eq!(owners[0], ranked(&view, &run)[0]);
                prop_assert_eq!(&owners[..1], &super::owners(&view, &run, 1)[..]);
            }
        }

        #[test]
        fn the_logarithm_is_right_to_its_last_bits(h in any::<u64>()) {
            let u = ((h >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
            let error = (ln(u) / u.ln() - 1.0).abs();
            prop_assert!(error < 1e-15, "{u}: {error}");
        }
    }

    #[test]
    fn the_logarithm_is_finite_and_negative_at_both_ends() {
        for h in [0, 1, u64::MAX, u64::MAX - (1 << 12)] {
            let u = ((h >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
            assert!(ln(u) < 0.0 && ln(u).is_finite(), "{u}");
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
