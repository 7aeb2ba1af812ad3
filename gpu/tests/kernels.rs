//! The committed PTX is what the compiler makes of the committed source.
//!
//! Needs NVRTC, which is not part of this repository: the wheel `nvidia-cuda-nvrtc-cu12` 12.1.105 has it.
//! Point `NVRTC_LIBRARY` at its `libnvrtc.so.12`, with the folder in `LD_LIBRARY_PATH`:
//!
//! ```text
//! python3 -m venv /tmp/nvrtc && /tmp/nvrtc/bin/pip install nvidia-cuda-nvrtc-cu12==12.1.105
//! export LD_LIBRARY_PATH=$(echo /tmp/nvrtc/lib/python3*/site-packages/nvidia/cuda_nvrtc/lib)
//! export NVRTC_LIBRARY=$LD_LIBRARY_PATH/libnvrtc.so.12
//! cargo test -p kvgpu --test kernels                          # compare
//! TERRACE_WRITE_PTX=1 cargo test -p kvgpu --test kernels      # after a change of kv.cu
//! ```
//!
//! Release 12.1 because drivers from 530 on take its PTX; a newer one would ask for newer drivers.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;

use libloading::Library;

const RELEASE: &str = "release 12.1, V12.1.105";
const KERNELS: [&str; 6] = [
    "terrace_gather_16",
    "terrace_gather_4",
    "terrace_gather_1",
    "terrace_scatter_16",
    "terrace_scatter_4",
    "terrace_scatter_1",
];

fn nvrtc() -> Option<Library> {
    let named = std::env::var("NVRTC_LIBRARY").ok();
    let names = named
        .as_deref()
        .into_iter()
        .chain(["libnvrtc.so.12", "libnvrtc.so"]);
    // SAFETY: NVRTC's initialisers are those of any shared library.
    names
        .into_iter()
        .find_map(|name| unsafe { Library::new(name) }.ok())
}

/// Compiles for compute capability 7.5, Turing and later.
fn compile(library: &Library, source: &str) -> String {
    type Program = *mut c_void;
    let source = CString::new(source).unwrap();
    let options = [c"--gpu-architecture=compute_75".as_ptr()];
    // SAFETY: names and signatures are those of nvrtc.h; every pointer lives through its call, and the
    // buffers are as long as NVRTC says they must be, its final zero included.
    unsafe {
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
        type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
        let text = |size: &[u8], get: &[u8], program| {
            let mut length = 0;
            assert_eq!(library.get::<Size>(size).unwrap()(program, &mut length), 0);
            let mut buffer = vec![0_u8; length];
            assert_eq!(
                library.get::<Text>(get).unwrap()(program, buffer.as_mut_ptr().cast()),
                0
            );
            CStr::from_bytes_with_nul(&buffer)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        };
        let mut program = ptr::null_mut();
        let create = library.get::<Create>(b"nvrtcCreateProgram").unwrap();
        let name = c"kv.cu".as_ptr();
        assert_eq!(
            create(
                &mut program,
                source.as_ptr(),
                name,
                0,
                ptr::null(),
                ptr::null()
            ),
            0
        );
        let compiled =
            library.get::<Compile>(b"nvrtcCompileProgram").unwrap()(program, 1, options.as_ptr());
        let log = text(b"nvrtcGetProgramLogSize", b"nvrtcGetProgramLog", program);
        assert_eq!(compiled, 0, "{log}");
        text(b"nvrtcGetPTXSize", b"nvrtcGetPTX", program)
    }
}

#[test]
fn the_ptx_is_what_the_source_compiles_to() {
    let Some(library) = nvrtc() else {
        eprintln!("skipped: no NVRTC here (see the top of this file)");
        return;
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels");
    let compiled = compile(
        &library,
        &std::fs::read_to_string(folder.join("kv.cu")).unwrap(),
    );
    for kernel in KERNELS {
        assert!(
            compiled.contains(&format!(".visible .entry {kernel}(")),
            "{kernel} is missing"
        );
    }
    if std::env::var_os("TERRACE_WRITE_PTX").is_some() {
        assert!(
            compiled.contains(RELEASE),
            "write the PTX with NVRTC {RELEASE}"
        );
        std::fs::write(folder.join("kv.ptx"), &compiled).unwrap();
    }
    if !compiled.contains(RELEASE) {
        eprintln!("not compared: this NVRTC is another than {RELEASE}");
        return;
    }
    let committed = std::fs::read_to_string(folder.join("kv.ptx")).unwrap();
    assert!(
        compiled == committed,
        "kv.ptx is not what kv.cu compiles to: write it anew"
    );
}

#[test]
fn the_ptx_names_every_kernel_and_asks_for_no_new_driver() {
    let ptx = include_str!("../src/kernels/kv.ptx");
    for kernel in KERNELS {
        assert!(
            ptx.contains(&format!(".visible .entry {kernel}(")),
            "{kernel} is missing"
        );
    }
    assert!(ptx.contains(RELEASE) && ptx.contains(".version 8.1") && ptx.contains(".target sm_75"));
}
