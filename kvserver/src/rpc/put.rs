//! `Put`: blocks from the socket into their slots, copied once and summed on the way.
//!
//! ```text
//! HTTP/2 frames ──FrameReader──► start │ header │ data … │ sums │ header │ data … │ sums │ end
//!                                         │         └ into the slot, page sums made there
//!                                         └ reserves the slot
//! ```
//!
//! From a lane ([`super::lane`]) the data is read right into the slot; from a general client it is copied out of
//! hyper's frames.
//!
//! One block is under way at a time, so a client that vanishes leaves one slot, and that is given back as
//! the session is dropped. A request that breaks the rules is refused as a whole; blocks that were complete
//! before it broke stay, as they are whole and checked. On the wire it is exactly
//! `stream PutRequest`.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use kvproto::{
    FieldError,
    convert::{HeaderRules, PutHeader, put_header, request},
    frame::{Frame, FrameLimits, FrameReader, head},
    v1,
};
use prost::Message;
use tonic::{Code, Status};

use super::{
    body::{self, RpcBody},
    dispatch::{Call, Caller, refused},
    status,
};
use crate::blocks::put::PutSession;

/// Bytes of a message besides its payload. The header of a 64 MiB block, 1024 page sums, needs 8.3 KiB.
const MAX_HEAD_BYTES: usize = 256 << 10;

/// Bytes read at a time of data that goes nowhere.
const WASTE_BYTES: usize = 64 << 10;

/// Answers one call of a general client.
pub(crate) async fn serve(
    caller: Caller,
    call: Call,
    request: Request<Incoming>,
) -> Response<RpcBody> {
    let late = caller.shared.clock.sleep(call.time_left());
    let answer = tokio::select! {
        biased;
        answer = receive(&caller, request.into_body()) => answer,
        () = late => Err(status::too_late()),
    };
    response(answer, call)
}

/// The response to a call that is over.
pub(crate) fn response(answer: Result<v1::PutResponse, Status>, call: Call) -> Response<RpcBody> {
    match answer {
        Ok(answer) => {
            call.over(Code::Ok);
            body::response(RpcBody::whole(head(&answer, 0)))
        }
        Err(status) => {
            call.over(status.code());
            refused(&status)
        }
    }
}

async fn receive(caller: &Caller, mut body: Incoming) -> Result<v1::PutResponse, Status> {
    let mut receiving = Receiving::new(caller);
    while let Some(frame) = body.frame().await {
        let Ok(chunk) = frame.map_err(status::broken)?.into_data() else {
            continue;
        };
        if receiving.chunk(chunk).is_err() {
            break;
        }
    }
    receiving.finish().await
}

/// A put as it comes in: bytes to frames, frames to steps of a session. The first failure is final.
pub(crate) struct Receiving<'a> {
    caller: &'a Caller,
    session: Option<(PutSession, HeaderRules)>,
    context: request::Context,
    frames: FrameReader,
    failed: Option<Status>,
    /// Where data goes that goes nowhere: that of a block which is there already, or has no place.
    waste: Vec<u8>,
}

impl<'a> Receiving<'a> {
    pub(crate) fn new(caller: &'a Caller) -> Self {
        let limits = FrameLimits {
            max_head_bytes: MAX_HEAD_BYTES,
            max_data_bytes: caller.shared.limits.max_block_bytes,
        };
        Self {
            caller,
            session: None,
            context: request::Context::default(),
            frames: FrameReader::new(limits),
            failed: None,
            waste: Vec::new(),
        }
    }

    /// The next bytes of the stream. `Err` once the put has failed; nothing more is needed then.
    pub(crate) fn chunk(&mut self, chunk: Bytes) -> Result<(), ()> {
        self.frames.push(chunk);
        self.advance()
    }

