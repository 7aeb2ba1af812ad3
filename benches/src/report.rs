//! Rows for machines, tables for people.

use std::fmt::Write as _;

use serde::Serialize;

use crate::bars::{Bar, Figure, Verdict};
use crate::rounds::{Measured, Op, Series};
use crate::stats::{Ratio, Spread, spread};

/// One cell, all rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Whose.
    pub peer: &'static str,
    /// What one operation is.
    pub op: &'static str,
    /// Over what.
    pub transport: &'static str,
    /// Payload of one operation; of one value behind a key for lookups.
    pub bytes: u64,
    /// Operations in flight.
    pub concurrency: usize,
    /// Keys of one operation.
    pub keys: u32,
    /// Whether the reader compared checksums (on a put: the server).
    pub verified: bool,
    /// Median payload rate.
    pub gib_s: Option<f64>,
    /// Its 10th percentile over rounds.
    pub gib_s_p10: Option<f64>,
    /// Its 90th percentile over rounds.
    pub gib_s_p90: Option<f64>,
    /// Median operations per second.
    pub ops_s: Option<f64>,
    /// Median over rounds of the median latency.
    pub p50_us: Option<f64>,
    /// Median over rounds of the 99th percentile.
    pub p99_us: Option<f64>,
    /// Median CPU seconds per GiB, client and servers.
    pub cpu_s_per_gib: Option<f64>,
    /// Median CPU microseconds per operation, client and servers.
    pub cpu_us_per_op: Option<f64>,
    /// Cores that others kept busy, median.
    pub foreign_cores: Option<f64>,
    /// What the ratios below refer to.
    pub ratio_to: Option<&'static str>,
    /// Median paired ratio of the rates.
    pub ratio: Option<Ratio>,
    /// Median paired ratio of CPU per GiB (per operation where nothing is moved).
    pub cpu_ratio: Option<Ratio>,
    /// Median paired ratio of the 99th percentiles.
    pub p99_ratio: Option<Ratio>,
    /// Rates to every other peer of the group; Terrace's rows only.
    pub ratios: Vec<To>,
    /// Rounds that count.
    pub rounds: usize,
    /// The first round that failed, and why.
    pub failure: Option<String>,
}

/// A ratio and what it refers to.
#[derive(Clone, Debug, Serialize)]
pub struct To {
    /// Whom.
    pub peer: &'static str,
    /// Of the rates.
    pub rate: Option<Ratio>,
    /// Of CPU.
    pub cpu: Option<Ratio>,
}

/// One row per measured cell.
pub fn rows(measured: &[Measured]) -> Vec<Row> {
    let of_group = |group: &Measured| {
        group
            .series
            .iter()
            .map(|s| row(s, group))
            .collect::<Vec<_>>()
    };
    measured.iter().flat_map(of_group).collect()
}

fn row(series: &Series, group: &Measured) -> Row {
    let middle = |figure: &dyn Fn(&crate::load::Sample) -> Option<f64>| -> Option<Spread> {
        spread(
            &series
                .values(figure)
                .into_iter()
                .flatten()
                .collect::<Vec<_>>(),
        )
    };
    let median =
        |figure: &dyn Fn(&crate::load::Sample) -> Option<f64>| middle(figure).map(|s| s.median);
    let base = group
        .series
        .get(group.base)
        .filter(|b| b.cell != series.cell);
    let ratio = |figure: Figure| base.and_then(|b| figure.ratio(series, b));
    let others = group
        .series
        .iter()
        .filter(|s| series.cell.peer == "terrace" && s.cell != series.cell);
    let rate = middle(&|s| s.gib_s());
    Row {
        peer: series.cell.peer,
        op: series.cell.op.as_str(),
        transport: series.cell.transport.as_str(),
        bytes: series.cell.bytes,
        concurrency: series.cell.concurrency,
        keys: series.cell.keys,
        verified: series.cell.peer == "terrace"
            && matches!(series.cell.op, Op::Get | Op::Put | Op::NvmeGet),
        gib_s: rate.map(|r| r.median),
        gib_s_p10: rate.map(|r| r.p10),
        gib_s_p90: rate.map(|r| r.p90),
        ops_s: median(&|s| s.ops_s()),
        p50_us: median(&|s| s.p50_us),
        p99_us: median(&|s| s.p99_us),
        cpu_s_per_gib: median(&|s| s.cpu_s_per_gib()),
        cpu_us_per_op: median(&|s| s.cpu_us_per_op()),
        foreign_cores: median(&|s| s.foreign_cores),
        ratio_to: base.map(|b| b.cell.peer),
        ratio: ratio(Figure::Rate),
        cpu_ratio: ratio(Figure::Cpu),
        p99_ratio: ratio(Figure::P99),
        ratios: others
            .map(|o| To {
                peer: o.cell.peer,
                rate: Figure::Rate.ratio(series, o),
                cpu: Figure::Cpu.ratio(series, o),
            })
            .collect(),
        rounds: series.samples.iter().flatten().count(),
        failure: series.failure.clone(),
    }
}

