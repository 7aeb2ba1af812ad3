//! Simulated time: an ordered queue of who sleeps until when, and one source of chance.
//!
//! ```text
//! tasks run until nobody can go on ─► the earliest sleeper's moment is now ─► it is woken ─► …
//! ```
//!
//! No moment passes while anything can run, so a minute of a thousand nodes costs what they do in it. Sleepers of the
//! same moment wake in the order in which they lay down, and chance is SplitMix64 of the seed: one seed, one history.
//! Units: [`Tick`]. Errors: none.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::future::BoxFuture;
use kvserver::clock::{Clock, Tick};
use parking_lot::Mutex;

/// The clock of everybody in a simulation.
#[derive(Clone, Default)]
pub(super) struct SimClock(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    now: Tick,
    sleepers: BTreeMap<(Tick, u64), Waker>,
    lain_down: u64,
    chance: u64,
}

impl SimClock {
    pub(super) fn new(seed: u64) -> Self {
        let chance = seed;
        Self(Arc::new(Mutex::new(State {
            chance,
            ..State::default()
        })))
    }

    /// Goes to the earliest sleeper's moment and wakes whoever is due then; false when that is after `end`.
    pub(super) fn next(&self, end: Tick) -> bool {
        let due: Vec<Waker> = {
            let mut state = self.0.lock();
            let Some(&(moment, _)) = state.sleepers.keys().next() else {
                return false;
            };
            if moment > end {
                return false;
            }
            state.now = moment.max(state.now);
            let later = state.sleepers.split_off(&(moment, u64::MAX));
            std::mem::replace(&mut state.sleepers, later)
                .into_values()
                .collect()
        };
        due.into_iter().for_each(Waker::wake);
        true
    }
}

/// SplitMix64.
pub(super) fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Clock for SimClock {
    fn now(&self) -> Tick {
        self.0.lock().now
    }

    fn unix_ms(&self) -> u64 {
        self.now().as_millis()
    }

    fn sleep(&self, wait: Duration) -> BoxFuture<'static, ()> {
        let until = self.now().after(wait);
        Box::pin(Sleep {
            clock: self.clone(),
            until,
            place: None,
        })
    }

    fn random_u64(&self) -> u64 {
        mix(&mut self.0.lock().chance)
    }
}

struct Sleep {
    clock: SimClock,
    until: Tick,
    place: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let clock = self.clock.clone();
        let mut state = clock.0.lock();
        if state.now >= self.until {
            return Poll::Ready(());
        }
        let place = *self.place.get_or_insert_with(|| {
            state.lain_down += 1;
            state.lain_down
        });
        state
            .sleepers
            .insert((self.until, place), context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.clock.0.lock().sleepers.remove(&(self.until, place));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kvserver::clock::{Clock, Tick};
    use tokio::task::yield_now;

    use super::SimClock;

    #[tokio::test]
    async fn sleepers_wake_in_order_and_a_dropped_one_never() {
        let clock = SimClock::new(1);
        let (one, told) = (clock.clone(), std::sync::mpsc::sync_channel(8));
        for (name, ms) in [("b", 2), ("a", 1), ("c", 2)] {
            let (clock, told) = (one.clone(), told.0.clone());
            tokio::spawn(async move {
                clock.sleep(Duration::from_millis(ms)).await;
                told.send((name, clock.now().as_millis())).unwrap();
            });
        }
        yield_now().await;
        drop(clock.sleep(Duration::from_millis(1)));
        while clock.next(Tick(Duration::from_secs(1))) {
            yield_now().await;
        }
        drop((told.0, one));
        assert_eq!(
            told.1.into_iter().take(3).collect::<Vec<_>>(),
            [("a", 1), ("b", 2), ("c", 2)]
        );
    }

    #[test]
    fn chance_is_that_of_the_seed() {
        let draws = |seed| [(); 3].map(|()| SimClock::new(seed).random_u64());
        assert_eq!(draws(7), draws(7));
        assert_ne!(draws(7), draws(8));
    }
}
