//! One HTTP/2 connection of a general client: served by hyper, deadlines from outside, owners counted.
//!
//! ```text
//! hello ──► lane?  yes ──► lane.rs
//!             │ no
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
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Shared,
    body::RpcBody,
    deadline::GRACE,
    dispatch::{admit, generated, new_connection, refused},
    get,
    hello::{self, Rewound},
    lane::{self, LaneSocket},
    owners::Connection,
    put,
};
use crate::{
    clock::{Clock, Tick},
    telemetry::metrics::Method,
};

/// Largest header block of a request: paths and metadata are short.
pub(crate) const MAX_HEADER_BYTES: u32 = 16 << 10;

/// Bytes of answers queued in the connection per stream before its body is asked for more: one piece
/// being written and one waiting, so that the socket never runs dry between two pieces.
const SEND_BUFFER_BYTES: usize = 2 << 20;

/// Serves one connection until it ends, or drains, or is cut.
pub(crate) async fn serve<I>(mut io: I, shared: &Arc<Shared>)
where
    I: AsyncRead + AsyncWrite + LaneSocket + Unpin + Send + 'static,
{
    let greeting = tokio::select! {
        greeting = hello::read(&mut io, &*shared.clock) => greeting,
        () = shared.draining.cancelled() => return,
    };
    let over = match greeting {
        Ok(greeting) if greeting.is_lane => lane::serve(io, greeting.rest(), shared).await,
        Ok(greeting) => serve_general(Rewound::new(greeting.bytes, io), shared).await,
        Err(error) => Err(error.into()),
    };
    if let Err(error) = over {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

async fn serve_general<I>(
    io: I,
    shared: &Arc<Shared>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = new_connection(shared);
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
    over.map_err(Into::into)
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
        let path = request.uri().path();
        let (caller, call) = match admit(&self.shared, &self.connection, path, request.headers()) {
            Ok(admitted) => admitted,
            Err(status) => {
                *self.cut.lock() = Some(GRACE);
                return Box::pin(std::future::ready(Ok(refused(&status))));
            }
        };
        *self.cut.lock() = Some(call.time().saturating_add(GRACE));
        match call.method() {
            Method::Get => Box::pin(async move { Ok(get::serve(caller, call, request).await) }),
            Method::Put => Box::pin(async move { Ok(put::serve(caller, call, request).await) }),
            _ => Box::pin(async move { Ok(generated(caller, call, request).await) }),
        }
    }
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
