//! Who is here: members and what they declare of themselves.
//!
//! ```text
//! member   id │ generation │ version │ weight │ zone │ state │ address
//!               └ newer wins ──────┘   └ digested ───────┘
//! joining ──► active ──► draining ──► gone (a tombstone, kept so that it cannot come back)
//! ```
//!
//! Views merge member by member: the greater (generation, version) wins, so the order in which news arrives does
//! not matter. A member raises its version with every change and its generation with every start.
//!
//! The digest is XXH3-64 over the members that are not gone, in the order of their ids, each as
//! `frame(id) │ weight u32 │ frame(zone) │ state u8`, where `frame(x)` is the length u32 and then x, little-endian.
//! It is 0 exactly for a view of nobody. Tombstones are left out, because nodes forget them at different times;
//! generations, versions and addresses, because they move no owner.
//!
//! Errors: none here; what comes from the wire is judged by [`crate::convert`].

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use twox_hash::XxHash3_64;

use crate::hash::frame;
use crate::v1;

/// The stable name of a member.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub String);

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl From<&str> for MemberId {
    fn from(id: &str) -> Self {
        Self(id.to_owned())
    }
}

/// Where a member is in its life. Numbers are those of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum MemberState {
    /// It takes runs, with a weight that ramps up.
    Joining = v1::MemberState::Joining as u8,
    /// It takes runs.
    Active = v1::MemberState::Active as u8,
    /// It hands over what it has and takes nothing new.
    Draining = v1::MemberState::Draining as u8,
    /// It has left, or was declared lost.
    Gone = v1::MemberState::Gone as u8,
}

impl MemberState {
    /// True when runs may be placed on the member.
    pub const fn takes_runs(self) -> bool {
        matches!(self, Self::Joining | Self::Active)
    }

    /// The member of a wire number; `None` for 0 (unspecified) and numbers of a later version.
    pub fn from_wire(number: i32) -> Option<Self> {
        match v1::MemberState::try_from(number).ok()? {
            v1::MemberState::Unspecified => None,
            v1::MemberState::Joining => Some(Self::Joining),
            v1::MemberState::Active => Some(Self::Active),
            v1::MemberState::Draining => Some(Self::Draining),
            v1::MemberState::Gone => Some(Self::Gone),
        }
    }
}

/// What a member declares of itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Stable name; placement hashes it alone.
    pub id: MemberId,
    /// Grows with every start.
    pub generation: u64,
    /// Grows with every change within a generation.
    pub version: u64,
    /// Share of the runs, relative to the others'; 0 takes none.
    pub weight: u32,
    /// What fails together; replicas go to other zones.
    pub zone: String,
    /// Where it is in its life.
    pub state: MemberState,
    /// Where to reach it.
    pub address: String,
}

/// Digest of a view, equal exactly when placement is (but for hash collisions, which cost a miss). 0: nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ViewDigest(pub u64);

impl fmt::Display for ViewDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The members somebody knows of, tombstones included, each id once, in the order of their ids.
///
/// A clone shares them until one of the two changes: a thousand members are three thousand allocations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    members: Arc<Vec<Member>>,
}

impl View {
    /// The view of these members; of two with one id the newer stays.
    pub fn new(members: impl IntoIterator<Item = Member>) -> Self {
        let mut view = Self::default();
        view.merge_all(members);
        view
    }

    /// Every member, gone ones included, in the order of their ids.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The member of this id.
    pub fn get(&self, id: &MemberId) -> Option<&Member> {
        let at = self
            .members
            .binary_search_by(|member| member.id.cmp(id))
            .ok()?;
        Some(&self.members[at])
    }

    /// Takes over what is news in `other`; true when anything was.
    pub fn merge(&mut self, other: &Self) -> bool {
        self.take_all(other.members.iter().map(Cow::Borrowed))
    }

    /// Takes over what is news in a list; true when anything was. Quickest in the order of ids, as views come.
    pub fn merge_all(&mut self, list: impl IntoIterator<Item = Member>) -> bool {
        self.take_all(list.into_iter().map(Cow::Owned))
    }

    /// Takes over one member if it is news; true when it was.
    pub fn merge_one(&mut self, member: Member) -> bool {
        self.merge_all([member])
    }

