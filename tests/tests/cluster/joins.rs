//! Real nodes over loopback sockets: joining, dying, coming back, and what is refused.

use std::time::{Duration, Instant};

use kvproto::{
    MemberId, MemberState,
    v1::{self, cluster_client::ClusterClient},
};
use kvserver::{
    Node,
    cluster::Standing,
    config::{Capacity, Config, HostPort, MIB},
};
use kvtests::{
    cluster::TestCluster,
    node::{Stock, small},
    patience::{eventually, nowhere},
};
use tempfile::TempDir;
use tonic::{Code, transport::Channel};

/// From a death to everybody's knowledge of it.
const NOTICED: Duration = Duration::from_secs(3);

async fn service(node: &Node) -> ClusterClient<Channel> {
    ClusterClient::connect(node.endpoint())
        .await
        .expect("it listens")
}

fn told(address: std::net::SocketAddr) -> Vec<HostPort> {
    vec![address.into()]
}

#[tokio::test]
async fn three_nodes_see_one_view_and_share_one_secret() {
    let cluster = TestCluster::start(3).await;
    let ids: Vec<_> = cluster
        .running()
        .map(|node| node.blocks().cluster_id())
        .collect();
    assert!(ids.iter().all(|id| *id == ids[0]) && !ids[0].is_empty());
    let roster = cluster.node(1).cluster().roster();
    assert_eq!(roster.placement.len(), 3);
    for number in 0..3 {
        let member = roster.view.get(&cluster.id(number)).unwrap();
        assert_eq!(member.address, cluster.node(number).endpoint());
        assert_eq!(member.state, MemberState::Active);
    }
    // The same namespace is the same namespace on every node, hashing key included.
    let mut keys = Vec::new();
    for node in cluster.running() {
        keys.push(Stock::open(&node.endpoint()).await.key);
    }
    assert!(keys.iter().all(|key| *key == keys[0]));
}

#[tokio::test]
async fn a_death_is_noticed_in_time_and_a_restart_has_the_old_name_and_place() {
    let mut cluster = TestCluster::start(3).await;
    let (id, digest) = (cluster.id(2), cluster.node(0).cluster().digest());
    let killed = now();
    cluster.kill(2);
    cluster.noticed(&id).await;
    let noticed = killed.elapsed();
    assert_eq!(
        cluster.node(0).cluster().digest(),
        digest,
        "it keeps its place"
    );
    cluster.restart(2).await;
    assert_eq!(cluster.id(2), id);
    eventually("it is heard again", || {
        (0..2).all(|n| cluster.node(n).cluster().standing(&id) == Standing::Well)
    })
    .await;
    cluster.agreed(3).await;
    assert_eq!(cluster.node(2).cluster().digest(), digest);
    println!("noticed after {noticed:?}");
    // A loaded machine may stop us all; on a quiet one the bound holds with room to spare.
    assert!(noticed < NOTICED * 3, "noticed after {noticed:?}");
}

#[tokio::test]
async fn who_stays_away_too_long_is_gone_and_lives_again_when_it_comes_back() {
    let mut cluster = TestCluster::start_with(3, |_, config| {
        config.suspect_grace = Duration::from_millis(500);
    })
    .await;
    let id = cluster.id(1);
    cluster.kill(1);
    cluster.agreed(2).await;
    let view = cluster.node(0).cluster().roster();
    assert_eq!(view.view.get(&id).unwrap().state, MemberState::Gone);
    cluster.restart(1).await;
    cluster.agreed(3).await;
    assert_eq!(cluster.id(1), id);
}

#[tokio::test]
async fn a_member_that_nobody_told_to_join_again_finds_the_others_by_its_kept_view() {
    let mut cluster =
        TestCluster::start_with(2, |_, config| config.join_wait = Duration::from_secs(5)).await;
    cluster.kill(1);
    let mut config = cluster.config(1);
    config.join = Vec::new();
    cluster.start_as(1, config).await;
    cluster.agreed(2).await;
}

