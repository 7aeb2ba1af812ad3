//! The spec of a namespace, as a flat list of named fields.
//!
//! ```text
//! {"label": "llama", "layers": 32, …} ─► Namespace      missing texts read "none", missing counts 1
//! ```
//!
//! Errors: [`FieldError`] names the field: unknown, of the wrong kind, or out of `kvproto`'s bounds.
//! Why a missing field has a value and an unknown one has not: a tool need not know what a packing is; a
//! misspelt `kv_dtyp` must never put two engines into one namespace.

use kvproto::{FieldError, Namespace};

/// Tokens per block where a spec names none.
pub const DEFAULT_BLOCK_TOKENS: u32 = 16;

/// Blocks per run where a spec names none.
pub const DEFAULT_RUN_BLOCKS: u32 = 64;

/// One value of a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A text.
    Text(String),
    /// A count.
    Count(i64),
}

/// The namespace of these fields.
///
/// # Errors
/// Names the first field that is wrong.
pub fn namespace(
    fields: impl IntoIterator<Item = (String, Value)>,
) -> Result<Namespace, FieldError> {
    let mut spec = Namespace::opaque("", DEFAULT_BLOCK_TOKENS, DEFAULT_RUN_BLOCKS);
    for (name, value) in fields {
        let known = match name.as_str() {
            "label" => Field::Text(&mut spec.label),
            "model" => Field::Text(&mut spec.model),
            "weights" => Field::Text(&mut spec.weights),
            "tokenizer" => Field::Text(&mut spec.tokenizer),
            "kv_dtype" => Field::Text(&mut spec.kv_dtype),
            "packing" => Field::Text(&mut spec.layout.packing),
            "engine_class" => Field::Text(&mut spec.engine_class),
            "layers" => Field::Count(&mut spec.layout.layers),
            "kv_heads" => Field::Count(&mut spec.layout.kv_heads),
            "head_size" => Field::Count(&mut spec.layout.head_size),
            "block_tokens" => Field::Count(&mut spec.block_tokens),
            "run_blocks" => Field::Count(&mut spec.run_blocks),
            "tensor_parallel" => Field::Count(&mut spec.world.tensor),
            "pipeline_parallel" => Field::Count(&mut spec.world.pipeline),
            "context_parallel" => Field::Count(&mut spec.world.context),
            _ => Field::Unknown,
        };
        let problem = match (known, value) {
            (Field::Text(field), Value::Text(text)) => {
                *field = text;
                continue;
            }
            (Field::Count(field), Value::Count(count)) => match u32::try_from(count) {
                Ok(count) => {
                    *field = count;
                    continue;
                }
                Err(_) => format!("is {count}; a count of at least 1 is wanted"),
            },
            (Field::Unknown, _) => "is no field of a namespace".to_owned(),
            (Field::Text(_), _) => "is a number; a text is wanted".to_owned(),
            (Field::Count(_), _) => "is a text; a number is wanted".to_owned(),
        };
        return Err(FieldError::new("spec", format!("{name} {problem}")));
    }
    spec.validate()?;
    Ok(spec)
}

enum Field<'a> {
    Text(&'a mut String),
    Count(&'a mut u32),
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str, value: &str) -> (String, Value) {
        (name.into(), Value::Text(value.into()))
    }

    fn count(name: &str, value: i64) -> (String, Value) {
        (name.into(), Value::Count(value))
    }

    #[test]
    fn a_label_alone_is_an_opaque_namespace() {
        let spec = namespace([text("label", "notes")]).unwrap();
        let opaque = Namespace::opaque("notes", DEFAULT_BLOCK_TOKENS, DEFAULT_RUN_BLOCKS);
        assert_eq!(spec.fingerprint(), opaque.fingerprint());
    }

    #[test]
    fn every_field_reaches_the_namespace() {
        let base = namespace([text("label", "x")]).unwrap();
        for name in [
            "model",
            "weights",
            "tokenizer",
            "kv_dtype",
            "packing",
            "engine_class",
        ] {
            let other = namespace([text("label", "x"), text(name, "other")]).unwrap();
            let line = other.differences(&base).unwrap();
            assert!(line.starts_with(name) && line.contains("other"), "{line}");
        }
        for name in [
            "layers",
            "kv_heads",
            "head_size",
            "block_tokens",
            "run_blocks",
            "tensor_parallel",
            "pipeline_parallel",
            "context_parallel",
        ] {
            let other = namespace([text("label", "x"), count(name, 77)]).unwrap();
            let line = other.differences(&base).unwrap();
            assert!(line.starts_with(name) && line.contains("77"), "{line}");
        }
    }

    #[test]
    fn wrong_fields_are_named() {
        let problem = |field| {
            namespace([text("label", "x"), field])
                .unwrap_err()
                .to_string()
        };
        assert!(problem(text("kv_dtyp", "bf16")).starts_with("spec: kv_dtyp is no field"));
        assert!(problem(count("model", 1)).starts_with("spec: model is a number"));
        assert!(problem(text("layers", "32")).starts_with("spec: layers is a text"));
        assert!(problem(count("layers", -1)).starts_with("spec: layers is -1"));
        assert!(problem(count("layers", 0)).starts_with("spec.layers"));
        assert!(
            namespace([])
                .unwrap_err()
                .to_string()
                .starts_with("spec.label")
        );
    }
}
