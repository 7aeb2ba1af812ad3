//! The arena: all block bytes of a node, in shared memory that other processes can map for reading.
//!
//! ```text
//!  Arena ─┬─ segment 0  (domain 0)   ready, bound on first need
//!         ├─ segment 1  (domain 0)
//!         ├─ segment 2  (no domain)  ready, waiting
//!         └─ segment 3               still being filled in by the arena's one thread
//! ```
//!
//! `new` returns when the first segment is ready; the others follow in the background, and capacity
//! grows with them. A segment serves one trust domain. When a domain finds no room and another's segment
//! is wholly empty, that segment is replaced by a new one (new memory, new number), in the background
//! and one at a time: whoever mapped the old one keeps an empty corpse and never sees the new tenant.
//! The new one is bound to the domain that asked, and is left to it for a while even if it is still empty:
//! who asked comes again in its own time, and a busier domain must not have it first.
//!
//! Units: bytes, rounded up to 4 KiB pages per slot.
//! Errors: [`ArenaError`] while opening; later a segment that cannot be had is missing from
//! `ready_bytes` and named in `note`, and "no room" is `None`.
//! Locks: one, held for a fixed number of steps; never while memory is mapped or filled in.

mod info;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use crate::segment::{Segment, SegmentError};
use crate::slot::{Location, SlotMut};
use crate::slots::{MAX_SLOT_BYTES, PAGE_BYTES, Slots, Window};

pub use info::{ArenaConfig, ArenaError, ArenaStats, Clearing, DomainId, HugePages, SegmentInfo};

/// Default length of a segment.
pub const SEGMENT_BYTES: u64 = 1 << 30;
/// The most segments an arena may have; a larger arena takes longer segments.
pub const MAX_SEGMENTS: u64 = 4096;
/// The most trust domains an arena serves.
pub const MAX_DOMAINS: usize = 1024;
/// How often others may ask for a segment in vain that was made for a domain and is still empty.
const GRACE_ASKS: u32 = 1024;
/// How many proposals [`Arena::clearings`] makes at most.
pub const MAX_CLEARINGS: usize = 16;

struct State {
    slots: Slots,
    /// By position; `None` while not ready.
    segments: Vec<Option<Arc<Segment>>>,
    /// The domains seen, in the order of the allocator's own numbers.
    domains: Vec<DomainId>,
    requested_bytes: u64,
    next_segment: u32,
    /// Positions that are ready and no domain's.
    spare: Vec<usize>,
    /// Positions that wait for memory, and the domain that each will be, if that is known.
    wanted: VecDeque<(usize, Option<usize>)>,
    /// By position: asks by others that are still turned away; see [`GRACE_ASKS`].
    grace: Vec<u32>,
    /// Replaced segments, to be unmapped outside the lock.
    replaced: Vec<Arc<Segment>>,
    building: bool,
    note: Option<String>,
}

struct Shared {
    config: ArenaConfig,
    state: Mutex<State>,
    work: Condvar,
    idle: Condvar,
    stop: AtomicBool,
}

/// Shared memory for slots; see the module.
pub struct Arena {
    shared: Arc<Shared>,
    builder: Option<JoinHandle<()>>,
}

