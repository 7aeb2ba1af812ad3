//! From a request's head to a call: admitted, with its deadline and its caller, or refused.
//!
//! ```text
//! path, headers ──admit──► Caller (tenant, connection) + Call (time, account)
//!                     └──► status
//! ```
//!
//! Both ways of serving a connection come through here, so a call means the same on either.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Body;
use kvproto::OwnerId;
use tonic::{Code, Status};
use tower_service::Service;

use super::{
    Admitted, CLUSTER_SERVICE, SERVICE, Shared, body::RpcBody, owners::Connection, status,
};
use crate::{clock::Tick, engine::TenantId, telemetry::metrics::Method};

/// How long a call may take; for methods whose stream goes on after their answer began.
#[derive(Clone, Copy)]
pub(crate) struct StreamTime(pub(crate) Duration);

/// Who calls, over what; travels with every request.
#[derive(Clone)]
pub(crate) struct Caller {
    pub(crate) tenant: TenantId,
    /// Another node does.
    pub(crate) is_peer: bool,
    pub(crate) connection: Arc<Connection>,
    pub(crate) shared: Arc<Shared>,
}

/// A connection by a name that nobody can guess.
pub(crate) fn new_connection(shared: &Shared) -> Arc<Connection> {
    let mut id = [0; OwnerId::BYTES];
    id[..8].copy_from_slice(&shared.clock.random_u64().to_le_bytes());
    id[8..].copy_from_slice(&shared.clock.random_u64().to_le_bytes());
    Arc::new(Connection::new(OwnerId(id)))
}

/// Lets a call in, or counts it as refused.
///
/// # Errors
/// Why it is not let in.
pub(crate) fn admit(
    shared: &Arc<Shared>,
    connection: &Arc<Connection>,
    path: &str,
    headers: &HeaderMap,
) -> Result<(Caller, Call), Status> {
    let method = method(path);
    let started = shared.clock.now();
    match shared.admit(method, headers) {
        Ok(admitted) => {
            let caller = Caller {
                tenant: admitted.tenant,
                is_peer: admitted.is_peer(),
                connection: Arc::clone(connection),
                shared: Arc::clone(shared),
            };
            let call = Call {
                is_over: false,
                admitted,
                method,
                started,
            };
            Ok((caller, call))
        }
        Err(status) => {
            let code = status::code_name(status.code());
            shared.metrics.call(method, code, 0.0);
            Err(status)
        }
    }
}

/// One call's account: counted once, with its code and its time.
pub(crate) struct Call {
    is_over: bool,
    admitted: Admitted,
    method: Method,
    started: Tick,
}

impl Call {
    /// What is called.
    pub(crate) fn method(&self) -> Method {
        self.method
    }

    /// How long it may take in all.
    pub(crate) fn time(&self) -> Duration {
        self.admitted.time
    }

    /// When it is over.
    pub(crate) fn deadline(&self) -> Tick {
        self.started.after(self.admitted.time)
    }

    /// How much of the call's time is left.
    pub(crate) fn time_left(&self) -> Duration {
        self.admitted
            .time
            .saturating_sub(self.admitted.shared.clock.now().since(self.started))
    }

    /// The call is over.
    pub(crate) fn over(mut self, code: Code) {
        self.count(code);
    }

    fn count(&mut self, code: Code) {
        self.is_over = true;
        let shared = &self.admitted.shared;
        let seconds = shared.clock.now().since(self.started).as_secs_f64();
        shared
            .metrics
            .call(self.method, status::code_name(code), seconds);
    }
}

impl Drop for Call {
    /// Nobody has said how it ended: its caller went away, or it was cut.
    fn drop(&mut self) {
        if !self.is_over {
            self.count(Code::Cancelled);
        }
    }
}

fn method(path: &str) -> Method {
    let Some((service, method)) = path.strip_prefix('/').and_then(|p| p.split_once('/')) else {
        return Method::Other;
    };
    if service == CLUSTER_SERVICE {
        return match method {
            "Join" => Method::Join,
            "View" => Method::View,
            "Report" => Method::Report,
            "SetWeight" => Method::SetWeight,
            "Drain" => Method::Drain,
            "Explain" => Method::Explain,
            "Invalidations" => Method::Invalidations,
            _ => Method::Other,
        };
    }
    match Some(method).filter(|_| service == SERVICE) {
        Some("OpenNamespace") => Method::OpenNamespace,
        Some("Lookup") => Method::Lookup,
        Some("Get") => Method::Get,
        Some("Put") => Method::Put,
        Some("Renew") => Method::Renew,
        Some("Release") => Method::Release,
        Some("Invalidate") => Method::Invalidate,
        Some("Watch") => Method::Watch,
        Some("Stats") => Method::Stats,
        Some("ListNamespaces") => Method::ListNamespaces,
        _ => Method::Other,
    }
}

/// The methods that tonic frames.
pub(crate) async fn generated<B>(
    caller: Caller,
    call: Call,
    mut request: Request<B>,
) -> Response<RpcBody>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
{
    let shared = Arc::clone(&caller.shared);
    let asks_health = request.uri().path().starts_with("/grpc.health.v1.Health/");
    if call.method == Method::Other && !asks_health {
        let status = status::unknown_method(request.uri().path());
        call.over(status.code());
        return refused(&status);
    }
    request.extensions_mut().insert(caller);
    request
        .extensions_mut()
        .insert(StreamTime(call.time_left()));
    let answer = async {
        let answer = match (asks_health, call.method.is_of_cluster()) {
            (true, _) => shared.health.clone().call(request).await,
            (false, true) => shared.cluster.clone().call(request).await,
            (false, false) => shared.generated.clone().call(request).await,
        };
        answer.unwrap_or_else(|never| match never {})
    };
    let late = shared.clock.sleep(call.time_left());
    let response = tokio::select! {
        biased;
        response = answer => response,
        () = late => {
            let status = status::too_late();
            call.over(status.code());
            return refused(&status);
        }
    };
    // A failed call has its status in the head; a whole one in trailers that say OK.
    let code = Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
    call.over(code);
    response.map(RpcBody::Tonic)
}

/// A response that is nothing but its status.
pub(crate) fn refused(status: &Status) -> Response<RpcBody> {
    status
        .clone()
        .into_http::<tonic::body::Body>()
        .map(RpcBody::Tonic)
}
