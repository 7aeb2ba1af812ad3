//! Time and chance, injected.
//!
//! ```text
//! engine, tiers, blocks, rpc ──► Clock ◄── SystemClock   the machine's time, the kernel's randomness
//!                                     ◄── ManualClock   stands still until a test advances it
//! ```
//!
//! Units: a [`Tick`] is the time since the clock was made; wall time is milliseconds since 1970.
//! Errors: none; a clock always answers.
//! Why one trait for both: whoever retries needs jitter with its wait, and a test that wants the same
//! history twice has to hold both in its hand. This is the only file that may name `Instant::now`,
//! `SystemTime::now`, `sleep` or a source of randomness; `clippy.toml` refuses them elsewhere.
#![allow(clippy::disallowed_methods)]

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    future::Future,
    hash::{BuildHasher, RandomState},
    io::Read,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;

/// A moment, as time since the clock was made. Monotone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick(pub Duration);

impl Tick {
    /// The moment `wait` after this one; the far end of time when that overflows.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.checked_add(wait).unwrap_or(Duration::MAX))
    }

    /// Time from `earlier` to this moment; zero when `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Whole milliseconds since the clock was made.
    #[must_use]
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// Whole nanoseconds since the clock was made (584 years fit).
    #[must_use]
    pub fn as_nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Where time and chance come from.
pub trait Clock: Send + Sync + 'static {
    /// The present moment; never goes back.
    fn now(&self) -> Tick;

    /// Wall time, milliseconds since 1970. May jump when somebody sets the machine's time.
    fn unix_ms(&self) -> u64;

    /// Ready once `wait` has passed. Dropping it forgets it.
    fn sleep(&self, wait: Duration) -> BoxFuture<'static, ()>;

    /// 64 unpredictable bits ([`ManualClock`]: repeatable ones).
    fn random_u64(&self) -> u64;
}

/// The machine's clock and the kernel's random source.
pub struct SystemClock {
    start: Instant,
    random: Mutex<RandomPool>,
}

impl SystemClock {
    /// A clock whose [`Tick`] zero is now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            random: Mutex::new(RandomPool::new()),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for SystemClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SystemClock")
            .field("start", &self.start)
            .finish_non_exhaustive()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Tick {
        Tick(self.start.elapsed())
    }

    fn unix_ms(&self) -> u64 {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn sleep(&self, wait: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(wait))
    }

    fn random_u64(&self) -> u64 {
        self.random.lock().next()
    }
}

/// Random bytes read from the kernel 512 at a time, so that a request id costs no system call.
struct RandomPool {
    source: Option<File>,
    bytes: [u8; 512],
    at: usize,
    fallback: RandomState,
    drawn: u64,
}

impl RandomPool {
    fn new() -> Self {
        Self {
            source: File::open("/dev/urandom").ok(),
            bytes: [0; 512],
            at: 512,
            fallback: RandomState::new(),
            drawn: 0,
        }
    }

    fn next(&mut self) -> u64 {
        if self.at == self.bytes.len() {
            let filled = self
                .source
                .as_mut()
                .is_some_and(|f| f.read_exact(&mut self.bytes).is_ok());
            if !filled {
                // A chroot without /dev: SipHash of a counter under keys that std took from the kernel.
                self.drawn += 1;
                return self.fallback.hash_one(self.drawn);
            }
            self.at = 0;
        }
        let mut word = [0; 8];
        word.copy_from_slice(&self.bytes[self.at..self.at + 8]);
        self.at += 8;
        u64::from_le_bytes(word)
    }
}

/// A clock that stands still until [`ManualClock::advance`]; clones share the same time.
#[derive(Clone)]
pub struct ManualClock {
    state: Arc<Mutex<ManualState>>,
}

struct ManualState {
    now: Duration,
    unix_ms_at_start: u64,
    random: u64,
    next_sleeper: u64,
    /// By due time, then by order of arrival, so that waking is repeatable.
    sleepers: BTreeMap<(Duration, u64), Waker>,
}

