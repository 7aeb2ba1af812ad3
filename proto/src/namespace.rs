//! Namespaces: what must be equal for two callers to share blocks.
//!
//! ```text
//! caller: label + fields ──► canonical bytes ──► fingerprint      32 bytes, says whether shapes are equal
//! server: + tenant ─────────► canonical bytes ──► id              16 bytes, first part of every BlockKey
//!         + tenant, secret ─► canonical bytes ──► key             32 bytes, keys every hash inside
//! ```
//!
//! Canonical bytes are, in this order, with `frame(x)` the length u32 and then x, and integers u32, all
//! little-endian:
//!
//! ```text
//! frame("terrace/namespace/v1") │ frame(label) │ frame(model) │ frame(weights) │ frame(tokenizer)
//!   │ frame(kv_dtype) │ layers │ kv_heads │ head_size │ frame(packing) │ block_tokens │ run_blocks
//!   │ tensor │ pipeline │ context │ frame(engine_class)
//! fingerprint = BLAKE3(canonical)
//! id          = first 16 bytes of BLAKE3(frame("terrace/namespace-id/v1") │ frame(tenant) │ frame(canonical))
//! key         = BLAKE3 derive_key("terrace 2026-11 namespace key v1",
//!                                 frame(secret) │ frame(tenant) │ frame(canonical))
//! ```
//!
//! Errors: [`FieldError`] names the field of `NamespaceSpec` that is wrong.
//! Why the label is part of identity: an operator who gives two labels expects that invalidating one
//! leaves the other alone. It is never *all* of identity: another fingerprint under a known label is another
//! namespace, and [`Namespace::differences`] says why. Why the tenant is not a field: it comes from the
//! credential, never from the caller's word.

use crate::field::FieldError;
use crate::hash::{NamespaceKey, frame};
use crate::key::NamespaceId;

/// Longest label, bytes.
pub const MAX_LABEL_BYTES: usize = 128;

/// Longest of the other texts, bytes.
pub const MAX_TEXT_BYTES: usize = 256;

/// Largest of any number in a namespace.
pub const MAX_COUNT: u32 = 65_536;

const CANONICAL_DOMAIN: &[u8] = b"terrace/namespace/v1";
const ID_DOMAIN: &[u8] = b"terrace/namespace-id/v1";
const KEY_CONTEXT: &str = "terrace 2026-11 namespace key v1";

/// The shape of a block's bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Layers of the model.
    pub layers: u32,
    /// Key and value heads per layer.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_size: u32,
    /// How they are laid out; what the engine calls it.
    pub packing: String,
}

/// Over how many ranks a block is spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct World {
    /// Tensor parallel ranks.
    pub tensor: u32,
    /// Pipeline parallel ranks.
    pub pipeline: u32,
    /// Context parallel ranks.
    pub context: u32,
}

impl World {
    /// One rank.
    pub const SINGLE: Self = Self {
        tensor: 1,
        pipeline: 1,
        context: 1,
    };
}

impl Default for World {
    fn default() -> Self {
        Self::SINGLE
    }
}

/// Everything that decides whether a block of one caller is right for another, but for the tenant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Namespace {
    /// Human name, 1 to 128 bytes.
    pub label: String,
    /// Model name and revision.
    pub model: String,
    /// Fingerprint of the weights.
    pub weights: String,
    /// Fingerprint of the tokenizer.
    pub tokenizer: String,
    /// Element type of keys and values.
    pub kv_dtype: String,
    /// Shape of a block's bytes.
    pub layout: Layout,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Blocks per run.
    pub run_blocks: u32,
    /// World sizes.
    pub world: World,
    /// Which family of engine computes the blocks.
    pub engine_class: String,
}

/// One field, for whoever must go through all of them.
enum Value<'a> {
    Text(&'a str),
    Count(u32),
}

