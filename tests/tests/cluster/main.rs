//! Several nodes that are one: who is here, what moves, who answers.

#![allow(
    clippy::print_stdout,
    reason = "measured times are shown with --nocapture"
)]

mod gossip_turmoil;
mod joins;
mod motion;
mod routing;
