//! Memory, files and CPU time of this process, from `/proc`.
//!
//! Units: as the Prometheus names say.
//! Why around the crate's own collector: it counts CPU in whole seconds, which is too coarse to say what a
//! few seconds of load cost; here it is in clock ticks, 10 ms.

use prometheus::{
    core::{Collector, Desc},
    process_collector::ProcessCollector,
    proto::{Counter, MetricFamily},
};

const CPU: &str = "process_cpu_seconds_total";

/// The process's metrics.
pub(super) struct Process(ProcessCollector);

impl Process {
    pub(super) fn new() -> Self {
        Self(ProcessCollector::for_self())
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.0.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut families = self.0.collect();
        if let Some(seconds) = cpu_seconds() {
            let cpu = families.iter_mut().filter(|family| family.name() == CPU);
            for metric in cpu.flat_map(|family| family.mut_metric()) {
                let mut counter = Counter::default();
                counter.set_value(seconds);
                metric.set_counter(counter);
            }
        }
        families
    }
}

/// User and system time of all threads.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the name in brackets and may hold anything; fields 14 and 15 are the times.
    let mut fields = stat.rsplit(')').next()?.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((user + system) as f64 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    use prometheus::{TextEncoder, core::Collector};

    use super::{Process, cpu_seconds};
    use crate::telemetry::metrics::samples;

    #[test]
    fn cpu_time_is_finer_than_a_second() {
        let start = cpu_seconds().unwrap();
        let mut x = 1_u64;
        while cpu_seconds().unwrap() < start + 0.03 {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        // Read as text: the shape of `proto::Counter` depends on a feature that others may switch.
        let text = TextEncoder::new()
            .encode_to_string(&Process::new().collect())
            .unwrap();
        let cpu = samples(&text).find(|(name, _)| *name == super::CPU);
        let (_, seconds) = cpu.expect("the process counts its CPU time");
        assert!(seconds >= start + 0.03 && seconds <= cpu_seconds().unwrap());
    }
}
