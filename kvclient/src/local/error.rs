//! Why a call did not go over the same-host path.
//!
//! The caller never sees these: the call goes over gRPC, which answers or says why not. They end up in
//! [`crate::PathReport::why_grpc`].

use std::{io, time::Duration};

use kvgpu::SharedError;
use kvproto::{FieldError, Reason, local::LocalFrameError};

/// A link that was silent for less speaks against the caller's deadline, not against the node.
const SILENCE: Duration = Duration::from_millis(100);

/// Why there is no answer over the same-host path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LocalError {
    /// The socket failed, or the node closed it.
    #[error("{step}: {source}")]
    Io {
        step: &'static str,
        source: io::Error,
    },
    /// Another user's process listens at the socket: it gets neither the token nor the blocks.
    #[error("user {uid} listens at this socket, neither this process's user nor root")]
    Stranger { uid: u32 },
    /// The call's share of its time was up.
    #[error("no answer within {waited_ms} ms")]
    Silent { waited_ms: u64 },
    /// The node said no, in good order.
    #[error("refused ({}): {message}", reason.map_or("no reason", Reason::as_str))]
    Refused {
        reason: Option<Reason>,
        message: String,
    },
    /// One more connection cannot be had, while others of the attachment are open.
    #[error("no further connection: {why}")]
    NotJoined { why: String },
    /// The call ended early, and not for the node's silence: its own time was short.
    #[error("no time left for the same-host path")]
    NoTime,
    /// A request too long for a frame: not sent.
    #[error("the request is too long for the same-host path")]
    TooLong,
    /// Bytes that are no frame.
    #[error(transparent)]
    Frame(LocalFrameError),
    /// A frame that is not the answer to what was asked.
    #[error("an answer that cannot be used: {problem}")]
    Answer { problem: String },
    /// Memory that cannot be mapped.
    #[error(transparent)]
    Memory(#[from] SharedError),
    /// The destination is at fault, not the path.
    #[error(transparent)]
    Field(#[from] FieldError),
}

impl LocalError {
    pub(crate) fn answer(problem: impl ToString) -> Self {
        Self::Answer {
            problem: problem.to_string(),
        }
    }

    /// The time is up, and the node has been silent for so long.
    pub(crate) fn ran_out(waited: Duration) -> Self {
        if waited < SILENCE {
            return Self::NoTime;
        }
        Self::Silent {
            waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Whether the attachment is as good as before: the node answered, or was not asked.
    pub(crate) fn is_harmless(&self) -> bool {
        matches!(
            self,
            Self::Refused { .. }
                | Self::NotJoined { .. }
                | Self::NoTime
                | Self::TooLong
                | Self::Field { .. }
        )
    }
}
