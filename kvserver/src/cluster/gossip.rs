//! Gossip: what a node declares of itself goes to all others, and who falls silent is noticed.
//!
//! ```text
//! my keys   member        what I declare, as the wire's Member
//!           gone/<id>     a tombstone that I hold to be true, while it is young
//!           load          what I have to do
//!           boot          which life I live
//!                 │ chitchat: every GOSSIP_INTERVAL with three others, differences alone
//! their keys ─────┴─► merge          their heartbeats ─► silent for SILENT_AFTER ─► suspect
//! ```
//!
//! A node speaks for itself alone, but for tombstones: who is declared gone must hear of it, to answer, and everybody
//! else, to agree.
//!
//! Bounds: `MOST_TOMBSTONES` told at once. Units: durations. Errors: [`GossipError`] at the start; afterwards a lost
//! datagram is a lost datagram.
//! Why silence and not chitchat's own detector: that one scales its patience by the pace it has seen, so that a busy
//! machine or a large cluster would stretch what is promised here as a bound; silence is one number.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use chitchat::{Chitchat, ChitchatConfig, ChitchatHandle, ChitchatId, FailureDetectorConfig};
use kvproto::{BootId, Member, MemberId, MemberState, v1};
use prost::Message;
use tokio::task::JoinHandle;

use super::{
    Cluster, Load,
    wire::{Datagrams, GossipKey, SealedTransport},
};
use crate::clock::{Clock, Tick};

/// How often a node gossips.
pub const GOSSIP_INTERVAL: Duration = Duration::from_millis(200);

/// A member whose heart was not heard to beat for so long is suspect. News of a beat takes a handful of intervals
/// through a thousand nodes; with that, and [`LOOK_INTERVAL`], a death is known everywhere within 3 s.
pub const SILENT_AFTER: Duration = Duration::from_millis(1800);

/// How often what was heard is looked through.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// How long a tombstone is told of: long enough for everybody who gossips at all.
const TOMBSTONE_TOLD: Duration = Duration::from_secs(600);

/// Tombstones told of at once, newest first; the others' are told by others.
const MOST_TOMBSTONES: usize = 64;

/// How long chitchat remembers the dead. For half of it it goes on trying them, which is how a partition heals.
const DEAD_KEPT: Duration = Duration::from_secs(24 * 3600);

/// A deleted key is remembered for so long, so that nobody's old news brings it back.
const DELETED_KEPT: Duration = Duration::from_secs(1200);

/// A member that gossip does not know is spoken to once in so many looks.
const STRANGER_LOOKS: u64 = 10;

const MEMBER: &str = "member";
const LOAD: &str = "load";
const BOOT: &str = "boot";
const GONE: &str = "gone/";

/// Why a node cannot gossip.
#[derive(Debug, thiserror::Error)]
#[error("cannot gossip on {address} over UDP: {problem}")]
pub struct GossipError {
    /// Where.
    pub address: SocketAddr,
    /// Why.
    pub problem: String,
}

/// What gossip needs to begin.
pub struct GossipSettings {
    /// Of the cluster.
    pub key: GossipKey,
    /// Where others find this node's gossip.
    pub advertised: SocketAddr,
    /// HOST:PORT of some who may know others; DNS names are looked up again and again.
    pub seeds: Vec<String>,
}

/// The running gossip. Dropping it ends it.
pub struct Gossip {
    following: JoinHandle<()>,
}

