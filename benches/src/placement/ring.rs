//! A ring of points: a run belongs to the next point clockwise, and the point to its member (Karger and others 1997).

use kvproto::RunHash;

use super::{Members, Owners, hash, key};

/// The points, sorted.
#[derive(Clone)]
pub struct Ring {
    points: Vec<(u64, u32)>,
}

impl Ring {
    /// `points` for each unit of weight.
    pub fn new(members: &Members, points: usize) -> Self {
        let of = |number: u32, count: usize| {
            (0..count as u64).map(move |nth| (hash(u64::from(number), nth), number))
        };
        let mut points: Vec<(u64, u32)> = members
            .0
            .iter()
            .flat_map(|member| of(member.number, points * member.weight as usize))
            .collect();
        points.sort_unstable();
        Self { points }
    }
}

impl Owners for Ring {
    fn owner(&self, run: &RunHash) -> u32 {
        let key = key(run);
        let at = self.points.partition_point(|&(point, _)| point < key);
        self.points[if at == self.points.len() { 0 } else { at }].1
    }

    fn bytes(&self) -> usize {
        std::mem::size_of_val(&self.points[..])
    }
}
