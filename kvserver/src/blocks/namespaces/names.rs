//! The table of namespaces: by tenant and label, in order of opening, judged and counted. What was opened aside alone
//! comes before the others.
//!
//! Errors: a strict caller's difference, a bound that is reached. Nothing here touches a file.

use std::{collections::BTreeMap, sync::Arc};

use kvproto::namespace::{Layout, Namespace, World};
use serde::{Deserialize, Serialize};

use super::{Bounds, Known};
use crate::{blocks::BlocksError, engine::TenantId, peers::Space};

/// How a namespace is opened.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    /// Not under a label that is known with another fingerprint.
    pub(super) strict: bool,
    /// Another of its label stays the last one.
    pub(super) aside: bool,
}

/// All records, by tenant and label; those of one label in order of opening.
#[derive(Clone, Default)]
pub(super) struct Names {
    tenants: BTreeMap<String, Labels>,
    len: usize,
}

#[derive(Clone, Default)]
struct Labels {
    records: BTreeMap<String, Vec<Record>>,
    len: usize,
}

impl Names {
    /// The record last opened under this one's label.
    pub(super) fn last(&self, record: &Record) -> Option<&Record> {
        self.last_of(&record.tenant, &record.label)
    }

    /// The record last opened under a label; what was opened aside alone does not count.
    pub(super) fn last_of(&self, tenant: &str, label: &str) -> Option<&Record> {
        let records = self.tenants.get(tenant)?.records.get(label)?;
        records.last().filter(|record| !record.aside)
    }

    /// Opens a namespace: what differs from the last of its label, and whether anything changed. It is the last from now
    /// on, unless it is opened aside.
    pub(super) fn open(
        &mut self,
        record: &Record,
        Manner { strict, aside }: Manner,
        bounds: Bounds,
    ) -> Result<(Option<String>, bool), BlocksError> {
        let last = self.last(record);
        let difference = last.and_then(|last| record.namespace().differences(&last.namespace()));
        if let (true, Some(difference)) = (strict, &difference) {
            return Err(BlocksError::NamespaceDiffers {
                label: record.label.clone(),
                difference: difference.clone(),
            });
        }
        if last == Some(record) {
            return Ok((None, false));
        }
        let labels = self.tenants.get(&record.tenant);
        let old = labels
            .and_then(|labels| labels.records.get(&record.label))
            .and_then(|records| records.iter().find(|held| held.is_same(record)));
        if aside && old.is_some_and(|old| old.replicas == record.replicas) {
            return Ok((difference, false));
        }
        if old.is_none() {
            let of_tenant = labels.map_or(0, |labels| labels.len);
            let refuse = |what, field, limit| Err(BlocksError::Overloaded { what, field, limit });
            if of_tenant >= bounds.per_tenant {
                let what = "namespaces of this tenant";
                return refuse(what, "max_namespaces", bounds.per_tenant);
            }
            if self.len >= bounds.total {
                return refuse("namespaces", "max_namespaces_total", bounds.total);
            }
        }
        self.put(record.clone(), aside);
        Ok((difference, true))
    }

    fn put(&mut self, record: Record, aside: bool) {
        let labels = self.tenants.entry(record.tenant.clone()).or_default();
        let records = labels.records.entry(record.label.clone()).or_default();
        let old = records.iter().position(|held| held.is_same(&record));
        match (old, aside) {
            (Some(at), true) => records[at].replicas = record.replicas,
            (Some(at), false) => {
                records.remove(at);
                records.push(record);
            }
            (None, true) => records.insert(0, Record { aside, ..record }),
            (None, false) => records.push(record),
        }
        if old.is_none() {
            labels.len += 1;
            self.len += 1;
        }
    }

    /// One of the file, in its order.
    pub(super) fn take(&mut self, record: Record) {
        let labels = self.tenants.entry(record.tenant.clone()).or_default();
        let records = labels.records.entry(record.label.clone()).or_default();
        if !records.iter().any(|held| held.is_same(&record)) {
            records.push(record);
            labels.len += 1;
            self.len += 1;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Record> {
        let labels = self.tenants.values();
        labels.flat_map(|labels| labels.records.values().flatten())
    }
}

/// A namespace as the file holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) tenant: String,
    label: String,
    model: String,
    weights: String,
    tokenizer: String,
    kv_dtype: String,
    layers: u32,
    kv_heads: u32,
    head_size: u32,
    packing: String,
    block_tokens: u32,
    run_blocks: u32,
    tensor_parallel: u32,
    pipeline_parallel: u32,
    context_parallel: u32,
    engine_class: String,
    /// Owners of each run; no part of what a namespace is. 0: written before there were any.
    #[serde(default)]
    pub(super) replicas: u32,
    /// It was opened by tools, and by nodes that moved its blocks here, and by nobody else.
    #[serde(default)]
    aside: bool,
}

impl Record {
    /// Whether both are one namespace.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let (replicas, aside) = (other.replicas, other.aside);
        Self {
            replicas,
            aside,
            ..self.clone()
        } == *other
    }

    pub(super) fn of(tenant: &str, n: &Namespace, replicas: u32) -> Self {
        Self {
            tenant: tenant.to_owned(),
            label: n.label.clone(),
            model: n.model.clone(),
            weights: n.weights.clone(),
            tokenizer: n.tokenizer.clone(),
            kv_dtype: n.kv_dtype.clone(),
            layers: n.layout.layers,
            kv_heads: n.layout.kv_heads,
            head_size: n.layout.head_size,
            packing: n.layout.packing.clone(),
            block_tokens: n.block_tokens,
            run_blocks: n.run_blocks,
            tensor_parallel: n.world.tensor,
            pipeline_parallel: n.world.pipeline,
            context_parallel: n.world.context,
            engine_class: n.engine_class.clone(),
            replicas,
            aside: false,
        }
    }

    pub(super) fn namespace(&self) -> Namespace {
        Namespace {
            label: self.label.clone(),
            model: self.model.clone(),
            weights: self.weights.clone(),
            tokenizer: self.tokenizer.clone(),
            kv_dtype: self.kv_dtype.clone(),
            layout: Layout {
                layers: self.layers,
                kv_heads: self.kv_heads,
                head_size: self.head_size,
                packing: self.packing.clone(),
            },
            block_tokens: self.block_tokens,
            run_blocks: self.run_blocks,
            world: World {
                tensor: self.tensor_parallel,
                pipeline: self.pipeline_parallel,
                context: self.context_parallel,
            },
            engine_class: self.engine_class.clone(),
        }
    }

    pub(super) fn known(&self, tenant: TenantId) -> Known {
        Known {
            tenant,
            run_blocks: self.run_blocks,
            block_tokens: self.block_tokens,
            replicas: self.replicas.max(1),
        }
    }

    pub(super) fn space(&self) -> Space {
        let shape = self.namespace();
        Space {
            id: shape.id(&self.tenant),
            tenant: self.tenant.as_str().into(),
            shape: Arc::new(shape),
            replicas: self.replicas.max(1) as usize,
        }
    }
}
