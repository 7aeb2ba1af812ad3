//! From Python's values to ours, with a word about what is wrong.

use kvclient::{Namespace, OwnerId, Part};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    prelude::*,
    types::{PyBool, PyDict, PyInt, PyMapping, PyString},
};

use crate::spec::{self, Value};

/// The namespace of a mapping of fields.
pub(super) fn namespace(fields: &Bound<'_, PyAny>) -> PyResult<Namespace> {
    let fields = fields
        .cast::<PyMapping>()
        .map_err(|_| PyTypeError::new_err("spec: a mapping of fields is wanted"))?;
    let mut list = Vec::new();
    for item in fields.items()?.iter() {
        let (name, value): (String, Bound<'_, PyAny>) = item.extract()?;
        let value = if let Ok(text) = value.cast::<PyString>() {
            Value::Text(text.extract()?)
        } else if value.is_instance_of::<PyInt>() && !value.is_instance_of::<PyBool>() {
            Value::Count(value.extract()?)
        } else {
            let problem = format!("spec: {name} is neither a text nor a number");
            return Err(PyTypeError::new_err(problem));
        };
        list.push((name, value));
    }
    spec::namespace(list).map_err(wrong)
}

/// A label, or a mapping of fields.
pub(super) fn label_or_namespace(
    given: &Bound<'_, PyAny>,
    block_tokens: u32,
) -> PyResult<Namespace> {
    if given.is_instance_of::<PyString>() {
        let fields = PyDict::new(given.py());
        fields.set_item("label", given)?;
        fields.set_item("block_tokens", block_tokens)?;
        return namespace(fields.as_any());
    }
    namespace(given)
}

pub(super) fn owner(bytes: &[u8]) -> PyResult<OwnerId> {
    OwnerId::from_slice(bytes).ok_or_else(|| {
        PyValueError::new_err(format!(
            "owner: {} bytes; {} are wanted",
            bytes.len(),
            OwnerId::BYTES
        ))
    })
}

pub(super) fn part((rank, layer_group): (u16, u16)) -> Part {
    Part { rank, layer_group }
}

/// A call that can never work.
pub(super) fn wrong(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}
