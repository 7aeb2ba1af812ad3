//! What operators see: metrics and logs.
//!
//! A leaf: everybody may count and log, nobody is called back. Names live in [`metrics::names`] alone.

pub mod logs;
pub mod metrics;
mod process;

pub use self::metrics::Metrics;
