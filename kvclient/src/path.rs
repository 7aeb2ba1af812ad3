//! Which way blocks go between this client and its node, and how many went each way.
//!
//! ```text
//! client ─┬─ same host: a Unix socket for words, shared memory for bytes
//!         └─ gRPC: everything, from anywhere; what the same-host path cannot do, and all of it when it fails
//! ```
//!
//! Units: calls, blocks, bytes.
//! Errors: none; a path that does not work is a fact in the report.

use std::{
    convert::Infallible,
    fmt,
    path::PathBuf,
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};

/// Whether the same-host path is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LocalPath {
    /// When the node says where its socket is and it can be reached: client and node share a host.
    #[default]
    Auto,
    /// Never.
    Off,
    /// When the socket at this path can be reached.
    At(PathBuf),
}

impl FromStr for LocalPath {
    type Err = Infallible;

    /// `auto`, `off` or a path.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "auto" | "" => Self::Auto,
            "off" => Self::Off,
            path => Self::At(path.into()),
        })
    }
}

/// A way to the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// Shared memory.
    Local,
    /// gRPC over TCP or a Unix socket.
    Grpc,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Grpc => "grpc",
        })
    }
}

/// What went one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Gets and puts that were answered.
    pub calls: u64,
    /// Blocks that arrived here, verified.
    pub got_blocks: u64,
    /// Their bytes.
    pub got_bytes: u64,
    /// Blocks offered to the node, whatever became of them.
    pub put_blocks: u64,
    /// Their bytes.
    pub put_bytes: u64,
}

/// Which path is in use, why not the other, and what went each way. Of one client and its clones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathReport {
    /// The way the next get or put is tried first.
    pub path: Path,
    /// While that is [`Path::Grpc`]: why not the same-host path, in one line.
    pub why_grpc: Option<String>,
    /// Times that the same-host path was in use and failed.
    pub failures: u64,
    /// What went through shared memory.
    pub local: Traffic,
    /// What went over gRPC.
    pub grpc: Traffic,
    /// In a cluster: the same of each member in use; the numbers above are their sums. Empty for one node.
    pub members: Vec<MemberPath>,
}

/// The way to one member of a cluster, and what went it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberPath {
    /// Its id.
    pub member: String,
    /// Where it is reached.
    pub address: String,
    /// As in [`PathReport`].
    pub path: Path,
    /// As in [`PathReport`].
    pub why_grpc: Option<String>,
    /// As in [`PathReport`].
    pub failures: u64,
    /// As in [`PathReport`].
    pub local: Traffic,
    /// As in [`PathReport`].
    pub grpc: Traffic,
}

impl PathReport {
    /// Adds another node's report: the way is the same-host one as soon as it is that to one of them.
    pub(crate) fn add(&mut self, other: &Self) {
        if other.path == Path::Local {
            (self.path, self.why_grpc) = (Path::Local, None);
        }
        self.failures += other.failures;
        self.local.add(&other.local);
        self.grpc.add(&other.grpc);
    }
}

impl Traffic {
    fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.got_blocks += other.got_blocks;
        self.got_bytes += other.got_bytes;
        self.put_blocks += other.put_blocks;
        self.put_bytes += other.put_bytes;
    }
}

/// Counts [`Traffic`].
#[derive(Debug, Default)]
pub(crate) struct Tally {
    calls: AtomicU64,
    got_blocks: AtomicU64,
    got_bytes: AtomicU64,
    put_blocks: AtomicU64,
    put_bytes: AtomicU64,
}

impl Tally {
    /// A get was answered with so many hits.
    pub(crate) fn got(&self, blocks: u64, bytes: u64) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.got_blocks.fetch_add(blocks, Ordering::Relaxed);
        self.got_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A put of so many blocks was answered.
    pub(crate) fn put(&self, blocks: u64, bytes: u64) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.put_blocks.fetch_add(blocks, Ordering::Relaxed);
        self.put_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn traffic(&self) -> Traffic {
        Traffic {
            calls: self.calls.load(Ordering::Relaxed),
            got_blocks: self.got_blocks.load(Ordering::Relaxed),
            got_bytes: self.got_bytes.load(Ordering::Relaxed),
            put_blocks: self.put_blocks.load(Ordering::Relaxed),
            put_bytes: self.put_bytes.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_auto_off_or_a_path() {
        assert_eq!("auto".parse(), Ok(LocalPath::Auto));
        assert_eq!("off".parse(), Ok(LocalPath::Off));
        assert_eq!("/a/b".parse(), Ok(LocalPath::At("/a/b".into())));
    }
}
