//! Fifty nodes of real gossip on a simulated network: bounds, not histories, for gossip draws its own lots.
//!
//! ```text
//! turmoil host i:  chitchat ─ sealed datagrams ─ turmoil's UDP      time is the simulation's
//! test:            step, look at every view, step
//! ```
//!
//! Latency 1 to 20 ms; 250 ms where a slow network is the point.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use kvproto::{Member, MemberId, MemberState, View};
use kvserver::{
    clock::{Clock, Tick},
    cluster::{
        Cluster, Members, Standing, Times,
        gossip::{Gossip, GossipSettings},
        wire::{Datagrams, GossipKey},
    },
};
use parking_lot::Mutex;
use turmoil::{Builder, Sim, net::UdpSocket};

const NODES: usize = 50;
const PORT: u16 = 7070;

/// From a death to everybody's knowledge of it.
const NOTICED: Duration = Duration::from_secs(3);
/// From that, grace included, to equal views.
const AGREED: Duration = Duration::from_secs(2);
/// Short of AGREED, so that what is measured is gossip.
const GRACE: Duration = Duration::from_millis(500);

/// The simulation's time inside of a host, and chance of its own.
struct HostClock {
    start: tokio::time::Instant,
    random: AtomicU64,
}

impl Clock for HostClock {
    fn now(&self) -> Tick {
        Tick(self.start.elapsed())
    }

    fn unix_ms(&self) -> u64 {
        1_700_000_000_000
    }

    #[expect(clippy::disallowed_methods, reason = "this is a clock")]
    fn sleep(&self, wait: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(wait))
    }

    fn random_u64(&self) -> u64 {
        self.random
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed)
    }
}

struct Network(UdpSocket);

impl Datagrams for Network {
    fn send<'a>(&'a self, bytes: &'a [u8], to: SocketAddr) -> BoxFuture<'a, std::io::Result<()>> {
        Box::pin(async move { self.0.send_to(bytes, to).await.map(drop) })
    }

    fn receive<'a>(
        &'a self,
        into: &'a mut [u8],
    ) -> BoxFuture<'a, std::io::Result<(usize, SocketAddr)>> {
        Box::pin(self.0.recv_from(into))
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

fn ip(number: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(
        10,
        0,
        0,
        u8::try_from(number + 1).expect("few nodes"),
    ))
}

fn name(number: usize) -> MemberId {
    MemberId(format!("node-{number:02}"))
}

type Views = Arc<Mutex<Vec<Option<Arc<Cluster>>>>>;

/// One node's life, as often as its host is started.
async fn live(number: usize, life: Arc<AtomicU64>, views: Views) -> turmoil::Result {
    let generation = life.fetch_add(1, Ordering::Relaxed) + 1;
    let clock: Arc<dyn Clock> = Arc::new(HostClock {
        start: tokio::time::Instant::now(),
        random: AtomicU64::new(generation * 1000 + number as u64),
    });
    let times = Times {
        suspect_grace: GRACE,
        motion_window: Duration::from_secs(600),
        join_ramp: Duration::ZERO,
    };
    let address = SocketAddr::from((ip(number), PORT));
    let me = Member {
        id: name(number),
        generation,
        version: 1,
        weight: 1 + number as u32 % 2,
        zone: format!("zone-{}", number % 5),
        state: MemberState::Active,
        address: format!("http://{address}"),
    };
    let members = Members::new(times, me, &View::default(), clock.now());
    let cluster = Cluster::new(members, Arc::clone(&clock));
    views.lock()[number] = Some(Arc::clone(&cluster));
    let settings = GossipSettings {
        key: GossipKey::new(b"the secret of fifty nodes, 32 bytes"),
        advertised: address,
        seeds: vec![
            SocketAddr::from((ip(0), PORT)).to_string(),
            SocketAddr::from((ip(1), PORT)).to_string(),
        ],
    };
    let socket = UdpSocket::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), PORT)).await?;
    let _gossip = Gossip::start(cluster, settings, Arc::new(Network(socket)), clock).await?;
    std::future::pending::<()>().await;
    Ok(())
}

struct Fifty<'a> {
    sim: Sim<'a>,
    views: Views,
}

