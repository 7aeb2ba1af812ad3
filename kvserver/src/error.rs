//! What a caller does next.
//!
//! Every layer has its own error enum whose variants are facts. [`ErrorKind`] is the one public
//! summary: it says what the caller should do, not what happened. `rpc/status.rs` alone turns it into
//! a gRPC code.

/// What the caller does about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The same request may well succeed later, here: back off, then try again.
    Retry,
    /// Another node owns this, or this one is leaving: refresh the view, then try there.
    RefreshView,
    /// The request itself is wrong and will fail again unchanged.
    FixRequest,
    /// The credential does not allow it.
    Unauthenticated,
    /// Time ran out before an answer was there.
    Deadline,
    /// Nothing the caller can do: a fault of this node.
    GiveUp,
}

impl ErrorKind {
    /// Whether sending the same request again can help.
    #[must_use]
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Retry | Self::RefreshView)
    }
}
