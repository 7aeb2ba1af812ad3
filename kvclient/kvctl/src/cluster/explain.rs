//! `kvctl cluster explain`: who owns a key, and who has it.

use anyhow::Result;
use kvproto::{
    NamespaceId,
    v1::{self, blocks_client::BlocksClient},
};
use serde::Serialize;
use tonic::transport::Endpoint;

use super::service::{Service, members, said};
use crate::{
    context::{Context, InNamespace, table},
    key,
};

/// Flags of `explain`.
#[derive(clap::Args)]
pub(super) struct Explain {
    /// A key; or 64 hex digits, the hash at the start of a run
    #[arg(value_name = "KEY|HASH")]
    key: String,
    /// How many owners its runs have
    #[arg(long, default_value_t = 1)]
    replicas: u32,
    #[command(flatten)]
    namespace: InNamespace,
}

#[derive(Serialize)]
struct Report {
    run: String,
    claims: Vec<Claim>,
}

#[derive(Serialize)]
struct Claim {
    node: String,
    address: String,
    claim: &'static str,
    has: &'static str,
}

pub(super) async fn run(context: &Context, args: Explain) -> Result<()> {
    let client = context.connect().await?;
    let namespace = context.open(&client, &args.namespace.namespace).await?;
    let run = key::block(&namespace, &args.key);
    let mut service = Service::connect(context).await?;
    let view = members(&service.view(context).await?)?;
    let mut request = service.request(v1::ExplainRequest {
        run_hash: run.0.to_vec().into(),
        replicas: args.replicas,
        ..v1::ExplainRequest::default()
    });
    request.set_timeout(context.deadline());
    let answer = service.client.explain(request).await;
    let claimants = answer.map_err(|e| said(&e))?.into_inner().claimants;
    let mut claims = Vec::with_capacity(claimants.len());
    for claimant in claimants {
        let claim = match claimant.claim() {
            v1::Claim::Owner => "owner",
            v1::Claim::Former => "owned it lately",
            v1::Claim::Next | v1::Claim::Unspecified => "next in order",
        };
        let member = view.get(&claimant.node_id.as_str().into());
        let address = member.map_or_else(String::new, |member| member.address.clone());
        let has = match has(context, &service, &address, namespace.id(), run.0).await {
            Some(true) => "has it",
            Some(false) => "has it not",
            None => "does not answer",
        };
        claims.push(Claim {
            node: claimant.node_id,
            address,
            claim,
            has,
        });
    }
    let report = Report {
        run: run.to_string(),
        claims,
    };
    context.print(&report, |report| {
        let row = |claim: &Claim| {
            let texts = [&claim.node, &claim.address];
            let mut row: Vec<String> = texts.into_iter().cloned().collect();
            row.extend([claim.claim.to_owned(), claim.has.to_owned()]);
            row
        };
        let rows: Vec<Vec<String>> = report.claims.iter().map(row).collect();
        let head = ["node", "address", "claim", "its first block"];
        format!("run {}\n\n{}", report.run, table(&head, &rows))
    })
}

/// Whether a node itself holds the block; it is not to ask others. `None`: it does not answer, or does not know.
async fn has(
    context: &Context,
    service: &Service,
    address: &str,
    namespace: NamespaceId,
    hash: [u8; 32],
) -> Option<bool> {
    let endpoint = Endpoint::from_shared(address.to_owned()).ok()?;
    let endpoint = endpoint.connect_timeout(context.deadline());
    let mut node = BlocksClient::new(endpoint.connect().await.ok()?);
    let mut request = service.request(v1::LookupRequest {
        context: Some(v1::RequestContext {
            no_forward: true,
            ..v1::RequestContext::default()
        }),
        namespace_id: namespace.0.to_vec().into(),
        chain: Some(v1::Chain {
            hashes: hash.to_vec().into(),
            ..v1::Chain::default()
        }),
        probe: true,
        ..v1::LookupRequest::default()
    });
    request.set_timeout(context.deadline());
    match node.lookup(request).await {
        Ok(found) => Some(found.into_inner().present_blocks > 0),
        // It was never opened there: nothing of it can be there.
        Err(status) if status.code() == tonic::Code::NotFound => Some(false),
        Err(_) => None,
    }
}
