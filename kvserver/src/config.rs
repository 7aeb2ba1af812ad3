//! Every setting of a node.
//!
//! ```text
//!  default ◄── file (TOML) ◄── environment (TERRACE_RAM_BYTES) ◄── flag (--ram-bytes)
//!                                        the same name everywhere: ram_bytes
//! ```
//!
//! Each line of the `settings!` table below states a name, its unit (in the type or the name), its
//! default and its bounds; the struct, the flags, the file's keys and `--print-config` are made from
//! it, so that none of them can forget one. Sizes are written `4GiB`, durations `10s`.
//! Errors: [`ConfigError`] names the field, the value and what would be right.
//! Why plain text for all three sources: one parser, one message, whichever way a value came in.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

mod load;
mod machine;
mod value;

pub(crate) use self::machine::{existing, fits_disk, fits_memory};
use self::value::{any, at_least, capacity, non_empty, text, within};
pub use self::{
    load::{Action, LoadError, Loaded, load},
    machine::{Chosen, choose},
    value::{Capacity, HostPort, LogFormat, NvmeAdmission, Setting, SocketMode, UnixSocket},
};

/// One KiB in bytes.
pub const KIB: u64 = 1 << 10;
/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// One GiB in bytes.
pub const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Largest weight of a node.
pub const MOST_WEIGHT: u32 = 1_000_000;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value that is not of its field's kind, or out of its bounds.
    #[error("{field} = {value:?} (from {source_name}): {expected}")]
    Value {
        /// The setting.
        field: &'static str,
        /// What was given.
        value: String,
        /// Where it came from.
        source_name: String,
        /// What would be right.
        expected: String,
    },
    /// A key of the file that names no setting.
    #[error("unknown key {key:?} in {}: {}", file.display(), suggestion(*nearest))]
    UnknownKey {
        /// The key.
        key: String,
        /// The file.
        file: PathBuf,
        /// The setting whose name is nearest, if one is near.
        nearest: Option<&'static str>,
    },
    /// A file that cannot be read.
    #[error("cannot read the configuration file {}: {source}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that is not TOML.
    #[error("{} is not valid TOML: {problem}", file.display())]
    NotToml {
        /// The file.
        file: PathBuf,
        /// What the parser says, with line and column.
        problem: String,
    },
}

fn suggestion(name: Option<&'static str>) -> String {
    match name {
        Some(name) => format!("did you mean {name:?}?"),
        None => "`kvserver --print-config` lists all settings".to_owned(),
    }
}

