//! Whether the disk is to be believed in: the breaker of the NVMe tier.
//!
//! ```text
//!              a batch that foyer lost, a journal that cannot be written: at once
//!   in service ─────────────────────────────────────────────────────────► down
//!       ▲       three reads in a row that failed or took too long           │ cool-down, doubling
//!       └───────────────────── probe succeeded ◄────────────────────────────┘
//! ```
//!
//! One failed batch is enough, because every harmless cause of a lost write is excluded before it is
//! handed to foyer, and because foyer's own write position is not to be trusted after an error: coming
//! back means building it anew. Writes that fail leave reads in service; reads that fail stop both.

use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Tick;

const READ_FAILURES: u32 = 3;
const MAX_COOLDOWNS: u32 = 60;

#[derive(Debug)]
pub(super) struct Health {
    base: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    read_failures: u32,
    cooldown: Duration,
    down: Option<Down>,
}

#[derive(Clone, Debug)]
struct Down {
    retry_at: Tick,
    why: String,
    reads_too: bool,
}

impl Health {
    pub(super) fn new(cooldown: Duration) -> Self {
        let state = State {
            read_failures: 0,
            cooldown,
            down: None,
        };
        Self {
            base: cooldown,
            state: Mutex::new(state),
        }
    }

    /// How long until writes may be tried again; `None` when in service.
    pub(super) fn writes_down(&self, now: Tick) -> Option<Duration> {
        self.state
            .lock()
            .down
            .as_ref()
            .map(|down| down.retry_at.since(now))
    }

    pub(super) fn reads_down(&self) -> bool {
        self.state
            .lock()
            .down
            .as_ref()
            .is_some_and(|down| down.reads_too)
    }

    /// Why it is out of service, for people.
    pub(super) fn why(&self) -> Option<String> {
        self.state.lock().down.as_ref().map(|down| down.why.clone())
    }

    pub(super) fn read_worked(&self) {
        self.state.lock().read_failures = 0;
    }

    /// Answers whether this was the failure that takes it out of service.
    pub(super) fn read_failed(&self, now: Tick, why: &str) -> bool {
        let mut state = self.state.lock();
        state.read_failures += 1;
        if state.read_failures < READ_FAILURES {
            return false;
        }
        state.trip(now, why, true)
    }

    /// As [`Health::read_failed`], for a lost write.
    pub(super) fn write_failed(&self, now: Tick, why: &str) -> bool {
        self.state.lock().trip(now, why, false)
    }

    /// The probe failed; answers how long to wait before the next.
    pub(super) fn still_down(&self, now: Tick, why: &str) -> Duration {
        let mut state = self.state.lock();
        state.cooldown = (state.cooldown * 2).min(self.base * MAX_COOLDOWNS);
        let cooldown = state.cooldown;
        if let Some(down) = &mut state.down {
            down.retry_at = now.after(cooldown);
            why.clone_into(&mut down.why);
        }
        cooldown
    }

    /// The probe succeeded.
    pub(super) fn up(&self) {
        let mut state = self.state.lock();
        *state = State {
            read_failures: 0,
            cooldown: self.base,
            down: None,
        };
    }

    pub(super) fn cooldown(&self) -> Duration {
        self.state.lock().cooldown
    }
}

impl State {
    fn trip(&mut self, now: Tick, why: &str, reads_too: bool) -> bool {
        match &mut self.down {
            Some(down) => {
                down.reads_too |= reads_too;
                false
            }
            None => {
                self.down = Some(Down {
                    retry_at: now.after(self.cooldown),
                    why: why.to_owned(),
                    reads_too,
                });
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn one_lost_write_stops_writes_and_not_reads() {
        let health = Health::new(SECOND);
        assert!(health.write_failed(Tick::default(), "lost"));
        assert!(
            !health.write_failed(Tick::default(), "lost again"),
            "it is down already"
        );
        assert_eq!(health.writes_down(Tick::default()), Some(SECOND));
        assert!(!health.reads_down());
    }

    #[test]
    fn three_failed_reads_in_a_row_stop_both() {
        let health = Health::new(SECOND);
        for _ in 0..10 {
            assert!(!health.read_failed(Tick::default(), "slow"));
            assert!(!health.read_failed(Tick::default(), "slow"));
            health.read_worked();
        }
        for failure in 1..=3 {
            assert_eq!(health.read_failed(Tick::default(), "slow"), failure == 3);
        }
        assert!(health.reads_down() && health.writes_down(Tick::default()).is_some());
    }

    #[test]
    fn waiting_doubles_up_to_a_limit_and_starts_over() {
        let health = Health::new(SECOND);
        health.write_failed(Tick::default(), "lost");
        let waits: Vec<u64> = (0..8)
            .map(|_| health.still_down(Tick::default(), "no").as_secs())
            .collect();
        assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60, 60]);
        health.up();
        assert_eq!((health.cooldown(), health.why()), (SECOND, None));
    }
}
