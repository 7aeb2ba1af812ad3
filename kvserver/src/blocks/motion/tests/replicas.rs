//! Two owners over maps: a lost copy is made again, by reading and by moves.

use super::*;

#[tokio::test]
async fn a_lost_owner_is_replaced_by_the_next_and_every_run_has_two_again() {
    let town = Town::new(&["a", "b", "c"], 2);
    let chains: Vec<Chain> = (0..20).map(|seed| town.chain(seed)).collect();
    let owners = |chain: &Chain| -> Vec<MemberId> {
        let roster = town.node("b").cluster.roster();
        let owners = roster.owners(&chain.hashes[0].into(), 2);
        owners.iter().map(|owner| owner.id.clone()).collect()
    };
    for chain in &chains {
        owners(chain)
            .iter()
            .for_each(|id| town.put_at(chain, &id.0));
    }
    town.net.fault(&MemberId::from("a"), Fault::Dead);
    let mut gone = member("a");
    (gone.version, gone.state) = (9, MemberState::Gone);
    for id in ["b", "c"] {
        town.node(id).cluster.merge([gone.clone()]);
        town.node(id).motion.start();
    }
    town.pass(Duration::from_secs(1)).await;
    for chain in &chains {
        let owners = owners(chain);
        assert_eq!(owners.len(), 2);
        assert!(owners.iter().all(|id| town.has_all(&id.0, chain)));
    }
    // Nothing here is first to go: both are owners.
    assert!(town.shelf("b").going().is_empty() && town.shelf("c").going().is_empty());
}

#[tokio::test]
async fn an_owner_that_came_back_with_nothing_is_given_its_copies_again() {
    let mut town = Town::new(&["a", "b", "c"], 2);
    let chains: Vec<Chain> = (0..20).map(|seed| town.chain(seed)).collect();
    let owners = |town: &Town, chain: &Chain| -> Vec<MemberId> {
        let roster = town.node("a").cluster.roster();
        let owners = roster.owners(&chain.hashes[0].into(), 2);
        owners.iter().map(|owner| owner.id.clone()).collect()
    };
    for chain in &chains {
        for owner in owners(&town, chain) {
            town.put_at(chain, &owner.0);
        }
    }
    town.nodes.values().for_each(|node| node.motion.start());
    town.pass(Duration::from_secs(1)).await;
    assert_eq!(town.net.called(), [], "nothing has changed");

    // Its place is its own, and no change is young.
    town.build("b");
    town.node("b").cluster.merge(["a", "c"].map(member));
    for id in ["a", "c"] {
        let again = Member {
            generation: 2,
            ..member("b")
        };
        town.node(id).cluster.merge([again]);
    }
    town.pass(Duration::from_secs(1)).await;
    for chain in &chains {
        let owners = owners(&town, chain);
        assert!(owners.iter().all(|id| town.has_all(&id.0, chain)));
    }
    let is_to_b = town.net.called().iter().all(|call| call.peer.0 == "b");
    assert!(is_to_b, "nobody else is asked");
}
