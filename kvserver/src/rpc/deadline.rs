//! When a call must be over.
//!
//! ```text
//! grpc-timeout absent ──► call_deadline           present ──► at most call_max_deadline
//!
//! 0 ───────────── deadline ────────── + GRACE
//!   handler works │ handler answers    │ the stream is cut, whoever waits for whom
//!                 │ DEADLINE_EXCEEDED  │
//! ```
//!
//! The handler itself answers at the deadline, with a precise status. A peer that reads or writes
//! nothing at all keeps a handler from being asked; its stream is cut a moment later from outside, so
//! that no block stays held by a reader who sleeps.
//!
//! Units: the header's own (H, M, S, m, u, n). Errors: a header that breaks the grammar is refused, as
//! a guess could only be longer than what the caller meant.

use std::time::Duration;

use http::HeaderMap;
use kvproto::FieldError;

/// Between the handler's own answer and the cut.
pub(crate) const GRACE: Duration = Duration::from_secs(1);

/// Bounds of a call's time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeadlineLimits {
    /// For callers that name none.
    pub(crate) default: Duration,
    /// For callers that name more.
    pub(crate) most: Duration,
}

impl DeadlineLimits {
    /// How long this call may take.
    pub(crate) fn of(&self, headers: &HeaderMap) -> Result<Duration, FieldError> {
        let Some(value) = headers.get("grpc-timeout") else {
            return Ok(self.default);
        };
        let asked = value
            .to_str()
            .ok()
            .and_then(parse)
            .ok_or_else(|| FieldError {
                field: "grpc-timeout",
                problem: format!(
                    "{value:?} is not one to eight digits and a unit of H, M, S, m, u, n"
                ),
            })?;
        Ok(asked.min(self.most))
    }
}

/// The grammar of the gRPC specification: 1 to 8 digits, then one unit.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: DeadlineLimits = DeadlineLimits {
        default: Duration::from_secs(30),
        most: Duration::from_secs(600),
    };

    fn of(value: Option<&str>) -> Result<Duration, FieldError> {
        let mut headers = HeaderMap::new();
        if let Some(value) = value {
            headers.insert("grpc-timeout", value.parse().unwrap());
        }
        LIMITS.of(&headers)
    }

    #[test]
    fn a_bare_client_gets_the_default() {
        assert_eq!(of(None), Ok(Duration::from_secs(30)));
    }

    #[test]
    fn a_caller_may_ask_for_less_but_not_for_more_than_the_most() {
        assert_eq!(of(Some("250m")), Ok(Duration::from_millis(250)));
        assert_eq!(of(Some("99999999H")), Ok(Duration::from_secs(600)));
    }

    #[test]
    fn a_timeout_outside_the_grammar_is_refused() {
        for wrong in ["", "m", "1", "1s", "-1S", "123456789S", "1.5S", "1 S", "S1"] {
            assert!(of(Some(wrong)).is_err(), "{wrong:?}");
        }
    }
}