impl ManualClock {
    /// A clock at tick zero whose randomness is a function of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            state: Arc::new(Mutex::new(ManualState {
                now: Duration::ZERO,
                unix_ms_at_start: 1_700_000_000_000,
                random: seed,
                next_sleeper: 0,
                sleepers: BTreeMap::new(),
            })),
        }
    }

    /// Moves time on by `by` and wakes whoever is due, earliest first.
    pub fn advance(&self, by: Duration) {
        let due = {
            let mut state = self.state.lock();
            state.now += by;
            let now = state.now;
            let later = state.sleepers.split_off(&(now, u64::MAX));
            std::mem::replace(&mut state.sleepers, later)
        };
        for waker in due.into_values() {
            waker.wake();
        }
    }

    /// How many sleeps are waiting for their time.
    #[must_use]
    pub fn sleepers(&self) -> usize {
        self.state.lock().sleepers.len()
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new(0)
    }
}

impl fmt::Debug for ManualClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManualClock")
            .field("now", &self.state.lock().now)
            .finish_non_exhaustive()
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Tick {
        Tick(self.state.lock().now)
    }

    fn unix_ms(&self) -> u64 {
        let state = self.state.lock();
        state.unix_ms_at_start + u64::try_from(state.now.as_millis()).unwrap_or(u64::MAX)
    }

    fn sleep(&self, wait: Duration) -> BoxFuture<'static, ()> {
        let mut state = self.state.lock();
        let id = state.next_sleeper;
        state.next_sleeper += 1;
        let due = state.now.saturating_add(wait);
        Box::pin(ManualSleep {
            state: Arc::clone(&self.state),
            key: (due, id),
        })
    }

    /// SplitMix64 (Steele, Lea, Flood 2014): every seed gives a full-period sequence.
    fn random_u64(&self) -> u64 {
        let mut state = self.state.lock();
        state.random = state.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

struct ManualSleep {
    state: Arc<Mutex<ManualState>>,
    key: (Duration, u64),
}

impl Future for ManualSleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if state.now >= self.key.0 {
            return Poll::Ready(());
        }
        state.sleepers.insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for ManualSleep {
    fn drop(&mut self) {
        self.state.lock().sleepers.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manual_time_moves_only_by_hand() {
        let clock = ManualClock::new(1);
        let before = clock.now();
        assert_eq!(clock.now(), before);
        clock.advance(Duration::from_millis(1500));
        assert_eq!(clock.now().since(before), Duration::from_millis(1500));
        assert_eq!(clock.unix_ms(), 1_700_000_001_500);
    }

    #[test]
    fn the_same_seed_gives_the_same_chances() {
        let (a, b, c) = (
            ManualClock::new(7),
            ManualClock::new(7),
            ManualClock::new(8),
        );
        let draw = |clock: &ManualClock| [clock.random_u64(), clock.random_u64()];
        assert_eq!(draw(&a), draw(&b));
        assert_ne!(draw(&a), draw(&c));
    }

    #[tokio::test]
    async fn a_sleeper_wakes_at_its_time_and_not_before() {
        let clock = ManualClock::new(1);
        let mut sleep = clock.sleep(Duration::from_secs(2));
        assert!(futures_util::poll!(&mut sleep).is_pending());
        clock.advance(Duration::from_secs(1));
        assert!(futures_util::poll!(&mut sleep).is_pending());
        clock.advance(Duration::from_secs(1));
        assert!(futures_util::poll!(&mut sleep).is_ready());
    }

    #[tokio::test]
    async fn a_dropped_sleep_leaves_nothing_behind() {
        let clock = ManualClock::new(1);
        let mut sleep = clock.sleep(Duration::from_secs(2));
        assert!(futures_util::poll!(&mut sleep).is_pending());
        assert_eq!(clock.sleepers(), 1);
        drop(sleep);
        assert_eq!(clock.sleepers(), 0);
    }

    #[test]
    fn system_randomness_does_not_repeat() {
        let clock = SystemClock::new();
        let drawn: std::collections::HashSet<u64> = (0..1000).map(|_| clock.random_u64()).collect();
        assert_eq!(drawn.len(), 1000);
    }
}
