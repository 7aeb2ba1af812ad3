//! An answer as it comes in over gRPC: frames to blocks, each checked against its header.
//!
//! ```text
//! lane ─chunk──► FrameReader ─► head ──► header: key asked for? seal right?
//!      ◄─room──  └─► data ──► read right into the buffer, each page summed while it is in the cache
//!                └─► end ───► sums equal the header's? ── no ──► Corrupt, buffer zeroed
//! ```
//!
//! Units: bytes.
//! Errors: [`Error::Truncated`], [`Error::Answer`] when the stream is not what was asked for.

use std::io;

use bytes::Bytes;
use kvproto::{
    BlockHeader, BlockKey, GetOutcome, TierKind, convert,
    frame::{Frame, FrameLimits, FrameReader},
    v1,
};
use prost::Message;

use super::{Got, METHOD, Wanted, sink::Sink};
use crate::{call::Inner, error::Error, lane::Receiver, wire};

/// How far an answer has come.
pub(super) struct Reading<'a, S> {
    inner: &'a Inner,
    wanted: &'a Wanted<'a>,
    sink: &'a mut S,
    got: Vec<Option<Got>>,
    open: Option<Open>,
    /// A block whose header made no sense or names another: its pieces go nowhere.
    skipped: Option<usize>,
    frames: FrameReader,
    /// Why reading stopped.
    pub(super) failed: Option<Error>,
}

impl<S: Sink> Receiver for Reading<'_, S> {
    fn room(&mut self) -> Option<&mut [u8]> {
        let left = self.frames.data_left();
        let open = self.open.as_ref().filter(|_| left > 0)?;
        // What the message announces beyond the block's end is refused when it comes, see `data`.
        let left = left.min(open.header.length_bytes - open.at) as usize;
        if left == 0 {
            return None;
        }
        let room = self.sink.room(open.slot);
        let left = left.min(room.len());
        Some(&mut room[..left])
    }

    fn landed(&mut self, bytes: usize) -> io::Result<()> {
        self.frames.skip_data(bytes as u64);
        if let Some(open) = &self.open {
            self.sink.landed(open.slot, bytes);
        }
        let outcome = self.data(bytes).and_then(|()| self.advance());
        self.stop_at(outcome)
    }

    fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.frames.push(Bytes::copy_from_slice(bytes));
        let outcome = self.advance();
        self.stop_at(outcome)
    }
}

/// The block whose bytes are coming in.
struct Open {
    slot: usize,
    header: BlockHeader,
    tier: Option<TierKind>,
    /// Bytes landed.
    at: u64,
}

impl<'a, S: Sink> Reading<'a, S> {
    pub(super) fn new(inner: &'a Inner, wanted: &'a Wanted<'a>, sink: &'a mut S) -> Self {
        Self {
            inner,
            wanted,
            sink,
            got: vec![None; wanted.count()],
            open: None,
            skipped: None,
            frames: FrameReader::new(FrameLimits {
                max_data_bytes: wanted.namespace.max_block_bytes(),
                ..FrameLimits::default()
            }),
            failed: None,
        }
    }

    /// Takes what the pushed bytes have made whole.
    fn advance(&mut self) -> Result<(), Error> {
        while let Some(frame) = self.frames.next().map_err(|e| wire::answer(METHOD, e))? {
            self.take(frame)?;
        }
        Ok(())
    }

    /// Keeps the error that ends the exchange.
    fn stop_at(&mut self, outcome: Result<(), Error>) -> io::Result<()> {
        outcome.map_err(|error| {
            self.failed = Some(error);
            io::Error::new(io::ErrorKind::InvalidData, "the answer cannot be used")
        })
    }

    fn take(&mut self, frame: Frame) -> Result<(), Error> {
        match frame {
            Frame::Head { message, data_len } => self.head(message, data_len),
            Frame::Data(bytes) => {
                self.data(bytes.len())?;
                let mut bytes = &bytes[..];
                while let (Some(open), false) = (&self.open, bytes.is_empty()) {
                    let room = self.sink.room(open.slot);
                    let (now, later) = bytes.split_at(bytes.len().min(room.len()));
                    room[..now.len()].copy_from_slice(now);
                    self.sink.landed(open.slot, now.len());
                    bytes = later;
                }
                Ok(())
            }
            Frame::End => {
                self.end();
                Ok(())
            }
        }
    }

