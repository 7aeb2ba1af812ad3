//! The Cluster service: decode, one call, encode.
//!
//! Looking is for everybody who may call; joining and changing are for nodes and operators, who show the nodes' token.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, stream};
use kvproto::{
    BootId, FieldError, Member, MemberId, Reason, RunHash,
    convert::request::Context,
    v1::{self, cluster_server::Cluster as ClusterService},
};
use tonic::{Request, Response, Status, async_trait};

use super::{
    dispatch::{Caller, StreamTime},
    status,
};
use crate::{
    clock::Tick,
    cluster::{Cluster, Standing},
};

/// The generated trait's implementation; everything it needs comes with the request.
pub(crate) struct ClusterRpc;

/// How often a drain says how far it is, when nothing tells it sooner.
const DRAIN_PACE: Duration = Duration::from_millis(500);

/// Who calls, from where, and what it says of itself.
struct Asked {
    caller: Caller,
    context: Context,
}

impl Asked {
    fn new<T>(request: &Request<T>, context: Option<v1::RequestContext>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        Ok(Self {
            caller: caller.expect("the connection names its caller"),
            context: Context::from_wire(context).map_err(|e| status::field(&e))?,
        })
    }

    /// Refuses who is neither node nor operator.
    fn must_be_peer<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let credential = request.metadata().get("authorization");
        let credential = credential.map(|value| value.as_bytes());
        match self.caller.shared.blocks.tenants().is_peer(credential) {
            true => Ok(()),
            false => Err(status::refuse(
                Reason::Unauthenticated,
                "authorization: expected \"Bearer <token>\" with the token of this node's peer_token_file",
            )),
        }
    }

    fn cluster(&self) -> &Cluster {
        self.caller.shared.blocks.cluster()
    }

    fn answer(&self) -> Option<v1::ResponseContext> {
        Some((&self.caller.answer(&self.context)).into())
    }

    /// Refuses what is meant for another node.
    fn must_be_me(&self, node_id: &str) -> Result<(), Status> {
        let me = self.cluster().me();
        if node_id == me.0 {
            return Ok(());
        }
        let problem = format!("is {node_id:?}; this is {me}");
        Err(status::field(&FieldError::new("node_id", problem)))
    }
}

#[async_trait]
impl ClusterService for ClusterRpc {
    async fn join(
        &self,
        request: Request<v1::JoinRequest>,
    ) -> Result<Response<v1::JoinResponse>, Status> {
        let asked = Asked::new(&request, request.get_ref().context.clone())?;
        asked.must_be_peer(&request)?;
        let wire = request.into_inner();
        let member = wire.member.map(Member::try_from).transpose();
        let member = member.map_err(|e| status::field(&e))?;
        let cluster = asked.cluster();
        if let Some(why) = cluster.alone() {
            let problem = format!("this node is alone: {why}");
            return Err(status::refuse(Reason::TierDown, problem));
        }
        must_be_free(cluster, &wire.node_id, &wire.address)?;
        if let Some(member) = member.filter(|member| member.id.0 == wire.node_id) {
            cluster.merge([member]);
        }
        let blocks = &asked.caller.shared.blocks;
        let roster = cluster.roster();
        Ok(Response::new(v1::JoinResponse {
            context: asked.answer(),
            secret: blocks.secret().to_vec().into(),
            cluster_id: blocks.cluster_id(),
            members: roster.view.members().iter().map(Into::into).collect(),
        }))
    }

    async fn view(
        &self,
        request: Request<v1::ViewRequest>,
    ) -> Result<Response<v1::ViewResponse>, Status> {
        let asked = Asked::new(&request, request.get_ref().context.clone())?;
        let now = asked.caller.shared.clock.now();
        let cluster = asked.cluster();
        let (roster, alone) = (cluster.roster(), cluster.alone());
        let members = roster.view.members().iter();
        Ok(Response::new(v1::ViewResponse {
            context: asked.answer(),
            node_id: cluster.me().0.clone(),
            cluster_id: match alone {
                Some(_) => String::new(),
                None => asked.caller.shared.blocks.cluster_id(),
            },
            members: members.map(|member| seen(cluster, member, now)).collect(),
            changed_ms: millis(now.since(roster.changed)),
            young: roster.is_young(now),
            alone: alone.unwrap_or_default(),
        }))
    }

