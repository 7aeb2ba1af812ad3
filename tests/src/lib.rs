//! What the behaviour tests share: seeded mutation, fuzz targets, nodes as child processes.

pub mod mutate;
