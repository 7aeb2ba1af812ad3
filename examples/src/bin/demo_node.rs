//! The node's process under a name that this package's tests can find: cargo tells a package only of its own binaries.

use std::process::ExitCode;

fn main() -> ExitCode {
    kvserver::process::run(std::env::args_os())
}
