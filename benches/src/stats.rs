//! Order statistics: medians, quantiles, and the 95 % interval of the median of paired ratios.
//!
//! ```text
//!   round 1   a1 / b1 ─┐
//!   round 2   a2 / b2  ├─ sorted ─► median, and the two order statistics that
//!   ...                │            enclose the true median in ≥ 95 % of repetitions
//!   round n   an / bn ─┘
//! ```
//!
//! The interval is the distribution-free one: the number of ratios below the true median is binomial(n, 1/2) whatever the
//! ratios' distribution, so the j-th smallest and j-th largest enclose it with probability `1 - 2 P(Bin < j)`. `j` is the
//! largest for which that is at least 95 %: 15 rounds use the 4th and the 12th (96.5 %). Why not a bootstrap: at n = 15 it
//! is too narrow for a median, needs a seed, and its coverage depends on what is being measured. Fewer than 6 rounds have no
//! 95 % interval at all, and none is claimed.

use serde::Serialize;

/// A median and where the middle of the data lies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The 50th percentile.
    pub median: f64,
    /// The 10th percentile.
    pub p10: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// How many values.
    pub count: usize,
}

/// The median of paired ratios and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Median of `a[i] / b[i]`.
    pub median: f64,
    /// Lower end of the interval; absent below 6 pairs.
    pub low: Option<f64>,
    /// Upper end of the interval; absent below 6 pairs.
    pub high: Option<f64>,
    /// How many pairs.
    pub pairs: usize,
}

/// Quantile `q` in 0..=1 of sorted values, linear between neighbours. None without values.
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let at = q.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    Some(sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64))
}

/// The values in ascending order, without what is not a number.
pub fn sorted(values: &[f64]) -> Vec<f64> {
    let mut values: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Median, p10 and p90. None without a finite value.
pub fn spread(values: &[f64]) -> Option<Spread> {
    let values = sorted(values);
    Some(Spread {
        median: quantile(&values, 0.5)?,
        p10: quantile(&values, 0.1)?,
        p90: quantile(&values, 0.9)?,
        count: values.len(),
    })
}

/// Median of `a[i] / b[i]` with its interval. Pairs that lack a side, or whose divisor is not positive, are left out.
/// None when no pair is left.
pub fn paired_ratio(a: &[Option<f64>], b: &[Option<f64>]) -> Option<Ratio> {
    let ratios: Vec<f64> = a
        .iter()
        .zip(b)
        .filter_map(|(a, b)| Some((*a)? / (*b).filter(|b| *b > 0.0)?))
        .collect();
    let ratios = sorted(&ratios);
    let median = quantile(&ratios, 0.5)?;
    let rank = enclosing_rank(ratios.len());
    Some(Ratio {
        median,
        low: rank.map(|j| ratios[j - 1]),
        high: rank.map(|j| ratios[ratios.len() - j]),
        pairs: ratios.len(),
    })
}

/// The largest j for which the j-th smallest and the j-th largest of `n` values enclose the true median with at least
/// 95 % probability; None when even the extremes do not (n < 6).
pub fn enclosing_rank(n: usize) -> Option<usize> {
    let mut point = 0.5f64.powi(i32::try_from(n).ok()?); // P(Bin(n, 1/2) = 0)
    let (mut below, mut rank) = (0.0, None);
    for j in 1..=n / 2 {
        below += point; // P(Bin < j)
        if below > 0.025 {
            break;
        }
        rank = Some(j);
        point *= (n - j + 1) as f64 / j as f64;
    }
    rank
}

/// Latency quantiles of one cell in one round, microseconds: p50 and p99.
pub fn latency_us(mut nanos: Vec<u64>) -> Option<(f64, f64)> {
    nanos.sort_unstable();
    let last = nanos.len().checked_sub(1)?;
    let at = |q: f64| nanos[(q * last as f64).round() as usize] as f64 / 1e3;
    Some((at(0.5), at(0.99)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        let values = sorted(&[4.0, 1.0, f64::NAN, 3.0, 2.0]);
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(quantile(&values, 0.5), Some(2.5));
        assert_eq!(quantile(&values, 0.0), Some(1.0));
        assert_eq!(quantile(&values, 1.0), Some(4.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn ranks_are_those_of_the_binomial_tables() {
        // Standard tables of the distribution-free interval of a median at 95 %.
        let table = [
            (5, None),
            (6, Some(1)),
            (8, Some(1)),
            (9, Some(2)),
            (12, Some(3)),
            (15, Some(4)),
            (20, Some(6)),
            (30, Some(10)),
        ];
        for (n, rank) in table {
            assert_eq!(enclosing_rank(n), rank, "n = {n}");
        }
    }

    #[test]
    fn interval_covers_the_true_median_as_often_as_it_says() {
        // 4000 draws of 15 skewed values whose true median is known; the nominal coverage is 96.5 %.
        let mut state = 7u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let truth = 2.0f64.ln(); // median of the exponential distribution
        let mut covered = 0;
        for _ in 0..4000 {
            let a: Vec<_> = (0..15).map(|_| Some(-(1.0 - uniform()).ln())).collect();
            let r = paired_ratio(&a, &[Some(1.0); 15]).expect("15 pairs");
            covered += usize::from(r.low.expect("low") <= truth && truth <= r.high.expect("high"));
        }
        let share = covered as f64 / 4000.0;
        assert!((0.95..0.98).contains(&share), "covered {share}");
    }

    #[test]
    fn ratios_are_paired_by_round_and_skip_what_is_missing() {
        let a = [Some(2.0), None, Some(9.0), Some(8.0)];
        let b = [Some(1.0), Some(1.0), Some(3.0), Some(0.0)];
        let r = paired_ratio(&a, &b).expect("two pairs");
        assert_eq!((r.median, r.pairs, r.low), (2.5, 2, None));
        assert_eq!(paired_ratio(&[None], &[Some(1.0)]), None);
    }

    #[test]
    fn latencies_come_in_microseconds() {
        assert_eq!(
            latency_us((1..=101).map(|i| i * 1000).collect()),
            Some((51.0, 100.0))
        );
        assert_eq!(latency_us(Vec::new()), None);
    }
}