impl Fifty<'_> {
    fn start(seed: u64) -> Self {
        let mut sim = Builder::new()
            .tick_duration(Duration::from_millis(20))
            .simulation_duration(Duration::from_secs(600))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(20))
            .fail_rate(0.0)
            .udp_capacity(4096)
            .rng_seed(seed)
            .build();
        let views: Views = Arc::new(Mutex::new(vec![None; NODES]));
        for number in 0..NODES {
            let (life, views) = (Arc::new(AtomicU64::new(0)), Arc::clone(&views));
            sim.host(ip(number), move || {
                live(number, Arc::clone(&life), Arc::clone(&views))
            });
        }
        Self { sim, views }
    }

    /// Steps until it is so. Answers how much simulated time that took.
    fn until(
        &mut self,
        what: &str,
        most: Duration,
        is_so: impl Fn(&[Arc<Cluster>]) -> bool,
    ) -> Duration {
        let began = self.sim.elapsed();
        loop {
            let views: Vec<_> = self.views.lock().iter().flatten().cloned().collect();
            let took = self.sim.elapsed().saturating_sub(began);
            if views.len() + 1 >= NODES && is_so(&views) {
                println!("{what}: {took:?}");
                return took;
            }
            assert!(took <= most, "{what}: not within {most:?}");
            self.sim.step().expect("no host fails");
        }
    }

    /// Lets time pass.
    fn pass(&mut self, time: Duration) {
        let until = self.sim.elapsed() + time;
        while self.sim.elapsed() < until {
            self.sim.step().expect("no host fails");
        }
    }
}

fn pairs(left: &[IpAddr], right: &[IpAddr]) -> Vec<(IpAddr, IpAddr)> {
    let pair = |a: &IpAddr| right.iter().map(|b| (*a, *b)).collect::<Vec<_>>();
    left.iter().flat_map(pair).collect()
}

fn agree(views: &[Arc<Cluster>], members: usize) -> bool {
    let digest = views[0].digest();
    views
        .iter()
        .all(|view| view.digest() == digest && view.roster().placement.len() == members)
}

#[test]
fn a_death_is_known_to_all_in_time_and_views_agree_after_it_and_after_a_partition() {
    let mut fifty = Fifty::start(7);
    let all = Duration::from_secs(30);
    fifty.until("fifty know each other", all, |views| {
        views.len() == NODES && agree(views, NODES)
    });
    fifty.pass(Duration::from_secs(5));
    let before = fifty.views.lock()[0].as_ref().expect("it lives").digest();

    // One dies.
    let dead = 17;
    fifty.sim.crash(ip(dead));
    fifty.views.lock()[dead] = None;
    let id = name(dead);
    fifty.until("a death is known to all", NOTICED, |views| {
        views
            .iter()
            .all(|view| view.standing(&id) != Standing::Well)
    });
    fifty.until("views are equal after it", AGREED, |views| {
        agree(views, NODES - 1)
    });
    fifty.pass(Duration::from_secs(2));
    let nobody_else = |views: &[Arc<Cluster>]| views.iter().all(|view| view.suspects() == 0);
    fifty.until(
        "nobody else is suspect",
        Duration::from_secs(1),
        nobody_else,
    );

    // It comes back, as another life with an old name.
    fifty.sim.bounce(ip(dead));
    fifty.until(
        "it is back in every view",
        Duration::from_secs(5),
        |views| views.len() == NODES && agree(views, NODES),
    );
    assert_eq!(
        fifty.views.lock()[0].as_ref().expect("it lives").digest(),
        before,
        "and has its old place"
    );

    // The network falls in two.
    let (left, right): (Vec<IpAddr>, Vec<IpAddr>) = (0..NODES)
        .map(ip)
        .partition(|address| *address <= ip(NODES / 2 - 1));
    for (a, b) in pairs(&left, &right) {
        fifty.sim.partition(a, b);
    }
    let is_left = |view: &Arc<Cluster>| *view.me() < name(NODES / 2);
    fifty.until("each half misses the other", NOTICED, |views| {
        views.iter().all(|view| {
            let others = (0..NODES)
                .map(name)
                .filter(|other| (*other < name(NODES / 2)) != is_left(view));
            others
                .into_iter()
                .all(|other| view.standing(&other) != Standing::Well)
        })
    });
    fifty.until("each half agrees", AGREED, |views| {
        let (left, right): (Vec<_>, Vec<_>) = views.iter().cloned().partition(|view| is_left(view));
        agree(&left, NODES / 2) && agree(&right, NODES - NODES / 2)
    });
    fifty.pass(Duration::from_secs(20));

    // And heals.
    for (a, b) in pairs(&left, &right) {
        fifty.sim.repair(a, b);
    }
    fifty.until(
        "after the partition all views are equal",
        NOTICED + AGREED,
        |views| agree(views, NODES),
    );
    assert_eq!(
        fifty.views.lock()[0].as_ref().expect("it lives").digest(),
        before,
        "nobody lost its place"
    );
    fifty.until("and nobody is suspect", NOTICED, nobody_else);
}

#[test]
fn a_slow_network_makes_nobody_suspect() {
    let mut fifty = Fifty::start(11);
    let all = Duration::from_secs(30);
    fifty.until("fifty know each other", all, |views| {
        views.len() == NODES && agree(views, NODES)
    });
    fifty
        .sim
        .set_max_message_latency(Duration::from_millis(250));
    for _ in 0..50 {
        fifty.pass(Duration::from_millis(200));
        let views: Vec<_> = fifty.views.lock().iter().flatten().cloned().collect();
        assert!(agree(&views, NODES));
        assert!(views.iter().all(|view| view.suspects() == 0));
    }
}
