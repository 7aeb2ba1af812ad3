//! `kvctl status`: what the node holds and has done.

use anyhow::Result;
use kvclient::TierKind;
use serde::Serialize;

use crate::context::{Context, size, style, table};

/// Flags of `status`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Show every counter
    #[arg(long, short = 'a')]
    all: bool,
}

#[derive(Serialize)]
struct Report {
    endpoint: String,
    version: String,
    boot_id: String,
    uptime_ms: u64,
    policy: String,
    tiers: Vec<Tier>,
    leases: u64,
    leased_bytes: u64,
    connections: u64,
    namespaces: u64,
    counters: serde_json::Map<String, serde_json::Value>,
}

#[derive(Serialize)]
struct Tier {
    tier: &'static str,
    in_service: bool,
    blocks: u64,
    used_bytes: u64,
    capacity_bytes: u64,
    note: String,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<()> {
    let client = context.connect().await?;
    let stats = client.stats().await?;
    let tiers = stats.tiers.into_iter().map(|tier| Tier {
        tier: TierKind::from_wire(tier.tier).map_or("other", TierKind::as_str),
        in_service: tier.in_service,
        blocks: tier.blocks,
        used_bytes: tier.used_bytes,
        capacity_bytes: tier.capacity_bytes,
        note: tier.note,
    });
    let report = Report {
        endpoint: context.endpoint().to_owned(),
        version: stats.version,
        boot_id: client.boot_id().to_string(),
        uptime_ms: stats.uptime_ms,
        policy: stats.policy,
        tiers: tiers.collect(),
        leases: stats.leases,
        leased_bytes: stats.leased_bytes,
        connections: stats.connections,
        namespaces: stats.namespaces,
        counters: stats
            .counters
            .into_iter()
            .map(|counter| (counter.name, counter.value.into()))
            .collect(),
    };
    context.print(&report, |report| text(report, args.all))
}

fn text(report: &Report, all: bool) -> String {
    let uptime = std::time::Duration::from_secs(report.uptime_ms / 1000);
    let mut text = format!(
        "{} {} at {}, up {}, boot {}\n\n",
        style("1", "Terrace"),
        report.version,
        report.endpoint,
        humantime::format_duration(uptime),
        report.boot_id,
    );
    let rows: Vec<Vec<String>> = report.tiers.iter().map(row).collect();
    text += &table(&["tier", "blocks", "used", "of", "", "state"], &rows);
    text += &format!(
        "\npolicy {}   leases {} ({})   connections {}   namespaces {}\n",
        report.policy,
        report.leases,
        size(report.leased_bytes),
        report.connections,
        report.namespaces,
    );
    if all {
        text += "\n";
        for (name, value) in &report.counters {
            text += &format!("{name} {value}\n");
        }
    } else if !report.counters.is_empty() {
        text += &format!("{} counters: kvctl status --all\n", report.counters.len());
    }
    text
}

fn row(tier: &Tier) -> Vec<String> {
    let share = if tier.capacity_bytes == 0 {
        0.0
    } else {
        (tier.used_bytes as f64 / tier.capacity_bytes as f64).min(1.0)
    };
    let filled = (share * 20.0).round() as usize;
    let state = match (tier.in_service, tier.note.as_str()) {
        (true, "") => "in service".to_owned(),
        (true, note) => format!("in service, {note}"),
        (false, "") => "out of service".to_owned(),
        (false, note) => format!("out of service: {note}"),
    };
    vec![
        tier.tier.to_owned(),
        tier.blocks.to_string(),
        size(tier.used_bytes),
        size(tier.capacity_bytes),
        format!(
            "{}{} {:>3.0}%",
            "█".repeat(filled),
            "░".repeat(20 - filled),
            share * 100.0
        ),
        state,
    ]
}
