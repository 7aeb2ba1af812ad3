//! One node's Cluster service, as kvctl calls it.

use anyhow::{Context as _, Result, anyhow};
use kvproto::{
    Member, MemberState, View,
    v1::{self, cluster_client::ClusterClient},
};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use crate::context::Context;

/// A node that is asked, with the caller's credential.
pub(super) struct Service {
    pub(super) client: ClusterClient<Channel>,
    authorization: Option<MetadataValue<Ascii>>,
}

impl Service {
    /// The node that kvctl was told of; of a list of members the first that can be reached.
    pub(super) async fn connect(context: &Context) -> Result<Self> {
        let mut failed = None;
        for address in context.endpoint().split(',') {
            match Self::at(context, address.trim()).await {
                Ok(service) => return Ok(service),
                Err(error) => _ = failed.get_or_insert(error),
            }
        }
        Err(failed.expect("a text has a first piece"))
    }

    /// The node at an address or URL.
    pub(super) async fn at(context: &Context, address: &str) -> Result<Self> {
        let url = match address.contains("://") || address.starts_with("unix:") {
            true => address.to_owned(),
            false => format!("http://{address}"),
        };
        let endpoint = Endpoint::from_shared(url).with_context(|| {
            format!("{address:?} is no address; give --endpoint as host:port or unix:/path")
        })?;
        let connected = endpoint.connect_timeout(context.deadline()).connect().await;
        let authorization = context
            .token()
            .map(|token| format!("Bearer {token}").parse());
        Ok(Self {
            client: ClusterClient::new(connected.with_context(|| {
                format!(
                    "cannot reach {address}; is a node running there? start one with `kvserver`"
                )
            })?),
            authorization: authorization.transpose().context("--token")?,
        })
    }

    /// A request with the caller's credential.
    pub(super) fn request<T>(&self, asked: T) -> Request<T> {
        let mut request = Request::new(asked);
        if let Some(authorization) = &self.authorization {
            let headers = request.metadata_mut();
            headers.insert("authorization", authorization.clone());
        }
        request
    }

    /// Who is here, as this node sees it.
    pub(super) async fn view(&mut self, context: &Context) -> Result<v1::ViewResponse> {
        let mut request = self.request(v1::ViewRequest::default());
        request.set_timeout(context.deadline());
        let answer = self.client.view(request).await.map_err(|e| said(&e))?;
        Ok(answer.into_inner())
    }
}

/// What a node said instead of an answer.
pub(super) fn said(status: &Status) -> anyhow::Error {
    match status.code() {
        Code::Unauthenticated => anyhow!(
            "{}; give it with --token or TERRACE_TOKEN",
            status.message()
        ),
        _ => anyhow!("{}", status.message()),
    }
}

/// The members of a view.
pub(super) fn members(view: &v1::ViewResponse) -> Result<View> {
    let members = view.members.iter().filter_map(|seen| seen.member.clone());
    let members: Result<Vec<Member>, _> = members.map(Member::try_from).collect();
    Ok(View::new(members?))
}

/// The member that `text` names: its id, or as much of it as is nobody else's, or its address.
pub(super) fn named<'a>(view: &'a View, text: &str) -> Result<&'a Member> {
    let bare = |address: &str| address.trim_start_matches("http://").to_owned();
    let there = view.members().iter();
    let there = there.filter(|member| bare(&member.address) == bare(text));
    // An address may have been that of others before.
    let (gone, here): (Vec<&Member>, Vec<&Member>) =
        there.partition(|member| member.state == MemberState::Gone);
    for those in [here, gone] {
        if let [member] = those[..] {
            return Ok(member);
        }
    }
    let mut found = view
        .members()
        .iter()
        .filter(|member| member.id.0.starts_with(text));
    match (found.next(), found.next()) {
        (Some(member), None) => Ok(member),
        _ if view.get(&text.into()).is_some() => Ok(view.get(&text.into()).expect("just found")),
        (None, _) => Err(anyhow!(
            "no member is named {text:?}; `kvctl cluster` lists them"
        )),
        (Some(one), Some(other)) => Err(anyhow!(
            "{text:?} may be {} or {}; give more of the name",
            one.id,
            other.id
        )),
    }
}

#[cfg(test)]
mod tests {
    use kvproto::{Member, MemberState, View};

    use super::named;

    fn view(ids: &[&str]) -> View {
        View::new(ids.iter().map(|id| Member {
            id: (*id).into(),
            generation: 1,
            version: 1,
            weight: 1,
            zone: String::new(),
            state: MemberState::Active,
            address: format!("http://{id}.example:7070"),
        }))
    }

    #[test]
    fn a_member_is_found_by_as_much_of_its_name_as_is_its_own_or_by_its_address() {
        let view = view(&["ab12", "ab34", "node", "node-2"]);
        for text in ["ab1", "ab12.example:7070", "http://ab12.example:7070"] {
            assert_eq!(named(&view, text).unwrap().id.0, "ab12");
        }
        // One that has left can be resumed by its address, while nobody else has it.
        let mut members = view.members().to_vec();
        members[0].state = MemberState::Gone;
        let left = View::new(members.clone());
        assert_eq!(named(&left, "ab12.example:7070").unwrap().id.0, "ab12");
        members[1].address = members[0].address.clone();
        let taken = View::new(members);
        assert_eq!(named(&taken, "ab12.example:7070").unwrap().id.0, "ab34");
        assert_eq!(
            named(&view, "node").unwrap().id.0,
            "node",
            "a whole name is that one"
        );
        assert!(
            named(&view, "ab")
                .unwrap_err()
                .to_string()
                .contains("ab12 or ab34")
        );
        assert!(
            named(&view, "x")
                .unwrap_err()
                .to_string()
                .contains("kvctl cluster")
        );
    }
}
