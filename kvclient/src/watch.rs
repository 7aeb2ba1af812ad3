//! Blocks stored and removed, as they happen.
//!
//! ```text
//! node ─events─► Watch::next ─► Stored │ Removed │ Lagged(n)  ... until the stream ends
//! ```
//!
//! Units: events; `sequence` grows by one per event of one boot of the node.
//! Errors: as any call's; after one, watch again and read what is present by lookup.
//! Why it does not resume by itself: events missed meanwhile are lost, and only the caller knows what
//! it must look at again.

use std::collections::VecDeque;

use bytes::Bytes;
use h2::RecvStream;
use kvproto::{
    BootId, NamespaceId,
    convert::answer::WatchEvent,
    frame::{Frame, FrameLimits, FrameReader},
    v1,
};
use prost::Message;

use crate::{
    call::{Deadline, Inner, Tries},
    error::Error,
    pool::Checkout,
    wire::{self, Method},
};

const METHOD: Method = Method::WATCH;

/// A stream of events. Dropping it ends it.
pub struct Watch {
    boot: BootId,
    body: RecvStream,
    frames: FrameReader,
    ready: VecDeque<(u64, WatchEvent)>,
    ended: bool,
    /// Holds the call's place on its connection.
    _checkout: Checkout,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("boot", &self.boot)
            .field("ready", &self.ready.len())
            .finish_non_exhaustive()
    }
}

impl Watch {
    /// The node's boot whose events these are.
    #[must_use]
    pub fn boot_id(&self) -> BootId {
        self.boot
    }

    /// The next event with its sequence number; `None` when the node ended the stream in good order.
    ///
    /// # Errors
    /// When the stream broke; watch again.
    pub async fn next(&mut self) -> Result<Option<(u64, WatchEvent)>, Error> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            if self.ended {
                return Ok(None);
            }
            match wire::chunk(METHOD, &mut self.body).await? {
                Some(bytes) => self.read(bytes)?,
                None => {
                    wire::finish(METHOD, &mut self.body).await?;
                    self.ended = true;
                }
            }
        }
    }

    fn read(&mut self, bytes: Bytes) -> Result<(), Error> {
        self.frames.push(bytes);
        while let Some(frame) = self.frames.next().map_err(|e| wire::answer(METHOD, e))? {
            let Frame::Head { message, .. } = frame else {
                continue;
            };
            let event = v1::WatchResponse::decode(message).map_err(|e| wire::answer(METHOD, e))?;
            if let Some(context) = &event.context {
                self.boot = BootId(context.boot_id);
            }
            let sequence = event.sequence;
            if let Some(event) =
                WatchEvent::from_wire(&event).map_err(|problem| wire::answer(METHOD, problem))?
            {
                self.ready.push_back((sequence, event));
            }
        }
        Ok(())
    }
}

/// Opens the stream; `deadline` is how long it may live.
pub(crate) async fn watch(
    inner: &Inner,
    deadline: Deadline,
    lifetime: std::time::Duration,
    namespace: Option<NamespaceId>,
) -> Result<Watch, Error> {
    let mut tries = Tries::new(inner, METHOD, deadline);
    loop {
        let question = wire::encode(&v1::WatchRequest {
            context: Some(inner.context(&tries.request)),
            namespace_id: namespace.map_or_else(Bytes::new, |id| Bytes::copy_from_slice(&id.0)),
        });
        let answer = tries
            .run(|checkout, _| async move {
                let broken = |source| wire::broken(METHOD, source);
                let authorization = inner.authorization.as_ref();
                let (response, mut stream) =
                    wire::start(&checkout.live.send, METHOD, lifetime, authorization).await?;
                stream.send_data(question, true).map_err(broken)?;
                let body = wire::body(METHOD, response.await.map_err(broken)?)?;
                Ok(Watch {
                    boot: BootId(0),
                    body,
                    frames: FrameReader::new(FrameLimits::default()),
                    ready: VecDeque::new(),
                    ended: false,
                    _checkout: checkout,
                })
            })
            .await?;
        if let Ok(watch) = answer {
            return Ok(watch);
        }
    }
}
