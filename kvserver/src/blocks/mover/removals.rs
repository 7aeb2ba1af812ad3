//! Removals that tiers still owe: what was invalidated and is not yet known to stay gone after a restart.
//!
//! ```text
//! invalidate ─► owed ─► tier.remove ─Ok──► paid
//!                 ▲         └─ Err, or whoever waited has gone: still owed
//!                 ├── the same namespace is invalidated again: asked with it, and answered with it
//!                 └── every `REMOVALS_PAUSE`: asked again by itself
//! ```
//!
//! The index forgets at once, so a second invalidation finds nothing there; only this table knows that a tier
//! has yet to be told. A key that the tier holds anew owes nothing: the new record has taken the old one's place.
//! Bounds: [`MAX_OWED`] keys; from then on invalidations are refused as a whole, before anything is forgotten. One
//! call may overstep it by what the index held. A restart forgets the table: who was told of an error asks again.
//! Errors: the tier's own.

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use futures_util::FutureExt;
use kvproto::{BlockKey, NamespaceId, Reason, TierKind};

use super::Mover;
use crate::tier::Tier;

/// Keys that tiers may owe before invalidations are refused: 72 bytes each.
pub(crate) const MAX_OWED: usize = 262_144;

/// Pause between two attempts in the background.
const REMOVALS_PAUSE: Duration = Duration::from_secs(1);

/// How long one attempt may take; tiers have deadlines of their own, within this …
const REMOVAL_DEADLINE: Duration = Duration::from_secs(30);

/// … and the one at the node's end, whose time others need too.
const LAST_ATTEMPT: Duration = Duration::from_secs(2);

/// What each tier owes. A leaf among locks.
#[derive(Default)]
pub(super) struct Removals {
    /// Under each key, which attempt was the last: only that one, or a later one, pays.
    owed: HashMap<(TierKind, BlockKey), u64>,
    attempts: u64,
}

impl Removals {
    /// An attempt begins.
    fn owe(&mut self, tier: TierKind, keys: &[BlockKey]) -> u64 {
        self.attempts += 1;
        let attempt = self.attempts;
        self.owed
            .extend(keys.iter().map(|key| ((tier, *key), attempt)));
        attempt
    }

    /// An attempt has succeeded. What a later one has yet to do stays owed.
    fn pay(&mut self, tier: TierKind, keys: &[BlockKey], attempt: u64) {
        for key in keys {
            if let Some(last) = self.owed.get(&(tier, *key))
                && *last <= attempt
            {
                self.owed.remove(&(tier, *key));
            }
        }
    }

    fn of(&self, tier: TierKind, wanted: impl Fn(&BlockKey, u64) -> bool) -> Vec<BlockKey> {
        let owed = self.owed.iter();
        owed.filter(|((kind, key), attempt)| *kind == tier && wanted(key, **attempt))
            .map(|((_, key), _)| *key)
            .collect()
    }
}

impl Mover {
    /// Makes a tier forget blocks for good. They are owed from this moment until it has said so.
    pub fn remove(
        self: &Arc<Self>,
        tier: &Arc<dyn Tier>,
        keys: Vec<BlockKey>,
    ) -> impl Future<Output = io::Result<()>> + Send + use<> {
        let kind = tier.kind();
        let attempt = self.removals.lock().owe(kind, &keys);
        let removal = tier.remove(&keys);
        let me = Arc::clone(self);
        async move {
            removal.await?;
            me.removals.lock().pay(kind, &keys, attempt);
            Ok(())
        }
    }

    /// Blocks of a namespace that a tier should have forgotten and may still have. Not those that it holds anew.
    #[must_use]
    pub fn owed_removals(&self, tier: TierKind, namespace: NamespaceId) -> Vec<BlockKey> {
        let of_it = |key: &BlockKey, _| key.namespace == namespace;
        let owed = self.removals.lock().of(tier, of_it);
        self.still_owed(tier, owed)
    }

    /// How many removals a tier owes.
    #[must_use]
    pub fn owed_by(&self, tier: TierKind) -> usize {
        let removals = self.removals.lock();
        removals
            .owed
            .keys()
            .filter(|(kind, _)| *kind == tier)
            .count()
    }

    /// Whether so many removals are owed that no more are taken on.
    #[must_use]
    pub(crate) fn owes_too_much(&self) -> bool {
        self.removals.lock().owed.len() >= MAX_OWED
    }

    /// Without those that the tier has been given anew, which are written off, and those just being given.
    fn still_owed(&self, tier: TierKind, mut keys: Vec<BlockKey>) -> Vec<BlockKey> {
        let mut anew = Vec::new();
        keys.retain(|key| {
            if self.is_writing(tier, key) {
                return false;
            }
            let is_held = self.engine.is_held(key, tier);
            if is_held {
                anew.push(*key);
            }
            !is_held
        });
        if !anew.is_empty() {
            self.removals.lock().pay(tier, &anew, u64::MAX);
        }
        keys
    }

    /// Asks again for what is owed, for as long as the node runs, and once more at its end.
    pub(super) async fn settle_removals(self: Arc<Self>) {
        let mut stopping = false;
        while !stopping {
            // An attempt younger than one pause is in its caller's hands.
            let ripe = self.removals.lock().attempts;
            tokio::select! {
                () = self.stopping.cancelled() => stopping = true,
                () = self.clock.sleep(REMOVALS_PAUSE) => {}
            }
            let ripe = if stopping { u64::MAX } else { ripe };
            for tier in self.tiers.iter() {
                let kind = tier.kind();
                let owed = self.removals.lock().of(kind, |_, attempt| attempt <= ripe);
                let owed = self.still_owed(kind, owed);
                if !owed.is_empty() {
                    self.settle(tier, owed, stopping).await;
                }
            }
        }
    }

    async fn settle(self: &Arc<Self>, tier: &Arc<dyn Tier>, owed: Vec<BlockKey>, stopping: bool) {
        let kind = tier.kind();
        let removal = self.remove(tier, owed.clone());
        // A write that came in between was cancelled by this, or is lost with the old block: the index must
        // not go on to promise it.
        for key in &owed {
            self.engine.lost(key, kind, Reason::Invalidated);
        }
        let (limit, cut) = match stopping {
            true => (LAST_ATTEMPT, futures_util::future::pending().left_future()),
            false => (REMOVAL_DEADLINE, self.stopping.cancelled().right_future()),
        };
        tokio::select! {
            removed = removal => match removed {
                Ok(()) => tracing::info!(tier = %kind, blocks = owed.len(), "what was invalidated is gone for good now"),
                Err(error) => tracing::warn!(%error, tier = %kind, blocks = owed.len(), "cannot make durable yet that invalidated blocks are gone"),
            },
            () = self.clock.sleep(limit) => tracing::warn!(tier = %kind, blocks = owed.len(), "a removal takes too long"),
            () = cut => {}
        }
    }
}
