//! The methods that tonic frames: each is decode, one call, encode.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{FutureExt, Stream, StreamExt, future::BoxFuture};
use kvproto::{
    BootId, OwnerId, Reason, ViewDigest,
    convert::{AnswerContext, request},
    v1::{self, blocks_server::Blocks as BlocksService},
};
use tokio_stream::wrappers::WatchStream as Views;
use tonic::{Request, Response, Status, async_trait};

use super::{
    Shared,
    dispatch::{Caller, StreamTime},
    status, unary,
};
use crate::{blocks::watch::Watcher, cluster::Roster, engine::Owner};

/// The generated trait's implementation; everything it needs comes with the request.
pub(crate) struct BlocksRpc;

impl Caller {
    /// The owner that a call acts for.
    pub(crate) fn owner(&self, named: Option<OwnerId>) -> Result<Owner, Status> {
        self.connection
            .owner(&self.shared.owners, self.tenant, named)
    }

    /// What the answer to a request with this context says of this node and its view.
    pub(crate) fn answer(&self, asked: &request::Context) -> AnswerContext {
        let blocks = &self.shared.blocks;
        blocks.answer_context(asked.view_digest, self.connection.told())
    }
}

/// Who calls; put there by the connection before tonic sees the request.
fn caller<T>(request: &Request<T>) -> Caller {
    request
        .extensions()
        .get::<Caller>()
        .cloned()
        .expect("the connection names its caller")
}

/// Decodes a request into the domain.
fn decode<W, D>(wire: W) -> Result<D, Status>
where
    D: TryFrom<W, Error = kvproto::FieldError>,
{
    D::try_from(wire).map_err(|e| status::field(&e))
}

#[async_trait]
impl BlocksService for BlocksRpc {
    async fn open_namespace(
        &self,
        request: Request<v1::OpenNamespaceRequest>,
    ) -> Result<Response<v1::OpenNamespaceResponse>, Status> {
        let caller = caller(&request);
        let asked: request::OpenNamespace = decode(request.into_inner())?;
        let blocks = &caller.shared.blocks;
        let opened = blocks.open_namespace(caller.tenant, &asked).await;
        let opened = opened.map_err(|e| status::blocks(&e))?;
        Ok(Response::new(
            opened.into_wire(&caller.answer(&asked.context)),
        ))
    }

    async fn lookup(
        &self,
        request: Request<v1::LookupRequest>,
    ) -> Result<Response<v1::LookupResponse>, Status> {
        let caller = caller(&request);
        let time = request.extensions().get::<StreamTime>().map(|time| time.0);
        let time = time.unwrap_or(caller.shared.limits.deadlines.default);
        let answer = unary::lookup(&caller, request.into_inner(), time).await;
        answer.map(Response::new)
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::RenewResponse>, Status> {
        let caller = caller(&request);
        unary::renew(&caller, request.into_inner()).map(Response::new)
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let caller = caller(&request);
        unary::release(&caller, request.into_inner()).map(Response::new)
    }

    async fn invalidate(
        &self,
        request: Request<v1::InvalidateRequest>,
    ) -> Result<Response<v1::InvalidateResponse>, Status> {
        let caller = caller(&request);
        let asked: request::Invalidate = decode(request.into_inner())?;
        let blocks = &caller.shared.blocks;
        let forgotten = blocks
            .invalidate_as(
                asked.context.request_id,
                caller.tenant,
                asked.namespace,
                asked.target,
            )
            .await;
        let forgotten = forgotten.map_err(|e| status::blocks(&e))?;
        Ok(Response::new(v1::InvalidateResponse {
            context: Some((&caller.answer(&asked.context)).into()),
            blocks: forgotten,
        }))
    }

    type GetStream = tokio_stream::Empty<Result<v1::GetResponse, Status>>;

    /// Never reached: the connection frames this method itself, in `get.rs`.
    async fn get(&self, _: Request<v1::GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        Err(status::unknown_method("Get"))
    }

    /// Never reached: the connection frames this method itself, in `put.rs`.
    async fn put(
        &self,
        _: Request<tonic::Streaming<v1::PutRequest>>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        Err(status::unknown_method("Put"))
    }

    type WatchStream = WatchStream;

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<WatchStream>, Status> {
        let caller = caller(&request);
        let time = request.extensions().get::<StreamTime>().map(|time| time.0);
        let asked: request::Watch = decode(request.into_inner())?;
        let seat = Seat::take(&caller.shared)?;
        let watcher = caller
            .shared
            .blocks
            .watch(caller.tenant, asked.namespace)
            .map_err(|e| status::blocks(&e))?;
        let lifetime = time.unwrap_or(caller.shared.limits.lifetimes.default);
        let context = caller.answer(&asked.context);
        Ok(Response::new(WatchStream {
            boot: context.boot_id,
            told: context.view_digest,
            views: Views::new(caller.shared.blocks.cluster().changes()),
            context: Some(context),
            late: caller.shared.clock.sleep(lifetime),
            draining: caller.shared.draining.clone().cancelled_owned().boxed(),
            watcher: Some(watcher),
            _seat: seat,
        }))
    }

    async fn stats(
        &self,
        request: Request<v1::StatsRequest>,
    ) -> Result<Response<v1::StatsResponse>, Status> {
        let caller = caller(&request);
        let context = request::Context::from_wire(request.into_inner().context);
        let context = context.map_err(|e| status::field(&e))?;
        Ok(Response::new(v1::StatsResponse {
            context: Some((&caller.answer(&context)).into()),
            ..caller.shared.blocks.stats()
        }))
    }

    async fn list_namespaces(
        &self,
        request: Request<v1::ListNamespacesRequest>,
    ) -> Result<Response<v1::ListNamespacesResponse>, Status> {
        let caller = caller(&request);
        let asked: request::ListNamespaces = decode(request.into_inner())?;
        let (context, tenant) = (asked.context, caller.tenant);
        let blocks = caller.shared.blocks.clone();
        // Of a large index it takes as long as reading it all, and this thread serves others.
        let listing = tokio::task::spawn_blocking(move || blocks.list_namespaces(tenant, &asked));
        let listed = listing.await;
        let (namespaces, next) = listed.map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(v1::ListNamespacesResponse {
            context: Some((&caller.answer(&context)).into()),
            namespaces: namespaces.into_iter().map(Into::into).collect(),
            next_page_token: next.map_or_else(Bytes::new, |id| Bytes::copy_from_slice(&id.0)),
        }))
    }
}

