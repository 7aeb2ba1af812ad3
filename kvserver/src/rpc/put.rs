//! `Put`: blocks from the socket into their slots, copied once and summed on the way.
//!
//! ```text
//! HTTP/2 frames ──FrameReader──► start │ header │ data … │ header │ data … │ end
//!                                         │         └ copied into the slot, page sums made there
//!                                         └ reserves the slot
//! ```
//!
//! One block is under way at a time, so a client that vanishes leaves one slot, and that is given back as
//! the session is dropped. A request that breaks the rules is refused as a whole; blocks that were complete
//! before it broke stay, as they are whole and checked. On the wire it is exactly
//! `stream PutRequest`.

use std::sync::Arc;

use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use kvproto::{
    FieldError,
    convert::{HeaderRules, header, request},
    frame::{Frame, FrameLimits, FrameReader, head},
    v1,
};
use prost::Message;
use tonic::{Code, Status};

use super::{
    Shared,
    body::{RpcBody, response},
    connection::{Call, Caller, refused},
    status,
};
use crate::blocks::put::PutSession;

/// Bytes of a message besides its payload. The header of a 64 MiB block, 1024 page sums, needs 8.3 KiB.
const MAX_HEAD_BYTES: usize = 256 << 10;

/// Answers one call.
pub(crate) async fn serve(
    caller: Caller,
    call: Call,
    request: Request<Incoming>,
) -> Response<RpcBody> {
    let shared = Arc::clone(&caller.shared);
    let late = shared.clock.sleep(call.time_left());
    let answer = tokio::select! {
        biased;
        answer = receive(caller, request.into_body()) => answer,
        () = late => Err(status::too_late()),
    };
    match answer {
        Ok(answer) => {
            call.over(Code::Ok);
            response(RpcBody::whole(head(&answer, 0)))
        }
        Err(status) => {
            call.over(status.code());
            refused(&status)
        }
    }
}

async fn receive(caller: Caller, mut body: Incoming) -> Result<v1::PutResponse, Status> {
    let shared = &caller.shared;
    let limits = FrameLimits {
        max_head_bytes: MAX_HEAD_BYTES,
        max_data_bytes: shared.limits.max_block_bytes,
    };
    let mut reader = FrameReader::new(limits);
    let mut receiver = Receiver {
        caller: &caller,
        session: None,
    };
    while let Some(frame) = body.frame().await {
        let Ok(chunk) = frame.map_err(status::broken)?.into_data() else {
            continue;
        };
        reader.push(chunk);
        while let Some(frame) = reader.next().map_err(|e| status::frame(&e))? {
            receiver.take(frame)?;
        }
    }
    reader.finish().map_err(|e| status::frame(&e))?;
    let Some((session, _)) = receiver.session else {
        return Err(status::field(&FieldError::new(
            "start",
            "is missing; the first message must have it",
        )));
    };
    let results = session.finish().await.map_err(|e| status::blocks(&e))?;
    Ok(v1::PutResponse {
        context: Some((&shared.blocks.answer_context()).into()),
        results: results.into_iter().map(Into::into).collect(),
    })
}

/// Turns frames into steps of a session.
struct Receiver<'a> {
    caller: &'a Caller,
    session: Option<(PutSession, HeaderRules)>,
}

impl Receiver<'_> {
    fn take(&mut self, frame: Frame) -> Result<(), Status> {
        match frame {
            Frame::Head { message, .. } => {
                let message = v1::PutRequest::decode(message)
                    .map_err(|e| status::undecodable("PutRequest", &e))?;
                self.message(message)
                    .map_err(|problem| problem.into_status(&self.caller.shared))
            }
            Frame::Data(bytes) => match &mut self.session {
                Some((session, _)) => session.data(&bytes).map_err(|e| status::blocks(&e)),
                None => Err(status::field(&no_start())),
            },
            Frame::End => Ok(()),
        }
    }

    fn message(&mut self, message: v1::PutRequest) -> Result<(), Problem> {
        match (&self.session, message.start) {
            (None, Some(start)) => {
                let start = request::PutStart::try_from(start)?;
                let shared = &self.caller.shared;
                let owner = self
                    .caller
                    .owner(start.context.owner_id)
                    .map_err(Problem::Status)?;
                let session =
                    shared
                        .blocks
                        .put(owner.tenant, start.namespace, start.ack, start.kind)?;
                let rules = HeaderRules {
                    namespace: start.namespace,
                    run_blocks: session.run_blocks(),
                    max_block_bytes: shared.limits.max_block_bytes,
                };
                self.session = Some((session, rules));
            }
            (None, None) => return Err(no_start().into()),
            (Some(_), Some(_)) => {
                return Err(
                    FieldError::new("start", "came twice; only the first message has it").into(),
                );
            }
            (Some(_), None) => {}
        }
        if let (Some((session, rules)), Some(wire)) = (&mut self.session, message.header) {
            session.block(header(&wire, *rules)?)?;
        }
        Ok(())
    }
}

fn no_start() -> FieldError {
    FieldError::new("start", "is missing; the first message must have it")
}

/// What can be wrong with a message, until it becomes a status.
enum Problem {
    Field(FieldError),
    Blocks(crate::blocks::BlocksError),
    Status(Status),
}

impl From<FieldError> for Problem {
    fn from(error: FieldError) -> Self {
        Self::Field(error)
    }
}

impl From<crate::blocks::BlocksError> for Problem {
    fn from(error: crate::blocks::BlocksError) -> Self {
        Self::Blocks(error)
    }
}

impl Problem {
    fn into_status(self, _: &Shared) -> Status {
        match self {
            Self::Field(error) => status::field(&error),
            Self::Blocks(error) => status::blocks(&error),
            Self::Status(status) => status,
        }
    }
}
