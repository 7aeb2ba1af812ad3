//! Reads in motion: a run that is missing here and may still lie with somebody else.
//!
//! ```text
//! lookup ─┐ missing, and owned here              candidates, in order, once each
//! get ────┴─► flight (namespace, run) ───────────► lookup + lease ─► get ─► keep, verified ─► release
//!    waits:     one, whoever asks                    miss, dead, late, lies: the next one
//!    a lookup until MotionConfig::wait, a get until its own time is up; the flight goes on without them
//! ```
//!
//! What is fetched is an ordinary block here; whoever waited looks again and finds it, or the miss that it was.
//! A flight that asks for fewer blocks of its run than somebody else wants is waited for and followed by another.
//! A lookup fetches its first missing run alone, then four, then sixteen: a prompt that is nowhere costs one question to
//! each candidate and, for a second, no more.
//! Units: blocks, durations. Errors: none. Bounds: `fetches` flights, [`MAX_STRETCHES`] of one lookup, a lease of
//! [`LEASE`] at one peer at a time.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::{
    FutureExt, StreamExt,
    future::{BoxFuture, Shared, join_all},
    stream,
};
use kvproto::{BlockKey, Chain, Kind, Part, Reason};
use tokio::sync::oneshot;

use super::{
    Kept, Motion,
    runs::{Stretch, keys, stretches},
};
use crate::{
    clock::Tick,
    engine::RunKey,
    peers::{Asked, Carried, Fetched, Peer, PeerError, Space},
};

/// Runs that one lookup fetches; the prefix ends there for now.
const MAX_STRETCHES: usize = 64;

/// How long a lease at a peer holds: longer than a flight.
const LEASE: Duration = Duration::from_secs(10);

/// How long a lease may take to be given back.
const RELEASE: Duration = Duration::from_secs(1);

/// How long a run that nobody had is not looked for again, unless by somebody who lacks another of its blocks …
const MISSED: Duration = Duration::from_secs(1);

/// … and how many such runs are remembered.
const MAX_MISSED: usize = 4096;

/// What a flight brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Brought {
    /// Blocks that came from a peer and are here now.
    pub blocks: BTreeSet<BlockKey>,
}

type Landed = Shared<BoxFuture<'static, Arc<Brought>>>;

/// A run that is being fetched.
pub(super) struct Flight {
    /// What it asks for.
    wants: Arc<Asked>,
    landed: Landed,
}

impl Flight {
    fn covers(&self, asked: &Asked) -> bool {
        let has =
            |key| keys(self.wants.space.id, &self.wants.chain, &self.wants.parts).any(|k| k == key);
        keys(asked.space.id, &asked.chain, &asked.parts).all(has)
    }
}

