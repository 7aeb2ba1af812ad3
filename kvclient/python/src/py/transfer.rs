//! `terrace.Transfer`: the way through page-locked slots by itself, to be checked and measured.

use kvgpu::{Arrangement, KvLayout, KvOrder, KvStrides};
use pyo3::{exceptions::PyRuntimeError, prelude::*, types::PyBytes};

use super::convert::wrong;
use crate::{
    device::OnDevice,
    layout::{Layer, Layout},
};

/// Copies blocks between an engine's memory on a device and page-locked slots.
#[pyclass(module = "terrace", frozen)]
pub(super) struct Transfer(OnDevice);

fn failed(problem: String) -> PyErr {
    PyRuntimeError::new_err(problem)
}

#[pymethods]
impl Transfer {
    #[new]
    #[pyo3(signature = (device, layers, *, stream = 0))]
    fn new(
        py: Python<'_>,
        device: &str,
        layers: Vec<(usize, usize, usize, usize)>,
        stream: u64,
    ) -> PyResult<Self> {
        let layer = |(address, blocks, stride_bytes, block_bytes)| Layer {
            address,
            blocks,
            stride_bytes,
            block_bytes,
        };
        let layout = Layout::new(layers.into_iter().map(layer).collect()).map_err(wrong)?;
        // SAFETY: passed on to Python's caller, who is told so in the stub's docstring.
        #[allow(unsafe_code)]
        let made = py.detach(|| unsafe { OnDevice::new(&layout, device, stream) });
        made.map(Self).map_err(|error| failed(error.to_string()))
    }

    #[staticmethod]
    #[pyo3(signature = (device, addresses, counts, strides, row_bytes, *, stream = 0))]
    fn strided(
        py: Python<'_>,
        device: &str,
        addresses: Vec<u64>,
        counts: (u32, u32, u32, u32),
        strides: (u64, u64, u64, u64),
        row_bytes: u32,
        stream: u64,
    ) -> PyResult<Self> {
        let kv = KvLayout {
            layers: u32::try_from(addresses.len()).unwrap_or(u32::MAX),
            kv: counts.0,
            pages: counts.1,
            page_tokens: counts.2,
            heads: counts.3,
            head_size: row_bytes,
            dtype_bytes: 1,
            order: KvOrder::Nhd,
            arrangement: Arrangement::Strided(KvStrides {
                kv: strides.0,
                page: strides.1,
                token: strides.2,
                head: strides.3,
            }),
        };
        // SAFETY: as in `new`.
        #[allow(unsafe_code)]
        let made = py.detach(|| unsafe { OnDevice::strided(kv, &addresses, device, stream) });
        made.map(Self).map_err(|error| failed(error.to_string()))
    }

    #[getter]
    fn device_name(&self) -> &str {
        self.0.device_name()
    }

    #[getter]
    fn block_bytes(&self) -> usize {
        self.0.block_bytes()
    }

    #[getter]
    fn blocks_per_batch(&self) -> usize {
        self.0.blocks_per_batch()
    }

    fn save<'py>(&self, py: Python<'py>, block_ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        let batches = self.cut(&block_ids);
        let saved = py.detach(|| {
            let mut saved = Vec::with_capacity(block_ids.len() * self.0.block_bytes());
            self.0
                .save_each(&batches, |bytes| saved.extend_from_slice(bytes))
                .map(|()| saved)
        });
        saved.map(|saved| PyBytes::new(py, &saved)).map_err(failed)
    }

    fn load(&self, py: Python<'_>, block_ids: Vec<u32>, blocks: &[u8]) -> PyResult<()> {
        let expected = block_ids.len() * self.0.block_bytes();
        if blocks.len() != expected {
            let problem = format!("blocks: {} bytes, must be {expected}", blocks.len());
            return Err(pyo3::exceptions::PyValueError::new_err(problem));
        }
        let batches = self.cut(&block_ids);
        let step = self.0.blocks_per_batch() * self.0.block_bytes();
        py.detach(|| {
            self.0.load_each(&batches, |number, bytes| {
                bytes.copy_from_slice(&blocks[number * step..][..bytes.len()]);
            })
        })
        .map_err(failed)
    }

    /// Saves and forgets: for a clock around it.
    fn save_only(&self, py: Python<'_>, block_ids: Vec<u32>) -> PyResult<()> {
        let batches = self.cut(&block_ids);
        py.detach(|| self.0.save_each(&batches, |_| {}))
            .map_err(failed)
    }

    /// Loads whatever the slots hold: for a clock around it.
    fn load_only(&self, py: Python<'_>, block_ids: Vec<u32>) -> PyResult<()> {
        let batches = self.cut(&block_ids);
        py.detach(|| self.0.load_each(&batches, |_, _| {}))
            .map_err(failed)
    }
}

impl Transfer {
    fn cut(&self, block_ids: &[u32]) -> Vec<Vec<u32>> {
        let step = self.0.blocks_per_batch().max(1);
        block_ids.chunks(step).map(<[u32]>::to_vec).collect()
    }
}
