//! One binary for all targets: `TERRACE_FUZZ_TARGET` names one of `kvtests::targets::TARGETS`.
#![no_main]

use std::sync::LazyLock;

use kvtests::targets::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("TERRACE_FUZZ_TARGET").unwrap_or_else(|_| "frame".into());
    let known = TARGETS.iter().find(|(target, _)| *target == name);
    known.unwrap_or_else(|| panic!("TERRACE_FUZZ_TARGET={name}: no such target")).1
});

fuzz_target!(|bytes: &[u8]| TARGET(bytes));
