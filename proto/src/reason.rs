//! Closed sets that both ends and the metrics share: why, where, what kind, how safe, what became of it.
//!
//! Each is the domain twin of a wire enum of the same name: without its `UNSPECIFIED`, with a
//! `snake_case` text that serves as metric label, log field and command-line value.
//! Errors: an unknown number or text is `None`; a request with one is refused by [`crate::convert`].

use std::fmt;
use std::str::FromStr;

use crate::v1;

/// Text that names no member of a closed set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not one of {names}")]
pub struct UnknownName {
    /// What was there.
    pub text: String,
    /// The names that would be right, comma separated.
    pub names: String,
}

macro_rules! closed_set {
    (
        $(#[$doc:meta])*
        $name:ident = $wire:path { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name {
            $($(#[$variant_doc])* $variant = <$wire>::$variant as u8,)+
        }

        impl $name {
            /// Every member, in the order of the wire.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The member's `snake_case` name.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            /// The wire's twin.
            pub const fn to_wire(self) -> $wire {
                match self {
                    $(Self::$variant => <$wire>::$variant,)+
                }
            }

            /// The member of a wire number; `None` for 0 (unspecified) and numbers of a later version.
            pub const fn from_wire(number: i32) -> Option<Self> {
                $(if number == <$wire>::$variant as i32 {
                    return Some(Self::$variant);
                })+
                None
            }
        }

        impl From<$name> for $wire {
            fn from(member: $name) -> Self {
                member.to_wire()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownName;

            fn from_str(text: &str) -> Result<Self, UnknownName> {
                Self::ALL.iter().copied().find(|member| member.as_str() == text).ok_or_else(|| UnknownName {
                    text: text.to_owned(),
                    names: [$($text,)+].join(", "),
                })
            }
        }
    };
}

closed_set! {
    /// Why something was refused, dropped or lost.
    Reason = v1::Reason {
        /// RAM is full of leased or incoming blocks.
        NoSlot = "no_slot",
        /// The kind's ceiling or the owner's lease budget is reached.
        Budget = "budget",
        /// The tier's write queue is full.
        QueueFull = "queue_full",
        /// The tier's admission policy said no.
        Admission = "admission",
        /// The wear budget of the day is spent.
        Wear = "wear",
        /// The tier has no room.
        TierFull = "tier_full",
        /// The tier is out of service or absent.
        TierDown = "tier_down",
        /// The block is larger than the node takes.
        TooLarge = "too_large",
        /// The node is leaving.
        Draining = "draining",
        /// The lease ran out, or is not the caller's.
        Expired = "expired",
        /// Bytes did not match their checksum and were dropped.
        Corrupt = "corrupt",
        /// A device failed.
        Device = "device",
        /// It was invalidated.
        Invalidated = "invalidated",
        /// It made room for others, or was never there.
        Evicted = "evicted",
        /// A field of the request is wrong.
        InvalidField = "invalid_field",
        /// The namespace was not opened on this node.
        UnknownNamespace = "unknown_namespace",
        /// The credential is missing or wrong.
        Unauthenticated = "unauthenticated",
        /// The deadline passed.
        Deadline = "deadline",
        /// The label is known with another fingerprint, and the caller is strict.
        NamespaceDiffers = "namespace_differs",
        /// Too many calls, streams or watchers at once.
        Overloaded = "overloaded",
        /// The node that owns it does not answer.
        Node = "node",
    }
}

closed_set! {
    /// Where bytes are.
    TierKind = v1::Tier {
        /// Device memory.
        Gpu = "gpu",
        /// The arena in host memory.
        Ram = "ram",
        /// The droppable store on disk.
        Nvme = "nvme",
        /// The durable store on disk.
        Durable = "durable",
        /// Another node.
        Peer = "peer",
    }
}

closed_set! {
    /// Whose budget a block draws on.
    Kind = v1::Kind {
        /// Keys and values of an inference engine.
        Kv = "kv",
        /// A chunk of a checkpoint.
        Checkpoint = "checkpoint",
    }
}

closed_set! {
    /// How safe a put must be before it is answered; each includes the ones before it.
    Ack = v1::Ack {
        /// In RAM.
        Cached = "cached",
        /// On NVMe, readable after the process is killed.
        Stored = "stored",
        /// In the durable store, readable after power is lost.
        Synced = "synced",
    }
}

closed_set! {
    /// What became of one block of a get.
    GetOutcome = v1::GetOutcome {
        /// Its bytes follow.
        Hit = "hit",
        /// It is not here.
        Miss = "miss",
        /// The lease ran out, or is not the caller's.
        Expired = "expired",
        /// Its bytes did not match their checksum and were dropped.
        Corrupt = "corrupt",
        /// A tier failed.
        Device = "device",
        /// It was invalidated.
        Invalidated = "invalidated",
        /// No slot could be had in time; only without a lease.
        Overloaded = "overloaded",
        /// The node that owns it does not answer.
        Node = "node",
    }
}

closed_set! {
    /// What became of one block of a put.
    PutOutcome = v1::PutOutcome {
        /// In RAM.
        Cached = "cached",
        /// On NVMe.
        Stored = "stored",
        /// In the durable store.
        Synced = "synced",
        /// It was there already, at least as safe as asked for.
        Present = "present",
        /// It was refused, for a reason, and may be retried later.
        Rejected = "rejected",
        /// Its bytes do not match the header's sums.
        Corrupt = "corrupt",
    }
}

impl GetOutcome {
    /// What a get answers for a block that is gone for `reason`.
    pub const fn from_reason(reason: Reason) -> Self {
        match reason {
            Reason::Expired => Self::Expired,
            Reason::Corrupt => Self::Corrupt,
            Reason::Device | Reason::TierDown => Self::Device,
            Reason::Invalidated => Self::Invalidated,
            Reason::Node => Self::Node,
            Reason::NoSlot
            | Reason::Budget
            | Reason::QueueFull
            | Reason::Overloaded
            | Reason::Deadline => Self::Overloaded,
            _ => Self::Miss,
        }
    }
}

impl PutOutcome {
    /// What a put answers for a block that has become as safe as `ack`.
    pub const fn reached(ack: Ack) -> Self {
        match ack {
            Ack::Cached => Self::Cached,
            Ack::Stored => Self::Stored,
            Ack::Synced => Self::Synced,
        }
    }

    /// True when the block is there.
    pub const fn is_kept(self) -> bool {
        matches!(
            self,
            Self::Cached | Self::Stored | Self::Synced | Self::Present
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{Ack, GetOutcome, Kind, PutOutcome, Reason, TierKind};
    use crate::v1;

    #[test]
    fn every_wire_reason_has_a_twin() {
        let wire = (1..).map_while(|number| v1::Reason::try_from(number).ok());
        let twins: Vec<i32> = Reason::ALL.iter().map(|&reason| reason as i32).collect();
        assert_eq!(wire.map(|reason| reason as i32).collect::<Vec<_>>(), twins);
    }

    #[test]
    fn names_are_the_wire_names_in_snake_case() {
        for &reason in Reason::ALL {
            let wire = reason.to_wire().as_str_name();
            assert_eq!(wire, format!("REASON_{}", reason.as_str().to_uppercase()));
        }
        for &tier in TierKind::ALL {
            assert_eq!(
                tier.to_wire().as_str_name(),
                format!("TIER_{}", tier.as_str().to_uppercase())
            );
        }
    }

    #[test]
    fn names_are_distinct_and_read_back() {
        let names: HashSet<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for &reason in Reason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(reason));
            assert_eq!(Reason::from_wire(reason as i32), Some(reason));
        }
        assert!("nvme ".parse::<TierKind>().is_err());
    }

    #[test]
    fn zero_is_nobody() {
        assert_eq!(Reason::from_wire(0), None);
        assert_eq!(Kind::from_wire(0), None);
        assert_eq!(GetOutcome::from_wire(0), None);
        assert_eq!(PutOutcome::from_wire(99), None);
    }

    #[test]
    fn a_stronger_ack_is_greater() {
        assert!(Ack::Cached < Ack::Stored && Ack::Stored < Ack::Synced);
    }
}
