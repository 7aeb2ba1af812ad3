//! Terrace: a node and its client.
