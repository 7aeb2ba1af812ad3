//! The registry across restarts, between tenants, and over a disk that hangs.

use std::{
    task::{self, Poll, Waker},
    time::Duration,
};

use kvproto::Namespace;

use super::*;
use crate::{blocks::tenants::DEFAULT_TENANT, clock::SystemClock};

const ME: TenantId = TenantId(0);

fn registry(dir: &Path) -> Namespaces {
    let bounds = Bounds {
        per_tenant: 3,
        total: 5,
    };
    let tenants = Tenants::open();
    let domains = Arc::default();
    Namespaces::open(
        dir,
        Path::new(""),
        bounds,
        &tenants,
        domains,
        &SystemClock::new(),
    )
    .unwrap()
}

fn ask(namespace: &Namespace, strict: bool, aside: bool) -> OpenNamespace {
    OpenNamespace {
        strict,
        aside,
        ..OpenNamespace::of(namespace.clone())
    }
}

async fn open_as(
    registry: &Namespaces,
    tenant: &str,
    label: &str,
) -> Result<OpenedNamespace, BlocksError> {
    let namespace = Namespace::opaque(label, 16, 8);
    let asked = ask(&namespace, false, false);
    registry.open_namespace(ME, tenant, &asked, 1).await
}

async fn open(registry: &Namespaces, namespace: &Namespace) -> OpenedNamespace {
    let asked = ask(namespace, false, false);
    let opened = registry.open_namespace(ME, DEFAULT_TENANT, &asked, 1);
    opened.await.unwrap()
}

#[tokio::test]
async fn a_restart_keeps_ids_and_keys() {
    let dir = tempfile::tempdir().unwrap();
    let namespace = Namespace::opaque("a", 16, 8);
    let before = open(&registry(dir.path()), &namespace).await;
    let again = registry(dir.path());
    assert_eq!(again.get(ME, before.id).unwrap().run_blocks, 8);
    let after = open(&again, &namespace).await;
    assert_eq!(
        (after.id, after.key.as_bytes()),
        (before.id, before.key.as_bytes())
    );
    assert_eq!(after.difference, None);
}

#[tokio::test]
async fn another_shape_under_a_known_label_is_another_namespace_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(&registry(dir.path()), &Namespace::opaque("a", 16, 8)).await;
    let registry = registry(dir.path());
    let second = open(&registry, &Namespace::opaque("a", 32, 8)).await;
    assert_ne!(first.id, second.id);
    assert_eq!(second.difference.unwrap(), "block_tokens was 16, is 32");
    // Back again: the last one opened is what it is compared with.
    let third = open(&registry, &Namespace::opaque("a", 16, 8)).await;
    assert_eq!(third.difference.unwrap(), "block_tokens was 32, is 16");
    assert_eq!(third.id, first.id);
    assert_eq!(registry.len(), 2);
}

#[tokio::test]
async fn a_strict_caller_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    open(&registry, &Namespace::opaque("a", 16, 8)).await;
    let other = Namespace::opaque("a", 32, 8);
    let asked = ask(&other, true, false);
    let refused = registry.open_namespace(ME, DEFAULT_TENANT, &asked, 1);
    assert!(matches!(
        refused.await,
        Err(BlocksError::NamespaceDiffers { .. })
    ));
    assert!(registry.get(ME, other.id(DEFAULT_TENANT)).is_err());
}