    fn take_all<'a>(&mut self, list: impl Iterator<Item = Cow<'a, Member>>) -> bool {
        let (mut changed, mut next) = (false, 0);
        for member in list {
            let place = match self.members.get(next) {
                Some(known) if known.id == member.id => Ok(next),
                _ => self
                    .members
                    .binary_search_by(|known| known.id.cmp(&member.id)),
            };
            let (Ok(at) | Err(at)) = place;
            next = at + 1;
            // Equal versions with different content break the rule above; comparing all fields keeps
            // merging independent of order even then.
            if place.is_ok_and(|at| !member_news(&member, &self.members[at])) {
                continue;
            }
            changed = true;
            let members = Arc::make_mut(&mut self.members);
            match place {
                Ok(at) => members[at] = member.into_owned(),
                Err(at) => members.insert(at, member.into_owned()),
            }
        }
        changed
    }

    /// The digest; see the module's page.
    pub fn digest(&self) -> ViewDigest {
        let mut input = Vec::with_capacity(64 * self.members.len());
        for member in self
            .members
            .iter()
            .filter(|member| member.state != MemberState::Gone)
        {
            frame(&mut input, member.id.0.as_bytes());
            input.extend_from_slice(&member.weight.to_le_bytes());
            frame(&mut input, member.zone.as_bytes());
            input.push(member.state as u8);
        }
        if input.is_empty() {
            return ViewDigest(0);
        }
        ViewDigest(XxHash3_64::oneshot(&input).max(1))
    }
}

