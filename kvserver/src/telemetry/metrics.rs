//! Every metric of a node, by name.
//!
//! ```text
//! hot path ──► counters, resolved once at start, one atomic add each
//! scrape   ──► Snapshot (engine, arena, tiers) ──► gauges ──► text
//! ```
//!
//! Units are in the names. Labels are closed sets: methods, tiers, reasons, outcomes, gRPC codes.
//! Of every block that a get was asked for exactly one `source` is counted, so that
//! `gpu + ram + nvme + peer + miss + rejected + failed = asked` holds by construction: only a
//! [`GetTally`] can count, it counts a block at most once, and what it was never told about when it
//! is dropped (the client went away) it counts as failed.
//! Errors: none at run time; two metrics of one name are a bug that `new` would panic on.

use std::sync::Arc;

use super::process::Process;
use kvproto::reason::{GetOutcome, PutOutcome, Reason, TierKind};
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

/// Names of all metrics of the node's own, for tests of dashboards.
pub const NAMES: &[&str] = &[
    names::BUILD_INFO,
    names::UPTIME_SECONDS,
    names::CALLS,
    names::CALL_SECONDS,
    names::CALLS_IN_FLIGHT,
    names::CONNECTIONS,
    names::WATCHERS,
    names::GET_ASKED,
    names::GET_BLOCKS,
    names::GET_BYTES,
    names::PUT_BLOCKS,
    names::PUT_BYTES,
    names::PUT_REFUSED,
    names::LOOKUP_ASKED,
    names::LOOKUP_PRESENT,
    names::INVALIDATED_BLOCKS,
    names::REMOVED_BLOCKS,
    names::MOVER_WRITES,
    names::MOVER_DROPS,
    names::MOVER_READS,
    names::MOVER_READ_SECONDS,
    names::TIER_CAPACITY_BYTES,
    names::TIER_USED_BYTES,
    names::TIER_BLOCKS,
    names::TIER_IN_SERVICE,
    names::TIER_QUEUED_BYTES,
    names::TIER_WRITTEN_TODAY_BYTES,
    names::TIER_DROPS,
    names::ARENA_BYTES,
    names::LEASES,
    names::LEASED_BYTES,
    names::NAMESPACES,
];

/// The names themselves.
pub mod names {
    /// Always 1; the version is the label.
    pub const BUILD_INFO: &str = "terrace_build_info";
    /// Seconds since the node started.
    pub const UPTIME_SECONDS: &str = "terrace_uptime_seconds";
    /// Calls answered, by method and gRPC code.
    pub const CALLS: &str = "terrace_calls_total";
    /// Time from a call's head to its last byte handed to the transport.
    pub const CALL_SECONDS: &str = "terrace_call_seconds";
    /// Calls being served.
    pub const CALLS_IN_FLIGHT: &str = "terrace_calls_in_flight";
    /// Connections open, by transport.
    pub const CONNECTIONS: &str = "terrace_connections";
    /// Watch streams open.
    pub const WATCHERS: &str = "terrace_watchers";
    /// Blocks that gets were asked for.
    pub const GET_ASKED: &str = "terrace_get_blocks_asked_total";
    /// Blocks of gets by where they came from, or why they did not come. Sums to the asked.
    pub const GET_BLOCKS: &str = "terrace_get_blocks_total";
    /// Bytes handed out by gets.
    pub const GET_BYTES: &str = "terrace_get_bytes_total";
    /// Blocks of puts by what became of them.
    pub const PUT_BLOCKS: &str = "terrace_put_blocks_total";
    /// Bytes taken in by puts.
    pub const PUT_BYTES: &str = "terrace_put_bytes_total";
    /// Blocks of puts refused, by reason.
    pub const PUT_REFUSED: &str = "terrace_put_refused_blocks_total";
    /// Blocks that lookups were asked for.
    pub const LOOKUP_ASKED: &str = "terrace_lookup_blocks_asked_total";
    /// Blocks that lookups found.
    pub const LOOKUP_PRESENT: &str = "terrace_lookup_blocks_present_total";
    /// Blocks forgotten because somebody asked for it.
    pub const INVALIDATED_BLOCKS: &str = "terrace_invalidated_blocks_total";
    /// Blocks that left a tier, by reason.
    pub const REMOVED_BLOCKS: &str = "terrace_removed_blocks_total";
    /// Blocks written to a lower tier, by tier.
    pub const MOVER_WRITES: &str = "terrace_mover_written_blocks_total";
    /// Blocks a lower tier did not take, by tier and reason.
    pub const MOVER_DROPS: &str = "terrace_mover_dropped_blocks_total";
    /// Blocks read from a lower tier, by tier and result.
    pub const MOVER_READS: &str = "terrace_mover_read_blocks_total";
    /// Time of one read from a lower tier, waiting included.
    pub const MOVER_READ_SECONDS: &str = "terrace_mover_read_seconds";
    /// Bytes a tier may hold.
    pub const TIER_CAPACITY_BYTES: &str = "terrace_tier_capacity_bytes";
    /// Bytes a tier holds.
    pub const TIER_USED_BYTES: &str = "terrace_tier_used_bytes";
    /// Blocks a tier holds.
    pub const TIER_BLOCKS: &str = "terrace_tier_blocks";
    /// 1 while a tier is in service.
    pub const TIER_IN_SERVICE: &str = "terrace_tier_in_service";
    /// Bytes waiting to be written.
    pub const TIER_QUEUED_BYTES: &str = "terrace_tier_queued_bytes";
    /// Bytes written since midnight UTC, what the wear budget counts.
    pub const TIER_WRITTEN_TODAY_BYTES: &str = "terrace_tier_written_today_bytes";
    /// Blocks a tier refused or dropped, by reason, as the tier counts them.
    pub const TIER_DROPS: &str = "terrace_tier_dropped_blocks";
    /// Bytes of the arena by state: capacity, ready, used (rounded to slots), requested, largest free.
    pub const ARENA_BYTES: &str = "terrace_arena_bytes";
    /// Leases held.
    pub const LEASES: &str = "terrace_leases";
    /// Bytes that leases pin.
    pub const LEASED_BYTES: &str = "terrace_leased_bytes";
    /// Namespaces known.
    pub const NAMESPACES: &str = "terrace_namespaces";
}