impl Namespace {
    /// A namespace for bytes that no model defines: tools, benchmarks, tests.
    ///
    /// ```
    /// let namespace = kvproto::Namespace::opaque("bench", 16, 64);
    /// assert!(namespace.validate().is_ok());
    /// ```
    pub fn opaque(label: &str, block_tokens: u32, run_blocks: u32) -> Self {
        let none = || "none".to_owned();
        Self {
            label: label.to_owned(),
            model: none(),
            weights: none(),
            tokenizer: none(),
            kv_dtype: "u8".to_owned(),
            layout: Layout {
                layers: 1,
                kv_heads: 1,
                head_size: 1,
                packing: none(),
            },
            block_tokens,
            run_blocks,
            world: World::SINGLE,
            engine_class: none(),
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// Names the first field of the wire's `NamespaceSpec` that is wrong, and what would be right.
    pub fn validate(&self) -> Result<(), FieldError> {
        for (field, value) in self.fields() {
            match value {
                Value::Text(text) => {
                    let most = if field == "spec.label" {
                        MAX_LABEL_BYTES
                    } else {
                        MAX_TEXT_BYTES
                    };
                    if text.is_empty() || text.len() > most {
                        let problem = format!("has {} bytes; 1 to {most} are allowed", text.len());
                        return Err(FieldError::new(field, problem));
                    }
                    if text.chars().any(char::is_control) {
                        return Err(FieldError::new(
                            field,
                            "has control characters; use plain text",
                        ));
                    }
                }
                Value::Count(count) => {
                    if count == 0 || count > MAX_COUNT {
                        let problem = format!("is {count}; 1 to {MAX_COUNT} are allowed");
                        return Err(FieldError::new(field, problem));
                    }
                }
            }
        }
        Ok(())
    }

    /// The bytes that stand for this namespace in every hash; see the module's page.
    pub fn canonical_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(256);
        frame(&mut bytes, CANONICAL_DOMAIN);
        for (_, value) in self.fields() {
            match value {
                Value::Text(text) => frame(&mut bytes, text.as_bytes()),
                Value::Count(count) => bytes.extend_from_slice(&count.to_le_bytes()),
            }
        }
        bytes
    }

    /// Equal exactly when all fields are, the label included.
    pub fn fingerprint(&self) -> [u8; 32] {
        blake3::hash(&self.canonical_bytes()).into()
    }

    /// The id of this namespace of `tenant`.
    pub fn id(&self, tenant: &str) -> NamespaceId {
        let mut input = Vec::with_capacity(384);
        frame(&mut input, ID_DOMAIN);
        frame(&mut input, tenant.as_bytes());
        frame(&mut input, &self.canonical_bytes());
        let hash: [u8; 32] = blake3::hash(&input).into();
        let mut id = [0; NamespaceId::BYTES];
        id.copy_from_slice(&hash[..NamespaceId::BYTES]);
        NamespaceId(id)
    }

    /// The key of every hash in this namespace of `tenant`. `secret` is the deployment's, equal on all its nodes.
    pub fn key(&self, tenant: &str, secret: &[u8]) -> NamespaceKey {
        let mut input = Vec::with_capacity(384);
        frame(&mut input, secret);
        frame(&mut input, tenant.as_bytes());
        frame(&mut input, &self.canonical_bytes());
        NamespaceKey::from_bytes(blake3::derive_key(KEY_CONTEXT, &input))
    }

    /// One line that names what this namespace has otherwise than `known`, the label aside; `None` if nothing.
    pub fn differences(&self, known: &Self) -> Option<String> {
        let differences: Vec<String> = self
            .fields()
            .into_iter()
            .zip(known.fields())
            .filter(|((field, _), _)| *field != "spec.label")
            .filter_map(|((field, now), (_, was))| {
                let field = field.trim_start_matches("spec.");
                match (now, was) {
                    (Value::Text(now), Value::Text(was)) if now != was => {
                        Some(format!("{field} was {was:?}, is {now:?}"))
                    }
                    (Value::Count(now), Value::Count(was)) if now != was => {
                        Some(format!("{field} was {was}, is {now}"))
                    }
                    _ => None,
                }
            })
            .collect();
        (!differences.is_empty()).then(|| differences.join("; "))
    }

    /// Every field in canonical order, by its name on the wire.
    fn fields(&self) -> [(&'static str, Value<'_>); 15] {
        use Value::{Count, Text};
        [
            ("spec.label", Text(&self.label)),
            ("spec.model", Text(&self.model)),
            ("spec.weights", Text(&self.weights)),
            ("spec.tokenizer", Text(&self.tokenizer)),
            ("spec.kv_dtype", Text(&self.kv_dtype)),
            ("spec.layers", Count(self.layout.layers)),
            ("spec.kv_heads", Count(self.layout.kv_heads)),
            ("spec.head_size", Count(self.layout.head_size)),
            ("spec.packing", Text(&self.layout.packing)),
            ("spec.block_tokens", Count(self.block_tokens)),
            ("spec.run_blocks", Count(self.run_blocks)),
            ("spec.tensor_parallel", Count(self.world.tensor)),
            ("spec.pipeline_parallel", Count(self.world.pipeline)),
            ("spec.context_parallel", Count(self.world.context)),
            ("spec.engine_class", Text(&self.engine_class)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::Namespace;

    type Change = (&'static str, fn(&mut Namespace));

    const CHANGES: [Change; 15] = [
        ("spec.label", |n| n.label.push('x')),
        ("spec.model", |n| n.model.push('x')),
        ("spec.weights", |n| n.weights.push('x')),
        ("spec.tokenizer", |n| n.tokenizer.push('x')),
        ("spec.kv_dtype", |n| n.kv_dtype.push('x')),
        ("spec.layers", |n| n.layout.layers += 1),
        ("spec.kv_heads", |n| n.layout.kv_heads += 1),
        ("spec.head_size", |n| n.layout.head_size += 1),
        ("spec.packing", |n| n.layout.packing.push('x')),
        ("spec.block_tokens", |n| n.block_tokens += 1),
        ("spec.run_blocks", |n| n.run_blocks += 1),
        ("spec.tensor_parallel", |n| n.world.tensor += 1),
        ("spec.pipeline_parallel", |n| n.world.pipeline += 1),
        ("spec.context_parallel", |n| n.world.context += 1),
        ("spec.engine_class", |n| n.engine_class.push('x')),
    ];

    #[test]
    fn every_field_is_part_of_identity() {
        let base = Namespace::opaque("demo", 16, 8);
        let mut seen = HashSet::from([base.fingerprint()]);
        for (field, change) in CHANGES {
            let mut other = base.clone();
            change(&mut other);
            assert!(seen.insert(other.fingerprint()), "{field}");
            assert_ne!(other.id("a"), base.id("a"), "{field}");
            assert_ne!(other.key("a", b"s"), base.key("a", b"s"), "{field}");
        }
    }

    #[test]
    fn tenants_share_neither_id_nor_key() {
        let namespace = Namespace::opaque("demo", 16, 8);
        assert_ne!(namespace.id("a"), namespace.id("b"));
        assert_ne!(namespace.key("a", b"s"), namespace.key("b", b"s"));
        assert_ne!(namespace.key("a", b"s"), namespace.key("a", b"t"));
        assert_ne!(namespace.key("ab", b"s"), namespace.key("b", b"sa"));
        assert_eq!(namespace.key("a", b"s"), namespace.clone().key("a", b"s"));
    }

    #[test]
    fn differences_name_the_fields_in_one_line() {
        let known = Namespace::opaque("demo", 16, 8);
        let mut other = known.clone();
        other.label = "other".into();
        assert_eq!(other.differences(&known), None);
        other.kv_dtype = "bf16".into();
        other.world.tensor = 4;
        let line = other.differences(&known).unwrap();
        assert_eq!(
            line,
            "kv_dtype was \"u8\", is \"bf16\"; tensor_parallel was 1, is 4"
        );
    }

    #[test]
    fn a_moved_boundary_between_texts_is_another_namespace() {
        let (mut a, mut b) = (Namespace::opaque("x", 16, 8), Namespace::opaque("x", 16, 8));
        (a.model, a.weights) = ("ab".into(), "c".into());
        (b.model, b.weights) = ("a".into(), "bc".into());
        assert_ne!(a.fingerprint(), b.fingerprint());
    }

    #[test]
    fn wrong_fields_are_named() {
        let check = |change: fn(&mut Namespace)| {
            let mut namespace = Namespace::opaque("demo", 16, 8);
            change(&mut namespace);
            namespace.validate().unwrap_err().to_string()
        };
        assert_eq!(
            check(|n| n.label.clear()),
            "spec.label: has 0 bytes; 1 to 128 are allowed"
        );
        assert!(check(|n| n.label = "x".repeat(129)).starts_with("spec.label: has 129 bytes"));
        assert!(check(|n| n.model = "x".repeat(257)).starts_with("spec.model"));
        assert!(check(|n| n.weights = "a\nb".into()).starts_with("spec.weights: has control"));
        assert_eq!(
            check(|n| n.run_blocks = 0),
            "spec.run_blocks: is 0; 1 to 65536 are allowed"
        );
        assert!(check(|n| n.block_tokens = 65_537).starts_with("spec.block_tokens"));
        assert!(check(|n| n.world.context = 0).starts_with("spec.context_parallel"));
    }
}
