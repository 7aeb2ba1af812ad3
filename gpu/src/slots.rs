//! Which pages of the arena are whose: constant-time allocation of mixed sizes.
//!
//! ```text
//!  segment  ├──────── span ────────┼──────── span ────────┼─ tail ─┤
//!           │ band: small          │ open (wholly free)   │ large  │
//!           │■■■□■■□□□■■■■■■□■□□□□□│                      │■■■□□□□□│
//!               └┬┘ free runs, listed by domain × band × size class
//! ```
//!
//! A **page** is 4 KiB, the unit of everything here; a **span** is 64 MiB, the largest slot; a
//! **band** is a range of sizes. Inside a span this is two-level segregated fit (Masmano et al.,
//! "TLSF", 2004) with boundary tags: free runs are listed by size class, found through bitmaps, split
//! on allocation and merged on release. The tags are kept beside the bytes and not in them, because
//! the bytes are mapped by other processes and by devices.
//!
//! Why spans and bands: one long-lived 4 KiB slot in the middle of 64 MiB spoils the place for a large
//! one, and under random churn plain TLSF strews small slots everywhere. Here small slots share spans
//! with small slots. A span whose last slot goes is open to every band again. Only when a band has
//! nothing left and no span is open does it borrow from another band, so memory is never refused while
//! a run that is long enough exists. `Slots::windows` names the few slots whose
//! going makes room for one of a given size: at random, a large slot may cost most of the arena.
//!
//! Cost: allocation and release touch a fixed number of words, whatever the arena's size.
//! (`windows`, for the rare case, walks a few spans.)
//! Memory: 12 bytes per page, 0.3 %.
//! Errors: none; "no room" is `None`.

mod windows;

use std::ops::Range;

use crate::bits::BitTree;
pub(crate) use windows::Window;

/// Granularity of allocation, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// The largest slot, in bytes.
pub const MAX_SLOT_BYTES: usize = 64 << 20;

const SPAN_PAGES: u32 = (MAX_SLOT_BYTES / PAGE_BYTES) as u32;
/// Upper bounds, in pages, of all bands but the last: below 64 KiB, 1 MiB, 8 MiB.
const BAND_PAGES: [u32; 3] = [16, 256, 2048];
const BANDS: usize = BAND_PAGES.len() + 1;
const LARGE: u8 = BANDS as u8 - 1;
/// The mark of a span that is wholly free.
const OPEN: u8 = u8::MAX;

/// Each power of two is cut into this many classes: a class spans at most 1/32 of its size.
const SECOND_BITS: u32 = 5;
const SECOND: usize = 1 << SECOND_BITS;
/// A listed run never holds a whole span, so it is shorter than two: 2^15 pages need 11 rows.
const FIRST: usize = 12;
/// Entries of a request's own class that are tried before the next class, whose runs all fit. Without
/// them a hole of exactly the size asked for is passed over unless the size is a class bound.
const OWN_CLASS_TRIES: usize = 8;

const NIL: u32 = u32::MAX;

/// Free runs of one band, by size class.
struct Lists {
    first: u32,
    second: [u32; FIRST],
    heads: [[u32; SECOND]; FIRST],
}

impl Lists {
    const EMPTY: Self = Self {
        first: 0,
        second: [0; FIRST],
        heads: [[NIL; SECOND]; FIRST],
    };
}

/// What one trust domain may allocate from.
struct Domain {
    bands: [Lists; BANDS],
    open: BitTree,
}

/// One segment as the allocator sees it.
#[derive(Clone)]
struct Segment {
    pages: u32,
    used: u32,
    domain: Option<usize>,
}

/// The page map of all segments. Pages are numbered through: segment `i` starts at
/// `i * pages_per_segment`.
pub(crate) struct Slots {
    pages_per_segment: u32,
    spans_per_segment: u32,
    segments: Vec<Segment>,
    /// Length << 1 | free, at the first and the last page of every run and slot.
    tags: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    /// One bit per page: a run or slot starts here.
    starts: Vec<u64>,
    /// Per span: its band or `OPEN`, and how many of its pages are taken.
    band: Vec<u8>,
    span_used: Vec<u32>,
    domains: Vec<Domain>,
    slots: u64,
}

