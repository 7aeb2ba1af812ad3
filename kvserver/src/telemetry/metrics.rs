//! Every metric of a node.
//!
//! ```text
//! hot path ──► counters, resolved once at start, one atomic add each      count.rs
//! scrape   ──► Snapshot (engine, arena, tiers) ──► gauges ──► text        snapshot.rs
//!              names.rs spells every name, labels.rs every closed set of our own, make.rs registers
//! ```
//!
//! Units are in the names. Labels are closed sets: methods, tiers, reasons, outcomes, gRPC codes.
//! Errors: none at run time; two metrics of one name are a bug that `new` would panic on.

mod count;
mod labels;
mod local;
mod make;
mod motion;
pub mod names;
mod snapshot;

use std::sync::Arc;

use kvproto::reason::PutOutcome;
use prometheus::{
    GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use self::make::Make;
pub use self::{
    count::GetTally,
    labels::{LocalCall, Method, Source},
    local::LocalMetrics,
    motion::MotionMetrics,
    names::NAMES,
    snapshot::{Snapshot, TierFigures, samples},
};
use super::process::Process;

/// All metrics of one node.
pub struct Metrics {
    registry: Registry,
    scraping: parking_lot::Mutex<()>,
    uptime_seconds: prometheus::Gauge,
    calls: IntCounterVec,
    call_ok: Vec<IntCounter>,
    call_seconds: Vec<Histogram>,
    /// Calls being served.
    pub calls_in_flight: IntGauge,
    /// Connections over TCP.
    pub tcp_connections: IntGauge,
    /// Connections over the Unix socket.
    pub unix_connections: IntGauge,
    /// Watch streams open.
    pub watchers: IntGauge,
    get_asked: IntCounter,
    get_blocks: Vec<IntCounter>,
    get_bytes: IntCounter,
    put_blocks: Vec<(PutOutcome, IntCounter)>,
    /// Bytes taken in by puts.
    pub put_bytes: IntCounter,
    put_refused: IntCounterVec,
    /// Blocks that lookups were asked for.
    pub lookup_asked: IntCounter,
    /// Blocks that lookups found.
    pub lookup_present: IntCounter,
    /// Blocks forgotten because somebody asked for it.
    pub invalidated_blocks: IntCounter,
    removed_blocks: IntCounterVec,
    mover_writes: IntCounterVec,
    mover_drops: IntCounterVec,
    mover_reads: IntCounterVec,
    /// Time of one read from a lower tier.
    pub mover_read_seconds: Histogram,
    tier_capacity: IntGaugeVec,
    tier_used: IntGaugeVec,
    tier_blocks: IntGaugeVec,
    tier_in_service: IntGaugeVec,
    tier_queued: IntGaugeVec,
    tier_written_today: IntGaugeVec,
    tier_drops: IntGaugeVec,
    tier_owed_removals: IntGaugeVec,
    arena: IntGaugeVec,
    leases: IntGauge,
    leased_bytes: IntGauge,
    lease_overflow_bytes: IntGauge,
    namespaces: IntGauge,
    members: IntGaugeVec,
    suspects: IntGauge,
    view_changes: IntCounter,
    gossip_bytes: IntCounterVec,
    gossip_refused: IntCounter,
    /// The same-host path's.
    pub local: LocalMetrics,
    /// Blocks on their way between nodes.
    pub motion: Arc<MotionMetrics>,
}

impl Metrics {
    /// All metrics at zero, in a registry of their own (nodes of one process do not mix).
    ///
    /// # Panics
    /// When two metrics have one name, which is a bug in this file.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let registry = Registry::new();
        let r = Make(&registry);
        let calls = r.counters(names::CALLS, "Calls answered.", &["method", "code"]);
        let seconds = r.histograms(names::CALL_SECONDS, "Time per call.", &["method"]);
        let get_blocks = r.counters(
            names::GET_BLOCKS,
            "Blocks of gets by source; sums to those asked.",
            &["source"],
        );
        let put_blocks = r.counters(
            names::PUT_BLOCKS,
            "Blocks of puts by outcome.",
            &["outcome"],
        );
        let connections = r.gauges(names::CONNECTIONS, "Connections open.", &["transport"]);
        let build = r.gauges(names::BUILD_INFO, "The version that runs.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let uptime = GaugeVec::new(
            Opts::new(names::UPTIME_SECONDS, "Seconds since start."),
            &[],
        )
        .expect("a valid name");
        registry
            .register(Box::new(uptime.clone()))
            .expect("names are distinct");
        // Memory and CPU of the process, from /proc.
        let process = Process::new();
        registry
            .register(Box::new(process))
            .expect("names are distinct");

        Arc::new(Self {
            uptime_seconds: uptime.with_label_values::<&str>(&[]),
            call_ok: Method::ALL
                .iter()
                .map(|m| calls.with_label_values(&[m.as_str(), "ok"]))
                .collect(),
            calls,
            call_seconds: Method::ALL
                .iter()
                .map(|m| seconds.with_label_values(&[m.as_str()]))
                .collect(),
            calls_in_flight: r.gauge(names::CALLS_IN_FLIGHT, "Calls being served."),
            tcp_connections: connections.with_label_values(&["tcp"]),
            unix_connections: connections.with_label_values(&["unix"]),
            watchers: r.gauge(names::WATCHERS, "Watch streams open."),
            get_asked: r.counter(names::GET_ASKED, "Blocks that gets were asked for."),
            get_blocks: Source::ALL
                .iter()
                .map(|s| get_blocks.with_label_values(&[s.as_str()]))
                .collect(),
            get_bytes: r.counter(names::GET_BYTES, "Bytes handed out by gets."),
            put_blocks: PutOutcome::ALL
                .iter()
                .map(|o| (*o, put_blocks.with_label_values(&[o.as_str()])))
                .collect(),
            put_bytes: r.counter(names::PUT_BYTES, "Bytes taken in by puts."),
            put_refused: r.counters(names::PUT_REFUSED, "Blocks of puts refused.", &["reason"]),
            lookup_asked: r.counter(names::LOOKUP_ASKED, "Blocks that lookups were asked for."),
            lookup_present: r.counter(names::LOOKUP_PRESENT, "Blocks that lookups found."),
            invalidated_blocks: r
                .counter(names::INVALIDATED_BLOCKS, "Blocks forgotten on request."),
            removed_blocks: r.counters(
                names::REMOVED_BLOCKS,
                "Blocks that left a tier.",
                &["reason"],
            ),
            mover_writes: r.counters(
                names::MOVER_WRITES,
                "Blocks written to a lower tier.",
                &["tier"],
            ),
            mover_drops: r.counters(
                names::MOVER_DROPS,
                "Blocks a lower tier did not take.",
                &["tier", "reason"],
            ),
            mover_reads: r.counters(
                names::MOVER_READS,
                "Blocks read from a lower tier.",
                &["tier", "result"],
            ),
            mover_read_seconds: r
                .histograms(
                    names::MOVER_READ_SECONDS,
                    "Time per block read from a lower tier.",
                    &[],
                )
                .with_label_values::<&str>(&[]),
            tier_capacity: r.gauges(
                names::TIER_CAPACITY_BYTES,
                "Bytes a tier may hold.",
                &["tier"],
            ),
            tier_used: r.gauges(names::TIER_USED_BYTES, "Bytes a tier holds.", &["tier"]),
            tier_blocks: r.gauges(names::TIER_BLOCKS, "Blocks a tier holds.", &["tier"]),
            tier_in_service: r.gauges(
                names::TIER_IN_SERVICE,
                "1 while a tier is in service.",
                &["tier"],
            ),
            tier_queued: r.gauges(
                names::TIER_QUEUED_BYTES,
                "Bytes waiting to be written.",
                &["tier"],
            ),
            tier_written_today: r.gauges(
                names::TIER_WRITTEN_TODAY_BYTES,
                "Bytes written since midnight UTC.",
                &["tier"],
            ),
            tier_drops: r.gauges(
                names::TIER_DROPS,
                "Blocks a tier refused or dropped since start.",
                &["tier", "reason"],
            ),
            tier_owed_removals: r.gauges(
                names::TIER_OWED_REMOVALS,
                "Invalidated blocks that a tier could not yet record as gone.",
                &["tier"],
            ),
            arena: r.gauges(
                names::ARENA_BYTES,
                "Bytes of the arena by state.",
                &["state"],
            ),
            leases: r.gauge(names::LEASES, "Leases held."),
            leased_bytes: r.gauge(names::LEASED_BYTES, "Bytes that leases pin."),
            lease_overflow_bytes: r.gauge(
                names::LEASE_OVERFLOW_BYTES,
                "Bytes of leased blocks in ordinary memory for want of a slot.",
            ),
            namespaces: r.gauge(names::NAMESPACES, "Namespaces known."),
            members: r.gauges(
                names::CLUSTER_MEMBERS,
                "Members of the cluster by state.",
                &["state"],
            ),
            suspects: r.gauge(names::CLUSTER_SUSPECTS, "Members that are silent."),
            view_changes: r.counter(
                names::CLUSTER_VIEW_CHANGES,
                "Changes of the view that moved owners.",
            ),
            gossip_bytes: r.counters(
                names::CLUSTER_GOSSIP_BYTES,
                "Bytes of gossip.",
                &["direction"],
            ),
            gossip_refused: r.counter(
                names::CLUSTER_GOSSIP_REFUSED,
                "Datagrams that were not of this cluster.",
            ),
            local: LocalMetrics::new(&r),
            motion: Arc::new(MotionMetrics::new(&r)),
            registry,
            scraping: parking_lot::Mutex::new(()),
        })
    }

    /// Where other parts (foyer's bridge) may add metrics of their own.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Connections open.
    #[must_use]
    pub fn connections(&self) -> u64 {
        u64::try_from(self.tcp_connections.get() + self.unix_connections.get()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use kvproto::reason::{GetOutcome, TierKind};

    use super::*;

    fn values(metrics: &Metrics) -> HashMap<String, f64> {
        let text = metrics.text(&Snapshot::default());
        samples(&text)
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    #[test]
    fn sources_sum_to_the_blocks_asked_whatever_happens() {
        let metrics = Metrics::new();
        let mut whole = metrics.get(3);
        whole.hit(TierKind::Ram, 10);
        whole.hit(TierKind::Nvme, 20);
        whole.gone(GetOutcome::Miss);
        whole.gone(GetOutcome::Miss); // one too many: not counted
        drop(whole);
        drop(metrics.get(5)); // the client went away
        let values = values(&metrics);
        let sum: f64 = values
            .iter()
            .filter(|(name, _)| name.starts_with("terrace_get_blocks_total{"))
            .map(|(_, v)| v)
            .sum();
        assert_eq!(sum, values[names::GET_ASKED]);
        assert_eq!(sum, 8.0);
        assert_eq!(values["terrace_get_blocks_total{source=\"failed\"}"], 5.0);
        assert_eq!(values[names::GET_BYTES], 30.0);
    }

    #[test]
    fn every_metric_shown_is_listed_by_name() {
        let metrics = Metrics::new();
        for family in metrics.registry().gather() {
            let name = family.name();
            let of_process = name.starts_with("process_");
            assert!(of_process || NAMES.contains(&name), "{name}");
        }
    }

    /// Metrics that no panel shows, and why.
    const NOT_ON_THE_BOARD: &[(&str, &str)] =
        &[(names::BUILD_INFO, "always 1; it fills the list of nodes")];

    #[test]
    fn the_board_shows_every_metric_and_none_that_does_not_exist() {
        let board = include_str!("../../grafana/terrace.json");
        let board: serde_json::Value = serde_json::from_str(board).expect("the board is JSON");
        let mut expressions = Vec::new();
        collect(&board, &mut expressions);
        let mut shown = BTreeSet::new();
        for expression in &expressions {
            let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
            for name in words.filter(|word| word.starts_with("terrace_")) {
                let suffix = ["_bucket", "_sum", "_count"];
                let base = suffix.iter().find_map(|s| name.strip_suffix(s));
                let of_family = base.filter(|base| NAMES.contains(base));
                shown.insert(of_family.unwrap_or(name));
            }
        }
        let mut wanted: BTreeSet<&str> = NAMES.iter().copied().collect();
        for (name, _) in NOT_ON_THE_BOARD {
            assert!(wanted.remove(name), "{name} is left out, and no metric");
        }
        assert_eq!(shown, wanted, "shown on the left, to be shown on the right");
    }

    fn collect(value: &serde_json::Value, into: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(fields) => {
                for (name, value) in fields {
                    match (name.as_str(), value) {
                        ("expr", serde_json::Value::String(text)) => into.push(text.clone()),
                        _ => collect(value, into),
                    }
                }
            }
            serde_json::Value::Array(values) => {
                values.iter().for_each(|value| collect(value, into))
            }
            _ => {}
        }
    }
}
