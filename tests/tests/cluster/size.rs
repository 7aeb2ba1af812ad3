//! What a member tells the others of itself: a few hundred bytes, however much it stores.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use kvproto::{Member, MemberId, MemberState, View, v1};
use kvserver::{
    Node,
    clock::{Clock, SystemClock},
    cluster::{
        Cluster, Load, Members, Times,
        gossip::{Gossip, GossipSettings},
        wire::{Datagrams, GossipKey},
    },
};
use kvtests::{
    circle::Circle,
    node::{Stock, filled},
    patience::eventually,
};
use tokio::net::UdpSocket;

/// All that a datagram of a member which has just been met may have: who it knows, and what it tells of itself.
const MOST_BYTES: usize = 512;

/// Beyond that a fuller node needs a few digits more for its load.
const DIGITS: usize = 32;

/// A socket that remembers the longest datagram.
struct Measuring {
    socket: UdpSocket,
    longest: AtomicUsize,
}

impl Datagrams for Measuring {
    fn send<'a>(&'a self, bytes: &'a [u8], to: SocketAddr) -> BoxFuture<'a, io::Result<()>> {
        Datagrams::send(&self.socket, bytes, to)
    }

    fn receive<'a>(&'a self, into: &'a mut [u8]) -> BoxFuture<'a, io::Result<(usize, SocketAddr)>> {
        Box::pin(async move {
            let (length, from) = self.socket.recv_from(into).await?;
            self.longest.fetch_max(length, Ordering::Relaxed);
            Ok((length, from))
        })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

/// Meets a node by gossip, as a member that knew nothing; the longest datagram until it knows all that the node tells.
async fn longest_of(node: &Node, secret: &[u8]) -> usize {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let me = Member {
        id: MemberId::from("listener"),
        generation: 1,
        version: 1,
        weight: 1,
        zone: String::new(),
        state: MemberState::Active,
        address: format!("http://{address}"),
    };
    let times = Times {
        suspect_grace: Duration::from_secs(600),
        motion_window: Duration::from_secs(600),
        join_ramp: Duration::ZERO,
    };
    let members = Members::new(times, me, &View::default(), clock.now());
    let cluster = Cluster::new(members, Arc::clone(&clock));
    let settings = GossipSettings {
        key: GossipKey::new(secret),
        advertised: address,
        seeds: vec![node.grpc_addr().to_string()],
    };
    let measuring = Arc::new(Measuring {
        socket,
        longest: AtomicUsize::new(0),
    });
    let datagrams = Arc::clone(&measuring) as Arc<dyn Datagrams>;
    let gossip = Gossip::start(Arc::clone(&cluster), settings, datagrams, clock).await;
    let _gossip = gossip.expect("it gossips");
    let id = node.cluster().me();
    eventually("all that it tells is known", || {
        let told = (cluster.load(id), cluster.boot(id));
        let knows = |load: Load| Some(load) == node.cluster().load(id);
        let is_member = cluster.roster().view.get(id).is_some();
        is_member && told.0.is_some_and(knows) && told.1 == Some(node.blocks().boot_id())
    })
    .await;
    measuring.longest.load(Ordering::Relaxed)
}

/// Thousands of blocks in several namespaces, under leases.
async fn fill(node: &Node) {
    let stock = Stock::open(&node.endpoint()).await;
    for space in 0..8 {
        let mut its = stock.clone();
        let spec = kvproto::Namespace::opaque(&format!("model {space}"), 16, 4);
        let asked = v1::OpenNamespaceRequest {
            spec: Some((&spec).into()),
            ..v1::OpenNamespaceRequest::default()
        };
        let opened = its.client.open_namespace(asked).await.unwrap().into_inner();
        its.namespace = kvproto::NamespaceId::from_slice(&opened.namespace_id).unwrap();
        for seed in 0..8 {
            let chain = its.chain(seed, 64);
            let blocks: Vec<Bytes> = (0..64).map(|i| filled(i, 100)).collect();
            its.put_as(&chain, &blocks, v1::Ack::Cached, v1::PutOutcome::Cached)
                .await;
            its.lookup(&chain, Some(60_000)).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_tells_is_tiny_and_does_not_grow_with_what_it_stores() {
    let circle = Circle::start_strangers(2, |_| {}).await;
    let secret = std::fs::read(circle.secret_file()).unwrap();
    let full = &circle.nodes[1].node;
    fill(full).await;
    assert_eq!(full.blocks().engine().stats().blocks, 4096);
    eventually("it tells how full it is", || {
        let load = full.cluster().load(full.cluster().me());
        load.is_some_and(|load| load.full > 200)
    })
    .await;
    let of_empty = longest_of(&circle.nodes[0].node, &secret).await;
    let of_full = longest_of(full, &secret).await;
    println!("empty {of_empty} bytes, with 4096 blocks {of_full}");
    assert!(of_empty <= MOST_BYTES, "{of_empty}");
    assert!(of_full <= of_empty + DIGITS, "{of_full}, empty {of_empty}");
    circle.stop().await;
}
