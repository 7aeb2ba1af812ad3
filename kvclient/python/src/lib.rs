//! Terrace for Python: an engine-facing cache and a plain client, in Rust threads that never hold the interpreter's lock.
