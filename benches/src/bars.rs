//! The bars of this release, and whether what was measured clears them.
//!
//! A ratio's bar is met when the whole 95 % interval of the median paired ratio lies on the right side of it; missed when
//! the whole interval lies on the wrong side; and *open* when the interval holds the bar (more rounds, or a quieter machine,
//! would tell). A fact (memory per byte, hit share, blocks lost) is compared as it is.

use serde::Serialize;

use crate::load::Sample;
use crate::peers::LOOKUP_BYTES;
use crate::phases::cluster::cell;
use crate::rounds::{Cell, Measured, Op, Series, Transport};
use crate::stats::{Ratio, paired_ratio};

/// Which figure of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    /// GiB/s, or operations per second where no payload moves.
    Rate,
    /// CPU seconds per GiB, or per operation.
    Cpu,
    /// Median latency.
    P50,
    /// 99th percentile latency.
    P99,
}

impl Figure {
    /// Its value in one sample.
    pub fn of(self, sample: &Sample) -> Option<f64> {
        match self {
            Self::Rate => sample.gib_s().or_else(|| sample.ops_s()),
            Self::Cpu => sample.cpu_s_per_gib().or_else(|| sample.cpu_us_per_op()),
            Self::P50 => sample.p50_us,
            Self::P99 => sample.p99_us,
        }
    }

    /// The median paired ratio of two series.
    pub fn ratio(self, ours: &Series, theirs: &Series) -> Option<Ratio> {
        paired_ratio(&ours.values(|s| self.of(s)), &theirs.values(|s| self.of(s)))
    }
}

/// Which side is the right one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// More is better.
    AtLeast(f64),
    /// Less is better.
    AtMost(f64),
}

impl Bound {
    /// As a person writes it.
    pub fn show(self) -> String {
        match self {
            Self::AtLeast(x) => format!("≥ {x}"),
            Self::AtMost(x) => format!("≤ {x}"),
        }
    }

    fn holds(self, x: f64) -> bool {
        match self {
            Self::AtLeast(bar) => x >= bar,
            Self::AtMost(bar) => x <= bar,
        }
    }
}

/// What became of a bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Cleared.
    Met,
    /// Not cleared.
    NotMet,
    /// The interval holds the bar, or there are too few rounds for one.
    Open,
    /// A side was not measured.
    NotRun,
}

impl Verdict {
    /// As a person writes it.
    pub fn show(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::NotMet => "not met",
            Self::Open => "open",
            Self::NotRun => "not run",
        }
    }
}

/// One bar and what was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Bar {
    /// What is compared with what.
    pub path: String,
    /// The bar.
    pub bound: Bound,
    /// An aim beyond this release: reported, not a bar.
    pub aim: bool,
    /// The ratio, for a ratio's bar.
    pub ratio: Option<Ratio>,
    /// The value, for a fact's bar.
    pub value: Option<f64>,
    /// What became of it.
    pub verdict: Verdict,
    /// What a reader must know.
    pub note: String,
}

impl Bar {
    /// A fact's bar.
    pub fn fact(path: &str, bound: Bound, value: Option<f64>, note: String) -> Self {
        let verdict = match value {
            Some(x) if bound.holds(x) => Verdict::Met,
            Some(_) => Verdict::NotMet,
            None => Verdict::NotRun,
        };
        Self {
            path: path.into(),
            bound,
            aim: false,
            ratio: None,
            value,
            verdict,
            note,
        }
    }

    /// A ratio's bar.
    pub fn at_least(path: String, bar: f64, ratio: Option<Ratio>) -> Self {
        Self::ratio(path, Bound::AtLeast(bar), ratio)
    }

    fn ratio(path: String, bound: Bound, ratio: Option<Ratio>) -> Self {
        let verdict = match ratio.map(|r| (r.low, r.high)) {
            Some((Some(low), Some(high))) => match (bound.holds(low), bound.holds(high)) {
                (true, true) => Verdict::Met,
                (false, false) => Verdict::NotMet,
                _ => Verdict::Open,
            },
            Some(_) => Verdict::Open,
            None => Verdict::NotRun,
        };
        Self {
            path,
            bound,
            aim: false,
            ratio,
            value: None,
            verdict,
            note: String::new(),
        }
    }
}

/// A cell among the measured ones.
fn find<'a>(measured: &'a [Measured], wanted: &Cell) -> Option<&'a Series> {
    measured
        .iter()
        .flat_map(|m| &m.series)
        .find(|s| s.cell == *wanted)
}

const MIB: u64 = 1 << 20;

