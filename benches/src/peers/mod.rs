//! The peers: what a user would pick instead, each with a client of equal care, and the physical limits.
//!
//! ```text
//!   wire     a protocol without I/O: what to send, what exactly must come back
//!   redis memcached tcp    three such protocols, and the processes that answer them
//!   socket   carries a wire protocol over TCP or a Unix socket, as tasks or as threads
//!   spread fan             the same over several servers, and bare requests to several at once
//!   tonic_stock            tonic and prost as they come
//!   node terrace           a node of its own, and the client that calls it
//!   memory disk            memcpy and direct reads
//!   etcd redis_index       metadata stores, asked who has a key
//! ```
//!
//! Equal care means: no delay on sockets, one connection per operation in flight, one reused buffer per connection, one
//! write per request, values read straight into the caller's buffer, nothing formatted but the key. Only Terrace verifies
//! what it reads.

pub mod disk;
pub mod echo;
pub mod etcd;
pub mod fan;
pub mod memcached;
pub mod memory;
pub mod mooncake;
pub mod network;
pub mod node;
pub mod redis;
pub mod redis_index;
pub mod same_host;
pub mod socket;
pub mod spread;
pub mod tcp;
pub mod terrace;
pub mod tonic_stock;
pub mod wire;

/// Sizes of values: 64 KiB, 256 KiB, 1 MiB, 4 MiB.
pub const SIZES: [u64; 4] = [64 << 10, 256 << 10, 1 << 20, 4 << 20];

/// Keys in one chain of the lookup cells.
pub const CHAIN_KEYS: u32 = 512;

/// Chains of the lookup cells.
pub const CHAINS: u32 = 32;

/// Size of the values behind the keys of the lookup cells.
pub const LOOKUP_BYTES: u64 = 4096;

/// How many values of a size there are, given the bytes of a working set.
pub fn values_of(working_set_bytes: u64, bytes: u64) -> u64 {
    if bytes == LOOKUP_BYTES {
        u64::from(CHAINS * CHAIN_KEYS)
    } else {
        (working_set_bytes / bytes).max(8)
    }
}
