//! NVIDIA GPUs, through the driver library loaded at run time.
//!
//! ```text
//!  paged KV ──gather kernel──► staging ──one DMA──► slot in a page-locked segment
//! ```
//!
//! Nothing is linked: without libcuda this crate builds, runs and says [`NoCuda`]. cudarc panics at the
//! first call of a symbol the driver lacks, so [`CudaDevice::open`] looks up every one that is called
//! here before it calls any. The kernels are embedded as PTX (`kernels/kv.ptx`), which the driver compiles
//! for its device; no toolkit is needed.
//!
//! Memory comes from `cuMemAlloc` and not from a pool, because pool memory cannot be exported to other
//! processes. Streams do not wait for the default stream. Each keeps what its operations use until their
//! events are done.
//!
//! `unsafe` here rests on three promises: every operation checks its spans against memory of this very
//! device (`DeviceSpan::check`), host memory is owned by the stream's queue or by a `Pending` until the
//! event is done, and a stream is waited for before any of that is dropped.

mod engine;
mod queue;
mod shape;

use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use crate::arena::SegmentInfo;
use crate::device::{
    Device, DeviceError, DeviceInfo, DeviceKind, DeviceMemory, EngineStream, NoCuda, PageLock,
    Stream, next_device,
};
use queue::Queue;
use shape::WORDS;

/// The kernels, as the driver takes them.
const KERNELS: &str = include_str!("kernels/kv.ptx");
/// Every symbol of the driver that this file or cudarc under it calls.
const SYMBOLS: [&str; 35] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8_v2",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuPointerGetAttribute",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// A GPU; see the module.
pub struct CudaDevice {
    info: DeviceInfo,
    shared: Arc<Shared>,
}

struct Shared {
    device: u64,
    context: Arc<CudaContext>,
    /// By word width: 16, 4, 1; gather and scatter. The module is never unloaded: it lives as long as
    /// the primary context.
    kernels: [[Kernel; 2]; 3],
}

#[derive(Clone, Copy)]
struct Kernel(sys::CUfunction);

// SAFETY: a function handle is a name for something in the context, usable from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

fn failed(step: &'static str) -> impl Fn(DriverError) -> DeviceError {
    move |error| DeviceError::Failed {
        step,
        problem: describe(error),
    }
}

fn describe(error: DriverError) -> String {
    let name = error
        .error_name()
        .map(|name| name.to_string_lossy().into_owned());
    let text = error
        .error_string()
        .map(|text| text.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{name} ({text})"),
        _ => format!("CUDA error {}", error.0 as u32),
    }
}

/// Looks for the driver and everything it must have, then counts devices.
///
/// # Errors
/// Why there is no CUDA here. Never panics.
pub fn probe() -> Result<u32, NoCuda> {
    // SAFETY: loads the system's libcuda, as any CUDA program does when it starts.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoCuda::NoDriver);
    }
    // SAFETY: as above; it was found a moment ago.
    let library = unsafe { sys::culib() };
    for symbol in SYMBOLS {
        // SAFETY: the address is only looked up; cudarc has the true signatures.
        let found = unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) };
        if found.is_err() {
            return Err(NoCuda::MissingSymbol { symbol });
        }
    }
    let driver = |step| move |error| NoCuda::Driver(failed(step)(error));
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        other => other.map_err(driver("initialising CUDA"))?,
    }
    let count = result::device::get_count().map_err(driver("counting GPUs"))?;
    Ok(u32::try_from(count).unwrap_or(0))
}

impl CudaDevice {
    /// Opens a GPU.
    ///
    /// # Errors
    /// Why it cannot be used. Never panics.
    pub fn open(ordinal: u32) -> Result<Self, NoCuda> {
        let count = probe()?;
        if ordinal >= count {
            return Err(NoCuda::NoDevice { ordinal, count });
        }
        Self::open_present(ordinal).map_err(NoCuda::Driver)
    }

    fn open_present(ordinal: u32) -> Result<Self, DeviceError> {
        let context = CudaContext::new(ordinal as usize).map_err(failed("opening the GPU"))?;
        let info = DeviceInfo {
            kind: DeviceKind::Cuda,
            ordinal,
            name: context.name().map_err(failed("naming the GPU"))?,
            total_bytes: context.total_mem().map_err(failed("sizing the GPU"))? as u64,
        };
        let image = CString::new(KERNELS).expect("PTX is text without zeros");
        // SAFETY: a zero-terminated PTX text, as the driver wants it.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map_err(failed("loading the kernels"))?;
        let kernel = |name: &str, width: u64| {
            let name = CString::new(format!("terrace_{name}_{width}")).expect("no zeros");
            // SAFETY: the module was just loaded and is never unloaded.
            let function = unsafe { result::module::get_function(module, name) };
            function.map(Kernel).map_err(failed("finding a kernel"))
        };
        let pair = |width| -> Result<[Kernel; 2], DeviceError> {
            Ok([kernel("gather", width)?, kernel("scatter", width)?])
        };
        let kernels = [pair(WORDS[0])?, pair(WORDS[1])?, pair(WORDS[2])?];
        Ok(Self {
            info,
            shared: Arc::new(Shared {
                device: next_device(),
                context,
                kernels,
            }),
        })
    }
}

