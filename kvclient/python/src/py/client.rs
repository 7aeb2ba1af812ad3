//! `terrace.Client`.

use std::time::Duration;

use bytes::Bytes;
use kvclient::PathReport;
use parking_lot::{RwLock, RwLockReadGuard};
use pyo3::{
    exceptions::PyConnectionError,
    prelude::*,
    types::{PyBytes, PyDict},
};

use super::convert::{self, wrong};
use crate::{
    client::{Error, PlainClient},
    node::NodeSettings,
};

/// A plain, blocking client of one namespace.
#[pyclass(module = "terrace", frozen)]
pub(super) struct Client {
    plain: RwLock<PlainClient>,
    /// Looked at before the lock: in a forked child its holder may be a thread that only the parent has.
    process: u32,
}

impl Client {
    fn plain(&self) -> Result<RwLockReadGuard<'_, PlainClient>, Error> {
        if std::process::id() != self.process {
            return Err(Error::Forked);
        }
        Ok(self.plain.read())
    }
}

fn raised(error: Error) -> PyErr {
    if error.is_unavailable() {
        return PyConnectionError::new_err(error.to_string());
    }
    wrong(error)
}

#[pymethods]
impl Client {
    #[new]
    #[pyo3(signature = (
        endpoint = "127.0.0.1:7070", namespace = None, *, block_tokens = 16, token = None, local = "auto",
        strict = false, timeout_ms = 5000
    ))]
    #[allow(
        clippy::too_many_arguments,
        reason = "Python's keyword arguments; one struct of settings on our side"
    )]
    fn new(
        py: Python<'_>,
        endpoint: &str,
        namespace: Option<&Bound<'_, PyAny>>,
        block_tokens: u32,
        token: Option<String>,
        local: &str,
        strict: bool,
        timeout_ms: u64,
    ) -> PyResult<Self> {
        let label = pyo3::types::PyString::new(py, "python");
        let namespace = namespace.unwrap_or(label.as_any());
        let spec = convert::label_or_namespace(namespace, block_tokens)?;
        let node = NodeSettings {
            endpoint: endpoint.to_owned(),
            owner: None,
            token,
            local: local.to_owned(),
            strict,
        };
        let deadline = Duration::from_millis(timeout_ms);
        py.detach(|| PlainClient::connect(&node, &spec, deadline))
            .map(|client| Self {
                plain: RwLock::new(client),
                process: std::process::id(),
            })
            .map_err(raised)
    }

    #[getter]
    fn block_tokens(&self) -> PyResult<u32> {
        Ok(self.plain().map_err(raised)?.block_tokens())
    }

    #[getter]
    fn difference(&self) -> PyResult<Option<String>> {
        Ok(self
            .plain()
            .map_err(raised)?
            .difference()
            .map(str::to_owned))
    }

    #[pyo3(signature = (tokens, blocks, *, first = 0))]
    fn put(
        &self,
        py: Python<'_>,
        tokens: Vec<u32>,
        blocks: Vec<Vec<u8>>,
        first: usize,
    ) -> PyResult<Vec<String>> {
        let blocks = blocks.into_iter().map(Bytes::from).collect();
        py.detach(|| self.plain()?.put(&tokens, first, blocks))
            .map_err(raised)
    }

    #[pyo3(signature = (tokens, *, first = 0))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        tokens: Vec<u32>,
        first: usize,
    ) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let got = py
            .detach(|| self.plain()?.get(&tokens, first))
            .map_err(raised)?;
        Ok(got.iter().map(|bytes| PyBytes::new(py, bytes)).collect())
    }

    fn lookup(&self, py: Python<'_>, tokens: Vec<u32>) -> PyResult<usize> {
        py.detach(|| self.plain()?.lookup(&tokens)).map_err(raised)
    }

    #[pyo3(signature = (tokens = None))]
    fn invalidate(&self, py: Python<'_>, tokens: Option<Vec<u32>>) -> PyResult<u64> {
        py.detach(|| self.plain()?.invalidate(tokens.as_deref()))
            .map_err(raised)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.plain()?.stats()).map_err(raised)?;
        let dict = PyDict::new(py);
        for (name, value) in stats {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn close(&self, py: Python<'_>) {
        if std::process::id() == self.process {
            py.detach(|| self.plain.write().close());
        }
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(&self, py: Python<'_>, _exc: &Bound<'_, PyAny>) {
        self.close(py);
    }
}

/// Which way bytes go, as a dict.
pub(super) fn path(py: Python<'_>, report: PathReport) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("in_use", report.path.to_string())?;
    if let Some(why) = report.why_grpc {
        dict.set_item("why_grpc", why)?;
    }
    dict.set_item("local_failures", report.failures)?;
    for (way, went) in [("local", report.local), ("grpc", report.grpc)] {
        dict.set_item(format!("{way}_calls"), went.calls)?;
        dict.set_item(format!("{way}_got_blocks"), went.got_blocks)?;
        dict.set_item(format!("{way}_got_bytes"), went.got_bytes)?;
        dict.set_item(format!("{way}_put_blocks"), went.put_blocks)?;
        dict.set_item(format!("{way}_put_bytes"), went.put_bytes)?;
    }
    Ok(dict)
}
