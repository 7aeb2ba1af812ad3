//! Time and chance, injected.
//!
//! ```text
//! deadlines, backoff, breaker, ids ──► Clock ◄── SystemClock   the machine's time
//!                                            ◄── ManualClock   stands still until a test advances it
//! ```
//!
//! Units: a [`Tick`] is the time since the clock was made.
//! Errors: none; a clock always answers.
//! Why its own and not the server's: the client must never depend on the server. This is the only file
//! here that may name `Instant::now`, `sleep` or a source of randomness.
#![allow(clippy::disallowed_methods)]

use std::{
    fmt,
    future::Future,
    hash::{BuildHasher, RandomState},
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::Poll,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use tokio::sync::watch;

/// A moment, as time since the clock was made. Monotone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(pub Duration);

impl Tick {
    /// The moment `wait` after this one.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(wait))
    }

    /// Time from `earlier` to this moment; zero when `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// Where time and chance come from.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The present moment; never goes back.
    fn now(&self) -> Tick;

    /// Ready once `wait` has passed. Dropping it forgets it.
    fn sleep(&self, wait: Duration) -> BoxFuture<'static, ()>;

    /// 64 bits that no other client draws ([`ManualClock`]: repeatable ones).
    fn random_u64(&self) -> u64;
}

/// The machine's clock.
///
/// Its randomness is the standard library's hash seed (drawn from the kernel) run over a counter: good
/// for jitter and for ids that must not meet, not for secrets, of which the client has none.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
    seed: RandomState,
    drawn: AtomicU64,
}

impl SystemClock {
    /// A clock that starts now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            seed: RandomState::new(),
            drawn: AtomicU64::new(0),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Tick {
        Tick(self.start.elapsed())
    }

    fn sleep(&self, wait: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(wait))
    }

    fn random_u64(&self) -> u64 {
        self.seed
            .hash_one(self.drawn.fetch_add(1, Ordering::Relaxed))
    }
}

/// A clock that moves only when told to; for tests.
#[derive(Debug)]
pub struct ManualClock {
    now: watch::Sender<Tick>,
    random: AtomicU64,
}

impl ManualClock {
    /// A clock at zero, whose random numbers follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            now: watch::Sender::new(Tick::default()),
            random: AtomicU64::new(seed),
        }
    }

    /// Moves on by `step` and wakes who has slept long enough.
    pub fn advance(&self, step: Duration) {
        self.now.send_modify(|now| *now = now.after(step));
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Tick {
        *self.now.borrow()
    }

    fn sleep(&self, wait: Duration) -> BoxFuture<'static, ()> {
        let until = self.now().after(wait);
        let mut seen = self.now.subscribe();
        Box::pin(async move {
            if seen.wait_for(|now| *now >= until).await.is_err() {
                // The clock is gone: time stands still for ever.
                std::future::pending::<()>().await;
            }
        })
    }

    fn random_u64(&self) -> u64 {
        // SplitMix64 (Steele, Lea, Flood 2014): any seed gives a full-period sequence.
        let mut z = self
            .random
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed)
            .wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Runs `work` until it is done or `deadline` has come; `None` means the deadline won.
///
/// Work that is ready at the deadline still counts: an answer in hand is worth more than a rule.
pub(crate) async fn within<T>(
    clock: &dyn Clock,
    deadline: Tick,
    work: impl Future<Output = T>,
) -> Option<T> {
    within_pinned(clock, deadline, std::pin::pin!(work)).await
}

/// The same for work that its maker has pinned, and that is not copied once more.
pub(crate) async fn within_pinned<T>(
    clock: &dyn Clock,
    deadline: Tick,
    mut work: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    // Most work here is done at once: then no clock is read and no timer made.
    if let Poll::Ready(done) = futures_util::poll!(work.as_mut()) {
        return Some(done);
    }
    let left = deadline.since(clock.now());
    tokio::select! {
        biased;
        done = work.as_mut() => Some(done),
        () = clock.sleep(left) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use super::*;

    fn waits(nap: &mut BoxFuture<'_, ()>) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        nap.as_mut().poll(&mut context).is_pending()
    }

    #[tokio::test]
    async fn manual_time_stands_still_until_advanced() {
        let clock = ManualClock::new(7);
        let mut nap = clock.sleep(Duration::from_millis(10));
        assert!(waits(&mut nap));
        clock.advance(Duration::from_millis(9));
        assert!(waits(&mut nap));
        clock.advance(Duration::from_millis(1));
        nap.await;
        assert_eq!(clock.now(), Tick(Duration::from_millis(10)));
    }

    #[test]
    fn manual_chance_repeats_and_system_chance_does_not() {
        let (a, b) = (ManualClock::new(1), ManualClock::new(1));
        assert_eq!(a.random_u64(), b.random_u64());
        assert_ne!(a.random_u64(), a.random_u64());
        assert_ne!(
            SystemClock::new().random_u64(),
            SystemClock::new().random_u64()
        );
    }
}
