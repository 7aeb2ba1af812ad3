//! Opening the device that is there.

use std::fmt;
use std::sync::Arc;

use super::{Device, DeviceError};
use crate::host::HostDevice;

/// Which device to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DevicePreference {
    /// The first GPU, or the host device.
    #[default]
    Auto,
    /// The host device.
    Host,
    /// This GPU, or the host device.
    Cuda {
        /// Its number.
        ordinal: u32,
    },
}

/// Why there is no GPU to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoCuda {
    /// Built without the feature `cuda`.
    #[error("built without the feature cuda")]
    NotBuilt,
    /// No driver on this machine.
    #[error("libcuda is not installed")]
    NoDriver,
    /// A driver that lacks something this crate calls.
    #[error("the CUDA driver lacks {symbol}: it is too old")]
    MissingSymbol {
        /// What it lacks.
        symbol: &'static str,
    },
    /// A driver, but no device, or not this one.
    #[error("GPU {ordinal} is not there: {count} found")]
    NoDevice {
        /// Which was asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// The driver refused.
    #[error("{0}")]
    Driver(DeviceError),
}

/// How [`open`] came to its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// It is what was asked for.
    AsAsked,
    /// It is the host device, because there is no GPU to use.
    HostInstead(NoCuda),
}

impl fmt::Display for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AsAsked => f.write_str("as asked"),
            Self::HostInstead(why) => write!(f, "host memory instead of a GPU: {why}"),
        }
    }
}

/// Opens the device preferred, or the host device and says why. Never panics and needs no CUDA.
pub fn open(preference: DevicePreference) -> (Arc<dyn Device>, Opened) {
    let ordinal = match preference {
        DevicePreference::Host => return (Arc::new(HostDevice::default()), Opened::AsAsked),
        DevicePreference::Auto => 0,
        DevicePreference::Cuda { ordinal } => ordinal,
    };
    match open_cuda(ordinal) {
        Ok(device) => (device, Opened::AsAsked),
        Err(why) => (Arc::new(HostDevice::default()), Opened::HostInstead(why)),
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(ordinal: u32) -> Result<Arc<dyn Device>, NoCuda> {
    Ok(Arc::new(crate::cuda::CudaDevice::open(ordinal)?))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_ordinal: u32) -> Result<Arc<dyn Device>, NoCuda> {
    Err(NoCuda::NotBuilt)
}
