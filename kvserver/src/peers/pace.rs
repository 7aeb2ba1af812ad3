//! Bytes per second that moves between nodes may use.
//!
//! ```text
//! level ── grows by `rate` a second, up to a quarter of a second's worth
//!   moves   wait until it is above zero, then take what they send: it may fall below
//!   reads   take without waiting: whoever waits for a block is served first, and moves pay for it
//! ```
//!
//! Units: bytes, bytes per second. Errors: none. A rate of 0 is no limit.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;

use crate::clock::{Clock, Tick};

/// A burst is a quarter of a second's worth, so that a reader never queues behind more.
const BURST_MS: u64 = 250;

/// A token bucket in bytes.
pub struct Pace {
    clock: Arc<dyn Clock>,
    rate: u64,
    level: Mutex<Level>,
}

struct Level {
    /// Below zero: spent in advance.
    bytes: i64,
    at: Tick,
}

impl Pace {
    /// So many bytes a second; 0: no limit.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, rate: u64) -> Self {
        let level = Level {
            bytes: burst(rate),
            at: clock.now(),
        };
        Self {
            clock,
            rate,
            level: Mutex::new(level),
        }
    }

    /// Takes bytes without waiting for them.
    pub fn spend(&self, bytes: u64) {
        if self.rate > 0 {
            let mut level = self.level.lock();
            self.fill(&mut level);
            level.bytes = level
                .bytes
                .saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    /// How long until something may be sent; zero: now.
    #[must_use]
    pub fn wait(&self) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        let mut level = self.level.lock();
        self.fill(&mut level);
        match u64::try_from(level.bytes) {
            Ok(1..) => Duration::ZERO,
            _ => {
                let owed = level.bytes.unsigned_abs() + 1;
                let nanos = u128::from(owed) * 1_000_000_000 / u128::from(self.rate);
                // At least what the clock can tell apart, or the next fill would come too early by rounding.
                Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX).max(1_000_000))
            }
        }
    }

    /// Waits for its turn, then takes the bytes.
    pub async fn take(&self, bytes: u64) {
        loop {
            match self.wait() {
                Duration::ZERO => break,
                wait => self.clock.sleep(wait).await,
            }
        }
        self.spend(bytes);
    }

    fn fill(&self, level: &mut Level) {
        let now = self.clock.now();
        let passed = now.since(level.at).as_nanos();
        let grown = passed * u128::from(self.rate) / 1_000_000_000;
        if grown == 0 {
            return;
        }
        level.at = now;
        let grown = i64::try_from(grown).unwrap_or(i64::MAX);
        level.bytes = level.bytes.saturating_add(grown).min(burst(self.rate));
    }
}

fn burst(rate: u64) -> i64 {
    i64::try_from(rate / 1000 * BURST_MS)
        .unwrap_or(i64::MAX)
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    fn paced(rate: u64) -> (Pace, ManualClock) {
        let clock = ManualClock::new(1);
        (Pace::new(Arc::new(clock.clone()), rate), clock)
    }

    #[test]
    fn in_the_long_run_the_rate_is_kept() {
        let (pace, clock) = paced(1_000_000);
        let mut sent = 0_u64;
        for _ in 0..10_000 {
            while pace.wait().is_zero() {
                pace.spend(10_000);
                sent += 10_000;
            }
            clock.advance(Duration::from_millis(1));
        }
        // Ten seconds' worth, and one burst.
        assert!((10_000_000..=10_300_000).contains(&sent), "{sent}");
    }

    #[test]
    fn what_readers_take_moves_pay_for() {
        let (pace, clock) = paced(1_000_000);
        pace.spend(1_250_000);
        let wait = pace.wait();
        assert!(wait >= Duration::from_millis(999), "{wait:?}");
        clock.advance(wait + Duration::from_millis(1));
        assert!(pace.wait().is_zero());
    }

    #[test]
    fn no_rate_is_no_limit() {
        let (pace, _) = paced(0);
        pace.spend(u64::MAX);
        assert!(pace.wait().is_zero());
    }

    #[tokio::test]
    async fn whoever_waits_goes_when_time_has_come() {
        let (pace, clock) = paced(1_000_000);
        pace.spend(1_250_000);
        let taking = pace.take(1);
        tokio::pin!(taking);
        assert!(futures_util::poll!(&mut taking).is_pending());
        clock.advance(Duration::from_secs(2));
        assert!(futures_util::poll!(&mut taking).is_ready());
    }
}
