//! What this node holds and has done, for the console, scrapes and the `Stats` method.

use std::collections::{HashMap, HashSet};

use kvproto::{
    NamespaceId, Reason, TierKind,
    convert::{
        answer::{NamespaceStats, TierStats},
        request::ListNamespaces,
    },
    v1,
};

use super::Blocks;
use crate::{
    engine::TenantId,
    telemetry::metrics::{Snapshot, TierFigures, samples},
};

/// Most namespaces of one page: of the longest texts they are half of what gRPC libraries take in one message.
const PAGE_NAMESPACES: usize = 1024;

impl Blocks {
    /// The node's state at this moment.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let engine = self.engine.stats();
        let arena = self.arena.stats();
        let ram = TierFigures {
            kind: TierKind::Ram,
            capacity_bytes: engine.capacity_bytes,
            used_bytes: engine.kv.used_bytes + engine.checkpoint.used_bytes,
            blocks: engine.kv.blocks + engine.checkpoint.blocks,
            in_service: true,
            note: if arena.huge_pages {
                "huge pages".to_owned()
            } else {
                String::new()
            },
            queued_bytes: 0,
            written_today_bytes: 0,
            owed_removals: 0,
            drops: Vec::new(),
        };
        let below = self.tiers.iter().map(|tier| {
            let status = tier.status();
            TierFigures {
                kind: tier.kind(),
                capacity_bytes: status.capacity_bytes,
                used_bytes: status.used_bytes,
                blocks: status.blocks,
                in_service: status.in_service,
                note: status.note,
                queued_bytes: status.queued_bytes,
                written_today_bytes: status.written_bytes_today,
                owed_removals: self.mover.owed_by(tier.kind()) as u64,
                drops: status.drops,
            }
        });
        let absent = self.tiers.absent.iter().map(|(kind, why)| TierFigures {
            kind: *kind,
            capacity_bytes: 0,
            used_bytes: 0,
            blocks: 0,
            in_service: false,
            note: why.clone(),
            queued_bytes: 0,
            written_today_bytes: 0,
            owed_removals: 0,
            drops: Vec::new(),
        });
        let removed = Reason::ALL
            .iter()
            .map(|reason| (*reason, engine.removed.gone(*reason)));
        Snapshot {
            uptime_ms: self
                .clock
                .now()
                .since(self.started)
                .as_millis()
                .try_into()
                .unwrap_or(u64::MAX),
            tiers: std::iter::once(ram).chain(below).chain(absent).collect(),
            arena: vec![
                ("capacity", arena.capacity_bytes),
                ("ready", arena.ready_bytes),
                ("used", arena.used_bytes),
                ("requested", arena.requested_bytes),
                ("largest_free", arena.largest_free_bytes),
            ],
            leases: engine.leases,
            leased_bytes: engine.leased_bytes,
            lease_overflow_bytes: engine.overflow_bytes,
            namespaces: self.namespaces.len() as u64,
            removed: removed.filter(|(_, count)| *count > 0).collect(),
            policy: engine.policy.to_owned(),
            members: self.cluster.counts().to_vec(),
            suspects: self.cluster.suspects() as u64,
            view_changes: self.cluster.view_changes(),
            gossip: self.cluster.traffic().totals(),
        }
    }

    /// Everything that a scrape would show.
    #[must_use]
    pub fn metrics_text(&self) -> String {
        self.metrics.text(&self.snapshot())
    }

    /// The answer of `Stats`, but for its context.
    #[must_use]
    pub fn stats(&self) -> v1::StatsResponse {
        let snapshot = self.snapshot();
        let text = self.metrics.text(&snapshot);
        let tiers = snapshot.tiers.into_iter().map(|tier| {
            TierStats {
                tier: tier.kind,
                capacity_bytes: tier.capacity_bytes,
                used_bytes: tier.used_bytes,
                blocks: tier.blocks,
                in_service: tier.in_service,
                note: tier.note,
            }
            .into()
        });
        v1::StatsResponse {
            context: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: snapshot.uptime_ms,
            tiers: tiers.collect(),
            leases: snapshot.leases,
            leased_bytes: snapshot.leased_bytes,
            connections: self.metrics.connections(),
            namespaces: snapshot.namespaces,
            policy: snapshot.policy,
            counters: samples(&text)
                .map(|(name, value)| v1::Counter {
                    name: name.to_owned(),
                    value,
                })
                .collect(),
        }
    }
    /// A page of the namespaces of a tenant, by id. And the id after which the next page begins, where there is one.
    #[must_use]
    pub fn list_namespaces(
        &self,
        tenant: TenantId,
        asked: &ListNamespaces,
    ) -> (Vec<NamespaceStats>, Option<NamespaceId>) {
        let name = self.tenants.name(tenant);
        let label = asked.label.as_deref();
        let (listed, and_more) = self
            .namespaces
            .list(name, label, asked.after, PAGE_NAMESPACES);
        let next = listed.last().map(|last| last.space.id);
        let holdings = match asked.names_only || listed.is_empty() {
            true => HashMap::new(),
            false => {
                let ids: HashSet<NamespaceId> = listed.iter().map(|known| known.space.id).collect();
                self.engine.holdings(&ids)
            }
        };
        let stats = listed.into_iter().map(|known| {
            let holding = holdings.get(&known.space.id).copied().unwrap_or_default();
            NamespaceStats {
                id: known.space.id,
                namespace: (*known.space.shape).clone(),
                replicas: known.space.replicas as u32,
                is_latest: known.is_latest,
                blocks: holding.blocks,
                bytes: holding.bytes,
            }
        });
        (stats.collect(), next.filter(|_| and_more))
    }
}
