//! Devices: the conformance suite, misbehaviour on order, and clean refusals.

use std::sync::Arc;

use bytes::Bytes;
use kvgpu::device::MAX_QUEUED;
use kvgpu::{
    Arena, ArenaConfig, Device, DeviceError, DeviceKind, DevicePreference, DomainId, HostDevice,
    NoCuda, Opened, Stream, conformance, open,
};

fn passes(device: &Arc<dyn Device>) {
    for check in conformance::run(device) {
        assert_eq!(check.outcome, Ok(()), "{}", check.name);
    }
}

fn arena() -> Arc<Arena> {
    let config = ArenaConfig {
        capacity_bytes: 4 << 20,
        segment_bytes: 4 << 20,
        ..Default::default()
    };
    Arena::new(config).unwrap()
}

#[test]
fn host_device_passes_the_suite() {
    passes(&(Arc::new(HostDevice::default()) as Arc<dyn Device>));
}

#[test]
fn a_gpu_passes_the_suite_or_its_absence_is_explained() {
    let (device, opened) = open(DevicePreference::Auto);
    match opened {
        Opened::AsAsked => {
            assert_eq!(device.info().kind, DeviceKind::Cuda);
            passes(&device);
        }
        Opened::HostInstead(why) => {
            eprintln!("no GPU here ({why}): the CUDA device was not run");
            assert_eq!(device.info().kind, DeviceKind::Host);
            assert!(!why.to_string().is_empty());
            assert!(device.alloc(4096).is_ok());
        }
    }
}

#[test]
fn a_gpu_that_is_not_there_is_refused_cleanly() {
    let (device, opened) = open(DevicePreference::Cuda { ordinal: 4_000 });
    assert_eq!(device.info().kind, DeviceKind::Host);
    assert!(matches!(opened, Opened::HostInstead(_)), "{opened:?}");
    assert_eq!(open(DevicePreference::Host).1, Opened::AsAsked);
    if cfg!(not(feature = "cuda")) {
        assert_eq!(opened, Opened::HostInstead(NoCuda::NotBuilt));
    }
}

#[test]
fn nothing_is_done_before_its_event_says_so() {
    let (device, arena) = (HostDevice::default(), arena());
    let memory = device.alloc(1 << 20).unwrap();
    let stream = device.stream().unwrap();
    device.hold();
    let source = arena.alloc(DomainId::NODE, 1 << 20).unwrap();
    let upload = stream
        .upload(Bytes::from_owner(source.freeze()), &memory.whole())
        .unwrap();
    let target = arena.alloc(DomainId::NODE, 1 << 20).unwrap();
    let pending = stream.download(&memory.whole(), target).unwrap();
    assert_eq!(
        (upload.is_done(), pending.is_done()),
        (Ok(false), Ok(false))
    );
    assert_eq!(arena.stats().slots, 2, "the stream keeps what it uses");
    device.release();
    let slot = pending.wait().unwrap();
    assert_eq!(upload.is_done(), Ok(true));
    assert_eq!(arena.stats().slots, 1, "the source went when it was copied");
    drop(slot);
    assert_eq!(arena.stats().slots, 0);
}

#[test]
fn a_dropped_download_gives_its_slot_back_only_when_it_is_done() {
    let (device, arena) = (HostDevice::default(), arena());
    let memory = device.alloc(4096).unwrap();
    let stream = device.stream().unwrap();
    device.hold();
    let slot = arena.alloc(DomainId::NODE, 4096).unwrap();
    let pending = stream.download(&memory.whole(), slot).unwrap();
    let event = pending.event().clone();
    let dropping = std::thread::spawn(move || drop(pending));
    assert_eq!((event.is_done(), arena.stats().slots), (Ok(false), 1));
    device.release();
    dropping.join().unwrap();
    assert_eq!((event.is_done(), arena.stats().slots), (Ok(true), 0));
}

#[test]
fn a_failure_reaches_its_event_and_every_later_one_of_its_stream() {
    let (device, arena) = (HostDevice::default(), arena());
    let memory = device.alloc(4096).unwrap();
    let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
    device.fail_after(1);
    let upload = |stream: &dyn Stream| stream.upload(Bytes::from(vec![1; 4096]), &memory.whole());
    let before = upload(&*stream).unwrap();
    let failing = upload(&*stream).unwrap();
    let slot = arena.alloc(DomainId::NODE, 4096).unwrap();
    let later = stream.download(&memory.whole(), slot).unwrap();
    assert_eq!(before.wait(), Ok(()));
    assert!(matches!(failing.wait(), Err(DeviceError::Failed { .. })));
    let refused = later.wait().unwrap_err();
    assert_eq!(refused.value.len(), 4096, "the slot comes back");
    assert!(stream.synchronize().is_err());
    assert_eq!(
        upload(&*other).unwrap().wait(),
        Ok(()),
        "another stream goes on"
    );
}

