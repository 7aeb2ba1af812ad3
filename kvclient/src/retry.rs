//! When to ask again, when to stop asking: backoff, a budget for repeats, and a breaker per endpoint.
//!
//! ```text
//!              N failures in a row                 open_for has passed, or the endpoint was
//!   Closed ─────────────────────────► Open ──────► seen alive (pong, new connection)
//!     ▲                                ▲              │
//!     │ the probe succeeds             │ it fails     ▼
//!     └────────────────────────────────┴────────── HalfOpen: one call passes, the rest are refused
//! ```
//!
//! Shape: pure rules over a given [`Tick`] and given random bits; nobody here waits or reads a clock.
//! Units: durations; budget in tokens, one per repeat.
//! Errors: a refusal says how long the breaker stays open.
//! Why every call may be repeated: blocks are named by their content, lookups carry an idempotency key,
//! and renew, release and invalidate say the same thing twice without harm.
//! Why a budget on top of backoff: when a whole fleet's calls fail at once, repeats must stay a fraction
//! of the load and never a multiple of it (the token rule is gRPC's retry throttling, gRFC A6).

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::Mutex;

use crate::clock::Tick;

/// How often and how patiently one call is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries in all, the first included. Default 4, at least 1.
    pub attempts: u32,
    /// Longest wait before the first repeat; doubles per repeat. Default 10 ms.
    pub base: Duration,
    /// Bound of that doubling. Default 500 ms.
    pub cap: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 4,
            base: Duration::from_millis(10),
            cap: Duration::from_millis(500),
        }
    }
}

impl RetryPolicy {
    /// The wait before repeat number `repeat` (0 is the first): uniform in `0..=min(cap, base * 2^repeat)`.
    ///
    /// Full jitter (AWS, "Exponential backoff and jitter", 2015): callers that failed together do not
    /// come back together.
    #[must_use]
    pub fn backoff(&self, repeat: u32, random: u64) -> Duration {
        let bound = self
            .base
            .saturating_mul(1_u32.checked_shl(repeat).unwrap_or(u32::MAX))
            .min(self.cap);
        let nanos = u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX - 1);
        Duration::from_nanos(random % (nanos + 1))
    }
}

/// Tokens that repeats cost and successes earn.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    /// In hundredths, so that a success can earn a fraction.
    tokens: Mutex<u32>,
}

/// Repeats an idle client may make in one go.
const BUDGET_TOKENS: u32 = 20;
/// What a success earns: one repeat per ten successes in the long run.
const EARNED_PER_SUCCESS: u32 = 10;
const TOKEN: u32 = 100;

impl RetryBudget {
    pub(crate) fn new() -> Self {
        Self {
            tokens: Mutex::new(BUDGET_TOKENS * TOKEN),
        }
    }

    pub(crate) fn earn(&self) {
        let mut tokens = self.tokens.lock();
        *tokens = (*tokens + EARNED_PER_SUCCESS).min(BUDGET_TOKENS * TOKEN);
    }

    /// Takes the token of one repeat; `false` when there is none.
    pub(crate) fn spend(&self) -> bool {
        let mut tokens = self.tokens.lock();
        let enough = *tokens >= TOKEN;
        if enough {
            *tokens -= TOKEN;
        }
        enough
    }
}

/// When an endpoint is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// Failures in a row that open it. Default 5, at least 1.
    pub failures: u32,
    /// How long it stays open; doubles each time a probe fails. Default 250 ms.
    pub open_for: Duration,
    /// Bound of that doubling. Default 2 s.
    pub open_cap: Duration,
}

impl Default for BreakerPolicy {
    fn default() -> Self {
        Self {
            failures: 5,
            open_for: Duration::from_millis(250),
            open_cap: Duration::from_secs(2),
        }
    }
}

/// What the breaker lets a caller do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// The endpoint is in good standing.
    Pass,
    /// The one call that finds out; it must end in `success`, `failure` or `abandon`.
    Probe,
    /// Not now.
    Refused { retry_after: Duration },
}

/// State of one endpoint, as `kvctl` and callers may read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls pass.
    Closed,
    /// Calls are refused.
    Open,
    /// One call is finding out.
    HalfOpen,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Closed { failures: u32 },
    Open { until: Tick, rounds: u32 },
    HalfOpen { probing: bool, rounds: u32 },
}

/// No time opens what is held open until then.
const NEVER: Tick = Tick(Duration::MAX);

