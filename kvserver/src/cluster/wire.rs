//! Gossip as datagrams: sealed under a key of the cluster, in pieces where one is too small.
//!
//! ```text
//! datagram   tag 16 │ piece u8, pieces u8 │ number u64 │ bytes
//!            └ BLAKE3 of all that follows, keyed by the cluster's secret
//! message    the bytes of its pieces, in order: what chitchat says
//! ```
//!
//! Who does not know the secret can neither speak nor be heard, so nobody else on the network can declare a member
//! gone or send callers elsewhere; clusters whose nodes share no secret never mix. A datagram that is repeated by
//! somebody says what was said before, and gossip only ever takes what is newer.
//!
//! Bounds: [`MAX_PIECES`] pieces of [`MAX_PIECE_BYTES`], `MAX_PENDING` messages in pieces at once.
//! Errors: what does not fit is dropped and counted, as a datagram may be lost anyway.
//! Why pieces: chitchat fills datagrams to the last byte that UDP carries, and the tag needs sixteen.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use chitchat::{ChitchatMessage, Deserializable, Serializable, transport};
use futures_util::future::BoxFuture;

/// Largest payload of a datagram's bytes; with its head it is what UDP carries.
pub const MAX_PIECE_BYTES: usize = 65_507 - HEAD_BYTES;

/// Most pieces of one message.
pub const MAX_PIECES: usize = 4;

/// Messages in pieces that may wait for their rest; the oldest goes first.
const MAX_PENDING: usize = 16;

/// Failures to receive, one after the other, after which a socket is given up.
const MOST_FAILURES: usize = 64;

const TAG_BYTES: usize = 16;
const HEAD_BYTES: usize = TAG_BYTES + 2 + 8;

/// Datagrams of a network: UDP's, or a test's.
pub trait Datagrams: Send + Sync + 'static {
    /// Sends one.
    fn send<'a>(&'a self, bytes: &'a [u8], to: SocketAddr) -> BoxFuture<'a, io::Result<()>>;

    /// The next one's length, in `into` from its start, and where it came from. May be dropped while it waits.
    fn receive<'a>(&'a self, into: &'a mut [u8]) -> BoxFuture<'a, io::Result<(usize, SocketAddr)>>;

    /// Where they are received.
    ///
    /// # Errors
    /// When the network does not say.
    fn local_addr(&self) -> io::Result<SocketAddr>;
}

impl Datagrams for tokio::net::UdpSocket {
    fn send<'a>(&'a self, bytes: &'a [u8], to: SocketAddr) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move { self.send_to(bytes, to).await.map(drop) })
    }

    fn receive<'a>(&'a self, into: &'a mut [u8]) -> BoxFuture<'a, io::Result<(usize, SocketAddr)>> {
        Box::pin(self.recv_from(into))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Self::local_addr(self)
    }
}

/// What gossip has carried.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Bytes of datagrams sent.
    pub sent_bytes: AtomicU64,
    /// Bytes of datagrams taken.
    pub received_bytes: AtomicU64,
    /// Datagrams that were not this cluster's, or damaged.
    pub refused: AtomicU64,
}

impl Traffic {
    /// Bytes sent, bytes taken, datagrams refused.
    #[must_use]
    pub fn totals(&self) -> [u64; 3] {
        let counts = [&self.sent_bytes, &self.received_bytes, &self.refused];
        counts.map(|count| count.load(Ordering::Relaxed))
    }
}

/// The key of a cluster's gossip and the name by which its nodes tell each other from strangers.
#[derive(Clone)]
pub struct GossipKey {
    key: [u8; 32],
    /// Not secret.
    pub cluster_id: String,
}