/// Where a block of a get came from, or why it did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Device memory.
    Gpu,
    /// The arena.
    Ram,
    /// The local disk, either store.
    Nvme,
    /// Another node.
    Peer,
    /// Not here.
    Miss,
    /// The caller's lease was over, or there was no room to answer.
    Rejected,
    /// Here, but it could not be handed out: corrupt, device, or the caller went away.
    Failed,
}

impl Source {
    const ALL: [Self; 7] = [
        Self::Gpu,
        Self::Ram,
        Self::Nvme,
        Self::Peer,
        Self::Miss,
        Self::Rejected,
        Self::Failed,
    ];

    /// The label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Ram => "ram",
            Self::Nvme => "nvme",
            Self::Peer => "peer",
            Self::Miss => "miss",
            Self::Rejected => "rejected",
            Self::Failed => "failed",
        }
    }

    /// A hit of this tier.
    #[must_use]
    pub const fn of_tier(tier: TierKind) -> Self {
        match tier {
            TierKind::Gpu => Self::Gpu,
            TierKind::Ram => Self::Ram,
            TierKind::Nvme | TierKind::Durable => Self::Nvme,
            TierKind::Peer => Self::Peer,
        }
    }

    /// An answer without bytes.
    #[must_use]
    pub const fn of_outcome(outcome: GetOutcome) -> Self {
        match outcome {
            GetOutcome::Hit | GetOutcome::Corrupt | GetOutcome::Device => Self::Failed,
            GetOutcome::Miss | GetOutcome::Invalidated => Self::Miss,
            GetOutcome::Expired | GetOutcome::Overloaded => Self::Rejected,
        }
    }
}

/// A method of the service; the label of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the methods of blocks.proto, by name")]
pub enum Method {
    OpenNamespace,
    Lookup,
    Get,
    Put,
    Renew,
    Release,
    Invalidate,
    Watch,
    Stats,
    Other,
}

impl Method {
    const ALL: [Self; 10] = [
        Self::OpenNamespace,
        Self::Lookup,
        Self::Get,
        Self::Put,
        Self::Renew,
        Self::Release,
        Self::Invalidate,
        Self::Watch,
        Self::Stats,
        Self::Other,
    ];

    /// The label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OpenNamespace => "open_namespace",
            Self::Lookup => "lookup",
            Self::Get => "get",
            Self::Put => "put",
            Self::Renew => "renew",
            Self::Release => "release",
            Self::Invalidate => "invalidate",
            Self::Watch => "watch",
            Self::Stats => "stats",
            Self::Other => "other",
        }
    }
}

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
    /// Namespaces known.
    pub namespaces: u64,
    /// Blocks that left a tier since start.
    pub removed: Vec<(Reason, u64)>,
    /// Name of the eviction policy.
    pub policy: String,
}

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
    arena: IntGaugeVec,
    leases: IntGauge,
    leased_bytes: IntGauge,
    namespaces: IntGauge,
}

