//! Device memory, parts of it, and an engine's paged KV in it.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use super::DeviceError;
use crate::layout::{KvLayout, LayoutError};
use crate::plan::CopyPlan;

/// Device memory; freed when the last handle goes, those of enqueued operations included.
#[derive(Clone)]
pub struct DeviceMemory {
    pub(crate) device: u64,
    /// The device's own address of the first byte.
    pub(crate) address: u64,
    pub(crate) bytes: usize,
    pub(crate) backing: Arc<dyn Any + Send + Sync>,
}

impl DeviceMemory {
    /// How long it is.
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// All of it.
    pub fn whole(&self) -> DeviceSpan {
        DeviceSpan {
            memory: self.clone(),
            offset: 0,
            length: self.bytes,
        }
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`DeviceError::Bounds`].
    pub fn span(&self, offset: usize, length: usize) -> Result<DeviceSpan, DeviceError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.bytes => Ok(DeviceSpan {
                memory: self.clone(),
                offset,
                length,
            }),
            _ => Err(DeviceError::Bounds {
                field: "span",
                offset: offset as u64,
                length: length as u64,
                limit: self.bytes as u64,
            }),
        }
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

/// A part of some device memory, which it keeps alive.
#[derive(Debug, Clone)]
pub struct DeviceSpan {
    pub(crate) memory: DeviceMemory,
    pub(crate) offset: usize,
    pub(crate) length: usize,
}

impl DeviceSpan {
    /// How long it is.
    pub fn len_bytes(&self) -> usize {
        self.length
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`DeviceError::Bounds`].
    pub fn span(&self, offset: usize, length: usize) -> Result<Self, DeviceError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length => self.memory.span(self.offset + offset, length),
            _ => Err(DeviceError::Bounds {
                field: "span",
                offset: offset as u64,
                length: length as u64,
                limit: self.length as u64,
            }),
        }
    }

    pub(crate) fn check(
        &self,
        field: &'static str,
        device: u64,
        expected: u64,
    ) -> Result<(), DeviceError> {
        if self.memory.device != device {
            return Err(DeviceError::Foreign { field });
        }
        check_length(field, expected, self.length as u64)
    }

    /// The device's own address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address + self.offset as u64
    }

    /// By address and not by handle, because adopted memory may be adopted twice.
    pub(crate) fn check_apart(&self, other: &Self) -> Result<(), DeviceError> {
        let apart = self.address() + self.length as u64 <= other.address()
            || other.address() + other.length as u64 <= self.address();
        if apart {
            return Ok(());
        }
        Err(DeviceError::Bounds {
            field: "target",
            offset: other.offset as u64,
            length: other.length as u64,
            limit: self.offset as u64,
        })
    }
}

pub(crate) fn check_length(
    field: &'static str,
    expected: u64,
    actual: u64,
) -> Result<(), DeviceError> {
    if expected == actual {
        Ok(())
    } else {
        Err(DeviceError::Length {
            field,
            expected,
            actual,
        })
    }
}

/// An engine's paged KV memory: one span per layer.
#[derive(Debug, Clone)]
pub struct PagedKv {
    pub(crate) layout: KvLayout,
    pub(crate) layers: Vec<DeviceSpan>,
}

impl PagedKv {
    /// Layers that lie anywhere, as an engine allocates one tensor per layer.
    ///
    /// # Errors
    /// A wrong layout, or spans that are not as many and as long as it says.
    pub fn per_layer(layout: KvLayout, layers: Vec<DeviceSpan>) -> Result<Self, DeviceError> {
        layout.validate()?;
        if layers.len() != layout.layers as usize {
            let problem = format!("{} spans for {} layers", layers.len(), layout.layers);
            return Err(LayoutError::new("layers", problem).into());
        }
        for layer in &layers {
            layer.check("layers", layers[0].memory.device, layout.layer_bytes())?;
        }
        Ok(Self { layout, layers })
    }

    /// Layers that lie one behind the other.
    ///
    /// # Errors
    /// A wrong layout, or memory that is not as long as it says.
    pub fn contiguous(layout: KvLayout, memory: &DeviceSpan) -> Result<Self, DeviceError> {
        layout.validate()?;
        let layer_bytes = layout.layer_bytes();
        check_length(
            "memory",
            layer_bytes * u64::from(layout.layers),
            memory.length as u64,
        )?;
        let length = layer_bytes as usize;
        let layer = |i: usize| DeviceSpan {
            memory: memory.memory.clone(),
            offset: memory.offset + i * length,
            length,
        };
        Ok(Self {
            layout,
            layers: (0..layout.layers as usize).map(layer).collect(),
        })
    }

    /// The layout.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// What gather and scatter must find before they enqueue anything.
    pub(crate) fn check(
        &self,
        plan: &CopyPlan,
        blocks: &DeviceSpan,
        device: u64,
    ) -> Result<(), DeviceError> {
        if *plan.layout() != self.layout {
            return Err(LayoutError::new("layout", "the plan is for another layout").into());
        }
        blocks.check("blocks", device, plan.total_bytes())?;
        for layer in &self.layers {
            layer.check("layers", device, self.layout.layer_bytes())?;
            layer.check_apart(blocks)?;
        }
        Ok(())
    }
}