    async fn report(
        &self,
        request: Request<v1::ReportRequest>,
    ) -> Result<Response<v1::ReportResponse>, Status> {
        let asked = Asked::new(&request, request.get_ref().context.clone())?;
        let wire = request.into_inner();
        let hurt = MemberId(wire.node_id);
        asked.cluster().hurt(&hurt, BootId(wire.boot_id));
        Ok(Response::new(v1::ReportResponse {
            context: asked.answer(),
        }))
    }

    async fn set_weight(
        &self,
        request: Request<v1::SetWeightRequest>,
    ) -> Result<Response<v1::SetWeightResponse>, Status> {
        let asked = Asked::new(&request, request.get_ref().context.clone())?;
        asked.must_be_peer(&request)?;
        let wire = request.into_inner();
        asked.must_be_me(&wire.node_id)?;
        if wire.weight > crate::config::MOST_WEIGHT {
            let problem = format!("is {}; at most {}", wire.weight, crate::config::MOST_WEIGHT);
            return Err(status::field(&FieldError::new("weight", problem)));
        }
        asked.cluster().set_weight(wire.weight);
        Ok(Response::new(v1::SetWeightResponse {
            context: asked.answer(),
            member: Some((&asked.cluster().declared()).into()),
        }))
    }

    type DrainStream = Pin<Box<dyn Stream<Item = Result<v1::DrainResponse, Status>> + Send>>;

    async fn drain(
        &self,
        request: Request<v1::DrainRequest>,
    ) -> Result<Response<Self::DrainStream>, Status> {
        let asked = Asked::new(&request, request.get_ref().context.clone())?;
        asked.must_be_peer(&request)?;
        let time = request.extensions().get::<StreamTime>().map(|time| time.0);
        let wire = request.into_inner();
        asked.must_be_me(&wire.node_id)?;
        if wire.resume {
            asked.cluster().resume();
            let resumed = v1::DrainResponse {
                context: asked.answer(),
                phase: v1::DrainPhase::Resumed as i32,
                ..v1::DrainResponse::default()
            };
            return Ok(Response::new(Box::pin(stream::iter([Ok(resumed)]))));
        }
        let now = asked.caller.shared.clock.now();
        let longest = time.unwrap_or(asked.caller.shared.limits.lifetimes.default);
        let time = match wire.deadline_ms {
            0 => longest,
            asked => Duration::from_millis(asked).min(longest),
        };
        let until = now.after(time.saturating_sub(LAST_WORD));
        let motion = asked.caller.shared.blocks.motion();
        let before = motion.map(|motion| motion.progress().borrow().clone());
        let before = before.unwrap_or_default();
        asked.cluster().drain();
        let watch = Draining {
            before: (before.moved_runs, before.moved_bytes),
            context: asked.answer(),
            until,
            leave_anyway: wire.leave_anyway,
            is_over: false,
            asked,
        };
        Ok(Response::new(Box::pin(stream::unfold(
            watch,
            Draining::next,
        ))))
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        let asked = Asked::new(&request, request.get_ref().context.clone())?;
        let wire = request.into_inner();
        let run = <[u8; 32]>::try_from(&wire.run_hash[..]).map(RunHash);
        let run = run.map_err(|_| {
            let problem = format!("has {} bytes; exactly 32 are needed", wire.run_hash.len());
            status::field(&FieldError::new("run_hash", problem))
        })?;
        let now = asked.caller.shared.clock.now();
        let claimants = claimants(asked.cluster(), &run, wire.replicas.max(1) as usize, now);
        Ok(Response::new(v1::ExplainResponse {
            context: asked.answer(),
            claimants,
        }))
    }

    async fn invalidations(
        &self,
        request: Request<v1::InvalidationsRequest>,
    ) -> Result<Response<v1::InvalidationsResponse>, Status> {
        let asked = Asked::new(&request, request.get_ref().context.clone())?;
        asked.must_be_peer(&request)?;
        let told = asked.caller.shared.blocks.invalidations();
        Ok(Response::new(v1::InvalidationsResponse {
            context: asked.answer(),
            ..told.answer(request.into_inner().known)
        }))
    }
}

/// Between a drain's own end and its stream's.
const LAST_WORD: Duration = Duration::from_millis(500);

/// A drain that somebody waits for.
struct Draining {
    asked: Asked,
    /// Of the first message.
    context: Option<v1::ResponseContext>,
    /// Runs and bytes that it had handed over before.
    before: (u64, u64),
    until: Tick,
    leave_anyway: bool,
    is_over: bool,
}

