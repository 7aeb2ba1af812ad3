//! Calls with one message each way that this path carries too: lookups, and what becomes of their leases.

use kvproto::v1::{self, local_reply::Answer, local_request::Call};
use prost::Message;

use super::{Local, error::LocalError};
use crate::{
    call::{self, Deadline, Inner},
    error::Error,
    wire::Method,
};

/// A question that both paths carry, and its answer.
pub(crate) trait Question: Message {
    type Answer: Message + Default;
    const METHOD: Method;

    fn into_call(self) -> Call;
    fn answer(answer: Answer) -> Option<Self::Answer>;
}

macro_rules! questions {
    ($($question:ident => $answer:ident, $method:ident, $variant:ident;)*) => {
        $(impl Question for v1::$question {
            type Answer = v1::$answer;
            const METHOD: Method = Method::$method;

            fn into_call(self) -> Call {
                Call::$variant(self)
            }

            fn answer(answer: Answer) -> Option<v1::$answer> {
                match answer {
                    Answer::$variant(answer) => Some(answer),
                    _ => None,
                }
            }
        })*
    };
}

questions! {
    LookupRequest => LookupResponse, LOOKUP, Lookup;
    RenewRequest => RenewResponse, RENEW, Renew;
    ReleaseRequest => ReleaseResponse, RELEASE, Release;
}

/// Asks over the same-host path, or over gRPC.
pub(crate) async fn unary<Q: Question>(
    inner: &Inner,
    deadline: Deadline,
    mut question: impl FnMut(v1::RequestContext) -> Q,
) -> Result<Q::Answer, Error> {
    if let Some(way) = Local::way(inner, deadline).await {
        let asked = question(inner.view_context()).into_call();
        let answer = way.run(async |turn| {
            let (answer, _) = turn.link.call(asked, way.left()).await?;
            Q::answer(answer).ok_or_else(|| LocalError::answer("to another question"))
        });
        if let Some(Ok(answer)) = answer.await {
            return Ok(answer);
        }
    }
    call::unary(inner, Q::METHOD, deadline, question).await
}
