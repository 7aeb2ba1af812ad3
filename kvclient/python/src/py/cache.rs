//! `terrace.Cache` and `terrace.Finished`.

use std::{collections::HashMap, time::Duration};

use pyo3::{exceptions::PyConnectionError, prelude::*, types::PyDict};

use super::convert::{self, BlockIds, wrong};
use crate::{
    cache::{self, Blocks, CacheSettings},
    jobs,
    layout::Layer,
    node::NodeSettings,
};

/// One engine process's view of one namespace.
#[pyclass(module = "terrace", frozen)]
pub(super) struct Cache(cache::Cache);

/// What became of one load or save.
#[pyclass(module = "terrace", frozen, get_all)]
pub(super) struct Finished {
    job: u64,
    kind: &'static str,
    blocks: usize,
    bytes: u64,
    failed_block_ids: Vec<u32>,
    seconds: f64,
    reason: Option<String>,
    ok: bool,
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn blocks(hashes: &[u8], width: usize, first: usize, BlockIds(ids): BlockIds) -> Blocks<'_> {
    Blocks {
        hashes,
        width,
        first,
        ids,
    }
}

#[pymethods]
impl Cache {
    #[new]
    #[pyo3(signature = (
        endpoint, spec, *, owner, part = (0, 0), parts = None, token = None, local = "auto", strict = false,
        lookup_timeout_ms = 200, transfer_timeout_ms = 5000, lease_ms = 10000, miss_ms = 60000, threads = 2,
        max_jobs = 256, max_lookups = 4096
    ))]
    #[allow(
        clippy::too_many_arguments,
        reason = "Python's keyword arguments; one struct of settings on our side"
    )]
    fn new(
        py: Python<'_>,
        endpoint: String,
        spec: &Bound<'_, PyAny>,
        owner: &[u8],
        part: (u16, u16),
        parts: Option<Vec<(u16, u16)>>,
        token: Option<String>,
        local: &str,
        strict: bool,
        lookup_timeout_ms: u64,
        transfer_timeout_ms: u64,
        lease_ms: u64,
        miss_ms: u64,
        threads: usize,
        max_jobs: usize,
        max_lookups: usize,
    ) -> PyResult<Self> {
        let node = NodeSettings {
            endpoint,
            owner: Some(convert::owner(owner)?),
            token,
            local: local.to_owned(),
            strict,
        };
        let settings = CacheSettings {
            part: convert::part(part),
            parts: parts
                .unwrap_or_default()
                .into_iter()
                .map(convert::part)
                .collect(),
            lookup_timeout: ms(lookup_timeout_ms),
            transfer_timeout: ms(transfer_timeout_ms),
            lease: ms(lease_ms.max(1)),
            miss: ms(miss_ms),
            threads,
            max_jobs,
            max_lookups,
            ..CacheSettings::new(node, convert::namespace(spec)?)
        };
        py.detach(|| cache::Cache::new(settings))
            .map(Self)
            .map_err(wrong)
    }

    fn state(&self) -> &'static str {
        self.0.state().name()
    }

    fn difference(&self) -> Option<String> {
        self.0.difference()
    }

    fn news(&self) -> Option<(bool, String)> {
        self.0.news().map(|news| (news.good, news.line))
    }

    fn path<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        super::client::path(py, self.0.path())
    }

    #[pyo3(signature = (request, hashes, width, first, probe = false))]
    fn lookup(
        &self,
        request: &str,
        hashes: &[u8],
        width: usize,
        first: usize,
        probe: bool,
    ) -> PyResult<Option<usize>> {
        self.0
            .lookup(request, hashes, width, first, probe)
            .map_err(wrong)
    }

    fn lease(&self, request: &str) -> u64 {
        self.0.lease(request)
    }

    fn forget(&self, request: &str) {
        self.0.forget(request);
    }

    fn miss(&self, hashes: &[u8], width: usize) -> PyResult<()> {
        self.0.miss(hashes, width).map_err(wrong)
    }

    fn saved(&self, hashes: &[u8], width: usize) -> PyResult<()> {
        self.0.saved(hashes, width).map_err(wrong)
    }

    #[pyo3(signature = (layers, *, device = None, stream = 0))]
    fn layout(
        &self,
        py: Python<'_>,
        layers: Vec<(usize, usize, usize, usize)>,
        device: Option<String>,
        stream: u64,
    ) -> PyResult<()> {
        let layer = |(address, blocks, stride_bytes, block_bytes)| Layer {
            address,
            blocks,
            stride_bytes,
            block_bytes,
        };
        let layers = layers.into_iter().map(layer).collect();
        #[allow(unsafe_code)]
        let known = py.detach(|| match device {
            // SAFETY: passed on to Python's caller, who is told so in the stub's docstrings: the memory stays mapped, and
            // blocks are the cache's between the call that names them and their return.
            None => unsafe { self.0.layout(layers) },
            // SAFETY: as above, and the memory and the stream are the device's.
            Some(device) => unsafe { self.0.layout_on(layers, &device, stream) },
        });
        known.map_err(wrong)
    }

    fn load(
        &self,
        job: u64,
        lease: u64,
        hashes: &[u8],
        width: usize,
        first: usize,
        block_ids: BlockIds,
    ) -> PyResult<bool> {
        self.0
            .load(job, lease, blocks(hashes, width, first, block_ids))
            .map_err(wrong)
    }

    fn save(
        &self,
        job: u64,
        hashes: &[u8],
        width: usize,
        first: usize,
        block_ids: BlockIds,
    ) -> PyResult<bool> {
        self.0
            .save(job, blocks(hashes, width, first, block_ids))
            .map_err(wrong)
    }

    fn finished(&self) -> Vec<Finished> {
        self.0.finished().into_iter().map(Finished::from).collect()
    }

    fn wait_gathered(&self, py: Python<'_>, timeout_ms: u64) -> bool {
        py.detach(|| self.0.wait_gathered(ms(timeout_ms)))
    }

    fn wait(&self, py: Python<'_>, job: u64, timeout_ms: u64) -> Option<Finished> {
        let done = py.detach(|| self.0.wait(job, ms(timeout_ms)));
        done.map(Finished::from)
    }

    #[pyo3(signature = (hashes, width, timeout_ms, first = 0, request = None))]
    fn exists(
        &self,
        py: Python<'_>,
        hashes: &[u8],
        width: usize,
        timeout_ms: u64,
        first: usize,
        request: Option<&str>,
    ) -> PyResult<usize> {
        py.detach(|| self.0.exists(hashes, width, ms(timeout_ms), first, request))
            .map_err(wrong)
    }

    #[pyo3(signature = (timeout_ms = 5000))]
    fn invalidate_all(&self, py: Python<'_>, timeout_ms: u64) -> PyResult<u64> {
        py.detach(|| self.0.invalidate_all(ms(timeout_ms)))
            .map_err(PyConnectionError::new_err)
    }

    fn stats(&self) -> HashMap<&'static str, u64> {
        self.0.stats()
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

impl From<jobs::Finished> for Finished {
    fn from(done: jobs::Finished) -> Self {
        Self {
            job: done.job,
            kind: done.kind.name(),
            blocks: done.blocks,
            bytes: done.bytes,
            seconds: done.took.as_secs_f64(),
            ok: done.failed_block_ids.is_empty(),
            failed_block_ids: done.failed_block_ids,
            reason: done.reason,
        }
    }
}

#[pymethods]
impl Finished {
    fn __repr__(&self) -> String {
        let Self {
            job,
            kind,
            blocks,
            bytes,
            ..
        } = self;
        let why = match &self.reason {
            Some(reason) => format!(", {} failed: {reason}", self.failed_block_ids.len()),
            None => String::new(),
        };
        format!("<{kind} {job}: {blocks} blocks, {bytes} bytes{why}>")
    }
}
