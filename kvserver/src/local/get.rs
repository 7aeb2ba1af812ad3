//! Get: where each block lies, and what its bytes sum up to.
//!
//! ```text
//! block      b0  b1  b2  b3  b4            lease covers b0 to b2
//! kept by    lease   lease   hold, hold    the hold draws on the owner's lease budget; where that does not reach,
//!                                          the block is answered overloaded
//! ```
//!
//! A block in ordinary memory (a leased one that found no slot) has no place: its reader gets it over gRPC.

use kvproto::{GetOutcome, TierKind, convert::request, v1};

use super::{Refused, session::Session};
use crate::{blocks::get::Found, clock::Tick, telemetry::metrics::GetTally, tier::BlockRef};

impl Session {
    pub(super) fn get(
        &mut self,
        wire: v1::GetRequest,
        deadline: Tick,
    ) -> Result<(v1::LocalGot, GetTally), Refused> {
        let asked = request::Get::try_from(wire)?;
        let owner = self.owner(&asked.context)?;
        let parts = asked.parts.len();
        let engine = self.shared.blocks.engine();
        let covered = asked.lease.map_or(0, |lease| {
            engine.covers(lease, owner, asked.namespace, &asked.chain, &asked.parts)
        });
        let mut hold = engine.hold(owner);
        let mut kept = Vec::new();
        let count = asked.chain.len() * parts;
        let plan = self.shared.blocks.get(
            owner,
            asked.namespace,
            asked.chain,
            asked.parts,
            asked.lease,
        )?;
        let mut plan = plan.as_a_whole();
        if !asked.context.no_forward {
            plan.asks_peers(deadline);
        }
        let mut blocks = Vec::with_capacity(count);
        loop {
            let keeps = |number, bytes: &BlockRef| {
                let is_leased = (number as usize) < covered * parts;
                is_leased || bytes.location().is_none() || {
                    let taken = hold.take(bytes.len_bytes());
                    if taken {
                        kept.push(bytes.clone());
                    }
                    taken
                }
            };
            blocks.push(match self.wait(plan.next_kept(keeps), deadline)? {
                Some((_, Found::Hit { bytes, tier })) => self.hit(&bytes, tier),
                Some((_, Found::Gone(outcome))) => gone(outcome),
                None => break,
            });
        }
        let now = self.shared.clock.now();
        let got = v1::LocalGot {
            context: Some((&self.answer(&asked.context)).into()),
            blocks,
            hold: self.holds.keep(kept, hold, now),
        };
        Ok((got, plan.into_tally()))
    }

    fn hit(&self, block: &BlockRef, tier: TierKind) -> v1::LocalBlock {
        let place = block.location().map(|location| v1::LocalPlace {
            segment: location.segment,
            offset: location.offset,
            generation: location.generation,
        });
        if place.is_some() {
            self.shared
                .metrics
                .local
                .get_bytes
                .inc_by(block.len_bytes());
        }
        v1::LocalBlock {
            outcome: GetOutcome::Hit.to_wire() as i32,
            header: Some(block.header().into()),
            tier: tier.to_wire() as i32,
            place,
        }
    }
}

fn gone(outcome: GetOutcome) -> v1::LocalBlock {
    v1::LocalBlock {
        outcome: outcome.to_wire() as i32,
        ..v1::LocalBlock::default()
    }
}
