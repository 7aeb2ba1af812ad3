//! Which namespaces there are, and what is there of each.
//!
//! ```text
//! every member at once ─► its pages, by id ─► one list: blocks and bytes of a namespace added up over members
//! ```
//!
//! Shape: one entry per namespace of the caller's tenant that was ever opened at any of them.
//! Units: blocks, bytes; a copy at another member counts again.
//! Errors: of a member that does not answer, beside what the others say; of all when none does.
//! Why every member is asked: a namespace is known to those at whom it was opened, and that need not be all.

use std::{collections::BTreeMap, sync::Arc};

use kvproto::{
    NamespaceId,
    convert::{answer::NamespaceStats, request::ListNamespaces},
    v1,
};

use crate::{
    call::{self, Deadline, Inner},
    client::Client,
    endpoint::Endpoint,
    error::Error,
    wire::{self, Method},
};

/// Most pages that are asked for of one member: more namespaces than any node keeps for all tenants.
const MAX_PAGES: usize = 1024;

/// What members know.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// By id.
    pub known: Vec<NamespaceStats>,
    /// Who has not answered, and why: what they alone know is missing above.
    pub silent: Vec<(Endpoint, Error)>,
}

impl Client {
    /// The namespaces of the caller's tenant, of one label or of all. Opens none.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn namespaces(&self, label: Option<&str>) -> Result<Namespaces, Error> {
        let deadline = self.until();
        let answers =
            self.of_each(|inner: Arc<Inner>| async move { list(&inner, label, deadline).await });
        let mut known: BTreeMap<NamespaceId, NamespaceStats> = BTreeMap::new();
        let (mut silent, mut answered) = (Vec::new(), false);
        for (inner, told) in answers.await {
            match told {
                Ok(told) => {
                    answered = true;
                    told.into_iter().for_each(|stats| add(&mut known, stats));
                }
                Err(error) => silent.push((inner.endpoint.clone(), error)),
            }
        }
        match silent.is_empty() || answered {
            true => Ok(Namespaces {
                known: known.into_values().collect(),
                silent,
            }),
            false => Err(silent.swap_remove(0).1),
        }
    }
}

/// What one more member knows of a namespace.
fn add(known: &mut BTreeMap<NamespaceId, NamespaceStats>, stats: NamespaceStats) {
    match known.get_mut(&stats.id) {
        None => {
            known.insert(stats.id, stats);
        }
        Some(sum) => {
            sum.blocks = sum.blocks.saturating_add(stats.blocks);
            sum.bytes = sum.bytes.saturating_add(stats.bytes);
            sum.replicas = sum.replicas.max(stats.replicas);
            sum.is_latest |= stats.is_latest;
        }
    }
}

/// All pages of one member.
async fn list(
    inner: &Inner,
    label: Option<&str>,
    deadline: Deadline,
) -> Result<Vec<NamespaceStats>, Error> {
    let mut told = Vec::new();
    let mut after: Option<NamespaceId> = None;
    for _ in 0..MAX_PAGES {
        let question = |context| v1::ListNamespacesRequest {
            context: Some(context),
            ..v1::ListNamespacesRequest::from(ListNamespaces {
                context: Default::default(),
                label: label.map(str::to_owned),
                after,
            })
        };
        let answer: v1::ListNamespacesResponse =
            call::unary(inner, Method::LIST_NAMESPACES, deadline, question).await?;
        inner.heard(answer.context.as_ref());
        for stats in answer.namespaces {
            let stats = NamespaceStats::try_from(stats);
            told.push(stats.map_err(|e| wire::answer(Method::LIST_NAMESPACES, e))?);
        }
        let next = match &*answer.next_page_token {
            [] => return Ok(told),
            token => kvproto::convert::namespace_id(token),
        };
        let next = next.map_err(|e| wire::answer(Method::LIST_NAMESPACES, e))?;
        if after.is_some_and(|after| next <= after) {
            let problem = "its pages go round in circles";
            return Err(wire::answer(Method::LIST_NAMESPACES, problem));
        }
        after = Some(next);
    }
    Ok(told)
}
