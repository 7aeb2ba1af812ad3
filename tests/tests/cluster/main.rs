//! Nodes and clients of one cluster, in one process.

mod routing;
