//! A real model that gets faster because of Terrace, small enough to read in one sitting.
//!
//! ```text
//! document ─prompt─► token ids ─reuse─► lookup ─► get ─► import ─┐
//!                                                               ▼
//!                             model: prefill what is left ─► logits ─► export ─► put
//! ```
//!
//! [`model`] is a Llama-style decoder in candle with weights that [`weights`] makes from a seed;
//! [`kv`] turns its cache into blocks and back; [`prompt`] trains a tokenizer on a document and
//! frames questions about it; [`reuse`] is the part an engine's author would copy: how a prefill
//! asks Terrace first and gives back what it computed; [`node`] runs a `kvserver` as a child, and [`sandbox`] one in this process;
//! [`screen`] and [`program`]
//! are how the demonstrations talk and end.
//!
//! The weights are random, so the answers mean nothing. Everything that Terrace touches is real:
//! the tokens, the shapes, the bytes, the time.

pub mod kv;
pub mod model;
pub mod node;
pub mod program;
pub mod prompt;
pub mod reuse;
pub mod sandbox;
pub mod screen;
pub mod stopwatch;
pub mod weights;
