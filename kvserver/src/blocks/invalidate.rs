//! Invalidate: forgotten in the index at once, and on disk before it is answered.

use kvproto::{BlockKey, NamespaceId, convert::request::Target};

use super::{Blocks, BlocksError};
use crate::engine::{self, Invalidated, TenantId};

impl Blocks {
    /// Forgets a block, everything below a prefix, or a namespace; answers how many blocks.
    ///
    /// Nobody sees them from the moment this begins. When it returns `Ok` they stay gone after a
    /// restart.
    ///
    /// # Errors
    /// An unknown namespace, or a tier that could not record it; the call can be repeated.
    pub async fn invalidate(
        &self,
        tenant: TenantId,
        namespace: NamespaceId,
        target: Target,
    ) -> Result<u64, BlocksError> {
        self.namespaces.get(tenant, namespace)?;
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
            let keys: Vec<BlockKey> = forgotten
                .iter()
                .filter(there)
                .map(|gone| gone.key)
                .collect();
            if !keys.is_empty() {
                removals.push((kind, tier.remove(&keys)));
            }
        }
        let mut failed = None;
        for (tier, removal) in removals {
            if let Err(source) = removal.await {
                failed.get_or_insert(BlocksError::NotForgotten { tier, source });
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
