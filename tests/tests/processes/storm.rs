//! Everything that can happen, in an order that a seed decides, each on top of what the last has left behind.
//!
//! `TERRACE_STORM_SEED=7` chooses another order; the seed is printed.

use std::time::Duration;

use kvtests::{
    load::Plan,
    namespaces::SlowLink,
    patience::{HANG, pause},
    processes::{Fleet, agree},
};

use crate::{AGREED, ANEW, GRACE, NOTICED, PROGRAMS, SETTINGS, SHORT, scenario, show};

const NODES: usize = 5;

#[derive(Clone, Copy, Debug)]
enum Event {
    /// `kill -9`, and again over the same disk.
    Kill,
    /// The same, with nothing left.
    Wipe,
    /// Shorter than its grace.
    Freeze,
    /// Longer, so that it is declared lost.
    FreezeLong,
    /// In two, for longer than a grace.
    Divide,
    /// In two, and one on the far side is killed and comes back before it heals.
    DivideAndKill,
    /// A link that carries next to nothing.
    Slow,
    /// It hands over, leaves, and comes back empty.
    Drain,
}

const EVENTS: [Event; 8] = [
    Event::Kill,
    Event::Wipe,
    Event::Freeze,
    Event::FreezeLong,
    Event::Divide,
    Event::DivideAndKill,
    Event::Slow,
    Event::Drain,
];

/// SplitMix64.
struct Lots(u64);

impl Lots {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

#[test]
fn whatever_happens_in_whatever_order_no_byte_is_wrong_and_no_call_late() {
    let test = "storm::whatever_happens_in_whatever_order_no_byte_is_wrong_and_no_call_late";
    scenario(test, async {
        let seed = std::env::var("TERRACE_STORM_SEED").ok();
        let seed = seed.map_or(1, |seed| seed.parse().expect("a number"));
        println!("  TERRACE_STORM_SEED={seed}");
        let mut lots = Lots(seed);
        let mut fleet = Fleet::start(PROGRAMS, NODES, SETTINGS).await;
        let plan = Plan {
            clients: 2,
            ..Plan::default()
        };
        let (mut near, mut far) = (fleet.load(&plan), fleet.load(&plan));
        near.fill(true).await;
        near.go(true);
        far.go(true);
        let level = near.level().await;
        println!("  level before: {level:.4}");
        let (from, from_far) = (near.tally(), far.tally());

        let mut events = EVENTS.to_vec();
        while !events.is_empty() {
            let event = events.swap_remove(lots.below(events.len()));
            let node = lots.below(NODES);
            println!("  {event:?} {}", fleet.place(node));
            let after = Duration::from_millis(300 + lots.below(1500) as u64);
            befall(&mut fleet, event, node, after).await;
            near.assert_clean();
            far.assert_clean();
            // The next comes while moves of this one are under way.
            pause(after).await;
        }
        fleet.is_one(NODES, HANG).await;
        near.returns_to("hits are back", level - SHORT, ANEW).await;
        far.returns_to("and at the other load", level - SHORT, ANEW)
            .await;
        show("a load that was always near", &near, &from);
        show("one that was at times far", &far, &from_far);
        near.stop().await;
        far.stop().await;
        near.assert_clean();
        far.assert_clean();
    });
}

async fn befall(fleet: &mut Fleet, event: Event, node: usize, after: Duration) {
    let long = GRACE + NOTICED;
    match event {
        Event::Kill => {
            fleet.kill(node);
            pause(after).await;
            fleet.start_node(node);
        }
        Event::Wipe => {
            fleet.kill(node);
            fleet.wipe(node);
            pause(after).await;
            fleet.start_node(node);
        }
        Event::Freeze | Event::FreezeLong => {
            fleet.freeze(node);
            let time = if matches!(event, Event::Freeze) {
                after
            } else {
                long
            };
            pause(time).await;
            fleet.thaw(node);
        }
        Event::Divide | Event::DivideAndKill => {
            let apart = [node, (node + 1) % NODES];
            fleet.divide(&apart, &[1]);
            pause(after).await;
            if matches!(event, Event::DivideAndKill) {
                fleet.kill(node);
                pause(after).await;
                fleet.start_node(node);
            }
            pause(long).await;
            fleet.heal(&apart, &[1]);
        }
        Event::Slow => {
            let link = SlowLink {
                kbit: 1000,
                delay_ms: 30,
            };
            fleet.network.slow(&fleet.place(node), link);
            pause(after + NOTICED).await;
            fleet.network.quick(&fleet.place(node));
        }
        Event::Drain => {
            fleet.is_one(NODES, HANG).await;
            let told = fleet.drain(node, HANG).await;
            println!(
                "    {:?}, {} bytes at stake",
                told.phase(),
                told.at_stake_bytes
            );
            let mut others = fleet.running();
            others.retain(|other| *other != node);
            let limit = NOTICED + AGREED;
            fleet
                .see("the others agree", limit, &others, |s| agree(s, NODES - 1))
                .await;
            fleet.stop(node).await;
            fleet.wipe(node);
            fleet.start_node(node);
        }
    }
}
