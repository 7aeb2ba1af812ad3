//! The only place that makes a gRPC status.
//!
//! ```text
//! Reason ──► code, and the trailer `terrace-reason: <reason>`
//! ```
//!
//! Messages start with the field at fault where there is one. The code says what to do next
//! ([`ErrorKind`]), the trailer says why, from the closed set that the metrics use too.

use kvproto::{FieldError, Reason, frame::FrameError};
use tonic::{Code, Status, metadata::MetadataValue};

use crate::{blocks::BlocksError, error::ErrorKind};

/// Name of the trailer that holds the [`Reason`].
pub(crate) const REASON_TRAILER: &str = "terrace-reason";

/// A failed request.
pub(crate) fn refuse(reason: Reason, message: impl Into<String>) -> Status {
    let mut status = Status::new(code(reason), message);
    status
        .metadata_mut()
        .insert(REASON_TRAILER, MetadataValue::from_static(reason.as_str()));
    status
}

/// A field that is wrong.
pub(crate) fn field(error: &FieldError) -> Status {
    refuse(Reason::InvalidField, error.to_string())
}

/// What a call of the node's own answers.
pub(crate) fn blocks(error: &BlocksError) -> Status {
    refuse(error.reason(), error.to_string())
}

/// Bytes that are no stream of messages.
pub(crate) fn frame(error: &FrameError) -> Status {
    let reason = match error {
        FrameError::MessageTooLong { .. }
        | FrameError::HeadTooLong { .. }
        | FrameError::DataTooLong { .. } => Reason::TooLarge,
        FrameError::Compressed { .. } => return Status::unimplemented(error.to_string()),
        _ => Reason::InvalidField,
    };
    refuse(reason, error.to_string())
}

/// A message that protobuf cannot decode.
pub(crate) fn undecodable(message: &str, error: &prost::DecodeError) -> Status {
    refuse(Reason::InvalidField, format!("{message}: {error}"))
}

/// A request of more bytes than a small message may have.
pub(crate) fn message_too_long(limit_bytes: usize) -> Status {
    let problem = format!("the request is over {limit_bytes} bytes (max_message_bytes)");
    refuse(Reason::TooLarge, problem)
}

/// The deadline passed.
pub(crate) fn too_late() -> Status {
    refuse(
        Reason::Deadline,
        "the deadline passed before the answer was whole",
    )
}

/// A path that is no method.
pub(crate) fn unknown_method(path: &str) -> Status {
    Status::unimplemented(format!("no method {path:?}; see terrace.v1.Blocks"))
}

/// The connection broke while the request came in.
pub(crate) fn broken(error: impl std::fmt::Display) -> Status {
    Status::cancelled(format!("the request ended early: {error}"))
}

/// The lower-case name of a code, as the metrics label it.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

fn code(reason: Reason) -> Code {
    match reason {
        Reason::InvalidField => Code::InvalidArgument,
        Reason::UnknownNamespace => Code::NotFound,
        Reason::NamespaceDiffers => Code::FailedPrecondition,
        Reason::Unauthenticated => Code::Unauthenticated,
        Reason::Deadline => Code::DeadlineExceeded,
        Reason::Draining | Reason::TierDown | Reason::Device | Reason::Node => Code::Unavailable,
        Reason::Corrupt => Code::DataLoss,
        Reason::TooLarge
        | Reason::NoSlot
        | Reason::Budget
        | Reason::QueueFull
        | Reason::Admission
        | Reason::Wear
        | Reason::TierFull
        | Reason::Overloaded => Code::ResourceExhausted,
        Reason::Expired | Reason::Invalidated | Reason::Evicted => Code::NotFound,
    }
}

/// What the caller does about a reason. `code` and this must tell one story.
pub(crate) fn kind(reason: Reason) -> ErrorKind {
    match reason {
        Reason::InvalidField
        | Reason::NamespaceDiffers
        | Reason::UnknownNamespace
        | Reason::TooLarge => ErrorKind::FixRequest,
        Reason::Unauthenticated => ErrorKind::Unauthenticated,
        Reason::Deadline => ErrorKind::Deadline,
        Reason::Draining => ErrorKind::RefreshView,
        Reason::Corrupt => ErrorKind::GiveUp,
        _ => ErrorKind::Retry,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_its_reason_as_a_trailer() {
        for &reason in Reason::ALL {
            let status = refuse(reason, "field: why");
            assert_eq!(
                status.metadata().get(REASON_TRAILER).unwrap(),
                reason.as_str()
            );
            assert_ne!(status.code(), Code::Ok);
        }
    }

    #[test]
    fn what_can_be_retried_has_a_code_that_says_so() {
        for &reason in Reason::ALL {
            let retry = matches!(code(reason), Code::Unavailable | Code::ResourceExhausted);
            if retry && reason != Reason::TooLarge {
                assert!(kind(reason).is_retryable(), "{reason}");
            }
            if kind(reason) == ErrorKind::FixRequest {
                assert!(!matches!(code(reason), Code::Unavailable), "{reason}");
            }
        }
    }
}
