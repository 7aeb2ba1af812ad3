//! Whoever is hurt by a member says so, and the cluster looks at it at once. Nothing else can tell these nodes of a
//! death: they have no gossip.

use kvclient::{GetOutcome, LookupOptions};
use kvproto::{
    MemberId,
    v1::{self, cluster_client::ClusterClient},
};
use kvserver::cluster::Standing;
use kvtests::{
    circle::Circle,
    client::over_grpc,
    node::{RUN_BLOCKS, figure},
    patience::eventually,
};

/// Three nodes that know each other, the last of which has died unnoticed; and who that is.
async fn bereft() -> (Circle, MemberId) {
    let mut circle = Circle::start_deaf(3).await;
    circle.acquaint(0..3);
    let dead = circle.member(2).id;
    drop(circle.nodes.pop());
    (circle, dead)
}

fn stands(circle: &Circle, number: usize, id: &MemberId) -> Standing {
    circle.nodes[number].node.cluster().standing(id)
}

fn reports(circle: &Circle, number: usize) -> f64 {
    let name = "terrace_calls_total{code=\"ok\",method=\"report\"}";
    figure(&circle.nodes[number].node, name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_makes_a_dead_member_suspect_and_a_living_one_not() {
    let (circle, dead) = bereft().await;
    let living = circle.member(1).id;
    let service = ClusterClient::connect(circle.endpoint(0)).await;
    let mut service = service.expect("it listens");
    // One is looked at after the other, so the living one was before the dead one is suspect.
    for id in [&living, &dead] {
        assert_eq!(stands(&circle, 0, id), Standing::Well, "nobody has said so");
        let hurt = v1::ReportRequest {
            node_id: id.0.clone(),
            ..v1::ReportRequest::default()
        };
        service.report(hurt).await.expect("it is heard");
    }
    eventually("the dead one is suspect", || {
        stands(&circle, 0, &dead) != Standing::Well
    })
    .await;
    assert_eq!(stands(&circle, 0, &living), Standing::Well);
    assert_eq!(
        stands(&circle, 1, &dead),
        Standing::Well,
        "suspicion is local"
    );
    circle.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_hurt_reports_the_member_to_one_that_answers() {
    for call in ["lookup", "get"] {
        let (circle, dead) = bereft().await;
        let client = over_grpc(&circle.endpoint(0)).await;
        let spec = kvclient::Namespace::opaque("reports", 16, RUN_BLOCKS);
        let ns = client.open_namespace(&spec, false).await.expect("opened");
        // Blocks of all three.
        let chain = ns.chain(&(0..16 * 128).collect::<Vec<u32>>());
        let reported = || [reports(&circle, 0), reports(&circle, 1)];
        assert_eq!(reported(), [0.0, 0.0], "{call}");
        if call == "lookup" {
            let options = LookupOptions::default();
            client
                .lookup(&ns, &chain, &options)
                .await
                .expect("answered");
        } else {
            let got = client.get(&ns, &chain, None).await.expect("answered");
            let of_dead = |got: &&kvclient::Fetched| got.outcome == GetOutcome::Node;
            assert!(got.iter().filter(of_dead).count() > 0);
        }
        eventually("a member heard of it, and misses the dead one", || {
            (0..2).any(|number| {
                reports(&circle, number) > 0.0 && stands(&circle, number, &dead) != Standing::Well
            })
        })
        .await;
        circle.stop().await;
    }
}
