//! What happens to the members, drawn from a seed before anything begins.
//!
//! ```text
//! calm       nothing                             grow       a tenth joins, one after the other
//! drain      a tenth is drained and leaves       crash      some are killed, three of them at once; some restart
//! churn      joins, drains, kills, quick restarts, freezes
//! partition  two sides that do not hear each other, for longer than the grace, and once more for shorter
//! replicas   two owners per run; deaths so far apart that copies are made in between, and joins, drains, restarts
//! evictions  churn where nobody has room for all of its share
//! slow       churn over links of which some are slow and some lose messages
//! hot        a crowd reads one prompt; then an owner of one of its runs dies, and a second owner of another
//! mixed      all of it at once, and some who answer other bytes than they were given
//! ```
//!
//! Units: milliseconds of simulated time. Errors: none. The end is quiet, so that what moves can arrive and views
//! can converge.

use std::time::Duration;

use kvserver::clock::Tick;

use super::{clock::mix, hot::Fashion, town::PROMPT_RUNS};

/// How the members fare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(super) enum Scenario {
    /// Nothing happens
    Calm,
    /// Members join, one after the other
    Grow,
    /// Members are drained and leave
    #[value(alias = "shrink")]
    Drain,
    /// Members are killed, some at once; some come back
    Crash,
    /// Joins, drains, kills, restarts, freezes
    Churn,
    /// Two sides do not hear each other for a while
    Partition,
    /// Two owners per run; a death loses nothing
    Replicas,
    /// Churn with too little room
    Evictions,
    /// Churn over slow and lossy links
    Slow,
    /// A crowd reads one prompt, and owners of its runs die
    Hot,
    /// All of it at once
    Mixed,
}

/// What a scenario has besides its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// Owners per run.
    pub(super) replicas: usize,
    /// Whether nodes have less room than their share needs.
    pub(super) is_tight: bool,
    /// Whether the bytes moved are held to what had to move: where two sides each take the other for dead, they move
    /// what nobody who sees all of it would.
    pub(super) is_bill_judged: bool,
    /// When a crowd reads one prompt.
    pub(super) hot: Option<Fashion>,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A new one comes.
    Join { weight: u32 },
    /// The nth one from now living is killed for good, with its blocks.
    Kill { nth: u64 },
    /// It is killed and started again after a moment; its blocks are there again.
    Restart { nth: u64, down: Duration },
    /// It answers nobody for a while and then goes on as if nothing had been.
    Freeze { nth: u64, down: Duration },
    /// The owner of a run of the prompt that a crowd reads is killed, or who comes after it.
    KillOwner { run: u32, place: usize },
    /// It hands over what it has and leaves.
    Drain { nth: u64 },
    /// It sends other bytes than it should to other nodes.
    Lie { nth: u64, down: Duration },
    /// Two sides do not hear each other.
    Cut { salt: u64, down: Duration },
    /// Some links are slow, some lose what they carry.
    Slow { salt: u64, down: Duration },
}

impl Scenario {
    /// What it has besides its events.
    pub(super) fn setting(self, seed: u64, seconds: u64) -> Setting {
        let is_mixed = self == Self::Mixed;
        Setting {
            replicas: match self == Self::Replicas || (is_mixed && seed % 2 == 1) {
                true => 2,
                false => 1,
            },
            is_tight: self == Self::Evictions || (is_mixed && seed % 3 == 2),
            is_bill_judged: !is_mixed && self != Self::Partition,
            hot: (self == Self::Hot).then(|| Fashion {
                from: tick(seconds * 100),
                until: tick(seconds * 600),
            }),
        }
    }

    /// One member's fate after the other, over and over.
    fn kinds(self) -> &'static [u64] {
        match self {
            Self::Calm | Self::Partition | Self::Hot => &[],
            Self::Grow => &[0],
            Self::Drain => &[4],
            Self::Crash => &[1, 2],
            // Deaths have moments of their own.
            Self::Replicas => &[0, 2, 4, 3],
            Self::Churn | Self::Evictions | Self::Slow => &[0, 1, 2, 3, 4, 0],
            Self::Mixed => &[0, 1, 2, 3, 4, 0, 5],
        }
    }
}

