//! What the connectors decide: which blocks an engine loads, saves and keeps, and what became of them.
//!
//! ```text
//!              vLLM's connector                    vLLM's secondary tier            SGLang's HiCache
//! asked        planner: one lookup per request     tier: several per request        found: until the pages are read
//! moved        planner ─► Order ─► hauls           tier                             one job, waited for
//! told         hauls: a load of several jobs       tier: a job of several runs
//!                  └──────────── batches ─────────────┘
//! all          chain: an engine's hashes as they grow, and where in them a block stands
//! ```
//!
//! Everything here is bookkeeping: it waits for nothing, reads no clock, copies no block, and knows neither Python nor an engine's
//! types. It is given numbers and bytes, and answers with what to do; `terrace/` hands that to a cache.
//!
//! Units: blocks; tokens where a name says so; seconds as a report had them.
//! Errors: [`kvproto::FieldError`] for hashes that cannot be; whatever else is not known is nothing to do.
//! Why not in Python: an engine's scheduler runs this between any two of its steps, for every request; and a state machine is
//! tested best where it stands alone.

pub mod batches;
pub mod chain;
pub mod counts;
pub mod found;
pub mod hauls;
pub mod order;
pub mod pages;
pub mod planner;
pub mod tier;
