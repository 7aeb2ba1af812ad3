//! The worker's half of vLLM's connector: `Hauls`.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict},
};

use super::{
    convert::{self, Done},
    planner::Order,
};
use crate::connector::hauls::{self, Part};

/// What a worker moves for its scheduler, and what it says of it.
#[pyclass(module = "terrace._terrace")]
#[derive(Default)]
pub(super) struct Hauls(hauls::Hauls);

/// Arguments of `Cache.load`.
type Load<'py> = (
    u64,
    u64,
    Bound<'py, PyBytes>,
    usize,
    usize,
    Bound<'py, PyBytes>,
);

/// Arguments of `Cache.save`.
type Save<'py> = (u64, Bound<'py, PyBytes>, usize, usize, Bound<'py, PyBytes>);

fn load<'py>(py: Python<'py>, part: &Part) -> Load<'py> {
    let (order, (job, hashes, width, first, ids)) = (&part.order, save(py, part));
    (job, order.lease, hashes, width, first, ids)
}

fn save<'py>(py: Python<'py>, part: &Part) -> Save<'py> {
    let (hashes, ids) = (
        PyBytes::new(py, &part.order.hashes),
        convert::ids(py, part.block_ids()),
    );
    (part.job, hashes, part.order.width, part.first(), ids)
}

#[pymethods]
impl Hauls {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn measure(&mut self, block_bytes: usize) {
        self.0.measure(block_bytes);
    }

    fn load<'py>(&mut self, py: Python<'py>, orders: Vec<Bound<'py, Order>>) -> Vec<Load<'py>> {
        let parts = orders
            .iter()
            .flat_map(|order| self.0.load(Arc::clone(&order.get().0)));
        parts.map(|part| load(py, &part)).collect()
    }

    fn save<'py>(&mut self, py: Python<'py>, orders: Vec<Bound<'py, Order>>) -> Vec<Save<'py>> {
        let parts = orders
            .iter()
            .map(|order| self.0.save(Arc::clone(&order.get().0)));
        parts.map(|part| save(py, &part)).collect()
    }

    fn ended(&mut self, finished: Done) -> Option<String> {
        self.0.ended(finished.into())
    }

    fn give_up(&mut self, job: u64, reason: &str) -> Option<String> {
        self.0.give_up(job, reason)
    }

    fn give_up_all(&mut self, reason: &str) -> Vec<String> {
        self.0.give_up_all(reason)
    }

    fn hold(&mut self, requests: Vec<String>) {
        self.0.hold(requests);
    }

    fn take_sent(&mut self) -> HashSet<String> {
        self.0.take_sent()
    }

    fn take_received(&mut self) -> HashSet<String> {
        self.0.take_received()
    }

    fn take_failed(&mut self) -> HashSet<u32> {
        self.0.take_failed().into_iter().collect()
    }

    fn take_done(&mut self) -> HashMap<u64, HashSet<u32>> {
        let done = self.0.take_done().into_iter();
        done.map(|(job, failed)| (job, failed.into_iter().collect()))
            .collect()
    }

    #[getter]
    fn has_failed(&self) -> bool {
        self.0.has_failed()
    }

    #[getter]
    fn loading(&self) -> usize {
        self.0.loading()
    }

    #[getter]
    fn saving(&self) -> Vec<u64> {
        self.0.saving()
    }

    fn counts<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        convert::counts(py, self.0.counts())
    }
}
