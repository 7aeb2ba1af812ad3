//! What to expect of a block, learnt from what became of others like it.

/// Two buckets an octave.
pub(super) const BUCKETS: usize = 48;
pub(super) const EPOCHS: usize = 64;

pub(super) fn bucket(age: u64) -> usize {
    let age = age + 1;
    let octave = 63 - age.leading_zeros() as usize;
    let half = if octave == 0 {
        0
    } else {
        (age >> (octave - 1)) as usize & 1
    };
    (2 * octave + half).min(BUCKETS - 1)
}

fn width(bucket: usize) -> f32 {
    let octave = bucket / 2;
    if octave == 0 {
        return if bucket == 0 { 1.0 } else { 0.5 };
    }
    (1u64 << octave) as f32 / 2.0
}

#[derive(Clone)]
struct Fate {
    hits: [f32; BUCKETS],
    ends: [f32; BUCKETS],
    alive: [i32; EPOCHS],
    ancient: i32,
    index: [f32; BUCKETS],
}

pub(super) struct Outlook {
    classes: Vec<Fate>,
    epoch_starts: [u64; EPOCHS],
    pub epoch: u32,
    pub strength: f32,
    pub decay: f32,
}

impl Outlook {
    pub(super) fn new(classes: usize) -> Self {
        let mut o = Self {
            classes: vec![
                Fate {
                    hits: [0.0; BUCKETS],
                    ends: [0.0; BUCKETS],
                    alive: [0; EPOCHS],
                    ancient: 0,
                    index: [0.0; BUCKETS]
                };
                classes
            ],
            epoch_starts: [0; EPOCHS],
            epoch: 0,
            strength: 64.0,
            decay: 0.98,
        };
        o.learn(0);
        o
    }

    pub(super) fn started(&mut self, class: usize) {
        self.classes[class].alive[self.epoch as usize % EPOCHS] += 1;
    }

    pub(super) fn left(&mut self, class: usize, epoch: u32) {
        if self.epoch - epoch < EPOCHS as u32 {
            self.classes[class].alive[epoch as usize % EPOCHS] -= 1;
        } else {
            self.classes[class].ancient -= 1;
        }
    }

    pub(super) fn hit(&mut self, class: usize, age: u64) {
        self.classes[class].hits[bucket(age)] += 1.0;
    }

    pub(super) fn ended(&mut self, class: usize, age: u64) {
        self.classes[class].ends[bucket(age)] += 1.0;
    }

    pub(super) fn index(&self, class: usize, age: u64) -> f32 {
        self.classes[class].index[bucket(age)]
    }

    /// New epoch begins at `now`; the index is computed anew.
    pub(super) fn learn(&mut self, now: u64) {
        // at risk and hits by bucket
        let n = self.classes.len();
        let mut risk = vec![[0f32; BUCKETS]; n];
        let mut pool_hit = [0f32; BUCKETS];
        let mut pool_risk = [0f32; BUCKETS];
        for (c, f) in self.classes.iter().enumerate() {
            let mut ends = f.ends;
            for e in 0..EPOCHS {
                if f.alive[e] > 0 {
                    ends[bucket(now.saturating_sub(self.epoch_starts[e]))] += f.alive[e] as f32;
                }
            }
            ends[bucket(
                now.saturating_sub(self.epoch_starts[(self.epoch as usize + 1) % EPOCHS]),
            )] += f.ancient.max(0) as f32;
            let mut r = 0.0;
            for k in (0..BUCKETS).rev() {
                r += f.hits[k] + ends[k];
                risk[c][k] = r - ends[k] / 2.0;
                pool_hit[k] += f.hits[k];
                pool_risk[k] += risk[c][k];
            }
        }
        let prior = 0.05f32;
        let mut ph = [0f32; BUCKETS];
        for k in 0..BUCKETS {
            ph[k] = (pool_hit[k] + self.strength * prior * if k == 0 { 1.0 } else { 1.0 })
                / (pool_risk[k] + self.strength);
        }
        for (c, f) in self.classes.iter_mut().enumerate() {
            let mut h = [0f32; BUCKETS];
            for k in 0..BUCKETS {
                h[k] =
                    ((f.hits[k] + self.strength * ph[k]) / (risk[c][k] + self.strength)).min(1.0);
            }
            for i in 0..BUCKETS {
                let (mut s, mut p, mut cost, mut best) = (1.0f32, 0.0f32, 0.0f32, 0.0f32);
                for k in i..BUCKETS {
                    let d = s * h[k];
                    p += d;
                    cost += (s - d / 2.0) * width(k);
                    s -= d;
                    best = best.max(p / cost);
                    if s < 1e-3 {
                        break;
                    }
                }
                f.index[i] = best;
            }
            for k in 0..BUCKETS {
                f.hits[k] *= self.decay;
                f.ends[k] *= self.decay;
            }
        }
        // new epoch
        self.epoch += 1;
        let e = self.epoch as usize % EPOCHS;
        for f in &mut self.classes {
            f.ancient += f.alive[e];
            f.alive[e] = 0;
        }
        self.epoch_starts[e] = now;
    }
}
