//! Drives one cell: so many workers, one operation after the other each, for a short window.
//!
//! ```text
//!   warm (not measured) ─► accounts read ─► measure ─► last worker done ─► accounts read
//! ```
//!
//! A window ends when the last operation begun in it has ended; its length counts to that moment, so slow operations at the
//! end are neither lost nor free. Latency is taken around every operation. CPU is the client's and the servers' together:
//! work the kernel does for a sender in the receiver's time cannot hide.

use std::sync::Barrier;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::clock::Started;
use crate::procfs::{Cpu, machine_busy};
use crate::stats::latency_us;

/// How long a cell warms up and how long it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Unmeasured start: idle sockets grow their windows again, caches fill.
    pub warm: Duration,
    /// Measured part.
    pub measure: Duration,
}

/// One cell in one round.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Operations completed.
    pub ops: u64,
    /// Payload bytes moved by them.
    pub bytes: u64,
    /// Length of the window, seconds.
    pub wall_s: f64,
    /// Median latency of an operation, microseconds.
    pub p50_us: Option<f64>,
    /// 99th percentile of it.
    pub p99_us: Option<f64>,
    /// CPU seconds of the client process.
    pub client_cpu_s: f64,
    /// CPU seconds of the server processes; 0 when the client is the server.
    pub server_cpu_s: f64,
    /// Cores that others kept busy meanwhile.
    pub foreign_cores: Option<f64>,
}

impl Sample {
    /// Payload rate; None for operations without payload.
    pub fn gib_s(&self) -> Option<f64> {
        (self.bytes > 0 && self.wall_s > 0.0).then(|| self.gib() / self.wall_s)
    }

    /// Operations per second.
    pub fn ops_s(&self) -> Option<f64> {
        (self.wall_s > 0.0).then(|| self.ops as f64 / self.wall_s)
    }

    /// CPU seconds, client and servers, per GiB of payload.
    pub fn cpu_s_per_gib(&self) -> Option<f64> {
        (self.bytes > 0).then(|| self.cpu_s() / self.gib())
    }

    /// CPU microseconds, client and servers, per operation.
    pub fn cpu_us_per_op(&self) -> Option<f64> {
        (self.ops > 0).then(|| self.cpu_s() * 1e6 / self.ops as f64)
    }

    fn cpu_s(&self) -> f64 {
        self.client_cpu_s + self.server_cpu_s
    }

    fn gib(&self) -> f64 {
        self.bytes as f64 / (1u64 << 30) as f64
    }
}

/// One in-flight operation at a time.
pub trait Worker: Send + Sized + 'static {
    /// Does one operation and answers the payload bytes it moved.
    ///
    /// # Errors
    /// Whatever makes the figure worthless: a miss, a wrong length, a broken connection.
    fn step(&mut self) -> impl Future<Output = Result<u64>> + Send;
}

/// The same on a thread of its own.
pub trait BlockingWorker: Send {
    /// Does one operation and answers the payload bytes it moved.
    ///
    /// # Errors
    /// As [`Worker::step`].
    fn step(&mut self) -> Result<u64>;
}

/// The accounts at the start of a window.
struct Accounts {
    client: Cpu,
    servers: Cpu,
    busy: Option<f64>,
    started: Started,
}

impl Accounts {
    fn open(server_pids: &[u32]) -> Self {
        let (servers, busy) = (Cpu::of(server_pids), machine_busy());
        Self {
            client: Cpu::own(),
            servers,
            busy,
            started: Started::now(),
        }
    }

    /// Everything but the operations themselves: those arrive with [`count`].
    fn close(self, server_pids: &[u32]) -> Sample {
        let wall_s = self.started.seconds();
        let client_cpu_s = Cpu::own().seconds_since(&self.client);
        let server_cpu_s = Cpu::of(server_pids).seconds_since(&self.servers);
        let foreign_cores = self.busy.zip(machine_busy()).map(|(before, after)| {
            ((after - before - client_cpu_s - server_cpu_s) / wall_s).max(0.0)
        });
        Sample {
            wall_s,
            client_cpu_s,
            server_cpu_s,
            foreign_cores,
            ..Sample::default()
        }
    }
}

/// Adds what the workers did to a closed account.
fn count(mut sample: Sample, laps: Vec<Lap>) -> Sample {
    sample.ops = laps.iter().map(|l| l.nanos.len() as u64).sum();
    sample.bytes = laps.iter().map(|l| l.bytes).sum();
    let latency = latency_us(laps.into_iter().flat_map(|l| l.nanos).collect());
    (sample.p50_us, sample.p99_us) = latency.unzip();
    sample
}

/// What one worker did in one window.
#[derive(Default)]
struct Lap {
    nanos: Vec<u64>,
    bytes: u64,
}

