//! One attachment to a node: its connections, its staging memory, and the node's segments as mapped here.
//!
//! ```text
//! open ─► Attach ─► Attachment ─┬─ idle links, the last used first; more join as calls need them
//!                               ├─ staging   one for all links
//!                               └─ segments  mapped when first met, kept while read from
//! ```
//!
//! Units: links, bytes.
//! Errors: [`LocalError`].
//! Why links are given back late: what a node holds for a get without a lease it holds for the connection, so
//! the link that asked says when it is done. A link that stays idle says so by itself, soon.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use kvgpu::{ReadSegment, StagingMap};
use kvproto::{
    Reason,
    local::{MAX_SEGMENTS_PER_MAP, VERSION, fixed::LAYOUTS},
    v1::{self, local_reply::Answer, local_request::Call},
};
use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::{
    error::LocalError,
    link::Link,
    segments::{Mapped, Segments, UNREAD},
    staging::Staging,
};
use crate::{
    call::Waits,
    clock::{Clock, within},
};

/// Staging memory asked for; the node may grant less.
const STAGING_BYTES: u64 = 64 << 20;

/// How long a link with holds to let go may stay idle before it says so.
const FLUSH_AFTER: Duration = Duration::from_millis(100);
/// How long that may take.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

/// Who attaches where.
#[derive(Clone)]
pub(super) struct Caller {
    pub(super) socket: PathBuf,
    pub(super) token: String,
    pub(super) owner: Bytes,
    /// The life of the node that must answer; 0: any.
    pub(super) boot: u64,
}

impl Caller {
    /// The life expected is not told in the first attach: who does not know it cannot repeat it.
    fn attach(&self, join: Bytes, staging_bytes: u64) -> Call {
        Call::Attach(v1::LocalAttach {
            version: VERSION,
            token: self.token.clone(),
            owner_id: self.owner.clone(),
            boot_id: if join.is_empty() { 0 } else { self.boot },
            join,
            staging_bytes,
            layouts: LAYOUTS,
        })
    }
}

/// An attachment; ends with its last link.
pub(super) struct Attachment {
    caller: Caller,
    id: Bytes,
    pub(super) boot: u64,
    pub(super) staging: Option<Staging>,
    segments: Mutex<Segments<ReadSegment>>,
    is_sweeping: AtomicBool,
    idle: Mutex<Vec<Link>>,
    /// Most links, in use or idle; a moment more while new ones join.
    links: usize,
    permits: Arc<Semaphore>,
    /// One fewer: what is held for long leaves a link to the calls.
    holds: Arc<Semaphore>,
    /// Shared with every open link.
    open: Arc<()>,
    is_flushing: AtomicBool,
    clock: Arc<dyn Clock>,
    runtime: Handle,
}

/// A link for one call. Dropped without [`Attachment::keep`], it closes.
pub(super) struct Turn {
    pub(super) link: Link,
    _permit: OwnedSemaphorePermit,
}

impl Attachment {
    /// Connects and attaches.
    pub(super) async fn open(
        caller: Caller,
        waits: Waits,
        links: usize,
        patience: Duration,
        clock: Arc<dyn Clock>,
        runtime: Handle,
    ) -> Result<Self, LocalError> {
        let open = Arc::new(());
        let mut link = Link::open(&caller.socket, waits, open.clone(), clock.clone()).await?;
        let call = caller.attach(Bytes::new(), STAGING_BYTES);
        let (answer, fds) = link.call(call, patience).await?;
        let attached = attached(answer)?;
        link.layouts = attached.layouts & LAYOUTS;
        if caller.boot != 0 && attached.boot_id != caller.boot {
            return Err(LocalError::answer("another node answers at this socket"));
        }
        let staging = granted(attached.staging_bytes, fds)?;
        let caller = Caller {
            boot: attached.boot_id,
            ..caller
        };
        let links = links.max(2);
        Ok(Self {
            boot: attached.boot_id,
            caller,
            id: attached.attachment,
            staging,
            segments: Mutex::default(),
            is_sweeping: AtomicBool::new(false),
            idle: Mutex::new(vec![link]),
            links,
            permits: Arc::new(Semaphore::new(links)),
            holds: Arc::new(Semaphore::new(links - 1)),
            open,
            is_flushing: AtomicBool::new(false),
            clock,
            runtime,
        })
    }

    /// Whether the node has forgotten it by now, or may as well: no link is open, or too much memory is quarantined.
    pub(super) fn is_over(&self) -> bool {
        let is_worn_out = self.staging.as_ref().is_some_and(Staging::is_worn_out);
        Arc::strong_count(&self.open) == 1 || is_worn_out
    }

    pub(super) fn socket(&self) -> &Path {
        &self.caller.socket
    }

    /// The right to one more link.
    pub(super) async fn permit(&self) -> OwnedSemaphorePermit {
        let permits = self.permits.clone();
        let permit = permits.acquire_owned().await;
        permit.expect("nobody closes the semaphore")
    }

