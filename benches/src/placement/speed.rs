//! Nanoseconds per look-up, in interleaved rounds.

use std::hint::black_box;
use std::time::Duration;

use kvproto::RunHash;
use kvproto::placement::Placement;

use super::{Known, Members, Owners, Way, runs};
use crate::micro::{Line, Price, Unit, run};

/// Runs that are asked for in turn: more than a branch predictor can learn.
const ASKED: usize = 1 << 14;

/// Measures every way for each of `sizes`, and what else of placement is on a request's path.
pub fn measure(
    sizes: &[u32],
    rounds: usize,
    length: Duration,
    after: impl FnMut(&'static str),
) -> Vec<Line> {
    let mut prices = Vec::new();
    for &size in sizes {
        let members = Members::mixed(size);
        for way in Way::all(size) {
            let known = way.know(&members, None);
            let name = format!("{} of {size}", way.name());
            prices.push(match known {
                // As it is called: the answer is an id.
                Known::Rendezvous(known) => look_up(name, move |asked| {
                    black_box(known.placement.first(asked));
                }),
                known => look_up(name, move |asked| {
                    black_box(known.owner(asked));
                }),
            });
        }
        let placement = Placement::new(&members.view());
        let of = placement.clone();
        prices.push(look_up(
            format!("two owners in other zones of {size}"),
            move |asked| {
                drop(black_box(of.owners(asked, 2)));
            },
        ));
        prices.push(look_up(
            format!("all members in order of {size}"),
            move |asked| {
                drop(black_box(placement.ranked(asked)));
            },
        ));
        let view = members.view();
        let step = move || {
            black_box(Placement::new(black_box(&view)));
            u64::from(size)
        };
        prices.push(Price::new(
            format!("preparing a view of {size}").leak(),
            Unit::Nanos("member"),
            step,
        ));
    }
    run(&mut prices, rounds, length, after)
}

fn look_up(name: String, mut ask: impl FnMut(&RunHash) + 'static) -> Price {
    let (asked, mut at): (Vec<RunHash>, usize) = (runs(9).take(ASKED).collect(), 0);
    // Names live as long as the program: there are two dozen of them.
    Price::new(name.leak(), Unit::Nanos("look-up"), move || {
        for _ in 0..16 {
            at = (at + 1) % ASKED;
            ask(&asked[at]);
        }
        16
    })
}
