//! The closed sets that label metrics, as far as no other part of the tree owns them.
//!
//! Tiers, reasons and outcomes are labelled by their names on the wire (`kvproto::reason`).

use kvproto::reason::{GetOutcome, TierKind};

/// Where a block of a get came from, or why it did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Device memory.
    Gpu,
    /// The arena.
    Ram,
    /// The local disk, either store.
    Nvme,
    /// Another node.
    Peer,
    /// Not here.
    Miss,
    /// The caller's lease was over, or there was no room to answer.
    Rejected,
    /// Here, but it could not be handed out: corrupt, device, or the caller went away.
    Failed,
}

impl Source {
    pub(super) const ALL: [Self; 7] = [
        Self::Gpu,
        Self::Ram,
        Self::Nvme,
        Self::Peer,
        Self::Miss,
        Self::Rejected,
        Self::Failed,
    ];

    /// The label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Ram => "ram",
            Self::Nvme => "nvme",
            Self::Peer => "peer",
            Self::Miss => "miss",
            Self::Rejected => "rejected",
            Self::Failed => "failed",
        }
    }

    /// A hit of this tier.
    #[must_use]
    pub const fn of_tier(tier: TierKind) -> Self {
        match tier {
            TierKind::Gpu => Self::Gpu,
            TierKind::Ram => Self::Ram,
            TierKind::Nvme | TierKind::Durable => Self::Nvme,
            TierKind::Peer => Self::Peer,
        }
    }

    /// An answer without bytes.
    #[must_use]
    pub const fn of_outcome(outcome: GetOutcome) -> Self {
        match outcome {
            GetOutcome::Hit | GetOutcome::Corrupt | GetOutcome::Device | GetOutcome::Node => {
                Self::Failed
            }
            GetOutcome::Miss | GetOutcome::Invalidated => Self::Miss,
            GetOutcome::Expired | GetOutcome::Overloaded => Self::Rejected,
        }
    }
}

/// A method of a service; the label of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the methods of blocks.proto and cluster.proto, by name"
)]
pub enum Method {
    OpenNamespace,
    Lookup,
    Get,
    Put,
    Renew,
    Release,
    Invalidate,
    Watch,
    Stats,
    ListNamespaces,
    Join,
    View,
    Report,
    SetWeight,
    Drain,
    Explain,
    Invalidations,
    Other,
}

impl Method {
    pub(super) const ALL: [Self; 18] = [
        Self::OpenNamespace,
        Self::Lookup,
        Self::Get,
        Self::Put,
        Self::Renew,
        Self::Release,
        Self::Invalidate,
        Self::Watch,
        Self::Stats,
        Self::ListNamespaces,
        Self::Join,
        Self::View,
        Self::Report,
        Self::SetWeight,
        Self::Drain,
        Self::Explain,
        Self::Invalidations,
        Self::Other,
    ];

    /// The label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OpenNamespace => "open_namespace",
            Self::Lookup => "lookup",
            Self::Get => "get",
            Self::Put => "put",
            Self::Renew => "renew",
            Self::Release => "release",
            Self::Invalidate => "invalidate",
            Self::Watch => "watch",
            Self::Stats => "stats",
            Self::ListNamespaces => "list_namespaces",
            Self::Join => "join",
            Self::View => "view",
            Self::Report => "report",
            Self::SetWeight => "set_weight",
            Self::Drain => "drain",
            Self::Explain => "explain",
            Self::Invalidations => "invalidations",
            Self::Other => "other",
        }
    }

    /// Whether it is one of the cluster's own.
    #[must_use]
    pub const fn is_of_cluster(self) -> bool {
        matches!(
            self,
            Self::Join
                | Self::View
                | Self::Report
                | Self::SetWeight
                | Self::Drain
                | Self::Explain
                | Self::Invalidations
        )
    }
}

/// A call over the same-host path; the label of its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the calls of local.proto, by name")]
pub enum LocalCall {
    Attach,
    Map,
    Lookup,
    Get,
    Put,
    Renew,
    Release,
    Nothing,
    Malformed,
}

impl LocalCall {
    pub(super) const ALL: [Self; 9] = [
        Self::Attach,
        Self::Map,
        Self::Lookup,
        Self::Get,
        Self::Put,
        Self::Renew,
        Self::Release,
        Self::Nothing,
        Self::Malformed,
    ];

    /// The label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Attach => "attach",
            Self::Map => "map",
            Self::Lookup => "lookup",
            Self::Get => "get",
            Self::Put => "put",
            Self::Renew => "renew",
            Self::Release => "release",
            Self::Nothing => "nothing",
            Self::Malformed => "malformed",
        }
    }
}
