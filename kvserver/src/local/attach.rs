//! Attach: who calls, for whom, and the staging memory of a new attachment.
//!
//! ```text
//! connection 1  Attach{staging} ─► attachment, its name, a descriptor ─┐
//! connection 2  Attach{join: name} ────────────────────────────────────┴─► the same staging memory
//! the last connection of an attachment closes ─► its memory goes
//! ```
//!
//! An attachment's name is a secret of 128 random bits; it is good for its own tenant and owner alone.
//! Bounds: bytes of one attachment and of all; what all together may not have is not granted, and that client puts
//! over gRPC.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use kvgpu::{DomainId, PAGE_BYTES, Staging};
use kvproto::{FieldError, OwnerId, Reason, local, v1};
use parking_lot::Mutex;

use super::{Refused, Shared};
use crate::{
    engine::{Owner, TenantId},
    telemetry::Metrics,
};

/// The least staging memory worth having.
const LEAST_STAGING_BYTES: u64 = 64 << 10;

/// All staging memory, and who shares which.
pub(super) struct Attachments {
    metrics: Arc<Metrics>,
    total_bytes: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    granted_bytes: u64,
    by_name: HashMap<[u8; 16], Weak<Attachment>>,
}

/// What several connections of one client share.
pub(super) struct Attachment {
    shared: Arc<Shared>,
    name: [u8; 16],
    owner: Owner,
    granted_bytes: u64,
    /// `None` when nothing was granted.
    pub(super) staging: Option<Staging>,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let attachments = &self.shared.attachments;
        let mut state = attachments.state.lock();
        state.by_name.remove(&self.name);
        state.granted_bytes -= self.granted_bytes;
        attachments.show(&state);
    }
}

impl Attachments {
    pub(super) fn new(total_bytes: u64, metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            total_bytes,
            state: Mutex::default(),
        }
    }

    fn show(&self, state: &State) {
        let bytes = i64::try_from(state.granted_bytes).unwrap_or(i64::MAX);
        self.metrics.local.staging_bytes.set(bytes);
    }

    /// Bytes that may be granted now, taken from the total.
    fn take(&self, asked_bytes: u64, most_bytes: u64) -> u64 {
        let mut state = self.state.lock();
        let left = self.total_bytes.saturating_sub(state.granted_bytes);
        let granted = asked_bytes
            .checked_next_multiple_of(PAGE_BYTES as u64)
            .unwrap_or(u64::MAX)
            .min(most_bytes)
            .min(left);
        let granted = granted - granted % PAGE_BYTES as u64;
        if granted < LEAST_STAGING_BYTES {
            return 0;
        }
        state.granted_bytes += granted;
        self.show(&state);
        granted
    }

    fn give_back(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.granted_bytes -= bytes;
        self.show(&state);
    }
}

/// Whom a connection speaks for.
pub(super) struct Attached {
    shared: Arc<Shared>,
    pub(super) tenant: TenantId,
    pub(super) owner: Owner,
    pub(super) attachment: Arc<Attachment>,
}

impl Attached {
    /// The trust domain whose segments it may map.
    pub(super) fn domain(&self) -> DomainId {
        self.tenant.domain()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.shared.owners.leave(self.owner);
    }
}

/// Attaches a connection.
pub(super) fn attach(
    shared: &Arc<Shared>,
    asked: &v1::LocalAttach,
) -> Result<(Attached, v1::LocalAttached, Vec<OwnedFd>), Refused> {
    if asked.version != local::VERSION {
        let problem = format!("is {}; {} is spoken here", asked.version, local::VERSION);
        return Err(FieldError::new("attach.version", problem).into());
    }
    let Some(tenant) = shared.blocks.tenants().tenant_of(&asked.token) else {
        let problem = "attach.token: expected a token this node knows";
        return Err(Refused::new(Reason::Unauthenticated, problem));
    };
    let boot_id = shared.blocks.boot_id();
    if asked.boot_id != 0 && asked.boot_id != boot_id.0 {
        let problem = "attach.boot_id: the node lives another life; ask over gRPC again";
        return Err(Refused::new(Reason::Expired, problem));
    }
    let id = match asked.owner_id.len() {
        0 => OwnerId(random_bytes(shared)),
        _ => OwnerId::from_slice(&asked.owner_id)
            .ok_or_else(|| FieldError::new("attach.owner_id", "has to have 16 bytes, or none"))?,
    };
    let owner = Owner { tenant, id };
    let (attachment, fds) = if asked.join.is_empty() {
        begin(shared, owner, asked.staging_bytes)?
    } else {
        (join(shared, owner, &asked.join)?, Vec::new())
    };
    let answer = v1::LocalAttached {
        boot_id: boot_id.0,
        attachment: Bytes::copy_from_slice(&attachment.name),
        staging_bytes: attachment.granted_bytes,
        max_block_bytes: shared.blocks.limits.max_block_bytes,
        hold_ms: u32::try_from(shared.limits.hold.as_millis()).unwrap_or(u32::MAX),
        layouts: asked.layouts & local::fixed::LAYOUTS,
    };
    shared.owners.join(owner);
    let attached = Attached {
        shared: Arc::clone(shared),
        tenant,
        owner,
        attachment,
    };
    Ok((attached, answer, fds))
}

/// A new attachment.
fn begin(
    shared: &Arc<Shared>,
    owner: Owner,
    asked_bytes: u64,
) -> Result<(Arc<Attachment>, Vec<OwnedFd>), Refused> {
    let attachments = &shared.attachments;
    let mut granted_bytes = attachments.take(asked_bytes, shared.limits.staging_bytes);
    let mut staging = None;
    let mut fds = Vec::new();
    if granted_bytes > 0 {
        let made = Staging::create(granted_bytes).and_then(|staging| {
            let fd = staging.fd().try_clone_to_owned();
            let fd = fd.map_err(|source| kvgpu::SharedError::System {
                step: "duplicate a descriptor",
                source,
            })?;
            Ok((staging, fd))
        });
        match made {
            Ok((memory, fd)) => {
                staging = Some(memory);
                fds.push(fd);
            }
            Err(error) => {
                tracing::warn!(%error, "no staging memory for a same-host client; it puts over gRPC");
                attachments.give_back(granted_bytes);
                granted_bytes = 0;
            }
        }
    }
    let attachment = Arc::new(Attachment {
        shared: Arc::clone(shared),
        name: random_bytes(shared),
        owner,
        granted_bytes,
        staging,
    });
    let weak = Arc::downgrade(&attachment);
    let mut state = attachments.state.lock();
    state.by_name.insert(attachment.name, weak);
    Ok((attachment, fds))
}

/// An earlier connection's attachment.
fn join(shared: &Shared, owner: Owner, name: &[u8]) -> Result<Arc<Attachment>, Refused> {
    let name = <[u8; 16]>::try_from(name)
        .map_err(|_| FieldError::new("attach.join", "has to have 16 bytes, or none"))?;
    let known = shared.attachments.state.lock().by_name.get(&name).cloned();
    match known.and_then(|weak| weak.upgrade()) {
        Some(attachment) if attachment.owner == owner => Ok(attachment),
        _ => {
            let problem = "attach.join: no such attachment of this owner; attach anew";
            Err(Refused::new(Reason::Expired, problem))
        }
    }
}

fn random_bytes(shared: &Shared) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&shared.clock.random_u64().to_le_bytes());
    bytes[8..].copy_from_slice(&shared.clock.random_u64().to_le_bytes());
    bytes
}