impl Motion {
    /// Fetches what a lookup misses of its prefix and this node is to have; ends when that is done, or when the lookup
    /// has waited long enough: what has come by then is here.
    pub fn bring_prefix(
        self: &Arc<Self>,
        space: &Arc<Space>,
        chain: &Chain,
        parts: &[Part],
        time_left: Duration,
    ) -> BoxFuture<'static, ()> {
        let missing = keys(space.id, chain, parts).position(|key| self.holdings.lacks(&key));
        let Some(missing) = missing else {
            return std::future::ready(()).boxed();
        };
        let first = missing / parts.len().max(1);
        let roster = self.cluster.roster();
        let mut wanted = stretches(chain, space.run_blocks(), first, MAX_STRETCHES);
        // The prefix ends at a run of somebody else's.
        let owned = wanted
            .iter()
            .take_while(|stretch| self.owns(&roster, &stretch.run, space.replicas))
            .count();
        wanted.truncate(owned);
        if wanted
            .first()
            .is_none_or(|first| self.was_missed(space, first))
        {
            return std::future::ready(()).boxed();
        }
        // Goes on when the lookup has waited long enough: the next one hits.
        let fetched = {
            let (me, space, parts) = (Arc::clone(self), Arc::clone(space), parts.to_vec());
            self.on_runtime(async move { me.fetch_prefix(space, wanted, parts).await })
        };
        let wait = self.config.wait.min(time_left / 2);
        let clock = Arc::clone(&self.clock);
        let waited = self.on_runtime(async move {
            let late = clock.sleep(wait);
            tokio::select! {
                biased;
                _ = fetched => {}
                () = late => {}
            }
        });
        waited.map(drop).boxed()
    }

    /// Fetches runs of one chain, a few at first and then more: where a run is nowhere, those behind it are of no use.
    async fn fetch_prefix(
        self: Arc<Self>,
        space: Arc<Space>,
        wanted: Vec<Stretch>,
        parts: Vec<Part>,
    ) {
        let mut wanted = wanted.into_iter();
        let mut window = 1;
        loop {
            let asked: Vec<Asked> = wanted
                .by_ref()
                .take(window)
                .map(|stretch| Asked {
                    space: Arc::clone(&space),
                    chain: stretch.chain,
                    parts: parts.clone(),
                })
                .collect();
            if asked.is_empty() || self.stopping.is_cancelled() {
                return;
            }
            let flights = asked.iter().map(|asked| self.bring(asked.clone()));
            join_all(flights).await;
            let lacks = |asked: &Asked| {
                keys(asked.space.id, &asked.chain, &asked.parts).any(|k| self.holdings.lacks(&k))
            };
            if asked.iter().any(lacks) {
                return;
            }
            window *= 4;
        }
    }

    /// Whether this very run was looked for and not found a moment ago: engines ask again and again.
    fn was_missed(&self, space: &Arc<Space>, stretch: &Stretch) -> bool {
        let key = RunKey {
            namespace: space.id,
            run: stretch.run,
        };
        let missed = self.missed.lock();
        let last = missed.get(&key);
        last.is_some_and(|(until, at)| {
            *until > self.clock.now() && Some(at) == stretch.chain.hashes.first()
        })
    }

    /// Fetches the rest of a run for a get whose block `chain` begins with is missing; ends when that is done, or at
    /// `until`. `None`: it is nobody's business here.
    pub fn bring_run(
        self: &Arc<Self>,
        space: &Arc<Space>,
        chain: &Chain,
        from: usize,
        parts: &[Part],
        until: Tick,
    ) -> Option<BoxFuture<'static, Arc<Brought>>> {
        let stretch = stretches(chain, space.run_blocks(), from, 1).pop()?;
        if !self.owns(&self.cluster.roster(), &stretch.run, space.replicas)
            || self.left(until).is_zero()
            || self.was_missed(space, &stretch)
        {
            return None;
        }
        let chain = stretch.chain;
        let flight = self.bring(Asked {
            space: Arc::clone(space),
            chain,
            parts: parts.to_vec(),
        });
        let me = Arc::clone(self);
        let waited = self.on_runtime(async move {
            let late = me.clock.sleep(me.left(until));
            tokio::select! {
                biased;
                brought = flight => brought,
                () = late => Arc::default(),
            }
        });
        Some(waited.map(Option::unwrap_or_default).boxed())
    }

    /// One run, by the flight there is or another one.
    fn bring(self: &Arc<Self>, asked: Asked) -> BoxFuture<'static, Arc<Brought>> {
        let asked = Arc::new(asked);
        let first = self.enter(&asked);
        let me = Arc::clone(self);
        async move {
            let (landed, covers) = first;
            let mut brought = landed.await;
            if !covers {
                let (landed, _) = me.enter(&asked);
                brought = landed.await;
            }
            brought
        }
        .boxed()
    }

    /// The flight of a run, begun if there is none; and whether it fetches all that is asked.
    fn enter(self: &Arc<Self>, asked: &Arc<Asked>) -> (Landed, bool) {
        let nothing = || std::future::ready(Arc::default()).boxed().shared();
        let key = RunKey {
            namespace: asked.space.id,
            run: asked.chain.place(0, asked.space.run_blocks()).run,
        };
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.get(&key) {
            return (flight.landed.clone(), flight.covers(asked));
        }
        if flights.len() >= self.config.fetches {
            self.metrics.refused(Reason::Overloaded);
            return (nothing(), true);
        }
        if self.stopping.is_cancelled() {
            return (nothing(), true);
        }
        let (answer, answered) = oneshot::channel();
        let landed = answered
            .map(|landed: Result<Arc<Brought>, _>| landed.unwrap_or_default())
            .boxed()
            .shared();
        let flight = Flight {
            wants: Arc::clone(asked),
            landed: landed.clone(),
        };
        flights.insert(key, flight);
        let (me, asked) = (Arc::clone(self), Arc::clone(asked));
        self.spawn(async move {
            let began = me.clock.now();
            let brought = tokio::select! {
                biased;
                () = me.stopping.cancelled() => Arc::default(),
                brought = me.fly(key, &asked) => brought,
            };
            me.note_missed(key, &asked);
            me.flights.lock().remove(&key);
            let seconds = me.clock.now().since(began).as_secs_f64();
            me.metrics.fetch_seconds.observe(seconds);
            // Nobody listens when every caller has gone; the blocks are here all the same.
            let _ = answer.send(brought);
        });
        (landed, true)
    }

    /// When the flight of a run will be over, if there is one.
    pub(super) fn landing(&self, run: &RunKey) -> Option<BoxFuture<'static, ()>> {
        let flights = self.flights.lock();
        flights
            .get(run)
            .map(|flight| flight.landed.clone().map(drop).boxed())
    }

    /// Remembers for a moment what was not found.
    fn note_missed(&self, key: RunKey, asked: &Asked) {
        let (parts, hashes) = (asked.parts.len().max(1), &asked.chain.hashes);
        let lacking =
            keys(key.namespace, &asked.chain, &asked.parts).position(|k| self.holdings.lacks(&k));
        let mut missed = self.missed.lock();
        match lacking.and_then(|n| hashes.get(n / parts)) {
            Some(first) => {
                if missed.len() >= MAX_MISSED {
                    missed.clear();
                }
                missed.insert(key, (self.clock.now().after(MISSED), *first));
            }
            None => {
                missed.remove(&key);
            }
        }
    }

    async fn fly(self: &Arc<Self>, key: RunKey, asked: &Asked) -> Arc<Brought> {
        // Before anybody is asked: an invalidation that comes in between outlaws what is on its way.
        let began = self.holdings.moment();
        let until = self.clock.now().after(self.config.fetch_time);
        let roster = self.cluster.roster();
        let mut brought = Brought::default();
        for peer in self.candidates(&roster, &key.run, asked.space.replicas) {
            let lacking = keys(asked.space.id, &asked.chain, &asked.parts)
                .position(|key| self.holdings.lacks(&key));
            let left = self.left(until);
            let Some(lacking) = lacking.filter(|_| !left.is_zero()) else {
                break;
            };
            let from = lacking / asked.parts.len().max(1);
            let rest = Asked {
                space: Arc::clone(&asked.space),
                chain: asked
                    .chain
                    .slice(from..asked.chain.len(), asked.space.run_blocks()),
                parts: asked.parts.clone(),
            };
            match self.ask(&peer, rest, until, began, &mut brought).await {
                Ok(()) | Err(PeerError::UnknownNamespace) => {}
                Err(error) => {
                    tracing::debug!(peer = %peer.id, %error, "a run could not be fetched");
                    if error.hurts() {
                        self.hurt(&peer.id);
                    }
                }
            }
        }
        Arc::new(brought)
    }

    /// Asks one candidate, once.
    async fn ask(
        self: &Arc<Self>,
        peer: &Peer,
        mut asked: Asked,
        until: Tick,
        began: u64,
        brought: &mut Brought,
    ) -> Result<(), PeerError> {
        let time = self.config.ask_time.min(self.left(until));
        let seen = self
            .transport
            .lookup(peer, &asked, Some(LEASE), time)
            .await?;
        let (lease, survived) = (seen.lease, seen.survived);
        let blocks = lease.map_or(seen.blocks, |(_, blocks)| blocks) as usize;
        if blocks == 0 {
            return Ok(());
        }
        let lease = lease.map(|(id, _)| id);
        // The owner before may have sent it meanwhile.
        let lacking = keys(asked.space.id, &asked.chain, &asked.parts)
            .position(|key| self.holdings.lacks(&key));
        let from = lacking.map_or(blocks, |lacking| lacking / asked.parts.len().max(1));
        let mut failed = Ok(());
        let mut answers = if from < blocks {
            asked.chain = asked.chain.slice(from..blocks, asked.space.run_blocks());
            self.transport.get(peer, &asked, lease, self.left(until))
        } else {
            stream::empty().boxed()
        };
        while let Some(answer) = answers.next().await {
            match answer {
                Ok((_, Fetched::Hit(block))) => {
                    self.take(peer, block, began, &survived, brought);
                }
                Ok((_, Fetched::Gone(_))) => {}
                Err(error) => {
                    failed = Err(error);
                    break;
                }
            }
        }
        if let Some(lease) = lease {
            let released = self.transport.release(peer, &asked.space, lease, RELEASE);
            // A lease that is not given back ends by itself.
            self.spawn(released.map(drop));
        }
        failed
    }

    fn take(
        &self,
        peer: &Peer,
        block: Carried,
        began: u64,
        survived: &[u64],
        brought: &mut Brought,
    ) {
        let (key, bytes) = (block.header.key, block.len_bytes());
        self.pace.spend(bytes);
        let kept = self.holdings.keep(block, Kind::Kv, began, survived);
        self.metrics.fetched(kept, bytes);
        match kept {
            Kept::New => {
                brought.blocks.insert(key);
            }
            Kept::Present | Kept::Refused(_) => {}
            Kept::Corrupt => {
                tracing::warn!(peer = %peer.id, "a block came corrupt from a peer; it was dropped");
            }
        }
    }
}