impl Draining {
    /// The next message: when there is progress, at its pace, or at the end.
    async fn next(mut self) -> Option<(Result<v1::DrainResponse, Status>, Self)> {
        if self.is_over {
            return None;
        }
        let shared = Arc::clone(&self.asked.caller.shared);
        let Some(motion) = shared.blocks.motion() else {
            self.is_over = true;
            let problem = "this node is not ready yet; try again";
            return Some((Err(status::refuse(Reason::Draining, problem)), self));
        };
        let mut told = motion.progress();
        if self.context.is_none() {
            tokio::select! {
                _ = told.changed() => {}
                () = shared.clock.sleep(DRAIN_PACE) => {}
                () = shared.draining.cancelled() => {}
            }
        }
        let mut progress = told.borrow().clone();
        let is_late = shared.clock.now() >= self.until || shared.draining.is_cancelled();
        let is_done = progress.is_draining && progress.is_done && progress.at_stake_bytes() == 0;
        if is_done || is_late {
            progress = motion.account();
        }
        let phase = match (progress.at_stake_bytes(), is_late) {
            (0, _) if is_done => v1::DrainPhase::Left,
            (_, true) if self.leave_anyway => v1::DrainPhase::Left,
            (_, true) => v1::DrainPhase::Deadline,
            (_, false) => v1::DrainPhase::Moving,
        };
        if phase == v1::DrainPhase::Left {
            shared.blocks.cluster().leave();
        }
        self.is_over = phase != v1::DrainPhase::Moving;
        let message = v1::DrainResponse {
            context: self.context.take(),
            phase: phase as i32,
            moved_runs: progress.moved_runs.saturating_sub(self.before.0),
            moved_bytes: progress.moved_bytes.saturating_sub(self.before.1),
            waiting_runs: progress.waiting_runs,
            at_stake_bytes: progress.at_stake_bytes(),
            left_blocks: progress.left_blocks,
        };
        Some((Ok(message), self))
    }
}

/// Two nodes of one name would take turns at every run they own.
fn must_be_free(cluster: &Cluster, node_id: &str, address: &str) -> Result<(), Status> {
    let id = MemberId::from(node_id);
    let refuse = |problem: String| Err(status::field(&FieldError::new("node_id", problem)));
    if node_id.is_empty() {
        return refuse("is missing".to_owned());
    }
    if id == *cluster.me() {
        return refuse(format!("is {node_id:?}, which is this node's own name"));
    }
    let roster = cluster.roster();
    match roster.view.get(&id) {
        Some(known)
            if !address.is_empty()
                && known.address != address
                && cluster.standing(&id) == Standing::Well =>
        {
            refuse(format!(
                "is {node_id:?}, the name of a member at {} that is alive",
                known.address
            ))
        }
        _ => Ok(()),
    }
}

fn seen(cluster: &Cluster, member: &Member, now: Tick) -> v1::MemberStatus {
    let (standing, suspect_ms) = match cluster.standing(&member.id) {
        Standing::Well => (v1::Standing::Well, 0),
        Standing::Suspect { since } => (v1::Standing::Suspect, millis(now.since(since))),
        Standing::Departed => (v1::Standing::Departed, 0),
    };
    let load = cluster.load(&member.id).unwrap_or_default();
    v1::MemberStatus {
        member: Some(member.into()),
        standing: standing as i32,
        suspect_ms,
        calls: load.calls,
        full_permille: load.full,
        waiting_bytes: load.waiting_bytes,
        moved_bytes: load.moved_bytes,
    }
}

fn claimants(cluster: &Cluster, run: &RunHash, replicas: usize, now: Tick) -> Vec<v1::Claimant> {
    let roster = cluster.roster();
    let owners = roster.owners(run, replicas).into_iter();
    let owners = owners.map(|member| (member.id.clone(), v1::Claim::Owner));
    let former = roster.former(run, now).into_iter();
    let former = former.map(|id| (id, v1::Claim::Former));
    let next = roster.placement.ranked(run).into_iter();
    let next = next.map(|id| (id.clone(), v1::Claim::Next));
    let mut claimants: Vec<v1::Claimant> = Vec::new();
    for (id, claim) in owners.chain(former).chain(next) {
        if claimants.iter().all(|known| known.node_id != id.0) {
            claimants.push(v1::Claimant {
                node_id: id.0,
                claim: claim as i32,
            });
        }
    }
    claimants
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
