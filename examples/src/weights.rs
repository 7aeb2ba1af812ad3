//! Weights from a seed: the same bytes on every machine, at every run.
//!
//! seed + tensor name ─FNV-1a─► state ─SplitMix64─► uniform f32 in ±sqrt(3 / fan_in)
//!
//! Every tensor draws from a stream of its own, named after it, so the order in which a model asks
//! does not matter. Uniform numbers need no logarithm and no cosine: only integer arithmetic and
//! one exactly rounded multiplication lie between the seed and a weight, and no platform's math
//! library can change one.
//! The bound gives each weight the variance 1 / fan_in, so activations keep their size from layer
//! to layer; with anything smaller attention would be flat and a swapped block could go unnoticed.

use candle_core::{Device, Result, Tensor};
use candle_nn::{Embedding, Linear, RmsNorm};

/// Where a model's tensors come from.
#[derive(Debug, Clone, Copy)]
pub struct WeightSource {
    seed: u64,
}

impl WeightSource {
    /// A source; equal seeds give equal weights.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The seed, for a namespace's weights fingerprint.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// A matrix without bias, `[outputs, inputs]`.
    ///
    /// # Errors
    /// What candle reports when it cannot make the tensor.
    pub fn linear(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        Ok(Linear::new(
            self.uniform(name, &[outputs, inputs], inputs)?,
            None,
        ))
    }

    /// A table of `rows` vectors with components of variance 1.
    ///
    /// # Errors
    /// What candle reports when it cannot make the tensor.
    pub fn embedding(&self, name: &str, rows: usize, width: usize) -> Result<Embedding> {
        Ok(Embedding::new(
            self.uniform(name, &[rows, width], 1)?,
            width,
        ))
    }

    /// A norm's gain: ones, as a model has them before it is trained.
    ///
    /// # Errors
    /// What candle reports when it cannot make the tensor.
    pub fn norm(&self, width: usize, eps: f64) -> Result<RmsNorm> {
        Ok(RmsNorm::new(
            Tensor::ones(width, candle_core::DType::F32, &Device::Cpu)?,
            eps,
        ))
    }

    fn uniform(&self, name: &str, shape: &[usize], fan_in: usize) -> Result<Tensor> {
        let bound = (3.0 / fan_in as f32).sqrt();
        let mut stream = SplitMix64::named(self.seed, name);
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| stream.signed_unit() * bound)
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu)
    }
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), the finalizer of
/// their Java `SplittableRandom`.
struct SplitMix64(u64);

impl SplitMix64 {
    fn named(seed: u64, name: &str) -> Self {
        let fnv = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(fnv ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1), on a grid of 2^-23: exact in an f32.
    fn signed_unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::{SplitMix64, WeightSource};

    #[test]
    fn same_seed_gives_the_same_weights() {
        let one = WeightSource::new(7).linear("layers.0.q", 8, 4).unwrap();
        let two = WeightSource::new(7).linear("layers.0.q", 8, 4).unwrap();
        assert_eq!(
            one.weight().to_vec2::<f32>().unwrap(),
            two.weight().to_vec2::<f32>().unwrap()
        );
    }

    #[test]
    fn seed_and_name_both_matter() {
        let draw = |seed, name: &str| SplitMix64::named(seed, name).next();
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
    }

    /// Reference values of SplitMix64 with state 0, so that the generator itself cannot drift.
    #[test]
    fn generator_matches_the_published_sequence() {
        let mut stream = SplitMix64(0);
        assert_eq!(stream.next(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(stream.next(), 0x6e78_9e6a_a1b9_65f4);
        assert_eq!(stream.next(), 0x06c4_5d18_8009_454f);
    }

    #[test]
    fn weights_have_the_variance_of_their_fan_in() {
        let linear = WeightSource::new(3).linear("w", 64, 256).unwrap();
        let values = linear
            .weight()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!((variance * 64.0 - 1.0).abs() < 0.05, "variance {variance}");
    }
}
