//! The scheduler's half of vLLM's connector: `Planner`, and the `Order`s that go to the workers.

use std::{collections::HashSet, sync::Arc};

use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict},
};

use super::convert::{self, BlockIds, wrong};
use crate::connector::{
    order,
    planner::{self, MAX_ASKS, Rules},
};

/// Blocks of one request on their way from a scheduler to its workers.
#[pyclass(module = "terrace._terrace", frozen)]
pub(super) struct Order(pub(super) Arc<order::Order>);

/// What makes an order: its job, request, hashes, their width, the first block, the engine's blocks, the lease.
type Made<'py> = (
    u64,
    &'py str,
    Bound<'py, PyBytes>,
    usize,
    usize,
    Bound<'py, PyBytes>,
    u64,
);

#[pymethods]
impl Order {
    #[new]
    fn new(
        job: u64,
        request: String,
        hashes: Vec<u8>,
        width: usize,
        first: usize,
        block_ids: BlockIds,
        lease: u64,
    ) -> PyResult<Self> {
        let block_ids = block_ids.0;
        if width.checked_mul(first + block_ids.len()) != Some(hashes.len()) {
            return Err(wrong("hashes: do not end with the last block"));
        }
        Ok(Self(Arc::new(order::Order {
            job,
            request,
            hashes,
            width,
            first,
            block_ids,
            lease,
        })))
    }

    #[getter]
    fn job(&self) -> u64 {
        self.0.job
    }

    #[getter]
    fn request(&self) -> &str {
        &self.0.request
    }

    #[getter]
    fn first(&self) -> usize {
        self.0.first
    }

    #[getter]
    fn block_ids(&self) -> Vec<u32> {
        self.0.block_ids.clone()
    }

    /// For `pickle`: vLLM's scheduler and workers may be different processes.
    fn __getnewargs__<'py>(&'py self, py: Python<'py>) -> Made<'py> {
        let order = &self.0;
        let (hashes, block_ids) = (
            PyBytes::new(py, &order.hashes),
            convert::ids(py, &order.block_ids),
        );
        (
            order.job,
            &order.request,
            hashes,
            order.width,
            order.first,
            block_ids,
            order.lease,
        )
    }
}

/// What a scheduler loads, saves and keeps.
#[pyclass(module = "terrace._terrace")]
pub(super) struct Planner(planner::Planner);

impl Planner {
    /// What the engine has hashed since the last time.
    fn learn(&mut self, request: &str, hashes: &Bound<'_, PyAny>) -> PyResult<()> {
        for i in self.0.known(request)..hashes.len()? {
            let hash = hashes.get_item(i)?;
            self.0.learn(request, hash.extract()?).map_err(wrong)?;
        }
        Ok(())
    }
}

fn orders(orders: Vec<Arc<order::Order>>) -> Vec<Order> {
    orders.into_iter().map(Order).collect()
}

#[pymethods]
impl Planner {
    #[classattr]
    const MAX_ASKS: u32 = MAX_ASKS;

    #[new]
    #[pyo3(signature = (block_tokens, *, loads, saves, prompts_only, workers))]
    fn new(
        block_tokens: usize,
        loads: bool,
        saves: bool,
        prompts_only: bool,
        workers: usize,
    ) -> PyResult<Self> {
        let rules = Rules {
            block_tokens,
            loads,
            saves,
            prompts_only,
            workers,
        };
        planner::Planner::new(rules).map(Self).map_err(wrong)
    }

    fn ask<'py>(
        &mut self,
        py: Python<'py>,
        request: &str,
        hashes: &Bound<'py, PyAny>,
        tokens: usize,
        computed: usize,
        preemptions: u64,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.0.track(request, preemptions);
        self.learn(request, hashes)?;
        let chain = self.0.ask(request, tokens, computed);
        Ok(chain.map(|chain| PyBytes::new(py, chain)))
    }

    fn answered(&mut self, request: &str, found: Option<usize>) -> Option<usize> {
        self.0.answered(request, found)
    }

    fn allocated(&mut self, request: &str, tokens: usize, block_ids: BlockIds, lease: u64) -> bool {
        self.0.allocated(request, tokens, &block_ids.0, lease)
    }

    fn saving(&self) -> Vec<String> {
        self.0.saving()
    }

    fn preempted(&mut self, request: &str, preemptions: u64) {
        self.0.preempted(request, preemptions);
    }

    fn fills(
        &mut self,
        request: &str,
        hashes: &Bound<'_, PyAny>,
        computed: usize,
        scheduled: usize,
        prompt_tokens: usize,
    ) -> PyResult<bool> {
        self.learn(request, hashes)?;
        Ok(self.0.fills(request, computed, scheduled, prompt_tokens))
    }

    fn save(&mut self, request: &str, block_ids: BlockIds) -> Option<u64> {
        self.0.save(request, &block_ids.0)
    }

    fn take(&mut self) -> (Vec<Order>, Vec<Order>, Vec<String>, bool) {
        let plan = self.0.take();
        (
            orders(plan.loads),
            orders(plan.saves),
            plan.held,
            plan.preempted,
        )
    }

    fn finished(&mut self, request: &str, preemptions: u64) -> (bool, bool) {
        let leaves = self.0.finished(request, preemptions);
        (leaves.blocks, leaves.lookup)
    }

    fn loaded(&mut self, request: &str) {
        self.0.loaded(request);
    }

    fn failed<'py>(
        &mut self,
        py: Python<'py>,
        block_ids: HashSet<u32>,
    ) -> Option<(Bound<'py, PyBytes>, usize)> {
        let hashes = self.0.failed(&block_ids)?;
        Some((PyBytes::new(py, &hashes.bytes), hashes.width))
    }

    fn replied(
        &mut self,
        job: u64,
        workers: usize,
        failed: BlockIds,
    ) -> Option<(usize, usize, HashSet<usize>)> {
        let stored = self.0.replied(job, workers, &failed.0)?;
        Some((
            stored.blocks.start,
            stored.blocks.end,
            stored.missing.into_iter().collect(),
        ))
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    #[getter]
    fn tracked(&self) -> usize {
        self.0.tracked()
    }

    #[getter]
    fn unanswered(&self) -> usize {
        self.0.unanswered()
    }

    fn counts<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        convert::counts(py, self.0.counts())
    }
}