/// Bytes as a person writes them.
pub fn size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 && b % (1 << 30) == 0 => format!("{} GiB", b >> 30),
        b if b >= 1 << 20 && b % (1 << 20) == 0 => format!("{} MiB", b >> 20),
        b if b >= 1 << 10 && b % (1 << 10) == 0 => format!("{} KiB", b >> 10),
        b => format!("{b} B"),
    }
}

/// All rows, a table per group.
pub fn tables(measured: &[Measured]) -> String {
    let mut out = String::new();
    for group in measured {
        let Some(first) = group.series.first() else {
            continue;
        };
        let c = &first.cell;
        let mixed = group.series.iter().any(|s| s.cell.bytes != c.bytes);
        let what = if c.keys > 1 && matches!(c.op, Op::Get | Op::Put) {
            format!("{} × {}", c.keys, size(c.bytes))
        } else if c.keys > 1 {
            format!("{} keys", c.keys)
        } else if mixed {
            "by size".into()
        } else {
            size(c.bytes)
        };
        let transport = if group.series.iter().all(|s| s.cell.transport == c.transport) {
            c.transport.as_str()
        } else {
            "by row"
        };
        let _ = writeln!(
            out,
            "\n{} · {what} · {transport} · {} in flight",
            c.op.as_str(),
            c.concurrency
        );
        let unit = if matches!(c.op, Op::Lease | Op::Exists | Op::LookupLease) {
            ("k op/s", "CPU µs/op")
        } else {
            ("GiB/s", "CPU s/GiB")
        };
        let base = group.series.get(group.base).map_or("-", |s| s.cell.peer);
        let _ = writeln!(
            out,
            "  {:<24} {:>8} {:>15} {:>9} {:>9} {:>10}  {:<28} {:<28} {:>7}",
            "",
            unit.0,
            "p10–p90",
            "p50 µs",
            "p99 µs",
            unit.1,
            format!("rate to {base} [95 %]"),
            format!("CPU to {base} [95 %]"),
            "foreign"
        );
        for (series, row) in group.series.iter().zip(rows(std::slice::from_ref(group))) {
            let _ = writeln!(out, "  {}", line(series, &row, mixed));
        }
    }
    out
}

fn line(series: &Series, row: &Row, mixed: bool) -> String {
    let mut name = row.peer.to_owned();
    if series.cell.op == Op::LookupLease {
        name.push_str(" (leased)");
    }
    if mixed {
        let _ = write!(name, " {}", size(row.bytes));
    }
    if series.cell.op == Op::NvmeGet {
        let _ = write!(name, " {}", row.transport);
    }
    if row.rounds == 0 {
        return format!(
            "{name:<24} failed: {}",
            row.failure.as_deref().unwrap_or("never run")
        );
    }
    let moves = row.gib_s.is_some() && series.cell.op != Op::Lease;
    let rate = |s: &crate::load::Sample| {
        if moves {
            s.gib_s()
        } else {
            s.ops_s().map(|o| o / 1e3)
        }
    };
    let rate = spread(
        &series
            .values(rate)
            .into_iter()
            .flatten()
            .collect::<Vec<_>>(),
    );
    let cpu = if moves {
        row.cpu_s_per_gib
    } else {
        row.cpu_us_per_op
    };
    let number =
        |x: Option<f64>, digits: usize| x.map_or_else(|| "-".into(), |x| format!("{x:.digits$}"));
    let mut line = format!(
        "{name:<24} {:>8} {:>15} {:>9} {:>9} {:>10}  {:<28} {:<28} {:>7}",
        number(rate.map(|r| r.median), 2),
        rate.map_or_else(String::new, |r| format!("{:.2}–{:.2}", r.p10, r.p90)),
        number(row.p50_us, 0),
        number(row.p99_us, 0),
        number(cpu, if moves { 3 } else { 1 }),
        show(row.ratio),
        show(row.cpu_ratio),
        number(row.foreign_cores, 2),
    );
    if let Some(failure) = &row.failure {
        let _ = write!(line, "  ({} rounds only; {failure})", row.rounds);
    }
    line
}