impl Gossip {
    /// Begins to gossip over `datagrams`.
    ///
    /// # Errors
    /// When the network cannot be used.
    pub async fn start(
        cluster: Arc<Cluster>,
        settings: GossipSettings,
        datagrams: Arc<dyn Datagrams>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, GossipError> {
        let refuse = |problem: String| GossipError {
            address: settings.advertised,
            problem,
        };
        let listening = datagrams.local_addr().map_err(|e| refuse(e.to_string()))?;
        let declared = cluster.declared();
        let config = ChitchatConfig {
            chitchat_id: ChitchatId::new(
                declared.id.0.as_str(),
                declared.generation,
                settings.advertised,
            ),
            cluster_id: settings.key.cluster_id.clone(),
            gossip_interval: GOSSIP_INTERVAL,
            listen_addr: listening,
            seed_nodes: settings.seeds.clone(),
            // Only decides whom chitchat speaks to often.
            failure_detector_config: FailureDetectorConfig::new(
                8.0,
                100,
                SILENT_AFTER,
                GOSSIP_INTERVAL,
                DEAD_KEPT,
            ),
            marked_for_deletion_grace_period: DELETED_KEPT,
            catchup_callback: None,
            extra_liveness_predicate: None,
        };
        let transport = SealedTransport {
            key: settings.key,
            datagrams,
            traffic: Arc::clone(cluster.traffic()),
            first_number: clock.random_u64(),
        };
        let mut keys = vec![(MEMBER.to_owned(), to_text(&declared))];
        if let Some(boot) = cluster.boot(cluster.me()) {
            keys.push((BOOT.to_owned(), format!("{:x}", boot.0)));
        }
        let handle = chitchat::spawn_chitchat(config, keys, &transport)
            .await
            .map_err(|error| refuse(error.to_string()))?;
        let follower = Follower {
            told: declared,
            told_load: None,
            tombstones: BTreeMap::new(),
            heard: BTreeMap::new(),
            looks: 0,
            cluster,
            clock,
        };
        Ok(Self {
            following: tokio::spawn(follower.follow(handle)),
        })
    }
}

impl Drop for Gossip {
    fn drop(&mut self) {
        self.following.abort();
    }
}

/// Whoever goes between gossip and the cluster.
struct Follower {
    cluster: Arc<Cluster>,
    clock: Arc<dyn Clock>,
    told: Member,
    told_load: Option<Load>,
    /// Tombstones told of, and since when.
    tombstones: BTreeMap<MemberId, (Member, Tick)>,
    heard: BTreeMap<MemberId, Heard>,
    looks: u64,
}

/// A member's last sign of life.
#[derive(Clone, Copy)]
struct Heard {
    generation: u64,
    heartbeat: u64,
    /// Of the version of its keys that was read last.
    version: u64,
    at: Tick,
}

impl Follower {
    /// Ends only by being dropped, or when gossip itself has ended; chitchat's task ends with its handle.
    async fn follow(mut self, handle: ChitchatHandle) {
        let mut changes = self.cluster.changes();
        let ended = handle.termination_watcher();
        tokio::pin!(ended);
        loop {
            tokio::select! {
                () = self.clock.sleep(LOOK_INTERVAL) => {}
                // What this node declares goes out with the next round, and not with the one after.
                _ = changes.changed() => {}
                over = &mut ended => {
                    let problem = over.err().map_or_else(String::new, |error| error.to_string());
                    tracing::error!(problem, "gossip has ended; this node hears of no change any more");
                    return;
                }
            }
            changes.mark_unchanged();
            let stranger = {
                let chitchat = handle.chitchat();
                let mut chitchat = chitchat.lock().await;
                self.look(&mut chitchat)
            };
            if let Some(address) = stranger {
                let _ = handle.gossip(address); // it ends only with the task, which is seen above
            }
        }
    }

    /// Takes what is new, tells what is new. Answers whom to speak to because gossip does not know it.
    fn look(&mut self, chitchat: &mut Chitchat) -> Option<SocketAddr> {
        let now = self.clock.now();
        self.looks += 1;
        let (news, loads) = self.listen(chitchat, now);
        if !news.is_empty() {
            self.cluster.merge(news);
        }
        for (id, load) in loads {
            self.cluster.hear_load(&id, load);
        }
        self.judge(now);
        self.cluster.tick();
        self.tell(chitchat, now);
        match self.looks.is_multiple_of(STRANGER_LOOKS) {
            true => self.stranger(chitchat),
            false => None,
        }
    }

    /// Reads what has changed since the last look.
    fn listen(&mut self, chitchat: &Chitchat, now: Tick) -> (Vec<Member>, Vec<(MemberId, Load)>) {
        let (mut news, mut loads) = (Vec::new(), Vec::new());
        for (who, state) in chitchat.node_states() {
            let id = MemberId::from(&*who.node_id);
            if id == *self.cluster.me() {
                continue;
            }
            let (heartbeat, version) = (state.heartbeat().into(), state.max_version());
            let known = self.heard.get(&id).copied();
            // An earlier life of it says nothing any more.
            if known.is_some_and(|known| who.generation_id < known.generation) {
                continue;
            }
            let same_life = known.filter(|known| known.generation == who.generation_id);
            let beats = same_life.is_none_or(|known| heartbeat > known.heartbeat);
            let at = match (beats, same_life) {
                (false, Some(known)) => known.at,
                _ => now,
            };
            let heard = Heard {
                generation: who.generation_id,
                heartbeat,
                version,
                at,
            };
            self.heard.insert(id.clone(), heard);
            if same_life.is_some_and(|known| known.version == version) {
                continue;
            }
            for (key, text) in state.key_values() {
                if key == MEMBER {
                    news.extend(from_text(text).filter(|member| member.id == id));
                } else if key == LOAD {
                    loads.extend(Load::from_text(text).map(|load| (id.clone(), load)));
                } else if key == BOOT {
                    if let Ok(boot) = u64::from_str_radix(text, 16) {
                        self.cluster.set_boot(id.clone(), BootId(boot));
                    }
                } else if key.starts_with(GONE) {
                    news.extend(from_text(text).filter(|m| m.state == MemberState::Gone));
                }
            }
        }
        (news, loads)
    }

