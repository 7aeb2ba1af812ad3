//! `kvctl cluster weight`, `drain` and `resume`: what people change about a node. Each needs the nodes' token where
//! there is one.

use anyhow::{Context as _, Result, anyhow, bail};
use kvproto::{MemberState, v1};
use serde::Serialize;

use super::service::{Service, members, named, said};
use crate::context::{Context, Unit, size};

/// Flags of `weight`.
#[derive(clap::Args)]
pub(super) struct Weight {
    /// Its name, or as much of it as is its own; or its address, as `kvctl cluster` shows them
    node: String,
    /// Share of the blocks, relative to the others'; 0: none
    weight: u32,
}

/// Flags of `drain`.
#[derive(clap::Args)]
pub(super) struct Drain {
    /// Its name, or as much of it as is its own; or its address, as `kvctl cluster` shows them
    node: String,
    /// How long to wait for it
    #[arg(long, default_value = "10min")]
    within: humantime::Duration,
    /// Leave when the time is up, and lose what is left
    #[arg(long)]
    anyway: bool,
}

/// Flags of `resume`.
#[derive(clap::Args)]
pub(super) struct Resume {
    /// Its name, or as much of it as is its own; or its address, as `kvctl cluster` shows them
    node: String,
}

#[derive(Serialize)]
struct Weighed {
    node: String,
    weight: u32,
}

#[derive(Serialize)]
struct Drained {
    node: String,
    phase: &'static str,
    moved_runs: u64,
    moved_bytes: u64,
    at_stake_bytes: u64,
    left_blocks: u64,
}

/// The node of this name, and its whole name.
async fn find(context: &Context, name: &str) -> Result<(Service, String)> {
    let view = Service::connect(context).await?.view(context).await?;
    let view = members(&view)?;
    let member = named(&view, name)?;
    let service = Service::at(context, &member.address).await;
    let service = service.with_context(|| match member.state {
        MemberState::Gone => format!("{} has left the cluster, and does not answer", member.id),
        _ => format!(
            "{} has to be asked itself, and does not answer; who is dead leaves by itself when its grace is over \
             (`suspect_grace`)",
            member.id
        ),
    })?;
    Ok((service, member.id.0.clone()))
}

pub(super) async fn weight(context: &Context, args: Weight) -> Result<()> {
    let (mut service, node_id) = find(context, &args.node).await?;
    let mut request = service.request(v1::SetWeightRequest {
        node_id: node_id.clone(),
        weight: args.weight,
        ..v1::SetWeightRequest::default()
    });
    request.set_timeout(context.deadline());
    let answer = service.client.set_weight(request).await;
    let declared = answer.map_err(|e| said(&e))?.into_inner().member;
    let report = Weighed {
        node: node_id,
        weight: declared.map_or(args.weight, |member| member.weight),
    };
    context.print(&report, |report| {
        format!("{} declares weight {}", report.node, report.weight)
    })
}

pub(super) async fn drain(context: &Context, args: Drain) -> Result<()> {
    let (mut service, node_id) = find(context, &args.node).await?;
    let within: std::time::Duration = args.within.into();
    let mut request = service.request(v1::DrainRequest {
        node_id: node_id.clone(),
        deadline_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX),
        leave_anyway: args.anyway,
        ..v1::DrainRequest::default()
    });
    // The node ends it in time; this is for one that does not.
    request.set_timeout(within + context.deadline());
    let answer = service.client.drain(request).await;
    let mut told = answer.map_err(|e| said(&e))?.into_inner();
    let bar = context.progress(0, "handing over", Unit::Bytes);
    let mut last = None;
    while let Some(step) = told.message().await.map_err(|e| said(&e))? {
        bar.set_length(step.moved_bytes + step.at_stake_bytes);
        bar.set_position(step.moved_bytes);
        last = Some(step);
    }
    bar.finish_and_clear();
    let last = last.ok_or_else(|| anyhow!("{node_id} said nothing; is it of the same version?"))?;
    let report = Drained {
        node: node_id,
        phase: match last.phase() {
            v1::DrainPhase::Left => "left",
            v1::DrainPhase::Deadline => "deadline",
            _ => "interrupted",
        },
        moved_runs: last.moved_runs,
        moved_bytes: last.moved_bytes,
        at_stake_bytes: last.at_stake_bytes,
        left_blocks: last.left_blocks,
    };
    context.print(&report, drained)?;
    match report.phase {
        "left" => Ok(()),
        _ => bail!("{} still has what nobody else has", report.node),
    }
}

fn drained(report: &Drained) -> String {
    let moved = format!(
        "{} {} handed over, {}",
        report.moved_runs,
        if report.moved_runs == 1 {
            "run"
        } else {
            "runs"
        },
        size(report.moved_bytes)
    );
    match (report.phase, report.at_stake_bytes) {
        ("left", 0) => format!(
            "{} has left, nothing is lost; {moved}. It may be stopped now.",
            report.node
        ),
        ("left", lost) => format!(
            "{} has left, and {} in {} blocks are lost; {moved}",
            report.node,
            size(lost),
            report.left_blocks
        ),
        (_, at_stake) => format!(
            "{} goes on draining; to stop it now would lose {} in {} blocks; {moved}\n\
             wait longer with --within, leave with --anyway, or `kvctl cluster resume {}`",
            report.node,
            size(at_stake),
            report.left_blocks,
            report.node
        ),
    }
}

pub(super) async fn resume(context: &Context, args: Resume) -> Result<()> {
    let (mut service, node_id) = find(context, &args.node).await?;
    let mut request = service.request(v1::DrainRequest {
        node_id: node_id.clone(),
        resume: true,
        ..v1::DrainRequest::default()
    });
    request.set_timeout(context.deadline());
    let answer = service.client.drain(request).await;
    answer.map_err(|e| said(&e))?;
    let report = serde_json::json!({ "node": node_id, "phase": "resumed" });
    context.print(&report, |_| format!("{node_id} takes blocks again"))
}
