//! How strongly each zone bids for second copies.
//!
//! ```text
//! share of a zone     W = its weight / all weight
//! plain rule          the next in another zone:     second copies of zone k = W_k · Σ_{j≠k} W_j / (1 - W_j)
//! zones of one size   that is W_k: nothing to do
//! 50 : 25 : 25        that is 0.67 W, 1.33 W, 1.33 W: the small zones are overloaded, the large one starves
//! ```
//!
//! A lift λ per zone corrects that. Behind the first owner the bids start anew: if a member's delay is
//! `E = 1 / score = -ln(u) / weight`, then what is left of it, `E - E_first`, is again exponential with its weight (it has
//! no memory), so that the least `(E - E_first) / λ` among the other zones falls to zone k with probability
//! `λ_k W_k / Σ λ_m W_m`, exactly. With all λ equal this is the plain rule, and λ are found by correcting what is off,
//! round after round.
//!
//! Only what is off by more than [`SLACK`] is corrected. Zones of about one size keep λ = 1, where a join or leave moves
//! nothing between survivors; otherwise λ follow the weights, and a join moves a little between other zones as well.
//!
//! More than half of the weight in one zone: every run whose first owner is outside has its second copy inside, and the
//! other zones hold more than their share. Up to [`MOST`] times their share of second copies they must; beyond that,
//! which takes three quarters of all weight in one zone, the rest of the second copies stays in that zone, because a
//! small zone that took all of them would be buried. This is the only case of two copies in one zone while there are
//! others.
//!
//! Shape: zones in the order of their names. Every step is an addition, multiplication or division in a fixed order, so
//! that two nodes agree to the last bit.
//! Errors: none.
//! Source: Durbin 1967 and Chen, Dempster and Liu 1994 (sampling with given shares), memorylessness as in rendezvous.

/// How far a zone's second copies may be off its share before they are corrected: a tenth of all its copies. Three zones
/// of 3, 2 and 2 equal nodes are just within.
const SLACK: f64 = 0.2;

/// How many times its share of second copies a zone takes before copies stay in the first owner's zone.
const MOST: f64 = 3.0;

/// Rounds of correction; ten get within a thousandth of the band unless one zone has about half of the weight.
const ROUNDS: usize = 16;

/// The lifts of a view whose zones are of very unequal weight.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Lifts {
    of_zone: Vec<f64>,
    /// The zone with more than three quarters of all weight, and its lift for second copies of its own runs.
    heavy: Option<(u32, f64)>,
}

impl Lifts {
    /// The lifts of zones with these weights; `None` when the plain rule is good enough.
    pub(super) fn new(weights: &[u64]) -> Option<Self> {
        if weights.len() < 2 {
            return None;
        }
        let total = weights.iter().sum::<u64>() as f64;
        let shares: Vec<f64> = weights
            .iter()
            .map(|&weight| weight as f64 / total)
            .collect();
        let of_zone = lifts(&shares);
        let heavy = heavy(&shares, &of_zone);
        // Two zones leave no choice, whatever the lifts.
        let chosen = shares.len() > 2 && of_zone.iter().any(|&lift| lift != 1.0);
        (chosen || heavy.is_some()).then_some(Self { of_zone, heavy })
    }

    /// The lift of a zone that has no copy yet.
    pub(super) fn of(&self, zone: u32) -> f64 {
        self.of_zone[zone as usize]
    }

    /// The zone that may hold two copies, and its lift for the second.
    pub(super) fn heavy(&self) -> Option<(u32, f64)> {
        self.heavy
    }
}

fn lifts(shares: &[f64]) -> Vec<f64> {
    let mut lifts = vec![1.0; shares.len()];
    for _ in 0..ROUNDS {
        let mut bids = 0.0;
        for (share, lift) in shares.iter().zip(&lifts) {
            bids += lift * share;
        }
        let rest = |at: usize, lifts: &[f64]| shares[at] / (bids - lifts[at] * shares[at]);
        let mut all = 0.0;
        for at in 0..shares.len() {
            all += rest(at, &lifts);
        }
        // What each zone gets, relative to its share.
        let gets: Vec<f64> = (0..shares.len())
            .map(|at| lifts[at] * (all - rest(at, &lifts)))
            .collect();
        let mut settled = true;
        for (lift, got) in lifts.iter_mut().zip(gets) {
            let wanted = got.clamp(1.0 - SLACK, 1.0 + SLACK);
            if wanted != got {
                // At most twofold a round: what cannot be had must not run away.
                *lift *= (wanted / got).clamp(0.5, 2.0);
                settled = false;
            }
        }
        if settled {
            break;
        }
    }
    lifts
}

