//! A set of small numbers that answers "lowest" and "highest" in constant time.
//!
//! Each level is a bitmap whose bits say which words of the level below are not zero, so a look-up
//! touches one word per level: three levels hold 262 144 members, four hold sixteen million.

/// A set of numbers below a bound fixed at construction.
#[derive(Debug, Clone)]
pub(crate) struct BitTree {
    /// `levels[0]` holds the members, the last level is one word.
    levels: Vec<Vec<u64>>,
}

impl BitTree {
    /// An empty set that can hold `0..bound`.
    pub(crate) fn new(bound: usize) -> Self {
        let mut levels = Vec::new();
        let mut words = bound.max(1).div_ceil(64);
        loop {
            levels.push(vec![0; words]);
            if words == 1 {
                return Self { levels };
            }
            words = words.div_ceil(64);
        }
    }

    pub(crate) fn insert(&mut self, member: u32) {
        let mut at = member as usize;
        for level in &mut self.levels {
            level[at / 64] |= 1 << (at % 64);
            at /= 64;
        }
    }

    pub(crate) fn remove(&mut self, member: u32) {
        let mut at = member as usize;
        for level in &mut self.levels {
            level[at / 64] &= !(1 << (at % 64));
            if level[at / 64] != 0 {
                return;
            }
            at /= 64;
        }
    }

    pub(crate) fn lowest(&self) -> Option<u32> {
        self.descend(|word| word.trailing_zeros())
    }

    pub(crate) fn highest(&self) -> Option<u32> {
        self.descend(|word| 63 - word.leading_zeros())
    }

    fn descend(&self, pick: impl Fn(u64) -> u32) -> Option<u32> {
        let mut at = 0;
        for level in self.levels.iter().rev() {
            let word = level[at];
            if word == 0 {
                return None;
            }
            at = at * 64 + pick(word) as usize;
        }
        Some(at as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::BitTree;

    #[test]
    fn lowest_and_highest_follow_the_members() {
        let mut set = BitTree::new(300_000);
        assert_eq!((set.lowest(), set.highest()), (None, None));
        for member in [299_999, 70, 4_097, 12] {
            set.insert(member);
        }
        assert_eq!((set.lowest(), set.highest()), (Some(12), Some(299_999)));
        set.remove(12);
        set.remove(299_999);
        assert_eq!((set.lowest(), set.highest()), (Some(70), Some(4_097)));
        set.remove(70);
        set.remove(4_097);
        assert_eq!(set.lowest(), None);
    }
}