    /// The right to keep a link for longer than a call.
    pub(super) async fn hold_permit(&self) -> OwnedSemaphorePermit {
        let permits = self.holds.clone();
        let permit = permits.acquire_owned().await;
        permit.expect("nobody closes the semaphore")
    }

    /// A link that is ready for a call.
    pub(super) async fn turn(
        &self,
        permit: OwnedSemaphorePermit,
        waits: Waits,
        patience: Duration,
    ) -> Result<Turn, LocalError> {
        let link = loop {
            let idle = {
                let mut idle = self.idle.lock();
                let last = idle.iter().rposition(|link| link.waits() == waits);
                last.map(|at| idle.remove(at))
            };
            match idle {
                Some(link) if link.is_usable() => break link,
                Some(_) => {}
                None => {
                    let joined = self.join(waits, patience).await;
                    break joined.map_err(|error| {
                        self.give_way(&error);
                        self.not_joined(error)
                    })?;
                }
            }
        };
        Ok(Turn {
            link,
            _permit: permit,
        })
    }

    /// One more link.
    async fn join(&self, waits: Waits, patience: Duration) -> Result<Link, LocalError> {
        let (socket, open) = (&self.caller.socket, self.open.clone());
        let mut link = Link::open(socket, waits, open, self.clock.clone()).await?;
        let call = self.caller.attach(self.id.clone(), 0);
        let (answer, _) = link.call(call, patience).await?;
        link.layouts = attached(answer)?.layouts & LAYOUTS;
        self.make_room();
        Ok(link)
    }

    /// A node that has no room for another link gets back one that nobody uses, of several; then the next call has one.
    fn give_way(&self, error: &LocalError) {
        let is_full = matches!(
            error,
            LocalError::Refused {
                reason: Some(Reason::Overloaded),
                ..
            }
        );
        let mut idle = self.idle.lock();
        if is_full && idle.len() > 1 {
            drop(idle.remove(0));
        }
    }

    /// Idle links whose callers wait otherwise are within the bound, too; the one that was used longest ago goes. Once the
    /// node has taken the new link, never before: an attachment ends with its last link, and others that are open here may
    /// not have reached the node yet.
    fn make_room(&self) {
        let mut idle = self.idle.lock();
        let open = Arc::strong_count(&self.open) - 1;
        if open > self.links && !idle.is_empty() {
            drop(idle.remove(0));
        }
    }

    /// What a failed join says about the attachment: a node that is merely busy, or at the end of its
    /// descriptors, still serves the links that are open.
    pub(super) fn not_joined(&self, error: LocalError) -> LocalError {
        match error {
            LocalError::Refused { reason, message } if reason != Some(Reason::Overloaded) => {
                LocalError::answer(format!("the attachment is over: {message}"))
            }
            refused @ LocalError::Refused { .. } => refused,
            // The failed link is closed by now; the attachment itself counts as one.
            other if Arc::strong_count(&self.open) > 1 => LocalError::NotJoined {
                why: other.to_string(),
            },
            other => other,
        }
    }

    /// The call of `turn` ended in good order: its link may carry another. From any thread.
    pub(super) fn keep(self: &Arc<Self>, turn: Turn) {
        let Turn { link, _permit } = turn;
        let owes = !link.done.is_empty();
        {
            let mut idle = self.idle.lock();
            if !link.is_whole() || idle.len() >= self.links {
                return; // closing it lets go as well
            }
            idle.push(link);
        }
        if owes && !self.is_flushing.swap(true, Ordering::AcqRel) {
            let flush = flush(Arc::downgrade(self), self.clock.clone());
            self.runtime.spawn(flush);
        }
    }

    /// The segments named, mapped; those that the node does not show are missing.
    pub(super) async fn segments(
        self: &Arc<Self>,
        link: &mut Link,
        names: &[u32],
        patience: Duration,
    ) -> Result<Mapped<ReadSegment>, LocalError> {
        let mut names = names.to_vec();
        names.sort_unstable();
        names.dedup();
        // Found once and kept here: another call may push them out of the table meanwhile.
        let (mut found, mut missing) = (Vec::with_capacity(names.len()), Vec::new());
        {
            let (mut known, now) = (self.segments.lock(), self.clock.now());
            known.sweep(now);
            for name in names {
                match known.find(name, now) {
                    Some(memory) => found.push((name, memory)),
                    None => missing.push(name),
                }
            }
        }
        for segments in missing.chunks(MAX_SEGMENTS_PER_MAP) {
            let call = Call::Map(v1::LocalMap {
                segments: segments.to_vec(),
            });
            let (answer, fds) = link.call(call, patience).await?;
            let Answer::Mapped(mapped) = answer else {
                return Err(LocalError::answer("no answer to a map"));
            };
            if fds.len() != 2 * mapped.segments.len() {
                return Err(LocalError::answer("not two descriptors for each segment"));
            }
            let mut fds = fds.into_iter();
            for segment in mapped.segments {
                let (Some(data), Some(generations)) = (fds.next(), fds.next()) else {
                    break; // counted above
                };
                let memory = Arc::new(ReadSegment::map(data, generations)?);
                found.push((segment.segment, memory.clone()));
                let now = self.clock.now();
                self.segments.lock().insert(segment.segment, memory, now);
            }
        }
        if !found.is_empty() && !self.is_sweeping.swap(true, Ordering::AcqRel) {
            let sweep = sweep(Arc::downgrade(self), self.clock.clone());
            self.runtime.spawn(sweep);
        }
        Ok(Mapped::new(found))
    }
}