impl Slots {
    /// A map of `pages` pages in segments of `pages_per_segment`; the last may be shorter. No page can
    /// be allocated before its segment is bound.
    pub(crate) fn new(pages: u32, pages_per_segment: u32) -> Self {
        let spans_per_segment = pages_per_segment.div_ceil(SPAN_PAGES);
        let count = pages.div_ceil(pages_per_segment) as usize;
        let spans = count * spans_per_segment as usize;
        let segment = |i: usize| Segment {
            pages: pages_per_segment.min(pages - i as u32 * pages_per_segment),
            used: 0,
            domain: None,
        };
        Self {
            pages_per_segment,
            spans_per_segment,
            segments: (0..count).map(segment).collect(),
            tags: vec![0; pages as usize],
            next: vec![0; pages as usize],
            previous: vec![0; pages as usize],
            starts: vec![0; pages.div_ceil(64) as usize],
            band: vec![OPEN; spans],
            span_used: vec![0; spans],
            domains: Vec::new(),
            slots: 0,
        }
    }

    pub(crate) fn segment_count(&self) -> usize {
        self.segments.len()
    }

    pub(crate) fn segment_pages(&self, segment: usize) -> u32 {
        self.segments[segment].pages
    }

    pub(crate) fn segment_used_pages(&self, segment: usize) -> u32 {
        self.segments[segment].used
    }

    pub(crate) fn segment_domain(&self, segment: usize) -> Option<usize> {
        self.segments[segment].domain
    }

    /// The segment of a page and the page's number within it.
    pub(crate) fn locate(&self, page: u32) -> (usize, u32) {
        (
            (page / self.pages_per_segment) as usize,
            page % self.pages_per_segment,
        )
    }

    /// Taken slots.
    pub(crate) fn slots(&self) -> u64 {
        self.slots
    }

    /// Bytes this map itself occupies at most.
    pub(crate) fn overhead_bytes(&self) -> u64 {
        self.tags.len() as u64 * 12 + self.starts.len() as u64 * 8 + self.band.len() as u64 * 5
    }

    /// Gives an unbound segment to a domain; domains are numbered from 0 and made on first use.
    pub(crate) fn bind(&mut self, segment: usize, domain: usize) {
        assert!(
            self.segments[segment].domain.is_none(),
            "segment {segment} is bound already"
        );
        while self.domains.len() <= domain {
            let bands = [const { Lists::EMPTY }; BANDS];
            self.domains.push(Domain {
                bands,
                open: BitTree::new(self.band.len()),
            });
        }
        self.segments[segment].domain = Some(domain);
        let (base, pages) = self.extent(segment);
        let first_span = segment as u32 * self.spans_per_segment;
        for span in first_span..first_span + pages / SPAN_PAGES {
            self.band[span as usize] = OPEN;
            self.domains[domain].open.insert(span);
        }
        // A tail shorter than a span is never open: it would not fit the largest slot.
        let tail = pages % SPAN_PAGES;
        if tail > 0 {
            self.band[(first_span + pages / SPAN_PAGES) as usize] = LARGE;
            self.list(base + pages - tail, tail);
        }
    }

    /// Takes a wholly free segment from its domain; false if it is not free or not bound.
    pub(crate) fn unbind(&mut self, segment: usize) -> bool {
        let Segment {
            pages,
            used,
            domain,
        } = self.segments[segment].clone();
        let (Some(domain), 0) = (domain, used) else {
            return false;
        };
        let first_span = segment as u32 * self.spans_per_segment;
        for span in first_span..first_span + pages / SPAN_PAGES {
            self.domains[domain].open.remove(span);
        }
        let tail = pages % SPAN_PAGES;
        if tail > 0 {
            self.unlist(self.extent(segment).0 + pages - tail);
        }
        self.segments[segment].domain = None;
        true
    }

    /// Takes `pages` pages for `domain` and answers the first.
    pub(crate) fn alloc(&mut self, domain: usize, pages: u32) -> Option<u32> {
        if pages == 0 || pages > SPAN_PAGES || domain >= self.domains.len() {
            return None;
        }
        let band = band_of(pages);
        let (start, length) = match self.find(domain, band, pages) {
            Some(start) => (start, self.unlist(start)),
            None => match self.open_span(domain, band) {
                Some(run) => run,
                None => {
                    let start = self.borrow(domain, band, pages)?;
                    (start, self.unlist(start))
                }
            },
        };
        let slot = self.carve(start, length, pages, band == LARGE);
        self.account(slot, pages, true);
        self.slots += 1;
        Some(slot)
    }