    fn head(&mut self, message: Bytes, data_len: u64) -> Result<(), Error> {
        let head = v1::GetResponse::decode(message).map_err(|e| wire::answer(METHOD, e))?;
        if head.context.is_some() {
            self.inner.heard(head.context.as_ref());
            self.inner.heard_of(&head.seconds);
        }
        let slot = head.block as usize;
        if self.skipped == Some(slot) {
            return Ok(());
        }
        self.skipped = None;
        if slot >= self.got.len() || self.got[slot].is_some() {
            return Err(unexpected(format!(
                "block {slot} was not asked for, or came twice"
            )));
        }
        let outcome = GetOutcome::from_wire(head.outcome)
            .ok_or_else(|| unexpected(format!("outcome {} is not known", head.outcome)))?;
        if outcome != GetOutcome::Hit {
            if data_len > 0 {
                return Err(unexpected(format!(
                    "block {slot} is {outcome} and has data"
                )));
            }
            if self.open.take_if(|open| open.slot == slot).is_some() {
                self.sink.spoil(slot);
            }
            self.got[slot] = Some(Got {
                outcome,
                tier: None,
                length_bytes: 0,
            });
            return Ok(());
        }
        if let Some(header) = head.header {
            self.begin(slot, &header, head.tier)?;
            if self.skipped == Some(slot) {
                return Ok(());
            }
        }
        match &self.open {
            Some(open) if open.slot == slot && open.at == head.offset => Ok(()),
            _ => Err(unexpected(format!(
                "block {slot} goes on where it did not stop"
            ))),
        }
    }

    fn begin(&mut self, slot: usize, header: &v1::BlockHeader, tier: i32) -> Result<(), Error> {
        if self.open.is_some() {
            return Err(unexpected(format!("block {slot} begins inside another")));
        }
        let key = self.wanted.key(slot);
        let header = convert::header(header, self.wanted.namespace.header_rules())
            .ok()
            .filter(|header| header.key == key && header.check_seal());
        let Some(header) = header else {
            self.corrupt(slot, &key);
            self.skipped = Some(slot);
            return Ok(());
        };
        let length = usize::try_from(header.length_bytes).unwrap_or(usize::MAX);
        self.sink.open(slot, length)?;
        self.open = Some(Open {
            slot,
            header,
            tier: TierKind::from_wire(tier),
            at: 0,
        });
        Ok(())
    }

    fn corrupt(&mut self, slot: usize, key: &BlockKey) {
        tracing::warn!(%key, "block does not match its checksums and was dropped");
        self.sink.spoil(slot);
        self.got[slot] = Some(Got {
            outcome: GetOutcome::Corrupt,
            tier: None,
            length_bytes: 0,
        });
    }

    /// `length` bytes of payload have come; refused when the block has no room for them.
    fn data(&mut self, length: usize) -> Result<(), Error> {
        if self.skipped.is_some() {
            return Ok(());
        }
        let open = self
            .open
            .as_mut()
            .ok_or_else(|| unexpected("data without a block"))?;
        open.at += length as u64;
        if open.at > open.header.length_bytes {
            return Err(unexpected(format!(
                "block {} is longer than its header says",
                open.slot
            )));
        }
        Ok(())
    }

    fn end(&mut self) {
        let whole = |open: &mut Open| open.at == open.header.length_bytes;
        let Some(open) = self.open.take_if(whole) else {
            return;
        };
        let sums = self.sink.close(open.slot);
        if open.header.check(&sums).is_err() {
            return self.corrupt(open.slot, &open.header.key);
        }
        self.got[open.slot] = Some(Got {
            outcome: GetOutcome::Hit,
            tier: open.tier,
            length_bytes: open.header.length_bytes as usize,
        });
    }

    pub(super) fn finish(self) -> Result<Vec<Got>, Error> {
        let got: Option<Vec<Got>> = self.got.into_iter().collect();
        match (got, self.open) {
            (Some(got), None) => Ok(got),
            _ => Err(Error::Truncated {
                method: METHOD.name,
            }),
        }
    }
}

fn unexpected(problem: impl ToString) -> Error {
    wire::answer(METHOD, problem)
}
