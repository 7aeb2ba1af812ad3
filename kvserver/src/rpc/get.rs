//! `Get`: blocks from the arena to the socket by reference.
//!
//! ```text
//! GetPlan ──next block──► head (prefix, fields, tag and length of data) │ data: a slice of the arena
//!                         └── a few hundred bytes, encoded ──────────────┘└── nothing copied ──────┘
//!                         … one such pair per piece …                       trailers: grpc-status
//! ```
//!
//! The connection asks the body for frames as the connection can take them; the body asks the engine for one
//! block at a time and waits only where a block has to come from below RAM. So a slow reader holds one
//! block, not all of them. On the wire it is exactly `stream GetResponse`.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body::Frame;
use hyper::body::Incoming;
use kvproto::{
    GetOutcome, TierKind,
    convert::{
        AnswerContext,
        answer::{GetPiece, Second},
        request,
    },
    frame::head,
    v1,
};
use prost::Message;
use tonic::{Code, Status};

use super::{
    Shared,
    body::{RpcBody, failed_trailers, ok_trailers, read_message, response},
    dispatch::{Call, Caller, refused},
    status,
};
use crate::{
    blocks::get::{Found, GetPlan},
    tier::BlockRef,
};

/// Answers one call of a general client.
pub(crate) async fn serve(
    caller: Caller,
    call: Call,
    request: Request<Incoming>,
) -> Response<RpcBody> {
    let limit = caller.shared.limits.max_message_bytes;
    match read_message(request.into_body(), limit).await {
        Ok(message) => answer(caller, call, message),
        Err(status) => {
            call.over(status.code());
            refused(&status)
        }
    }
}

/// Answers the request that `message` is.
pub(crate) fn answer(caller: Caller, call: Call, message: Bytes) -> Response<RpcBody> {
    match begin(&caller, &call, message) {
        Ok(Begun {
            plan,
            piece_bytes,
            context,
            seconds,
        }) => {
            let body = GetBody {
                shared: caller.shared,
                call: Some(call),
                plan,
                piece_bytes,
                context: Some(context),
                seconds,
                sending: None,
                data: None,
                late: None,
            };
            response(RpcBody::Get(Box::new(body)))
        }
        Err(status) => {
            call.over(status.code());
            refused(&status)
        }
    }
}

/// A get that may be answered.
struct Begun {
    plan: GetPlan,
    piece_bytes: usize,
    context: AnswerContext,
    seconds: Vec<Second>,
}

fn begin(caller: &Caller, call: &Call, message: Bytes) -> Result<Begun, Status> {
    let shared = &caller.shared;
    let wire =
        v1::GetRequest::decode(message).map_err(|e| status::undecodable("GetRequest", &e))?;
    let request = request::Get::try_from(wire).map_err(|e| status::field(&e))?;
    let owner = caller.owner(request.context.owner_id)?;
    let piece_bytes = request.piece_bytes.unwrap_or(shared.limits.piece_bytes) as usize;
    let plan = shared.blocks.get(
        owner,
        request.namespace,
        request.chain,
        request.parts,
        request.lease,
    );
    let mut plan = plan.map_err(|e| status::blocks(&e))?;
    let mut seconds = Vec::new();
    if !request.context.no_forward {
        plan.asks_peers(call.deadline());
        seconds = plan.seconds();
    }
    Ok(Begun {
        plan,
        piece_bytes,
        context: caller.answer(&request.context),
        seconds,
    })
}

/// The answer as its connection draws it.
pub(crate) struct GetBody {
    shared: Arc<Shared>,
    /// `None` once the trailers are out.
    call: Option<Call>,
    plan: GetPlan,
    piece_bytes: usize,
    /// Both go with the first message.
    context: Option<AnswerContext>,
    seconds: Vec<Second>,
    /// The block whose pieces are on their way.
    sending: Option<Sending>,
    /// The payload of the head that has just been handed out.
    data: Option<Bytes>,
    /// The call's deadline; made on the first wait, as an answer from RAM never waits.
    late: Option<BoxFuture<'static, ()>>,
}

struct Sending {
    block: u32,
    tier: TierKind,
    bytes: BlockRef,
    offset: usize,
}

impl GetBody {
    pub(crate) fn is_end_stream(&self) -> bool {
        self.call.is_none()
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        if let Some(data) = self.data.take() {
            return Poll::Ready(Some(Frame::data(data)));
        }
        if self.call.is_none() {
            return Poll::Ready(None);
        }
        if self.sending.is_none() {
            match self.plan.poll_next(cx) {
                Poll::Ready(Some(found)) => match found {
                    (block, Found::Hit { bytes, tier }) => {
                        self.sending = Some(Sending {
                            block,
                            tier,
                            bytes,
                            offset: 0,
                        });
                    }
                    (block, Found::Gone(outcome)) => {
                        return Poll::Ready(Some(Frame::data(self.gone(block, outcome))));
                    }
                },
                Poll::Ready(None) => {
                    self.over(Code::Ok);
                    return Poll::Ready(Some(Frame::trailers(ok_trailers())));
                }
                Poll::Pending => return self.poll_late(cx),
            }
        }
        Poll::Ready(self.piece().map(Frame::data))
    }

    /// The head of the next piece of the block being sent; its payload is left in `data`.
    fn piece(&mut self) -> Option<Bytes> {
        let sending = self.sending.as_mut()?;
        let length = sending.bytes.bytes().len();
        let end = length.min(sending.offset + self.piece_bytes);
        let first = sending.offset == 0;
        let piece = GetPiece {
            block: sending.block,
            outcome: GetOutcome::Hit,
            header: first.then(|| sending.bytes.header().clone()),
            tier: first.then_some(sending.tier),
            offset: sending.offset as u64,
        };
        let mut message = piece.to_wire(self.context.take().as_ref());
        message.seconds = self.seconds.drain(..).map(Into::into).collect();
        let head = head(&message, end - sending.offset);
        self.data = Some(sending.bytes.slice(sending.offset..end));
        sending.offset = end;
        if end == length {
            self.sending = None;
        }
        Some(head)
    }

    fn gone(&mut self, block: u32, outcome: GetOutcome) -> Bytes {
        let piece = GetPiece {
            block,
            outcome,
            header: None,
            tier: None,
            offset: 0,
        };
        let mut message = piece.to_wire(self.context.take().as_ref());
        message.seconds = self.seconds.drain(..).map(Into::into).collect();
        head(&message, 0)
    }

    /// Nothing to send yet: waits, but not beyond the deadline.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        let Some(call) = &self.call else {
            return Poll::Ready(None);
        };
        let late = self
            .late
            .get_or_insert_with(|| self.shared.clock.sleep(call.time_left()));
        if late.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let status = status::too_late();
        self.over(status.code());
        Poll::Ready(Some(Frame::trailers(failed_trailers(&status))))
    }

    fn over(&mut self, code: Code) {
        if let Some(call) = self.call.take() {
            call.over(code);
        }
    }
}

impl Drop for GetBody {
    /// The client went away, or the stream was cut.
    fn drop(&mut self) {
        self.over(Code::Cancelled);
    }
}
