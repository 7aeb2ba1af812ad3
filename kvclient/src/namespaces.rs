//! Which namespaces there are, and what is there of each.
//!
//! ```text
//! every member at once ─► its pages, by id ─► one list: what is there of a namespace added up over members
//! ```
//!
//! Shape: one entry per namespace of the caller's tenant that was ever opened at any of them.
//! Units: blocks, bytes; a copy at another member counts again.
//! Errors: of a member that does not answer, beside what the others say; of all when none does.
//! Why every member is asked: a namespace is known to those at whom it was opened, and that need not be all.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    sync::Arc,
};

use kvproto::{
    NamespaceId,
    convert::{
        answer::NamespaceStats,
        namespace_id,
        request::{Context, ListNamespaces},
    },
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
    /// Who has not answered, and why: what they alone know is missing above, and what they hold is not counted.
    pub silent: Vec<(Endpoint, Error)>,
}

impl Client {
    /// The namespaces of the caller's tenant, of one label or of all, with what all members hold of each; each walks its
    /// index for that. Opens none. Which is the latest of a label is the word of those who know the most of that label.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn namespaces(&self, label: Option<&str>) -> Result<Namespaces, Error> {
        self.all_namespaces(label, false, self.until()).await
    }

    /// Those of a label, as the first node knows them or, where that knows none, all members; without a label those that
    /// any member knows. Opens none, and counts nothing: `blocks` and `bytes` are 0.
    ///
    /// # Errors
    /// When nobody answers; or when a member does not, and the others know none, so that nobody can say.
    pub async fn find_namespaces(&self, label: Option<&str>) -> Result<Vec<NamespaceStats>, Error> {
        let deadline = self.until();
        if label.is_some() {
            let call = |inner: Arc<Inner>, deadline| async move {
                list(&inner, label, true, deadline).await
            };
            let found = self.of_anybody(deadline, call).await;
            match found {
                Ok(found) if !found.is_empty() => return Ok(found),
                _ => {} // others may know
            }
        }
        let Namespaces { known, mut silent } = self.all_namespaces(label, true, deadline).await?;
        match known.is_empty() && !silent.is_empty() {
            true => Err(silent.swap_remove(0).1),
            false => Ok(known),
        }
    }

    async fn all_namespaces(
        &self,
        label: Option<&str>,
        names_only: bool,
        deadline: Deadline,
    ) -> Result<Namespaces, Error> {
        let answers = self.of_each_once(|inner: Arc<Inner>| async move {
            list(&inner, label, names_only, deadline).await
        });
        let (mut told, mut silent) = (Vec::new(), Vec::new());
        for (inner, answer) in answers.await {
            match answer {
                Ok(known) => told.push(known),
                Err(error) => silent.push((inner.endpoint.clone(), error)),
            }
        }
        // That it does not answer says more than that it does not know the question.
        silent.sort_by_key(|(_, error)| !error.is_unavailable());
        match !told.is_empty() || silent.is_empty() {
            true => Ok(Namespaces {
                known: together(told),
                silent,
            }),
            false => Err(silent.swap_remove(0).1),
        }
    }
}

/// What each member knows, put together.
fn together(mut told: Vec<Vec<NamespaceStats>>) -> Vec<NamespaceStats> {
    let count = |told: &[NamespaceStats]| {
        let mut counts: HashMap<String, usize> = HashMap::new();
        for stats in told {
            *counts.entry(stats.namespace.label.clone()).or_default() += 1;
        }
        counts
    };
    let mut most: HashMap<String, usize> = HashMap::new();
    for (label, here) in told.iter().flat_map(|told| count(told)) {
        let most = most.entry(label).or_default();
        *most = here.max(*most);
    }
    for told in &mut told {
        let here = count(told);
        for stats in told {
            let label = &stats.namespace.label;
            stats.is_latest &= here[label] == most[label];
        }
    }
    let mut known: BTreeMap<NamespaceId, NamespaceStats> = BTreeMap::new();
    for stats in told.into_iter().flatten() {
        match known.entry(stats.id) {
            Entry::Vacant(vacant) => {
                vacant.insert(stats);
            }
            Entry::Occupied(mut sum) => {
                let sum = sum.get_mut();
                sum.blocks = sum.blocks.saturating_add(stats.blocks);
                sum.bytes = sum.bytes.saturating_add(stats.bytes);
                sum.replicas = sum.replicas.max(stats.replicas);
                sum.is_latest |= stats.is_latest;
            }
        }
    }
    known.into_values().collect()
}

/// All pages of one member.
async fn list(
    inner: &Inner,
    label: Option<&str>,
    names_only: bool,
    deadline: Deadline,
) -> Result<Vec<NamespaceStats>, Error> {
    let broken = |problem: String| wire::answer(Method::LIST_NAMESPACES, problem);
    let mut told = Vec::new();
    let mut after: Option<NamespaceId> = None;
    for _ in 0..MAX_PAGES {
        let question = |context| v1::ListNamespacesRequest {
            context: Some(context),
            ..v1::ListNamespacesRequest::from(ListNamespaces {
                context: Context::default(),
                label: label.map(str::to_owned),
                after,
                names_only,
            })
        };
        let answer: v1::ListNamespacesResponse =
            call::unary(inner, Method::LIST_NAMESPACES, deadline, question).await?;
        inner.heard(answer.context.as_ref());
        for stats in answer.namespaces {
            told.push(NamespaceStats::try_from(stats).map_err(|e| broken(e.to_string()))?);
        }
        let next = match &*answer.next_page_token {
            [] => return Ok(told),
            token => namespace_id(token).map_err(|e| broken(e.to_string()))?,
        };
        if after.is_some_and(|after| next <= after) {
            break;
        }
        after = Some(next);
    }
    Err(broken("its pages do not end".to_owned()))
}

#[cfg(test)]
mod tests {
    use kvproto::Namespace;

    use super::*;

    fn known(model: u32, blocks: u64, is_latest: bool) -> NamespaceStats {
        let namespace = Namespace {
            model: model.to_string(),
            ..Namespace::opaque("chat", 16, 8)
        };
        NamespaceStats {
            id: namespace.id("me"),
            namespace,
            replicas: 1,
            is_latest,
            blocks,
            bytes: 0,
        }
    }

    #[test]
    fn the_latest_of_a_label_is_the_word_of_those_who_know_the_most_of_it() {
        let of_one = || vec![known(1, 5, true)];
        let of_two = || vec![known(1, 2, false), known(2, 3, true)];
        let of_another = || vec![known(3, 1, true)];
        for told in [
            vec![of_one(), of_two(), of_another()],
            vec![of_two(), of_another(), of_one(), of_two()],
            vec![of_another(), of_one(), of_one(), of_two()],
        ] {
            let blocks: u64 = told.iter().flatten().map(|stats| stats.blocks).sum();
            let all = together(told);
            assert_eq!(all.len(), 3);
            assert_eq!(all.iter().map(|stats| stats.blocks).sum::<u64>(), blocks);
            let latest = all.iter().filter(|stats| stats.is_latest);
            let latest: Vec<&str> = latest.map(|stats| &*stats.namespace.model).collect();
            assert_eq!(latest, ["2"]);
        }
        // Who knows as many may say otherwise; then nobody can say.
        let others = vec![known(1, 0, true), known(2, 0, false)];
        let all = together(vec![of_two(), others]);
        assert!(all.iter().all(|stats| stats.is_latest));
        assert!(together(Vec::new()).is_empty());
    }
}
