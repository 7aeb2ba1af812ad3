//! One gRPC exchange over an HTTP/2 stream.
//!
//! ```text
//! HEADERS :path /terrace.v1.Blocks/<Method>, grpc-timeout       ──►
//! DATA    [0][length u32 BE][message] ...                       ──►
//!                                      ◄── HEADERS 200
//!                                      ◄── DATA [0][length][message] ...
//!                                      ◄── HEADERS grpc-status, grpc-message, terrace-reason
//! ```
//!
//! Units: bytes.
//! Errors: [`Error::Broken`] for the transport, [`Error::Refused`] for a status other than OK,
//! [`Error::Answer`] for bytes that are not the contract's.
//! Who carries it: a lane (see [`crate::lane`]), or, for a watch, a stream of the multiplexed connection.
//! Why no tonic channel: unary and bulk calls share one way of failing; tonic serves for its status parser
//! alone.

use std::{io, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use h2::{
    RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::{HeaderMap, HeaderValue, Method as Verb, Request, Response, Uri, header};
use kvproto::reason::Reason;
use prost::Message;
use tonic::Status;

use crate::{
    error::Error,
    lane::{self, Lanes, Question, Receiver, Sender},
};

/// Largest answer of a unary call: the tiers of 65536 blocks, or a node's counters, fit with room.
const MAX_ANSWER_BYTES: usize = 16 << 20;
const PREFIX_BYTES: usize = 5;

/// A method of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Method {
    /// Its name in errors.
    pub(crate) name: &'static str,
    uri: &'static str,
    path: &'static str,
}

macro_rules! methods {
    ($($constant:ident = $name:literal),* $(,)?) => {
        impl Method {
            $(pub(crate) const $constant: Self = Self {
                name: $name,
                uri: concat!("http://terrace/terrace.v1.Blocks/", $name),
                path: concat!("/terrace.v1.Blocks/", $name),
            };)*
        }
    };
}

methods! {
    OPEN_NAMESPACE = "OpenNamespace",
    LOOKUP = "Lookup",
    GET = "Get",
    PUT = "Put",
    RENEW = "Renew",
    RELEASE = "Release",
    INVALIDATE = "Invalidate",
    WATCH = "Watch",
    STATS = "Stats",
    LIST_NAMESPACES = "ListNamespaces",
}

impl Method {
    /// Of the cluster's own service.
    pub(crate) const REPORT: Self = Self {
        name: "Report",
        uri: "http://terrace/terrace.v1.Cluster/Report",
        path: "/terrace.v1.Cluster/Report",
    };
}

/// Opens a stream and sends its headers.
pub(crate) async fn start(
    send: &SendRequest<Bytes>,
    method: Method,
    timeout: Duration,
    authorization: Option<&HeaderValue>,
) -> Result<(ResponseFuture, SendStream<Bytes>), Error> {
    let broken = |source| broken(method, source);
    let mut send = send.clone().ready().await.map_err(broken)?;
    let mut request = Request::new(());
    *request.method_mut() = Verb::POST;
    *request.uri_mut() = Uri::from_static(method.uri);
    let headers = request.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    headers.insert("grpc-timeout", grpc_timeout(timeout));
    if let Some(token) = authorization {
        headers.insert(header::AUTHORIZATION, token.clone());
    }
    send.send_request(request, false).map_err(broken)
}

/// Whole milliseconds, rounded up, so that first tries repeat one header value: at most 8 digits.
fn grpc_timeout(timeout: Duration) -> HeaderValue {
    let millis = timeout.as_nanos().div_ceil(1_000_000).max(1);
    let text = if millis < 100_000_000 {
        format!("{millis}m")
    } else {
        format!("{}S", (millis / 1000).min(99_999_999))
    };
    HeaderValue::try_from(text).expect("digits and a letter make a header value")
}

/// One message with its gRPC prefix.
pub(crate) fn encode<M: Message>(message: &M) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + length);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message
        .encode(&mut frame)
        .expect("the buffer was made for it");
    frame.freeze()
}

/// Judges the head of an answer; its body follows.
pub(crate) fn body(method: Method, response: Response<RecvStream>) -> Result<RecvStream, Error> {
    let (head, body) = response.into_parts();
    // Answers without a body carry their status here.
    judge(method, &head.headers)?;
    if head.status != http::StatusCode::OK {
        return Err(Error::Answer {
            method: method.name,
            problem: format!("HTTP status {}: is this a Terrace node?", head.status),
        });
    }
    Ok(body)
}

/// `Err` when the headers hold a status other than OK; the flag says whether they hold one at all.
fn judge(method: Method, headers: &HeaderMap) -> Result<bool, Error> {
    // The usual case, without the copy of all headers that tonic's parser makes.
    if headers.get("grpc-status").is_some_and(|code| code == "0") {
        return Ok(true);
    }
    // Not ours, and tonic panics where it is not base64.
    const DETAILS: &str = "grpc-status-details-bin";
    if headers.contains_key(DETAILS) {
        let mut headers = headers.clone();
        headers.remove(DETAILS);
        return judge(method, &headers);
    }
    let Some(status) = Status::from_header_map(headers) else {
        return Ok(false);
    };
    if status.code() == tonic::Code::Ok {
        return Ok(true);
    }
    let reason = headers
        .get("terrace-reason")
        .and_then(|value| value.to_str().ok())
        .and_then(|name| Reason::ALL.iter().copied().find(|r| r.as_str() == name));
    Err(Error::Refused {
        method: method.name,
        code: status.code(),
        reason,
        message: status.message().to_owned(),
    })
}

