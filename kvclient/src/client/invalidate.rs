//! Forget blocks, everywhere.
//!
//! Units: blocks. Errors: when a node does not answer; asking again is safe.

use std::sync::Arc;

use bytes::Bytes;
use kvproto::{SequenceHash, v1};

use super::Client;
use crate::{
    call::{self, Deadline, Inner},
    error::Error,
    namespace::NamespaceHandle,
    open::{self, Reopening},
    wire::Method,
};

/// What an invalidation forgets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// This block, in all its parts.
    Block(SequenceHash),
    /// This block and every block after it in any chain.
    Prefix(SequenceHash),
    /// The whole namespace.
    All,
}

impl Client {
    /// Forgets blocks, durably; answers how many. In a cluster every member is asked, because any may hold copies.
    ///
    /// # Errors
    /// When a node does not answer; asking again is safe.
    pub async fn invalidate(
        &self,
        namespace: &NamespaceHandle,
        target: Target,
    ) -> Result<u64, Error> {
        let deadline = self.until();
        // One for all: the nodes see that they were told of the same.
        let request = self.fleet.home().unique();
        let answers = self.of_everybody(|inner: Arc<Inner>, is_alone| async move {
            if !is_alone {
                open::ensure(&inner, namespace, deadline).await?;
            }
            invalidate(&inner, namespace, target, request, deadline).await
        });
        let answers = answers.await.into_iter();
        answers.map(|(_, blocks)| blocks).sum()
    }
}

async fn invalidate(
    inner: &Inner,
    namespace: &NamespaceHandle,
    target: Target,
    request: [u8; 16],
    deadline: Deadline,
) -> Result<u64, Error> {
    use v1::invalidate_request::Target as Wire;
    let mut reopening = Reopening::default();
    loop {
        let answer = call::unary(inner, Method::INVALIDATE, deadline, |context| {
            v1::InvalidateRequest {
                context: Some(v1::RequestContext {
                    request_id: Bytes::copy_from_slice(&request),
                    ..context
                }),
                namespace_id: Bytes::copy_from_slice(&namespace.id().0),
                target: Some(match target {
                    Target::Block(hash) => Wire::Hash(Bytes::copy_from_slice(&hash.0)),
                    Target::Prefix(hash) => Wire::PrefixHash(Bytes::copy_from_slice(&hash.0)),
                    Target::All => Wire::All(true),
                }),
            }
        });
        let answer: Result<v1::InvalidateResponse, Error> = answer.await;
        match answer {
            Ok(answer) => {
                inner.heard(answer.context.as_ref());
                return Ok(answer.blocks);
            }
            Err(error) => reopening.after(inner, namespace, error, deadline).await?,
        }
    }
}
