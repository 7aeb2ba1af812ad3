//! A document, a tokenizer trained on it, and questions about it.
//!
//! ```text
//! [preamble][document, cut to so many tokens][question 1]      cold
//! [preamble][document, cut to so many tokens][question 2]      the same prefix: warm
//! ```
//!
//! Byte-level BPE, trained at run time: nothing is downloaded, any text works, and every text comes
//! back from its tokens. Equal documents give equal tokenizers, so equal hashes after a restart.
//! Units: lengths in tokens.
//! Errors: those of the `tokenizers` crate, as text.

use anyhow::{Context, anyhow};
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::byte_level::ByteLevel as ByteLevelProcessor;
use tokenizers::{Tokenizer, TokenizerBuilder};

/// The text the demo reads when it is given no other.
pub const HANDBOOK: &str = include_str!("../../docs/handbook.md");

const PREAMBLE: &str =
    "Below is a document. Read it, then answer the question that follows it.\n\n";

/// A tokenizer and the tokens of one document.
pub struct Document {
    tokenizer: Tokenizer,
    prefix: Vec<u32>,
    fingerprint: String,
}

impl Document {
    /// Trains a tokenizer of at most `vocab` tokens on `text` and keeps the first `max_tokens` of it.
    ///
    /// # Errors
    /// An empty text; what the tokenizer reports.
    pub fn new(text: &str, vocab: usize, max_tokens: usize) -> anyhow::Result<Self> {
        if text.trim().is_empty() {
            anyhow::bail!("the document is empty");
        }
        let tokenizer = train(text, vocab)?;
        let json = tokenizer
            .to_string(false)
            .map_err(failed)
            .context("cannot write the tokenizer")?;
        let mut prefix = encode(&tokenizer, PREAMBLE)?;
        let body = encode(&tokenizer, text)?;
        prefix.extend_from_slice(&body[..body.len().min(max_tokens)]);
        Ok(Self {
            tokenizer,
            prefix,
            fingerprint: fingerprint(json.as_bytes()),
        })
    }

    /// Tokens of the preamble and the document: what all prompts share.
    pub fn tokens(&self) -> &[u32] {
        &self.prefix
    }

    /// Token ids in use.
    pub fn vocab(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Names the tokenizer, for the namespace.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The prompt that asks `question` about the document.
    ///
    /// # Errors
    /// What the tokenizer reports.
    pub fn ask(&self, question: &str) -> anyhow::Result<Vec<u32>> {
        let mut tokens = self.prefix.clone();
        tokens.extend(encode(
            &self.tokenizer,
            &format!("\n\nQuestion: {question}\nAnswer:"),
        )?);
        Ok(tokens)
    }

    /// Text of some tokens.
    ///
    /// # Errors
    /// What the tokenizer reports.
    pub fn decode(&self, tokens: &[u32]) -> anyhow::Result<String> {
        self.tokenizer.decode(tokens, false).map_err(failed)
    }
}

fn train(text: &str, vocab: usize) -> anyhow::Result<Tokenizer> {
    let mut tokenizer = TokenizerBuilder::default()
        .with_model(BPE::default())
        .with_normalizer(Some(NFC))
        .with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)))
        .with_post_processor(Some(ByteLevelProcessor::default()))
        .with_decoder(Some(ByteLevelDecoder::default()))
        .build()
        .map_err(failed)?;
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer
        .train(&mut trainer, text.split_inclusive("\n\n"))
        .map_err(failed)
        .context("cannot train the tokenizer")?;
    Ok(tokenizer.into())
}

fn encode(tokenizer: &Tokenizer, text: &str) -> anyhow::Result<Vec<u32>> {
    Ok(tokenizer
        .encode(text, false)
        .map_err(failed)
        .context("cannot tokenize")?
        .get_ids()
        .to_vec())
}

fn failed(error: Box<dyn std::error::Error + Send + Sync>) -> anyhow::Error {
    anyhow!(error)
}

fn fingerprint(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..32].to_owned()
}

#[cfg(test)]
mod tests {
    use super::{Document, HANDBOOK};

    #[test]
    fn training_twice_gives_the_same_tokens() {
        let make = || Document::new(HANDBOOK, 4096, 5000).unwrap();
        let (one, two) = (make(), make());
        assert_eq!(one.fingerprint(), two.fingerprint());
        assert_eq!(one.tokens(), two.tokens());
    }

    #[test]
    fn handbook_is_long_enough_and_fits_the_vocabulary() {
        let document = Document::new(HANDBOOK, 4096, usize::MAX).unwrap();
        assert!(
            document.tokens().len() >= 4096 + 256,
            "{} tokens",
            document.tokens().len()
        );
        assert!(document.vocab() <= 4096);
    }

    #[test]
    fn questions_share_the_document_and_nothing_after_it() {
        let document = Document::new(HANDBOOK, 1024, 600).unwrap();
        let (one, two) = (
            document.ask("What is a lease?").unwrap(),
            document.ask("How large is a block?").unwrap(),
        );
        let shared = document.tokens().len();
        assert_eq!(one[..shared], two[..shared]);
        assert_ne!(one[shared..], two[shared..]);
    }

    #[test]
    fn tokens_give_the_text_back() {
        let document = Document::new(
            "What is stored once, is read often.\n\nGrüße, 世界 🌍\n",
            512,
            100,
        )
        .unwrap();
        assert!(
            document
                .decode(document.tokens())
                .unwrap()
                .contains("Grüße, 世界 🌍")
        );
    }
}