/// Events in order.
pub(super) fn events(
    scenario: Scenario,
    nodes: usize,
    seconds: u64,
    seed: u64,
) -> Vec<(Tick, Event)> {
    let mut chance = seed ^ 0xfeed;
    let tenth = (nodes / 10).clamp(1, 8);
    let kinds = scenario.kinds();
    let count = match scenario {
        Scenario::Calm | Scenario::Partition | Scenario::Hot => 0,
        Scenario::Grow | Scenario::Drain | Scenario::Crash => tenth,
        _ => (tenth * 3 / 2).max(kinds.len()),
    };
    // From a tenth of the time to six tenths of it.
    let (from, to) = (seconds * 100, seconds * 600);
    let mut drawn: Vec<(Tick, Event)> = (0..count)
        .map(|number| {
            let at = from + mix(&mut chance) % (to - from).max(1);
            let nth = mix(&mut chance);
            let down = Duration::from_millis(500 + mix(&mut chance) % 4500);
            let event = match kinds[number % kinds.len()] {
                0 => Event::Join {
                    weight: 1 + (nth % 2) as u32,
                },
                1 => Event::Kill { nth },
                2 => Event::Restart { nth, down },
                3 => Event::Freeze { nth, down },
                5 => Event::Lie { nth, down },
                _ => Event::Drain { nth },
            };
            (tick(at), event)
        })
        .collect();
    drawn.extend(of_all(scenario, seconds, &mut chance));
    drawn.sort_by_key(|(at, _)| *at);
    drawn
}

/// What befalls several at once.
fn of_all(scenario: Scenario, seconds: u64, chance: &mut u64) -> Vec<(Tick, Event)> {
    let mut jitter = |least: u64, most: u64| least + mix(chance) % (most - least).max(1);
    // In thousandths of the time.
    let at = |part: u64| seconds * part;
    let of_time = |part: u64| Duration::from_millis(seconds * part);
    match scenario {
        Scenario::Crash => {
            let together = at(jitter(150, 550));
            let kill = |nth| (tick(together), Event::Kill { nth });
            (0..3).map(|_| kill(jitter(0, u64::MAX))).collect()
        }
        Scenario::Partition => {
            let cut = |at, salt, down| (tick(at), Event::Cut { salt, down });
            let (long, short) = (of_time(jitter(280, 340)), of_time(jitter(20, 80)));
            vec![
                cut(at(jitter(100, 150)), jitter(0, u64::MAX), long),
                cut(at(jitter(550, 600)), jitter(0, u64::MAX), short),
            ]
        }
        Scenario::Replicas => {
            let mut kill = |least, most| {
                let nth = jitter(0, u64::MAX);
                (tick(at(jitter(least, most))), Event::Kill { nth })
            };
            vec![kill(80, 130), kill(530, 600)]
        }
        Scenario::Hot => {
            let mut kill = |least, most, run, place| {
                (
                    tick(at(jitter(least, most))),
                    Event::KillOwner { run, place },
                )
            };
            // Its last run, so that the others go on being read.
            vec![kill(300, 350, PROMPT_RUNS - 1, 0), kill(420, 480, 2, 1)]
        }
        Scenario::Slow => {
            let (salt, down) = (jitter(0, u64::MAX), of_time(jitter(450, 550)));
            vec![(tick(at(jitter(80, 120))), Event::Slow { salt, down })]
        }
        Scenario::Mixed => {
            let (salt, down) = (jitter(0, u64::MAX), of_time(jitter(30, 350)));
            let cut = (tick(at(jitter(100, 300))), Event::Cut { salt, down });
            let (salt, down) = (jitter(0, u64::MAX), of_time(jitter(50, 400)));
            let slow = (tick(at(jitter(80, 250))), Event::Slow { salt, down });
            vec![cut, slow]
        }
        _ => Vec::new(),
    }
}

fn tick(ms: u64) -> Tick {
    Tick(Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::{Event, Scenario, events};

    #[test]
    fn a_seed_gives_one_feed_and_every_end_is_quiet() {
        for scenario in Scenario::value_variants() {
            let feed = events(*scenario, 1000, 60, 7);
            assert_eq!(feed, events(*scenario, 1000, 60, 7));
            let is_calm = *scenario == Scenario::Calm;
            assert_eq!(feed.is_empty(), is_calm);
            assert!(is_calm || feed != events(*scenario, 1000, 60, 8));
            assert!(feed.iter().all(|(at, event)| {
                let down = match event {
                    Event::Cut { down, .. } | Event::Slow { down, .. } => *down,
                    _ => std::time::Duration::ZERO,
                };
                at.after(down).as_millis() <= 42_000
            }));
        }
    }

    #[test]
    fn churn_has_everything_that_befalls_one() {
        let feed = events(Scenario::Churn, 1000, 60, 7);
        let kinds = [
            feed.iter().any(|(_, e)| matches!(e, Event::Join { .. })),
            feed.iter().any(|(_, e)| matches!(e, Event::Kill { .. })),
            feed.iter().any(|(_, e)| matches!(e, Event::Restart { .. })),
            feed.iter().any(|(_, e)| matches!(e, Event::Freeze { .. })),
            feed.iter().any(|(_, e)| matches!(e, Event::Drain { .. })),
        ];
        assert_eq!(kinds, [true; 5]);
    }
}