fn attached(answer: Answer) -> Result<v1::LocalAttached, LocalError> {
    match answer {
        Answer::Attached(attached) => Ok(attached),
        _ => Err(LocalError::answer("no answer to an attach")),
    }
}

/// The staging memory of an attach that was answered.
fn granted(bytes: u64, mut fds: Vec<OwnedFd>) -> Result<Option<Staging>, LocalError> {
    let map = match (bytes, fds.pop()) {
        (0, None) => return Ok(None),
        (1..=STAGING_BYTES, Some(fd)) if fds.is_empty() => StagingMap::map(fd)?,
        _ => return Err(LocalError::answer("staging memory and descriptors differ")),
    };
    // The allocator's tables are as long as the memory: only what was asked for is believed.
    if map.length_bytes() != bytes {
        return Err(LocalError::answer(format!(
            "staging memory of {} bytes, {bytes} were granted",
            map.length_bytes()
        )));
    }
    Ok(Some(Staging::new(map)))
}

/// Lets go of segments that nobody reads from, while no call comes that would.
async fn sweep(attachment: Weak<Attachment>, clock: Arc<dyn Clock>) {
    loop {
        clock.sleep(UNREAD).await;
        let Some(attachment) = attachment.upgrade() else {
            return;
        };
        let mut segments = attachment.segments.lock();
        segments.sweep(clock.now());
        if segments.is_empty() {
            // Under the lock: whoever maps the next one sees that nobody sweeps.
            attachment.is_sweeping.store(false, Ordering::Release);
            return;
        }
    }
}

/// Lets links say what they are done with that have been idle for so long.
async fn flush(attachment: Weak<Attachment>, clock: Arc<dyn Clock>) {
    loop {
        // Begun here: who lets go of a hold need not be on a runtime, and a timer needs one.
        clock.sleep(FLUSH_AFTER).await;
        let Some(attachment) = attachment.upgrade() else {
            return;
        };
        attachment.is_flushing.store(false, Ordering::Release);
        let is_late = |link: &Link| link.idle() >= FLUSH_AFTER / 2;
        loop {
            let owing = {
                let mut idle = attachment.idle.lock();
                let owes = |link: &Link| !link.done.is_empty() && is_late(link);
                let at = idle.iter().position(owes);
                at.map(|at| idle.remove(at))
            };
            let Some(link) = owing else {
                break;
            };
            let said = match link.waits() {
                Waits::Task => say_done(link, &*clock).await,
                // It may sleep in the kernel, which no worker of the runtime should.
                Waits::Thread => {
                    let clock = clock.clone();
                    let say = move || Handle::current().block_on(say_done(link, &*clock));
                    attachment.runtime.spawn_blocking(say).await.ok().flatten()
                }
            };
            if let Some(link) = said {
                let mut idle = attachment.idle.lock();
                if idle.len() < attachment.links {
                    idle.insert(0, link); // below those that were used since
                }
            }
        }
        // Those in use say it themselves with their next call, or next time.
        let is_owed = {
            let idle = attachment.idle.lock();
            idle.iter().any(|link| !link.done.is_empty())
        };
        if !is_owed || attachment.is_flushing.swap(true, Ordering::AcqRel) {
            return;
        }
    }
}

/// A link that did not answer closes, which lets go as well.
async fn say_done(mut link: Link, clock: &dyn Clock) -> Option<Link> {
    let call = link.call(Call::Nothing(v1::LocalNothing {}), FLUSH_PATIENCE);
    let answer = within(clock, clock.now().after(FLUSH_PATIENCE), call).await;
    matches!(answer, Some(Ok(_))).then_some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(bytes: u64) -> OwnedFd {
        let memory = kvgpu::Staging::create(bytes).expect("memory");
        memory.fd().try_clone_to_owned().expect("a descriptor")
    }

    #[test]
    fn staging_memory_is_as_long_as_granted_and_no_longer_than_asked_for() {
        let bytes = 1 << 20;
        let staging = granted(bytes, vec![memory(bytes)]).expect("granted");
        assert_eq!(staging.expect("memory").length_bytes(), bytes);
        assert!(granted(0, Vec::new()).expect("none granted").is_none());
        assert!(granted(bytes, vec![memory(2 * bytes)]).is_err());
        assert!(granted(2 * bytes, vec![memory(bytes)]).is_err());
        let more = 2 * STAGING_BYTES;
        assert!(granted(more, vec![memory(more)]).is_err());
        assert!(granted(bytes, Vec::new()).is_err());
        assert!(granted(0, vec![memory(bytes)]).is_err());
        assert!(granted(bytes, vec![memory(bytes), memory(bytes)]).is_err());
    }
}