    /// Who is silent, and who is heard again.
    fn judge(&mut self, now: Tick) {
        let roster = self.cluster.roster();
        for member in roster.present().filter(|m| m.id != *self.cluster.me()) {
            // One that is only known by hearsay has as long to be heard as one that fell silent.
            let heard = self.heard.entry(member.id.clone()).or_insert(Heard {
                generation: 0,
                heartbeat: 0,
                version: 0,
                at: now,
            });
            match now.since(heard.at) >= SILENT_AFTER {
                true => self.cluster.suspect(&member.id),
                false => self.cluster.hear(&member.id, heard.at),
            }
        }
    }

    fn tell(&mut self, chitchat: &mut Chitchat, now: Tick) {
        let roster = self.cluster.roster();
        let declared = self.cluster.declared();
        let mine = chitchat.self_node_state();
        if declared != self.told {
            mine.set(MEMBER, to_text(&declared));
            self.told = declared;
        }
        let load = self.cluster.load(self.cluster.me());
        if load != self.told_load {
            mine.set(LOAD, load.unwrap_or_default().to_text());
            self.told_load = load;
        }
        let is_gone = |member: &&Member| member.state == MemberState::Gone;
        for gone in roster.view.members().iter().filter(is_gone) {
            let known = self.tombstones.get(&gone.id);
            if known.is_none_or(|(told, _)| told != gone) {
                let is_old = known.is_none() && self.looks == 1;
                if !is_old {
                    mine.set(format!("{GONE}{}", gone.id), to_text(gone));
                }
                self.tombstones.insert(gone.id.clone(), (gone.clone(), now));
            }
        }
        let told = self.tombstones.len();
        let mut newest: Vec<Tick> = self.tombstones.values().map(|(_, since)| *since).collect();
        newest.sort_unstable();
        let oldest = newest[told.saturating_sub(MOST_TOMBSTONES)..]
            .first()
            .copied();
        self.tombstones.retain(|id, (gone, since)| {
            let is_told = roster.view.get(id) == Some(gone)
                && now.since(*since) < TOMBSTONE_TOLD
                && oldest.is_none_or(|oldest| *since >= oldest);
            let key = format!("{GONE}{id}");
            if !is_told && mine.get(&key).is_some() {
                mine.delete(&key);
            }
            // Remembered as long as it is one, so that it is not told anew.
            roster.view.get(id) == Some(gone)
        });
    }

    /// One present member that gossip has never heard of.
    fn stranger(&self, chitchat: &Chitchat) -> Option<SocketAddr> {
        let roster = self.cluster.roster();
        let known: Vec<&str> = chitchat
            .node_states()
            .keys()
            .map(|who| &*who.node_id)
            .collect();
        let strangers: Vec<&Member> = roster
            .present()
            .filter(|member| !known.contains(&member.id.0.as_str()))
            .collect();
        let at = self.looks / STRANGER_LOOKS;
        let count = strangers.len() as u64;
        let chosen = strangers.get(usize::try_from(at.checked_rem(count)?).ok()?)?;
        chosen.address.strip_prefix("http://")?.parse().ok()
    }
}

/// A member as the text of a key: its wire form in hex, so that what the wire learns gossip knows too.
fn to_text(member: &Member) -> String {
    let wire = v1::Member::from(member).encode_to_vec();
    wire.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_text(text: &str) -> Option<Member> {
    let digits = text.as_bytes();
    let pairs = digits.chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let wire: Vec<u8> = pairs.map(byte).collect::<Option<_>>()?;
    v1::Member::decode(&wire[..]).ok()?.try_into().ok()
}
