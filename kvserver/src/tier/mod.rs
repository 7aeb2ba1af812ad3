//! Where bytes rest: blocks as types, and the stores below RAM.
