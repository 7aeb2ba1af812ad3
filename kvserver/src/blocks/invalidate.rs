//! Invalidate: forgotten in the index at once, and on disk before it is answered.
//!
//! Whoever was away meanwhile forgets it when it comes back, before anybody can ask it: see `catch_up`.

use std::{collections::HashSet, sync::Arc};

use kvproto::{NamespaceId, RequestId, convert::request::Target};
use xxhash_rust::xxh3::xxh3_64;

use super::{
    Blocks, BlocksError,
    invalidations::{Invalidation, Missed},
    mover::MAX_OWED,
};
use crate::engine::{self, Invalidated, TenantId};

impl Blocks {
    /// Forgets a block, everything below a prefix, or a namespace; answers how many blocks.
    ///
    /// Nobody sees them from the moment this begins. When it returns `Ok` they stay gone after a
    /// restart, and so does what earlier calls in the namespace could not make durable.
    ///
    /// # Errors
    /// An unknown namespace, or a tier that could not record it: it is asked again in the background, and a
    /// repeated call asks it at once and answers for it. Too much that could not be recorded yet: nothing was
    /// forgotten.
    pub async fn invalidate(
        &self,
        tenant: TenantId,
        namespace: NamespaceId,
        target: Target,
    ) -> Result<u64, BlocksError> {
        self.invalidate_as(None, tenant, namespace, target).await
    }

    /// As [`Blocks::invalidate`]; `request` names it, at whatever node its caller tells of it. One without a name is the
    /// same as another of the same target.
    ///
    /// # Errors
    /// As there.
    pub async fn invalidate_as(
        &self,
        request: Option<RequestId>,
        tenant: TenantId,
        namespace: NamespaceId,
        target: Target,
    ) -> Result<u64, BlocksError> {
        self.namespaces.get(tenant, namespace)?;
        if self.mover.owes_too_much() {
            return Err(BlocksError::Overloaded {
                what: "removals that a tier could not record yet",
                field: "target",
                limit: MAX_OWED,
            });
        }
        let target = match target {
            Target::Block(hash) => engine::Target::Block(hash),
            Target::Prefix(hash) => engine::Target::Prefix(hash),
            Target::All => engine::Target::All,
        };
        let id = id(request, namespace, target);
        self.invalidations.note(Invalidation {
            // Of one without a name nobody can tell whether a later one is the same.
            id: match request {
                Some(_) => id,
                None => self.clock.random_u64(),
            },
            what: Some((namespace, target)),
        });
        let forgotten = self.engine.invalidate_as(id, namespace, target);
        if let Some(motion) = self.motion() {
            let hash = match target {
                engine::Target::Block(hash) => Some(hash),
                engine::Target::Prefix(_) | engine::Target::All => None,
            };
            motion.forget(namespace, hash);
        }
        self.forget_below(&[namespace], &forgotten).await?;
        Ok(forgotten.len() as u64)
    }

    /// Forgets what another node was told of while this one was away; answers how many blocks.
    ///
    /// # Errors
    /// As [`Blocks::invalidate`]; then it is not known here yet, and has to be asked for again.
    pub(crate) async fn forget_missed(&self, told: Vec<Invalidation>) -> Result<u64, BlocksError> {
        let Missed { mut what, and_more } = self.invalidations.missed(&told);
        if and_more {
            // Nobody remembers all that was invalidated meanwhile.
            let all = self.engine.namespaces().into_iter();
            what.extend(all.map(|namespace| (namespace, engine::Target::All)));
        }
        let mut count = 0;
        if !what.is_empty() {
            let namespaces: HashSet<NamespaceId> = what.iter().map(|(of, _)| *of).collect();
            let namespaces: Vec<NamespaceId> = namespaces.into_iter().collect();
            let engine = Arc::clone(&self.engine);
            // Of a large index it takes as long as reading it all.
            let forgetting = tokio::task::spawn_blocking(move || engine.invalidate_missed(&what));
            let forgotten = match forgetting.await {
                Ok(forgotten) => forgotten,
                Err(failed) if failed.is_panic() => std::panic::resume_unwind(failed.into_panic()),
                Err(_) => return Ok(0), // the node stops, and asks again when it starts
            };
            if let Some(motion) = self.motion() {
                namespaces.iter().for_each(|of| motion.forget(*of, None));
            }
            self.forget_below(&namespaces, &forgotten).await?;
            count = forgotten.len() as u64;
        }
        // Only now, so that a node which dies before it asks again.
        self.invalidations.learn(told);
        Ok(count)
    }

    /// Has the tiers below RAM forget what the index has.
    async fn forget_below(
        &self,
        namespaces: &[NamespaceId],
        forgotten: &[Invalidated],
    ) -> Result<(), BlocksError> {
        // Every tier is told before anything is waited for: a caller that goes away, or a tier that fails, must
        // not leave another tier with what the index has forgotten already.
        let mut removals = Vec::new();
        for tier in self.tiers.iter() {
            let kind = tier.kind();
            // What is on its way down is in the index as a block in RAM, and must not arrive.
            let there = |gone: &&Invalidated| {
                gone.tiers.contains(kind) || self.mover.is_writing(kind, &gone.key)
            };
            // What an earlier call could not make durable: the index knows nothing of it any more.
            let owed = namespaces.iter();
            let owed = owed.flat_map(|namespace| self.mover.owed_removals(kind, *namespace));
            let mut keys: Vec<_> = owed.collect();
            keys.extend(forgotten.iter().filter(there).map(|gone| gone.key));
            if !keys.is_empty() {
                removals.push((kind, self.mover.remove(tier, keys)));
            }
        }
        let mut failed = None;
        for (tier, removal) in removals {
            if let Err(source) = removal.await {
                let owed = self.mover.owed_by(tier);
                failed.get_or_insert(BlocksError::NotForgotten { tier, owed, source });
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        self.metrics
            .invalidated_blocks
            .inc_by(forgotten.len() as u64);
        Ok(())
    }
}

/// A number that every node has for the same invalidation.
fn id(request: Option<RequestId>, namespace: NamespaceId, target: engine::Target) -> u64 {
    let (kind, hash) = match target {
        engine::Target::Block(hash) => (1, hash.0),
        engine::Target::Prefix(hash) => (2, hash.0),
        engine::Target::All => (3, [0; 32]),
    };
    let mut bytes = [0; 65];
    bytes[0] = kind;
    bytes[1..17].copy_from_slice(&namespace.0);
    bytes[17..49].copy_from_slice(&hash);
    bytes[49..].copy_from_slice(&request.map_or([0; 16], |request| request.0));
    xxh3_64(&bytes)
}
