//! One HTTP/2 connection: dispatch by path, deadlines from outside, owners counted.
//!
//! ```text
//! hyper ──call(request)──► admit ──► Get │ Put │ generated │ health ──► response
//!   │                        └ leaves the call's time in `cut`
//!   └─execute(stream)──► Cut { stream, time + GRACE }: dropped when over, which resets the stream
//! ```
//!
//! hyper calls the service and spawns the stream's future in one breath, on one thread; that is how the
//! executor knows which time belongs to which stream.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use kvproto::OwnerId;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::{Code, Status};
use tower_service::Service;

use super::{
    Admitted, SERVICE, Shared, body::RpcBody, deadline::GRACE, get, owners::Connection, put, status,
};
use crate::{
    clock::{Clock, Tick},
    engine::TenantId,
    telemetry::metrics::Method,
};

/// Largest header block of a request: paths and metadata are short.
const MAX_HEADER_BYTES: u32 = 16 << 10;

/// Bytes of answers queued in the connection per stream before its body is asked for more: one piece
/// being written and one waiting, so that the socket never runs dry between two pieces.
const SEND_BUFFER_BYTES: usize = 2 << 20;

/// How long a call may take; for methods whose stream goes on after their answer began.
#[derive(Clone, Copy)]
pub(crate) struct StreamTime(pub(crate) Duration);

/// Who calls, over what; travels with every request.
#[derive(Clone)]
pub(crate) struct Caller {
    pub(crate) tenant: TenantId,
    pub(crate) connection: Arc<Connection>,
    pub(crate) shared: Arc<Shared>,
}

/// Serves one connection until it ends, or drains, or is cut.
pub(crate) async fn serve<I>(io: I, shared: &Arc<Shared>)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut id = [0; OwnerId::BYTES];
    id[..8].copy_from_slice(&shared.clock.random_u64().to_le_bytes());
    id[8..].copy_from_slice(&shared.clock.random_u64().to_le_bytes());
    let connection = Arc::new(Connection::new(OwnerId(id)));

    let cut = Arc::new(Mutex::new(None));
    let executor = CutExecutor {
        cut: Arc::clone(&cut),
        clock: Arc::clone(&shared.clock),
    };
    let dispatch = Dispatch {
        shared: Arc::clone(shared),
        connection: Arc::clone(&connection),
        cut,
    };
    let transport = &shared.transport;
    let serving = hyper::server::conn::http2::Builder::new(executor)
        .timer(TokioTimer::new())
        .initial_stream_window_size(transport.stream_window_bytes)
        .initial_connection_window_size(transport.connection_window_bytes)
        .max_frame_size(transport.max_frame_bytes)
        .max_concurrent_streams(transport.max_streams)
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .keep_alive_interval(transport.keepalive_interval)
        .keep_alive_timeout(transport.keepalive_timeout)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(io), dispatch);
    tokio::pin!(serving);
    let over = tokio::select! {
        over = serving.as_mut() => over,
        () = shared.draining.cancelled() => {
            serving.as_mut().graceful_shutdown();
            tokio::select! {
                over = serving.as_mut() => over,
                () = shared.abort.cancelled() => Ok(()),
            }
        }
    };
    connection.close(&shared.owners);
    if let Err(error) = over {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

struct Dispatch {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    cut: Arc<Mutex<Option<Duration>>>,
}

impl hyper::service::Service<Request<Incoming>> for Dispatch {
    type Response = Response<RpcBody>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<RpcBody>, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let method = method(request.uri().path());
        let started = self.shared.clock.now();
        let admitted = match self.shared.admit(method, request.headers()) {
            Ok(admitted) => admitted,
            Err(status) => {
                self.shared
                    .metrics
                    .call(method, status::code_name(status.code()), 0.0);
                *self.cut.lock() = Some(GRACE);
                return Box::pin(std::future::ready(Ok(refused(&status))));
            }
        };
        *self.cut.lock() = Some(admitted.time.saturating_add(GRACE));
        let caller = Caller {
            tenant: admitted.tenant,
            connection: Arc::clone(&self.connection),
            shared: Arc::clone(&self.shared),
        };
        let call = Call {
            admitted,
            method,
            started,
        };
        match method {
            Method::Get => Box::pin(async move { Ok(get::serve(caller, call, request).await) }),
            Method::Put => Box::pin(async move { Ok(put::serve(caller, call, request).await) }),
            _ => Box::pin(async move { Ok(generated(caller, call, request).await) }),
        }
    }
}

/// One call's account: counted once, with its code and its time.
pub(crate) struct Call {
    admitted: Admitted,
    method: Method,
    started: Tick,
}

impl Call {
    /// How much of the call's time is left.
    pub(crate) fn time_left(&self) -> Duration {
        self.admitted
            .time
            .saturating_sub(self.admitted.shared.clock.now().since(self.started))
    }

    /// The call is over.
    pub(crate) fn over(self, code: Code) {
        let shared = &self.admitted.shared;
        let seconds = shared.clock.now().since(self.started).as_secs_f64();
        shared
            .metrics
            .call(self.method, status::code_name(code), seconds);
    }
}

fn method(path: &str) -> Method {
    match path
        .strip_prefix('/')
        .and_then(|p| p.strip_prefix(SERVICE))
        .and_then(|p| p.strip_prefix('/'))
    {
        Some("OpenNamespace") => Method::OpenNamespace,
        Some("Lookup") => Method::Lookup,
        Some("Get") => Method::Get,
        Some("Put") => Method::Put,
        Some("Renew") => Method::Renew,
        Some("Release") => Method::Release,
        Some("Invalidate") => Method::Invalidate,
        Some("Watch") => Method::Watch,
        Some("Stats") => Method::Stats,
        _ => Method::Other,
    }
}

/// The methods that tonic frames.
async fn generated(
    caller: Caller,
    call: Call,
    mut request: Request<Incoming>,
) -> Response<RpcBody> {
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
        let answer = match asks_health {
            true => shared.health.clone().call(request).await,
            false => shared.generated.clone().call(request).await,
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

/// Spawns each stream together with the time that [`Dispatch`] has just left for it.
#[derive(Clone)]
struct CutExecutor {
    cut: Arc<Mutex<Option<Duration>>>,
    clock: Arc<dyn Clock>,
}

impl<F> hyper::rt::Executor<F> for CutExecutor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let time = self.cut.lock().take().unwrap_or(GRACE);
        let due = self.clock.now().after(time);
        // Owned by the thread's runtime, which ends with its connections.
        tokio::spawn(Cut {
            stream,
            due,
            clock: Arc::clone(&self.clock),
            late: None,
        });
    }
}

pin_project_lite::pin_project! {
    /// A stream that is dropped when its time is over.
    struct Cut<F> {
        #[pin]
        stream: F,
        due: Tick,
        clock: Arc<dyn Clock>,
        // Made on the first wait: most streams are over before that.
        late: Option<BoxFuture<'static, ()>>,
    }
}

impl<F: Future<Output = ()>> Future for Cut<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        if this.stream.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let late = this
            .late
            .get_or_insert_with(|| this.clock.sleep(this.due.since(this.clock.now())));
        late.as_mut().poll(cx)
    }
}
