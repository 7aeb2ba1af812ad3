//! `kvserver`: one Terrace node as a process. Without arguments it is a working node.

use std::process::ExitCode;

/// foyer's reads allocate a buffer each: with glibc's allocator they cost four times the CPU.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    kvserver::process::run(std::env::args_os())
}
