//! Which slots must go to make room for another: for the rare case that enough is free, but in crumbs.

use std::ops::Range;

use super::{OPEN, SPAN_PAGES, Slots};

/// A stretch that takes a slot of the size asked for once the slots listed are gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window {
    /// First pages of the slots in the way.
    pub(crate) slots: Vec<u32>,
    /// Their pages, those outside the stretch included.
    pub(crate) used_pages: u32,
}

impl Slots {
    /// Where a slot of `pages` pages could be had by giving up others, cheapest first: the best window
    /// of each of the `count` least filled spans of `domain`.
    pub(crate) fn windows(&self, domain: usize, pages: u32, count: usize) -> Vec<Window> {
        if pages == 0 || pages > SPAN_PAGES {
            return Vec::new();
        }
        let bound = |segment: &usize| self.segments[*segment].domain == Some(domain);
        let mut spans: Vec<(u32, u32, u32)> = Vec::new();
        for segment in (0..self.segments.len()).filter(bound) {
            let (base, length) = self.extent(segment);
            for local in (0..length).step_by(SPAN_PAGES as usize) {
                let span = Range {
                    start: base + local,
                    end: base + length.min(local + SPAN_PAGES),
                };
                if span.end - span.start >= pages {
                    spans.push((self.span_used[self.span(span.start)], span.start, span.end));
                }
            }
        }
        let few = count.min(spans.len());
        if few == 0 {
            return Vec::new();
        }
        spans.select_nth_unstable(few - 1);
        let mut windows: Vec<Window> = spans[..few]
            .iter()
            .map(|&(_, start, end)| self.window(start..end, pages))
            .collect();
        windows.sort_by_key(|window| window.used_pages);
        windows
    }

    /// The cheapest window of `pages` pages that starts where a run or slot of `span` does.
    fn window(&self, span: Range<u32>, pages: u32) -> Window {
        if self.band[self.span(span.start)] == OPEN {
            return Window {
                slots: Vec::new(),
                used_pages: 0,
            };
        }
        // The pieces of the span; the first may start before it.
        let mut pieces: Vec<(u32, u32, bool)> = Vec::new();
        let mut at = self.start_of(span.start);
        while at < span.end {
            let tag = self.tags[at as usize];
            pieces.push((at, tag >> 1, tag & 1 == 0));
            at += tag >> 1;
        }
        let cost = |(_, pages, taken): (u32, u32, bool)| if taken { pages } else { 0 };
        let (mut last, mut used, mut best) = (0, 0, (u32::MAX, 0..0));
        for first in 0..pieces.len() {
            let end = pieces[first].0.max(span.start) + pages;
            if end > span.end {
                break;
            }
            while last < pieces.len() && pieces[last].0 < end {
                used += cost(pieces[last]);
                last += 1;
            }
            if used < best.0 {
                best = (used, first..last);
            }
            used -= cost(pieces[first]);
        }
        let taken = pieces[best.1].iter().filter(|piece| piece.2);
        Window {
            slots: taken.map(|piece| piece.0).collect(),
            used_pages: best.0,
        }
    }

    /// The start of the run or slot that `page` lies in.
    fn start_of(&self, page: u32) -> u32 {
        let mut word = page as usize / 64;
        let mut bits = self.starts[word] & (u64::MAX >> (63 - page % 64));
        while bits == 0 {
            word -= 1;
            bits = self.starts[word];
        }
        word as u32 * 64 + bits.ilog2()
    }
}