impl GossipKey {
    /// The key of the cluster with this secret.
    #[must_use]
    pub fn new(secret: &[u8]) -> Self {
        let id = blake3::derive_key("terrace 2026 cluster id", secret);
        Self {
            key: blake3::derive_key("terrace 2026 gossip key", secret),
            cluster_id: id[..8].iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    fn tag(&self, bytes: &[u8]) -> [u8; TAG_BYTES] {
        let hash = blake3::keyed_hash(&self.key, bytes);
        *hash.as_bytes().first_chunk().expect("32 bytes")
    }

    /// The datagrams of a message; `None` when it is too long.
    #[must_use]
    pub fn seal(&self, number: u64, message: &[u8]) -> Option<Vec<Vec<u8>>> {
        let pieces = message.len().div_ceil(MAX_PIECE_BYTES).max(1);
        if pieces > MAX_PIECES {
            return None;
        }
        let seal = |piece: usize| {
            let from = piece * MAX_PIECE_BYTES;
            let bytes = &message[from..message.len().min(from + MAX_PIECE_BYTES)];
            let mut datagram = Vec::with_capacity(HEAD_BYTES + bytes.len());
            datagram.extend_from_slice(&[0; TAG_BYTES]);
            datagram.extend_from_slice(&[piece as u8, pieces as u8]);
            datagram.extend_from_slice(&number.to_le_bytes());
            datagram.extend_from_slice(bytes);
            let tag = self.tag(&datagram[TAG_BYTES..]);
            datagram[..TAG_BYTES].copy_from_slice(&tag);
            datagram
        };
        Some((0..pieces).map(seal).collect())
    }

    /// What a datagram holds; `None` when it is not sealed under this key.
    fn open<'a>(&self, datagram: &'a [u8]) -> Option<Piece<'a>> {
        let (tag, sealed) = datagram.split_first_chunk::<TAG_BYTES>()?;
        // Compared in constant time, as blake3's hashes are.
        let hash = blake3::keyed_hash(&self.key, sealed);
        let mut other = *hash.as_bytes();
        other[..TAG_BYTES].copy_from_slice(tag);
        if hash != blake3::Hash::from_bytes(other) {
            return None;
        }
        let (head, bytes) = sealed.split_first_chunk::<{ HEAD_BYTES - TAG_BYTES }>()?;
        let (piece, pieces) = (usize::from(head[0]), usize::from(head[1]));
        let number = u64::from_le_bytes(*head[2..].first_chunk()?);
        (piece < pieces && pieces <= MAX_PIECES).then_some(Piece {
            piece,
            pieces,
            number,
            bytes,
        })
    }
}

impl std::fmt::Debug for GossipKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("GossipKey").field(&self.cluster_id).finish()
    }
}

struct Piece<'a> {
    piece: usize,
    pieces: usize,
    number: u64,
    bytes: &'a [u8],
}

/// Messages some of whose pieces are here.
#[derive(Default)]
struct Pending(VecDeque<Partial>);

struct Partial {
    from: SocketAddr,
    number: u64,
    pieces: Vec<Option<Vec<u8>>>,
}

impl Pending {
    /// The message that is whole with this piece, if one is.
    fn take(&mut self, from: SocketAddr, piece: &Piece<'_>) -> Option<Vec<u8>> {
        if piece.pieces == 1 {
            return Some(piece.bytes.to_vec());
        }
        let known = |partial: &Partial| (partial.from, partial.number) == (from, piece.number);
        let at = match self.0.iter().position(known) {
            Some(at) => at,
            None => {
                if self.0.len() == MAX_PENDING {
                    self.0.pop_front();
                }
                self.0.push_back(Partial {
                    from,
                    number: piece.number,
                    pieces: vec![None; piece.pieces],
                });
                self.0.len() - 1
            }
        };
        let slot = self.0[at].pieces.get_mut(piece.piece)?;
        *slot = Some(piece.bytes.to_vec());
        if self.0[at].pieces.iter().any(Option::is_none) {
            return None;
        }
        let whole = self.0.remove(at)?;
        Some(whole.pieces.into_iter().flatten().flatten().collect())
    }
}

/// chitchat's way to the network.
pub(super) struct SealedTransport {
    pub(super) key: GossipKey,
    pub(super) datagrams: Arc<dyn Datagrams>,
    pub(super) traffic: Arc<Traffic>,
    /// Numbers messages from here on, so that two lives of a node are not confused.
    pub(super) first_number: u64,
}

#[async_trait::async_trait]
impl transport::Transport for SealedTransport {
    async fn open(&self, _: SocketAddr) -> anyhow::Result<Box<dyn transport::Socket>> {
        Ok(Box::new(SealedSocket {
            key: self.key.clone(),
            datagrams: Arc::clone(&self.datagrams),
            traffic: Arc::clone(&self.traffic),
            number: self.first_number,
            buffer: vec![0; HEAD_BYTES + MAX_PIECE_BYTES],
            pending: Pending::default(),
        }))
    }
}

