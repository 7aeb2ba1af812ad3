//! report
/// size
pub fn size(b: u64) -> String { b.to_string() }
