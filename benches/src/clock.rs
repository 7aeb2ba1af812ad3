//! Real time, read in this one file: a benchmark measures the world and cannot inject it.

use std::time::{Duration, Instant};

/// The moment a measurement began.
#[derive(Clone, Copy, Debug)]
pub struct Started(Instant);

impl Started {
    /// Starts now.
    #[allow(clippy::disallowed_methods)] // the one place of this crate that reads the clock
    pub fn now() -> Self {
        Self(Instant::now())
    }

    /// Time since then.
    pub fn elapsed(self) -> Duration {
        self.0.elapsed()
    }

    /// Seconds since then.
    pub fn seconds(self) -> f64 {
        self.elapsed().as_secs_f64()
    }

    /// Nanoseconds since then, saturating after 584 years.
    pub fn nanos(self) -> u64 {
        u64::try_from(self.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Waits between two looks at a process that is starting; nothing measured depends on it.
#[allow(clippy::disallowed_methods)] // polling a foreign process: there is no event to wait for
pub async fn pause(length: Duration) {
    tokio::time::sleep(length).await;
}