/// One endpoint's breaker.
#[derive(Debug)]
pub(crate) struct Breaker {
    policy: BreakerPolicy,
    state: Mutex<State>,
    /// Nobody answered last time, and nothing has been heard since.
    is_hurt: AtomicBool,
}

impl Breaker {
    pub(crate) fn new(policy: BreakerPolicy) -> Self {
        Self {
            policy,
            state: Mutex::new(State::Closed { failures: 0 }),
            is_hurt: AtomicBool::new(false),
        }
    }

    /// Whether a call may go out at `now`.
    pub(crate) fn admit(&self, now: Tick) -> Admission {
        let mut state = self.state.lock();
        match *state {
            State::Closed { .. } => Admission::Pass,
            State::Open { until, .. } if now < until => Admission::Refused {
                retry_after: until.since(now).min(self.policy.open_cap),
            },
            State::HalfOpen { probing: true, .. } => Admission::Refused {
                retry_after: self.policy.open_for,
            },
            State::Open { rounds, .. } | State::HalfOpen { rounds, .. } => {
                *state = State::HalfOpen {
                    probing: true,
                    rounds,
                };
                Admission::Probe
            }
        }
    }

    /// An answer came, whatever it said.
    pub(crate) fn success(&self) {
        *self.state.lock() = State::Closed { failures: 0 };
        self.is_hurt.store(false, Ordering::Relaxed);
    }

    /// A call got no answer. True when this opened the breaker.
    pub(crate) fn failure(&self, now: Tick) -> bool {
        self.is_hurt.store(true, Ordering::Relaxed);
        let mut state = self.state.lock();
        let rounds = match *state {
            State::Closed { failures } if failures + 1 < self.policy.failures => {
                *state = State::Closed {
                    failures: failures + 1,
                };
                return false;
            }
            State::Closed { .. } => 0,
            State::HalfOpen { rounds, .. } => rounds + 1,
            // A call that was let in before it opened: no news.
            State::Open { .. } => return false,
        };
        let open = self
            .policy
            .open_for
            .saturating_mul(1_u32.checked_shl(rounds).unwrap_or(u32::MAX))
            .min(self.policy.open_cap);
        *state = State::Open {
            until: now.after(open),
            rounds,
        };
        true
    }

    /// The probing call was dropped by its caller: the next call probes.
    pub(crate) fn abandon(&self) {
        let mut state = self.state.lock();
        if let State::HalfOpen { rounds, .. } = *state {
            *state = State::HalfOpen {
                probing: false,
                rounds,
            };
        }
    }

    /// The endpoint gave a sign of life outside any call: the next call may probe at once.
    pub(crate) fn alive(&self) {
        self.is_hurt.store(false, Ordering::Relaxed);
        let mut state = self.state.lock();
        if let State::Open { rounds, .. } = *state {
            *state = State::HalfOpen {
                probing: false,
                rounds,
            };
        }
    }

    /// The endpoint does not answer at all: no call needs to find that out; open until [`Self::alive`].
    pub(crate) fn hold_open(&self) {
        self.is_hurt.store(true, Ordering::Relaxed);
        *self.state.lock() = State::Open {
            until: NEVER,
            rounds: 0,
        };
    }

    /// Somebody else was quicker with the same answer: others are asked first until this one's comes too, or does not.
    pub(crate) fn late(&self) {
        self.is_hurt.store(true, Ordering::Relaxed);
    }

    /// Whether the endpoint was found not to answer at all, and has not since.
    pub(crate) fn is_silent(&self) -> bool {
        matches!(*self.state.lock(), State::Open { until, .. } if until == NEVER)
    }

    /// Whether somebody else, who has the same, is to be asked first: nobody answered last time, and there was no sign of
    /// life since. Earlier than open: that takes failures in a row, and one is enough to prefer another.
    pub(crate) fn is_hurt(&self) -> bool {
        self.is_hurt.load(Ordering::Relaxed)
    }