    /// Where the next bytes belong, if they are payload: no further than to the end of block and message.
    pub(crate) fn room(&mut self) -> Option<&mut [u8]> {
        let left = usize::try_from(self.frames.data_left()).unwrap_or(usize::MAX);
        let (session, _) = self.session.as_mut().filter(|_| left > 0)?;
        let wasted = session.wasted_bytes();
        let room = if wasted > 0 {
            self.waste.resize(WASTE_BYTES.min(wasted), 0);
            &mut self.waste[..]
        } else {
            session.room()?
        };
        let length = room.len().min(left);
        (length > 0).then(|| &mut room[..length])
    }

    /// So many bytes were read into the room. `Err` as for a chunk.
    pub(crate) fn landed(&mut self, bytes: usize) -> Result<(), ()> {
        self.frames.skip_data(bytes as u64);
        let landed = match &mut self.session {
            Some((session, _)) => session.landed(bytes).map_err(|e| status::blocks(&e)),
            None => Err(status::field(&no_start())),
        };
        self.keep(landed)?;
        self.advance()
    }

    /// Why the put has failed, if it has.
    pub(crate) fn refused(self) -> Option<Status> {
        self.failed
    }

    /// The stream has ended: waits for what became of its blocks.
    ///
    /// # Errors
    /// The put's first failure.
    pub(crate) async fn finish(self) -> Result<v1::PutResponse, Status> {
        if let Some(status) = self.failed {
            return Err(status);
        }
        self.frames.finish().map_err(|e| status::frame(&e))?;
        let Some((session, _)) = self.session else {
            return Err(status::field(&no_start()));
        };
        let results = session.finish().await.map_err(|e| status::blocks(&e))?;
        Ok(v1::PutResponse {
            context: Some((&self.caller.answer(&self.context)).into()),
            results: results.into_iter().map(Into::into).collect(),
        })
    }

    fn advance(&mut self) -> Result<(), ()> {
        let advanced = self.take_frames();
        self.keep(advanced)
    }

    fn keep(&mut self, outcome: Result<(), Status>) -> Result<(), ()> {
        outcome.map_err(|status| {
            self.failed.get_or_insert(status);
        })
    }

    fn take_frames(&mut self) -> Result<(), Status> {
        while let Some(frame) = self.frames.next().map_err(|e| status::frame(&e))? {
            match frame {
                Frame::Head { message, .. } => {
                    let message = v1::PutRequest::decode(message)
                        .map_err(|e| status::undecodable("PutRequest", &e))?;
                    self.message(message).map_err(Problem::into_status)?;
                }
                Frame::Data(bytes) => match &mut self.session {
                    Some((session, _)) => session.data(&bytes).map_err(|e| status::blocks(&e))?,
                    None => return Err(status::field(&no_start())),
                },
                Frame::End => {}
            }
        }
        Ok(())
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
                let mut session =
                    shared
                        .blocks
                        .put(owner.tenant, start.namespace, start.ack, start.kind)?;
                let no_forward = start.context.no_forward;
                if !no_forward {
                    session.passes_on();
                }
                // What a node alone may say of blocks: that they are on their way, and what they have been through.
                if self.caller.is_peer {
                    if no_forward {
                        session.is_handed_over();
                    }
                    session.has_survived(start.survived);
                }
                let rules = HeaderRules {
                    namespace: start.namespace,
                    run_blocks: session.run_blocks(),
                    max_block_bytes: shared.limits.max_block_bytes,
                };
                self.context = start.context;
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
        let Some((session, rules)) = &mut self.session else {
            return Ok(());
        };
        if let Some(sums) = message.sums {
            session.sums(&sums)?;
        }
        if let Some(wire) = message.header {
            match put_header(&wire, *rules)? {
                PutHeader::Summed(header) => session.block(header)?,
                PutHeader::Announced(block) => session.announce(block)?,
            }
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
    fn into_status(self) -> Status {
        match self {
            Self::Field(error) => status::field(&error),
            Self::Blocks(error) => status::blocks(&error),
            Self::Status(status) => status,
        }
    }
}
