//! Made-up traces of known character, a function of their seed: what a policy is tried on besides recordings.
//!
//! | trace | who asks | what is worth keeping |
//! |---|---|---|
//! | [`chat`] | people, who think between turns and leave | conversations that have gone on for long |
//! | [`shared_prompts`] | applications with a few long system prompts, some more popular | the prompts, not the questions |
//! | [`scans`] | the same, while batch jobs read documents once | the same; nothing of the scans |
//! | [`agents`] | loops that send their growing history every step | the running loops, until they end |
//! | [`drifting`] | chats whose habits turn around half way | what is true now, not what was |
//! | [`uniform`] | nobody: independent draws from one set | anything |
//!
//! Shape: requests of block ids, root first. Units: blocks.

use super::Trace;

/// Conversations: each turn repeats the whole history and adds to it; think times vary widely, and who has
/// stayed for long stays longer.
#[must_use]
pub fn chat(seed: u64, requests: usize) -> Trace {
    let mut world = World::new(seed);
    let mut waiting = Sessions::default();
    (0..requests).for_each(|now| world.turn(&mut waiting, now as u64, Habit::CHAT));
    world.trace()
}

/// Questions of once under system prompts of 8 to 39 blocks, whose popularity follows Zipf's law.
#[must_use]
pub fn shared_prompts(seed: u64, requests: usize) -> Trace {
    let mut world = World::new(seed);
    let prompts = world.prompts(400);
    (0..requests).for_each(|_| world.question(&prompts));
    world.trace()
}

/// [`shared_prompts`] with a long document read once every tenth request.
#[must_use]
pub fn scans(seed: u64, requests: usize) -> Trace {
    let mut world = World::new(seed);
    let prompts = world.prompts(200);
    for number in 0..requests {
        if number % 10 == 9 {
            let scan = world.fresh(150);
            world.requests.push(scan);
        } else {
            world.question(&prompts);
        }
    }
    world.trace()
}

/// Agents: forty loops at a time, each sending its growing history 5 to 60 times in a row, then gone.
#[must_use]
pub fn agents(seed: u64, requests: usize) -> Trace {
    let mut world = World::new(seed);
    let tools = world.fresh(12);
    let mut running: Vec<(Vec<u64>, u64)> = Vec::new();
    for _ in 0..requests {
        while running.len() < 40 {
            let mut history = tools.clone();
            let task = 4 + world.below(30) as usize;
            history.extend(world.fresh(task));
            running.push((history, 5 + world.below(56)));
        }
        let who = world.below(40) as usize;
        let step = 1 + world.below(4) as usize;
        let grown = world.fresh(step);
        let (history, left) = &mut running[who];
        history.extend(grown);
        *left -= 1;
        world.requests.push(history.clone());
        if *left == 0 {
            running.swap_remove(who);
        }
    }
    world.trace()
}

/// [`chat`] in which, after half the requests, it is the newcomers who come back and the old hands who leave.
#[must_use]
pub fn drifting(seed: u64, requests: usize) -> Trace {
    let mut world = World::new(seed);
    let mut waiting = Sessions::default();
    for now in 0..requests {
        let habit = if now < requests / 2 {
            Habit::CHAT
        } else {
            Habit::TURNED
        };
        world.turn(&mut waiting, now as u64, habit);
    }
    world.trace()
}

/// One block a request, drawn evenly from `requests / 20` of them.
#[must_use]
pub fn uniform(seed: u64, requests: usize) -> Trace {
    let mut world = World::new(seed);
    let blocks = (requests as u64 / 20).max(1);
    for _ in 0..requests {
        let id = world.below(blocks);
        world.requests.push(vec![id]);
    }
    world.trace()
}

/// All of them by name, for suites.
#[must_use]
pub fn all(seed: u64, requests: usize) -> Vec<(&'static str, Trace)> {
    vec![
        ("chat", chat(seed, requests)),
        ("shared_prompts", shared_prompts(seed, requests)),
        ("scans", scans(seed, requests)),
        ("agents", agents(seed, requests)),
        ("drifting", drifting(seed, requests)),
        ("uniform", uniform(seed, requests)),
    ]
}

/// Chance, in percent, that a conversation goes on after its first turn and after a later one.
#[derive(Clone, Copy)]
struct Habit {
    after_first: u64,
    after_later: u64,
}

impl Habit {
    const CHAT: Self = Self {
        after_first: 30,
        after_later: 75,
    };
    const TURNED: Self = Self {
        after_first: 60,
        after_later: 10,
    };
}

/// Conversations by the request number at which they go on.
type Sessions = std::collections::BTreeMap<(u64, u64), Vec<u64>>;

struct World {
    random: u64,
    next_block: u64,
    requests: Vec<Vec<u64>>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            random: seed,
            next_block: 1 << 32,
            requests: Vec::new(),
        }
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn fresh(&mut self, count: usize) -> Vec<u64> {
        let start = self.next_block;
        self.next_block += count as u64;
        (start..self.next_block).collect()
    }

    fn prompts(&mut self, count: usize) -> Vec<Vec<u64>> {
        (0..count)
            .map(|_| {
                let len = 8 + self.below(32) as usize;
                self.fresh(len)
            })
            .collect()
    }

    /// A request under a prompt of Zipf rank: rank `n` is drawn with weight `1 / (n + 1)`, by inversion.
    fn question(&mut self, prompts: &[Vec<u64>]) {
        let uniform = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        let rank = ((prompts.len() as f64 + 1.0).powf(uniform) - 1.0) as usize;
        let mut request = prompts[rank.min(prompts.len() - 1)].clone();
        let len = 2 + self.below(12) as usize;
        request.extend(self.fresh(len));
        self.requests.push(request);
    }

    /// The conversation that is due goes on; if none is, a new one starts.
    fn turn(&mut self, waiting: &mut Sessions, now: u64, habit: Habit) {
        let due = waiting
            .first_key_value()
            .is_some_and(|((at, _), _)| *at <= now);
        let (mut history, chance) = match due.then(|| waiting.pop_first()).flatten() {
            Some((_, history)) => (history, habit.after_later),
            None => (Vec::new(), habit.after_first),
        };
        let len = if history.is_empty() {
            2 + self.below(40)
        } else {
            1 + self.below(8)
        } as usize;
        history.extend(self.fresh(len));
        self.requests.push(history.clone());
        if self.below(100) < chance {
            // Think times from 20 to 5,120 requests, evenly over the octaves.
            let octave = 20 << self.below(8);
            let at = now + octave + self.below(octave);
            let tie = self.next();
            waiting.insert((at, tie), history);
        }
    }

    fn trace(self) -> Trace {
        Trace::from_requests(self.requests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_trace() {
        for ((name, one), (_, other)) in all(3, 300).into_iter().zip(all(3, 300)) {
            assert_eq!(one.len(), 300, "{name}");
            assert!(one.requests().eq(other.requests()), "{name}");
        }
        assert!(!chat(3, 300).requests().eq(chat(4, 300).requests()));
    }
}
