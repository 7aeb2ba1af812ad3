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

/// How long a call may take from its connection to the last byte of its answer, which may be some megabytes of invalidations:
/// deadlines on the wire end with an answer's head.
const CALL_TIME: Duration = Duration::from_secs(5);

/// Calls other nodes, with this node's credential.
#[derive(Clone)]
pub struct Caller {
    authorization: Option<MetadataValue<Ascii>>,
    time: Duration,
}

impl Caller {
    /// With the token of nodes, if they have one.
    #[must_use]
    pub fn new(token: Option<&str>) -> Self {
        let header = |token| MetadataValue::try_from(format!("Bearer {token}"));
        Self {
            // A token that no header can carry is refused by whoever asks for one.
            authorization: token.and_then(|token| header(token).ok()),
            time: CALL_TIME,
        }
    }

    /// Asks to join whoever listens at `address`.
    pub(super) async fn join(
        &self,
        address: &str,
        asked: v1::JoinRequest,
    ) -> Result<v1::JoinResponse, Status> {
        let request = self.request(asked);
        let call = async { connect(address).await?.join(request).await };
        Ok(self.whole(call).await?.into_inner())
    }

    /// Who is here, says whoever listens at `address`.
    pub(super) async fn view(&self, address: &str) -> Result<v1::ViewResponse, Status> {
        let request = self.request(v1::ViewRequest::default());
        let call = async { connect(address).await?.view(request).await };
        Ok(self.whole(call).await?.into_inner())
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
        let call = async { connect(address).await?.invalidations(request).await };
        match self.whole(call).await {
            Ok(told) => Ok(Some(told.into_inner())),
            Err(status) if status.code() == Code::Unimplemented => Ok(None),
            Err(status) => Err(status.message().to_owned()),
        }
    }

    async fn whole<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let answer = tokio::time::timeout(self.time, call).await;
        answer.unwrap_or_else(|_| {
            let problem = format!("no whole answer within {:?}", self.time);
            Err(Status::deadline_exceeded(problem))
        })
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

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Answers every call with a head and nothing after it.
    async fn beginner() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    let mut begun = Vec::new();
                    while let Some(Ok((_, mut respond))) = connection.accept().await {
                        let head = http::Response::builder()
                            .header("content-type", "application/grpc")
                            .body(())
                            .unwrap();
                        begun.push(respond.send_response(head, false).unwrap());
                    }
                });
            }
        });
        address
    }

    #[tokio::test]
    async fn an_answer_that_stops_after_its_head_is_waited_for_no_longer_than_a_call_may_take() {
        let address = beginner().await;
        let caller = Caller {
            time: Duration::from_millis(200),
            ..Caller::new(None)
        };
        let refused = caller.invalidations(&address, 0).await.unwrap_err();
        assert!(refused.contains("no whole answer"), "{refused}");
        let refused = caller.view(&address).await.unwrap_err();
        assert_eq!(refused.code(), Code::DeadlineExceeded);
        let refused = caller.join(&address, v1::JoinRequest::default()).await;
        assert_eq!(refused.unwrap_err().code(), Code::DeadlineExceeded);
    }
}
