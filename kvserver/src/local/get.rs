//! Get: where each block lies, and what its bytes sum up to.
//!
//! ```text
//! block      b0  b1  b2  b3  b4            lease covers b0 to b2
//! kept by    lease   lease   hold, hold    the hold draws on the owner's lease budget; where that does not reach,
//!                                          the block is answered overloaded
//! ```
//!
//! A block in ordinary memory (a leased one that found no slot) has no place: its reader gets it over gRPC.

use kvproto::convert::request;

use super::{Refused, reply::Got, session::Session};
use crate::{blocks::get::Found, clock::Tick, telemetry::metrics::GetTally, tier::BlockRef};

impl Session {
    pub(super) fn get(
        &mut self,
        asked: request::Get,
        deadline: Tick,
    ) -> Result<(Got, GetTally), Refused> {
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
        let mut seconds = Vec::new();
        if !asked.context.no_forward {
            plan.asks_peers(deadline);
            seconds = plan.seconds().into_iter().map(Into::into).collect();
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
            let Some((_, found)) = self.wait(plan.next_kept(keeps), deadline)? else {
                break;
            };
            if let Found::Hit { bytes, .. } = &found
                && bytes.location().is_some()
            {
                let metrics = &self.shared.metrics.local;
                metrics.get_bytes.inc_by(bytes.len_bytes());
            }
            blocks.push(found);
        }
        let now = self.shared.clock.now();
        let got = Got {
            context: self.answer(&asked.context),
            blocks,
            hold: self.holds.keep(kept, hold, now),
            seconds,
        };
        Ok((got, plan.into_tally()))
    }
}
