//! Values of a wire protocol spread over several servers by their number, as a client that routes by key would.
//!
//! ```text
//!   value ─mix─► server ─► its own connection of this worker ─► reply into the worker's one buffer
//! ```
//!
//! Beside one server alone it says what it costs this machine to have a process more to change to, with nothing of ours.

use anyhow::Result;

use super::network::{Connection, Job};
use super::socket::{Address, Socket};
use super::wire::Wire;

/// One connection to each of several servers.
pub struct Spread<W> {
    sockets: Vec<Socket<W>>,
    reply: Vec<u8>,
}

impl<W: Wire + Default> Connection for Spread<W> {
    type Target = Vec<Address>;

    async fn connect(servers: &Vec<Address>) -> Result<Self> {
        let mut sockets = Vec::with_capacity(servers.len());
        for server in servers {
            sockets.push(Socket::connect(server).await?);
        }
        Ok(Self {
            sockets,
            reply: Vec::new(),
        })
    }

    async fn act(&mut self, job: &Job, index: u64) -> Result<u64> {
        let server = server_of(index, self.sockets.len());
        let reply = &mut self.reply;
        self.sockets[server].act_into(reply, job, index).await
    }
}

/// Which of `count` servers has a value: workers walk through values in order, and must not walk round the servers.
fn server_of(index: u64, count: usize) -> usize {
    // The finish of SplitMix64 (Steele, Lea, Flood 2014), and the high half of a product.
    let mut z = index.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((u128::from(z ^ (z >> 31)) * count as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_server_has_its_share_and_no_walk_goes_round_them() {
        let mut counts = [0; 3];
        let mut repeats = 0;
        for index in 0..3000 {
            counts[server_of(index, 3)] += 1;
            repeats += u32::from(server_of(index, 3) == server_of(index + 1, 3));
        }
        assert!(counts.iter().all(|n| (900..1100).contains(n)), "{counts:?}");
        assert!((900..1100).contains(&repeats), "{repeats}");
        assert_eq!(server_of(u64::MAX, 1), 0);
    }
}
