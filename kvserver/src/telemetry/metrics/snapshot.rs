//! What a scrape shows beside the counters: the state of a node at that moment, as gauges, and all as text.

use kvproto::reason::{Reason, TierKind};
use prometheus::{Encoder, TextEncoder};

use super::Metrics;

/// One tier as a scrape shows it.
#[derive(Clone, Debug)]
pub struct TierFigures {
    /// Which.
    pub kind: TierKind,
    /// Bytes it may hold.
    pub capacity_bytes: u64,
    /// Bytes it holds.
    pub used_bytes: u64,
    /// Blocks it holds.
    pub blocks: u64,
    /// Whether it takes part.
    pub in_service: bool,
    /// Why not, or what limits it.
    pub note: String,
    /// Bytes waiting to be written.
    pub queued_bytes: u64,
    /// Bytes written since midnight UTC.
    pub written_today_bytes: u64,
    /// Invalidated blocks that it could not yet record as gone.
    pub owed_removals: u64,
    /// What it refused or dropped.
    pub drops: Vec<(Reason, u64)>,
}

/// The state of a node at the moment of a scrape.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Milliseconds since the node started.
    pub uptime_ms: u64,
    /// RAM first.
    pub tiers: Vec<TierFigures>,
    /// Arena bytes by state.
    pub arena: Vec<(&'static str, u64)>,
    /// Leases held.
    pub leases: u64,
    /// Bytes that they pin.
    pub leased_bytes: u64,
    /// Bytes of leased blocks that lie in ordinary memory.
    pub lease_overflow_bytes: u64,
    /// Namespaces known.
    pub namespaces: u64,
    /// Blocks that left a tier since start.
    pub removed: Vec<(Reason, u64)>,
    /// Members of the cluster by state.
    pub members: Vec<(&'static str, u64)>,
    /// Those of them that are silent.
    pub suspects: u64,
    /// Changes of the view since start.
    pub view_changes: u64,
    /// Gossip sent, taken, and datagrams refused.
    pub gossip: [u64; 3],
    /// Name of the eviction policy.
    pub policy: String,
}

impl Metrics {
    /// The Prometheus text of everything, with the gauges taken from `snapshot`.
    #[must_use]
    pub fn text(&self, snapshot: &Snapshot) -> String {
        self.show(snapshot);
        let mut out = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut out)
            .expect("writing to memory");
        String::from_utf8(out).expect("the text format is UTF-8")
    }

    fn show(&self, snapshot: &Snapshot) {
        // Two scrapes at once would add the same difference twice.
        let _one_at_a_time = self.scraping.lock();
        #[expect(
            clippy::cast_precision_loss,
            reason = "uptime; whole milliseconds for 285 000 years"
        )]
        self.uptime_seconds.set(snapshot.uptime_ms as f64 / 1e3);
        for tier in &snapshot.tiers {
            let label = [tier.kind.as_str()];
            self.tier_capacity
                .with_label_values(&label)
                .set(signed(tier.capacity_bytes));
            self.tier_used
                .with_label_values(&label)
                .set(signed(tier.used_bytes));
            self.tier_blocks
                .with_label_values(&label)
                .set(signed(tier.blocks));
            self.tier_in_service
                .with_label_values(&label)
                .set(i64::from(tier.in_service));
            self.tier_queued
                .with_label_values(&label)
                .set(signed(tier.queued_bytes));
            self.tier_written_today
                .with_label_values(&label)
                .set(signed(tier.written_today_bytes));
            self.tier_owed_removals
                .with_label_values(&label)
                .set(signed(tier.owed_removals));
            for (reason, count) in &tier.drops {
                self.tier_drops
                    .with_label_values(&[tier.kind.as_str(), reason.as_str()])
                    .set(signed(*count));
            }
        }
        for (state, bytes) in &snapshot.arena {
            self.arena.with_label_values(&[state]).set(signed(*bytes));
        }
        for (reason, count) in &snapshot.removed {
            let counter = self.removed_blocks.with_label_values(&[reason.as_str()]);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
        self.leases.set(signed(snapshot.leases));
        self.leased_bytes.set(signed(snapshot.leased_bytes));
        self.lease_overflow_bytes
            .set(signed(snapshot.lease_overflow_bytes));
        self.namespaces.set(signed(snapshot.namespaces));
        for (state, count) in &snapshot.members {
            self.members.with_label_values(&[state]).set(signed(*count));
        }
        self.suspects.set(signed(snapshot.suspects));
        let catch_up = |counter: &prometheus::IntCounter, to: u64| {
            counter.inc_by(to.saturating_sub(counter.get()));
        };
        catch_up(&self.view_changes, snapshot.view_changes);
        let [sent, received, refused] = snapshot.gossip;
        for (direction, bytes) in [("sent", sent), ("received", received)] {
            catch_up(&self.gossip_bytes.with_label_values(&[direction]), bytes);
        }
        catch_up(&self.gossip_refused, refused);
    }
}

/// Parses the samples (not the comments) of a Prometheus text: name with labels, value.
pub fn samples(text: &str) -> impl Iterator<Item = (&str, f64)> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name, value.parse().ok()?))
        })
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
