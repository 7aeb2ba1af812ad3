//! SGLang's pages: their names and places, and `Found`, the leases of what was found.

use parking_lot::Mutex;
use pyo3::{prelude::*, types::PyBytes};

use super::convert::wrong;
use crate::connector::{
    found::{self, LetGo, MAX_HELD},
    pages::{self, WIDTH},
};

/// The names of keys, joined.
#[pyfunction]
pub(super) fn page_names<'py>(
    py: Python<'py>,
    keys: Vec<Bound<'py, pyo3::types::PyString>>,
) -> PyResult<Bound<'py, PyBytes>> {
    let mut names = Vec::with_capacity(keys.len() * WIDTH);
    for key in &keys {
        names.extend(pages::name(&key.to_cow()?));
    }
    Ok(PyBytes::new(py, &names))
}

/// Where the pieces of all pages lie, by those of three of them.
#[pyfunction]
pub(super) fn page_layers(
    first: Vec<usize>,
    middle: Vec<usize>,
    last: Vec<usize>,
    sizes: Vec<usize>,
    pages: usize,
) -> PyResult<Vec<(usize, usize, usize, usize)>> {
    let layers = pages::layers(&first, &middle, &last, &sizes, pages).map_err(wrong)?;
    let told = layers.iter();
    Ok(told
        .map(|layer| {
            (
                layer.address,
                layer.blocks,
                layer.stride_bytes,
                layer.block_bytes,
            )
        })
        .collect())
}

/// Which lookups are still leased, by the pages they found. SGLang's threads share it.
#[pyclass(module = "terrace._terrace", frozen)]
pub(super) struct Found(Mutex<found::Found>);

fn page(name: &[u8]) -> PyResult<[u8; WIDTH]> {
    name.try_into()
        .map_err(|_| wrong(format!("a page's name has {WIDTH} bytes")))
}

#[pymethods]
impl Found {
    #[classattr]
    const MAX_HELD: usize = MAX_HELD;

    #[new]
    fn new(hold_seconds: f64) -> Self {
        Self(Mutex::new(found::Found::new(hold_seconds)))
    }

    fn keep(&self, pool: &str, request: &str, names: &[u8], now: f64) -> Vec<LetGo> {
        self.0.lock().keep(pool, request, names, now)
    }

    fn of(&self, pool: &str, name: &[u8]) -> PyResult<Option<String>> {
        let name = page(name)?;
        Ok(self.0.lock().of(pool, name).map(str::to_owned))
    }

    fn read(&self, request: &str, last: &[u8]) -> PyResult<Option<LetGo>> {
        let last = page(last)?;
        Ok(self.0.lock().read(request, last))
    }

    fn over(&self, now: f64) -> Vec<LetGo> {
        self.0.lock().over(now)
    }

    fn __len__(&self) -> usize {
        self.0.lock().len()
    }
}
