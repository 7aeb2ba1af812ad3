//! What nodes hold and have done, as they count it.
//!
//! Units: as the wire has them, `v1/blocks.proto`.
//! Errors: as any call's.

use std::sync::Arc;

use kvproto::v1;

use crate::{
    call::{self, Deadline, Inner},
    client::Client,
    endpoint::Endpoint,
    error::Error,
    wire::Method,
};

impl Client {
    /// What the node holds and has done, as the wire has it; in a cluster the one that this client was told of, or
    /// another while that one is away.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn stats(&self) -> Result<v1::StatsResponse, Error> {
        self.of_anybody(self.until(), |inner: Arc<Inner>, deadline| async move {
            stats(&inner, deadline).await
        })
        .await
    }

    /// The same of every member, all asked at once: where it is reached, and its answer.
    /// Shape: as many as there are members; one for a node that is alone.
    pub async fn stats_of_all(&self) -> Vec<(Endpoint, Result<v1::StatsResponse, Error>)> {
        let deadline = self.until();
        let answers =
            self.of_each_once(|inner: Arc<Inner>| async move { stats(&inner, deadline).await });
        let answers = answers.await.into_iter();
        answers
            .map(|(inner, answer)| (inner.endpoint.clone(), answer))
            .collect()
    }
}

async fn stats(inner: &Inner, deadline: Deadline) -> Result<v1::StatsResponse, Error> {
    let question = |context| v1::StatsRequest {
        context: Some(context),
    };
    let answer: v1::StatsResponse = call::unary(inner, Method::STATS, deadline, question).await?;
    inner.heard(answer.context.as_ref());
    Ok(answer)
}
