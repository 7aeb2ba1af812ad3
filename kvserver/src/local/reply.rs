//! An answer on its way out: a message, or that to a get in its fixed layout.

use kvproto::{
    TierKind,
    convert::AnswerContext,
    local::{
        self, LocalFrameError,
        fixed::{self, GotHead, Spot, Telling},
    },
    v1::{self, local_reply::Answer},
};

use super::Refused;
use crate::{blocks::get::Found, tier::BlockRef};

/// What a call is answered.
pub(super) enum Reply {
    Message(v1::LocalReply),
    /// To a get that came in the fixed layout.
    Got {
        sequence: u64,
        got: Got,
    },
}

/// The answer to a get.
pub(super) struct Got {
    pub(super) context: AnswerContext,
    pub(super) blocks: Vec<Found>,
    /// As in `LocalGot`.
    pub(super) hold: u64,
    /// As there.
    pub(super) seconds: Vec<v1::SecondOwner>,
}

impl Reply {
    pub(super) fn message(sequence: u64, answer: Answer) -> Self {
        Self::Message(v1::LocalReply {
            sequence,
            answer: Some(answer),
        })
    }

    pub(super) fn refusal(sequence: u64, refused: Refused) -> Self {
        let refusal = v1::LocalRefusal {
            reason: refused.reason.to_wire() as i32,
            message: refused.message,
        };
        Self::message(sequence, Answer::Refused(refusal))
    }

    /// What it tells a reader to be done with; 0: nothing.
    pub(super) fn hold(&self) -> u64 {
        match self {
            Self::Got { got, .. } => got.hold,
            Self::Message(v1::LocalReply {
                answer: Some(Answer::Got(got)),
                ..
            }) => got.hold,
            Self::Message(_) => 0,
        }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), LocalFrameError> {
        match self {
            Self::Message(reply) => local::encode(reply, out),
            // Members and second owners have no fixed layout, and travel seldom.
            Self::Got { sequence, got }
                if !(got.context.members.is_empty() && got.seconds.is_empty()) =>
            {
                Self::message(*sequence, Answer::Got(got.to_wire())).encode(out)
            }
            Self::Got { sequence, got } => {
                let head = GotHead {
                    sequence: *sequence,
                    boot_id: got.context.boot_id,
                    view_digest: got.context.view_digest,
                    queue: got.context.queue,
                    hold: got.hold,
                };
                fixed::encode_got(&head, got.blocks.iter().map(telling), out)
            }
        }
    }
}

impl Got {
    pub(super) fn to_wire(&self) -> v1::LocalGot {
        v1::LocalGot {
            context: Some((&self.context).into()),
            blocks: self.blocks.iter().map(to_wire).collect(),
            hold: self.hold,
            seconds: self.seconds.clone(),
        }
    }
}

fn spot(block: &BlockRef) -> Option<Spot> {
    block.location().map(|location| Spot {
        segment: location.segment,
        offset: location.offset,
        generation: location.generation,
    })
}

fn telling(found: &Found) -> Telling<'_> {
    match found {
        Found::Hit { bytes, tier } => Telling::Hit {
            header: bytes.header(),
            tier: *tier,
            spot: spot(bytes),
        },
        Found::Gone(outcome) => Telling::Not(*outcome),
    }
}

fn to_wire(found: &Found) -> v1::LocalBlock {
    let hit = |block: &BlockRef, tier: TierKind| v1::LocalBlock {
        outcome: kvproto::GetOutcome::Hit.to_wire() as i32,
        header: Some(block.header().into()),
        tier: tier.to_wire() as i32,
        place: spot(block).map(|spot| v1::LocalPlace {
            segment: spot.segment,
            offset: spot.offset,
            generation: spot.generation,
        }),
    };
    match found {
        Found::Hit { bytes, tier } => hit(bytes, *tier),
        Found::Gone(outcome) => v1::LocalBlock {
            outcome: outcome.to_wire() as i32,
            ..v1::LocalBlock::default()
        },
    }
}
