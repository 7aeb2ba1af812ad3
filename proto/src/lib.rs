//! The wire contract of Terrace, and every pure rule that both ends must compute alike.
//!
//! ```text
//! tokens ─token─► blocks ─hash─► SequenceHash ─key─► BlockKey ─┐
//!                                     │                        ├─checksum─► BlockHeader
//!                                     └─ run, index, parent ─► Place
//! Namespace ─namespace─► id, key        view + run ─placement─► owners
//! v1 (generated) ◄─convert─► all of these       frame: message heads and payloads, without I/O
//! ```
//!
//! Nothing here does I/O, reads a clock or keeps state between calls. `proto/golden/` holds vectors of
//! every rule, for other languages to test against.

#![forbid(unsafe_code)]

pub mod chain;
pub mod checksum;
pub mod convert;
pub mod field;
pub mod frame;
pub mod hash;
pub mod header;
mod hex;
pub mod http2;
pub mod key;
pub mod local;
pub mod namespace;
pub mod placement;
pub mod reason;
pub mod token;
pub mod view;

/// The generated wire types, client and server of `v1/blocks.proto`, which documents them field by field.
pub mod v1 {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        reason = "generated from the .proto files, whose comments document every field"
    )]
    tonic::include_proto!("terrace.v1");
}

pub use chain::{Chain, Jump};
pub use field::FieldError;
pub use hash::NamespaceKey;
pub use header::{Announced, BlockHeader, Mismatch};
pub use key::{
    BlockKey, BootId, LeaseId, NamespaceId, OwnerId, Part, Place, RequestId, RunHash, SequenceHash,
};
pub use namespace::{Layout, Namespace, World};
pub use reason::{Ack, GetOutcome, Kind, PutOutcome, Reason, TierKind};
pub use view::{Member, MemberId, MemberState, View, ViewDigest};
