//! What is wrong with a request, by the name of the field at fault.

/// One field of a request, and what is wrong with it.
///
/// `field` is the path of the wire field from the message down (`chain.hashes`), so that the caller can
/// find it in `v1/blocks.proto`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct FieldError {
    /// Path of the wire field.
    pub field: &'static str,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl FieldError {
    /// The field and its problem.
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self {
            field,
            problem: problem.into(),
        }
    }
}
