//! Terrace for Python: an engine-facing cache and a plain client, in Rust threads that never hold the interpreter's lock.
//!
//! ```text
//! py/  ─► cache ─► lookups, misses          what was asked and answered        (no I/O, no Python)
//!             │──► jobs ─► transfer ─► memory ─► layout      loads and saves
//!             └──► node                      two clients, kept up in the background
//!      ─► client                             plain and blocking, for people
//! ```
//!
//! Everything but `py` is ordinary Rust, built and tested without Python; the feature `extension`, which maturin turns on,
//! adds `py` and makes this the module `terrace._terrace`. `kvclient/python/terrace/_terrace.pyi` is its description.
//!
//! Units: blocks, bytes. Errors: a call that can never work is an error; a node that is away is an answer.
//! `unsafe` is in [`memory`] and [`device`], but for the calls that hand their promise to Python's caller.

#![deny(unsafe_code)]

pub mod cache;
pub mod client;
pub mod connector;
pub mod counters;
pub mod device;
pub mod hashes;
pub mod jobs;
pub mod layout;
pub mod lookups;
pub mod memory;
pub mod misses;
pub mod node;
#[cfg(feature = "extension")]
mod py;
pub mod scratch;
pub mod spec;
pub mod transfer;
