//! Hold: blocks that stay where they lie in the node's memory, until they are let go.
//!
//! ```text
//! ask ─► where each block lies ─► Here ─┬─ read: one copy, verified, as a get does it
//!                                       └─ dropped: the node is told with the next call, or soon
//!
//! Held   block 0 1 2 3 4 5
//!              a a - b b a      a, b: nodes on this host, a Here each      -: lies elsewhere, to be got
//! ```
//!
//! For callers that want a part of what they asked for, or want it later. What is held is not promised for
//! ever: the node ends a hold after its time (10 s by default), and [`Held::read`] then answers `expired`.
//!
//! Units: blocks, bytes.
//! Errors: none; what cannot be held is to be got.
//! Why a hold keeps a connection: the node lets go of everything held over a connection when that closes, so
//! a caller that dies holds nothing.

use std::sync::Arc;

use kvgpu::ReadSegment;
use kvproto::{FieldError, GetOutcome, TierKind};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Local,
    attachment::{Attachment, Turn},
    error::LocalError,
    read::{Asked, Said, copy, toward},
    segments::Mapped,
};
use crate::{
    call::{Deadline, Inner},
    clock::within,
    error::Error,
    get::{Wanted, sink::Destinations},
};

/// Blocks that are held in the memory of nodes on this host, and those asked for that were not there. Keeps one of the
/// client's connections to each of these nodes until it is dropped, which may be done on any thread.
pub struct Held {
    nodes: Vec<Here>,
    /// Of each block which node was asked, and its number there; `None`: one that is not on this host.
    blocks: Vec<Option<(usize, usize)>>,
}

/// What one node holds.
pub(crate) struct Here {
    attachment: Arc<Attachment>,
    turn: Option<Turn>,
    _permit: OwnedSemaphorePermit,
    hold: u64,
    said: Vec<Said>,
    segments: Mapped<ReadSegment>,
}

/// Holds what was asked for. `None`: not this way.
pub(crate) async fn hold(inner: &Inner, deadline: Deadline, wanted: &Wanted<'_>) -> Option<Here> {
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
    let here = Here {
        attachment: way.attachment.clone(),
        turn: Some(turn),
        _permit: permit,
        hold,
        said,
        segments,
    };
    Some(here)
}

impl Held {
    /// What the one node there is holds. `None`: it has blocks that cannot be held.
    pub(crate) fn of_one(here: Here, count: usize) -> Option<Self> {
        let mut held = Self::nothing(count);
        held.add(here, 0..count, |_| true);
        (!(0..count).any(|i| held.is_elsewhere(i))).then_some(held)
    }

    /// Of so many blocks none is held yet.
    pub(crate) fn nothing(count: usize) -> Self {
        Self {
            nodes: Vec::new(),
            blocks: vec![None; count],
        }
    }

    /// A node holds blocks: its numbers from 0 on are the caller's `numbers`. Of those of which it does not know where else
    /// they may lie (`knows`), it only says which it holds; answers the numbers of the others that it lacks.
    pub(crate) fn add(
        &mut self,
        here: Here,
        numbers: impl Iterator<Item = usize>,
        knows: impl Fn(usize) -> bool,
    ) -> Vec<usize> {
        let mut lacking = Vec::new();
        for (there, number) in numbers.take(here.said.len()).enumerate() {
            if !here.can_tell(there) {
                continue;
            }
            if here.outcome(there) == GetOutcome::Hit || knows(number) {
                self.blocks[number] = Some((self.nodes.len(), there));
            } else {
                lacking.push(number);
            }
        }
        self.nodes.push(here);
        lacking
    }

    fn at(&self, i: usize) -> Option<(&Here, usize)> {
        self.blocks[i].map(|(node, there)| (&self.nodes[node], there))
    }

    /// Blocks asked for, held or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing was asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The numbers of those that are held, in order.
    pub fn held(&self) -> impl Iterator<Item = usize> {
        (0..self.len()).filter(|i| self.outcome(*i) == GetOutcome::Hit)
    }

    /// Whether block `i` of those asked for lies with a node that is not on this host, or where it cannot be shared: it
    /// is to be got.
    ///
    /// # Panics
    /// When `i` is not below [`Held::len`].
    #[must_use]
    pub fn is_elsewhere(&self, i: usize) -> bool {
        self.blocks[i].is_none()
    }

    /// What became of block `i` of those asked for; [`GetOutcome::Hit`]: it is held; [`GetOutcome::Node`] where it
    /// [lies elsewhere](Held::is_elsewhere).
    ///
    /// # Panics
    /// When `i` is not below [`Held::len`].
    #[must_use]
    pub fn outcome(&self, i: usize) -> GetOutcome {
        let at = self.at(i);
        at.map_or(GetOutcome::Node, |(here, there)| here.outcome(there))
    }

    /// Its length and where it was, if it is held.
    ///
    /// # Panics
    /// As [`Held::outcome`].
    #[must_use]
    pub fn block(&self, i: usize) -> Option<(usize, Option<TierKind>)> {
        let (here, there) = self.at(i)?;
        match &here.said[there] {
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
        let at = self.at(i);
        at.map_or(Ok(GetOutcome::Node), |(here, there)| here.read(there, into))
    }
}

impl Here {
    /// Whether what is said of block `i` is all there is to say: it is held, or it is not here.
    fn can_tell(&self, i: usize) -> bool {
        match &self.said[i] {
            Said::Found(_) => {
                let segment = self.said[i].segment();
                segment.is_some_and(|name| self.segments.get(name).is_some())
            }
            Said::Elsewhere => false,
            Said::Not(_) => true,
        }
    }

    fn outcome(&self, i: usize) -> GetOutcome {
        match &self.said[i] {
            Said::Found(_) => GetOutcome::Hit,
            Said::Elsewhere => GetOutcome::Miss,
            Said::Not(outcome) => *outcome,
        }
    }

    fn read(&self, i: usize, into: &mut [u8]) -> Result<GetOutcome, Error> {
        let Said::Found(found) = &self.said[i] else {
            return Ok(self.outcome(i));
        };
        let Some(segment) = self.said[i].segment().and_then(|s| self.segments.get(s)) else {
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

impl Drop for Here {
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
            .field("blocks", &self.blocks.len())
            .field("nodes", &self.nodes.len())
            .finish_non_exhaustive()
    }
}
