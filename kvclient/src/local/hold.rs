//! Hold: blocks that stay where they lie in the node's memory, until they are let go.
//!
//! ```text
//! ask ─► where each block lies ─► Held ─┬─ read: one copy, verified, as a get does it
//!                                       └─ dropped: the node is told with the next call, or soon
//! ```
//!
//! For callers that want a part of what they asked for, or want it later. What is held is not promised for
//! ever: the node ends a hold after its time (10 s by default), and [`Held::read`] then answers `expired`.
//!
//! Units: blocks, bytes.
//! Errors: none; what cannot be held is to be got.
//! Why a hold keeps a connection: the node lets go of everything held over a connection when that closes, so
//! a caller that dies holds nothing.

use std::{collections::HashMap, sync::Arc};

use kvgpu::ReadSegment;
use kvproto::{FieldError, GetOutcome, TierKind};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Local,
    attachment::{Attachment, Turn},
    error::LocalError,
    read::{Asked, Said, copy, toward},
};
use crate::{
    call::{Deadline, Inner},
    clock::within,
    error::Error,
    get::{Wanted, sink::Destinations},
};

/// Blocks of the node's memory that are held, and those asked for that were not there. Keeps one of the
/// client's connections on the same host until it is dropped, which may be done on any thread.
pub struct Held {
    attachment: Arc<Attachment>,
    turn: Option<Turn>,
    _permit: OwnedSemaphorePermit,
    hold: u64,
    said: Vec<Said>,
    segments: HashMap<u32, Arc<ReadSegment>>,
}

/// Holds what was asked for. `None`: not this way.
pub(crate) async fn hold(inner: &Inner, deadline: Deadline, wanted: &Wanted<'_>) -> Option<Held> {
    let way = Local::way(inner, deadline).await?;
    // One link is never kept: calls would wait for it until their time is up.
    let permit = within(&*inner.clock, way.until, way.attachment.hold_permit()).await?;
    let taken = way.take(async |turn| way.ask(turn, wanted).await);
    let (asked, turn) = taken.await?.ok()?;
    let Asked {
        said,
        segments,
        hold,
    } = asked;
    let held = Held {
        attachment: way.attachment.clone(),
        turn: Some(turn),
        _permit: permit,
        hold,
        said,
        segments,
    };
    let is_mapped = |said: &Said| match said {
        Said::Found(_) => said
            .segment()
            .is_some_and(|name| held.segments.contains_key(&name)),
        Said::Elsewhere => false,
        Said::Not(_) => true,
    };
    let is_whole = held.said.len() == wanted.count() && held.said.iter().all(is_mapped);
    is_whole.then_some(held)
}

impl Held {
    /// Blocks asked for, held or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.said.len()
    }

    /// Whether nothing was asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.said.is_empty()
    }

    /// What became of block `i` of those asked for; [`GetOutcome::Hit`]: it is held.
    ///
    /// # Panics
    /// When `i` is not below [`Held::len`].
    #[must_use]
    pub fn outcome(&self, i: usize) -> GetOutcome {
        match &self.said[i] {
            Said::Found(_) => GetOutcome::Hit,
            Said::Elsewhere => GetOutcome::Miss,
            Said::Not(outcome) => *outcome,
        }
    }

    /// Its length and where it was, if it is held.
    ///
    /// # Panics
    /// As [`Held::outcome`].
    #[must_use]
    pub fn block(&self, i: usize) -> Option<(usize, Option<TierKind>)> {
        match &self.said[i] {
            Said::Found(found) => Some((found.header.length_bytes as usize, found.tier)),
            _ => None,
        }
    }

    /// Copies block `i` to `into`, at least as long, and verifies it there. Anything but a hit: what lies
    /// there means nothing.
    ///
    /// # Errors
    /// [`Error::Request`] when it does not fit.
    ///
    /// # Panics
    /// As [`Held::outcome`].
    pub fn read(&self, i: usize, into: &mut [u8]) -> Result<GetOutcome, Error> {
        let Said::Found(found) = &self.said[i] else {
            return Ok(self.outcome(i));
        };
        let Some(segment) = self.said[i].segment().and_then(|s| self.segments.get(&s)) else {
            return Err(FieldError::new("block", "lies in a segment that is not mapped").into());
        };
        let toward = toward(found.header.length_bytes);
        match copy(
            segment,
            found,
            0,
            toward,
            &mut Destinations::new(&mut [into]),
        ) {
            Ok(outcome) => Ok(outcome),
            Err(LocalError::Field(problem)) => Err(problem.into()),
            Err(error) => {
                tracing::warn!(%error, "a block that is held cannot be read");
                Ok(GetOutcome::Device)
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(mut turn) = self.turn.take() {
            if self.hold != 0 {
                turn.link.done.push(self.hold);
            }
            self.attachment.keep(turn);
        }
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held")
            .field("blocks", &self.said.len())
            .finish_non_exhaustive()
    }
}
