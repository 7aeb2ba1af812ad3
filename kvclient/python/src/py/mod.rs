//! Python's side: types in, types out, and the interpreter's lock let go wherever something waits.
//!
//! `terrace/_terrace.pyi` describes every signature; keep the two equal.

mod cache;
mod client;
mod convert;
mod transfer;

use pyo3::prelude::*;

/// The compiled half of the package `terrace`.
#[pymodule]
fn _terrace(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<cache::Cache>()?;
    module.add_class::<cache::Finished>()?;
    module.add_class::<transfer::Transfer>()?;
    module.add_class::<client::Client>()
}
