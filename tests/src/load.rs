//! A load that checks every byte, every deadline and every answer: several clients in a process of their own.
//!
//! ```text
//! scenario ─ lines ─► checking_load (in some namespace) ─ kvclient ─► the cluster
//!          ◄─ JSON lines ─ a tally every WINDOW; an offence as it happens; the answer to a line
//!
//!   fill [stored]   puts every block until each is kept         {"audit":…} of what it then read
//!   go [refill]     clients turn until `stop`: lookup, get, check; with refill they put what was missing, as an engine
//!                   does that has computed it anew
//!   stop            the turns end                               {"stopped":true}
//!   audit           reads every block once, without a lease     {"audit":…}
//! ```
//!
//! A block's bytes follow from its name, so whoever reads it knows each of them. A call is late when it comes back
//! after its deadline and [`MARGIN`], plus what a thread beside the calls was kept from running meanwhile: a machine that
//! stands still is not the client's doing. An error of a call is an offence, because here somebody always answers;
//! so is an answer that no loss explains. A lost node is an answer, and so is a rejection.
//!
//! Units: blocks, milliseconds. Errors: offences.

#![allow(
    clippy::print_stdout,
    reason = "what a scenario measures is shown with --nocapture"
)]

mod process;
mod scenario;

use serde::{Deserialize, Serialize};

pub use process::{MARGIN, run};
pub use scenario::Load;

/// How a load works.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Endpoints, with commas.
    pub seeds: String,
    /// Clients, each with connections of its own.
    pub clients: u32,
    /// Of each call.
    pub deadline_ms: u64,
    /// Prompts of the working set.
    pub prompts: u32,
    /// Blocks of each.
    pub blocks: u32,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Owners of each run; 0: one.
    pub replicas: u32,
    /// Another one, other bytes under the same names: what a load must notice.
    pub salt: u64,
    /// Whether it may use shared memory: where it is, the node's files are, but a network in two does not divide them.
    pub local: bool,
    /// Of the lots it draws.
    pub seed: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            seeds: String::new(),
            clients: 3,
            deadline_ms: 1000,
            prompts: 96,
            blocks: 12,
            block_bytes: 8 << 10,
            replicas: 0,
            salt: 0,
            local: false,
            seed: 1,
        }
    }
}

/// What has happened since the load began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Since it began.
    pub at_ms: u64,
    /// Calls answered or failed.
    pub calls: u64,
    /// Blocks of prompts that were looked up.
    pub asked: u64,
    /// Blocks that were then read, every byte of them right.
    pub hits: u64,
    /// Blocks whose bytes were others.
    pub wrong: u64,
    /// Calls that ran past their deadline.
    pub late: u64,
    /// Calls that failed, and answers that no loss explains.
    pub dishonest: u64,
    /// Blocks under a lease that were lost with their node.
    pub lost: u64,
    /// Blocks put that were refused with a reason.
    pub rejected: u64,
    /// Blocks put and kept.
    pub put: u64,
    /// The longest call.
    pub slowest_ms: u64,
    /// What the machine kept the load from running, at most at once.
    pub stalled_ms: u64,
}

/// What reading everything gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Blocks of the working set.
    pub blocks: u64,
    /// Those that were read and right.
    pub readable: u64,
}

/// A line of the load's.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    Tally(Tally),
    Audit(Audit),
    Stopped(bool),
    Offence(String),
}
