//! A node's way into its cluster: before it holds anything, and once it listens.
//!
//! ```text
//! enter   name and last view from disk ─► join ─► secret adopted          the node does not listen yet
//! begin   address declared ─► gossip on the same port number, over UDP ─► kept, announced
//! ```
//!
//! Errors: [`NodeError`]. A node that cannot be found by others (it listens everywhere and was told no address, or UDP
//! cannot be had) is alone, says so, and serves.

use std::{net::SocketAddr, sync::Arc};

use kvproto::{BootId, Member, MemberState};
use tokio::net::UdpSocket;

use super::NodeError;
use crate::{
    blocks::{Blocks, catch_up},
    clock::Clock,
    cluster::{
        Caller, Cluster, Joined, Joining, Kept, Load, Members, Membership, MembershipParts, Times,
        adopt,
        gossip::GossipSettings,
        resolve,
        wire::{Datagrams, GossipKey},
    },
    config::{Chosen, Config, GIB, HostPort},
};

/// Ports tried for one that is free over TCP and UDP.
const PORTS_TRIED: usize = 16;

/// What is known before the node holds anything.
pub(super) struct Entry {
    kept: Kept,
    caller: Caller,
    weight: u32,
    /// URL of who let this node in.
    welcomed_by: Option<String>,
}

/// A node that may choose its port takes one that is free for gossip too, and holds it.
pub(super) async fn choose_port(config: &mut Config) -> Option<UdpSocket> {
    if config.listen.port() != 0 {
        return None;
    }
    for _ in 0..PORTS_TRIED {
        let udp = UdpSocket::bind(config.listen).await.ok()?;
        let address = udp.local_addr().ok()?;
        if std::net::TcpListener::bind(address).is_ok() {
            config.listen = address;
            return Some(udp);
        }
    }
    None
}

/// Learns who this node is, and joins whom it was told to.
pub(super) async fn enter(
    config: &Config,
    chosen: &Chosen,
    peer_token: Option<&str>,
    clock: &dyn Clock,
) -> Result<Entry, NodeError> {
    let mut kept = Kept::open(
        &config.data_dir,
        &config.node_id,
        config.motion_window,
        clock,
    )?;
    let caller = Caller::new(peer_token);
    let mut welcomed_by = None;
    if !config.join.is_empty() {
        let own = own_addresses(config).await;
        let joining = Joining {
            addresses: &config.join,
            own: &own,
            id: &kept.id,
            was_member: kept.was_member(),
            wait: config.join_wait,
            caller: &caller,
            clock,
        };
        match joining.join().await? {
            Joined::Member(welcome) => {
                adopt(&config.data_dir, &config.secret_file, &welcome)?;
                welcome.members.into_iter().for_each(|member| {
                    kept.view.merge_one(member);
                });
                welcomed_by = Some(welcome.address);
            }
            Joined::First => tracing::info!("nobody else is there; this node begins the cluster"),
            Joined::Later => tracing::warn!(
                "nobody of the cluster answers; starting from the view that was kept"
            ),
        }
    }
    let weight = match config.weight {
        0 => u32::try_from(chosen.ram_bytes.div_ceil(GIB)).unwrap_or(u32::MAX),
        given => given,
    };
    Ok(Entry {
        kept,
        caller,
        weight,
        welcomed_by,
    })
}

/// Where this node will be reached, as far as that is known before it listens.
async fn own_addresses(config: &Config) -> Vec<SocketAddr> {
    if config.listen.port() == 0 {
        return Vec::new();
    }
    let advertised: Vec<HostPort> = config.advertised(config.listen).into_iter().collect();
    let (found, _) = resolve(&advertised).await;
    let mut own: Vec<SocketAddr> = found.into_iter().collect();
    if !own.contains(&config.listen) && !config.listen.ip().is_unspecified() {
        own.push(config.listen);
    }
    own
}

impl Entry {
    /// The cluster as it is known so far.
    pub(super) fn cluster(&self, config: &Config, clock: &Arc<dyn Clock>) -> Arc<Cluster> {
        let times = Times {
            suspect_grace: config.suspect_grace,
            motion_window: config.motion_window,
            join_ramp: config.join_ramp,
        };
        let address = config
            .advertised(config.listen)
            .map(|address| url(&address));
        let me = Member {
            id: self.kept.id.clone(),
            generation: self.kept.generation,
            version: 1,
            weight: self.weight,
            zone: config.zone.clone(),
            state: MemberState::Active,
            address: address.unwrap_or_default(),
        };
        let mut members = Members::new(times, me, &self.kept.view, clock.now());
        members.remember(&self.kept.before.view, clock.now());
        Cluster::new(members, Arc::clone(clock))
    }

