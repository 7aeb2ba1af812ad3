//! What went wrong with a call, and what its caller does next.
//!
//! ```text
//! Error (facts) ──kind()──► Unavailable  go on as if it were a miss; the client recovers by itself
//!                       ──► Refresh      open the namespace again, look up again
//!                       ──► FixRequest   the call cannot succeed as it stands
//!                       ──► GiveUp       a defect, or a peer that speaks otherwise: tell a person
//! ```
//!
//! A miss, an expired lease, a rejected put are answers, not errors: they are in the call's result.

use std::{io, sync::Arc};

use kvproto::{FieldError, Reason};
use tonic::Code;

/// What a caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Nobody answered, or not in time. Go on as if it were a miss; a later call may succeed.
    Unavailable,
    /// What the caller knows of the node is out of date: open the namespace again.
    Refresh,
    /// The request itself is at fault; repeating it changes nothing.
    FixRequest,
    /// A defect on one side. Log it; do not repeat.
    GiveUp,
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The endpoint's text cannot be used.
    #[error("endpoint {endpoint:?}: {problem}; use host:port, http://host:port or unix:/path")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// No connection could be made.
    #[error("no connection to {endpoint}")]
    Connect {
        /// Whom.
        endpoint: String,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// The breaker is open: the endpoint has failed too often in a row.
    #[error("{endpoint} is left alone for another {} ms after repeated failures", retry_after.as_millis())]
    BreakerOpen {
        /// Whom.
        endpoint: String,
        /// Until a call may try again.
        retry_after: std::time::Duration,
    },
    /// The call's time was up.
    #[error("{method} had no answer within {deadline_ms} ms")]
    Deadline {
        /// Which call.
        method: &'static str,
        /// Its budget.
        deadline_ms: u64,
    },
    /// The connection broke, or the stream was reset, before the answer was whole.
    #[error("{method} was cut off")]
    Broken {
        /// Which call.
        method: &'static str,
        /// What the transport says.
        source: io::Error,
    },
    /// A connection kept from an earlier call broke before anything of an answer came: most often its peer had
    /// just closed what was idle. Says nothing against the endpoint; the next try takes a new connection.
    #[error("{method} went out on a connection that its peer had given up")]
    Stale {
        /// Which call.
        method: &'static str,
        /// What the transport says.
        source: io::Error,
    },
    /// The stream ended in good order, but too early.
    #[error("{method} ended before its answer was whole")]
    Truncated {
        /// Which call.
        method: &'static str,
    },
    /// The node refused the request.
    #[error("{method} was refused ({code:?}): {message}")]
    Refused {
        /// Which call.
        method: &'static str,
        /// gRPC status.
        code: Code,
        /// The node's reason, where it gave one.
        reason: Option<Reason>,
        /// The node's words.
        message: String,
    },
    /// The answer is not what the contract says.
    #[error("answer to {method} cannot be used: {problem}")]
    Answer {
        /// Which call.
        method: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The request cannot be sent as it stands.
    #[error("{0}")]
    Request(#[from] FieldError),
    /// A member of the cluster answers another id or key than others do: their secrets differ, and no block of one
    /// could be found at another.
    #[error(
        "{endpoint} answers another id or key for namespace {label:?} than the cluster: give all its nodes one secret (secret_file)"
    )]
    NamespaceDiffers {
        /// Whom.
        endpoint: String,
        /// Its label.
        label: String,
    },
    /// The namespace has another id or key than when the handle was made (the node's secret changed).
    #[error("namespace {label:?} has another id or key now; open it again")]
    NamespaceChanged {
        /// Its label.
        label: String,
    },
}

impl Error {
    /// What the caller does next.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Connect { .. }
            | Self::BreakerOpen { .. }
            | Self::Deadline { .. }
            | Self::Broken { .. }
            | Self::Stale { .. }
            | Self::Truncated { .. } => ErrorKind::Unavailable,
            Self::NamespaceChanged { .. } => ErrorKind::Refresh,
            Self::Endpoint { .. } | Self::Request(_) => ErrorKind::FixRequest,
            Self::Answer { .. } | Self::NamespaceDiffers { .. } => ErrorKind::GiveUp,
            Self::Refused { code, reason, .. } => match (reason, code) {
                (Some(Reason::UnknownNamespace), _) => ErrorKind::Refresh,
                (
                    _,
                    Code::Unavailable
                    | Code::ResourceExhausted
                    | Code::DeadlineExceeded
                    | Code::Cancelled
                    | Code::Aborted,
                ) => ErrorKind::Unavailable,
                (_, Code::Internal | Code::Unknown | Code::DataLoss | Code::Unimplemented) => {
                    ErrorKind::GiveUp
                }
                _ => ErrorKind::FixRequest,
            },
        }
    }

    /// True when the caller should go on as if it were a miss.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.kind() == ErrorKind::Unavailable
    }

    /// Whether it speaks against the call, or against the cluster as a whole: another owner's answer does not help.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Self::NamespaceChanged { .. } => true,
            error => !matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Refresh),
        }
    }

    /// Whether the same call may be sent again at once (after backoff, within its deadline).
    pub(crate) fn is_worth_repeating(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::Broken { .. }
            | Self::Stale { .. }
            | Self::Truncated { .. } => true,
            Self::Refused { code, reason, .. } => {
                matches!(code, Code::Unavailable | Code::Aborted)
                    || (*code == Code::ResourceExhausted && *reason == Some(Reason::Overloaded))
            }
            _ => false,
        }
    }

    /// Whether it speaks against the endpoint (and not against the request).
    pub(crate) fn is_endpoint_failure(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::Deadline { .. }
            | Self::Broken { .. }
            | Self::Truncated { .. } => true,
            Self::Refused { code, .. } => *code == Code::Unavailable,
            _ => false,
        }
    }
}