impl Shared {
    fn bind(&self) -> Result<(), DeviceError> {
        self.context
            .bind_to_thread()
            .map_err(failed("binding the GPU to a thread"))
    }

    fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Allocation, DeviceError> {
        self.bind()?;
        // SAFETY: the context is bound.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(Allocation {
                address,
                owned: true,
                shared: Arc::clone(self),
            }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (free, _) = self
                    .context
                    .mem_get_info()
                    .map_err(failed("asking for memory"))?;
                let (asked_bytes, free_bytes) = (bytes as u64, free as u64);
                Err(DeviceError::OutOfMemory {
                    asked_bytes,
                    free_bytes,
                })
            }
            Err(error) => Err(failed("allocating device memory")(error)),
        }
    }
}

impl Device for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        let (free, _) = self
            .shared
            .context
            .mem_get_info()
            .map_err(failed("asking for memory"))?;
        Ok(free as u64)
    }

    fn alloc(&self, bytes: usize) -> Result<DeviceMemory, DeviceError> {
        let bytes = bytes.max(1);
        let allocation = self.shared.alloc(bytes)?;
        // Our streams do not wait for the default stream, so the zeros are waited for here.
        // SAFETY: just allocated, of this length.
        unsafe { result::memset_d8_sync(allocation.address, 0, bytes) }
            .and_then(|()| self.shared.context.synchronize())
            .map_err(failed("clearing device memory"))?;
        Ok(DeviceMemory {
            device: self.shared.device,
            address: allocation.address,
            bytes,
            backing: Arc::new(allocation),
        })
    }

    unsafe fn adopt(&self, address: u64, bytes: usize) -> Result<DeviceMemory, DeviceError> {
        // The promise is the caller's; this finds the honest mistakes, an address of the host or another GPU's.
        engine::check_address(&self.shared, self.info.ordinal, address)?;
        let allocation = Allocation {
            address,
            owned: false,
            shared: Arc::clone(&self.shared),
        };
        Ok(DeviceMemory {
            device: self.shared.device,
            address,
            bytes,
            backing: Arc::new(allocation),
        })
    }

    fn page_lock(&self, segment: &SegmentInfo) -> Result<PageLock, DeviceError> {
        self.shared.bind()?;
        let (base, length) = (
            segment.base().cast::<c_void>(),
            segment.length_bytes as usize,
        );
        // SAFETY: the mapping is whole, and `Locked` keeps the segment mapped until it is unregistered.
        let registered =
            unsafe { sys::cuMemHostRegister_v2(base, length, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        match registered.result() {
            Ok(()) => {}
            Err(DriverError(sys::CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)) => {
                return Err(DeviceError::AlreadyLocked {
                    segment: segment.segment,
                });
            }
            Err(error) => return Err(failed("page-locking a segment")(error)),
        }
        let lock = Locked {
            segment: segment.clone(),
            shared: Arc::clone(&self.shared),
        };
        Ok(PageLock {
            bytes: segment.length_bytes,
            _lock: Box::new(lock),
        })
    }

    fn stream(&self) -> Result<Box<dyn Stream>, DeviceError> {
        let stream = self
            .shared
            .context
            .new_stream()
            .map_err(failed("making a stream"))?;
        Ok(Box::new(Queue::new(Arc::clone(&self.shared), stream)))
    }

    unsafe fn adopt_stream(&self, handle: u64) -> Result<Box<dyn EngineStream>, DeviceError> {
        Ok(Box::new(engine::Borrowed::new(
            Arc::clone(&self.shared),
            handle,
        )))
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

struct Allocation {
    address: u64,
    owned: bool,
    shared: Arc<Shared>,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.owned && self.shared.bind().is_ok() {
            // SAFETY: ours, and no operation uses it: each keeps a handle until it is done.
            let freed = unsafe { result::free_sync(self.address) };
            self.shared.context.record_err(freed);
        }
    }
}

struct Locked {
    segment: SegmentInfo,
    shared: Arc<Shared>,
}

impl Drop for Locked {
    fn drop(&mut self) {
        if self.shared.bind().is_ok() {
            // SAFETY: registered with this address; the segment is still mapped.
            let gone = unsafe { sys::cuMemHostUnregister(self.segment.base().cast()) };
            self.shared.context.record_err(gone.result());
        }
    }
}
