//! Whom to ask for what: the client's side of a cluster, as pure rules.
//!
//! ```text
//! members, from answers ─► Known ─► Table: who owns a run
//!                                     │
//! chain of runs  A A A B B C C A A ───┴─ split ─► Share{A: A A A … A A}  Share{B: B B}  Share{C: C C}
//!                                                     │ asked at once        │              │
//!                                                     └ or whoever has the run too and less to do (seconds.rs)
//! prefix         A A A B ✗                            5 of 5                 1 of 2         silent
//!                └──────┴─ Assembly: the chain ends where the first run lies that somebody misses or nobody answers for
//! ```
//!
//! Shape: positions are those of the blocks in the chain that was asked for, whatever their index is.
//! Units: blocks.
//! Errors: none; what is unknown owns nothing, and who does not answer has nothing.
//! Why no I/O here: a simulator drives these rules with thousands of clients on a clock of its own, and the same
//! news in the same order must lead to the same requests.

mod assembly;
mod known;
mod seconds;
mod split;

pub use assembly::Assembly;
pub use known::{GHOST_AFTER, Known, MAX_KNOWN, Table};
pub use seconds::{FRESH, MAX_SECONDS, Seconds, WORTH, goes_second, is_worth_leaving};
pub use split::{Share, Split};

pub use crate::queue::{Queue, Queued};

#[cfg(test)]
mod tests;
