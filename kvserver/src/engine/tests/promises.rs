//! Every promise at once: random steps against a model, and threads.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use kvproto::{Chain, Kind, LeaseId, Reason};

use super::super::{Grant, Published, Reserve, Target};
use super::{PAGE, SPACE, chain, fill, owner, world};
use crate::clock::{Clock, ManualClock};

/// Random steps against a model that knows only what the engine has promised.
#[test]
fn random_steps_keep_every_promise() {
    for seed in 0..6 {
        random_steps(seed);
    }
}

fn random_steps(seed: u64) {
    let world = world(24);
    let dice = ManualClock::new(seed);
    let roll = |bound: u64| dice.random_u64() % bound;
    let chains: Vec<Chain> = (0..8).map(|name| chain(name, 6)).collect();
    // What living leases cover: lease → (owner, chain, blocks, deadline in ms).
    let mut leases: BTreeMap<LeaseId, (u8, usize, u32, u64)> = BTreeMap::new();
    let mut writing: Vec<(usize, usize, Grant, bool)> = Vec::new();
    let mut invalidated: HashMap<(usize, usize), ()> = HashMap::new();
    let mut now = 0;
    for step in 0..3000 {
        let (c, i) = (roll(8) as usize, roll(6) as usize);
        match roll(12) {
            0..=3 => {
                if let Reserve::Granted(grant) = world.reserve(&chains[c], i, PAGE, Kind::Kv) {
                    writing.push((c, i, grant, false));
                }
            }
            4..=6 if !writing.is_empty() => {
                let (c, i, grant, outlawed) =
                    writing.swap_remove(roll(writing.len() as u64) as usize);
                let (sealed, ticket) = fill(grant);
                let published = world.engine.publish(sealed, ticket);
                let dropped = matches!(published, Published::Invalidated);
                assert!(
                    dropped || !outlawed,
                    "seed {seed} step {step}: {published:?}"
                );
                if !dropped {
                    invalidated.remove(&(c, i));
                }
            }
            7..=8 => {
                let who = roll(3) as u8;
                let answer = world.lease(&chains[c], who);
                assert!(
                    answer
                        .lease
                        .is_none_or(|lease| lease.blocks <= answer.present_blocks)
                );
                for i in 0..answer.present_blocks as usize {
                    assert!(
                        !invalidated.contains_key(&(c, i)),
                        "seed {seed} step {step}: came back"
                    );
                }
                if let Some(grant) = answer.lease {
                    leases.insert(grant.id, (who, c, grant.blocks, now + 1000));
                }
            }
            9 => {
                let hash = chains[c].hashes[i];
                let target = if roll(2) == 0 {
                    Target::Block(hash)
                } else {
                    Target::Prefix(hash)
                };
                world.engine.invalidate(SPACE, target);
                let gone = if matches!(target, Target::Block(_)) {
                    i..i + 1
                } else {
                    i..6
                };
                for i in gone.clone() {
                    invalidated.insert((c, i), ());
                }
                for write in writing
                    .iter_mut()
                    .filter(|w| w.0 == c && gone.contains(&w.1))
                {
                    write.3 = true;
                }
                // Those leases promise no more than what comes before.
                for lease in leases.values_mut().filter(|lease| lease.1 == c) {
                    lease.2 = lease.2.min(gone.start as u32);
                }
                // A prefix may take what only might hang below it; leases elsewhere hold their ancestors too.
            }
            10 => {
                now += 300;
                world.clock.advance(Duration::from_millis(300));
                world.engine.expire_leases(world.clock.now());
                leases.retain(|_, lease| lease.3 > now);
            }
            _ => {
                if let Some((id, lease)) = leases.pop_first() {
                    assert!(
                        world.engine.release(id, owner(lease.0)),
                        "seed {seed} step {step}"
                    );
                }
            }
        }
        for (id, (who, c, blocks, _)) in &leases {
            for i in 0..*blocks as usize {
                let got = world.bytes(&chains[*c], i, Some((*id, owner(*who))));
                assert_eq!(
                    got,
                    Ok(i as u8 ^ *c as u8),
                    "seed {seed} step {step}: chain {c} block {i}"
                );
            }
        }
    }
    drop(writing);
    world.assert_nothing_leaked();
}

#[test]
fn threads_at_once_leak_nothing_and_break_no_lease() {
    let world = world(64);
    std::thread::scope(|scope| {
        for who in 0..4_u8 {
            let world = &world;
            scope.spawn(move || {
                let dice = ManualClock::new(u64::from(who));
                for step in 0..800 {
                    let chain = chain((dice.random_u64() % 12) as u8, 10);
                    let answer = world.lease(&chain, who);
                    for i in answer.present_blocks as usize..chain.len() {
                        if let Reserve::Granted(grant) = world.reserve(&chain, i, PAGE, Kind::Kv) {
                            let (sealed, ticket) = fill(grant);
                            world.engine.publish(sealed, ticket);
                        }
                    }
                    if let Some(grant) = answer.lease {
                        for i in 0..grant.blocks as usize {
                            let got = world.bytes(&chain, i, Some((grant.id, owner(who))));
                            match got {
                                Ok(byte) => assert_eq!(byte, i as u8 ^ chain.hashes[0].0[31]),
                                Err(reason) => assert_eq!(reason, Reason::Invalidated),
                            }
                        }
                        assert!(world.engine.release(grant.id, owner(who)));
                    }
                    if step % 200 == 199 {
                        world
                            .engine
                            .invalidate(SPACE, Target::Prefix(chain.hashes[3]));
                    }
                }
            });
        }
    });
    world.assert_nothing_leaked();
}