/// Every ratio's bar.
pub fn ratios(measured: &[Measured]) -> Vec<Bar> {
    let mut bars = Vec::new();
    let mut claim = |path: String, ours: Cell, theirs: Cell, figure: Figure, bound: Bound| {
        let sides = find(measured, &ours).zip(find(measured, &theirs));
        bars.push(Bar::ratio(
            path,
            bound,
            sides.and_then(|(a, b)| figure.ratio(a, b)),
        ));
        bars.len() - 1
    };
    let cell = |peer, op, concurrency| Cell {
        peer,
        op,
        transport: Transport::Tcp,
        bytes: MIB,
        concurrency,
        keys: 1,
    };
    let versus = |op, concurrency, peer| {
        (
            cell("terrace", op, concurrency),
            cell(peer, op, concurrency),
        )
    };

    let (a, b) = versus(Op::Get, 1, "redis");
    claim(
        "get 1 MiB tcp c1: rate, to redis".into(),
        a.clone(),
        b.clone(),
        Figure::Rate,
        Bound::AtLeast(1.1),
    );
    claim(
        "get 1 MiB tcp c1: CPU per GiB, to redis".into(),
        a,
        b,
        Figure::Cpu,
        Bound::AtMost(0.9),
    );
    let (a, b) = versus(Op::Get, 8, "redis");
    claim(
        "get 1 MiB tcp c8: rate, to redis".into(),
        a,
        b,
        Figure::Rate,
        Bound::AtLeast(1.2),
    );
    let (a, b) = versus(Op::Get, 8, "memcached");
    let aim = claim(
        "get 1 MiB tcp c8: rate, to memcached (aim)".into(),
        a,
        b,
        Figure::Rate,
        Bound::AtLeast(1.0),
    );
    for c in [1, 8] {
        for (peer, bar) in [("redis", 1.0), ("tonic", 2.0)] {
            let (a, b) = versus(Op::Put, c, peer);
            claim(
                format!("put 1 MiB tcp c{c}: rate, to {peer}"),
                a,
                b,
                Figure::Rate,
                Bound::AtLeast(bar),
            );
        }
    }
    let lease = |bytes| Cell {
        peer: "terrace",
        op: Op::Lease,
        transport: Transport::InProcess,
        bytes,
        concurrency: 1,
        keys: 1,
    };
    claim(
        "lease in process, no copy, unverified: p50 of 4 MiB to 64 KiB".into(),
        lease(4 * MIB),
        lease(MIB / 16),
        Figure::P50,
        Bound::AtMost(1.2),
    );
    let exists = |peer, op, concurrency, keys| Cell {
        bytes: LOOKUP_BYTES,
        keys,
        ..cell(peer, op, concurrency)
    };
    for (op, what) in [(Op::Exists, "probe"), (Op::LookupLease, "leased")] {
        for c in [1, 8] {
            let (a, b) = (
                exists("terrace", op, c, 128),
                exists("redis", Op::Exists, c, 128),
            );
            claim(
                format!("lookup ({what}) of 128 keys tcp c{c}: rate, to redis EXISTS"),
                a,
                b,
                Figure::Rate,
                Bound::AtLeast(1.0),
            );
        }
        let (a, b) = (
            exists("terrace", op, 1, 512),
            exists("redis", Op::Exists, 1, 512),
        );
        claim(
            format!("lookup ({what}) of 512 keys tcp c1: p99, to redis EXISTS"),
            a,
            b,
            Figure::P99,
            Bound::AtMost(2.0),
        );
    }
    for bytes in crate::peers::SIZES {
        let nvme = |peer| Cell {
            peer,
            op: Op::NvmeGet,
            transport: Transport::InProcess,
            bytes,
            concurrency: 8,
            keys: 1,
        };
        let size = crate::report::size(bytes);
        claim(
            format!("NVMe get {size} c8: rate, to direct reads"),
            nvme("terrace"),
            nvme("direct-read"),
            Figure::Rate,
            Bound::AtLeast(0.9),
        );
        claim(
            format!("NVMe get {size} c8: CPU per GiB, to direct reads"),
            nvme("terrace"),
            nvme("direct-read"),
            Figure::Cpu,
            Bound::AtMost(3.0),
        );
    }
    bars[aim].aim = true;
    bars.extend(same_host(measured));
    bars.extend(cluster(measured));
    bars
}

/// The bars of many nodes against one.
fn cluster(measured: &[Measured]) -> Vec<Bar> {
    let mut bars = Vec::new();
    let mut claim = |what: &str, op, concurrency, peer, figure: Figure, bound| {
        let side = |peer| find(measured, &cell(peer, op, concurrency));
        let ratio = side(peer).zip(side("cluster-1"));
        let ratio = ratio.and_then(|(a, b)| figure.ratio(a, b));
        bars.push(Bar::ratio(what.into(), bound, ratio));
    };
    for (op, what) in [(Op::Exists, "probe"), (Op::LookupLease, "leased")] {
        claim(
            &format!("lookup ({what}) of 512 keys over 8 owners c1: p99, to one owner"),
            op,
            1,
            "cluster-8",
            Figure::P99,
            Bound::AtMost(2.0),
        );
    }
    for (op, what) in [(Op::Get, "get"), (Op::Put, "put")] {
        claim(
            &format!("{what} 1 MiB c8 from 3 nodes on one machine: rate, to one node"),
            op,
            8,
            "cluster-3",
            Figure::Rate,
            Bound::AtLeast(1.0),
        );
    }
    claim(
        "get 1 MiB c8 from 3 nodes on one machine: CPU per GiB, to one node",
        Op::Get,
        8,
        "cluster-3",
        Figure::Cpu,
        Bound::AtMost(1.05),
    );
    bars
}

