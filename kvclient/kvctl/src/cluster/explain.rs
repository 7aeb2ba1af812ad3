//! `kvctl cluster explain`: who owns a key, and who has it.
//!
//! ```text
//! key ─► run (the first, or --run) ─► Explain: owners, former owners, the next in order
//!                                └──► every member at once: how much of the run is there?  ─► one row each
//! ```
//!
//! Members without a claim are shown when they have something of it.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use futures_util::future::join_all;
use kvclient::NamespaceHandle;
use kvproto::{
    Chain, MemberState,
    convert::{answer::Second, chain_to_wire},
    v1::{self, blocks_client::BlocksClient},
};
use serde::Serialize;
use tonic::transport::Endpoint;

use super::service::{Service, members, said};
use crate::{
    context::{Context, InNamespace, table},
    key, namespaces,
};

/// Members without a claim that are asked all the same; a cluster with more of them is asked by claim alone.
const MAX_UNCLAIMED: usize = 64;

/// Flags of `explain`.
#[derive(clap::Args)]
pub(super) struct Explain {
    /// A key; or 64 hex digits, the hash at the start of a run
    #[arg(value_name = "KEY|HASH")]
    key: String,
    /// Which run of the key, from 0; each has owners of its own
    #[arg(long, default_value_t = 0)]
    run: u64,
    /// How many owners its runs have; as many as the namespace's, if left out
    #[arg(long, value_name = "1-8", value_parser = clap::value_parser!(u32).range(1..=8))]
    replicas: Option<u32>,
    #[command(flatten)]
    namespace: InNamespace,
}

#[derive(Serialize)]
struct Report {
    /// Its number, and how many the key has; 1 where nobody knows.
    number: u64,
    runs: u64,
    run: String,
    replicas: usize,
    /// Blocks of it that were asked for.
    blocks: usize,
    claims: Vec<Claim>,
}

#[derive(Serialize)]
struct Claim {
    node: String,
    address: String,
    claim: String,
    has: &'static str,
    /// Its leading blocks that are there; none where nobody answers.
    blocks: Option<u32>,
}

/// What one member says of a run.
struct Here {
    blocks: u32,
    seconds: Vec<Second>,
}

pub(super) async fn run(context: &Context, args: Explain) -> Result<()> {
    let client = context.connect().await?;
    let name = &args.namespace.namespace;
    let namespace = namespaces::of(context, &client, name, Some(&args.key)).await?;
    let (chain, runs) = asked(&client, &namespace, &args).await?;
    let run = chain.place(0, namespace.run_blocks()).run;
    let replicas = args.replicas.map_or(namespace.replicas(), |n| n as usize);
    let mut service = Service::connect(context).await?;
    let view = members(&service.view(context).await?)?;
    let mut request = service.request(v1::ExplainRequest {
        run_hash: run.0.to_vec().into(),
        replicas: replicas as u32,
        ..v1::ExplainRequest::default()
    });
    request.set_timeout(context.deadline());
    let answer = service.client.explain(request).await;
    let claimants = answer.map_err(|e| said(&e))?.into_inner().claimants;
    let mut whom: Vec<(String, &str)> = Vec::with_capacity(claimants.len());
    for claimant in claimants {
        let claim = match claimant.claim() {
            v1::Claim::Owner if replicas > 1 && whom.is_empty() => "first owner",
            v1::Claim::Owner => "owner",
            v1::Claim::Former => "owned it lately",
            v1::Claim::Next | v1::Claim::Unspecified => "next in order",
        };
        whom.push((claimant.node_id, claim));
    }
    let is_here = |member: &&kvproto::Member| member.state != MemberState::Gone;
    let others = view.members().iter().filter(is_here);
    let others = others.filter(|member| whom.iter().all(|(id, _)| *id != member.id.0));
    let others: Vec<(String, &str)> = others.map(|member| (member.id.0.clone(), "-")).collect();
    if others.len() <= MAX_UNCLAIMED {
        whom.extend(others);
    }
    let (namespace, service, chain) = (&namespace, &service, &chain);
    let calls = whom.into_iter().map(|(node, claim)| {
        let member = view.get(&node.as_str().into());
        let address = member.map_or_else(String::new, |member| member.address.clone());
        async move {
            let here = ask(context, service, &address, namespace, chain).await;
            (node, address, claim, here)
        }
    });
    let answers = join_all(calls).await;
    let seconds = answers.iter().filter_map(|(.., here)| here.as_ref());
    let seconds = seconds.flat_map(|here| &here.seconds);
    let seconds: BTreeMap<&str, u32> = seconds
        .map(|second| (second.member.0.as_str(), second.ttl_ms))
        .collect();
    let claim = |(node, address, claim, here): &(String, String, &str, Option<Here>)| Claim {
        claim: match seconds.get(node.as_str()) {
            Some(ttl_ms) => format!("many read it: has it for another {} s", ttl_ms / 1000),
            None => (*claim).to_owned(),
        },
        has: match here {
            Some(here) if here.blocks > 0 => "has it",
            Some(_) => "has it not",
            None => "does not answer",
        },
        blocks: here.as_ref().map(|here| here.blocks),
        node: node.clone(),
        address: address.clone(),
    };
    let claims = answers.iter().map(claim);
    let report = Report {
        number: args.run,
        runs,
        run: run.to_string(),
        replicas,
        blocks: chain.len(),
        claims: claims
            .filter(|claim| claim.claim != "-" || claim.blocks.unwrap_or_default() > 0)
            .collect(),
    };
    context.print(&report, text)
}

