//! What Terrace costs, always beside what a user would pick instead.
//!
//! ```text
//!   bin/side_by_side ─► plan ─► rounds ─► peers/* ─► load ─► Sample (one cell, one round)
//!                                  │                            │
//!                               report ◄── bars ◄── stats ◄─────┘   medians, spread, paired ratios
//!   bin/micro        ─► the same `stats`, one function per price
//!   bin/placement    ─► placement: who owns what, computed in several ways or asked of a store
//! ```
//!
//! Units: bytes, seconds unless a name says `_us` or `_ms`; GiB is 2^30 bytes; CPU seconds are user plus system time of
//! the client and of every server process of the peer.
//!
//! Why ratios of one run and never absolute gates: the same cell moves by a factor of two or three with what else the
//! machine does. `README.md` beside this crate tells the method and what is not measured.

pub mod bars;
pub mod clock;
pub mod load;
pub mod micro;
pub mod peers;
pub mod phases;
pub mod placement;
pub mod procfs;
pub mod report;
pub mod rounds;
pub mod spawn;
pub mod stats;
