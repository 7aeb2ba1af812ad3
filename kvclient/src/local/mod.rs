//! The same-host path: words over a Unix socket, bytes through shared memory.

use crate::path::{LocalPath, Path, PathReport, Tally};

/// The same-host side of a client.
#[derive(Debug)]
pub(crate) struct Local {
    setting: LocalPath,
    pub(crate) local: Tally,
    pub(crate) grpc: Tally,
}

impl Local {
    pub(crate) fn new(setting: LocalPath) -> Self {
        Self {
            setting,
            local: Tally::default(),
            grpc: Tally::default(),
        }
    }

    pub(crate) fn report(&self) -> PathReport {
        PathReport {
            path: Path::Grpc,
            why_grpc: Some(match &self.setting {
                LocalPath::Off => "switched off".into(),
                _ => "not attached".into(),
            }),
            failures: 0,
            local: self.local.traffic(),
            grpc: self.grpc.traffic(),
        }
    }
}