impl Arena {
    /// Opens an arena; its first segment is ready when this returns.
    ///
    /// # Errors
    /// [`ArenaError::Config`] names the field; otherwise memory or a thread could not be had.
    pub fn new(config: ArenaConfig) -> Result<Arc<Self>, ArenaError> {
        let page = PAGE_BYTES as u64;
        let refuse = |field, value, problem| {
            Err(ArenaError::Config {
                field,
                value,
                problem,
            })
        };
        if config.segment_bytes < page || !config.segment_bytes.is_multiple_of(page) {
            return refuse(
                "segment_bytes",
                config.segment_bytes,
                "a multiple of 4096, at least 4096",
            );
        }
        if config.capacity_bytes < page {
            return refuse("capacity_bytes", config.capacity_bytes, "at least 4096");
        }
        if config.capacity_bytes.div_ceil(config.segment_bytes) > MAX_SEGMENTS {
            return refuse(
                "segment_bytes",
                config.segment_bytes,
                "long enough for at most 4096 segments",
            );
        }
        let pages = config.capacity_bytes / page;
        if pages >= u64::from(u32::MAX) {
            return refuse("capacity_bytes", config.capacity_bytes, "less than 16 TiB");
        }
        let pages_per_segment = (config.segment_bytes / page).min(pages);
        let slots = Slots::new(pages as u32, pages_per_segment as u32);
        let count = slots.segment_count();
        let state = State {
            slots,
            segments: vec![None; count],
            domains: vec![DomainId::NODE],
            requested_bytes: 0,
            next_segment: 0,
            spare: Vec::new(),
            replaced: Vec::new(),
            wanted: (0..count).map(|position| (position, None)).collect(),
            grace: vec![0; count],
            building: false,
            note: None,
        };
        let shared = Arc::new(Shared {
            config,
            state: Mutex::new(state),
            work: Condvar::new(),
            idle: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        shared.build_next()?;
        let theirs = Arc::clone(&shared);
        let builder = std::thread::Builder::new()
            .name("terrace-arena".into())
            .spawn(move || theirs.build_until_stopped())
            .map_err(ArenaError::Thread)?;
        Ok(Arc::new(Self {
            shared,
            builder: Some(builder),
        }))
    }

    /// A slot of `length` bytes, 1 to 64 MiB, aligned to a page; `None` if there is no room for it now
    /// or never can be.
    pub fn alloc(self: &Arc<Self>, domain: DomainId, length: usize) -> Option<SlotMut> {
        if length == 0 || length > MAX_SLOT_BYTES {
            return None;
        }
        let pages = length.div_ceil(PAGE_BYTES) as u32;
        let mut state = self.shared.state.lock();
        let number = state.domain_number(domain)?;
        let page = loop {
            if let Some(page) = state.slots.alloc(number, pages) {
                break page;
            }
            // A segment that was not needed so far, or one that another domain no longer needs.
            if !state.bind_unbound(number, pages) {
                if state.replace_empty(number, pages) {
                    self.shared.work.notify_one();
                }
                return None;
            }
        };
        state.requested_bytes += length as u64;
        let (position, local) = state.slots.locate(page);
        let segment = state.segments[position]
            .as_ref()
            .expect("bound segments are ready");
        let offset = local as usize * PAGE_BYTES;
        let location = Location {
            boot_id: self.shared.config.boot_id,
            segment: segment.id(),
            offset: offset as u64,
            length: length as u64,
            generation: segment.generation(local),
        };
        // SAFETY: in bounds, because the page is of this segment.
        let base = unsafe { segment.base().add(offset) };
        drop(state);
        // SAFETY: the allocator gave these pages to nobody else; a segment with a taken slot is never
        // replaced, and the slot holds the arena; mapped memory is initialised.
        Some(unsafe { SlotMut::from_arena(Arc::clone(self), base, page, location) })
    }

    /// Ends a slot's tenancy; called by its drop.
    pub(crate) fn give_back(&self, page: u32, location: &Location) {
        let mut state = self.shared.state.lock();
        let (position, local) = state.slots.locate(page);
        state.segments[position]
            .as_ref()
            .expect("bound segments are ready")
            .retire(local);
        state.slots.free(page);
        state.requested_bytes -= location.length;
    }

    /// What it holds now. Walks the segments and spans: for people and metrics, not for each request.
    pub fn stats(&self) -> ArenaStats {
        let state = self.shared.state.lock();
        let page = PAGE_BYTES as u64;
        let ready = || state.segments.iter().flatten();
        let used_pages: u64 = (0..state.segments.len())
            .map(|i| u64::from(state.slots.segment_used_pages(i)))
            .sum();
        let unbound = state.spare.iter().map(|&i| state.slots.segment_pages(i));
        let bound = (0..state.domains.len()).map(|number| state.slots.largest_free(number));
        let largest_free_bytes =
            (u64::from(unbound.chain(bound).max().unwrap_or(0)) * page).min(MAX_SLOT_BYTES as u64);
        let ready_bytes: u64 = ready().map(|segment| segment.length() as u64).sum();
        let used_bytes = used_pages * page;
        let wanted = (ready_bytes - used_bytes).min(MAX_SLOT_BYTES as u64);
        ArenaStats {
            capacity_bytes: self.shared.config.capacity_bytes / page * page,
            ready_bytes,
            used_bytes,
            requested_bytes: state.requested_bytes,
            largest_free_bytes,
            overhead_bytes: state.slots.overhead_bytes() + ready_bytes / page * 8,
            fragmentation: if wanted == 0 {
                0.0
            } else {
                1.0 - largest_free_bytes as f64 / wanted as f64
            },
            huge_pages: ready().all(|segment| segment.huge_pages()),
            write_sealed: ready().all(|segment| segment.write_sealed()),
            slots: state.slots.slots(),
            note: state.note.clone(),
        }
    }

    /// What it can hold now; grows to the capacity while segments become ready.
    pub fn ready_bytes(&self) -> u64 {
        self.shared
            .state
            .lock()
            .segments
            .iter()
            .flatten()
            .map(|segment| segment.length() as u64)
            .sum()
    }

    /// Waits until no segment is being made or waited for.
    pub fn wait_ready(&self) {
        let mut state = self.shared.state.lock();
        while state.building || !state.wanted.is_empty() {
            self.shared.idle.wait(&mut state);
        }
    }

    /// Whether a segment is being made or waited for.
    pub fn is_building(&self) -> bool {
        let state = self.shared.state.lock();
        state.building || !state.wanted.is_empty()
    }

    /// The ready segments.
    pub fn segments(&self) -> Vec<SegmentInfo> {
        let state = self.shared.state.lock();
        let info = |(position, memory): (usize, &Option<Arc<Segment>>)| {
            let memory = memory.as_ref()?;
            Some(SegmentInfo {
                segment: memory.id(),
                domain: state
                    .slots
                    .segment_domain(position)
                    .map(|number| state.domains[number]),
                length_bytes: memory.length() as u64,
                used_bytes: u64::from(state.slots.segment_used_pages(position)) * PAGE_BYTES as u64,
                huge_pages: memory.huge_pages(),
                write_sealed: memory.write_sealed(),
                memory: Arc::clone(memory),
            })
        };
        state.segments.iter().enumerate().filter_map(info).collect()
    }

    /// Which slots would have to go for one of `length` bytes, cheapest first, at most
    /// [`MAX_CLEARINGS`] proposals. For when [`Self::alloc`] finds no room although enough is free:
    /// evicting by policy alone may free most of the arena and still leave crumbs. A proposal costs at
    /// most what a stretch of that length holds and the ends of the two slots at its edges; when its
    /// slots are gone, `alloc` succeeds (unless someone else took the place).
    pub fn clearings(&self, domain: DomainId, length: usize) -> Vec<Clearing> {
        if length == 0 || length > MAX_SLOT_BYTES {
            return Vec::new();
        }
        let state = self.shared.state.lock();
        let Some(number) = state.domains.iter().position(|known| *known == domain) else {
            return Vec::new();
        };
        let page = PAGE_BYTES as u64;
        let clearing = |window: Window| {
            let position = window
                .slots
                .first()
                .map_or(0, |first| state.slots.locate(*first).0);
            let offset = |slot: &u32| u64::from(state.slots.locate(*slot).1) * page;
            Clearing {
                segment: state.segments[position]
                    .as_ref()
                    .map_or(0, |segment| segment.id()),
                offsets: window.slots.iter().map(offset).collect(),
                used_bytes: u64::from(window.used_pages) * page,
            }
        };
        let windows =
            state
                .slots
                .windows(number, length.div_ceil(PAGE_BYTES) as u32, MAX_CLEARINGS);
        windows.into_iter().map(clearing).collect()
    }

    /// The server's life, as given.
    pub fn boot_id(&self) -> u64 {
        self.shared.config.boot_id
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Taking the lock orders this with the builder's check before it sleeps.
        drop(self.shared.state.lock());
        self.shared.work.notify_all();
        if let Some(builder) = self.builder.take() {
            // A builder that panicked has said so already.
            let _ = builder.join();
        }
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Makes the segment that has waited longest; `Ok(false)` if none waits.
    fn build_next(&self) -> Result<bool, SegmentError> {
        let (position, domain, id, length, replaced) = {
            let mut state = self.state.lock();
            let replaced = std::mem::take(&mut state.replaced);
            let Some((position, domain)) = state.wanted.pop_front() else {
                return Ok(false);
            };
            state.building = true;
            let id = state.next_segment;
            state.next_segment += 1;
            (
                position,
                domain,
                id,
                state.slots.segment_pages(position) as usize * PAGE_BYTES,
                replaced,
            )
        };
        // Before the new memory is asked for, so that both are never held at once.
        drop(replaced);
        let huge = self.config.huge_pages == HugePages::Auto;
        let made = Segment::new(id, length, huge, self.config.prefault, &self.stop);
        let mut state = self.state.lock();
        state.building = false;
        self.idle.notify_all();
        match made {
            Ok(segment) => {
                state.segments[position] = Some(Arc::new(segment));
                match domain {
                    Some(number) => {
                        state.slots.bind(position, number);
                        state.grace[position] = GRACE_ASKS;
                    }
                    None => state.spare.push(position),
                }
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(|e| format!(": {e}"));
                state.note = Some(format!("{error}{}", cause.unwrap_or_default()));
                return Err(error);
            }
        }
        Ok(true)
    }

    fn build_until_stopped(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            // A segment that cannot be had is noted and skipped: the next may be shorter.
            if let Ok(false) = self.build_next() {
                let mut state = self.state.lock();
                if state.wanted.is_empty() && !self.stop.load(Ordering::Relaxed) {
                    self.work.wait(&mut state);
                }
            }
        }
        let mut state = self.state.lock();
        state.wanted.clear();
        self.idle.notify_all();
    }
}

impl State {
    fn domain_number(&mut self, domain: DomainId) -> Option<usize> {
        if let Some(number) = self.domains.iter().position(|known| *known == domain) {
            return Some(number);
        }
        if self.domains.len() == MAX_DOMAINS {
            return None;
        }
        self.domains.push(domain);
        Some(self.domains.len() - 1)
    }

    fn bind_unbound(&mut self, number: usize, pages: u32) -> bool {
        let Some(at) = self
            .spare
            .iter()
            .position(|&i| self.slots.segment_pages(i) >= pages)
        else {
            return false;
        };
        self.slots.bind(self.spare.remove(at), number);
        true
    }

    /// Sends another domain's wholly empty segment to be replaced; true if one was sent.
    fn replace_empty(&mut self, number: usize, pages: u32) -> bool {
        if self.domains.len() == 1 || self.building || !self.wanted.is_empty() {
            return false;
        }
        let mut empty = (0..self.segments.len()).filter(|&i| {
            self.slots
                .segment_domain(i)
                .is_some_and(|theirs| theirs != number)
                && self.slots.segment_used_pages(i) == 0
                && self.slots.segment_pages(i) >= pages
        });
        let grace = &mut self.grace;
        let Some(position) = empty.find(|&i| {
            grace[i] = grace[i].saturating_sub(1);
            grace[i] == 0
        }) else {
            return false;
        };
        self.slots.unbind(position);
        // Nobody holds a slot in it; another process that mapped it keeps the memory until it unmaps.
        self.replaced.extend(self.segments[position].take());
        self.wanted.push_back((position, Some(number)));
        true
    }
}
