//! One node's stream of events.
//!
//! ```text
//! node ─► first message: boot, sequence so far ─► Stored │ Removed │ Lagged(n)  ... until the stream ends
//!         now and then: another view of the cluster
//! ```
//!
//! Units: events; `sequence` grows by one per event of one boot of the node.
//! Errors: as any call's; after one the stream is over.

use std::{collections::VecDeque, time::Duration};

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

pub(super) const METHOD: Method = Method::WATCH;

/// A stream of events. Dropping it ends it.
pub(super) struct Stream {
    /// Which life of the node, and how many events it had had when the stream began; once the first message is here.
    began: Option<(BootId, u64)>,
    body: RecvStream,
    frames: FrameReader,
    ready: VecDeque<(u64, WatchEvent)>,
    ended: bool,
    /// Holds the call's place on its connection.
    _checkout: Checkout,
}

impl Stream {
    /// Waits for the first message: which life of the node, and how many events it had had by then.
    ///
    /// # Errors
    /// When the stream broke.
    pub(super) async fn began(&mut self, inner: &Inner) -> Result<(BootId, u64), Error> {
        loop {
            if let Some(began) = self.began {
                return Ok(began);
            }
            if !self.more(inner).await? {
                return Ok((BootId(0), 0));
            }
        }
    }

    /// The next event with its sequence number; `None` when the node ended the stream in good order.
    ///
    /// # Errors
    /// When the stream broke.
    pub(super) async fn next(&mut self, inner: &Inner) -> Result<Option<(u64, WatchEvent)>, Error> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            if !self.more(inner).await? {
                return Ok(None);
            }
        }
    }

    /// Reads what comes next; false when there is no more.
    async fn more(&mut self, inner: &Inner) -> Result<bool, Error> {
        if self.ended {
            return Ok(false);
        }
        match wire::chunk(METHOD, &mut self.body).await? {
            Some(bytes) => self.read(inner, bytes)?,
            None => {
                wire::finish(METHOD, &mut self.body).await?;
                self.ended = true;
            }
        }
        Ok(!self.ended)
    }

    fn read(&mut self, inner: &Inner, bytes: Bytes) -> Result<(), Error> {
        self.frames.push(bytes);
        while let Some(frame) = self.frames.next().map_err(|e| wire::answer(METHOD, e))? {
            let Frame::Head { message, .. } = frame else {
                continue;
            };
            let message =
                v1::WatchResponse::decode(message).map_err(|e| wire::answer(METHOD, e))?;
            let event = WatchEvent::from_wire(&message).map_err(|e| wire::answer(METHOD, e))?;
            if message.context.is_some() || self.began.is_none() {
                let boot = inner.heard(message.context.as_ref());
                // An event's own number is among those that it tells of.
                let before = message.sequence - u64::from(event.is_some()).min(message.sequence);
                self.began.get_or_insert((boot, before));
            }
            self.ready
                .extend(event.map(|event| (message.sequence, event)));
        }
        Ok(())
    }
}

/// Opens the stream, by `deadline`; it may live for `lifetime`.
pub(super) async fn open(
    inner: &Inner,
    deadline: Deadline,
    lifetime: Duration,
    namespace: Option<NamespaceId>,
) -> Result<Stream, Error> {
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
                Ok(Stream {
                    began: None,
                    body,
                    frames: FrameReader::new(FrameLimits::default()),
                    ready: VecDeque::new(),
                    ended: false,
                    _checkout: checkout,
                })
            })
            .await?;
        if let Ok(stream) = answer {
            return Ok(stream);
        }
    }
}
