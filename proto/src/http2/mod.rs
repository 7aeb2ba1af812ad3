//! HTTP/2 for bulk, without I/O: one stream at a time, payload straight to where it belongs.
//!
//! ```text
//! socket ─read──► Lane ─┬─ heads, trailers, control ── small inbox ──► Receiver::{headers, chunk}
//!                       └─ payload whose place is known ─ no buffer ─► Receiver::{room, landed}
//! socket ◄─writev─ Lane ◄── Outgoing: slices by reference, cut into DATA frames
//! ```
//!
//! Both ends of a [`Lane`] are ours, and on the wire it is ordinary HTTP/2, so either end also talks to
//! anybody else's. A client says by [`frame::SETTING_ONE_STREAM`] that its connection is a lane; a node that
//! sees it serves the connection by its own half of this module, and hands every other to a general server.
//!
//! Units: bytes.
//! Errors: [`std::io::Error`]; breaches of the protocol are `InvalidData`.
//! Why beside a general implementation: that one gathers each frame in a buffer of its own, because it must be
//! ready for many streams at once. For one stream of 1 MiB blocks this is an allocation, a copy, and no
//! hashing until the last byte has come.
//! Source: RFC 9113, RFC 7541.

pub mod frame;
mod headers;
mod lane;
mod outgoing;
#[cfg(test)]
mod tests;

pub use headers::{Fields, put_fields};
pub use lane::{Lane, LaneLimits, Pump, Push, Receiver, Role, Socket, breach};
pub use outgoing::{Outgoing, Piece};
