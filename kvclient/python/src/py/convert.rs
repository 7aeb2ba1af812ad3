//! From Python's values to ours, with a word about what is wrong.

use kvclient::{Namespace, OwnerId, Part};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    prelude::*,
    types::{PyBool, PyBytes, PyDict, PyInt, PyMapping, PyString},
};

use crate::{
    connector::{batches::Ended, counts::Counts},
    spec::{self, Value},
};

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

/// The engine's blocks: numbers, or their bytes, four each in this machine's order.
pub(super) struct BlockIds(pub(super) Vec<u32>);

impl<'py> FromPyObject<'_, 'py> for BlockIds {
    type Error = PyErr;

    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = given.cast::<PyBytes>() {
            let (ids, rest) = bytes.as_bytes().as_chunks();
            if !rest.is_empty() {
                return Err(wrong("block_ids: four bytes each are wanted"));
            }
            return Ok(Self(ids.iter().copied().map(u32::from_ne_bytes).collect()));
        }
        let ids = given.try_iter()?.map(|id| id?.extract());
        ids.collect::<PyResult<_>>().map(Self)
    }
}

/// Block ids as bytes: one object, however many there are.
pub(super) fn ids<'py>(py: Python<'py>, ids: &[u32]) -> Bound<'py, PyBytes> {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
    PyBytes::new(py, &bytes)
}

/// As much of a `Finished`, or of what stands for one, as the connectors need.
#[derive(FromPyObject)]
pub(super) struct Done {
    job: u64,
    blocks: usize,
    bytes: u64,
    failed_block_ids: Vec<u32>,
    seconds: f64,
    reason: Option<String>,
}

impl From<Done> for Ended {
    fn from(done: Done) -> Self {
        Self {
            job: done.job,
            blocks: done.blocks,
            bytes: done.bytes,
            failed_block_ids: done.failed_block_ids,
            seconds: done.seconds,
            reason: done.reason,
        }
    }
}

/// What was counted since the last time: whole numbers, but for seconds.
pub(super) fn counts<'py>(py: Python<'py>, counts: &mut Counts) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, count) in counts.take() {
        if name.ends_with("_seconds") {
            dict.set_item(name, count)?;
        } else {
            dict.set_item(name, count as u64)?;
        }
    }
    Ok(dict)
}
