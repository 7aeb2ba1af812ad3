//! Several nodes that are one: who is here, what moves, who answers.

mod gossip_turmoil;
mod joins;
mod routing;
