//! The Terrace client: names blocks by their tokens, asks a node for them, lands their bytes.
//!
//! ```text
//! tokens ─namespace─► Chain ─lookup─► present blocks, Lease ─get─► your buffer, verified
//!                                                            ◄─put─ your bytes, by reference
//!
//! client ─► call (deadline, repeats, breaker) ─► pool ─► link (one HTTP/2 connection) ─► wire
//!             retry  pure rules                            get, put  below any codec
//!             clock  all time and chance                   batch     bounded calls
//! ```
//!
//! ```no_run
//! # async fn example() -> Result<(), kvclient::Error> {
//! use kvclient::{Client, LookupOptions, Namespace, PutBlock, PutOptions};
//!
//! let client = Client::connect("127.0.0.1:7070").await?;
//! let ns = client.open_namespace(&Namespace::opaque("example", 16, 64), false).await?;
//!
//! // 64 tokens are 4 blocks of 16; every block's name covers all tokens before it.
//! let chain = ns.chain(&(0..64).collect::<Vec<u32>>());
//! let blocks: Vec<_> = (0..4).map(|i| PutBlock::new(i, vec![i as u8; 4096])).collect();
//! client.put(&ns, &chain, &blocks, PutOptions::default()).await?;
//!
//! let found = client.lookup(&ns, &chain, &LookupOptions::default()).await?;
//! for block in client.get(&ns, &chain, found.lease.as_ref()).await? {
//!     println!("{} from {:?}", block.outcome, block.tier);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Every call returns within its deadline. When the node is gone, calls fail at once with
//! [`ErrorKind::Unavailable`]: go on as if it were a miss. When it is back, the next call works.
//! Bytes are checked after the last hop: a hit is right, or it is not a hit.

#![forbid(unsafe_code)]

mod batch;
pub mod blocking;
mod builder;
mod call;
mod client;
pub mod clock;
mod endpoint;
mod error;
mod fleet;
mod get;
mod lane;
mod lease;
mod link;
mod local;
mod namespace;
mod namespaces;
mod open;
mod path;
mod pool;
mod put;
mod queue;
pub mod retry;
pub mod route;
mod stats;
mod watch;
mod wire;

pub use builder::{ClientBuilder, MAX_CONNECTIONS, MAX_LANES};
pub use client::{Client, Lookup, LookupOptions, Target, split_buffers};
pub use endpoint::{DEFAULT_PORT, Endpoint};
pub use error::{Error, ErrorKind};
pub use get::{Fetched, GetOptions, Got};
pub use lease::{Lease, MAX_RELEASES};
pub use link::Tuning;
pub use local::Held;
pub use namespace::NamespaceHandle;
pub use namespaces::Namespaces;
pub use path::{LocalPath, MemberPath, Path, PathReport, Traffic};
pub use put::{Payload, PutBlock, PutOptions};
pub use retry::{BreakerPolicy, BreakerState, RetryPolicy};
pub use watch::{Heard, MAX_HEARD, Notice, Watch, Watched};

pub use kvproto::convert::answer::{BlockEvent, NamespaceStats, PutResult, WatchEvent};
pub use kvproto::{
    Ack, BootId, Chain, GetOutcome, Kind, LeaseId, Namespace, NamespaceId, OwnerId, Part,
    PutOutcome, Reason, SequenceHash, TierKind,
};
