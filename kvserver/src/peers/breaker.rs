//! When a peer that does not answer is left alone.
//!
//! ```text
//! closed ── FAILURES in a row ──► open ── its time is over: one call passes ──► closed, or open twice as long
//! ```
//!
//! A pure rule over given [`Tick`]s. The client's breaker (`kvclient::retry`) is larger, because it also repeats; who
//! asks a peer asks once.
//! Units: durations. Errors: none; a call that may not pass is told so.

use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Tick;

/// Calls in a row without an answer after which a peer is left alone.
const FAILURES: u32 = 3;

/// For how long, at first …
const OPEN: Duration = Duration::from_millis(250);

/// … and at most, after doubling.
const OPEN_MOST: Duration = Duration::from_secs(4);

/// One peer's breaker.
#[derive(Debug, Default)]
pub struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// Times in a row that it opened.
    rounds: u32,
    /// Open until then; the call that comes after finds out.
    until: Option<Tick>,
}

impl Breaker {
    /// Whether a call may go out now. When the time is over one may, and its failure opens again at once.
    #[must_use]
    pub fn admits(&self, now: Tick) -> bool {
        let mut state = self.0.lock();
        match state.until {
            Some(until) if now < until => false,
            Some(_) => {
                // The next ones wait for this one's fate, for as long as it may take to be known.
                state.until = Some(now.after(OPEN));
                true
            }
            None => true,
        }
    }

    /// An answer came, whatever it said.
    pub fn success(&self) {
        *self.0.lock() = State::default();
    }

    /// A call got no answer.
    pub fn failure(&self, now: Tick) {
        let mut state = self.0.lock();
        state.failures = state.failures.saturating_add(1);
        if state.failures < FAILURES && state.until.is_none() {
            return;
        }
        let open = OPEN
            .saturating_mul(1_u32.checked_shl(state.rounds).unwrap_or(u32::MAX))
            .min(OPEN_MOST);
        state.rounds = state.rounds.saturating_add(1);
        state.until = Some(now.after(open));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Tick {
        Tick(Duration::from_millis(ms))
    }

    #[test]
    fn a_peer_that_does_not_answer_is_left_alone_and_tried_again() {
        let breaker = Breaker::default();
        for _ in 0..FAILURES {
            assert!(breaker.admits(at(0)));
            breaker.failure(at(0));
        }
        assert!(!breaker.admits(at(249)));
        assert!(breaker.admits(at(250)));
        assert!(!breaker.admits(at(251)), "one finds out, the rest wait");
        breaker.failure(at(260));
        assert!(!breaker.admits(at(759)), "twice as long");
        assert!(breaker.admits(at(760)));
        breaker.success();
        assert!(breaker.admits(at(761)) && breaker.admits(at(761)));
    }

    #[test]
    fn one_answer_makes_up_for_the_failures_before_it() {
        let breaker = Breaker::default();
        for _ in 0..10 {
            breaker.failure(at(0));
            breaker.success();
            assert!(breaker.admits(at(0)));
        }
    }
}