struct SealedSocket {
    key: GossipKey,
    datagrams: Arc<dyn Datagrams>,
    traffic: Arc<Traffic>,
    number: u64,
    buffer: Vec<u8>,
    pending: Pending,
}

#[async_trait::async_trait]
impl transport::Socket for SealedSocket {
    async fn send(&mut self, to: SocketAddr, message: ChitchatMessage) -> anyhow::Result<()> {
        self.number = self.number.wrapping_add(1);
        let message = message.serialize_to_vec();
        let Some(datagrams) = self.key.seal(self.number, &message) else {
            tracing::warn!(bytes = message.len(), "gossip that is too long was dropped");
            return Ok(());
        };
        for datagram in datagrams {
            // Nobody there is no fault of the socket; who does not answer is noticed by its silence.
            if let Err(error) = self.datagrams.send(&datagram, to).await {
                tracing::trace!(%error, %to, "gossip was not sent");
            }
            self.traffic
                .sent_bytes
                .fetch_add(datagram.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn recv(&mut self) -> anyhow::Result<(SocketAddr, ChitchatMessage)> {
        let mut failures = 0;
        loop {
            let (length, from) = match self.datagrams.receive(&mut self.buffer).await {
                Ok(received) => received,
                // The kernel tells here of a datagram sent earlier to where nobody listens, or of a want of memory.
                Err(_) if failures < MOST_FAILURES => {
                    failures += 1;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let Some(piece) = self.key.open(&self.buffer[..length]) else {
                self.traffic.refused.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            self.traffic
                .received_bytes
                .fetch_add(length as u64, Ordering::Relaxed);
            let Some(message) = self.pending.take(from, &piece) else {
                continue;
            };
            match ChitchatMessage::deserialize(&mut &message[..]) {
                Ok(message) => return Ok((from, message)),
                Err(error) => {
                    tracing::debug!(%error, %from, "gossip of another version");
                    self.traffic.refused.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn a_message_of_any_length_comes_out_as_it_went_in() {
        let key = GossipKey::new(b"secret");
        for length in [
            0,
            1,
            MAX_PIECE_BYTES,
            MAX_PIECE_BYTES + 1,
            MAX_PIECES * MAX_PIECE_BYTES,
        ] {
            let message: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let mut datagrams = key.seal(7, &message).unwrap();
            datagrams.reverse();
            let mut pending = Pending::default();
            let mut out = datagrams
                .iter()
                .filter_map(|bytes| pending.take(from(1), &key.open(bytes).unwrap()));
            assert_eq!(out.next(), Some(message));
        }
        assert!(
            key.seal(7, &vec![0; MAX_PIECES * MAX_PIECE_BYTES + 1])
                .is_none()
        );
    }

    #[test]
    fn a_stranger_is_not_heard_and_a_changed_byte_is_noticed() {
        let key = GossipKey::new(b"secret");
        let stranger = GossipKey::new(b"another secret");
        assert_ne!(key.cluster_id, stranger.cluster_id);
        let mut datagram = key.seal(1, b"hello").unwrap().remove(0);
        assert!(stranger.open(&datagram).is_none());
        for at in 0..datagram.len() {
            datagram[at] ^= 1;
            assert!(key.open(&datagram).is_none(), "byte {at}");
            datagram[at] ^= 1;
        }
        assert!(key.open(&datagram).is_some());
        assert!(key.open(&datagram[..20]).is_none() && key.open(&[]).is_none());
    }

    #[test]
    fn pieces_that_never_become_whole_make_room_for_others() {
        let key = GossipKey::new(b"secret");
        let long = vec![0; MAX_PIECE_BYTES + 1];
        let mut pending = Pending::default();
        for number in 0..100 {
            let first = key.seal(number, &long).unwrap().remove(0);
            assert_eq!(pending.take(from(1), &key.open(&first).unwrap()), None);
        }
        assert_eq!(pending.0.len(), MAX_PENDING);
        let rest = key.seal(99, &long).unwrap().remove(1);
        // Another sender's piece of the same number is another message.
        assert_eq!(pending.take(from(2), &key.open(&rest).unwrap()), None);
        assert_eq!(pending.take(from(1), &key.open(&rest).unwrap()), Some(long));
    }
}
