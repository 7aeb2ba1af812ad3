//! Lookup: one synchronous question to the engine, then promotions in the background.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use kvproto::{
    LeaseId,
    convert::{answer, request},
};

use super::{Blocks, BlocksError};
use crate::engine::{LeaseAsk, LookupQuery, Owner};

impl Blocks {
    /// The longest prefix present of one chain, and a lease on it unless it is a probe. What is leased
    /// and below RAM starts to come up.
    ///
    /// # Errors
    /// An unknown namespace, or a chain that is not valid in it.
    pub fn lookup(
        &self,
        owner: Owner,
        asked: &request::Lookup,
    ) -> Result<answer::Lookup, BlocksError> {
        let known = self.namespaces.get(owner.tenant, asked.namespace)?;
        asked.chain.validate(known.run_blocks)?;
        let lease = (!asked.probe).then_some(LeaseAsk {
            owner,
            ttl_ms: asked.lease_ttl_ms.map_or(0, u64::from),
            idempotency: asked.idempotency_key,
            id: asked.lease,
        });
        // A peer is handed nothing that others may have been told to forget.
        if asked.context.no_forward && self.cluster.is_behind() {
            return Ok(answer::Lookup::default());
        }
        // Before it is looked: what this node is told of afterwards, the blocks may not have survived.
        let survived = match asked.context.no_forward {
            true => self.engine.survived(asked.namespace, &asked.chain.hashes),
            false => Vec::new(),
        };
        let found = self.engine.lookup(LookupQuery {
            namespace: asked.namespace,
            chain: &asked.chain,
            parts: &asked.parts,
            lease,
        });
        self.metrics.lookup_asked.inc_by(asked.chain.len() as u64);
        self.metrics
            .lookup_present
            .inc_by(found.present_blocks.into());
        self.mover.prefetch(found.promote);
        // A peer asks for what is here, and a probe looks at it.
        let motion = self.motion().filter(|_| !asked.context.no_forward);
        let seconds = motion.map_or_else(Vec::new, |motion| {
            motion.seconds_of(asked.namespace, &asked.chain, known.run_blocks)
        });
        Ok(answer::Lookup {
            present_blocks: found.present_blocks,
            tiers: found.tiers,
            lease: found.lease.map(|lease| answer::Lease {
                id: lease.id,
                ttl_ms: narrow(lease.ttl_ms),
                blocks: lease.blocks,
                bytes: lease.bytes,
            }),
            seconds,
            survived,
        })
    }

    /// As [`Blocks::lookup`]; where blocks may still lie with another node it first waits for them, a little while.
    ///
    /// # Errors
    /// As there.
    pub async fn lookup_in_motion(
        self: &Arc<Self>,
        owner: Owner,
        asked: &request::Lookup,
        time_left: Duration,
    ) -> Result<answer::Lookup, BlocksError> {
        if let Some(moved) = self.awaited(owner, asked, time_left)? {
            moved.await;
        }
        self.lookup(owner, asked)
    }

    /// What a lookup should wait for; `None`, and that nearly always: nothing.
    fn awaited(
        &self,
        owner: Owner,
        asked: &request::Lookup,
        time_left: Duration,
    ) -> Result<Option<BoxFuture<'static, ()>>, BlocksError> {
        let Some(motion) = self.motion() else {
            return Ok(None);
        };
        // A peer asks for what is here, or is on its way already.
        if asked.context.no_forward {
            let Some(space) = self.spaces().get(&asked.namespace) else {
                return Ok(None);
            };
            asked.chain.validate(space.run_blocks())?;
            return Ok(motion.under_way(&space, &asked.chain, asked.probe, time_left / 2));
        }
        // A probe leaves no trace.
        if asked.probe {
            return Ok(None);
        }
        let is_young = motion.may_ask(1);
        if !is_young && !self.namespaces.any_replicated() {
            return Ok(None);
        }
        let known = self.namespaces.get(owner.tenant, asked.namespace)?;
        if !is_young && known.replicas < 2 {
            return Ok(None);
        }
        asked.chain.validate(known.run_blocks)?;
        let space = self.spaces().get(&asked.namespace);
        let space = space.ok_or(BlocksError::UnknownNamespace(asked.namespace))?;
        Ok(Some(motion.bring_prefix(
            &space,
            &asked.chain,
            &asked.parts,
            time_left,
        )))
    }

    /// Prolongs a lease; the time it now has, or `None` when it is gone.
    pub fn renew(&self, owner: Owner, lease: LeaseId, ttl_ms: Option<u32>) -> Option<u32> {
        self.engine
            .renew(lease, owner, ttl_ms.map_or(0, u64::from))
            .map(narrow)
    }

    /// Gives a lease back; whether it was still there.
    pub fn release(&self, owner: Owner, lease: LeaseId) -> bool {
        self.engine.release(lease, owner)
    }
}

fn narrow(ttl_ms: u64) -> u32 {
    u32::try_from(ttl_ms).unwrap_or(u32::MAX)
}
