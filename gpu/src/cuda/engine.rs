//! An engine's own memory and stream on a GPU, known by their numbers.
//!
//! PyTorch, and with it every engine we serve, lives in the device's primary context, which is ours too, so
//! its addresses and streams mean the same here. Its current stream is often the default stream (0), which ours
//! do not wait for by themselves.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

use super::queue::{Moment, WAIT_WITHOUT_SPINNING};
use super::{Shared, failed};
use crate::device::{DeviceError, EngineStream, Event};

/// A stream that is not ours.
pub(super) struct Borrowed {
    shared: Arc<Shared>,
    handle: u64,
}

impl Borrowed {
    pub(super) fn new(shared: Arc<Shared>, handle: u64) -> Self {
        Self { shared, handle }
    }

    fn stream(&self) -> sys::CUstream {
        self.handle as usize as sys::CUstream
    }
}

impl fmt::Debug for Borrowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Borrowed")
            .field("handle", &self.handle)
            .finish_non_exhaustive()
    }
}

impl EngineStream for Borrowed {
    fn record(&self) -> Result<Event, DeviceError> {
        // Binds the context to this thread as well.
        let event = self
            .shared
            .context
            .new_event(Some(WAIT_WITHOUT_SPINNING))
            .map_err(failed("making an event"))?;
        // SAFETY: the event is new, and the stream exists: whoever adopted it promised so.
        unsafe { result::event::record(event.cu_event(), self.stream()) }
            .map_err(failed("recording an event"))?;
        Ok(Event {
            device: self.shared.device,
            completion: Arc::new(Moment::of(event)),
        })
    }

    fn wait_for(&self, event: &Event) -> Result<(), DeviceError> {
        if event.device != self.shared.device {
            return Err(DeviceError::Foreign { field: "event" });
        }
        self.shared.bind()?;
        let event = Moment::event_of(event).cu_event();
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event lives in `event`; the driver needs it no longer than this call. The stream exists:
        // whoever adopted it promised so.
        unsafe { result::stream::wait_event(self.stream(), event, flags) }
            .map_err(failed("making the engine wait"))
    }
}

/// Whether `address` is memory of this GPU.
pub(super) fn check_address(
    shared: &Arc<Shared>,
    ordinal: u32,
    address: u64,
) -> Result<(), DeviceError> {
    shared.bind()?;
    let mut found: i32 = -1;
    // SAFETY: the attribute is an int, and the driver looks the address up without touching it.
    let asked = unsafe {
        sys::cuPointerGetAttribute(
            std::ptr::from_mut(&mut found).cast::<c_void>(),
            sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            address,
        )
    };
    match asked.result() {
        Ok(()) if u32::try_from(found) == Ok(ordinal) => Ok(()),
        // What the driver has never heard of is an invalid value to it.
        Ok(()) | Err(DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE)) => {
            Err(DeviceError::Foreign { field: "address" })
        }
        Err(error) => Err(failed("looking up an address")(error)),
    }
}