/// The bars of the same-host path.
fn same_host(measured: &[Measured]) -> Vec<Bar> {
    let cell = |peer, op, bytes, keys| Cell {
        peer,
        op,
        transport: Transport::Shared,
        bytes,
        concurrency: 1,
        keys,
    };
    let mut bars = Vec::new();
    let mut claim = |what: &str, op, bytes, keys, peer, figure: Figure, bound| {
        let ours = find(measured, &cell("terrace", op, bytes, keys));
        let theirs = find(measured, &cell(peer, op, bytes, keys));
        let ratio = ours.zip(theirs).and_then(|(a, b)| figure.ratio(a, b));
        bars.push(Bar::ratio(what.into(), bound, ratio));
    };
    use Bound::{AtLeast, AtMost};
    use Figure::{Cpu, P50, Rate};
    let batch = crate::peers::same_host::BATCH;
    claim(
        "get 1 MiB same host c1, copied and verified: rate, to memcpy",
        Op::Get,
        MIB,
        1,
        "memcpy",
        Rate,
        AtLeast(0.7),
    );
    claim(
        "get 1 MiB same host c1: p50, to mooncake",
        Op::Get,
        MIB,
        1,
        "mooncake",
        P50,
        AtMost(0.6),
    );
    claim(
        "put 1 MiB same host c1: rate, to mooncake",
        Op::Put,
        MIB,
        1,
        "mooncake",
        Rate,
        AtLeast(2.0),
    );
    for (op, what) in [(Op::Get, "get"), (Op::Put, "put")] {
        claim(
            &format!("{what} 16 × 1 MiB same host: rate, to mooncake's batch"),
            op,
            MIB,
            batch,
            "mooncake",
            Rate,
            AtLeast(1.0),
        );
        claim(
            &format!("{what} 16 × 1 MiB same host: CPU per GiB, to mooncake's batch"),
            op,
            MIB,
            batch,
            "mooncake",
            Cpu,
            AtMost(1.0),
        );
    }
    for bytes in crate::peers::SIZES {
        let what = format!(
            "lease {} same host, no copy, unverified: p50, to a bare request and reply",
            crate::report::size(bytes)
        );
        claim(&what, Op::Lease, bytes, 1, "echo", P50, AtMost(1.5));
    }
    bars
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(cell: Cell, rates: &[u64]) -> Series {
        let sample = |&ops| {
            Some(Sample {
                ops,
                bytes: ops << 20,
                wall_s: 1.0,
                client_cpu_s: 1.0,
                ..Sample::default()
            })
        };
        Series {
            cell,
            samples: rates.iter().map(sample).collect(),
            failure: None,
        }
    }

    fn verdict(ours: &[u64], theirs: &[u64]) -> Verdict {
        let cell = |peer| Cell {
            peer,
            op: Op::Get,
            transport: Transport::Tcp,
            bytes: MIB,
            concurrency: 1,
            keys: 1,
        };
        let measured = [Measured {
            series: vec![series(cell("redis"), theirs), series(cell("terrace"), ours)],
            base: 0,
        }];
        ratios(&measured)[0].verdict
    }

    #[test]
    fn a_bar_is_met_only_when_the_whole_interval_clears_it() {
        assert_eq!(verdict(&[120; 15], &[100; 15]), Verdict::Met);
        assert_eq!(verdict(&[105; 15], &[100; 15]), Verdict::NotMet);
        let mut mixed = [120; 15];
        mixed[..5].fill(100);
        assert_eq!(verdict(&mixed, &[100; 15]), Verdict::Open);
        assert_eq!(verdict(&[120; 3], &[100; 3]), Verdict::Open);
        assert_eq!(verdict(&[], &[]), Verdict::NotRun);
    }

    #[test]
    fn facts_are_compared_as_they_are() {
        assert_eq!(
            Bar::fact("x", Bound::AtMost(1.07), Some(1.07), String::new()).verdict,
            Verdict::Met
        );
        assert_eq!(
            Bar::fact("x", Bound::AtMost(1.07), Some(1.08), String::new()).verdict,
            Verdict::NotMet
        );
        assert_eq!(
            Bar::fact("x", Bound::AtLeast(1.0), None, String::new()).verdict,
            Verdict::NotRun
        );
    }

    #[test]
    fn every_bar_of_the_table_is_there() {
        let bars = ratios(&[]);
        assert_eq!(bars.len(), 3 + 1 + 4 + 1 + 6 + 8 + 11 + 5);
        assert!(
            bars.iter().all(|b| b.verdict == Verdict::NotRun)
                && bars.iter().filter(|b| b.aim).count() == 1
        );
    }
}
