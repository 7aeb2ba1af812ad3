//! The simulated network between two places: what is cut, what is slow, what gets lost.
//!
//! ```text
//! cut     every place is on one of two sides; nothing passes between them, and who waits waits until its deadline
//! slow    one direction in five takes 20 to 150 ms longer, one in seven loses a tenth of what it carries
//! ```
//!
//! A call has two ways, there and back, and either may lose it: what was asked for may have happened although nobody
//! heard of it. Sides and slow links follow from a salt, losses from the clock's chance. Units: durations. Errors:
//! `None`: no answer came before the deadline.

use std::time::Duration;

use kvserver::clock::{Clock, Tick};
use parking_lot::Mutex;

use super::clock::{SimClock, mix};

/// Where a call begins or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Node(usize),
    Caller(usize),
}

/// A time during which the two sides did not hear each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    salt: u64,
    pub(super) since: Tick,
    /// `None`: it still is.
    pub(super) healed: Option<Tick>,
}

/// The network.
pub(super) struct Links {
    clock: SimClock,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The last one.
    cut: Option<Cut>,
    slow: Option<u64>,
}

impl Links {
    pub(super) fn new(clock: SimClock) -> Self {
        Self {
            clock,
            state: Mutex::default(),
        }
    }

    /// Two of five places do not hear the others from now on.
    pub(super) fn cut(&self, salt: u64) {
        self.state.lock().cut = Some(Cut {
            salt,
            since: self.clock.now(),
            healed: None,
        });
    }

    /// Everybody hears everybody again.
    pub(super) fn heal(&self) {
        let now = self.clock.now();
        if let Some(cut) = &mut self.state.lock().cut {
            cut.healed = Some(now);
        }
    }

    /// Some links are slow, and some lose what they carry, from now on.
    pub(super) fn slow(&self, salt: u64) {
        self.state.lock().slow = Some(salt);
    }

    /// All links are as they were.
    pub(super) fn even(&self) {
        self.state.lock().slow = None;
    }

    /// The cut there is or was last.
    pub(super) fn last_cut(&self) -> Option<Cut> {
        self.state.lock().cut
    }

    /// Whether nothing passes between two places now.
    pub(super) fn is_cut(&self, a: Place, b: Place) -> bool {
        let state = self.state.lock();
        state.cut.is_some_and(|cut| cut.is_on() && cut.parts(a, b))
    }

    fn is_even(&self) -> bool {
        let state = self.state.lock();
        state.slow.is_none() && !state.cut.is_some_and(|cut| cut.is_on())
    }

    /// How much longer than usual a message is on its way; `None`: it never arrives.
    fn leg(&self, from: Place, to: Place) -> Option<Duration> {
        if self.is_cut(from, to) {
            return None;
        }
        let Some(salt) = self.state.lock().slow else {
            return Some(Duration::ZERO);
        };
        let mut link = salt ^ from.number().rotate_left(20) ^ to.number();
        let kind = mix(&mut link);
        if kind.is_multiple_of(7) && self.clock.random_u64().is_multiple_of(10) {
            return None;
        }
        let slower = match kind % 5 {
            0 => Duration::from_millis(20 + mix(&mut link) % 130),
            _ => Duration::ZERO,
        };
        Some(slower)
    }

    /// A call from one place to another; its answer, if that comes before `until`.
    pub(super) async fn carry<T>(
        &self,
        from: Place,
        to: Place,
        until: Tick,
        call: impl Future<Output = T>,
    ) -> Option<T> {
        if self.is_even() {
            let answer = call.await;
            if self.is_even() {
                return Some(answer);
            }
            return self.back(to, from, until, answer).await;
        }
        let late = self.clock.sleep(until.since(self.clock.now()));
        let called = async {
            let Some(way) = self.leg(from, to) else {
                return std::future::pending().await;
            };
            if !way.is_zero() {
                self.clock.sleep(way).await;
            }
            let answer = call.await;
            self.back(to, from, until, answer).await
        };
        tokio::select! {
            biased;
            answer = called => answer,
            () = late => None,
        }
    }

    async fn back<T>(&self, from: Place, to: Place, until: Tick, answer: T) -> Option<T> {
        let left = until.since(self.clock.now());
        match self.leg(from, to) {
            Some(way) if way <= left => {
                if !way.is_zero() {
                    self.clock.sleep(way).await;
                }
                Some(answer)
            }
            _ => {
                self.clock.sleep(left).await;
                None
            }
        }
    }
}

impl Cut {
    pub(super) fn is_on(&self) -> bool {
        self.healed.is_none()
    }

    /// Whether two places are on different sides of it.
    pub(super) fn parts(&self, a: Place, b: Place) -> bool {
        self.side(a) != self.side(b)
    }

    fn side(&self, place: Place) -> bool {
        let mut state = self.salt ^ place.number();
        mix(&mut state) % 5 < 2
    }
}

impl Place {
    fn number(self) -> u64 {
        match self {
            Self::Node(index) => index as u64,
            Self::Caller(number) => (1 << 40) | number as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::ready, sync::Arc};

    use super::*;

    /// What comes of a call of two seconds at most, and when.
    async fn called(links: &Arc<Links>, from: usize, to: usize) -> (Option<u8>, u64) {
        let (links, clock) = (Arc::clone(links), links.clock.clone());
        let calling = tokio::spawn({
            let clock = clock.clone();
            async move {
                let until = clock.now().after(Duration::from_secs(2));
                let (from, to) = (Place::Node(from), Place::Caller(to));
                let answer = links.carry(from, to, until, ready(7)).await;
                (answer, clock.now().as_millis())
            }
        });
        tokio::task::yield_now().await;
        while clock.next(Tick(Duration::from_secs(3600))) {
            tokio::task::yield_now().await;
        }
        calling.await.unwrap()
    }

    #[tokio::test]
    async fn nothing_passes_a_cut_until_it_heals() {
        let links = Arc::new(Links::new(SimClock::new(1)));
        links.cut(3);
        let cut = links.last_cut().unwrap();
        let apart = (0..99).find(|&to| cut.parts(Place::Node(0), Place::Caller(to)));
        let beside = (0..99).find(|&to| !cut.parts(Place::Node(0), Place::Caller(to)));
        assert_eq!(called(&links, 0, beside.unwrap()).await, (Some(7), 0));
        assert_eq!(called(&links, 0, apart.unwrap()).await, (None, 2000));
        links.heal();
        assert_eq!(called(&links, 0, apart.unwrap()).await, (Some(7), 2000));
    }

    #[tokio::test]
    async fn some_links_are_slow_and_no_call_outlives_its_deadline() {
        let links = Arc::new(Links::new(SimClock::new(1)));
        links.slow(3);
        let (mut before, mut slow, mut lost) = (0, 0, 0);
        for to in 0..400 {
            let (answer, at) = called(&links, 0, to).await;
            assert!(at - before <= 2000, "{to}: {at}");
            slow += u32::from(answer.is_some() && at > before);
            lost += u32::from(answer.is_none());
            before = at;
        }
        assert!((40..240).contains(&slow), "{slow}");
        assert!((2..60).contains(&lost), "{lost}");
        links.even();
        assert_eq!(called(&links, 0, 1).await, (Some(7), before));
    }
}
