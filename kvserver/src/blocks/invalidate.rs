//! Invalidate: forgotten in the index at once, and on disk before it is answered.

use kvproto::{NamespaceId, RequestId, convert::request::Target};
use xxhash_rust::xxh3::xxh3_64;

use super::{Blocks, BlocksError, mover::MAX_OWED};
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
        let forgotten = self.engine.invalidate_as(id, namespace, target);
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
            let mut keys = self.mover.owed_removals(kind, namespace);
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
        Ok(forgotten.len() as u64)
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
