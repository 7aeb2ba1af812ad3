//! One node's calls to another's Cluster service, outside of the data path.
//!
//! Each call opens a connection, asks one thing and closes it: they are rare, and what they ask about is whether
//! somebody answers at all. Errors: the status that was answered, or that nobody answered.

use std::time::Duration;

use kvproto::v1::{self, cluster_client::ClusterClient};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

/// How long an answer may take. A node that is alive and busy answers in a few milliseconds.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(1);

/// Calls other nodes, with this node's credential.
#[derive(Clone)]
pub struct Caller {
    authorization: Option<MetadataValue<Ascii>>,
}

impl Caller {
    /// With the token of nodes, if they have one.
    #[must_use]
    pub fn new(token: Option<&str>) -> Self {
        let header = |token| MetadataValue::try_from(format!("Bearer {token}"));
        Self {
            // A token that no header can carry is refused by whoever asks for one.
            authorization: token.and_then(|token| header(token).ok()),
        }
    }

    /// Asks to join whoever listens at `address`.
    pub(super) async fn join(
        &self,
        address: &str,
        asked: v1::JoinRequest,
    ) -> Result<v1::JoinResponse, Status> {
        let request = self.request(asked);
        Ok(connect(address).await?.join(request).await?.into_inner())
    }

    /// Who is here, says whoever listens at `address`.
    pub(super) async fn view(&self, address: &str) -> Result<v1::ViewResponse, Status> {
        let request = self.request(v1::ViewRequest::default());
        Ok(connect(address).await?.view(request).await?.into_inner())
    }

    /// What whoever listens at `address` was told to forget, unless it is what has this digest; `None`: it is of an earlier
    /// version, and remembers nothing.
    pub(crate) async fn invalidations(
        &self,
        address: &str,
        known: u64,
    ) -> Result<Option<v1::InvalidationsResponse>, String> {
        let request = self.request(v1::InvalidationsRequest {
            known,
            ..v1::InvalidationsRequest::default()
        });
        let asked = async { connect(address).await?.invalidations(request).await };
        match asked.await {
            Ok(told) => Ok(Some(told.into_inner())),
            Err(status) if status.code() == Code::Unimplemented => Ok(None),
            Err(status) => Err(status.message().to_owned()),
        }
    }

    fn request<T>(&self, asked: T) -> Request<T> {
        let mut request = Request::new(asked);
        request.set_timeout(ANSWER_TIME);
        if let Some(authorization) = &self.authorization {
            let headers = request.metadata_mut();
            headers.insert("authorization", authorization.clone());
        }
        request
    }
}

async fn connect(address: &str) -> Result<ClusterClient<Channel>, Status> {
    let refuse = |error: tonic::transport::Error| Status::unavailable(root(&error));
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(refuse)?;
    let endpoint = endpoint.connect_timeout(ANSWER_TIME).timeout(ANSWER_TIME);
    Ok(ClusterClient::new(
        endpoint.connect().await.map_err(refuse)?,
    ))
}

/// The innermost cause: "connection refused" says more than "transport error".
fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}
