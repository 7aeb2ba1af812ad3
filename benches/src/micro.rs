//! Prices of single steps: nanoseconds per unit of work, in interleaved rounds like everything here.
//!
//! ```text
//!   Price { name, unit, step } ─► calibrated so that one sample takes about a cell ─► rounds ─► median, p10–p90
//! ```
//!
//! A step does a known number of units (tokens, keys, bytes) and says how many; what it computes goes through
//! `black_box`, so that it cannot be optimised away.

use std::time::Duration;

use serde::Serialize;

use crate::clock::Started;
use crate::stats::{Spread, spread};

/// What a price is per.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds per one of these.
    Nanos(&'static str),
    /// GiB per second; a step answers bytes.
    GibS,
}

/// One step whose price is wanted.
pub struct Price {
    name: &'static str,
    unit: Unit,
    step: Box<dyn FnMut() -> u64>,
    repeats: u64,
    samples: Vec<f64>,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// What was done.
    pub name: &'static str,
    /// `ns/token`, `GiB/s`, ...
    pub unit: String,
    /// Over all rounds.
    pub value: Option<Spread>,
}

impl Price {
    /// The price of `step`, which does some units of work and answers how many.
    pub fn new(name: &'static str, unit: Unit, step: impl FnMut() -> u64 + 'static) -> Self {
        Self {
            name,
            unit,
            step: Box::new(step),
            repeats: 1,
            samples: Vec::new(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    fn sample(&mut self) -> (f64, Duration) {
        let started = Started::now();
        let units: u64 = (0..self.repeats).map(|_| (self.step)()).sum();
        let length = started.elapsed();
        let seconds = length.as_secs_f64().max(1e-9);
        let value = match self.unit {
            Unit::Nanos(_) => seconds * 1e9 / units.max(1) as f64,
            Unit::GibS => units as f64 / (1u64 << 30) as f64 / seconds,
        };
        (value, length)
    }

    /// Finds how often the step fits into `length`; this warms it up as well.
    fn calibrate(&mut self, length: Duration) {
        loop {
            let (_, took) = self.sample();
            if took >= length / 2 || self.repeats >= 1 << 40 {
                return;
            }
            let grow = length.as_secs_f64() / took.as_secs_f64().max(1e-7);
            self.repeats =
                ((self.repeats as f64 * grow.clamp(1.5, 100.0)) as u64).max(self.repeats + 1);
        }
    }

    fn line(&self) -> Line {
        let unit = match self.unit {
            Unit::Nanos(what) => format!("ns/{what}"),
            Unit::GibS => "GiB/s".into(),
        };
        Line {
            name: self.name,
            unit,
            value: spread(&self.samples),
        }
    }
}

/// Measures all prices, `rounds` times, samples of about `length`; `after` is called after each.
pub fn run(
    prices: &mut [Price],
    rounds: usize,
    length: Duration,
    mut after: impl FnMut(&'static str),
) -> Vec<Line> {
    for price in prices.iter_mut() {
        price.calibrate(length);
    }
    for round in 0..rounds {
        for turn in 0..prices.len() {
            let price = &mut prices[(round + turn) % prices.len()];
            let (value, _) = price.sample();
            price.samples.push(value);
            after(price.name);
        }
    }
    prices.iter().map(Price::line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_lasts_long_enough_and_rounds_turn() {
        let seen = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        let length = Duration::from_millis(2);
        let spin = || {
            (0..1000u64)
                .fold(1, |x, i| std::hint::black_box(x ^ i))
                .min(1)
                + 1
        };
        let unit = Unit::Nanos("spin");
        let mut prices = [Price::new("a", unit, spin), Price::new("b", unit, spin)];
        let lines = run(&mut prices, 3, length, |name| seen.borrow_mut().push(name));
        assert_eq!(*seen.borrow(), ["a", "b", "b", "a", "a", "b"]);
        let value = lines[0].value.expect("three samples");
        assert!(value.count == 3 && value.p10 > 0.0 && lines[0].unit == "ns/spin");
        assert!(
            prices[0].repeats > 1,
            "a step of a microsecond was not repeated to fill the sample"
        );
    }

    #[test]
    fn rates_count_bytes() {
        let mut prices = [Price::new("copy", Unit::GibS, || 1 << 30)];
        let lines = run(&mut prices, 1, Duration::ZERO, |_| ());
        assert!(lines[0].value.expect("one sample").median > 1.0 && lines[0].unit == "GiB/s");
    }
}
