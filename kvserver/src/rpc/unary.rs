//! Lookups, and what becomes of their leases: the small calls that are made all the time.
//!
//! ```text
//! lane ──message──► answer ─decode─► lookup │ renew │ release ─encode─► one framed message, OK
//! hyper ─► tonic ─► blocks.rs ──────►     the same three
//! ```
//!
//! A lane answers them without tonic between, as it does gets and puts: a chain over eight owners is eight such calls, and
//! the way through the generated service (a request with its URI and extensions, a boxed future, a codec with buffers of
//! its own) is a good part of what a node does for one.
//!
//! Units: bytes. Errors: a status, as everywhere.

use std::time::Duration;

use bytes::Bytes;
use http::Response;
use kvproto::{convert::request, frame::head, v1};
use prost::Message;
use tonic::{Code, Status};

use super::{
    body::{RpcBody, response},
    dispatch::{Call, Caller, refused},
    status,
};
use crate::telemetry::metrics::Method;

/// Whether [`answer`] answers it.
pub(crate) fn is_here(method: Method) -> bool {
    matches!(method, Method::Lookup | Method::Renew | Method::Release)
}

/// Answers the request that `message` is, within its time.
pub(crate) async fn answer(caller: Caller, call: Call, message: Bytes) -> Response<RpcBody> {
    let work = async {
        Ok(match call.method() {
            Method::Renew => whole(&renew(&caller, decode(message, "RenewRequest")?)?),
            Method::Release => whole(&release(&caller, decode(message, "ReleaseRequest")?)?),
            _ => {
                let asked = decode(message, "LookupRequest")?;
                whole(&lookup(&caller, asked, call.time_left()).await?)
            }
        })
    };
    // Made on the first wait, which most calls never come to.
    let late = async { caller.shared.clock.sleep(call.time_left()).await };
    let answered = tokio::select! {
        biased;
        answered = work => answered,
        () = late => Err(status::too_late()),
    };
    match answered {
        Ok(body) => {
            call.over(Code::Ok);
            response(body)
        }
        Err(status) => {
            call.over(status.code());
            refused(&status)
        }
    }
}

/// The longest prefix present, after what is on its way was waited for.
pub(crate) async fn lookup(
    caller: &Caller,
    asked: v1::LookupRequest,
    time: Duration,
) -> Result<v1::LookupResponse, Status> {
    let asked = request::Lookup::try_from(asked).map_err(|e| status::field(&e))?;
    let owner = caller.owner(asked.context.owner_id)?;
    let blocks = &caller.shared.blocks;
    let found = blocks.lookup_in_motion(owner, &asked, time).await;
    let found = found.map_err(|e| status::blocks(&e))?;
    Ok(found.into_wire(&caller.answer(&asked.context)))
}

/// More time for a lease.
pub(crate) fn renew(caller: &Caller, asked: v1::RenewRequest) -> Result<v1::RenewResponse, Status> {
    let asked = request::Renew::try_from(asked).map_err(|e| status::field(&e))?;
    let owner = caller.owner(asked.context.owner_id)?;
    let blocks = &caller.shared.blocks;
    let ttl_ms = blocks.renew(owner, asked.lease, asked.ttl_ms);
    Ok(v1::RenewResponse {
        context: Some((&caller.answer(&asked.context)).into()),
        renewed: ttl_ms.is_some(),
        ttl_ms: ttl_ms.unwrap_or(0),
    })
}

/// The end of a lease.
pub(crate) fn release(
    caller: &Caller,
    asked: v1::ReleaseRequest,
) -> Result<v1::ReleaseResponse, Status> {
    let asked = request::Release::try_from(asked).map_err(|e| status::field(&e))?;
    let owner = caller.owner(asked.context.owner_id)?;
    let released = caller.shared.blocks.release(owner, asked.lease);
    Ok(v1::ReleaseResponse {
        context: Some((&caller.answer(&asked.context)).into()),
        released,
    })
}

fn decode<M: Message + Default>(message: Bytes, name: &str) -> Result<M, Status> {
    M::decode(message).map_err(|e| status::undecodable(name, &e))
}

fn whole(message: &impl Message) -> RpcBody {
    RpcBody::whole(head(message, 0))
}
