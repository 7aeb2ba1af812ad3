//! Which device a name means, which memory a layout is there, and what may be wrong with either.

use std::sync::Arc;

use kvgpu::{
    Device, DeviceError, DevicePreference, KvLayout, KvPool, NoCuda, Opened, PagedKv, TransferError,
};

use crate::layout::{Layer, Layout};

/// Why blocks cannot be on this device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceProblem {
    /// No such name.
    #[error("device {name:?} is none; cuda:0, cuda:1, … and host are")]
    Name {
        /// What was asked for.
        name: String,
    },
    /// No such GPU.
    #[error("device {name}: {source}")]
    Absent {
        /// What was asked for.
        name: String,
        /// Why it is not there.
        source: NoCuda,
    },
    /// Memory that is not the device's, or a layout that it cannot have.
    #[error("device {name}: {source}")]
    Device {
        /// On which.
        name: String,
        /// What is wrong.
        source: DeviceError,
    },
    /// No memory or threads for the transfer.
    #[error("device {name}: {source}")]
    Transfer {
        /// On which.
        name: String,
        /// What is wrong.
        source: TransferError,
    },
}

/// Opens a device by its name: `cuda:N` or `host`.
///
/// # Errors
/// A name that is none, or a GPU that is not there; never the host instead.
pub fn open(name: &str) -> Result<Arc<dyn Device>, DeviceProblem> {
    let preference = match (name, name.strip_prefix("cuda:").map(str::parse)) {
        ("host", _) => DevicePreference::Host,
        ("cuda", _) => DevicePreference::Cuda { ordinal: 0 },
        (_, Some(Ok(ordinal))) => DevicePreference::Cuda { ordinal },
        _ => return Err(DeviceProblem::Name { name: name.into() }),
    };
    match kvgpu::open(preference) {
        (device, Opened::AsAsked) => Ok(device),
        (_, Opened::HostInstead(source)) => Err(DeviceProblem::Absent {
            name: name.into(),
            source,
        }),
    }
}

/// The layers as groups of equal stride and length, in their order.
///
/// # Safety
/// As [`OnDevice::new`].
pub(super) unsafe fn pool(layout: &Layout, device: &dyn Device) -> Result<KvPool, DeviceError> {
    let alike = |one: &Layer, other: &Layer| {
        (one.stride_bytes, one.block_bytes) == (other.stride_bytes, other.block_bytes)
    };
    let mut groups = Vec::new();
    for layers in layout.layers().chunk_by(alike) {
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let kv = KvLayout::pieces(
            count(layers.len()),
            count(layout.blocks()),
            layers[0].stride_bytes as u64,
            count(layers[0].block_bytes),
        );
        kv.validate()?;
        let mut spans = Vec::with_capacity(layers.len());
        for layer in layers {
            // SAFETY: the promise of `OnDevice::new`, which keeps the transfer, and so the memory, in hand.
            let memory = unsafe { device.adopt(layer.address as u64, kv.layer_bytes() as usize) }?;
            spans.push(memory.whole());
        }
        groups.push(PagedKv::per_layer(kv, spans)?);
    }
    KvPool::new(groups, 1)
}
