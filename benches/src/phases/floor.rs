//! What several processes cost on this machine, whoever serves: rows beside those of a cluster, in the same rounds.
//!
//! ```text
//!   look-up over 8 owners    bare-1 │ bare-8              requests and replies of the same sizes, and nothing else
//!   get, put from 3 nodes    plain-of-1 │ plain-of-3      length-framed TCP, one thread per process
//!                            redis-of-1 │ redis-of-3      gets alone
//! ```
//!
//! A cluster's ratio to one node says what routing costs and what more processes than cores cost, together; the floor's ratio
//! to itself says the second alone. No bar is derived from it.

use anyhow::{Context, Result};

use super::network::{listening, serve};
use super::{Found, Options, cluster};
use crate::bars::Figure;
use crate::peers::fan::Fan;
use crate::peers::network::Network;
use crate::peers::redis::{self, Resp};
use crate::peers::socket::Address;
use crate::peers::spread::Spread;
use crate::peers::tcp::Framed;
use crate::rounds::{Cell, Measured, Op, Peer, Series, Transport};
use crate::spawn::Server;
use crate::stats::Ratio;

const MIB: u64 = 1 << 20;

/// A floor: what it is, its rows of one process and of several, and how many those are.
#[derive(Clone, Copy, Debug)]
pub struct Floor {
    what: &'static str,
    one: &'static str,
    many: &'static str,
    count: usize,
}

const BARE: Floor = Floor {
    what: "bare requests and replies of a look-up's sizes",
    one: "bare-1",
    many: "bare-8",
    count: 8,
};
const PLAIN: Floor = Floor {
    what: "plain TCP",
    one: "plain-of-1",
    many: "plain-of-3",
    count: 3,
};
const REDIS: Floor = Floor {
    what: "redis",
    one: "redis-of-1",
    many: "redis-of-3",
    count: 3,
};

impl Floor {
    fn is_of(self, op: Op, concurrency: usize) -> bool {
        match self.one {
            "bare-1" => op == Op::Exists,
            "plain-of-1" => matches!(op, Op::Get | Op::Put) && concurrency == 8,
            _ => op == Op::Get && concurrency == 8,
        }
    }
}

