//! Python's side: types in, types out, and the interpreter's lock let go wherever something waits.
//!
//! `terrace/_terrace.pyi` describes every signature; keep the two equal.

mod cache;
mod client;
mod convert;
mod hauls;
mod pages;
mod planner;
mod tier;
mod transfer;

use pyo3::{prelude::*, types::PyDict};

use crate::connector::counts::COUNTERS;

/// The compiled half of the package `terrace`.
#[pymodule]
fn _terrace(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<cache::Cache>()?;
    module.add_class::<cache::Finished>()?;
    module.add_class::<transfer::Transfer>()?;
    module.add_class::<client::Client>()?;
    module.add_class::<planner::Planner>()?;
    module.add_class::<planner::Order>()?;
    module.add_class::<hauls::Hauls>()?;
    module.add_class::<tier::Chunks>()?;
    module.add_class::<tier::Ending>()?;
    module.add_class::<pages::Found>()?;
    module.add_function(wrap_pyfunction!(pages::page_names, module)?)?;
    module.add_function(wrap_pyfunction!(pages::page_layers, module)?)?;
    let counters = PyDict::new(module.py());
    for (name, about) in COUNTERS {
        counters.set_item(name, about)?;
    }
    module.add("COUNTERS", counters)
}
