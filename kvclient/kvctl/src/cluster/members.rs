//! `kvctl cluster members`: the view, and whether it deals fairly.

use anyhow::Result;
use kvproto::{MemberState, RunHash, View, placement::Placement, v1};
use serde::Serialize;

use super::service::{Service, members};
use crate::context::{Context, size, style, table};

/// Runs dealt out to see what each member owns: the error of a share of a tenth is then under one in a hundred of it.
const SAMPLE_RUNS: u32 = 100_000;

#[derive(Serialize)]
struct Report {
    cluster: String,
    asked: String,
    digest: String,
    alone: String,
    changed_ms: u64,
    young: bool,
    members: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    id: String,
    address: String,
    zone: String,
    state: &'static str,
    standing: &'static str,
    suspect_ms: u64,
    weight: u32,
    /// Of all weights that take runs.
    weight_share: f64,
    /// Of runs dealt out by this view.
    owned_share: f64,
    calls: u32,
    ram_full: f64,
    /// Bytes that it still has to hand over, and that it has handed over since its start.
    waiting_bytes: u64,
    moved_bytes: u64,
}

pub(super) async fn run(context: &Context) -> Result<()> {
    let view = Service::connect(context).await?.view(context).await?;
    let known = members(&view)?;
    let report = Report {
        cluster: view.cluster_id.clone(),
        asked: view.node_id.clone(),
        digest: known.digest().to_string(),
        alone: view.alone.clone(),
        changed_ms: view.changed_ms,
        young: view.young,
        members: rows(&view, &known),
    };
    context.print(&report, text)
}

fn rows(view: &v1::ViewResponse, known: &View) -> Vec<Row> {
    let placement = Placement::new(known);
    let mut owned = vec![0_u32; known.members().len()];
    for number in 0..SAMPLE_RUNS {
        let mut run = [0; 32];
        run[..4].copy_from_slice(&number.to_le_bytes());
        let first = placement.first(&RunHash(run));
        let at = first.and_then(|id| known.members().iter().position(|member| member.id == *id));
        if let Some(at) = at {
            owned[at] += 1;
        }
    }
    let takes = |state: MemberState| state.takes_runs();
    let all = known.members().iter().filter(|member| takes(member.state));
    let all: u64 = all.map(|member| u64::from(member.weight)).sum();
    let row = |(member, owned): (&kvproto::Member, u32)| {
        let seen = view.members.iter().find(|seen| {
            let shown = seen.member.as_ref();
            shown.is_some_and(|shown| shown.id == member.id.0)
        });
        let weight = if takes(member.state) {
            member.weight
        } else {
            0
        };
        Row {
            id: member.id.0.clone(),
            address: member.address.clone(),
            zone: member.zone.clone(),
            state: state(member.state),
            standing: standing(seen.map_or(v1::Standing::Unspecified, |seen| seen.standing())),
            suspect_ms: seen.map_or(0, |seen| seen.suspect_ms),
            weight: member.weight,
            weight_share: f64::from(weight) / (all.max(1) as f64),
            owned_share: f64::from(owned) / f64::from(SAMPLE_RUNS),
            calls: seen.map_or(0, |seen| seen.calls),
            ram_full: seen.map_or(0.0, |seen| f64::from(seen.full_permille) / 1000.0),
            waiting_bytes: seen.map_or(0, |seen| seen.waiting_bytes),
            moved_bytes: seen.map_or(0, |seen| seen.moved_bytes),
        }
    };
    known.members().iter().zip(owned).map(row).collect()
}

const fn state(state: MemberState) -> &'static str {
    match state {
        MemberState::Joining => "joining",
        MemberState::Active => "active",
        MemberState::Draining => "draining",
        MemberState::Gone => "gone",
    }
}

const fn standing(standing: v1::Standing) -> &'static str {
    match standing {
        v1::Standing::Unspecified => "unknown",
        v1::Standing::Well => "well",
        v1::Standing::Suspect => "suspect",
        v1::Standing::Departed => "departed",
    }
}

fn text(report: &Report) -> String {
    let changed = std::time::Duration::from_secs(report.changed_ms / 1000);
    let mut text = match report.alone.as_str() {
        "" => format!("{} {}", style("1", "Cluster"), report.cluster),
        why => format!("{}: {why}", style("1", "This node is alone")),
    };
    text += &format!(
        "   view {}, unchanged for {}{}\n\n",
        report.digest,
        humantime::format_duration(changed),
        if report.young {
            ", blocks may still be moving"
        } else {
            ""
        },
    );
    let row = |row: &Row| {
        let standing = match row.standing {
            "suspect" => {
                let silent = std::time::Duration::from_secs(row.suspect_ms / 1000);
                format!("suspect for {}", humantime::format_duration(silent))
            }
            other => other.to_owned(),
        };
        let percent = |share: f64| format!("{:.2} %", share * 100.0);
        vec![
            if row.id == report.asked {
                format!("{} *", row.id)
            } else {
                row.id.clone()
            },
            row.address.clone(),
            if row.zone.is_empty() {
                "-".to_owned()
            } else {
                row.zone.clone()
            },
            row.state.to_owned(),
            standing,
            row.weight.to_string(),
            percent(row.weight_share),
            percent(row.owned_share),
            format!("{:.0} %", row.ram_full * 100.0),
            row.calls.to_string(),
            moves(row),
        ]
    };
    let rows: Vec<Vec<String>> = report.members.iter().map(row).collect();
    let head = [
        "node",
        "address",
        "zone",
        "state",
        "standing",
        "weight",
        "share",
        "owned",
        "ram",
        "calls",
        "to hand over",
    ];
    text += &table(&head, &rows);
    text + "\n* answered; owned: the share of runs that this view gives it\n"
}

/// What waits to be handed over, and what went since the node's start.
fn moves(row: &Row) -> String {
    match (row.waiting_bytes, row.moved_bytes) {
        (0, 0) => "-".to_owned(),
        (0, moved) => format!("0, {} done", size(moved)),
        (waiting, moved) => format!("{}, {} done", size(waiting), size(moved)),
    }
}
