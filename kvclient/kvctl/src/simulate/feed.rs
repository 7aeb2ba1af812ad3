//! What happens to the members, drawn from a seed before anything begins.
//!
//! ```text
//! calm    nothing                         grow    a tenth joins, one after the other
//! shrink  a tenth is drained and leaves   crash   a twentieth is killed, a twentieth restarts
//! churn   all of it at once: joins, drains, kills, quick restarts, freezes
//! ```
//!
//! Units: milliseconds of simulated time. Errors: none. The end is quiet, so that what moves can
//! arrive and views can converge.

use std::time::Duration;

use kvserver::clock::Tick;

use super::clock::mix;

/// How the members fare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Scenario {
    /// Nothing happens
    Calm,
    /// Members join
    Grow,
    /// Members are drained and leave
    Shrink,
    /// Members are killed, some come back
    Crash,
    /// All of it
    Churn,
}

/// Something that happens to one member.
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
    /// It hands over what it has and leaves.
    Drain { nth: u64 },
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
    let kinds: &[u64] = match scenario {
        Scenario::Calm => &[],
        Scenario::Grow => &[0],
        Scenario::Shrink => &[4],
        Scenario::Crash => &[1, 2],
        Scenario::Churn => &[0, 1, 2, 3, 4, 0],
    };
    let count = match scenario {
        Scenario::Calm => 0,
        Scenario::Churn => (tenth * 3 / 2).max(kinds.len()),
        _ => tenth,
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
                _ => Event::Drain { nth },
            };
            (Tick(Duration::from_millis(at)), event)
        })
        .collect();
    drawn.sort_by_key(|(at, _)| *at);
    drawn
}

#[cfg(test)]
mod tests {
    use super::{Event, Scenario, events};

    #[test]
    fn a_seed_gives_one_feed_and_churn_has_everything() {
        let feed = events(Scenario::Churn, 1000, 60, 7);
        assert_eq!(feed, events(Scenario::Churn, 1000, 60, 7));
        assert_ne!(feed, events(Scenario::Churn, 1000, 60, 8));
        assert!(
            feed.iter()
                .any(|(_, event)| matches!(event, Event::Join { .. }))
        );
        assert!(
            feed.iter()
                .any(|(_, event)| matches!(event, Event::Drain { .. }))
        );
        assert!(feed.iter().all(|(at, _)| at.as_millis() < 36_000));
        assert!(events(Scenario::Calm, 1000, 60, 7).is_empty());
    }
}
