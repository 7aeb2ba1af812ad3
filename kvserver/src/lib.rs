//! One Terrace node: it stores, tiers, leases and serves KV-cache blocks.
//!
//! ```text
//!   rpc      gRPC: decode, one call, encode        console  HTTP: metrics, health
//!   local    the same calls for clients of this machine, through shared memory
//!   cluster  who is here and who owns what; knows neither blocks nor engine
//!    │
//!   blocks   lookup, get, put, invalidate, watch; the mover between tiers
//!    │
//!   engine   index, leases, budgets, policy: synchronous, answers *where*, never awaits
//!    │
//!   tier     NVMe cache and durable store behind one trait; blocks as types
//!    │
//!   kvgpu    the arena: all bytes
//! ```
//!
//! One way down. [`clock`], [`config`], [`error`] are leaves that anyone may use.

pub mod blocks;
pub mod clock;
pub mod cluster;
pub mod config;
mod console;
mod data_dir;
pub mod engine;
pub mod error;
mod local;
pub mod peers;
pub mod process;
mod rpc;
mod server;
pub mod telemetry;
pub mod tier;

pub use self::server::{Node, NodeError};
