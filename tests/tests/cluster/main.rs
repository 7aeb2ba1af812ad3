//! Several nodes that are one: who is here, what moves, who answers.

#![allow(
    clippy::print_stdout,
    reason = "measured times are shown with --nocapture"
)]

mod frozen;
mod gossip_turmoil;
mod hot;
mod joins;
mod motion;
mod routing;
mod views;
