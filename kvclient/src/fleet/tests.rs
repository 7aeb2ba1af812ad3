//! Who is asked for a run that several have.

use kvproto::{key::RunHash, v1};

use super::{Roster, choice::Choice};
use crate::{Client, LocalPath, clock::Tick};

/// A client that knows of three members and has asked none.
fn client() -> Client {
    let client = Client::builder("n0:1").local(LocalPath::Off);
    let client = client.connect_lazily().unwrap();
    let member = |number: u32| v1::Member {
        id: format!("n{number}"),
        generation: 1,
        version: 1,
        weight: 1,
        zone: String::new(),
        state: v1::MemberState::Active.into(),
        address: format!("http://n{number}:1"),
    };
    let told = v1::ResponseContext {
        members: (0..3).map(member).collect(),
        ..v1::ResponseContext::default()
    };
    let recipe = &client.fleet.recipe;
    recipe.views.heard(&told, &*recipe.clock);
    client
}

fn run(number: u8) -> RunHash {
    RunHash([number; 32])
}

fn fail(roster: &Roster, member: usize) {
    let inner = roster.node(member).unwrap();
    inner.pool.breaker.failure(Tick::default());
}

#[tokio::test]
async fn whoever_is_silent_is_asked_last_and_owns_what_it_owned() {
    let client = client();
    let roster = client.fleet.roster().unwrap();
    for number in 0..20 {
        let run = run(number);
        let owners = roster.owners(&run, 3);
        let reader = |replicas| Choice::new(&roster, replicas).reader(&run);
        let before = reader(3);
        assert_eq!(before, owners[0]);

        fail(&roster, owners[0]);
        assert_eq!(reader(3), owners[1]);
        assert_eq!(reader(1), owners[0], "nobody else has it");
        fail(&roster, owners[1]);
        assert_eq!(reader(3), owners[2]);
        assert_eq!(reader(2), owners[0], "the third has it not");
        fail(&roster, owners[2]);
        assert_eq!(reader(3), owners[0], "all are silent");

        assert_eq!(roster.owners(&run, 3), owners);
        for member in owners {
            roster.node(member).unwrap().pool.breaker.alive();
        }
        assert_eq!(reader(3), before);
    }
}

#[tokio::test]
async fn of_all_that_have_a_run_the_likeliest_is_one_that_is_not_silent() {
    let client = client();
    let roster = client.fleet.roster().unwrap();
    let likeliest = |members: &[usize]| roster.likeliest(members.iter().copied());
    assert_eq!(likeliest(&[2, 0, 1]), Some(2));
    fail(&roster, 2);
    assert_eq!(likeliest(&[2, 0, 1]), Some(0));
    assert_eq!(likeliest(&[2]), Some(2));
    assert_eq!(likeliest(&[]), None);
}