/// One of `max_watchers`.
struct Seat(Arc<Shared>);

impl Seat {
    fn take(shared: &Arc<Shared>) -> Result<Self, Status> {
        let most = shared.limits.max_watchers;
        if shared.watchers.fetch_add(1, Ordering::Relaxed) >= most {
            shared.watchers.fetch_sub(1, Ordering::Relaxed);
            let problem = format!("{most} watchers are listening already (max_watchers)");
            return Err(status::refuse(Reason::Overloaded, problem));
        }
        shared.metrics.watchers.inc();
        Ok(Self(Arc::clone(shared)))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.watchers.dec();
    }
}

/// Events until the watcher leaves, its time is over, or the node stops.
///
/// The first message comes at once and carries the context alone, so that a watcher knows that it
/// misses nothing from then on. Another such message says when the cluster has changed, as a watcher may make no other
/// calls that would tell it.
pub(crate) struct WatchStream {
    context: Option<AnswerContext>,
    boot: BootId,
    /// Of the view that the watcher was told of last.
    told: ViewDigest,
    views: Views<Arc<Roster>>,
    watcher: Option<Watcher>,
    late: BoxFuture<'static, ()>,
    draining: BoxFuture<'static, ()>,
    _seat: Seat,
}

impl Stream for WatchStream {
    type Item = Result<v1::WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(watcher) = &mut this.watcher else {
            return Poll::Ready(None);
        };
        while this.context.is_none()
            && let Poll::Ready(Some(roster)) = this.views.poll_next_unpin(cx)
        {
            this.context = (roster.digest != this.told).then(|| AnswerContext {
                boot_id: this.boot,
                view_digest: roster.digest,
                members: roster.view.members().to_vec(),
                queue: 0,
            });
            this.told = roster.digest;
        }
        if let Some(context) = this.context.take() {
            let first = v1::WatchResponse {
                context: Some((&context).into()),
                sequence: watcher.sequence(),
                event: None,
            };
            return Poll::Ready(Some(Ok(first)));
        }
        let end = if this.draining.as_mut().poll(cx).is_ready() {
            status::refuse(
                Reason::Draining,
                "this node is stopping; watch again elsewhere",
            )
        } else if this.late.as_mut().poll(cx).is_ready() {
            status::too_late()
        } else {
            return watcher
                .poll_next(cx)
                .map(|(sequence, event)| Some(Ok(event.to_wire(sequence, None))));
        };
        this.watcher = None;
        Poll::Ready(Some(Err(end)))
    }
}