/// 50 µs to 10 s: from a lookup in the index to a long read from a busy disk.
const SECONDS: [f64; 14] = [
    50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 25e-3, 100e-3, 500e-3, 1.0, 3.0, 10.0,
];

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
            mover_read_seconds: {
                let opts = HistogramOpts::new(
                    names::MOVER_READ_SECONDS,
                    "Time per block read from a lower tier.",
                );
                let histogram =
                    Histogram::with_opts(opts.buckets(SECONDS.to_vec())).expect("a valid name");
                registry
                    .register(Box::new(histogram.clone()))
                    .expect("names are distinct");
                histogram
            },
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
            arena: r.gauges(
                names::ARENA_BYTES,
                "Bytes of the arena by state.",
                &["state"],
            ),
            leases: r.gauge(names::LEASES, "Leases held."),
            leased_bytes: r.gauge(names::LEASED_BYTES, "Bytes that leases pin."),
            namespaces: r.gauge(names::NAMESPACES, "Namespaces known."),
            registry,
            scraping: parking_lot::Mutex::new(()),
        })
    }

    /// Where other parts (foyer's bridge) may add metrics of their own.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Counts one call that is over.
    pub fn call(&self, method: Method, code: &'static str, seconds: f64) {
        if code == "ok" {
            self.call_ok[method as usize].inc();
        } else {
            self.calls.with_label_values(&[method.as_str(), code]).inc();
        }
        self.call_seconds[method as usize].observe(seconds);
    }

    /// Starts the account of a get of `blocks` blocks.
    pub fn get(self: &Arc<Self>, blocks: u64) -> GetTally {
        self.get_asked.inc_by(blocks);
        GetTally {
            metrics: Arc::clone(self),
            left: blocks,
        }
    }

    /// Counts what became of one block of a put.
    pub fn put(&self, outcome: PutOutcome, reason: Option<Reason>) {
        if let Some((_, counter)) = self.put_blocks.iter().find(|(o, _)| *o == outcome) {
            counter.inc();
        }
        if let Some(reason) = reason {
            self.put_refused.with_label_values(&[reason.as_str()]).inc();
        }
    }

    /// Counts a block that has left the node.
    pub fn removed(&self, reason: Reason) {
        self.removed_blocks
            .with_label_values(&[reason.as_str()])
            .inc();
    }

    /// Counts a block that a lower tier has taken (`None`) or has not.
    pub fn moved_down(&self, tier: TierKind, refused: Option<Reason>) {
        match refused {
            None => self.mover_writes.with_label_values(&[tier.as_str()]).inc(),
            Some(reason) => self
                .mover_drops
                .with_label_values(&[tier.as_str(), reason.as_str()])
                .inc(),
        }
    }

    /// Counts a block read from a lower tier: `None` whole, else why not.
    pub fn moved_up(&self, tier: TierKind, gone: Option<Reason>, seconds: f64) {
        let result = gone.map_or("hit", Reason::as_str);
        self.mover_reads
            .with_label_values(&[tier.as_str(), result])
            .inc();
        self.mover_read_seconds.observe(seconds);
    }

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
        self.namespaces.set(signed(snapshot.namespaces));
    }

    /// Connections open.
    #[must_use]
    pub fn connections(&self) -> u64 {
        u64::try_from(self.tcp_connections.get() + self.unix_connections.get()).unwrap_or(0)
    }
}

/// The account of one get: every block is counted once, whatever happens.
#[must_use = "blocks that are not counted are counted as failed"]
pub struct GetTally {
    metrics: Arc<Metrics>,
    left: u64,
}

impl GetTally {
    /// A block that was handed out.
    pub fn hit(&mut self, tier: TierKind, bytes: u64) {
        self.count(Source::of_tier(tier));
        self.metrics.get_bytes.inc_by(bytes);
    }

    /// A block that was answered without bytes.
    pub fn gone(&mut self, outcome: GetOutcome) {
        self.count(Source::of_outcome(outcome));
    }

    fn count(&mut self, source: Source) {
        if self.left > 0 {
            self.left -= 1;
            self.metrics.get_blocks[source as usize].inc();
        }
    }
}

impl Drop for GetTally {
    fn drop(&mut self) {
        if self.left > 0 {
            self.metrics.get_blocks[Source::Failed as usize].inc_by(self.left);
        }
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

/// Makes metrics and registers them.
struct Make<'a>(&'a Registry);

impl Make<'_> {
    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        let made = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid name");
        self.0
            .register(Box::new(made.clone()))
            .expect("names are distinct");
        made
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.counters(name, help, &[])
            .with_label_values::<&str>(&[])
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        let made = IntGaugeVec::new(Opts::new(name, help), labels).expect("a valid name");
        self.0
            .register(Box::new(made.clone()))
            .expect("names are distinct");
        made
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.gauges(name, help, &[]).with_label_values::<&str>(&[])
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
        let opts = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
        let made = HistogramVec::new(opts, labels).expect("a valid name");
        self.0
            .register(Box::new(made.clone()))
            .expect("names are distinct");
        made
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

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
    fn every_panel_of_the_board_shows_metrics_that_exist() {
        let board = include_str!("../../grafana/terrace.json");
        let board: serde_json::Value = serde_json::from_str(board).expect("the board is JSON");
        let mut used = Vec::new();
        collect(&board, &mut used);
        assert!(used.len() > 10, "the board has panels");
        let known = |name: &str| {
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|s| name.strip_suffix(s))
                .unwrap_or(name);
            NAMES.contains(&name) || NAMES.contains(&base)
        };
        for expression in used {
            let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
            for name in words.filter(|word| word.starts_with("terrace_")) {
                assert!(known(name), "{name} in {expression:?} is no metric");
            }
        }
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
