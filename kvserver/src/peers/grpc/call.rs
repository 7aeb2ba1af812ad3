//! One call to a peer: what goes with it, how long it may take, and what its failure means.
//!
//! Whatever the answer is, the peer's breaker hears of it, and members that it brings go to [`Views`].
//! Errors: [`PeerError`]; [`judge`] says which status is which.

use std::{sync::Arc, time::Duration};

use kvproto::{
    Reason,
    convert::AnswerContext,
    v1::{self, blocks_client::BlocksClient},
};
use tokio::sync::OwnedSemaphorePermit;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

use super::PIECE_BYTES;
use crate::{
    clock::{Clock, Tick},
    peers::{Breaker, PEER_HEADER, PeerError, TENANT_HEADER, Views},
};

/// A message that comes in: its piece, and a head with the sums of a 64 MiB block.
const MESSAGE_BYTES: usize = PIECE_BYTES + (512 << 10);

/// One peer.
pub(super) struct Line {
    pub(super) address: String,
    pub(super) quick: Channel,
    pub(super) bulk: Channel,
    pub(super) breaker: Breaker,
}

/// One call under way.
pub(super) struct Call {
    pub(super) line: Arc<Line>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) views: Arc<dyn Views>,
    pub(super) due: Tick,
    pub(super) deadline: Duration,
    pub(super) me: MetadataValue<Ascii>,
    pub(super) tenant: MetadataValue<Ascii>,
    pub(super) authorization: Option<MetadataValue<Ascii>>,
    pub(super) _permit: OwnedSemaphorePermit,
}

impl Call {
    /// A message with everything that goes with it.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.deadline);
        let headers = request.metadata_mut();
        headers.insert(PEER_HEADER, self.me.clone());
        headers.insert(TENANT_HEADER, self.tenant.clone());
        if let Some(token) = &self.authorization {
            headers.insert("authorization", token.clone());
        }
        request
    }

    /// Waits for an answer, but not beyond the deadline, and tells the breaker.
    pub(super) async fn answer<T>(
        &self,
        answer: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, PeerError> {
        let late = self.clock.sleep(self.due.since(self.clock.now()));
        let answered = tokio::select! {
            biased;
            answer = answer => answer.map_err(judge),
            () = late => Err(PeerError::Late),
        };
        match &answered {
            Err(error) if error.hurts() => self.line.breaker.failure(self.clock.now()),
            _ => self.line.breaker.success(),
        }
        answered
    }

    /// Takes note of what an answer says of its node's view.
    pub(super) fn heard(&self, context: Option<v1::ResponseContext>) {
        let Some(context) = context.filter(|context| !context.members.is_empty()) else {
            return;
        };
        match AnswerContext::try_from(context) {
            Ok(context) => self.views.heard(context.members),
            Err(error) => tracing::debug!(%error, "members that make no sense are left aside"),
        }
    }

    /// For what shall not wait behind a block.
    pub(super) fn quick(&self) -> BlocksClient<Channel> {
        BlocksClient::new(self.line.quick.clone())
    }

    /// For blocks.
    pub(super) fn bulk(&self) -> BlocksClient<Channel> {
        BlocksClient::new(self.line.bulk.clone()).max_decoding_message_size(MESSAGE_BYTES)
    }
}

/// What a status means to a peer.
fn judge(status: Status) -> PeerError {
    let reason = status
        .metadata()
        .get(crate::rpc::REASON_TRAILER)
        .and_then(|value| value.to_str().ok())
        .and_then(|name| Reason::ALL.iter().copied().find(|r| r.as_str() == name));
    match (status.code(), reason) {
        (_, Some(Reason::UnknownNamespace)) => PeerError::UnknownNamespace,
        (Code::DeadlineExceeded, _) => PeerError::Late,
        // Said by the transport itself: a node that refuses says why.
        (Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled, None) => {
            PeerError::Dead(status.message().to_owned())
        }
        _ => PeerError::Refused {
            reason,
            message: status.message().to_owned(),
        },
    }
}
