//! Makes metrics and registers them; two of one name are a bug that panics at start.

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// 50 µs to 10 s: from a lookup in the index to a long read from a busy disk.
const SECONDS: [f64; 14] = [
    50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 25e-3, 100e-3, 500e-3, 1.0, 3.0, 10.0,
];

/// Makes metrics and registers them.
pub(super) struct Make<'a>(pub(super) &'a Registry);

impl Make<'_> {
    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        let made = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid name");
        self.0
            .register(Box::new(made.clone()))
            .expect("names are distinct");
        made
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.counters(name, help, &[])
            .with_label_values::<&str>(&[])
    }

    pub(super) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        let made = IntGaugeVec::new(Opts::new(name, help), labels).expect("a valid name");
        self.0
            .register(Box::new(made.clone()))
            .expect("names are distinct");
        made
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.gauges(name, help, &[]).with_label_values::<&str>(&[])
    }

    pub(super) fn histograms(&self, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
        let opts = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
        let made = HistogramVec::new(opts, labels).expect("a valid name");
        self.0
            .register(Box::new(made.clone()))
            .expect("names are distinct");
        made
    }
}