fn heavy(shares: &[f64], lifts: &[f64]) -> Option<(u32, f64)> {
    let at = shares
        .iter()
        .position(|&share| share * (1.0 + MOST) > MOST)?;
    let mut others = 0.0;
    for (zone, share) in shares.iter().enumerate() {
        if zone != at {
            others += lifts[zone] * share;
        }
    }
    // So much of what the zone owns first goes out, the rest stays.
    let out = MOST * (1.0 - shares[at]) / shares[at];
    Some((at as u32, (1.0 - out) / out * others / shares[at]))
}

#[cfg(test)]
mod tests {
    use super::{Lifts, MOST, SLACK};

    /// The share of second copies of each zone relative to its weight, from the formula in the module's page.
    fn gets(weights: &[u64], lifts: Option<&Lifts>) -> Vec<f64> {
        let total = weights.iter().sum::<u64>() as f64;
        let bid =
            |zone: usize| lifts.map_or(1.0, |lifts| lifts.of(zone as u32)) * weights[zone] as f64;
        (0..weights.len())
            .map(|k| {
                let from = |j: usize| {
                    let own = match lifts.and_then(Lifts::heavy) {
                        Some((zone, lift)) if zone as usize == j => lift * weights[j] as f64,
                        _ => 0.0,
                    };
                    let all: f64 =
                        own + (0..weights.len()).filter(|&m| m != j).map(bid).sum::<f64>();
                    weights[j] as f64 / total * if j == k { own } else { bid(k) } / all
                };
                (0..weights.len()).map(from).sum::<f64>() / (weights[k] as f64 / total)
            })
            .collect()
    }

    #[test]
    fn zones_of_about_one_size_need_no_lift() {
        for weights in [
            &[200; 5][..],
            &[201, 200, 200, 200, 200],
            &[3, 3, 4],
            &[1, 1],
            &[1, 3],
            &[7],
        ] {
            assert_eq!(
                Lifts::new(weights),
                None,
                "{weights:?}: {:?}",
                gets(weights, None)
            );
        }
    }

    #[test]
    fn a_zone_below_half_gets_its_share_within_the_slack() {
        for weights in [
            &[40, 15, 15, 15, 15][..],
            &[45, 25, 15, 10, 5],
            &[3, 2, 2],
            &[2, 2, 1],
            &[48, 26, 26],
        ] {
            let lifts = Lifts::new(weights);
            assert!(lifts.is_some(), "{weights:?}");
            let (plain, lifted) = (gets(weights, None), gets(weights, lifts.as_ref()));
            let off = |gets: &[f64]| gets.iter().map(|got| (got - 1.0).abs()).fold(0.0, f64::max);
            assert!(
                off(&lifted) < SLACK + 0.01,
                "{weights:?}: {plain:?} -> {lifted:?}"
            );
        }
    }

    #[test]
    fn a_zone_above_three_quarters_keeps_what_would_bury_the_others() {
        for weights in [&[99, 1][..], &[90, 5, 5], &[76, 24], &[900, 1, 2, 3, 94]] {
            let lifts = Lifts::new(weights).expect("lifts");
            let lifted = gets(weights, Some(&lifts));
            for got in &lifted[1..] {
                assert!((got / MOST - 1.0).abs() < 0.2, "{weights:?}: {lifted:?}");
            }
        }
        // At three quarters and below every run is in two zones.
        for weights in [&[75, 25][..], &[74, 13, 13], &[6, 2, 1]] {
            assert!(Lifts::new(weights).is_none_or(|lifts| lifts.heavy().is_none()));
        }
    }
}
