//! Invalidate: forgotten in the index at once, and on disk before it is answered.

use kvproto::{NamespaceId, convert::request::Target};

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
        let forgotten = self.engine.invalidate(namespace, target);
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