    /// Gives back the slot that starts at `page` and answers its length in pages.
    pub(crate) fn free(&mut self, page: u32) -> u32 {
        let tag = self.tags[page as usize];
        let starts = self.starts[page as usize / 64] >> (page % 64) & 1 == 1;
        assert!(starts && tag & 1 == 0, "page {page} does not start a slot");
        let pages = tag >> 1;
        self.untag(page);
        self.account(page, pages, false);
        self.slots -= 1;
        let (start, length) = self.merge(page, pages);
        self.insert(start, length);
        pages
    }

    /// The longest slot that `domain` could get now, in pages.
    pub(crate) fn largest_free(&self, domain: usize) -> u32 {
        let Some(state) = self.domains.get(domain) else {
            return 0;
        };
        if state.open.lowest().is_some() {
            return SPAN_PAGES;
        }
        let longest = |lists: &Lists| {
            let Some(row) = lists.first.checked_ilog2() else {
                return 0;
            };
            let column = lists.second[row as usize].ilog2();
            let mut at = lists.heads[row as usize][column as usize];
            let mut longest = 0;
            while at != NIL {
                longest = longest.max(self.tags[at as usize] >> 1);
                at = self.next[at as usize];
            }
            longest
        };
        state
            .bands
            .iter()
            .map(longest)
            .max()
            .unwrap_or(0)
            .min(SPAN_PAGES)
    }

    fn extent(&self, segment: usize) -> (u32, u32) {
        (
            segment as u32 * self.pages_per_segment,
            self.segments[segment].pages,
        )
    }

    fn span(&self, page: u32) -> usize {
        let (segment, local) = self.locate(page);
        segment * self.spans_per_segment as usize + (local / SPAN_PAGES) as usize
    }

    fn domain_of(&self, page: u32) -> usize {
        self.segments[self.locate(page).0]
            .domain
            .expect("runs exist only in bound segments")
    }

    fn tag(&mut self, start: u32, pages: u32, free: bool) {
        let tag = pages << 1 | u32::from(free);
        self.tags[start as usize] = tag;
        self.tags[(start + pages - 1) as usize] = tag;
        self.starts[start as usize / 64] |= 1 << (start % 64);
    }

    /// Nothing starts at `page` any more; always undone by `tag` where a run is only re-tagged.
    fn untag(&mut self, page: u32) {
        self.starts[page as usize / 64] &= !(1 << (page % 64));
    }

    fn list(&mut self, start: u32, pages: u32) {
        self.tag(start, pages, true);
        let (row, column) = class(pages);
        let (domain, band) = (self.domain_of(start), self.band[self.span(start)]);
        let lists = &mut self.domains[domain].bands[band as usize];
        let head = std::mem::replace(&mut lists.heads[row][column], start);
        lists.second[row] |= 1 << column;
        lists.first |= 1 << row;
        self.next[start as usize] = head;
        self.previous[start as usize] = NIL;
        if head != NIL {
            self.previous[head as usize] = start;
        }
    }

    /// Takes a free run off its list and answers its length.
    fn unlist(&mut self, start: u32) -> u32 {
        let pages = self.tags[start as usize] >> 1;
        self.untag(start);
        let (before, after) = (self.previous[start as usize], self.next[start as usize]);
        if after != NIL {
            self.previous[after as usize] = before;
        }
        if before != NIL {
            self.next[before as usize] = after;
            return pages;
        }
        let (row, column) = class(pages);
        let (domain, band) = (self.domain_of(start), self.band[self.span(start)]);
        let lists = &mut self.domains[domain].bands[band as usize];
        lists.heads[row][column] = after;
        if after == NIL {
            lists.second[row] &= !(1 << column);
            if lists.second[row] == 0 {
                lists.first &= !(1 << row);
            }
        }
        pages
    }

    /// A listed run of `band` with at least `pages` pages.
    fn find(&self, domain: usize, band: u8, pages: u32) -> Option<u32> {
        let lists = &self.domains[domain].bands[band as usize];
        let (row, column) = class(pages);
        let mut at = lists.heads[row][column];
        for _ in 0..OWN_CLASS_TRIES {
            if at == NIL {
                break;
            }
            if self.tags[at as usize] >> 1 >= pages {
                return Some(at);
            }
            at = self.next[at as usize];
        }
        let above = lists.second[row] & (u32::MAX << column << 1);
        if above != 0 {
            return Some(lists.heads[row][above.trailing_zeros() as usize]);
        }
        let rows = lists.first & (u32::MAX << row << 1);
        if rows == 0 {
            return None;
        }
        let row = rows.trailing_zeros() as usize;
        Some(lists.heads[row][lists.second[row].trailing_zeros() as usize])
    }