#[tokio::test]
async fn a_newcomer_is_in_everybodys_view_while_it_ramps_up() {
    let mut cluster = TestCluster::start_with(1, |number, config| {
        config.weight = 8;
        if number > 0 {
            config.join_ramp = Duration::from_secs(2);
        }
    })
    .await;
    let new = cluster.add().await;
    let id = cluster.id(new);
    let first = cluster.node(0).cluster();
    eventually("it joins", || {
        let roster = first.roster();
        roster
            .view
            .get(&id)
            .is_some_and(|m| m.state == MemberState::Joining && m.weight < 8)
    })
    .await;
    assert!(
        cluster
            .node(new)
            .cluster()
            .roster()
            .is_young(cluster_now(cluster.node(new)))
    );
    cluster.agreed(2).await;
    assert_eq!(first.roster().view.get(&id).unwrap().weight, 8);
}

#[tokio::test]
async fn a_weight_and_a_drain_reach_every_view() {
    let cluster = TestCluster::start(3).await;
    let mut service = service(cluster.node(1)).await;
    let me = cluster.id(1);
    let wrong = v1::SetWeightRequest {
        node_id: cluster.id(0).0,
        weight: 5,
        ..v1::SetWeightRequest::default()
    };
    let refused = service.set_weight(wrong).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(
        refused.message().starts_with("node_id:"),
        "{}",
        refused.message()
    );
    let right = v1::SetWeightRequest {
        node_id: me.0.clone(),
        weight: 5,
        ..v1::SetWeightRequest::default()
    };
    let declared = service
        .set_weight(right)
        .await
        .unwrap()
        .into_inner()
        .member
        .unwrap();
    assert_eq!(declared.weight, 5);
    cluster.agreed(3).await;
    let seen = || {
        cluster
            .node(2)
            .cluster()
            .roster()
            .view
            .get(&me)
            .cloned()
            .unwrap()
    };
    eventually("its weight is seen", || seen().weight == 5).await;

    let drain = v1::DrainRequest {
        node_id: me.0.clone(),
        deadline_ms: 60_000,
        ..v1::DrainRequest::default()
    };
    let stream = service.drain(drain).await.unwrap();
    // It holds nothing, so it may have left before anybody looks.
    let is_seen = |number: usize| cluster.node(number).cluster().roster().placement.len() == 2;
    eventually("its drain is seen", || is_seen(0) && is_seen(2)).await;
    let last = stream.into_inner().message().await.unwrap().unwrap();
    assert_eq!(last.at_stake_bytes, 0);
    let resume = v1::DrainRequest {
        node_id: me.0.clone(),
        resume: true,
        ..v1::DrainRequest::default()
    };
    let answer = service
        .drain(resume)
        .await
        .unwrap()
        .into_inner()
        .message()
        .await
        .unwrap()
        .unwrap();
    assert_eq!(answer.phase(), v1::DrainPhase::Resumed);
    eventually("it takes runs again", || seen().state.takes_runs()).await;
}

#[tokio::test]
async fn a_caller_with_another_view_gets_the_members_with_any_answer_once() {
    let cluster = TestCluster::start(2).await;
    let mut stock = Stock::open(&cluster.node(0).endpoint()).await;
    let digest = cluster.node(0).cluster().digest();
    let mut ask = async |view_digest| {
        let context = Some(v1::RequestContext {
            view_digest,
            ..v1::RequestContext::default()
        });
        let asked = v1::RenewRequest {
            context,
            lease_id: 17,
            ttl_ms: 0,
        };
        stock
            .client
            .renew(asked)
            .await
            .unwrap()
            .into_inner()
            .context
            .unwrap()
    };
    let known = ask(digest.0).await;
    assert_eq!((known.view_digest, known.members.len()), (digest.0, 0));
    let other = ask(17).await;
    assert_eq!((other.view_digest, other.members.len()), (digest.0, 2));
    assert_eq!(ask(17).await.members.len(), 0, "it was told");
}

