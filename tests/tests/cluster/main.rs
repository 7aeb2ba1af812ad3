//! Several nodes that are one: who is here, what moves, who answers.

#![allow(
    clippy::print_stdout,
    reason = "measured times are shown with --nocapture"
)]

mod away;
mod frozen;
mod gossip_turmoil;
mod hold;
mod hot;
mod joins;
mod motion;
mod namespaces;
mod peers;
mod reports;
mod routing;
mod silent;
mod size;
mod tenants;
mod views;
mod watch;
