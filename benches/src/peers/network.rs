//! A peer behind connections: one per operation in flight, kept over all rounds.

use anyhow::{Context, Result};

use super::{CHAIN_KEYS, CHAINS, LOOKUP_BYTES, values_of};
use crate::load::{Sample, Window, Worker, drive};
use crate::rounds::{Cell, Op, Peer, Pending, Transport};

/// What one worker does, again and again.
#[derive(Clone, Debug)]
pub struct Job {
    /// What.
    pub op: Op,
    /// Size of a value.
    pub bytes: u64,
    /// Keys of one operation.
    pub keys: u32,
    /// How many values of that size there are.
    pub values: u64,
    next: u64,
}

impl Job {
    /// The job of the `nth` worker of a cell. Workers start spread over the working set and walk through all of it, so that
    /// the server's memory is read cold.
    pub fn of(cell: &Cell, nth: usize, working_set_bytes: u64) -> Self {
        let values = values_of(working_set_bytes, cell.bytes);
        let steps = if cell.keys > 1 {
            u64::from(CHAINS)
        } else {
            values
        };
        let next = steps * nth as u64 / cell.concurrency as u64;
        Self {
            op: cell.op,
            bytes: cell.bytes,
            keys: cell.keys,
            values,
            next,
        }
    }

    /// The number of the next value; of the first value of the next chain when the operation has many keys.
    pub fn next_value(&mut self) -> u64 {
        let next = self.next;
        self.next += 1;
        if self.keys > 1 {
            next % u64::from(CHAINS) * u64::from(CHAIN_KEYS)
        } else {
            next % self.values
        }
    }

    /// Bytes that one operation moves.
    pub fn payload_bytes(&self) -> u64 {
        if self.keys > 1 { 0 } else { self.bytes }
    }
}

/// One connection's worth of work.
pub trait Connection: Send + Sized + 'static {
    /// What it connects to.
    type Target: Clone;

    /// Connects.
    ///
    /// # Errors
    /// Nobody answers.
    fn connect(target: &Self::Target) -> impl Future<Output = Result<Self>>;

    /// Does one operation on value `index` and answers the payload bytes moved.
    ///
    /// # Errors
    /// As [`Worker::step`].
    fn act(&mut self, job: &Job, index: u64) -> impl Future<Output = Result<u64>> + Send;
}

struct Busy<C> {
    connection: C,
    job: Job,
}

impl<C: Connection> Worker for Busy<C> {
    async fn step(&mut self) -> Result<u64> {
        let index = self.job.next_value();
        self.connection.act(&self.job, index).await
    }
}

/// A peer, one transport.
pub struct Network<C: Connection> {
    target: C::Target,
    working_set_bytes: u64,
    server_pids: Vec<u32>,
    idle: Vec<C>,
}

impl<C: Connection> Network<C> {
    /// A peer whose servers run already.
    pub fn new(target: C::Target, working_set_bytes: u64, server_pids: Vec<u32>) -> Self {
        Self {
            target,
            working_set_bytes,
            server_pids,
            idle: Vec::new(),
        }
    }

    /// Writes the working set of every size in `sizes`.
    ///
    /// # Errors
    /// A write failed.
    pub async fn fill(
        &mut self,
        peer: &'static str,
        transport: Transport,
        sizes: &[u64],
    ) -> Result<()> {
        let mut connection = C::connect(&self.target)
            .await
            .with_context(|| format!("connecting to {peer}"))?;
        for &bytes in sizes {
            let cell = Cell {
                peer,
                op: Op::Put,
                transport,
                bytes,
                concurrency: 1,
                keys: 1,
            };
            let job = Job::of(&cell, 0, self.working_set_bytes);
            for index in 0..job.values {
                connection
                    .act(&job, index)
                    .await
                    .with_context(|| format!("filling {peer} with values of {bytes} bytes"))?;
            }
        }
        self.idle.push(connection);
        Ok(())
    }
}

impl<C: Connection> Peer for Network<C> {
    fn run<'a>(&'a mut self, cell: &'a Cell, window: Window) -> Pending<'a, Result<Sample>> {
        Box::pin(async move {
            debug_assert!(cell.keys == 1 || cell.bytes == LOOKUP_BYTES);
            while self.idle.len() < cell.concurrency {
                self.idle.push(C::connect(&self.target).await?);
            }
            let connections = self.idle.drain(..cell.concurrency).enumerate();
            let workers = connections
                .map(|(nth, connection)| Busy {
                    connection,
                    job: Job::of(cell, nth, self.working_set_bytes),
                })
                .collect();
            let (workers, sample) = drive(workers, window, &self.server_pids).await?;
            self.idle.extend(workers.into_iter().map(|w| w.connection));
            Ok(sample)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_start_apart_and_walk_through_everything() {
        let cell = Cell {
            peer: "x",
            op: Op::Get,
            transport: Transport::Tcp,
            bytes: 1 << 20,
            concurrency: 8,
            keys: 1,
        };
        let mut job = Job::of(&cell, 4, 128 << 20);
        assert_eq!((job.next_value(), job.next_value()), (64, 65));
        let mut seen: Vec<u64> = (0..126).map(|_| job.next_value()).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 126);
        assert_eq!(job.next_value(), 64);
    }

    #[test]
    fn lookups_walk_from_chain_to_chain() {
        let cell = Cell {
            peer: "x",
            op: Op::Exists,
            transport: Transport::Tcp,
            bytes: LOOKUP_BYTES,
            concurrency: 1,
            keys: 128,
        };
        let mut job = Job::of(&cell, 0, 0);
        assert_eq!((job.next_value(), job.next_value()), (0, 512));
        assert_eq!(job.payload_bytes(), 0);
    }
}
