//! In whose memory the blocks of a namespace lie.
//!
//! A tenant is a trust domain: its processes may map the arena's segments that hold its blocks, and those alone. So
//! blocks of two tenants never share a segment. Who opens a namespace says whose it is before anybody can put
//! into it; a namespace that nobody spoke of is the node's own.
//!
//! Bounds: as many entries as namespaces of other tenants than the first. Locks: one, read for a few nanoseconds.

use std::collections::HashMap;

use kvgpu::DomainId;
use kvproto::NamespaceId;
use parking_lot::RwLock;

/// Trust domains by namespace.
#[derive(Debug, Default)]
pub struct Domains {
    /// Those that are not the node's own.
    others: RwLock<HashMap<NamespaceId, DomainId>>,
}

impl Domains {
    /// From now on blocks of the namespace lie in that domain's memory.
    pub fn set(&self, namespace: NamespaceId, domain: DomainId) {
        if domain != DomainId::NODE {
            self.others.write().insert(namespace, domain);
        }
    }

    /// Where blocks of the namespace lie.
    #[must_use]
    pub fn of(&self, namespace: &NamespaceId) -> DomainId {
        let others = self.others.read();
        others.get(namespace).copied().unwrap_or(DomainId::NODE)
    }

    /// Whether all blocks lie in one domain, as on a node without tenants.
    pub(super) fn are_one(&self) -> bool {
        self.others.read().is_empty()
    }
}
