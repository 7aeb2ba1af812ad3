//! What a client knows of the cluster, and who owns a run by it.
//!
//! ```text
//! answer { digest, members } ─ other than mine? ─► merge ─► view ─► Table (prepared once per change)
//! request { digest }  ◄── so that a node tells what this client lacks, and nothing when it lacks nothing
//! ```
//!
//! A list that comes with an answer is the whole view of its node. So two things are known of who is not in it:
//!
//! * A member at the address of another that started later is a ghost: its process is gone, and the one that took its
//!   place has another name (its data was wiped).
//! * A member that no list has named for [`GHOST_AFTER`] while others came has been forgotten, tombstone and all.
//!
//! Units: members.
//! Errors: none.
//! Why a table beside the view: every block of every call asks for an owner; a view changes a few times a day.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use kvproto::{
    Member, MemberId, MemberState, View, ViewDigest, key::RunHash, placement::Placement,
};

use crate::clock::Tick;

/// Members kept, tombstones included; beyond it the tombstones go, which costs at most a detour to who has left.
pub const MAX_KNOWN: usize = 16_384;

/// Far longer than news take to reach every node.
pub const GHOST_AFTER: Duration = Duration::from_secs(60);

/// How often it is looked for ghosts where nothing is new.
const HAUNT_AFTER: Duration = Duration::from_secs(1);

/// Who owns a run, by one view.
#[derive(Debug)]
pub struct Table {
    digest: ViewDigest,
    placement: Placement,
    /// All that are not gone, in the order of their ids.
    members: Vec<Member>,
}

impl Table {
    /// What `view` says.
    #[must_use]
    pub fn new(view: &View) -> Self {
        let is_here = |member: &&Member| member.state != MemberState::Gone;
        Self {
            digest: view.digest(),
            placement: Placement::new(view),
            members: view.members().iter().filter(is_here).cloned().collect(),
        }
    }

    /// Digest of the view.
    #[must_use]
    pub fn digest(&self) -> ViewDigest {
        self.digest
    }

    /// Everybody who is not gone, in the order of their ids. Numbers of members are positions here.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Who owns `run`; `None` when nobody takes runs.
    #[must_use]
    pub fn owner(&self, run: &RunHash) -> Option<usize> {
        self.number(self.placement.first(run)?)
    }

    /// Who owns `run` when `replicas` are kept of it, the primary first.
    #[must_use]
    pub fn owners(&self, run: &RunHash, replicas: usize) -> Vec<usize> {
        let owners = self.placement.owners(run, replicas);
        owners
            .into_iter()
            .filter_map(|id| self.number(id))
            .collect()
    }

    /// The number of a member.
    #[must_use]
    pub fn number(&self, id: &MemberId) -> Option<usize> {
        self.members
            .binary_search_by(|member| member.id.cmp(id))
            .ok()
    }
}

/// What a client knows of the cluster.
#[derive(Clone, Debug)]
pub struct Known {
    view: View,
    /// When a list last named each of them.
    named: BTreeMap<MemberId, Tick>,
    /// When it was last looked for ghosts.
    haunted: Tick,
    table: Arc<Table>,
    /// Who owned what before the last change that moved owners.
    before: Option<Arc<Table>>,
}

impl Default for Known {
    fn default() -> Self {
        Self {
            view: View::default(),
            named: BTreeMap::new(),
            haunted: Tick::default(),
            table: Arc::new(Table::new(&View::default())),
            before: None,
        }
    }
}

impl Known {
    /// Takes over what is news in a node's list, heard at `now`; true when anything was.
    pub fn merge(&mut self, list: impl IntoIterator<Item = Member>, now: Tick) -> bool {
        let before = self.view.clone();
        let named = &mut self.named;
        let list = list.into_iter().inspect(|member| {
            match named.get_mut(&member.id) {
                Some(last) => *last = now,
                None => _ = named.insert(member.id.clone(), now),
            };
        });
        let has_news = self.view.merge_all(list);
        // While nodes disagree a list comes with every answer, and of a thousand members: only news make ghosts, and time.
        if has_news || now.since(self.haunted) >= HAUNT_AFTER {
            self.haunted = now;
            self.forget_ghosts(now);
        }
        if self.view == before {
            return false;
        }
        let table = Arc::new(Table::new(&self.view));
        if table.digest != self.table.digest && !self.table.members.is_empty() {
            self.before = Some(self.table.clone());
        }
        self.table = table;
        true
    }

    fn forget_ghosts(&mut self, now: Tick) {
        let members = self.view.members();
        let is_full = members.len() > MAX_KNOWN;
        let is_here = |member: &Member| member.state != MemberState::Gone;
        // The latest to start at each address.
        let mut latest: BTreeMap<&str, u64> = BTreeMap::new();
        for member in members.iter().filter(|member| is_here(member)) {
            let generation = latest.entry(&member.address).or_default();
            *generation = member.generation.max(*generation);
        }
        let is_ghost = |member: &Member| match is_here(member) {
            true => {
                let is_replaced = !member.address.is_empty()
                    && latest.get(&*member.address) != Some(&member.generation);
                let named = self.named.get(&member.id).copied().unwrap_or_default();
                is_replaced || now.since(named) >= GHOST_AFTER
            }
            false => is_full,
        };
        if members.iter().any(is_ghost) {
            let kept: Vec<Member> = members.iter().filter(|m| !is_ghost(m)).cloned().collect();
            self.view = View::new(kept);
        }
        if self.named.len() > self.view.members().len() {
            let view = &self.view;
            self.named.retain(|id, _| view.get(id).is_some());
        }
    }

    /// The view.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Its digest, which goes with every request; 0 before the first news.
    #[must_use]
    pub fn digest(&self) -> ViewDigest {
        self.table.digest
    }

    /// Who owns what.
    #[must_use]
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Who owned what before the last change: where a lease may be that somebody else took by an older view.
    #[must_use]
    pub fn before(&self) -> Option<&Arc<Table>> {
        self.before.as_ref()
    }
}
