//! Facts: measured once, compared as they are.

use anyhow::Result;

use super::{Found, Options, memory, overcommit, trace};
use crate::bars::Bar;

/// Runs those that are wanted. One that fails is noted and stops no other.
pub async fn run(options: &Options) -> Found {
    let mut found = Found::default();
    if options.wants("memory") {
        note(&mut found, "memory", memory::run(options).await);
    }
    if options.wants("trace") {
        note(&mut found, "trace", trace::run(options));
    }
    if options.wants("overcommit") {
        note(&mut found, "overcommit", overcommit::run(options).await);
    }
    found
}

fn note(found: &mut Found, phase: &str, bars: Result<Vec<Bar>>) {
    match bars {
        Ok(bars) => found.facts.extend(bars),
        Err(error) => found.add(Found::failed(phase, &error)),
    }
}