/// As tools do, and nodes that move blocks of what engines have left behind.
#[tokio::test]
async fn what_is_opened_aside_is_never_the_last_of_its_label() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (Namespace::opaque("a", 16, 8), Namespace::opaque("a", 32, 8));
    let registry_of = registry(dir.path());
    let opening = async |asked: OpenNamespace| {
        let opened = registry_of.open_namespace(ME, DEFAULT_TENANT, &asked, 1);
        opened.await.map(|opened| opened.difference.is_some())
    };
    // Neither where it is alone.
    assert!(matches!(opening(ask(&old, false, true)).await, Ok(false)));
    assert!(matches!(opening(ask(&new, true, false)).await, Ok(false)));
    assert!(matches!(opening(ask(&old, false, true)).await, Ok(true)));
    assert!(opening(ask(&old, true, false)).await.is_err());
    // An engine opens the other, and is the last from then on.
    assert!(matches!(opening(ask(&old, false, false)).await, Ok(true)));
    assert!(matches!(opening(ask(&new, false, true)).await, Ok(true)));
    assert!(matches!(opening(ask(&old, true, false)).await, Ok(false)));
    assert!(matches!(opening(ask(&new, false, false)).await, Ok(true)));
    // With other copies as well.
    let many = OpenNamespace {
        replicas: 3,
        ..ask(&old, false, true)
    };
    assert!(matches!(opening(many).await, Ok(true)));
    assert!(matches!(opening(ask(&new, true, false)).await, Ok(false)));
    drop(registry_of);
    // And after a restart.
    let again = registry(dir.path());
    let asked = ask(&new, true, false);
    let opened = again.open_namespace(ME, DEFAULT_TENANT, &asked, 1).await;
    assert_eq!(opened.unwrap().difference, None);
    let known = again.get(ME, old.id(DEFAULT_TENANT)).unwrap();
    assert_eq!((known.replicas, again.len()), (3, 2));
}

#[tokio::test]
async fn a_tenant_that_has_all_it_may_have_takes_nothing_from_another() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    for label in ["a", "b", "c"] {
        open_as(&registry, "one", label).await.unwrap();
    }
    let refused = open_as(&registry, "one", "d").await.unwrap_err();
    assert!(refused.to_string().contains("max_namespaces:"), "{refused}");
    open_as(&registry, "one", "a").await.unwrap();
    open_as(&registry, "two", "a").await.unwrap();
    open_as(&registry, "two", "b").await.unwrap();
    let refused = open_as(&registry, "three", "a").await.unwrap_err();
    assert!(
        refused.to_string().contains("max_namespaces_total:"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_namespace_of_another_tenant_is_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    let mine = open(&registry, &Namespace::opaque("a", 16, 8)).await;
    assert!(registry.get(TenantId(1), mine.id).is_err());
}

#[tokio::test]
async fn a_tenant_lists_its_own_page_by_page_and_sees_which_is_the_latest() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    let shapes = [("a", 16), ("a", 32), ("b", 16)];
    for (label, block_tokens) in shapes {
        open(&registry, &Namespace::opaque(label, block_tokens, 8)).await;
    }
    open_as(&registry, "other", "a").await.unwrap();
    let mut expected: Vec<(NamespaceId, bool)> = shapes
        .iter()
        .map(|&(label, block_tokens)| {
            let id = Namespace::opaque(label, block_tokens, 8).id(DEFAULT_TENANT);
            (id, (label, block_tokens) != ("a", 16))
        })
        .collect();
    expected.sort_unstable();
    let list = |label, after, most| {
        let (listed, and_more) = registry.list(DEFAULT_TENANT, label, after, most);
        let listed = listed.iter().map(|known| (known.space.id, known.is_latest));
        (listed.collect::<Vec<_>>(), and_more)
    };
    assert_eq!(list(None, None, 3), (expected.clone(), false));
    assert_eq!(list(None, None, 2), (expected[..2].to_vec(), true));
    let last = Some(expected[1].0);
    assert_eq!(list(None, last, 2), (expected[2..].to_vec(), false));
    assert_eq!(list(None, Some(expected[2].0), 2), (Vec::new(), false));
    assert_eq!(list(Some("a"), None, 3).0.len(), 2);
    assert_eq!(list(Some("c"), None, 3).0.len(), 0);
}