/// Makes [`Config`], its text form and [`SETTINGS`] from one table.
macro_rules! settings {
    ($( $(#[doc = $doc:literal])+ $name:ident : $kind:ty = $default:expr, $bounds:expr; )+) => {
        /// A node's settings. `Config::default()` is a working node.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Config {
            $( $(#[doc = $doc])+ pub $name: $kind, )+
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $( $name: $default, )+ }
            }
        }

        /// Name and description of every setting, in the order of the table.
        pub const SETTINGS: &[(&str, &str)] = &[ $( (stringify!($name), concat!($($doc, "\n"),+)), )+ ];

        impl Config {
            /// Sets one field from its text form.
            ///
            /// # Errors
            /// When there is no such field, or the text is not of its kind or out of its bounds.
            pub fn set(&mut self, name: &str, text: &str, source_name: &str) -> Result<(), ConfigError> {
                match name {
                    $( stringify!($name) => {
                        let refuse = |expected: String| ConfigError::Value {
                            field: stringify!($name),
                            value: text.to_owned(),
                            source_name: source_name.to_owned(),
                            expected,
                        };
                        let value = <$kind as Setting>::parse(text).map_err(refuse)?;
                        ($bounds)(&value).map_err(refuse)?;
                        self.$name = value;
                        Ok(())
                    } )+
                    _ => Err(ConfigError::UnknownKey {
                        key: name.to_owned(),
                        file: PathBuf::from(source_name),
                        nearest: load::nearest_name(name),
                    }),
                }
            }

            /// Every field with its text form, in the order of the table.
            #[must_use]
            pub fn entries(&self) -> Vec<(&'static str, String)> {
                vec![ $( (stringify!($name), Setting::show(&self.$name)), )+ ]
            }

            fn check_bounds(&self) -> Result<(), ConfigError> {
                $( ($bounds)(&self.$name).map_err(|expected: String| ConfigError::Value {
                    field: stringify!($name),
                    value: Setting::show(&self.$name),
                    source_name: "the program".to_owned(),
                    expected,
                })?; )+
                Ok(())
            }
        }
    };
}

settings! {
    /// Folder that holds everything the node keeps: NVMe blocks, journal, names, keys, socket.
    data_dir: PathBuf = machine::default_data_dir(), non_empty();
    /// Address of the gRPC service over TCP. Port 0: one that is free.
    listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 7070)), any();
    /// Unix socket of the gRPC service: "auto" (terrace.sock in data_dir), "off" or a path.
    unix_socket: UnixSocket = UnixSocket::Auto, any();
    /// Unix socket of the same-host path: "auto" (local.sock in data_dir), "off" or a path. Only Linux has it.
    local_socket: UnixSocket = UnixSocket::Auto, any();
    /// File mode of that socket. While it is for its user alone, only that user and root are let in.
    local_socket_mode: SocketMode = SocketMode(0o600), any();
    /// Address of the HTTP console (metrics, health), or "off". Port 0: one that is free.
    http_listen: Option<SocketAddr> = Some(SocketAddr::from(([127, 0, 0, 1], 7071))), any();

    /// Bytes of RAM for blocks. "auto": a quarter of the memory available, 64 MiB to 64 GiB.
    ram_bytes: Capacity = Capacity::Auto, capacity(MIB, 64 * TIB);
    /// Bytes on NVMe for blocks, 0 for none. "auto": half of the free space of data_dir, at most 64 GiB.
    nvme_bytes: Capacity = Capacity::Auto, capacity(0, 1024 * TIB);
    /// Bytes on disk for the durable store (ack "synced"), 0 for none. "auto": a tenth of the free space, at most 16 GiB.
    durable_bytes: Capacity = Capacity::Auto, capacity(0, 1024 * TIB);
    /// What goes to NVMe unasked: "reuse" (blocks that were used again) or "open" (all).
    nvme_admission: NvmeAdmission = NvmeAdmission::Reuse, any();
    /// Bytes that may be written to NVMe in a day, 0 for no limit. "auto": three times nvme_bytes.
    nvme_wear_bytes_per_day: Capacity = Capacity::Auto, capacity(0, 1024 * TIB);
    /// Bytes of blocks that may wait to be written to NVMe; more is answered queue_full.
    nvme_queue_bytes: u64 = 256 * MIB, within(MIB, 64 * GIB);
    /// Reads of NVMe in flight at once.
    nvme_reads: usize = 32, within(1, 1024);
    /// Reads from below RAM that gets without a lease may wait for; more are answered overloaded.
    nvme_waiting_reads: usize = 4096, within(1, 1_048_576);

    /// Eviction policy: "best" or the name of one (see `kvctl replay`).
    policy: String = "best".to_owned(), non_empty();
    /// Shards of the index; more shards, less contention.
    shards: usize = 16, within(1, 1024);
    /// Segment size of the arena.
    segment_bytes: u64 = GIB, within(MIB, TIB);
    /// Use huge pages for the arena where the machine has them.
    huge_pages: bool = true, any();
    /// Touch all of the arena's pages at start (in the background), so that no request pays for them.
    prefault: bool = true, any();
    /// Largest block accepted.
    max_block_bytes: u64 = 64 * MIB, within(4 * KIB, 64 * MIB);

    /// Share of ram_bytes that KV blocks keep against checkpoint chunks, percent.
    kv_reserve_percent: u32 = 0, within(0, 100);
    /// Share of ram_bytes that KV blocks may use, percent.
    kv_ceiling_percent: u32 = 100, within(1, 100);
    /// Share of ram_bytes that checkpoint chunks keep against KV blocks, percent.
    checkpoint_reserve_percent: u32 = 0, within(0, 100);
    /// Share of ram_bytes that checkpoint chunks may use, percent.
    checkpoint_ceiling_percent: u32 = 50, within(0, 100);

    /// Lifetime of a lease whose caller names none.
    lease_ttl: Duration = Duration::from_secs(10), within(Duration::from_millis(10), Duration::from_secs(86_400));
    /// Longest lifetime a caller may ask for.
    lease_max_ttl: Duration = Duration::from_secs(600), within(Duration::from_millis(10), Duration::from_secs(86_400));
    /// Share of ram_bytes that all leases together may pin, percent. At most half, so that puts go on.
    lease_percent: u32 = 50, within(1, 50);
    /// Share of ram_bytes that the leases of one owner may pin, percent.
    lease_owner_percent: u32 = 25, within(1, 50);
    /// Bytes outside ram_bytes that blocks under a lease may take while they find no slot; further ones wait.
    lease_overflow_bytes: u64 = 256 * MIB, within(0, 64 * GIB);
    /// Leases at once.
    max_leases: usize = 65_536, within(1, 16_777_216);

    /// Deadline of a call whose caller names none.
    call_deadline: Duration = Duration::from_secs(30), within(Duration::from_millis(1), Duration::from_secs(86_400));
    /// Longest deadline a caller may ask for; more is cut to this.
    call_max_deadline: Duration = Duration::from_secs(600), within(Duration::from_millis(1), Duration::from_secs(86_400));
    /// Longest life of a watch stream; it then ends with DEADLINE_EXCEEDED and the watcher comes again.
    watch_max_lifetime: Duration = Duration::from_secs(3600), within(Duration::from_millis(1), Duration::from_secs(604_800));
    /// Time that running calls and queued writes have to finish after a request to stop.
    shutdown_deadline: Duration = Duration::from_secs(10), within(Duration::from_millis(1), Duration::from_secs(3600));

    /// At an orderly stop, write what is only in RAM to NVMe, most valuable first, as far as shutdown_deadline and the wear budget allow; nvme_admission does not bind then.
    shutdown_save: bool = true, any();

    /// Connections at once, TCP and Unix together; more wait to be accepted.
    max_connections: usize = 1024, within(1, 1_000_000);
    /// Calls at once on one connection (HTTP/2 concurrent streams); more wait at the client.
    max_streams_per_connection: u32 = 256, within(1, 65_536);
    /// Calls at once on the node; more are answered overloaded.
    max_calls: usize = 16_384, within(1, 1_000_000);
    /// Watch streams at once; more are answered overloaded.
    max_watchers: usize = 64, within(1, 65_536);
    /// Events a watcher may fall behind before it is told "lagged".
    watch_queue_events: usize = 4096, within(1, 1_048_576);
    /// Blocks (parts counted) in one get or put.
    max_blocks_per_call: usize = 65_536, within(1, 1_048_576);
    /// Largest message other than block bytes.
    max_message_bytes: u64 = 4 << 20, within(64 << 10, 64 << 20);

    /// HTTP/2 window of one stream. 16 MiB: a block in flight never waits for a window update.
    stream_window_bytes: u64 = 16 << 20, within(64 << 10, 1 << 30);
    /// HTTP/2 window of one connection.
    connection_window_bytes: u64 = 64 << 20, within(64 << 10, 1 << 30);
    /// Largest HTTP/2 frame accepted. 16 KiB, the protocol's default, costs half of the throughput.
    max_frame_bytes: u64 = 1 << 20, within(16 << 10, (16 << 20) - 1);
    /// Largest piece of a block in one message, where the caller does not ask for another size.
    piece_bytes: u64 = 1 << 20, within(4 << 10, 64 << 20);
    /// Pause after which a silent connection is asked whether it is still there.
    keepalive_interval: Duration = Duration::from_secs(10), within(Duration::from_millis(100), Duration::from_secs(3600));
    /// Time it has to answer before its leases are released.
    keepalive_timeout: Duration = Duration::from_secs(10), within(Duration::from_millis(100), Duration::from_secs(3600));

    /// Threads that serve calls; 0: one per core.
    worker_threads: usize = 0, within(0, 1024);
    /// File with one `tenant token` per line. Empty: no credentials, everybody is the tenant "default".
    tokens_file: PathBuf = PathBuf::new(), any();
    /// File with the secret from which hashing keys are derived, 32 bytes or more. Empty: `secret` in data_dir, made at the first start. Nodes that serve the same clients share it.
    secret_file: PathBuf = PathBuf::new(), any();
    /// Namespaces remembered of one tenant.
    max_namespaces: usize = 4096, within(1, 65_536);
    /// Namespaces remembered of all tenants together.
    max_namespaces_total: usize = 65_536, within(1, 1_048_576);

    /// Members of the cluster to join, HOST:PORT, several with commas; a DNS name stands for all of its addresses. Empty: a cluster of its own, which others may join.
    join: Vec<HostPort> = Vec::new(), any();
    /// Where other nodes and their clients reach this one, HOST:PORT, gRPC over TCP and gossip over UDP. "auto": the listen address.
    advertise: Option<HostPort> = None, any();
    /// What fails together with this node (rack, power, availability zone): replicas go to other zones.
    zone: String = String::new(), text(0, 256);
    /// Share of the blocks, relative to the other nodes'. 0: from ram_bytes, one per GiB, rounded up.
    weight: u32 = 0, within(0, MOST_WEIGHT);
    /// Name of this node, by which its blocks are placed; it must stay the same. Empty: `node_id` in data_dir, made at the first start.
    node_id: String = String::new(), text(0, 64);
    /// How long a silent member keeps its blocks' place before it is declared lost.
    suspect_grace: Duration = Duration::from_secs(30), within(Duration::from_millis(100), Duration::from_secs(86_400));
    /// For how long after a change of the cluster blocks are looked for where they were before.
    motion_window: Duration = Duration::from_secs(600), within(Duration::ZERO, Duration::from_secs(86_400));
    /// The most that a lookup waits for blocks which it misses and which may still lie with another node; half of its own deadline binds too.
    motion_wait: Duration = Duration::from_millis(100), within(Duration::ZERO, Duration::from_secs(60));
    /// Nodes that hold each block of a namespace whose caller does not say.
    replicas: u32 = 1, within(1, 8);
    /// Calls that gets find being served, on average, from which on runs that many read get a second owner for a while; 0: they never do.
    hot_calls: u32 = 16, within(0, 1_000_000);
    /// What of a node's gets must read a run before that, percent.
    hot_share_percent: u32 = 10, within(1, 100);
    /// For how long callers are told of a second owner; they are told anew while the run stays hot.
    hot_time: Duration = Duration::from_secs(30), within(Duration::from_millis(100), Duration::from_secs(3600));
    /// In what time a joining node grows to its full weight.
    join_ramp: Duration = Duration::from_secs(30), within(Duration::ZERO, Duration::from_secs(3600));
    /// How long a node that was never a member tries to reach one of `join` before it gives up.
    join_wait: Duration = Duration::from_secs(30), within(Duration::from_millis(10), Duration::from_secs(3600));
    /// File with the token by which nodes know each other, 16 characters or more; needed where tokens_file is. Empty: none.
    peer_token_file: PathBuf = PathBuf::new(), any();
    /// Bytes per second that moves between nodes may take, 0 for no limit.
    peer_bytes_per_second: u64 = GIB, within(0, TIB);
    /// Calls to other nodes at once.
    peer_calls: usize = 64, within(1, 65_536);

    /// Connections over the same-host path at once, a thread each; more are refused.
    local_max_connections: usize = 256, within(1, 65_536);
    /// The most memory that one client is granted to hand in blocks through, 0 for none: it puts over gRPC then.
    local_staging_bytes: u64 = 64 * MIB, within(0, 64 * GIB);
    /// That of all clients together; beside ram_bytes, and only as far as it is written to.
    local_staging_total_bytes: u64 = GIB, within(0, 64 * TIB);
    /// How long a reader without a lease may read blocks where they lie, before their slots may be used anew.
    local_hold: Duration = Duration::from_secs(10), within(Duration::from_millis(10), Duration::from_secs(600));

    /// Log format: "human", "json" or "off".
    log_format: LogFormat = LogFormat::Human, any();
    /// Which log lines: a level ("info") or directives ("info,kvserver::rpc=debug").
    log: String = "info".to_owned(), non_empty();
}