    pub(crate) fn state(&self) -> BreakerState {
        match *self.state.lock() {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock, ManualClock};

    fn opened(clock: &ManualClock) -> Breaker {
        let breaker = Breaker::new(BreakerPolicy::default());
        for _ in 0..4 {
            assert!(!breaker.failure(clock.now()));
        }
        assert!(breaker.failure(clock.now()), "the fifth in a row opens it");
        breaker
    }

    #[test]
    fn a_success_between_failures_keeps_it_closed() {
        let clock = ManualClock::new(0);
        let breaker = Breaker::new(BreakerPolicy::default());
        for _ in 0..3 {
            for _ in 0..4 {
                breaker.failure(clock.now());
            }
            breaker.success();
        }
        assert_eq!(breaker.admit(clock.now()), Admission::Pass);
    }

    #[test]
    fn open_refuses_and_says_for_how_long() {
        let clock = ManualClock::new(0);
        let breaker = opened(&clock);
        clock.advance(Duration::from_millis(100));
        assert_eq!(
            breaker.admit(clock.now()),
            Admission::Refused {
                retry_after: Duration::from_millis(150)
            }
        );
    }

    #[test]
    fn one_call_probes_and_its_success_closes() {
        let clock = ManualClock::new(0);
        let breaker = opened(&clock);
        clock.advance(Duration::from_millis(250));
        assert_eq!(breaker.admit(clock.now()), Admission::Probe);
        assert!(matches!(
            breaker.admit(clock.now()),
            Admission::Refused { .. }
        ));
        breaker.success();
        assert_eq!(breaker.admit(clock.now()), Admission::Pass);
    }

    #[test]
    fn a_failed_probe_opens_for_twice_as_long_up_to_the_cap() {
        let clock = ManualClock::new(0);
        let breaker = opened(&clock);
        let mut open = Duration::from_millis(250);
        for _ in 0..6 {
            clock.advance(open);
            assert_eq!(breaker.admit(clock.now()), Admission::Probe);
            assert!(breaker.failure(clock.now()));
            open = (open * 2).min(Duration::from_secs(2));
            assert_eq!(
                breaker.admit(clock.now()),
                Admission::Refused { retry_after: open }
            );
        }
    }

    #[test]
    fn an_abandoned_probe_leaves_the_next_call_to_find_out() {
        let clock = ManualClock::new(0);
        let breaker = opened(&clock);
        clock.advance(Duration::from_secs(1));
        assert_eq!(breaker.admit(clock.now()), Admission::Probe);
        breaker.abandon();
        assert_eq!(breaker.admit(clock.now()), Admission::Probe);
    }

    #[test]
    fn a_sign_of_life_lets_a_probe_through_early() {
        let clock = ManualClock::new(0);
        let breaker = opened(&clock);
        breaker.alive();
        assert_eq!(breaker.admit(clock.now()), Admission::Probe);
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
    }

    #[test]
    fn held_open_no_time_closes_it_but_a_sign_of_life_does() {
        let clock = ManualClock::new(0);
        let breaker = Breaker::new(BreakerPolicy::default());
        assert!(!breaker.is_silent() && !opened(&clock).is_silent());
        breaker.hold_open();
        assert!(breaker.is_silent());
        clock.advance(Duration::from_secs(3600));
        assert!(matches!(
            breaker.admit(clock.now()),
            Admission::Refused { .. }
        ));
        breaker.alive();
        assert!(!breaker.is_silent());
        assert_eq!(breaker.admit(clock.now()), Admission::Probe);
    }

    #[test]
    fn one_failure_hurts_until_any_sign_of_life() {
        let clock = ManualClock::new(0);
        let breaker = Breaker::new(BreakerPolicy::default());
        let signs: [fn(&Breaker); 2] = [Breaker::alive, Breaker::success];
        for sign in signs {
            breaker.failure(clock.now());
            assert!(breaker.is_hurt());
            assert_eq!(breaker.state(), BreakerState::Closed);
            sign(&breaker);
            assert!(!breaker.is_hurt());
        }
        breaker.hold_open();
        assert!(breaker.is_hurt());
    }

    #[test]
    fn backoff_stays_below_its_bound_and_uses_all_of_it() {
        let policy = RetryPolicy::default();
        let clock = ManualClock::new(42);
        for repeat in 0..40 {
            let bound = (policy.base * 2_u32.saturating_pow(repeat)).min(policy.cap);
            let waits: Vec<_> = (0..200)
                .map(|_| policy.backoff(repeat, clock.random_u64()))
                .collect();
            assert!(waits.iter().all(|w| *w <= bound));
            assert!(
                waits.iter().any(|w| *w < bound / 4) && waits.iter().any(|w| *w > bound * 3 / 4)
            );
        }
    }

    #[test]
    fn repeats_stay_a_tenth_of_the_successes_once_the_purse_is_empty() {
        let budget = RetryBudget::new();
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 20);
        (0..50).for_each(|_| budget.earn());
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 5);
    }
}
