//! What the behaviour tests share: a seeded mutator, and every parser of outside bytes as a fuzz target.

pub mod circle;
pub mod client;
pub mod cluster;
pub mod keys;
pub mod load;
pub mod local;
pub mod mutate;
pub mod namespaces;
pub mod node;
pub mod patience;
pub mod peer;
pub mod processes;
pub mod targets;
pub mod wires;
pub mod writer;