/// The blocks to ask for, of one run, and how many runs the key has.
async fn asked(
    client: &kvclient::Client,
    namespace: &NamespaceHandle,
    args: &Explain,
) -> Result<(Chain, u64)> {
    if let Ok(hash) = args.key.parse() {
        ensure!(args.run == 0, "a hash names one run; leave --run out");
        return Ok((Chain::from_root(vec![hash]), 1));
    }
    // A key that cannot be read has a first block all the same, and owners of it.
    let label = key::label(client, namespace, &args.key)
        .await
        .ok()
        .flatten();
    let chain = match &label {
        Some(label) => key::chain(namespace, &args.key, label),
        None => key::first(namespace, &args.key),
    };
    let blocks = chain.len() as u64;
    let run_blocks = u64::from(namespace.run_blocks());
    let runs = blocks.div_ceil(run_blocks);
    ensure!(
        args.run < runs,
        "{:?} has {runs} runs of {run_blocks} blocks; --run counts them from 0",
        args.key
    );
    let first = args.run * run_blocks;
    let end = (first + run_blocks).min(blocks);
    let chain = chain.slice(first as usize..end as usize, namespace.run_blocks());
    Ok((chain, runs))
}

fn text(report: &Report) -> String {
    let row = |claim: &Claim| {
        let has = match claim.blocks {
            None => claim.has.to_owned(),
            Some(0) => "nothing of it".to_owned(),
            Some(blocks) => format!("{blocks} of {} blocks", report.blocks),
        };
        vec![
            claim.node.clone(),
            claim.address.clone(),
            claim.claim.clone(),
            has,
        ]
    };
    let rows: Vec<Vec<String>> = report.claims.iter().map(row).collect();
    let copies = match report.replicas {
        0 | 1 => String::new(),
        many => format!(", kept by {many} members"),
    };
    let which = match report.runs {
        1 => String::new(),
        runs => format!(
            ", the {} of {runs}; --run shows others",
            ordinal(report.number + 1)
        ),
    };
    let head = ["node", "address", "claim", "has"];
    format!(
        "run {}{which}{copies}\n\n{}",
        report.run,
        table(&head, &rows)
    )
}

fn ordinal(n: u64) -> String {
    let suffix = match (n % 10, n % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    format!("{n}{suffix}")
}

/// What a node itself holds of a run; a probe makes it ask nobody else. `None`: it does not answer, or does not know.
async fn ask(
    context: &Context,
    service: &Service,
    address: &str,
    namespace: &NamespaceHandle,
    chain: &Chain,
) -> Option<Here> {
    let endpoint = Endpoint::from_shared(address.to_owned()).ok()?;
    let endpoint = endpoint.connect_timeout(context.deadline());
    let mut node = BlocksClient::new(endpoint.connect().await.ok()?);
    let mut request = service.request(v1::LookupRequest {
        namespace_id: namespace.id().0.to_vec().into(),
        chain: Some(chain_to_wire(chain)),
        probe: true,
        ..v1::LookupRequest::default()
    });
    request.set_timeout(context.deadline());
    match node.lookup(request).await {
        Ok(found) => {
            let found = found.into_inner();
            let seconds = found.seconds.iter().map(Second::try_from);
            Some(Here {
                blocks: found.present_blocks,
                seconds: seconds.filter_map(Result::ok).collect(),
            })
        }
        // It was never opened there: nothing of it can be there.
        Err(status) if status.code() == tonic::Code::NotFound => Some(Here {
            blocks: 0,
            seconds: Vec::new(),
        }),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::ordinal;

    #[test]
    fn numbers_are_read_aloud() {
        let said: Vec<String> = [1, 2, 3, 4, 11, 12, 21, 112].map(ordinal).into();
        assert_eq!(said.join(" "), "1st 2nd 3rd 4th 11th 12th 21st 112th");
    }
}