    /// Nobody is served yet: what was invalidated while this node was away is forgotten before anybody can ask for it.
    pub(super) async fn catch_up(&self, blocks: &Blocks) {
        catch_up::at_start(blocks, &self.caller, &self.kept.view).await;
    }

    /// The node listens: others hear of it from now on.
    pub(super) async fn begin(
        self,
        config: &Config,
        held: Option<UdpSocket>,
        listening: SocketAddr,
        boot_id: BootId,
        blocks: &Arc<Blocks>,
        clock: &Arc<dyn Clock>,
    ) -> Membership {
        let cluster = Arc::clone(blocks.cluster());
        let gossip = match reached(config, held, listening).await {
            Ok((advertised, address, udp)) => {
                cluster.set_address(url(&advertised));
                let settings = GossipSettings {
                    key: GossipKey::new(blocks.secret()),
                    advertised: address,
                    seeds: self.seeds(config),
                };
                let datagrams: Arc<dyn Datagrams> = Arc::new(udp);
                Some((settings, datagrams))
            }
            Err(why) => {
                cluster.set_alone(why);
                None
            }
        };
        let mut known: Vec<String> = self.welcomed_by.iter().cloned().collect();
        let listed = config.join.iter().map(url);
        known.extend(listed.filter(|listed| self.welcomed_by.as_ref() != Some(listed)));
        let weak = Arc::downgrade(blocks);
        let following = catch_up::follow(weak.clone(), self.caller.clone(), Arc::clone(clock));
        let parts = MembershipParts {
            cluster,
            known,
            kept: self.kept,
            caller: self.caller,
            boot_id,
            load: Box::new(move || weak.upgrade().map_or_else(Load::default, |b| load(&b))),
            clock: Arc::clone(clock),
        };
        let mut membership = Membership::start(parts, gossip).await;
        membership.also(following);
        membership
    }

    /// Those who may know others: whom it was told, and whom it knew.
    fn seeds(&self, config: &Config) -> Vec<String> {
        let told = config.join.iter().map(ToString::to_string);
        let others = self.kept.view.members().iter();
        let others = others.filter(|m| m.id != self.kept.id && m.state != MemberState::Gone);
        let known = others.filter_map(|member| member.address.strip_prefix("http://"));
        told.chain(known.map(str::to_owned)).collect()
    }
}

/// Where others find this node, as a name, as an address, and the socket for it; or why they cannot.
async fn reached(
    config: &Config,
    held: Option<UdpSocket>,
    listening: SocketAddr,
) -> Result<(HostPort, SocketAddr, UdpSocket), String> {
    let advertised = config
        .advertised(listening)
        .ok_or("it listens on all addresses and was not told by which of them others reach it (--advertise)")?;
    let (found, unknown) = resolve(std::slice::from_ref(&advertised)).await;
    let same_family = found
        .iter()
        .find(|address| address.is_ipv4() == listening.is_ipv4());
    let Some(address) = same_family.or(found.first()).copied() else {
        return Err(format!("advertise: {}", unknown.join(", ")));
    };
    let udp = match held.filter(|udp| udp.local_addr().is_ok_and(|bound| bound == listening)) {
        Some(udp) => udp,
        None => UdpSocket::bind(listening)
            .await
            .map_err(|error| format!("cannot gossip on {listening} over UDP: {error}"))?,
    };
    Ok((advertised, address, udp))
}

fn url(address: &HostPort) -> String {
    format!("http://{address}")
}

fn load(blocks: &Blocks) -> Load {
    let engine = blocks.engine().stats();
    let used = engine.kv.used_bytes + engine.checkpoint.used_bytes;
    let full = used.saturating_mul(1000) / engine.capacity_bytes.max(1);
    let moves = blocks
        .motion()
        .map(|motion| motion.progress().borrow().clone());
    let moves = moves.unwrap_or_default();
    Load {
        calls: blocks.queue(),
        // In steps of a hundredth, so that a busy node is no news all the time.
        full: u32::try_from(full / 10 * 10).unwrap_or(1000),
        waiting_bytes: moves.at_stake_bytes(),
        moved_bytes: moves.moved_bytes,
    }
}