#[test]
fn a_full_queue_refuses_instead_of_blocking() {
    let device = HostDevice::default();
    let memory = device.alloc(1).unwrap();
    let stream = device.stream().unwrap();
    device.hold();
    let mut accepted = 0;
    let refusal = loop {
        match stream.upload(Bytes::from_static(b"x"), &memory.whole()) {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(refusal, DeviceError::QueueFull { depth: MAX_QUEUED });
    assert!(
        (MAX_QUEUED..=MAX_QUEUED + 1).contains(&accepted),
        "{accepted}"
    );
    device.release();
    assert_eq!(stream.synchronize(), Ok(()));
}

#[test]
fn memory_of_another_device_is_refused() {
    let (ours, theirs) = (HostDevice::default(), HostDevice::default());
    let memory = theirs.alloc(4).unwrap();
    let stream = ours.stream().unwrap();
    let refused = stream
        .upload(Bytes::from_static(b"abcd"), &memory.whole())
        .unwrap_err();
    assert_eq!(refused, DeviceError::Foreign { field: "target" });
    let event = theirs
        .stream()
        .unwrap()
        .upload(Bytes::from_static(b"abcd"), &memory.whole());
    assert_eq!(
        stream.wait_for(&event.unwrap()),
        Err(DeviceError::Foreign { field: "event" })
    );
}

#[test]
fn memory_is_free_again_when_its_last_handle_goes() {
    let device = HostDevice::new(1000);
    let memory = device.alloc(800).unwrap();
    let span = memory.span(0, 10).unwrap();
    drop(memory);
    let refused = device.alloc(800).unwrap_err();
    assert_eq!(
        refused,
        DeviceError::OutOfMemory {
            asked_bytes: 800,
            free_bytes: 200
        }
    );
    drop(span);
    assert!(device.alloc(1000).is_ok());
}

#[cfg(feature = "cuda")]
mod over_a_stub_driver {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Compiles the stub driver (`stub/libcuda.c`) into a folder of its own; `None` without a C compiler.
    fn stub_driver(variant: &str) -> Option<PathBuf> {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("stub-{variant}"));
        std::fs::create_dir_all(&folder).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stub/libcuda.c");
        let compiled = Command::new("cc")
            .args([
                "-shared",
                "-fPIC",
                "-O1",
                "-Wall",
                "-Werror",
                "-fno-strict-aliasing",
                "-pthread",
            ])
            .arg(format!("-D{variant}"))
            .arg("-o")
            .arg(folder.join("libcuda.so"))
            .arg(source)
            .status();
        match compiled {
            Ok(status) => {
                assert!(status.success(), "the stub driver does not compile");
                Some(folder)
            }
            Err(error) => {
                eprintln!("skipped: no C compiler ({error})");
                None
            }
        }
    }

    /// Runs `kvgpu-check` in a process that finds the stub driver; answers success and output.
    fn check_with(variant: &str) -> Option<(bool, String)> {
        let folder = stub_driver(variant)?;
        let output = Command::new(env!("CARGO_BIN_EXE_kvgpu-check"))
            .args(["--rounds", "1", "--batch-mib", "1"])
            .env("LD_LIBRARY_PATH", folder)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        Some((output.status.success(), text))
    }

    /// The CUDA device's own code, run in full against a driver that executes `kv.cu` on the processor and
    /// does everything as late as it may. Not a GPU: it shows nothing about speed or about PTX.
    #[test]
    fn cuda_device_passes_the_suite() {
        let Some((passed, output)) = check_with("WHOLE") else {
            return;
        };
        assert!(passed, "{output}");
        assert!(output.contains("stub driver (no GPU)"), "{output}");
        assert!(!output.contains("FAILED"), "{output}");
    }

    #[test]
    fn a_driver_that_lacks_a_symbol_is_refused_by_its_name() {
        let Some((passed, output)) = check_with("WITHOUT_LAUNCH") else {
            return;
        };
        assert!(passed, "{output}");
        assert!(output.contains("lacks cuLaunchKernel"), "{output}");
    }

    #[test]
    fn a_driver_without_a_device_is_refused() {
        let Some((passed, output)) = check_with("WITHOUT_DEVICE") else {
            return;
        };
        assert!(passed, "{output}");
        assert!(output.contains("GPU 0 is not there: 0 found"), "{output}");
    }

    #[test]
    fn a_driver_that_refuses_the_kernels_is_refused() {
        let Some((passed, output)) = check_with("REFUSES_PTX") else {
            return;
        };
        assert!(passed, "{output}");
        assert!(output.contains("loading the kernels failed"), "{output}");
    }
}
