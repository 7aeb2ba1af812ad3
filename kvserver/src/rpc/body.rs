//! Bodies below tonic's codec: one message in, bytes by reference out.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use kvproto::{Reason, frame::PREFIX_BYTES};
use tonic::Status;

use super::{get::GetBody, status};

/// Every body that this service answers with.
pub(crate) enum RpcBody {
    /// What tonic has framed.
    Tonic(tonic::body::Body),
    /// The stream of a get.
    Get(Box<GetBody>),
    /// One framed message and its trailers.
    Whole {
        message: Option<Bytes>,
        trailers: Option<HeaderMap>,
    },
}

impl RpcBody {
    /// One message, already framed, and OK.
    pub(crate) fn whole(message: Bytes) -> Self {
        Self::Whole {
            message: Some(message),
            trailers: Some(ok_trailers()),
        }
    }
}

impl Body for RpcBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match &mut *self {
            Self::Tonic(body) => Pin::new(body).poll_frame(cx),
            Self::Get(body) => body.poll_frame(cx).map(|frame| frame.map(Ok)),
            Self::Whole { message, trailers } => Poll::Ready(
                message
                    .take()
                    .map(Frame::data)
                    .or_else(|| trailers.take().map(Frame::trailers))
                    .map(Ok),
            ),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Tonic(body) => body.is_end_stream(),
            Self::Get(body) => body.is_end_stream(),
            Self::Whole { message, trailers } => message.is_none() && trailers.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Tonic(body) => body.size_hint(),
            _ => SizeHint::default(),
        }
    }
}

/// A response head for a body of gRPC messages.
pub(crate) fn response(body: RpcBody) -> Response<RpcBody> {
    let mut response = Response::new(body);
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    response
}

/// `grpc-status: 0`.
pub(crate) fn ok_trailers() -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    trailers
}

/// The trailers of a failed stream.
pub(crate) fn failed_trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(3);
    if status.add_header(&mut trailers).is_err() {
        // The message cannot be a header value; the code alone must do.
        trailers.insert("grpc-status", HeaderValue::from_static("13"));
    }
    trailers
}

/// Reads the one message of a request, of at most `limit` bytes.
pub(crate) async fn read_message(mut body: Incoming, limit: usize) -> Result<Bytes, Status> {
    // The usual request is whole in its first frame, and is not copied.
    let mut first = Bytes::new();
    let mut joined = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(status::broken)?.into_data() else {
            continue;
        };
        if data.is_empty() {
            // Empty frames cost their sender no window: they must not keep others waiting.
            tokio::task::yield_now().await;
            continue;
        }
        if first.len() + joined.len() + data.len() > limit + PREFIX_BYTES {
            return Err(status::message_too_long(limit));
        }
        if first.is_empty() && joined.is_empty() {
            first = data;
            continue;
        }
        if joined.is_empty() {
            joined.extend_from_slice(&std::mem::take(&mut first));
        }
        joined.extend_from_slice(&data);
    }
    unframe(if joined.is_empty() {
        first
    } else {
        joined.freeze()
    })
}

/// The message behind its prefix.
pub(crate) fn unframe(mut message: Bytes) -> Result<Bytes, Status> {
    let refuse = |problem: String| Err(status::refuse(Reason::InvalidField, problem));
    if message.len() < PREFIX_BYTES {
        return refuse(format!(
            "the request ended after {} bytes of its 5-byte prefix",
            message.len()
        ));
    }
    let (flag, length) = (message.get_u8(), message.get_u32() as usize);
    if flag != 0 {
        return Err(Status::unimplemented(
            "the request is compressed, which was not negotiated",
        ));
    }
    if length != message.len() {
        return refuse(format!(
            "the request announces {length} bytes and has {}",
            message.len()
        ));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn a_message_is_what_its_prefix_says() {
        let framed = Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1]);
        assert_eq!(unframe(framed).unwrap(), Bytes::from_static(&[8, 1]));
    }

    #[test]
    fn a_broken_prefix_has_a_precise_status() {
        let code = |bytes: &'static [u8]| unframe(Bytes::from_static(bytes)).unwrap_err().code();
        assert_eq!(code(&[]), Code::InvalidArgument);
        assert_eq!(code(&[0, 0, 0]), Code::InvalidArgument);
        assert_eq!(code(&[0, 0, 0, 0, 9, 1]), Code::InvalidArgument);
        assert_eq!(code(&[0, 0, 0, 0, 1, 1, 1]), Code::InvalidArgument);
        assert_eq!(code(&[1, 0, 0, 0, 1, 1]), Code::Unimplemented);
    }
}