fn show(ratio: Option<Ratio>) -> String {
    match ratio {
        Some(Ratio {
            median,
            low: Some(low),
            high: Some(high),
            ..
        }) => format!("{median:.2} [{low:.2}, {high:.2}]"),
        Some(Ratio { median, .. }) => format!("{median:.2} [too few]"),
        None => "-".into(),
    }
}

/// The table of bars.
pub fn bars(bars: &[Bar]) -> String {
    let mut out = String::from(
        "\nbars (met: the whole 95 % interval clears it; open: the interval holds it)\n",
    );
    for bar in bars {
        let measured = match (bar.ratio, bar.value) {
            (Some(_), _) => show(bar.ratio),
            (None, Some(value)) => format!("{value:.4}"),
            _ => "-".into(),
        };
        let note = if bar.note.is_empty() {
            String::new()
        } else {
            format!("  {}", bar.note)
        };
        let _ = writeln!(
            out,
            "  {:<68} {:<8} {:<22} {}{note}",
            bar.path,
            bar.bound.show(),
            measured,
            bar.verdict.show()
        );
    }
    let count = |v: Verdict| bars.iter().filter(|b| !b.aim && b.verdict == v).count();
    let _ = writeln!(
        out,
        "  {} met, {} not met, {} open, {} not run",
        count(Verdict::Met),
        count(Verdict::NotMet),
        count(Verdict::Open),
        count(Verdict::NotRun)
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Sample;
    use crate::rounds::{Cell, Transport};

    #[test]
    fn sizes_are_written_in_binary_units() {
        assert_eq!(
            (size(64 << 10), size(4 << 20), size(100)),
            ("64 KiB".into(), "4 MiB".into(), "100 B".into())
        );
    }

    #[test]
    fn a_row_has_the_fields_that_are_promised() {
        let cell = |peer| Cell {
            peer,
            op: Op::Get,
            transport: Transport::Tcp,
            bytes: 1 << 20,
            concurrency: 1,
            keys: 1,
        };
        let sample = |ops| {
            Some(Sample {
                ops,
                bytes: ops << 20,
                wall_s: 1.0,
                p50_us: Some(9.0),
                p99_us: Some(20.0),
                client_cpu_s: 0.5,
                ..Sample::default()
            })
        };
        let series = |peer, ops| Series {
            cell: cell(peer),
            samples: vec![sample(ops); 15],
            failure: None,
        };
        let measured = [Measured {
            series: vec![series("redis", 1024), series("terrace", 2048)],
            base: 0,
        }];
        let rows = rows(&measured);
        let json = serde_json::to_value(&rows).expect("plain data");
        for field in [
            "peer",
            "op",
            "transport",
            "bytes",
            "concurrency",
            "gib_s",
            "p50_us",
            "p99_us",
            "cpu_s_per_gib",
            "ratio_to",
        ] {
            assert!(!json[1][field].is_null(), "{field}");
        }
        assert_eq!(
            (&json[1]["gib_s"], &json[1]["ratio_to"]),
            (&2.0.into(), &"redis".into())
        );
        assert_eq!(rows[1].ratio.expect("paired").low, Some(2.0));
        assert!(rows[0].ratio_to.is_none() && rows[1].verified && !rows[0].verified);
        assert!(tables(&measured).contains("2.00 [2.00, 2.00]"));
    }
}