/// Next bytes of a body, their window given back at once; `None` at its end.
pub(crate) async fn chunk(method: Method, body: &mut RecvStream) -> Result<Option<Bytes>, Error> {
    let broken = |source| broken(method, source);
    match body.data().await {
        None => Ok(None),
        Some(Err(source)) => Err(broken(source)),
        Some(Ok(bytes)) => {
            body.flow_control()
                .release_capacity(bytes.len())
                .map_err(broken)?;
            Ok(Some(bytes))
        }
    }
}

/// Reads the status behind a body that has ended.
pub(crate) async fn finish(method: Method, body: &mut RecvStream) -> Result<(), Error> {
    let trailers = body
        .trailers()
        .await
        .map_err(|source| broken(method, source))?;
    match trailers {
        Some(trailers) if judge(method, &trailers)? => Ok(()),
        _ => Err(Error::Truncated {
            method: method.name,
        }),
    }
}

/// A call on a lane: `sender` makes its messages, the answer's messages go to `receiver`.
///
/// # Errors
/// [`Error::Connect`], [`Error::Broken`], [`Error::Stale`], [`Error::Refused`]; [`Error::Truncated`] when the
/// answer has no status.
pub(crate) async fn exchange<'b, S: Sender<'b>, R: Receiver>(
    lanes: &Lanes,
    method: Method,
    timeout: Duration,
    authorization: Option<&HeaderValue>,
    sender: &mut S,
    receiver: &mut R,
) -> Result<(), Error> {
    let mut guard = lanes.take().await?;
    let timeout = grpc_timeout(timeout);
    let request = lane::Request {
        path: method.path,
        timeout: timeout.as_bytes(),
        authorization,
    };
    let answer = guard
        .lane
        .exchange(&request, sender, receiver)
        .await
        .map_err(|source| {
            let method = method.name;
            match guard.lane.was_given_up() {
                true => Error::Stale { method, source },
                false => Error::Broken { method, source },
            }
        })?;
    if !answer.is_early {
        guard.keep();
    }
    let has_status = answer.is_ok || judge(method, &answer.headers)?;
    if answer.status != http::StatusCode::OK.as_u16() {
        return Err(self::answer(
            method,
            format!("HTTP status {}: is this a Terrace node?", answer.status),
        ));
    }
    if has_status {
        Ok(())
    } else {
        Err(Error::Truncated {
            method: method.name,
        })
    }
}

/// A call with one message each way.
pub(crate) async fn unary<A: Message + Default>(
    lanes: &Lanes,
    method: Method,
    timeout: Duration,
    authorization: Option<&HeaderValue>,
    question: &[u8],
) -> Result<A, Error> {
    let mut whole = Whole::default();
    exchange(
        lanes,
        method,
        timeout,
        authorization,
        &mut Question(question),
        &mut whole,
    )
    .await?;
    whole.decode(method)
}

/// The one message of a unary answer.
#[derive(Default)]
pub(crate) struct Whole {
    bytes: Vec<u8>,
}

impl Receiver for Whole {
    fn room(&mut self) -> Option<&mut [u8]> {
        None
    }

    fn landed(&mut self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.bytes.len() + bytes.len() > MAX_ANSWER_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "an answer longer than 16 MiB",
            ));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

impl Whole {
    /// Reads the message.
    pub(crate) fn decode<A: Message + Default>(&self, method: Method) -> Result<A, Error> {
        let Some((prefix, message)) = self.bytes.split_at_checked(PREFIX_BYTES) else {
            return Err(Error::Truncated {
                method: method.name,
            });
        };
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if prefix[0] != 0 {
            return Err(answer(method, "compressed, which nobody asked for"));
        }
        if length != message.len() {
            return Err(answer(method, "its length is not the one it declares"));
        }
        A::decode(message).map_err(|error| answer(method, error))
    }
}

/// A stream of a multiplexed connection broke.
pub(crate) fn broken(method: Method, source: h2::Error) -> Error {
    let source = match source.into_io() {
        Some(source) => source,
        None => io::ErrorKind::ConnectionReset.into(),
    };
    Error::Broken {
        method: method.name,
        source,
    }
}

/// An answer that breaks the contract.
pub(crate) fn answer(method: Method, problem: impl ToString) -> Error {
    Error::Answer {
        method: method.name,
        problem: problem.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_fit_eight_digits_and_round_up() {
        for (timeout, text) in [
            (Duration::ZERO, "1m"),
            (Duration::from_micros(1), "1m"),
            (Duration::from_micros(4_999_999), "5000m"),
            (Duration::from_secs(99_999), "99999000m"),
            (Duration::from_secs(100_000), "100000S"),
            (Duration::MAX, "99999999S"),
        ] {
            assert_eq!(grpc_timeout(timeout), text);
        }
    }
}
