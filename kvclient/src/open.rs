//! Opening a namespace at one node, for the first time and again.
//!
//! ```text
//! call ─► ensure: opened there by this client? ─ no ─► open ─► same id, same key? ─► call
//! call ─► refused: unknown namespace ─► open again, once per call ─► call
//! ```
//!
//! Units: none.
//! Errors: [`Error::NamespaceChanged`] when one node answers otherwise than before; [`Error::NamespaceDiffers`] when a
//! member of the cluster answers otherwise than another: they do not share their secret.

use kvproto::{Namespace, NamespaceId, Reason, convert::answer::OpenedNamespace, v1};
use parking_lot::Mutex;

use crate::{
    call::{self, Deadline, Inner},
    error::Error,
    namespace::NamespaceHandle,
    wire::{self, Method},
};

/// Namespaces that a client remembers to have opened at a node; beyond it some are opened once more.
const MAX_OPENED: usize = 256;

/// What this client has opened at one node.
#[derive(Debug, Default)]
pub(crate) struct Opened(Mutex<Vec<NamespaceId>>);

impl Opened {
    fn has(&self, id: NamespaceId) -> bool {
        self.0.lock().contains(&id)
    }

    fn note(&self, id: NamespaceId) {
        let mut opened = self.0.lock();
        if opened.len() >= MAX_OPENED {
            opened.clear();
        }
        if !opened.contains(&id) {
            opened.push(id);
        }
    }
}

/// How a namespace is opened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Manner {
    /// Not under a label that is known with another fingerprint.
    pub(crate) strict: bool,
    /// Members that hold each of its runs; 0: as it is there.
    pub(crate) replicas: u32,
    /// Another of its label stays the one that was opened last.
    pub(crate) aside: bool,
}

/// Opens a namespace at one node, which also tells where its same-host path is.
pub(crate) async fn open(
    inner: &Inner,
    spec: &Namespace,
    manner: Manner,
    deadline: Deadline,
) -> Result<OpenedNamespace, Error> {
    let method = Method::OPEN_NAMESPACE;
    let answer: v1::OpenNamespaceResponse = call::unary(inner, method, deadline, |context| {
        v1::OpenNamespaceRequest {
            context: Some(context),
            spec: Some(spec.into()),
            strict: manner.strict,
            replicas: manner.replicas,
            aside: manner.aside,
        }
    })
    .await?;
    inner.heard(answer.context.as_ref());
    let opened =
        OpenedNamespace::try_from(&answer).map_err(|problem| wire::answer(method, problem))?;
    inner.local.told(opened.local_socket.as_deref());
    inner.opened.note(opened.id);
    Ok(opened)
}

/// As it was opened elsewhere; one copy may have become more there since.
fn again(namespace: &NamespaceHandle) -> Manner {
    Manner {
        strict: false,
        replicas: match namespace.replicas() {
            1 => 0,
            many => many as u32,
        },
        aside: namespace.is_aside(),
    }
}

/// Opens a namespace at a member that this client has not opened it at.
pub(crate) async fn ensure(
    inner: &Inner,
    namespace: &NamespaceHandle,
    deadline: Deadline,
) -> Result<(), Error> {
    if inner.opened.has(namespace.id()) {
        return Ok(());
    }
    let opened = open(inner, namespace.spec(), again(namespace), deadline).await?;
    if namespace.is(&opened) {
        return Ok(());
    }
    Err(Error::NamespaceDiffers {
        endpoint: inner.endpoint.to_string(),
        label: namespace.label().to_owned(),
    })
}

/// Whether a call has opened its namespace again already.
#[derive(Debug, Default)]
pub(crate) struct Reopening {
    is_done: bool,
}

impl Reopening {
    /// Opens the namespace again when the node has forgotten it (it was restarted without its list), at
    /// most once per call. `Ok`: the call may be made again.
    pub(crate) async fn after(
        &mut self,
        inner: &Inner,
        namespace: &NamespaceHandle,
        error: Error,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let forgotten = matches!(
            &error,
            Error::Refused {
                reason: Some(Reason::UnknownNamespace),
                ..
            }
        );
        if !forgotten || std::mem::replace(&mut self.is_done, true) {
            return Err(error);
        }
        let opened = open(inner, namespace.spec(), again(namespace), deadline).await?;
        if !namespace.is(&opened) {
            return Err(Error::NamespaceChanged {
                label: namespace.label().to_owned(),
            });
        }
        Ok(())
    }
}