/// Opening a pipe for writing waits for a reader: a disk that hangs.
#[tokio::test]
async fn a_disk_that_hangs_holds_up_nobody_who_needs_no_disk() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    let known = open(&registry, &Namespace::opaque("a", 16, 8)).await;
    let pipe = dir.path().join("namespaces.new");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    // Should the calling thread wait after all, the test fails and does not hang.
    let reader = pipe.clone();
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let rescue = std::thread::spawn(move || {
        let timely = is_done.recv_timeout(Duration::from_secs(10)).is_ok();
        // Whoever opens it next finds an ordinary file.
        let opened = fs::File::open(&reader);
        fs::remove_file(&reader).unwrap();
        drop(opened);
        timely
    });
    let mut cx = task::Context::from_waker(Waker::noop());
    let mut stuck = Vec::new();
    // One batch in the writer's hand, at most, and one in the queue; more are told.
    let mut refused = 0;
    for i in 0..2 * MAX_OPENING + 1 {
        let label = format!("n{i}");
        let tenant = format!("t{i}");
        let registry = &registry;
        let mut opening = Box::pin(async move { open_as(registry, &tenant, &label).await });
        match opening.as_mut().poll(&mut cx) {
            Poll::Pending => stuck.push(opening),
            Poll::Ready(Err(BlocksError::Overloaded { limit, .. })) => {
                assert_eq!(limit, MAX_OPENING);
                refused += 1;
            }
            Poll::Ready(other) => panic!("answered before it was durable: {other:?}"),
        }
    }
    assert!(refused >= 1 && stuck.len() >= MAX_OPENING);
    assert!(registry.get(ME, known.id).is_ok());
    let again = open(&registry, &Namespace::opaque("a", 16, 8)).await;
    assert_eq!(again.id, known.id);
    done.send(()).unwrap();
    assert!(
        rescue.join().unwrap(),
        "the calling thread waited for the disk"
    );
    // A pipe cannot be synced: the first batch is told so, and is not known.
    let first = stuck.remove(0).await.unwrap_err();
    assert!(matches!(first, BlocksError::Registry(_)), "{first}");
    let unknown = Namespace::opaque("n0", 16, 8).id("t0");
    assert!(registry.get(ME, unknown).is_err());
}

#[tokio::test]
async fn a_full_disk_refuses_no_namespace_and_what_found_no_room_is_written_later() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    let [kept, late] = ["kept", "late"].map(|label| Namespace::opaque(label, 16, 8));
    open(&registry, &kept).await;
    // Whatever is written by way of this has no room.
    let beside = dir.path().join("namespaces.new");
    std::os::unix::fs::symlink("/dev/full", &beside).unwrap();
    let opened = open(&registry, &late).await;
    assert!(registry.get(ME, opened.id).is_ok());
    let on_disk = || fs::read_to_string(dir.path().join("namespaces.json")).unwrap();
    assert!(on_disk().contains("kept") && !on_disk().contains("late"));

    fs::remove_file(&beside).unwrap();
    open(&registry, &Namespace::opaque("next", 16, 8)).await;
    assert!(
        ["kept", "late", "next"]
            .iter()
            .all(|label| on_disk().contains(label))
    );
}

#[tokio::test]
async fn a_disk_that_hangs_does_not_hold_up_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    let pipe = dir.path().join("namespaces.new");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let namespace = Namespace::opaque("a", 16, 8);
    let asked = ask(&namespace, false, false);
    let mut opening = Box::pin(registry.open_namespace(ME, DEFAULT_TENANT, &asked, 1));
    let mut cx = task::Context::from_waker(Waker::noop());
    assert!(opening.as_mut().poll(&mut cx).is_pending());
    drop(opening);
    let (done, is_done) = mpsc::channel();
    let ending = std::thread::spawn(move || {
        drop(registry);
        done.send(()).unwrap();
    });
    let ended = is_done.recv_timeout(Duration::from_secs(60));
    // Whoever waits for a reader is let go, so that a failure is no hang.
    let reader = fs::File::open(&pipe);
    assert!(ended.is_ok(), "the end waited for the disk");
    drop(reader);
    ending.join().unwrap();
}