#[tokio::test]
async fn the_view_says_how_each_member_stands_and_explain_who_owns_a_run() {
    let mut cluster = TestCluster::start(3).await;
    let dead = cluster.id(2);
    cluster.kill(2);
    cluster.noticed(&dead).await;
    let mut service = service(cluster.node(0)).await;
    let view = service
        .view(v1::ViewRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(view.node_id, cluster.id(0).0);
    assert_eq!(view.cluster_id, cluster.node(0).blocks().cluster_id());
    let suspects: Vec<_> = view
        .members
        .iter()
        .filter(|seen| seen.standing() == v1::Standing::Suspect)
        .map(|seen| seen.member.as_ref().unwrap().id.clone())
        .collect();
    assert_eq!(suspects, [dead.0]);

    let run = kvproto::RunHash([7; 32]);
    let asked = v1::ExplainRequest {
        run_hash: run.0.to_vec().into(),
        replicas: 2,
        ..v1::ExplainRequest::default()
    };
    let claims = service.explain(asked).await.unwrap().into_inner().claimants;
    let roster = cluster.node(0).cluster().roster();
    let owners: Vec<_> = roster
        .owners(&run, 2)
        .iter()
        .map(|m| m.id.0.clone())
        .collect();
    let claimed: Vec<_> = claims
        .iter()
        .filter(|claim| claim.claim() == v1::Claim::Owner)
        .map(|claim| claim.node_id.clone())
        .collect();
    assert_eq!((claimed, claims.len()), (owners, 3));
}

#[tokio::test]
async fn a_dns_name_is_joined_by_the_addresses_behind_it() {
    let mut cluster = TestCluster::start(1).await;
    let first = cluster.node(0).grpc_addr();
    let named = |host: &str, port| HostPort {
        host: host.to_owned(),
        port,
    };
    let deserted = nowhere();
    // Alone, and among others of which nobody answers and nobody knows one.
    let lists = [
        vec![named("localhost", first.port())],
        vec![
            deserted.into(),
            named("no-such-host.invalid", first.port()),
            named("localhost", first.port()),
        ],
    ];
    for (members, list) in (2..).zip(lists) {
        cluster.seat();
        let mut config = cluster.config(members - 1);
        config.join = list;
        cluster.start_as(members - 1, config).await;
        cluster.agreed(members).await;
    }
    let told = |number: usize| cluster.node(number).blocks().cluster_id();
    assert!(told(1) == told(0) && told(2) == told(0));
}

#[tokio::test]
async fn who_never_was_a_member_and_reaches_nobody_says_whom_it_tried() {
    let dir = TempDir::new().unwrap();
    let deserted = nowhere();
    let config = Config {
        join: told(deserted),
        join_wait: Duration::from_millis(300),
        ..small(dir.path())
    };
    let error = Node::start(config)
        .await
        .err()
        .expect("nobody is there")
        .to_string();
    assert!(error.starts_with("join: nobody answered"), "{error}");
    assert!(error.contains(&deserted.to_string()), "{error}");
}

#[tokio::test]
async fn strangers_with_blocks_of_their_own_are_told_what_to_do() {
    let first = TestCluster::start(1).await;
    let dir = TempDir::new().unwrap();
    let stranger = Node::start(small(dir.path())).await.unwrap();
    Stock::open(&stranger.endpoint()).await;
    stranger.shutdown(Duration::from_secs(10)).await;
    let config = Config {
        join: told(first.node(0).grpc_addr()),
        ..small(dir.path())
    };
    let error = Node::start(config)
        .await
        .err()
        .expect("it has blocks")
        .to_string();
    assert!(
        error.starts_with("secret_file:") && error.contains("--data-dir"),
        "{error}"
    );
}

#[tokio::test]
async fn clusters_with_different_secrets_never_mix() {
    let (one, other) = (TestCluster::start(2).await, TestCluster::start(1).await);
    let stranger = other.node(0).grpc_addr();
    // Its address becomes known by an honest mistake; its gossip is not understood.
    let mistaken = kvproto::Member {
        id: MemberId::from("stranger"),
        generation: 1,
        version: 1,
        weight: 1,
        zone: String::new(),
        state: MemberState::Active,
        address: format!("http://{stranger}"),
    };
    one.node(0).cluster().merge([mistaken]);
    let id = MemberId::from("stranger");
    eventually("it is never heard", || {
        one.node(0).cluster().standing(&id) != Standing::Well
    })
    .await;
    assert_eq!(other.node(0).cluster().roster().view.members().len(), 1);
    assert_ne!(
        one.node(0).blocks().cluster_id(),
        other.node(0).blocks().cluster_id()
    );
}

#[tokio::test]
async fn nodes_with_a_token_let_in_only_who_shows_it() {
    let keys = TempDir::new().unwrap();
    let (right, wrong) = (keys.path().join("right"), keys.path().join("wrong"));
    std::fs::write(&right, "the-token-of-our-nodes\n").unwrap();
    std::fs::write(&wrong, "the-token-of-some-others\n").unwrap();
    let tokens = keys.path().join("tenants");
    std::fs::write(&tokens, "red 0123456789abcdef\n").unwrap();
    let (token, tenants) = (right.clone(), tokens.clone());
    let cluster = TestCluster::start_with(2, move |_, config| {
        config.peer_token_file = token.clone();
        config.tokens_file = tenants.clone();
    })
    .await;
    for (file, tenants) in [(wrong, tokens.clone()), (std::path::PathBuf::new(), tokens)] {
        let dir = TempDir::new().unwrap();
        let config = Config {
            join: told(cluster.node(0).grpc_addr()),
            peer_token_file: file,
            tokens_file: tenants,
            ..small(dir.path())
        };
        let error = Node::start(config)
            .await
            .err()
            .expect("it has no token")
            .to_string();
        assert!(error.contains("refused: authorization"), "{error}");
        assert!(!error.contains("the-token-of"), "{error}");
    }
    // A tenant may look, and may not change anything.
    let mut service = service(cluster.node(0)).await;
    let mut drain = tonic::Request::new(v1::DrainRequest {
        node_id: cluster.id(0).0,
        ..v1::DrainRequest::default()
    });
    let credential = "Bearer 0123456789abcdef".parse().unwrap();
    drain.metadata_mut().insert("authorization", credential);
    assert_eq!(
        service.drain(drain).await.err().unwrap().code(),
        Code::Unauthenticated
    );
}

#[tokio::test]
async fn a_name_that_somebody_alive_has_is_refused() {
    let cluster = TestCluster::start_with(2, |number, config| {
        config.node_id = format!("node-{number}")
    })
    .await;
    let dir = TempDir::new().unwrap();
    let own = nowhere();
    let config = Config {
        join: told(cluster.node(0).grpc_addr()),
        join_wait: Duration::from_millis(300),
        listen: own,
        node_id: "node-1".to_owned(),
        ..small(dir.path())
    };
    let error = Node::start(config)
        .await
        .err()
        .expect("the name is taken")
        .to_string();
    assert!(
        error.contains("node_id") && error.contains("alive"),
        "{error}"
    );
}

#[tokio::test]
async fn a_node_that_listens_everywhere_must_say_where_to_find_it_or_is_alone() {
    let dir = TempDir::new().unwrap();
    let everywhere = Config {
        listen: "0.0.0.0:0".parse().unwrap(),
        ..small(dir.path())
    };
    let joining = Config {
        join: told("127.0.0.1:7070".parse().unwrap()),
        ..everywhere.clone()
    };
    let error = joining.validate().unwrap_err().to_string();
    assert!(error.starts_with("advertise = \"auto\""), "{error}");
    let node = Node::start(everywhere).await.unwrap();
    assert!(node.cluster().alone().unwrap().contains("--advertise"));
    let mut service =
        ClusterClient::connect(format!("http://127.0.0.1:{}", node.grpc_addr().port()))
            .await
            .unwrap();
    let asked = v1::JoinRequest {
        node_id: "new".to_owned(),
        ..v1::JoinRequest::default()
    };
    let refused = service.join(asked).await.unwrap_err();
    assert!(refused.message().contains("alone"), "{}", refused.message());
}

#[tokio::test]
async fn the_weight_of_a_node_is_its_ram_unless_it_is_given() {
    let cluster = TestCluster::start_with(2, |number, config| match number {
        0 => config.ram_bytes = Capacity::Bytes(1100 * MIB),
        _ => config.weight = 7,
    })
    .await;
    let weight = |number: usize| cluster.node(number).cluster().declared().weight;
    assert_eq!((weight(0), weight(1)), (2, 7));
}

#[expect(clippy::disallowed_methods, reason = "a real node runs on real time")]
fn now() -> Instant {
    Instant::now()
}

/// The moment of the last change, which is surely young.
fn cluster_now(node: &Node) -> kvserver::clock::Tick {
    node.cluster().roster().changed
}