/// Floors and the servers behind them.
#[derive(Default)]
pub struct Stage {
    /// The peers, each with its name.
    pub peers: Vec<(&'static str, Box<dyn Peer>)>,
    servers: Vec<Server>,
    /// Floors that cannot be measured here, and why.
    pub skipped: Vec<String>,
}

/// The rows that belong beside a cluster's of this operation.
pub fn cells(op: Op, concurrency: usize) -> impl Iterator<Item = Cell> {
    let floors = [BARE, PLAIN, REDIS].into_iter();
    let floors = floors.filter(move |floor| floor.is_of(op, concurrency));
    let names = floors.flat_map(|floor| [floor.one, floor.many]);
    names.map(move |name| cluster::cell(name, op, concurrency))
}

/// Starts and fills what `is_asked` for.
pub async fn start(options: &Options, is_asked: impl Fn(&str) -> bool) -> Stage {
    let mut stage = Stage::default();
    for floor in [BARE, PLAIN, REDIS] {
        for (name, count) in [(floor.one, 1), (floor.many, floor.count)] {
            if !is_asked(name) {
                continue;
            }
            match peer(&mut stage, options, floor, name, count).await {
                Ok(peer) => stage.peers.push((name, peer)),
                Err(error) => stage.skipped.push(format!("{name}: {error:#}")),
            }
        }
    }
    stage
}

async fn peer(
    stage: &mut Stage,
    options: &Options,
    floor: Floor,
    name: &'static str,
    count: usize,
) -> Result<Box<dyn Peer>> {
    let set = options.working_set_bytes;
    let (mut addresses, mut pids) = (Vec::new(), Vec::new());
    for number in 0..count {
        let dir = options.dir.join(format!("{name}-{number}"));
        std::fs::create_dir_all(&dir)?;
        let (mut server, tcp, log) = match floor.one {
            "redis-of-1" => {
                let (server, tcp, _) = redis::start(options.cores, &dir)?;
                (server, tcp, dir.join("redis.log"))
            }
            one => {
                let what = if one == "bare-1" { "fan" } else { "plain" };
                let (server, tcp, _) = serve(options, what, &dir, 1)?;
                (server, tcp, dir.join("log"))
            }
        };
        let address = Address::Tcp(tcp.clone());
        let listens = listening(&mut server, &address, &log).await;
        listens.with_context(|| format!("starting {name}"))?;
        pids.push(server.pid());
        stage.servers.push(server);
        addresses.push(tcp);
    }
    let spread = || addresses.iter().cloned().map(Address::Tcp).collect();
    Ok(match floor.one {
        "bare-1" => Box::new(Network::<Fan>::new(addresses, set, pids)),
        "plain-of-1" => {
            let mut network = Network::<Spread<Framed>>::new(spread(), set, pids);
            network.fill(name, Transport::Tcp, &[MIB]).await?;
            Box::new(network)
        }
        _ => {
            let mut network = Network::<Spread<Resp>>::new(spread(), set, pids);
            network.fill(name, Transport::Tcp, &[MIB]).await?;
            Box::new(network)
        }
    })
}

/// What the floors' ratios are, a line each.
pub fn notes(found: &Found) -> Vec<String> {
    let asked = [(Op::Exists, 1), (Op::Get, 8), (Op::Put, 8)];
    let of_op = |(op, concurrency): (Op, usize)| {
        let floors = [BARE, PLAIN, REDIS].into_iter();
        let floors = floors.filter(move |floor| floor.is_of(op, concurrency));
        floors.filter_map(move |floor| note(&found.measured, floor, op, concurrency))
    };
    asked.into_iter().flat_map(of_op).collect()
}

fn note(measured: &[Measured], floor: Floor, op: Op, concurrency: usize) -> Option<String> {
    let series = |name: &'static str| -> Option<&Series> {
        let cell = cluster::cell(name, op, concurrency);
        let mut all = measured.iter().flat_map(|group| &group.series);
        all.find(|series| series.cell == cell)
    };
    let (many, one) = (series(floor.many)?, series(floor.one)?);
    let show = |name: &str, figure: Figure| Some((name.to_owned(), figure.ratio(many, one)?));
    let figures = match op {
        Op::Exists => [show("p99", Figure::P99), show("p50", Figure::P50)],
        _ => [show("rate", Figure::Rate), None],
    };
    let figures: Vec<String> = figures
        .into_iter()
        .chain([show("CPU", Figure::Cpu)])
        .flatten()
        .map(|(name, ratio)| format!("{name} {}", show_ratio(ratio)))
        .collect();
    let Floor { what, count, .. } = floor;
    let op = op.as_str();
    let figures = figures.join(", ");
    Some(format!(
        "floor of {op} c{concurrency}: {what}, {count} processes to one: {figures}"
    ))
}

fn show_ratio(ratio: Ratio) -> String {
    let Ratio {
        median, low, high, ..
    } = ratio;
    match low.zip(high) {
        Some((low, high)) => format!("{median:.2} × [{low:.2}, {high:.2}]"),
        None => format!("{median:.2} × [too few rounds]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Sample;

    #[test]
    fn each_operation_has_its_floors_and_a_note_of_their_ratio() {
        let names = |op, c| cells(op, c).map(|cell| cell.peer).collect::<Vec<_>>();
        assert_eq!(names(Op::Exists, 1), ["bare-1", "bare-8"]);
        assert_eq!(
            names(Op::Get, 8),
            ["plain-of-1", "plain-of-3", "redis-of-1", "redis-of-3"]
        );
        assert!(names(Op::Get, 1).is_empty() && names(Op::LookupLease, 1).is_empty());

        let series = |name, p99| Series {
            cell: cluster::cell(name, Op::Exists, 1),
            samples: vec![
                Some(Sample {
                    ops: 10,
                    wall_s: 1.0,
                    p50_us: Some(50.0),
                    p99_us: Some(p99),
                    client_cpu_s: 1.0,
                    ..Sample::default()
                });
                15
            ],
            failure: None,
        };
        let found = Found {
            measured: vec![Measured {
                series: vec![series("bare-1", 100.0), series("bare-8", 150.0)],
                base: 0,
            }],
            ..Found::default()
        };
        let notes = notes(&found);
        assert_eq!(notes.len(), 1);
        assert!(
            notes[0].contains("p99 1.50 × [1.50, 1.50], p50 1.00 ×"),
            "{notes:?}"
        );
    }
}