async fn lap<W: Worker>(mut worker: W, length: Duration) -> Result<(W, Lap)> {
    let (begun, mut lap) = (Started::now(), Lap::default());
    while begun.elapsed() < length {
        let op = Started::now();
        lap.bytes += worker.step().await?;
        lap.nanos.push(op.nanos());
    }
    Ok((worker, lap))
}

async fn laps<W: Worker>(workers: Vec<W>, length: Duration) -> Result<(Vec<W>, Vec<Lap>)> {
    let tasks: Vec<_> = workers
        .into_iter()
        .map(|w| tokio::spawn(lap(w, length)))
        .collect();
    let (mut workers, mut laps) = (Vec::new(), Vec::new());
    let mut failed = None;
    for task in tasks {
        match task.await.context("a worker panicked")? {
            Ok((worker, lap)) => {
                workers.push(worker);
                laps.push(lap);
            }
            Err(error) => failed = failed.or(Some(error)), // wait for the others all the same
        }
    }
    match failed {
        Some(error) => Err(error),
        None => Ok((workers, laps)),
    }
}

/// Runs `workers` as tasks of the current runtime and hands them back with what was measured.
///
/// # Errors
/// The first worker's; the workers are gone then, and with them their connections.
pub async fn drive<W: Worker>(
    workers: Vec<W>,
    window: Window,
    server_pids: &[u32],
) -> Result<(Vec<W>, Sample)> {
    let (workers, _) = laps(workers, window.warm).await?;
    let accounts = Accounts::open(server_pids);
    let (workers, laps) = laps(workers, window.measure).await?;
    Ok((workers, count(accounts.close(server_pids), laps)))
}

/// Runs each of `workers` on a thread of its own.
///
/// # Errors
/// The first worker's.
pub fn drive_blocking<W: BlockingWorker>(
    workers: &mut [W],
    window: Window,
    server_pids: &[u32],
) -> Result<Sample> {
    // Threads live from before the first account to after the second, so that none takes its CPU time with it.
    let (warmed, go) = (
        Barrier::new(workers.len() + 1),
        Barrier::new(workers.len() + 1),
    );
    let (done, over) = (
        Barrier::new(workers.len() + 1),
        Barrier::new(workers.len() + 1),
    );
    let work = |worker: &mut W, length: Duration| -> Result<Lap> {
        let (begun, mut lap) = (Started::now(), Lap::default());
        while begun.elapsed() < length {
            let op = Started::now();
            lap.bytes += worker.step()?;
            lap.nanos.push(op.nanos());
        }
        Ok(lap)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = workers
            .iter_mut()
            .map(|worker| {
                let (warmed, go, done, over) = (&warmed, &go, &done, &over);
                scope.spawn(move || {
                    let warm = work(worker, window.warm);
                    warmed.wait();
                    go.wait();
                    let lap = warm.and_then(|_| work(worker, window.measure));
                    done.wait();
                    over.wait();
                    lap
                })
            })
            .collect();
        warmed.wait();
        let accounts = Accounts::open(server_pids);
        go.wait();
        done.wait();
        let sample = accounts.close(server_pids);
        over.wait();
        let mut laps = Vec::new();
        for thread in threads {
            laps.push(
                thread
                    .join()
                    .map_err(|_| anyhow::anyhow!("a worker panicked"))??,
            );
        }
        Ok(count(sample, laps))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Spin;
    impl Worker for Spin {
        async fn step(&mut self) -> Result<u64> {
            tokio::task::yield_now().await;
            Ok(1 << 20)
        }
    }
    impl BlockingWorker for Spin {
        fn step(&mut self) -> Result<u64> {
            std::thread::yield_now();
            Ok(1 << 20)
        }
    }
    struct Broken;
    impl Worker for Broken {
        async fn step(&mut self) -> Result<u64> {
            anyhow::bail!("miss")
        }
    }

    const WINDOW: Window = Window {
        warm: Duration::from_millis(2),
        measure: Duration::from_millis(20),
    };

    fn plausible(sample: &Sample) {
        assert!(sample.ops > 0 && sample.bytes == sample.ops << 20);
        assert!(sample.wall_s >= 0.02 && sample.p99_us >= sample.p50_us);
        assert!(sample.gib_s().is_some() && sample.cpu_s_per_gib().is_some());
    }

    #[tokio::test]
    async fn every_worker_comes_back_and_its_work_counts() {
        let (workers, sample) = drive(vec![Spin, Spin, Spin], WINDOW, &[])
            .await
            .expect("no error");
        assert_eq!(workers.len(), 3);
        plausible(&sample);
    }

    #[test]
    fn threads_count_like_tasks() {
        plausible(&drive_blocking(&mut [Spin, Spin], WINDOW, &[]).expect("no error"));
    }

    #[tokio::test]
    async fn a_failing_operation_fails_the_cell() {
        assert!(drive(vec![Broken], WINDOW, &[]).await.is_err());
    }
}