fn member_news(new: &Member, known: &Member) -> bool {
    (new.generation, new.version)
        .cmp(&(known.generation, known.version))
        .then_with(|| new.cmp(known))
        .is_gt()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, prop_assert_ne, proptest};
    use proptest::sample::select;

    use super::{Member, MemberId, MemberState, View, ViewDigest};

    pub(crate) fn member(id: &str, weight: u32, zone: &str) -> Member {
        Member {
            id: MemberId(id.to_owned()),
            generation: 1,
            version: 1,
            weight,
            zone: zone.to_owned(),
            state: MemberState::Active,
            address: format!("http://{id}:7070"),
        }
    }

    fn members() -> impl Strategy<Value = Vec<Member>> {
        let state = select(vec![
            MemberState::Joining,
            MemberState::Active,
            MemberState::Draining,
            MemberState::Gone,
        ]);
        let member = (0u8..6, 0u64..3, 0u64..3, 0u32..3, 0u8..3, state).prop_map(
            |(id, generation, version, weight, zone, state)| Member {
                generation,
                version,
                state,
                ..member(&format!("m{id}"), weight, &format!("z{zone}"))
            },
        );
        vec(member, 0..12)
    }

    proptest! {
        #[test]
        fn news_merges_to_the_same_view_in_any_order(a in members(), b in members(), c in members()) {
            let (a, b, c) = (View::new(a), View::new(b), View::new(c));
            let merged = |views: [&View; 3]| {
                let mut view = View::default();
                for other in views {
                    view.merge(other);
                }
                view
            };
            let first = merged([&a, &b, &c]);
            prop_assert_eq!(&first, &merged([&c, &b, &a]));
            prop_assert_eq!(&first, &merged([&b, &a, &c]));
            let mut again = first.clone();
            prop_assert!(!again.merge(&a) && !again.merge(&first));
            prop_assert!(first.members().windows(2).all(|pair| pair[0].id < pair[1].id));
        }

        #[test]
        fn views_merge_in_any_grouping(a in members(), b in members(), c in members()) {
            let (a, b, c) = (View::new(a), View::new(b), View::new(c));
            let merged = |x: &View, y: &View| {
                let mut view = x.clone();
                view.merge(y);
                view
            };
            prop_assert_eq!(merged(&merged(&a, &b), &c), merged(&a, &merged(&b, &c)));
            prop_assert_eq!(merged(&a, &a), a);
        }

        #[test]
        fn a_member_never_goes_back(news in members()) {
            let mut view = View::default();
            for member in news {
                let old = view.get(&member.id).map(|known| (known.generation, known.version));
                let told = view.merge_one(member.clone());
                let known = view.get(&member.id).unwrap();
                prop_assert!(old <= Some((known.generation, known.version)));
                prop_assert!(Some((known.generation, known.version)) >= Some((member.generation, member.version)));
                prop_assert!(!told || known == &member);
            }
        }

        #[test]
        fn equal_digests_mean_equal_owners_and_other_weights_or_zones_another_digest(
            news in members(), other in any::<u64>(), run in any::<[u8; 32]>(),
        ) {
            use crate::placement::Placement;
            let view = View::new(news);
            let run = crate::key::RunHash(run);
            // The same declarations by other lives at other addresses, and without the tombstones.
            let retold = View::new(view.members().iter().filter(|m| m.state != MemberState::Gone).map(|member| Member {
                generation: member.generation + 1 + other % 3,
                version: other % 5,
                address: format!("elsewhere-{other}"),
                ..member.clone()
            }));
            prop_assert_eq!(view.digest(), retold.digest());
            let (one, two) = (Placement::new(&view), Placement::new(&retold));
            prop_assert_eq!(one.owners(&run, 3), two.owners(&run, 3));
            prop_assert_eq!(one.ranked(&run), two.ranked(&run));
            for member in retold.members() {
                let changed = |change: fn(&mut Member)| {
                    let mut member = Member { version: u64::MAX, ..member.clone() };
                    change(&mut member);
                    let mut view = retold.clone();
                    view.merge_one(member);
                    view.digest()
                };
                prop_assert_ne!(changed(|member| member.weight += 1), view.digest());
                prop_assert_ne!(changed(|member| member.zone.push('x')), view.digest());
                prop_assert_ne!(changed(|member| member.state = MemberState::Gone), view.digest());
            }
        }

        #[test]
        fn the_digest_does_not_know_the_order(members in members(), turn in any::<usize>()) {
            let mut turned = members.clone();
            if !turned.is_empty() {
                let by = turn % turned.len();
                turned.rotate_left(by);
            }
            prop_assert_eq!(View::new(members).digest(), View::new(turned).digest());
        }
    }

    #[test]
    fn the_digest_covers_what_moves_owners_and_nothing_else() {
        let base = View::new([member("a", 1, "x"), member("b", 1, "y")]);
        let with = |change: fn(&mut Member)| {
            let mut other = member("b", 1, "y");
            other.version = 2;
            change(&mut other);
            let mut view = base.clone();
            assert!(view.merge_one(other));
            view.digest()
        };
        assert_eq!(with(|_| ()), base.digest());
        assert_eq!(with(|member| member.address.clear()), base.digest());
        assert_ne!(with(|member| member.weight = 2), base.digest());
        assert_ne!(with(|member| member.zone = "x".into()), base.digest());
        assert_ne!(
            with(|member| member.state = MemberState::Draining),
            base.digest()
        );
        let gone = with(|member| member.state = MemberState::Gone);
        assert_eq!(gone, View::new([member("a", 1, "x")]).digest());
        assert_eq!(View::default().digest(), ViewDigest(0));
        assert_ne!(base.digest(), ViewDigest(0));
    }

    proptest! {
        #[test]
        fn a_list_in_any_order_merges_as_its_members_one_by_one(known in members(), list in members()) {
            let mut at_once = View::new(known);
            let mut one_by_one = at_once.clone();
            let told = at_once.merge_all(list.clone());
            let news = list.into_iter().map(|member| one_by_one.merge_one(member));
            prop_assert_eq!(news.fold(false, |any, one| any | one), told);
            prop_assert_eq!(at_once, one_by_one);
        }
    }

    #[test]
    fn a_clone_keeps_what_it_was_made_of() {
        let mut view = View::new([member("a", 1, "x")]);
        let before = view.clone();
        assert!(view.merge_one(member("b", 1, "y")));
        assert_eq!((before.members().len(), view.members().len()), (1, 2));
    }

    #[test]
    fn a_tombstone_outlives_old_news() {
        let mut gone = member("a", 1, "x");
        (gone.version, gone.state) = (5, MemberState::Gone);
        let mut view = View::new([gone.clone()]);
        assert!(!view.merge_one(member("a", 1, "x")));
        let mut reborn = member("a", 1, "x");
        reborn.generation = 2;
        assert!(view.merge_one(reborn));
        assert_eq!(view.get(&"a".into()).unwrap().state, MemberState::Active);
        assert_eq!(view.get(&"b".into()), None);
    }
}