impl Config {
    /// Checks every bound, and that fields agree with each other.
    ///
    /// # Errors
    /// The first field that is wrong, its value, and what would be right.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.check_bounds()?;
        at_least(
            "lease_max_ttl",
            &self.lease_max_ttl,
            "lease_ttl",
            &self.lease_ttl,
        )?;
        at_least(
            "call_max_deadline",
            &self.call_max_deadline,
            "call_deadline",
            &self.call_deadline,
        )?;
        at_least(
            "lease_percent",
            &self.lease_percent,
            "lease_owner_percent",
            &self.lease_owner_percent,
        )?;
        at_least(
            "kv_ceiling_percent",
            &self.kv_ceiling_percent,
            "kv_reserve_percent",
            &self.kv_reserve_percent,
        )?;
        at_least(
            "checkpoint_ceiling_percent",
            &self.checkpoint_ceiling_percent,
            "checkpoint_reserve_percent",
            &self.checkpoint_reserve_percent,
        )?;
        at_least(
            "connection_window_bytes",
            &self.connection_window_bytes,
            "stream_window_bytes",
            &self.stream_window_bytes,
        )?;
        at_least(
            "max_namespaces_total",
            &self.max_namespaces_total,
            "max_namespaces",
            &self.max_namespaces,
        )?;
        at_least(
            "nvme_queue_bytes",
            &self.nvme_queue_bytes,
            "max_block_bytes",
            &self.nvme_queue_floor(),
        )?;
        self.check_advertised()?;
        if self.kv_reserve_percent + self.checkpoint_reserve_percent > 100 {
            return Err(ConfigError::Value {
                field: "checkpoint_reserve_percent",
                value: self.checkpoint_reserve_percent.to_string(),
                source_name: "agreement of fields".to_owned(),
                expected: format!(
                    "at most {}, what kv_reserve_percent leaves",
                    100 - self.kv_reserve_percent
                ),
            });
        }
        if let Capacity::Bytes(bytes) = self.ram_bytes
            && bytes < 4 * self.max_block_bytes.min(MIB)
        {
            return Err(ConfigError::Value {
                field: "ram_bytes",
                value: Setting::show(&self.ram_bytes),
                source_name: "agreement of fields".to_owned(),
                expected: "at least 4MiB".to_owned(),
            });
        }
        Ok(())
    }

    /// A node that joins others must be found by them.
    fn check_advertised(&self) -> Result<(), ConfigError> {
        let refuse = |field, value: String, expected: &str| ConfigError::Value {
            field,
            value,
            source_name: "agreement of fields".to_owned(),
            expected: expected.to_owned(),
        };
        if self.advertise.is_none() && self.listen.ip().is_unspecified() && !self.join.is_empty() {
            return Err(refuse(
                "advertise",
                Setting::show(&self.advertise),
                "expected the address by which other nodes reach this one, such as \"10.0.0.7:7070\": it listens on all of its addresses",
            ));
        }
        Ok(())
    }

    /// Where other nodes reach this one, which listens on `listening`; `None`: nowhere that could be told.
    #[must_use]
    pub fn advertised(&self, listening: SocketAddr) -> Option<HostPort> {
        match &self.advertise {
            Some(given) => Some(given.clone()),
            None if listening.ip().is_unspecified() => None,
            None => Some(listening.into()),
        }
    }

    /// A queue too small for one ordinary block would refuse every write.
    fn nvme_queue_floor(&self) -> u64 {
        self.max_block_bytes.min(MIB)
    }

    /// Where the Unix socket goes, if there is to be one.
    #[must_use]
    pub fn unix_socket_path(&self) -> Option<PathBuf> {
        self.unix_socket.path(&self.data_dir, "terrace.sock")
    }

    /// Where the socket of the same-host path goes, if there is to be one.
    #[must_use]
    pub fn local_socket_path(&self) -> Option<PathBuf> {
        self.local_socket.path(&self.data_dir, "local.sock")
    }
}

/// As a TOML file that [`load`] reads back, every setting under its description.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((name, value), (_, description)) in self.entries().into_iter().zip(SETTINGS) {
            for line in description.trim().lines() {
                writeln!(f, "# {}", line.trim())?;
            }
            // A JSON string is a TOML basic string.
            writeln!(f, "{name} = {}\n", serde_json::Value::String(value))?;
        }
        Ok(())
    }
}