    /// Gives an open span to `band`: small bands grow from below, the large one from above, so that
    /// each band's spans lie together and large slots may cross from one to the next.
    fn open_span(&mut self, domain: usize, band: u8) -> Option<(u32, u32)> {
        let open = &mut self.domains[domain].open;
        let span = if band == LARGE {
            open.highest()
        } else {
            open.lowest()
        }?;
        open.remove(span);
        self.band[span as usize] = band;
        let segment = span / self.spans_per_segment;
        let start = segment * self.pages_per_segment + span % self.spans_per_segment * SPAN_PAGES;
        Some(self.merge(start, SPAN_PAGES))
    }

    /// A run of another band: larger bands first, whose runs a small slot hurts least.
    fn borrow(&self, domain: usize, band: u8, pages: u32) -> Option<u32> {
        let larger = band + 1..BANDS as u8;
        larger
            .chain((0..band).rev())
            .find_map(|other| self.find(domain, other, pages))
    }

    /// Joins the unlisted run with its free neighbours of the same band, which leave their lists.
    fn merge(&mut self, start: u32, pages: u32) -> (u32, u32) {
        let Range {
            start: mut low,
            end: mut high,
        } = start..start + pages;
        let band = self.band[self.span(start)];
        let (base, length) = self.extent(self.locate(start).0);
        if low > base
            && self.band[self.span(low - 1)] == band
            && self.tags[low as usize - 1] & 1 == 1
        {
            low -= self.tags[low as usize - 1] >> 1;
            self.unlist(low);
        }
        if high < base + length
            && self.band[self.span(high)] == band
            && self.tags[high as usize] & 1 == 1
        {
            high += self.unlist(high);
        }
        (low, high - low)
    }

    /// Cuts a slot off one end of an unlisted run; the rest is listed.
    fn carve(&mut self, start: u32, length: u32, pages: u32, from_above: bool) -> u32 {
        let rest = length - pages;
        let (slot, rest_start) = if from_above {
            (start + rest, start)
        } else {
            (start, start + pages)
        };
        self.tag(slot, pages, false);
        if rest > 0 {
            self.insert(rest_start, rest);
        }
        slot
    }

    /// Lists a free run that is already as long as it can be; whole spans in it become open.
    fn insert(&mut self, start: u32, length: u32) {
        let (segment, local) = self.locate(start);
        let spans = local.div_ceil(SPAN_PAGES)..(local + length) / SPAN_PAGES;
        if spans.is_empty() {
            return self.list(start, length);
        }
        let base = start - local;
        let (inner, outer) = (
            base + spans.start * SPAN_PAGES,
            base + spans.end * SPAN_PAGES,
        );
        let domain = self.domain_of(start);
        for span in spans {
            let span = segment as u32 * self.spans_per_segment + span;
            self.band[span as usize] = OPEN;
            self.domains[domain].open.insert(span);
        }
        if start < inner {
            self.list(start, inner - start);
        }
        if outer < start + length {
            self.list(outer, start + length - outer);
        }
    }

    /// Books pages on the segment and the one or two spans they lie in.
    fn account(&mut self, start: u32, pages: u32, taken: bool) {
        let book = |count: &mut u32, pages: u32| {
            *count = if taken {
                *count + pages
            } else {
                *count - pages
            };
        };
        let (segment, local) = self.locate(start);
        book(&mut self.segments[segment].used, pages);
        let span = self.span(start);
        let within = pages.min(SPAN_PAGES - local % SPAN_PAGES);
        book(&mut self.span_used[span], within);
        if within < pages {
            book(&mut self.span_used[span + 1], pages - within);
        }
    }
}

fn band_of(pages: u32) -> u8 {
    BAND_PAGES.iter().filter(|&&bound| pages >= bound).count() as u8
}

/// The class of a length: row by power of two, column by the next five bits.
fn class(pages: u32) -> (usize, usize) {
    if pages < SECOND as u32 {
        return (0, pages as usize);
    }
    let power = pages.ilog2();
    let column = (pages >> (power - SECOND_BITS)) as usize & (SECOND - 1);
    ((power - SECOND_BITS + 1) as usize, column)
}
